"""What the director looks after by itself: managers that are gone, half-done ends, hours, deadlines, leftovers."""

from collections.abc import Sequence
from datetime import timedelta

import structlog
from sqlalchemy import delete, select

from conpaas.core.clock import Clock
from conpaas.core.errors import ConpaasError
from conpaas.core.messages.model import Wanted
from conpaas.core.states import TRANSIENT, NodeState, OperationState, ServiceState
from conpaas.director import lifecycle, money
from conpaas.director.accounts import Accounts
from conpaas.director.clouds import Clouds
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, MetricRow, Operation, Service, User
from conpaas.director.endings import Endings
from conpaas.director.events import record
from conpaas.director.ledger import Ledger, Wish
from conpaas.director.managers import Managers
from conpaas.director.services import Services, living
from conpaas.director.settings import DirectorSettings
from conpaas.director.views import held, manager_of

log = structlog.get_logger()

S, N = ServiceState, NodeState
_SETTLED = frozenset({S.INIT, S.RUNNING, S.STOPPED})


class Reconciler:
    """Rounds that find by looking what is to be done; each may be cut off anywhere and goes on in the next."""

    def __init__(
        self,
        db: Database,
        settings: DirectorSettings,
        clock: Clock,
        *,
        clouds: Clouds,
        ledger: Ledger,
        managers: Managers,
        services: Services,
        endings: Endings,
        accounts: Accounts,
        code: CodeStore,
    ) -> None:
        self._db, self._settings, self._clock = db, settings, clock
        self._clouds, self._ledger, self._managers = clouds, ledger, managers
        self._services, self._endings, self._accounts, self._code = services, endings, accounts, code

    # -- at the start -----------------------------------------------------------------------------------------------

    async def wake_managers(self) -> None:
        """Tell the managers that have something to do that the director is back: they need not wait to try again."""
        async with self._db.read() as session:
            query = select(Service).where(Service.terminated.is_(None), Service.state.in_(TRANSIENT))
            for service in (await session.scalars(query)).all():
                self._managers.poke(service, manager_of(service, await lifecycle.instances_of(session, service.id)))

    # -- every couple of seconds ------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at every service that is not terminated."""
        async with self._db.read() as session:
            services = (await session.scalars(select(Service).where(Service.terminated.is_(None)))).all()
            query = select(Instance).where(Instance.kind == "manager", held()).order_by(Instance.seq)
            instances = (await session.scalars(query)).all()
        for service in services:
            own = [instance for instance in instances if instance.service_id == service.id]
            try:
                await self._look_after(service, own)
            except ConpaasError as exc:
                log.warning("watch-skipped", service=service.id, error=exc.message)
        await self._end_overdue()

    async def _look_after(self, service: Service, managers: list[Instance]) -> None:
        if service.state is S.EPILOGUE:
            await self._endings.settle(service.id)
            if service.ending:
                return
        manager = manager_of(service, managers)
        if manager is None:
            if service.state is not S.ERROR or Wanted.model_validate(service.wanted).running:
                await self.replace_manager(service.id, service.epoch, "it is gone")
        elif manager.booted is None:
            await self._watch_boot(service, manager)
        else:
            await self._watch_silence(service, manager)
            await self._watch_place(service, manager, managers)

    async def _watch_boot(self, service: Service, manager: Instance) -> None:
        age_s = (self._clock.now() - manager.created).total_seconds()
        if age_s > self._settings.timings.node_boot_timeout_s:
            await self.replace_manager(service.id, service.epoch, f"it has not enrolled within {age_s:.0f} s")

    async def _watch_silence(self, service: Service, manager: Instance) -> None:
        silent_s = self._managers.silent_s(manager)
        if silent_s > self._settings.manager_silent_s:
            await self.replace_manager(service.id, service.epoch, f"it has been silent for {silent_s:.0f} s")
        elif silent_s > self._settings.manager_silent_s / 4:
            await self._ledger.describe(manager.id)  # if its cloud says that it is gone, the next round acts

    async def _watch_place(self, service: Service, manager: Instance, managers: Sequence[Instance]) -> None:
        """Bring the manager to where its service is to be, and send its predecessor off when all is as wanted."""
        successor = next((one for one in managers if one.epoch > service.epoch and one.ended is None), None)
        if successor is not None:
            age_s = (self._clock.now() - (successor.launched or self._clock.now())).total_seconds()
            if age_s > self._settings.timings.node_boot_timeout_s:
                await self._ledger.delete(successor.id, f"it has not enrolled within {age_s:.0f} s", failed=True)
        elif manager.state is N.SERVING and any(one.state is N.DRAINING for one in managers):
            await self._delete_old_managers(service.id, service.epoch)
        elif manager.state is N.SERVING and service.state in _SETTLED and not _in_place(service, manager):
            await self._move_manager(service.id, service.epoch)

    async def _move_manager(self, service_id: str, epoch: int) -> None:
        """Have a manager made where the service is to be. It takes over when it enrols; else all stays as it is."""
        async with self._db.write() as session:
            service = await living(session, service_id)
            query = select(Instance).where(Instance.service_id == service_id, Instance.kind == "manager")
            before = (await session.scalars(query.order_by(Instance.seq))).all()
            too_soon = self._clock.now() - before[-1].created < timedelta(seconds=self._settings.manager_retry_s)
            if service.epoch != epoch or service.ending or (before[-1].epoch > epoch and too_soon):
                return
            wish = Wish(
                kind="manager",
                count=1,
                cloud=Wanted.model_validate(service.wanted).cloud,
                key=f"manager-{epoch + 1}-{len(before)}",
                epoch=epoch + 1,
                on_debt=True,
            )
            rows = (await self._ledger.intend(session, service, wish)).rows
        await self._ledger.launch([row.id for row in rows])

    async def replace_manager(self, service_id: str, epoch: int, why: str) -> None:
        """Make a new manager, at the next epoch, and delete the ones before. The service keeps its state.

        Does nothing if the epoch is not `epoch` any more, or if the last attempt is too recent and came to nothing.
        """
        now = self._clock.now()
        async with self._db.write() as session:
            service = await living(session, service_id)
            query = select(Instance).where(Instance.service_id == service_id, Instance.kind == "manager")
            newest = await session.scalar(query.order_by(Instance.seq.desc()).limit(1))
            pause = timedelta(seconds=self._settings.manager_retry_s)
            in_vain = (
                newest is not None
                and newest.booted is None
                and now - newest.created < pause
                and newest.created >= service.since  # else somebody has asked anew
            )
            if service.epoch != epoch or service.ending or in_vain:
                return
            service.epoch = max(service.epoch, 0 if newest is None else newest.epoch) + 1
            wish = Wish(
                kind="manager",
                count=1,
                cloud=Wanted.model_validate(service.wanted).cloud,
                key=f"manager-{service.epoch}",
                epoch=service.epoch,
                on_debt=True,
            )
            rows = (await self._ledger.intend(session, service, wish)).rows
            message = f"epoch {service.epoch}: {why}"
            record(session, "manager-replaced", at=now, actor="director", service=service, message=message)
        log.warning("manager-replaced", service=service_id, epoch=service.epoch, why=why)
        await self._ledger.launch([row.id for row in rows])
        await self._delete_old_managers(service_id, service.epoch)

    async def _delete_old_managers(self, service_id: str, epoch: int) -> None:
        async with self._db.read() as session:
            query = select(Instance.id).where(
                Instance.service_id == service_id, Instance.kind == "manager", Instance.epoch < epoch, held()
            )
            old = (await session.scalars(query)).all()
        await self._ledger.delete_all(old, "replaced")

    async def _end_overdue(self) -> None:
        """Fail the operations whose deadline has passed; their services keep trying."""
        now = self._clock.now()
        overdue = select(Operation).where(Operation.state == OperationState.RUNNING, Operation.deadline < now)
        async with self._db.read() as session:
            if (await session.scalars(overdue.limit(1))).first() is None:
                return
        async with self._db.write() as session:
            for operation in await session.scalars(overdue):
                took_s = (now - operation.created).total_seconds()
                error = f"not done within {took_s:.0f} s: {operation.message or 'no progress was reported'}"
                lifecycle.finish(operation, OperationState.FAILED, at=now, error=error)

    # -- every ten seconds ------------------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Compare the ledger with the clouds; give back what belongs to nobody any more."""
        await self._ledger.reconcile()
        async with self._db.read() as session:
            old_ones = select(Instance.id).join(Service, Service.id == Instance.service_id)
            replaced = (Instance.epoch < Service.epoch) & (Instance.state != N.DRAINING)
            over = (Instance.kind == "manager") & (replaced | (Instance.state == N.LOST))
            old = (await session.scalars(old_ones.where(held(), over | Service.terminated.is_not(None)))).all()
        await self._ledger.delete_all(old, "left over")

    # -- money ------------------------------------------------------------------------------------------------------

    async def charge(self) -> None:
        """Charge the hours that have begun, warn those who run low, stop what is no longer paid."""
        now = self._clock.now()
        while True:
            async with self._db.write() as session:
                if not await money.charge_due(session, now):
                    await money.warn(session, now)
                    break
        async with self._db.read() as session:
            query = select(Service).join(User, User.id == Service.user_id).where(User.credits < 0)
            unpaid = (await session.scalars(query.where(Service.terminated.is_(None), Service.ending.is_(False)))).all()
        for service in unpaid:
            if Wanted.model_validate(service.wanted).running:
                log.warning("credits-exhausted", service=service.id)
                await self._services.stop(service.id, actor="director: no credits left", key=None, expected=None)

    # -- now and then -----------------------------------------------------------------------------------------------

    async def prune(self) -> None:
        """Forget old metrics and expired sessions, and delete code that no service has."""
        oldest = self._clock.now() - timedelta(seconds=self._settings.retention_s)
        async with self._db.write() as session:
            await session.execute(delete(MetricRow).where(MetricRow.at < oldest))
        await self._accounts.prune()
        await self._code.collect_garbage()


def _in_place(service: Service, manager: Instance) -> bool:
    """Tell whether the manager is on the cloud, and of the size, that its service wants."""
    wanted = Wanted.model_validate(service.wanted)
    fits = wanted.sizes.get(manager.cloud, "") in {"", manager.size}
    return fits and wanted.cloud in {manager.cloud, manager.meant_for}
