"""The security checks, one table: every kind of right against every kind of caller; nothing is allowed by default."""

import pytest

from conpaas.core.errors import ConpaasError, ForbiddenError, NotAuthenticatedError, NotFoundError
from conpaas.core.identity import Identity
from conpaas.core.messages.base import Endpoint, Method, Who, who
from conpaas.core.trust import ANONYMOUS, Caller, Target, authorize, caller_of

TARGET = Target(owner="ann", service="svc-1", epoch=3)

CALLERS = {
    "nobody": ANONYMOUS,
    "owner": Caller("user", user="ann"),
    "other-user": Caller("user", user="bob"),
    "admin": Caller("user", user="root", admin=True),
    "director": Caller("director"),
    "manager": Caller("manager", service="svc-1", instance="m", epoch=3),
    "next-manager": Caller("manager", service="svc-1", instance="m", epoch=4),
    "old-manager": Caller("manager", service="svc-1", instance="m", epoch=2),
    "manager-without-epoch": Caller("manager", service="svc-1", instance="m"),
    "other-manager": Caller("manager", service="svc-2", instance="m", epoch=9),
    "agent": Caller("agent", service="svc-1", instance="i-1"),
    "other-agent": Caller("agent", service="svc-2", instance="i-1"),
}

ALLOWED = {
    Who.ANYONE: set(CALLERS),
    Who.USER: {"owner", "other-user", "admin"},
    Who.OWNER: {"owner", "admin"},
    Who.ADMIN: {"admin"},
    Who.DIRECTOR: {"director"},
    Who.MANAGER: {"manager", "next-manager"},
    Who.AGENT: {"agent"},
}


def command(*allowed: Who, method: Method = "GET") -> Endpoint:
    return Endpoint(method=method, path="/thing", summary="A thing", allow=who(*allowed))


def may(caller: Caller, endpoint: Endpoint, target: Target = TARGET) -> bool:
    try:
        authorize(caller, endpoint, target)
    except ConpaasError:
        return False
    return True


def test_the_table_names_every_right() -> None:
    assert set(ALLOWED) == set(Who)


@pytest.mark.parametrize("right", Who)
@pytest.mark.parametrize("name", CALLERS)
def test_each_right_lets_in_exactly_its_callers(right: Who, name: str) -> None:
    assert may(CALLERS[name], command(right)) == (name in ALLOWED[right])


@pytest.mark.parametrize("name", CALLERS)
def test_a_command_that_allows_nobody_obeys_nobody(name: str) -> None:
    assert not may(CALLERS[name], command())


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize("right", [Who.OWNER, Who.MANAGER, Who.AGENT])
def test_without_a_target_no_right_that_is_bound_to_one_is_given(right: Who, name: str) -> None:
    assert may(CALLERS[name], command(right), Target()) == (right is Who.OWNER and name == "admin")


@pytest.mark.parametrize("caller", [Caller("user"), Caller("manager", epoch=1), Caller("agent")])
def test_a_caller_without_a_name_is_not_taken_for_a_target_without_one(caller: Caller) -> None:
    assert not may(caller, command(Who.OWNER, Who.MANAGER, Who.AGENT), Target())


@pytest.mark.parametrize("name", CALLERS)
def test_several_rights_let_in_the_callers_of_each(name: str) -> None:
    allowed = ALLOWED[Who.DIRECTOR] | ALLOWED[Who.AGENT]
    assert may(CALLERS[name], command(Who.DIRECTOR, Who.AGENT)) == (name in allowed)


def test_who_is_refused_learns_no_more_than_he_may() -> None:
    owner_only = command(Who.OWNER)
    with pytest.raises(NotAuthenticatedError):
        authorize(ANONYMOUS, owner_only, TARGET)
    with pytest.raises(NotFoundError):  # as if there were no such thing
        authorize(CALLERS["other-user"], owner_only, TARGET)
    with pytest.raises(ForbiddenError):
        authorize(CALLERS["agent"], owner_only, TARGET)
    with pytest.raises(ForbiddenError):
        authorize(CALLERS["owner"], command(Who.ADMIN), TARGET)


@pytest.mark.parametrize(
    ("method", "scopes", "allowed"),
    [
        ("GET", {"read"}, True),
        ("GET", {"write"}, False),
        ("GET", set(), False),
        ("POST", {"read"}, False),
        ("DELETE", {"read"}, False),
        ("PUT", {"write"}, True),
    ],
)
def test_a_token_does_what_its_scopes_say(method: Method, scopes: set[str], allowed: bool) -> None:
    caller = Caller("user", user="ann", scopes=frozenset(scopes))
    assert may(caller, command(Who.OWNER, method=method)) == allowed


def test_an_administrators_token_without_the_scope_administers_nothing() -> None:
    endpoint = command(Who.ADMIN)
    assert endpoint.scope == "admin"
    with pytest.raises(ForbiddenError, match="may not admin"):
        authorize(Caller("user", user="root", admin=True, scopes=frozenset({"read", "write"})), endpoint, TARGET)


def test_a_caller_is_what_its_certificate_says() -> None:
    assert caller_of(None) is ANONYMOUS
    assert caller_of(Identity.director("dep")) == Caller("director")
    assert caller_of(Identity.for_user("dep", "ann")) == Caller("user", user="ann")
    assert caller_of(Identity.agent("dep", "svc-1", "i-1")) == CALLERS["agent"]
    assert caller_of(Identity.manager("dep", "svc-1", 3, "m")) == CALLERS["manager"]


def test_callers_have_names_for_the_event_log() -> None:
    names = {name: caller.name for name, caller in CALLERS.items()}
    assert names["owner"] == "user:ann"
    assert names["manager"] == "manager:svc-1"
    assert names["agent"] == "agent:svc-1"
    assert names["director"] == "director"
    assert names["nobody"] == "anonymous"
