"""The custom security checks (S119): one function, deny by default.

A manager obeys its director and its service's owner; an agent obeys the manager of its own service, at the highest
epoch it has seen; the director serves a manager only for its own service, at its current epoch.
"""

from dataclasses import dataclass
from typing import Literal

from conpaas.core.errors import ForbiddenError, NotAuthenticatedError, NotFoundError
from conpaas.core.identity import Identity
from conpaas.core.messages.base import Endpoint, Who

Kind = Literal["anonymous", "user", "director", "manager", "agent"]


@dataclass(frozen=True)
class Caller:
    """Who calls, as proved by a certificate or a bearer token."""

    kind: Kind
    user: str | None = None
    service: str | None = None
    instance: str | None = None
    epoch: int | None = None
    admin: bool = False
    scopes: frozenset[str] = frozenset({"read", "write", "admin"})

    @property
    def name(self) -> str:
        """How the event log names this caller."""
        match self.kind:
            case "user":
                return f"user:{self.user}"
            case "manager" | "agent":
                return f"{self.kind}:{self.service}"
            case _:
                return self.kind


ANONYMOUS = Caller("anonymous")


@dataclass(frozen=True)
class Target:
    """What is called upon: a service with its owner and its managers' current epoch, or nothing in particular."""

    owner: str | None = None
    service: str | None = None
    epoch: int = 0


def authorize(caller: Caller, command: Endpoint, target: Target) -> None:
    """Return if `caller` may give `command` to `target`; else raise.

    Raises NotAuthenticatedError for nobody, NotFoundError for a user who is not the owner (what exists is not told to
    strangers), ForbiddenError for everything else.
    """
    if any(_fits(who, caller, target) for who in command.allow):
        open_to_all = Who.ANYONE in command.allow
        if caller.kind == "user" and not open_to_all and command.scope not in caller.scopes:
            raise ForbiddenError(
                f"this token may not {command.scope}",
                value=command.path,
                hint=f"make a token with the scope '{command.scope}'",
            )
        return
    if caller.kind == "anonymous":
        raise NotAuthenticatedError("who are you?")
    if caller.kind == "user" and Who.OWNER in command.allow:
        raise NotFoundError("no such thing here", hint="'conpaas ls' shows what is yours")
    raise ForbiddenError(f"a {caller.kind} may not do this", value=command.path)


def _fits(who: Who, caller: Caller, target: Target) -> bool:
    match who:
        case Who.ANYONE:
            return True
        case Who.USER:
            return caller.kind == "user"
        case Who.OWNER:
            return caller.kind == "user" and (
                caller.admin or (target.owner is not None and caller.user == target.owner)
            )
        case Who.ADMIN:
            return caller.kind == "user" and caller.admin
        case Who.DIRECTOR:
            return caller.kind == "director"
        case Who.MANAGER:
            return caller.kind == "manager" and _same(caller, target) and (caller.epoch or 0) >= target.epoch
        case Who.AGENT:
            return caller.kind == "agent" and _same(caller, target)


def _same(caller: Caller, target: Target) -> bool:
    return target.service is not None and caller.service == target.service


def caller_of(identity: Identity | None) -> Caller:
    """Return the caller that a certificate proves; nobody without one."""
    if identity is None:
        return ANONYMOUS
    return Caller(
        identity.kind,
        user=identity.user,
        service=identity.service,
        instance=identity.instance,
        epoch=identity.epoch,
    )
