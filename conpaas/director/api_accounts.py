"""Handlers of the public API: accounts, administration, catalogue."""

from collections.abc import Callable, Sequence

from sqlalchemy import select

from conpaas import __version__
from conpaas.core.clock import Clock
from conpaas.core.messages import public
from conpaas.core.messages.model import Ack
from conpaas.core.tasks import Background
from conpaas.director import catalogue, views
from conpaas.director.accounts import Accounts
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, User
from conpaas.director.gate import Call, Served, bearer
from conpaas.director.settings import DirectorSettings


class AccountsApi:
    """Handlers: read, do, answer."""

    def __init__(
        self,
        db: Database,
        settings: DirectorSettings,
        deployment: str,
        *,
        accounts: Accounts,
        background: Background,
        clock: Clock,
        ssh_port: Callable[[], int],
    ) -> None:
        self._db, self._settings, self._deployment = db, settings, deployment
        self._accounts, self._background, self._ssh_port, self._clock = accounts, background, ssh_port, clock

    def served(self) -> Sequence[Served]:
        """Return the endpoints that are served here."""
        return [
            (public.GET_VERSION, self.version),
            (public.GET_CAPTCHA, self.captcha),
            (public.REGISTER, self.register),
            (public.LOGIN, self.login),
            (public.LOGOUT, self.logout),
            (public.GET_ME, self.me),
            (public.CHANGE_PASSWORD, self.change_password),
            (public.LIST_TOKENS, self.tokens),
            (public.CREATE_TOKEN, self.create_token),
            (public.DELETE_TOKEN, self.delete_token),
            (public.LIST_KEYS, self.keys),
            (public.ADD_KEY, self.add_key),
            (public.DELETE_KEY, self.delete_key),
            (public.GET_CERTIFICATE, self.certificate),
            (public.LIST_USERS, self.users),
            (public.CHANGE_USER, self.change_user),
            (public.GRANT, self.grant),
            (public.LIST_INSTANCES, self.instances),
            (public.LIST_TYPES, self.types),
        ]

    async def version(self, _: Call) -> public.Version:
        """Say what answers here."""
        return public.Version(
            version=__version__,
            deployment=self._deployment,
            ssh_port=self._ssh_port(),
            registration=self._settings.registration,
        )

    async def captcha(self, _: Call) -> public.Captcha:
        """Give a challenge."""
        return public.Captcha(challenge=self._accounts.captcha.challenge())

    async def register(self, _: Call, form: public.Registration) -> public.UserView:
        """Make an account."""
        return await self._background.finish(self._accounts.register(form))

    async def login(self, call: Call, form: public.Credentials) -> public.Session:
        """Start a session."""
        return await self._background.finish(self._accounts.login(form, _address(call)))

    async def logout(self, call: Call) -> Ack:
        """End the session."""
        await self._accounts.logout(bearer(call.http) or "")
        return Ack()

    async def me(self, call: Call) -> public.UserView:
        """Show the caller's account."""
        return await self._accounts.me(call.caller.user or "")

    async def change_password(self, call: Call, form: public.ChangePassword) -> Ack:
        """Set a new password."""
        await self._background.finish(
            self._accounts.change_password(call.caller.user or "", form, bearer(call.http) or "")
        )
        return Ack()

    async def tokens(self, call: Call) -> public.Tokens:
        """Show the caller's API tokens."""
        return await self._accounts.tokens(call.caller.user or "")

    async def create_token(self, call: Call, form: public.CreateToken) -> public.TokenView:
        """Make an API token."""
        return await self._background.finish(self._accounts.create_token(call.caller, form))

    async def delete_token(self, call: Call) -> Ack:
        """Revoke an API token."""
        await self._accounts.delete_token(call.caller.user or "", call.params["token"])
        return Ack()

    async def keys(self, call: Call) -> public.Keys:
        """Show the caller's SSH keys."""
        return await self._accounts.keys(call.caller.user or "")

    async def add_key(self, call: Call, form: public.AddKey) -> public.KeyView:
        """Add an SSH key."""
        return await self._background.finish(self._accounts.add_key(call.caller.user or "", form))

    async def delete_key(self, call: Call) -> Ack:
        """Remove an SSH key."""
        await self._accounts.delete_key(call.caller.user or "", call.params["key"])
        return Ack()

    async def certificate(self, call: Call, form: public.CertificateRequest) -> public.UserCertificate:
        """Sign a user's request."""
        return self._accounts.certificate(call.caller.user or "", form.csr)

    async def users(self, call: Call) -> public.Users:
        """Show all accounts."""
        return await self._accounts.users(call.query(public.Paging))

    async def change_user(self, call: Call, form: public.ChangeUser) -> public.UserView:
        """Change an account."""
        return await self._background.finish(
            self._accounts.change_user(call.params["user"], form, call.caller.user or "", self._actor(call))
        )

    async def grant(self, call: Call, form: public.Grant) -> public.UserView:
        """Grant credits."""
        return await self._background.finish(self._accounts.grant(call.params["user"], form, self._actor(call)))

    async def instances(self, call: Call) -> public.InstanceRows:
        """Show all instances there are."""
        paging = call.query(public.Paging)
        query = (
            select(Instance, User.username)
            .join(User, User.id == Instance.user_id)
            .where(views.held(), Instance.seq > views.cursor(paging))
            .order_by(Instance.seq)
            .limit(paging.limit + 1)
        )
        async with self._db.read() as session:
            owners = dict((await session.execute(query)).all())
        shown, following = views.page(list(owners), paging)
        now = self._clock.now()
        return public.InstanceRows(
            items=tuple(
                public.InstanceRow(
                    **dict(views.node_view(row, now)), service=row.service_id, owner=owners[row], charged=row.charged
                )
                for row in shown
            ),
            next=following,
        )

    async def types(self, _: Call) -> public.ServiceTypes:
        """Show what can be created."""
        return catalogue.service_types()

    def _actor(self, call: Call) -> str:
        return self._accounts.actor(call.caller)


def _address(call: Call) -> str:
    """Return where a call comes from; what a proxy on this machine says counts."""
    remote = call.http.remote or ""
    if remote.startswith("127.") or remote == "::1":
        return call.http.headers.get("X-Forwarded-For", remote).rpartition(",")[2].strip() or remote
    return remote
