"""Accounts: who may come in, with what, for how long."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import altcha
import asyncssh
import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import select

from conpaas.core import tls
from conpaas.core.errors import (
    BadInputError,
    ConflictError,
    ForbiddenError,
    NotAuthenticatedError,
    NotFoundError,
    TooManyRequestsError,
)
from conpaas.core.messages import public
from conpaas.core.trust import ANONYMOUS, Caller
from conpaas.director.db.models import Token, User
from tests.fakes.director import DATABASES, PASSWORD, Rig, open_rig


@pytest.fixture(params=DATABASES)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, request.param) as rig:
        yield rig


@pytest.fixture
async def user(rig: Rig) -> str:
    return await rig.add_user()


def form(name: str = "bob", captcha: str = "", **words: str) -> public.Registration:
    return public.Registration(
        username=name, email="bob@example.org", password=SecretStr(PASSWORD), captcha=captcha, **words
    )


def solved(rig: Rig) -> str:
    """Do the work that a browser does."""
    challenge = altcha.Challenge.from_dict(rig.accounts.captcha.challenge())
    solution = altcha.solve_challenge(challenge)
    assert solution is not None
    return altcha.Payload(challenge, solution).to_base64()


def credentials(name: str = "alice", password: str = PASSWORD) -> public.Credentials:
    return public.Credentials(username=name, password=SecretStr(password))


async def login(rig: Rig, name: str = "alice", password: str = PASSWORD, address: str = "192.0.2.1") -> str:
    return (await rig.accounts.login(credentials(name, password), address)).token.get_secret_value()


# -- registration ---------------------------------------------------------------------------------------------------


async def test_whoever_does_the_work_gets_an_account(rig: Rig, real_time: None) -> None:
    view = await rig.accounts.register(form(captcha=solved(rig), affiliation="University"))

    assert (view.username, view.affiliation, view.admin, view.credits) == ("bob", "University", False, 50)
    assert await login(rig, "bob")


@pytest.mark.parametrize("captcha", ["", "rubbish", "e30="])
async def test_without_the_work_there_is_no_account(rig: Rig, captcha: str) -> None:
    with pytest.raises(BadInputError, match="proof of work"):
        await rig.accounts.register(form(captcha=captcha))

    assert [user.username for user in await rig.users()] == ["admin"]


async def test_a_proof_of_work_counts_once(rig: Rig, real_time: None) -> None:
    captcha = solved(rig)
    await rig.accounts.register(form(captcha=captcha))

    with pytest.raises(BadInputError, match="has been used"):
        await rig.accounts.register(form("carol", captcha=captcha))


async def test_a_proof_of_work_of_somebody_elses_making_does_not_count(rig: Rig) -> None:
    challenge = altcha.create_challenge("PBKDF2/SHA-256", 1, counter=1, hmac_secret="mine")
    solution = altcha.solve_challenge(challenge)
    assert solution is not None

    with pytest.raises(BadInputError, match="proof of work"):
        await rig.accounts.register(form(captcha=altcha.Payload(challenge, solution).to_base64()))


async def test_a_user_name_is_taken_once(rig: Rig, user: str, real_time: None) -> None:
    with pytest.raises(ConflictError, match="'alice' is taken"):
        await rig.accounts.register(form("alice", captcha=solved(rig)))


@pytest.mark.parametrize("name", ["", "a", "Alice", "a b", "<b>", "x" * 40, "é"])
def test_a_user_name_is_short_and_plain(name: str) -> None:
    with pytest.raises(ValidationError):
        form(name)


async def test_registration_can_be_closed(tmp_path: Path) -> None:
    async with open_rig(tmp_path, registration=False) as rig:
        with pytest.raises(ForbiddenError, match="closed"):
            await rig.accounts.register(form())


async def test_the_first_start_makes_an_administrator_and_tells_the_password_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path, admin_password="") as rig:
        password = rig.director.new_admin_password
        assert password is not None
        session = await rig.accounts.login(credentials("admin", password), "::1")
        assert (session.user.admin, session.user.credits) == (True, 9999)
    async with open_rig(tmp_path, admin_password="") as rig:
        assert rig.director.new_admin_password is None


# -- logging in -----------------------------------------------------------------------------------------------------


async def test_a_session_proves_its_user_until_it_ends(rig: Rig, user: str) -> None:
    token = await login(rig)
    assert (await rig.accounts.caller(token)).user == user

    rig.clock.advance(days=8)
    assert await rig.accounts.caller(token) is ANONYMOUS

    token = await login(rig)
    await rig.accounts.logout(token)
    assert await rig.accounts.caller(token) is ANONYMOUS


async def test_what_is_kept_of_a_token_does_not_open_anything(rig: Rig, user: str) -> None:
    token = await login(rig)
    async with rig.db.read() as session:
        kept = (await session.scalars(select(Token.hash))).all()
        password = await session.scalar(select(User.password_hash).where(User.id == user))

    assert token not in kept
    assert str(password).startswith("$argon2id$")
    for stolen in kept:
        assert await rig.accounts.caller(stolen) is ANONYMOUS


@pytest.mark.parametrize(("name", "password"), [("alice", "wrong"), ("nobody", PASSWORD), ("' OR 1=1 --", "x")])
async def test_a_wrong_name_and_a_wrong_password_are_told_alike(rig: Rig, user: str, name: str, password: str) -> None:
    with pytest.raises(NotAuthenticatedError, match="user name or password is wrong"):
        await login(rig, name, password)


async def test_guessing_is_slowed_down_by_name_and_by_address(rig: Rig, user: str) -> None:
    for _ in range(10):
        with pytest.raises(NotAuthenticatedError):
            await login(rig, password="guess")
    with pytest.raises(TooManyRequestsError, match="too many failed logins"):
        await login(rig)
    rig.clock.advance(seconds=301)
    await login(rig)

    for number in range(100):
        with pytest.raises(NotAuthenticatedError):
            await login(rig, f"name{number}", "guess")
    with pytest.raises(TooManyRequestsError):
        await login(rig)
    await login(rig, address="192.0.2.2")


async def test_a_disabled_account_is_out_at_once(rig: Rig, user: str) -> None:
    token = await login(rig)
    admin = (await rig.users())[0].id

    await rig.accounts.change_user(user, public.ChangeUser(disabled=True), admin, "user:admin")

    assert await rig.accounts.caller(token) is ANONYMOUS
    with pytest.raises(ForbiddenError, match="disabled"):
        await login(rig)
    with pytest.raises(ConflictError, match="your own rights"):
        await rig.accounts.change_user(admin, public.ChangeUser(disabled=True), admin, "user:admin")


async def test_a_new_password_ends_all_other_sessions(rig: Rig, user: str) -> None:
    mine, other = await login(rig), await login(rig)
    change = public.ChangePassword(old=SecretStr(PASSWORD), new=SecretStr("another one"))

    await rig.accounts.change_password(user, change, mine)

    assert (await rig.accounts.caller(mine)).user == user
    assert await rig.accounts.caller(other) is ANONYMOUS
    with pytest.raises(NotAuthenticatedError):
        await login(rig)
    with pytest.raises(BadInputError, match="old password"):
        await rig.accounts.change_password(user, change, mine)


# -- API tokens -----------------------------------------------------------------------------------------------------


async def test_an_api_token_has_scopes_and_an_end(rig: Rig, user: str) -> None:
    me = Caller("user", user=user)
    made = await rig.accounts.create_token(me, public.CreateToken(name="ci", scopes=("read",), expires_in_days=1))
    assert made.secret is not None
    secret = made.secret.get_secret_value()

    caller = await rig.accounts.caller(secret)
    assert (caller.user, caller.scopes) == (user, frozenset({"read"}))
    [shown] = (await rig.accounts.tokens(user)).items
    assert (shown.name, shown.secret) == ("ci", None)
    assert shown.last_used is not None
    with pytest.raises(ForbiddenError, match="scope 'write'"):
        await rig.accounts.create_token(caller, public.CreateToken(name="more"))

    rig.clock.advance(hours=25)
    assert await rig.accounts.caller(secret) is ANONYMOUS
    await rig.accounts.prune()
    assert (await rig.accounts.tokens(user)).items == ()


async def test_only_an_administrator_makes_tokens_that_administrate(rig: Rig, user: str) -> None:
    asked = public.CreateToken(name="root", scopes=("admin",))

    with pytest.raises(ForbiddenError, match="scope 'admin'"):
        await rig.accounts.create_token(Caller("user", user=user), asked)
    made = await rig.accounts.create_token(Caller("user", user=user, admin=True), asked)
    assert made.scopes == ("admin",)


async def test_a_token_is_revoked_by_its_user_only(rig: Rig, user: str) -> None:
    made = await rig.accounts.create_token(Caller("user", user=user), public.CreateToken(name="ci"))
    other = await rig.add_user("mallory")

    with pytest.raises(NotFoundError):
        await rig.accounts.delete_token(other, made.id)
    await rig.accounts.delete_token(user, made.id)

    assert made.secret is not None
    assert await rig.accounts.caller(made.secret.get_secret_value()) is ANONYMOUS
    with pytest.raises(NotFoundError):
        await rig.accounts.delete_token(user, made.id)


# -- SSH keys and certificates --------------------------------------------------------------------------------------


def public_key() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_public_key("openssh").decode() + " me@here"


async def test_an_ssh_key_belongs_to_one_user(rig: Rig, user: str) -> None:
    key = public_key()
    added = await rig.accounts.add_key(user, public.AddKey(name="laptop", key=key))
    assert added.fingerprint.startswith("SHA256:")
    other = await rig.add_user("mallory")

    with pytest.raises(ConflictError, match="in use"):
        await rig.accounts.add_key(other, public.AddKey(name="stolen", key=key))
    with pytest.raises(NotFoundError):
        await rig.accounts.delete_key(other, added.id)
    await rig.accounts.delete_key(user, added.id)
    assert (await rig.accounts.keys(user)).items == ()


@pytest.mark.parametrize("key", ["", "ssh-ed25519", "ssh-rsa AAAA", "-----BEGIN PRIVATE KEY-----", 'command="x" ssh'])
async def test_what_is_no_ssh_key_is_refused(rig: Rig, user: str, key: str) -> None:
    with pytest.raises(BadInputError, match="not an SSH public key"):
        await rig.accounts.add_key(user, public.AddKey(name="odd", key=key))


async def test_a_users_certificate_names_the_user(rig: Rig, user: str) -> None:
    _, csr = tls.make_key_and_csr()

    answer = rig.accounts.certificate(user, csr.decode())

    start, end = tls.certificate_lifetime(answer.certificate.encode())
    assert end - start == timedelta(hours=24, minutes=5)
    assert (answer.user, answer.deployment) == (user, rig.director.trust.deployment)
    with pytest.raises(BadInputError):
        rig.accounts.certificate(user, "rubbish")


# -- administration -------------------------------------------------------------------------------------------------


async def test_credits_are_granted_and_taken(rig: Rig, user: str) -> None:
    assert (await rig.accounts.grant(user, public.Grant(amount=20), "user:admin")).credits == 120
    assert (await rig.accounts.grant(user, public.Grant(amount=-5), "user:admin")).credits == 115
    with pytest.raises(BadInputError):
        await rig.accounts.grant(user, public.Grant(amount=0), "user:admin")
    with pytest.raises(NotFoundError):
        await rig.accounts.grant("usr-none", public.Grant(amount=1), "user:admin")

    events = [event for event in await rig.events("credits-granted") if event.actor == "user:admin"]
    assert [(event.before, event.after) for event in events] == [("100", "120"), ("120", "115")]


async def test_users_come_in_pages(rig: Rig) -> None:
    for number in range(4):
        await rig.add_user(f"user{number}")

    first = await rig.accounts.users(public.Paging(limit=3))
    rest = await rig.accounts.users(public.Paging(limit=3, cursor=first.next))

    names = [view.username for view in (*first.items, *rest.items)]
    assert names == ["admin", "user0", "user1", "user2", "user3"]
    assert rest.next is None
    with pytest.raises(BadInputError, match="cursor"):
        await rig.accounts.users(public.Paging(cursor="x"))


async def test_names_that_differ_are_registered_at_once(rig: Rig) -> None:
    await asyncio.gather(*(rig.add_user(f"user{number}") for number in range(5)))

    assert len(await rig.users()) == 6


@pytest.fixture
def real_time(rig: Rig) -> None:
    """Put the clock of the test to now: the captcha library looks at the machine's own."""
    rig.clock.advance(seconds=time.time() - rig.clock.now().timestamp())
