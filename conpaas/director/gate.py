"""Who calls the public API, and on what: every route passes here."""

from typing import TypeAlias

from aiohttp import web
from sqlalchemy import select

from conpaas.core import rpc
from conpaas.core.errors import BadInputError, NotAuthenticatedError
from conpaas.core.messages.base import Endpoint, Who
from conpaas.core.trust import ANONYMOUS, Caller, Target, authorize
from conpaas.director.accounts import Accounts
from conpaas.director.db.database import Database
from conpaas.director.db.models import Application, Operation, Service

Call: TypeAlias = rpc.Call[Caller]
Served: TypeAlias = tuple[Endpoint, rpc.Handler]

_REMEMBERED = 10_000
_NOTHING = Target()


class Gate:
    """Authenticates by bearer token and authorises by the owner of what the path names."""

    def __init__(self, db: Database, accounts: Accounts) -> None:
        self._db, self._accounts = db, accounts
        self._targets: dict[tuple[str, str], Target] = {}

    async def authenticate(self, request: web.Request, endpoint: Endpoint) -> Caller:
        """Say who calls; raise NotAuthenticatedError, ForbiddenError or NotFoundError if they may not."""
        token = bearer(request)
        caller = ANONYMOUS if token is None else await self._accounts.caller(token)
        if token is not None and caller is ANONYMOUS and Who.ANYONE not in endpoint.allow:
            raise NotAuthenticatedError("this token is unknown or has expired")
        authorize(caller, endpoint, await self._target(request))
        return caller

    async def _target(self, request: web.Request) -> Target:
        """Return what the path names, with its owner, who never changes."""
        for what, table in _TABLES.items():
            name = request.match_info.get(what)
            if name is not None:
                known = self._targets.get((what, name))
                return known or await self._look_up(what, table, name)
        return _NOTHING

    async def _look_up(
        self, what: str, table: type[Service] | type[Application] | type[Operation], name: str
    ) -> Target:
        async with self._db.read() as session:
            owner = await session.scalar(select(table.user_id).where(table.id == name))
        if owner is None:
            return _NOTHING
        if len(self._targets) >= _REMEMBERED:
            self._targets.clear()
        target = self._targets[what, name] = Target(owner=owner, service=name if what == "service" else None)
        return target


_TABLES: dict[str, type[Service] | type[Application] | type[Operation]] = {
    "service": Service,
    "application": Application,
    "operation": Operation,
}


def bearer(request: web.Request) -> str | None:
    """Return the bearer token of a request."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" and token else None


def expected(call: Call) -> int | None:
    """Return the generation that `If-Match` demands; raise BadInputError if it is none."""
    given = call.http.headers.get("If-Match")
    if given is None or given.strip() == "*":
        return None
    words = given.strip().removeprefix("W/").strip('"')
    if not words.isdecimal() or len(words) > 18:
        raise BadInputError("If-Match must be a generation", value=given, hint="send the service's 'generation'")
    return int(words)
