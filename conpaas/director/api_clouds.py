"""Handlers of the public API: clouds, for administrators and for those who choose one."""

from collections.abc import Sequence

from sqlalchemy import func, select

from conpaas.core.messages import public
from conpaas.core.messages.model import Ack
from conpaas.core.tasks import Background
from conpaas.director import views
from conpaas.director.accounts import Accounts
from conpaas.director.cloud_accounts import CloudAccounts, size_views
from conpaas.director.clouds import Account, Clouds
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance
from conpaas.director.gate import Call, Served


class CloudsApi:
    """Handlers: read, do, answer."""

    def __init__(
        self, db: Database, *, accounts: Accounts, clouds: Clouds, kept: CloudAccounts, background: Background
    ) -> None:
        self._db, self._accounts, self._clouds, self._kept, self._background = db, accounts, clouds, kept, background

    def served(self) -> Sequence[Served]:
        """Return the endpoints that are served here."""
        return [
            (public.LIST_CLOUDS, self.clouds),
            (public.LIST_CLOUD_TYPES, self.types),
            (public.LIST_CLOUD_ACCOUNTS, self.all),
            (public.ADD_CLOUD, self.add),
            (public.CHANGE_CLOUD, self.change),
            (public.REMOVE_CLOUD, self.remove),
            (public.EXAMINE_CLOUD, self.examine),
            (public.TRY_CLOUD, self.try_out),
        ]

    async def clouds(self, call: Call) -> public.Clouds:
        """Show where it can run, and how many instances the caller has there."""
        query = select(Instance.cloud, func.count()).where(Instance.user_id == call.caller.user, views.held())
        async with self._db.read() as session:
            counts = dict((await session.execute(query.group_by(Instance.cloud))).all())
        return public.Clouds(
            items=tuple(
                public.CloudView(
                    name=account.name,
                    title=account.title,
                    driver=account.plan.driver,
                    enabled=account.cloud is not None and account.plan.options.enabled,
                    reason=_why(account),
                    instances=counts.get(account.name, 0),
                    limit=account.plan.options.user_instances,
                    default=account.name == self._clouds.default,
                    sizes=size_views(account),
                )
                for account in self._clouds.accounts.values()
            )
        )

    async def types(self, _: Call) -> public.CloudTypes:
        """Show what can be added."""
        return self._kept.types()

    async def all(self, _: Call) -> public.CloudAccounts:
        """Show all accounts."""
        return await self._kept.accounts()

    async def add(self, call: Call, form: public.CloudForm) -> public.CloudAccountView:
        """Add an account."""
        return await self._background.finish(self._kept.add(form, self._accounts.actor(call.caller)))

    async def change(self, call: Call, form: public.CloudForm) -> public.CloudAccountView:
        """Change an account."""
        work = self._kept.change(call.params["cloud"], form, self._accounts.actor(call.caller))
        return await self._background.finish(work)

    async def remove(self, call: Call) -> Ack:
        """Remove an account."""
        await self._background.finish(self._kept.remove(call.params["cloud"], self._accounts.actor(call.caller)))
        return Ack()

    async def examine(self, call: Call) -> public.Examination:
        """Try an account."""
        return await self._kept.examine(call.params["cloud"])

    async def try_out(self, _: Call, form: public.CloudForm) -> public.Examination:
        """Try an account that is not kept."""
        return await self._kept.try_out(form)


def _why(account: Account) -> str:
    """Say why an account cannot be used, or else what its trouble is just now."""
    if account.reason:
        return account.reason
    return account.trouble if account.plan.options.enabled else "it takes no new instances"
