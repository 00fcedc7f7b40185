"""The ledger of instances: the intent is written, and charged, before a cloud is called.

Whatever dies when, what is half done is found by looking at the ledger and at the cloud: an instance's id is also the
token by which its cloud knows the request.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import ids, tasks
from conpaas.core.clock import Clock
from conpaas.core.cloud import Cloud, Vm, VmRequest, VmState
from conpaas.core.errors import (
    CloudBusyError,
    ConpaasError,
    NotFoundError,
    PeerError,
)
from conpaas.core.messages.internal import Context
from conpaas.core.states import NodeState
from conpaas.director import money
from conpaas.director.clouds import Clouds
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, Service, User
from conpaas.director.events import record
from conpaas.director.settings import DirectorSettings

log = structlog.get_logger()

N = NodeState
T = TypeVar("T")


@dataclass(frozen=True)
class Wish:
    """Instances to be made for one purpose: asked for twice with the same key, they are made once."""

    kind: str
    """`manager` or `agent`."""
    count: int
    cloud: str
    key: str
    epoch: int = 0
    on_debt: bool = False
    """Made even if no credit is left: the replacement of a manager, without which nothing can be stopped."""


class Ledger:
    """Makes and deletes instances."""

    def __init__(
        self,
        db: Database,
        clouds: Clouds,
        settings: DirectorSettings,
        clock: Clock,
        context: Callable[[Service, Instance, str], Context],
        ports: Callable[[str], tuple[int, ...]],
    ) -> None:
        self._db = db
        self._clouds = clouds
        self._settings = settings
        self._clock = clock
        self._context = context
        self._ports = ports
        self._launching: set[str] = set()

    # -- making -----------------------------------------------------------------------------------------------------

    async def intend(self, session: AsyncSession, service: Service, wish: Wish) -> list[Instance]:
        """Write down, and charge, the instances of `wish`; return those there are, in order.

        They are fewer than wished for if the credits do not pay for all.
        """
        query = (
            select(Instance)
            .where(Instance.service_id == service.id, Instance.request_key == wish.key)
            .order_by(Instance.request_index)
        )
        rows = list(await session.scalars(query))
        user = await user_of(session, service.user_id)
        room = wish.count if wish.on_debt else max(0, user.credits)
        for index in range(len(rows), min(wish.count, len(rows) + room)):
            row = self._new(service, wish, index)
            session.add(row)
            await session.flush()
            money.charge_first(session, user, row)
            rows.append(row)
        return rows

    def _new(self, service: Service, wish: Wish, index: int) -> Instance:
        now = self._clock.now()
        return Instance(
            id=ids.new("vm"),
            service_id=service.id,
            user_id=service.user_id,
            kind=wish.kind,
            cloud=wish.cloud,
            epoch=wish.epoch,
            request_key=wish.key,
            request_index=index,
            enrol_until=now + timedelta(seconds=self._settings.enrol_token_s),
            created=now,
            since=now,
            state=N.REQUESTED,
            charged=0,
        )

    async def launch(self, instances: Iterable[str]) -> None:
        """Have the clouds make instances that are written down, all at once; what is refused is refunded."""
        async with asyncio.TaskGroup() as group:
            for instance in instances:
                group.create_task(self._launch(instance), name=f"launch {instance}")

    async def _launch(self, instance_id: str) -> None:
        if instance_id in self._launching:
            return
        self._launching.add(instance_id)
        try:
            async with self._db.read() as session:
                instance = await instance_of(session, instance_id)
                service = await service_of(session, instance.service_id)
            if instance.state is N.REQUESTED and instance.launched is None:
                await self._create(service, instance)
        finally:
            self._launching.discard(instance_id)
        await self._finish_if_unwanted(instance_id)

    async def _create(self, service: Service, instance: Instance) -> None:
        request = VmRequest(
            token=instance.id,
            name=f"conpaas-{service.type}-{instance.kind}-{instance.id}",
            context=lambda address: self._document(service, instance, address),
            ports=self._ports(service.type) if instance.kind == "agent" else (),
            tags={"service": service.id, "kind": instance.kind},
        )
        try:
            cloud = self._clouds.usable(instance.cloud)
            vm = await tasks.retry(
                lambda: self._ask(instance.cloud, cloud.create(request)),
                on=CloudBusyError,
                delays_s=self._settings.cloud_retry_s,
                clock=self._clock,
            )
        except PeerError as exc:  # the cloud may have made it, or not: reconciliation looks for the token
            log.warning("launch-unknown", instance=instance.id, cloud=instance.cloud, error=exc.message)
        except ConpaasError as exc:
            await self.never_made(instance.id, exc.message)
        else:
            await self.adopt(instance.id, vm)

    def _document(self, service: Service, instance: Instance, address: str) -> str:
        document = self._context(service, instance, address)
        return document.model_dump_json(context={"reveal": True})

    async def adopt(self, instance_id: str, vm: Vm) -> None:
        """Write down what the cloud says of an instance it has made."""
        now = self._clock.now()
        async with self._db.write() as session:
            instance = await instance_of(session, instance_id)
            instance.cloud_id = vm.id
            instance.launched = instance.launched or now
            instance.address = vm.address or instance.address
            if instance.state is N.REQUESTED:
                enter(instance, N.BOOTING, now)
        log.info("instance-made", instance=instance_id, cloud_id=vm.id, address=vm.address)

    async def never_made(self, instance_id: str, reason: str) -> None:
        """Write down that the cloud refused an instance, and give the credit back."""
        now = self._clock.now()
        async with self._db.write() as session:
            instance = await instance_of(session, instance_id)
            money.refund(session, await user_of(session, instance.user_id), instance, now, reason)
            enter(instance, N.GONE, now, reason)
            service = await service_of(session, instance.service_id)
            record(session, "instance-refused", at=now, actor="director", service=service, message=reason)
        log.warning("instance-refused", instance=instance_id, reason=reason)

    async def _finish_if_unwanted(self, instance_id: str) -> None:
        async with self._db.read() as session:
            instance = await instance_of(session, instance_id)
        if instance.state is N.DELETING:
            await self._delete_at_cloud(instance)

    # -- deleting ---------------------------------------------------------------------------------------------------

    async def delete(self, instance_id: str, reason: str = "", *, failed: bool = False) -> None:
        """Give an instance back. Gone is fine; what the cloud cannot do now, reconciliation repeats."""
        now = self._clock.now()
        async with self._db.write() as session:
            instance = await instance_of(session, instance_id)
            if instance.state is N.GONE:
                return
            if instance.state is not N.DELETING:
                money.end(session, await user_of(session, instance.user_id), instance, now)
                enter(instance, N.DELETING, now, reason)
                if failed:
                    service = await service_of(session, instance.service_id)
                    message = f"{instance.id}: {reason}"
                    record(session, "instance-failed", at=now, actor="director", service=service, message=message)
        if instance_id not in self._launching:  # else the launch, when it knows, sees to it
            await self._delete_at_cloud(instance)

    async def delete_all(self, instances: Sequence[str], reason: str = "") -> None:
        """Give instances back, all at once."""
        async with asyncio.TaskGroup() as group:
            for instance in instances:
                group.create_task(self.delete(instance, reason), name=f"delete {instance}")

    async def _delete_at_cloud(self, instance: Instance) -> None:
        try:
            cloud = self._clouds.usable(instance.cloud)
            for cloud_id in await self._cloud_ids(cloud, instance):
                await self._ask(instance.cloud, cloud.delete(cloud_id))
        except ConpaasError as exc:
            log.warning("delete-delayed", instance=instance.id, cloud=instance.cloud, error=exc.message)
            return
        now = self._clock.now()
        async with self._db.write() as session:
            row = await instance_of(session, instance.id)
            if row.state is not N.GONE:
                enter(row, N.GONE, now)
        log.info("instance-gone", instance=instance.id)

    async def _cloud_ids(self, cloud: Cloud, instance: Instance) -> list[str]:
        if instance.cloud_id:
            return [instance.cloud_id]
        vms = await self._ask(instance.cloud, cloud.list())
        return [vm.id for vm in vms if vm.token == instance.id]  # its answer was lost

    async def _ask(self, cloud: str, call: Coroutine[Any, Any, T]) -> T:
        """Make a call to a cloud, when it is its turn; what a driver does not foresee is a PeerError too."""
        async with self._clouds.account(cloud).calls:
            try:
                return await call
            except ConpaasError:
                raise
            except Exception as exc:  # drivers are plug-ins: a bug of one must not end the director
                log.exception("driver-broke", cloud=cloud)
                raise PeerError(f"cloud {cloud}: its driver broke: {type(exc).__name__}: {exc}") from exc

    # -- looking ----------------------------------------------------------------------------------------------------

    async def describe(self, instance_id: str) -> Instance:
        """Ask the cloud how an instance is, and write it down."""
        async with self._db.read() as session:
            instance = await instance_of(session, instance_id)
        if not instance.cloud_id or instance.state is N.GONE:
            return instance
        cloud = self._clouds.usable(instance.cloud)
        vm = await self._ask(instance.cloud, cloud.describe(instance.cloud_id))
        return await self.observe(instance, vm)

    async def observe(self, instance: Instance, vm: Vm) -> Instance:
        """Write down what a cloud says of an instance, if it is news: its address, or that it is lost."""
        lost = vm.state in {VmState.FAILED, VmState.GONE}
        moved = vm.address is not None and vm.address != instance.address
        if not moved and not (lost and instance.ended is None):
            return instance
        async with self._db.write() as session:
            row = await instance_of(session, instance.id)
            row.address = vm.address or row.address
            if lost:
                await self._lose(session, row, vm.reason or f"the cloud says it is {vm.state}")
            return row

    async def _lose(self, session: AsyncSession, instance: Instance, reason: str) -> None:
        if instance.ended is not None:
            return
        now = self._clock.now()
        money.end(session, await user_of(session, instance.user_id), instance, now)
        enter(instance, N.LOST, now, reason)
        service = await service_of(session, instance.service_id)
        record(session, "instance-lost", at=now, actor="director", service=service, message=f"{instance.id}: {reason}")
        log.warning("instance-lost", instance=instance.id, reason=reason)

    # -- agreeing with the clouds -----------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Make ledger and clouds agree, touching nothing that does not bear this deployment's tag."""
        for name, account in self._clouds.accounts.items():
            if account.cloud is None:
                continue
            try:
                await self._reconcile(name, account.cloud)
            except ConpaasError as exc:
                log.warning("reconcile-skipped", cloud=name, error=exc.message)

    async def _reconcile(self, name: str, cloud: Cloud) -> None:
        before = self._clock.now()
        vms = await self._ask(name, cloud.list())  # first: whatever is in it has had its row before
        async with self._db.read() as session:
            query = select(Instance).where(Instance.cloud == name, Instance.state != N.GONE)
            rows = {row.id: row for row in await session.scalars(query)}
        found = {vm.token: vm for vm in vms}
        for vm in vms:
            if vm.token not in rows and vm.token not in self._launching:
                await self._delete_orphan(name, cloud, vm)
        async with asyncio.TaskGroup() as group:
            for row in rows.values():
                if row.id not in self._launching:
                    group.create_task(self._settle(row, found.get(row.id), before), name=f"settle {row.id}")

    async def _settle(self, row: Instance, vm: Vm | None, seen: datetime) -> None:
        """Bring one instance of the ledger forward, knowing whether its cloud lists it."""
        if row.state is N.DELETING:
            await self._delete_at_cloud(row)
        elif row.launched is None:
            await self._settle_intent(row, vm)
        elif vm is not None:
            await self.observe(row, vm)
        elif row.launched < seen:
            await self.describe(row.id)  # lists may lag behind: ask for it by name

    async def _settle_intent(self, row: Instance, vm: Vm | None) -> None:
        """Finish what a crash or a lost answer left open: adopt it, ask again, or give it up."""
        if vm is not None:
            await self.adopt(row.id, vm)
        elif self._clock.now() - row.created > timedelta(seconds=self._settings.timings.node_boot_timeout_s):
            await self.never_made(row.id, "the cloud has not made it in time")
        else:
            await self._launch(row.id)

    async def _delete_orphan(self, name: str, cloud: Cloud, vm: Vm) -> None:
        """Delete an instance with our tag that the ledger does not know, or knows as gone."""
        now = self._clock.now()
        async with self._db.write() as session:
            row = await session.scalar(select(Instance).where(Instance.id == vm.token))
            if row is not None and row.state is not N.GONE:
                return
            if row is None:
                message = f"{vm.id} ({vm.token}) is not in the ledger"
                record(session, "orphan-deleted", at=now, actor="director", message=message)
        log.warning("orphan-deleted", vm=vm.id, token=vm.token)
        await self._ask(name, cloud.delete(vm.id))


def enter(instance: Instance, state: NodeState, now: datetime, reason: str = "") -> None:
    """Put an instance into a state, with the reason and the time."""
    if instance.state is not state:
        instance.state = state
        instance.since = now
    instance.reason = reason


async def instance_of(session: AsyncSession, instance: str) -> Instance:
    """Return the row of an instance; raise NotFoundError if there is none."""
    row = await session.scalar(select(Instance).where(Instance.id == instance))
    if row is None:
        raise NotFoundError(f"there is no instance {instance}", value=instance)
    return row


async def service_of(session: AsyncSession, service: str) -> Service:
    """Return the row of a service; raise NotFoundError if there is none."""
    row = await session.scalar(select(Service).where(Service.id == service))
    if row is None:
        raise NotFoundError(f"there is no service {service}", value=service)
    return row


async def user_of(session: AsyncSession, user: str) -> User:
    """Return the row of a user; raise NotFoundError if there is none."""
    row = await session.scalar(select(User).where(User.id == user))
    if row is None:
        raise NotFoundError(f"there is no user {user}", value=user)
    return row
