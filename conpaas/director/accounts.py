"""Accounts: registration, login, sessions and API tokens, SSH keys, certificates of users."""

import asyncio
import hashlib
import secrets
from collections import defaultdict, deque
from datetime import datetime, timedelta
from typing import Any

import altcha
import argon2
import asyncssh
import structlog
from argon2.exceptions import InvalidHashError, VerificationError
from pydantic import SecretStr
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import ids
from conpaas.core.clock import Clock
from conpaas.core.errors import (
    BadInputError,
    ConflictError,
    ForbiddenError,
    NotAuthenticatedError,
    NotFoundError,
    TooManyRequestsError,
)
from conpaas.core.identity import Identity
from conpaas.core.messages import public
from conpaas.core.trust import ANONYMOUS, Caller
from conpaas.director import money, views
from conpaas.director.db.database import Database
from conpaas.director.db.models import SshKey, Token, User
from conpaas.director.enrolment import Trust
from conpaas.director.events import record
from conpaas.director.ledger import user_of
from conpaas.director.settings import DirectorSettings

log = structlog.get_logger()

ADMIN = "admin"
CAPTCHA_S = 1200.0
CAPTCHA_ROUNDS = 1000
SESSION, API = "session", "api"
USED_EVERY = timedelta(minutes=5)
"""A token's time of last use is kept no more exactly than this."""
HASHER = argon2.PasswordHasher()
_TABLES = ("users", "tokens")


def hashed(token: str) -> str:
    """Return what is kept of a bearer token."""
    return hashlib.sha256(token.encode()).hexdigest()


class RateLimit:
    """Counts failures by key within a sliding window of `window_s` seconds; forgets the rest."""

    def __init__(self, limit: int, window_s: float, clock: Clock) -> None:
        self._limit, self._window_s, self._clock = limit, window_s, clock
        self._failures: dict[str, deque[float]] = defaultdict(deque)

    def check(self, key: str) -> None:
        """Raise TooManyRequestsError if `key` has failed too often."""
        times = self._failures.get(key)
        if times is None:
            return
        oldest = self._clock.monotonic() - self._window_s
        while times and times[0] < oldest:
            times.popleft()
        if not times:
            del self._failures[key]
        elif len(times) >= self._limit:
            wait_s = int(times[0] - oldest) + 1
            raise TooManyRequestsError("too many failed logins", hint=f"try again in {wait_s} seconds")

    def failed(self, key: str) -> None:
        """Count a failure; of a flood of keys only the newest ten thousand are remembered."""
        if len(self._failures) >= 10_000 and key not in self._failures:
            del self._failures[next(iter(self._failures))]
        self._failures[key].append(self._clock.monotonic())

    def succeeded(self, key: str) -> None:
        """Forget the failures of `key`."""
        self._failures.pop(key, None)


class Captcha:
    """Proof-of-work challenges of our own (ALTCHA). Each solution counts once; a restart voids open challenges."""

    def __init__(self, work: int, clock: Clock) -> None:
        self._work, self._clock = work, clock
        self._secret = secrets.token_bytes(32)
        self._used: dict[str, datetime] = {}

    def challenge(self) -> dict[str, Any]:
        """Return a fresh challenge, in the widget's form."""
        made = altcha.create_challenge(
            "PBKDF2/SHA-256",
            CAPTCHA_ROUNDS,
            counter=self._work // 2 + secrets.randbelow(self._work // 2 + 1),
            expires_at=self._clock.now() + timedelta(seconds=CAPTCHA_S),
            hmac_secret=self._secret,
        )
        return dict(made.to_dict())

    def check(self, payload: str) -> None:
        """Raise BadInputError unless `payload` solves a challenge of ours that nobody has used."""
        result = altcha.verify_solution(payload, self._secret)
        if not result.verified:
            raise BadInputError(
                "the proof of work is missing, wrong or too old",
                hint="let your browser solve a new challenge, then send the form again",
            )
        now = self._clock.now()
        self._used = {key: until for key, until in self._used.items() if until > now}
        key = altcha.Payload.from_base64(payload).challenge.signature or ""
        if key in self._used:
            raise BadInputError("this proof of work has been used", hint="let your browser solve a new challenge")
        self._used[key] = now + timedelta(seconds=CAPTCHA_S)


class Accounts:
    """All about users. Passwords are hashed with argon2id, in a thread; tokens are kept as their SHA-256."""

    def __init__(self, db: Database, settings: DirectorSettings, trust: Trust, clock: Clock) -> None:
        self._db, self._settings, self._trust, self._clock = db, settings, trust, clock
        self.captcha = Captcha(settings.captcha_work, clock)
        self._hashing = asyncio.Semaphore(2)  # each takes 64 MiB for a moment
        self._by_user = RateLimit(settings.login_failures, settings.login_window_s, clock)
        self._by_address = RateLimit(settings.login_failures * 10, settings.login_window_s, clock)
        self._known: dict[str, tuple[Caller, datetime]] = {}
        self._known_at: tuple[int, ...] = ()
        self._names: dict[str, str] = {}

    # -- making accounts --------------------------------------------------------------------------------------------

    async def ensure_admin(self) -> str | None:
        """Make the administrator's account if there is no account at all; return its password if it is a new one."""
        async with self._db.read() as session:
            if await session.scalar(select(func.count()).select_from(User)):
                return None
        given = self._settings.admin_password.get_secret_value()
        password = given or secrets.token_urlsafe(12)
        form = public.Registration(username=ADMIN, email="admin@localhost", password=SecretStr(password))
        await self._create(form, admin=True)
        return None if given else password

    async def register(self, form: public.Registration) -> public.UserView:
        """Make an account for somebody who has done the proof of work.

        Raises ForbiddenError when registration is closed, BadInputError, ConflictError for a name that is taken.
        """
        if not self._settings.registration:
            raise ForbiddenError("registration is closed here", hint="ask the administrator for an account")
        await asyncio.to_thread(self.captcha.check, form.captcha)
        return await self._create(form, admin=False)

    async def _create(self, form: public.Registration, *, admin: bool) -> public.UserView:
        password_hash = await self._hash(form.password.get_secret_value())
        now = self._clock.now()
        async with self._db.write() as session:
            if await session.scalar(select(User.seq).where(User.username == form.username)):
                raise ConflictError(
                    f"the user name '{form.username}' is taken", value=form.username, hint="choose another one"
                )
            user = User(
                id=ids.new("usr"),
                username=form.username,
                email=form.email,
                first_name=form.first_name,
                last_name=form.last_name,
                affiliation=form.affiliation,
                password_hash=password_hash,
                admin=admin,
                disabled=False,
                credits=0,
                created=now,
            )
            session.add(user)
            await session.flush()
            record(session, "registered", at=now, actor=f"user:{user.username}", user=user.id)
            amount = self._settings.admin_credits if admin else self._settings.registration_credits
            if amount:
                money.grant(session, user, amount, at=now, actor="director", reason="a new account")
            return views.user_view(user)

    # -- logging in -------------------------------------------------------------------------------------------------

    async def login(self, form: public.Credentials, address: str) -> public.Session:
        """Start a session. The same error and the same time for a wrong password and an unknown name."""
        name = form.username.strip().lower()
        self._by_user.check(name)
        self._by_address.check(address)
        async with self._db.read() as session:
            user = await session.scalar(select(User).where(User.username == name))
        password = form.password.get_secret_value()
        if user is None:
            await self._hash(password)  # takes the time that a known name takes
        if user is None or not await self._verify(user.password_hash, password):
            self._by_user.failed(name)
            self._by_address.failed(address)
            raise NotAuthenticatedError("user name or password is wrong", hint="check both and try again")
        self._by_user.succeeded(name)
        if user.disabled:
            raise ForbiddenError("this account is disabled", hint="ask the administrator")
        expires = self._clock.now() + timedelta(seconds=self._settings.session_s)
        scopes = ["read", "write", "admin"]
        async with self._db.write() as session:
            token, secret = self._new_token(user.id, SESSION, "", scopes, expires)
            session.add(token)
        return public.Session(token=secret, expires=expires, user=views.user_view(user))

    async def logout(self, bearer: str) -> None:
        """End the session, or revoke the API token, of `bearer`."""
        async with self._db.write() as session:
            token = await session.scalar(select(Token).where(Token.hash == hashed(bearer)))
            if token is not None:
                await session.delete(token)

    async def change_password(self, user_id: str, form: public.ChangePassword, bearer: str) -> None:
        """Set a new password, proved by the old one; all other sessions end."""
        self._by_user.check(user_id)
        async with self._db.read() as session:
            user = await user_of(session, user_id)
        if not await self._verify(user.password_hash, form.old.get_secret_value()):
            self._by_user.failed(user_id)
            raise BadInputError("the old password is wrong", hint="type the password that you log in with now")
        password_hash = await self._hash(form.new.get_secret_value())
        async with self._db.write() as session:
            user = await user_of(session, user_id)
            user.password_hash = password_hash
            others = select(Token).where(Token.user_id == user_id, Token.kind == SESSION, Token.hash != hashed(bearer))
            for token in await session.scalars(others):
                await session.delete(token)
            record(session, "password-changed", at=self._clock.now(), actor=f"user:{user.username}", user=user_id)

    async def caller(self, bearer: str) -> Caller:
        """Say who bears this token: nobody, for one that is unknown or has expired.

        Known ones are kept in memory until an account or a token changes.
        """
        stamp = self._db.stamp(*_TABLES)
        if stamp != self._known_at:
            self._known, self._known_at = {}, stamp
        key = hashed(bearer)
        known = self._known.get(key)
        if known is None:
            known = await self._look_up(key)
            if known is None:
                return ANONYMOUS
            if stamp == self._db.stamp(*_TABLES):
                self._known[key] = known
        caller, expires = known
        return caller if expires > self._clock.now() else ANONYMOUS

    def actor(self, caller: Caller) -> str:
        """Return how the event log names a caller that `caller` has found."""
        return f"user:{self._names.get(caller.user or '', caller.user or '')}"

    async def _look_up(self, key: str) -> tuple[Caller, datetime] | None:
        async with self._db.read() as session:
            query = select(Token, User).join(User, User.id == Token.user_id).where(Token.hash == key)
            row = (await session.execute(query)).one_or_none()
        if row is None or row[1].disabled:
            return None
        token, user = row
        self._names[user.id] = user.username
        await self._note_use(token)
        return Caller("user", user=user.id, admin=user.admin, scopes=frozenset(token.scopes)), token.expires

    async def _note_use(self, token: Token) -> None:
        now = self._clock.now()
        if token.kind == API and (token.last_used is None or now - token.last_used > USED_EVERY):
            async with self._db.write() as session:
                row = await session.get(Token, token.id)
                if row is not None:
                    row.last_used = now

    async def _hash(self, password: str) -> str:
        async with self._hashing:
            return await asyncio.to_thread(HASHER.hash, password)

    async def _verify(self, password_hash: str, password: str) -> bool:
        async with self._hashing:
            try:
                return await asyncio.to_thread(HASHER.verify, password_hash, password)
            except (VerificationError, InvalidHashError):
                return False

    # -- the account ------------------------------------------------------------------------------------------------

    async def me(self, user_id: str) -> public.UserView:
        """Show an account."""
        async with self._db.read() as session:
            return views.user_view(await user_of(session, user_id))

    async def tokens(self, user_id: str) -> public.Tokens:
        """Show a user's API tokens, without their secrets."""
        async with self._db.read() as session:
            query = select(Token).where(Token.user_id == user_id, Token.kind == API).order_by(Token.created, Token.id)
            return public.Tokens(items=tuple(_token_view(row) for row in await session.scalars(query)))

    async def create_token(self, caller: Caller, form: public.CreateToken) -> public.TokenView:
        """Make an API token. It may do no more than the caller's own."""
        for scope in form.scopes:
            if scope not in caller.scopes or (scope == "admin" and not caller.admin):
                raise ForbiddenError(f"you cannot give the scope '{scope}': you have it not", value=scope)
        user_id = caller.user or ""
        expires = self._clock.now() + timedelta(days=form.expires_in_days)
        async with self._db.write() as session:
            await self._check_count(session, Token, user_id, "API tokens")
            token, secret = self._new_token(user_id, API, form.name, sorted(set(form.scopes)), expires)
            session.add(token)
            user = await user_of(session, user_id)
            now = self._clock.now()
            record(session, "token-created", at=now, actor=f"user:{user.username}", user=user_id, message=form.name)
            return _token_view(token, secret)

    async def delete_token(self, user_id: str, token_id: str) -> None:
        """Revoke an API token; NotFoundError for one that is not the user's."""
        async with self._db.write() as session:
            token = await session.get(Token, token_id)
            if token is None or token.user_id != user_id or token.kind != API:
                raise NotFoundError("you have no such token", value=token_id)
            await session.delete(token)
            user = await user_of(session, user_id)
            now = self._clock.now()
            record(session, "token-revoked", at=now, actor=f"user:{user.username}", user=user_id, message=token.name)

    def _new_token(self, user_id: str, kind: str, name: str, scopes: list[str], expires: datetime) -> tuple[Token, str]:
        secret = f"cps_{ids.new_secret()}"
        token = Token(
            id=ids.new("tok"),
            user_id=user_id,
            kind=kind,
            name=name,
            hash=hashed(secret),
            scopes=scopes,
            created=self._clock.now(),
            expires=expires,
        )
        return token, secret

    async def keys(self, user_id: str) -> public.Keys:
        """Show a user's SSH keys."""
        async with self._db.read() as session:
            query = select(SshKey).where(SshKey.user_id == user_id).order_by(SshKey.created, SshKey.id)
            return public.Keys(items=tuple(_key_view(row) for row in await session.scalars(query)))

    async def add_key(self, user_id: str, form: public.AddKey) -> public.KeyView:
        """Add an SSH public key; it can belong to one user only, for it says who pushes."""
        try:
            key = asyncssh.import_public_key(form.key.strip())
        except asyncssh.KeyImportError as exc:
            raise BadInputError(
                f"this is not an SSH public key: {exc}",
                value=form.key[:60],
                hint="paste one line of the file ~/.ssh/id_ed25519.pub",
            ) from exc
        words = key.export_public_key("openssh").decode().split()
        async with self._db.write() as session:
            await self._check_count(session, SshKey, user_id, "SSH keys")
            fingerprint = key.get_fingerprint()
            if await session.scalar(select(SshKey.id).where(SshKey.fingerprint == fingerprint)):
                raise ConflictError("this key is in use", value=fingerprint, hint="make a key of its own: ssh-keygen")
            row = SshKey(
                id=ids.new("key"),
                user_id=user_id,
                name=form.name,
                key=" ".join(words[:2]),
                fingerprint=fingerprint,
                created=self._clock.now(),
            )
            session.add(row)
            user = await user_of(session, user_id)
            now = self._clock.now()
            record(session, "key-added", at=now, actor=f"user:{user.username}", user=user_id, message=fingerprint)
            return _key_view(row)

    async def delete_key(self, user_id: str, key_id: str) -> None:
        """Remove an SSH key; NotFoundError for one that is not the user's."""
        async with self._db.write() as session:
            row = await session.get(SshKey, key_id)
            if row is None or row.user_id != user_id:
                raise NotFoundError("you have no such key", value=key_id)
            await session.delete(row)
            user = await user_of(session, user_id)
            now = self._clock.now()
            record(session, "key-removed", at=now, actor=f"user:{user.username}", user=user_id, message=row.fingerprint)

    async def _check_count(
        self, session: AsyncSession, kind: type[Token] | type[SshKey], user_id: str, what: str
    ) -> None:
        query = select(func.count()).select_from(kind).where(kind.user_id == user_id)
        if kind is Token:
            query = query.where(Token.kind == API)
        limit = self._settings.limits.tokens
        if (await session.scalar(query) or 0) >= limit:
            raise ConflictError(f"you have {limit} {what}, which is the limit", hint="remove one first")

    def certificate(self, user_id: str, csr: str) -> public.UserCertificate:
        """Sign a user's request for a certificate that managers obey."""
        identity = Identity.for_user(self._trust.deployment, user_id)
        signed = self._trust.sign(csr, identity)
        return public.UserCertificate(
            certificate=signed.certificate, ca=self._trust.ca, deployment=self._trust.deployment, user=user_id
        )

    # -- administration ---------------------------------------------------------------------------------------------

    async def users(self, query: public.Paging) -> public.Users:
        """Show a page of all accounts."""
        async with self._db.read() as session:
            rows = (
                await session.scalars(
                    select(User).where(User.seq > views.cursor(query)).order_by(User.seq).limit(query.limit + 1)
                )
            ).all()
        page, following = views.page(rows, query)
        return public.Users(items=tuple(views.user_view(row) for row in page), next=following)

    async def change_user(self, user_id: str, form: public.ChangeUser, by: str, actor: str) -> public.UserView:
        """Make somebody an administrator or not, disable or enable an account; nobody (`by`) does it to themselves."""
        if user_id == by:
            raise ConflictError("you cannot change your own rights", hint="ask another administrator")
        async with self._db.write() as session:
            user = await user_of(session, user_id)
            before = f"admin={user.admin} disabled={user.disabled}"
            user.admin = user.admin if form.admin is None else form.admin
            user.disabled = user.disabled if form.disabled is None else form.disabled
            after = f"admin={user.admin} disabled={user.disabled}"
            now = self._clock.now()
            record(session, "user-changed", at=now, actor=actor, user=user_id, before=before, after=after)
            return views.user_view(user)

    async def grant(self, user_id: str, form: public.Grant, actor: str) -> public.UserView:
        """Give a user credits, or take them."""
        async with self._db.write() as session:
            user = await user_of(session, user_id)
            money.grant(session, user, form.amount, at=self._clock.now(), actor=actor, reason=form.reason)
            return views.user_view(user)

    async def prune(self) -> None:
        """Forget sessions and tokens that have expired."""
        async with self._db.write() as session:
            await session.execute(delete(Token).where(Token.expires < self._clock.now()))


def _token_view(row: Token, secret: str | None = None) -> public.TokenView:
    return public.TokenView(
        id=row.id,
        name=row.name,
        scopes=tuple(row.scopes),
        created=row.created,
        expires=row.expires,
        last_used=row.last_used,
        secret=secret,
    )


def _key_view(row: SshKey) -> public.KeyView:
    return public.KeyView(id=row.id, name=row.name, fingerprint=row.fingerprint, created=row.created)
