"""The ledger of instances: the intent is written, and charged, before a cloud is called.

Whatever dies when, what is half done is found by looking at the ledger and at the cloud: an instance's id is also the
token by which its cloud knows the request.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import ids, tasks
from conpaas.core.clock import Clock
from conpaas.core.cloud import Cloud, Vm, VmRequest, VmState
from conpaas.core.errors import (
    CloudBusyError,
    CloudRefusedError,
    ConpaasError,
    NoCreditError,
    NotFoundError,
    PeerError,
    QuotaExceededError,
    ThrottledError,
)
from conpaas.core.messages.internal import MEMBER_PORT, Context
from conpaas.core.messages.model import Wanted
from conpaas.core.states import NodeState
from conpaas.director import catalogue, money
from conpaas.director.clouds import Account, Clouds
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, Service, User, VolumeRow
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


@dataclass(frozen=True)
class Intent:
    """What has been written down of a wish."""

    rows: Sequence[Instance]
    """In order; fewer than wished for if there was no room or no credit for all."""
    short: ConpaasError | None = None
    """Why they are fewer."""


class Ledger:
    """Makes and deletes instances."""

    def __init__(
        self,
        db: Database,
        clouds: Clouds,
        settings: DirectorSettings,
        clock: Clock,
        context: Callable[[Service, Instance, str], Context],
    ) -> None:
        self._db = db
        self._clouds = clouds
        self._settings = settings
        self._clock = clock
        self._context = context
        self._launching: dict[str, asyncio.Event] = {}
        """The instances that a cloud is being asked for; each is told when its cloud has answered."""
        self._orphans: dict[tuple[str, str], datetime] = {}
        """Instances at clouds that the ledger does not know, by cloud and id, and when each was first seen."""
        self._troubles: dict[str, str] = {}
        """What clouds said last of instances that run, and not well."""

    # -- making -----------------------------------------------------------------------------------------------------

    async def intend(self, session: AsyncSession, service: Service, wish: Wish) -> Intent:
        """Write down, and charge, the instances of `wish`, each for the first cloud that has room for it."""
        query = (
            select(Instance)
            .where(Instance.service_id == service.id, Instance.request_key == wish.key)
            .order_by(Instance.request_index)
        )
        rows = list(await session.scalars(query))
        user = await user_of(session, service.user_id)
        places = await self._places(session, service, wish)
        zones = await _zones_to_take_over(session, service, wish)
        short: ConpaasError | None = None
        for index in range(len(rows), wish.count):
            place = next((place for place in places if place.room > 0), None)
            if place is None:
                short = places[0].refusal
                break
            if user.credits < 1 and not wish.on_debt:
                short = NoCreditError(f"the credits pay for {len(rows)} of {wish.count} instances")
                break
            place.room -= 1
            row = self._new(service, wish, index, place.cloud)
            row.zone = zones[index % len(zones)] if zones and place.cloud == wish.cloud else ""
            session.add(row)
            await session.flush()
            money.charge_first(session, user, row)
            rows.append(row)
        return Intent(rows, short)

    async def _places(self, session: AsyncSession, service: Service, wish: Wish) -> "list[_Place]":
        """Return where instances could go, in order; those that did not answer of late come last."""
        names = dict.fromkeys((wish.cloud, *Wanted.model_validate(service.wanted).fallback))
        places = [await self._place(session, service.user_id, name) for name in names]
        return sorted(places, key=lambda place: place.silent)

    async def _place(self, session: AsyncSession, user: str, name: str) -> "_Place":
        try:
            account = self._clouds.offered(name)
        except ConpaasError as exc:
            return _Place(name, 0, silent=False, refusal=exc)
        options = account.plan.options
        place = _Place(name, _PLENTY, account.silent, CloudRefusedError(f"cloud '{name}' has no room"))
        held = select(func.count()).select_from(Instance).where(Instance.cloud == name, Instance.ended.is_(None))
        own = held.where(Instance.user_id == user)
        limits = ((options.instances, held, "in all"), (options.user_instances, own, "for one user"))
        for limit, query, whose in limits:
            room = _PLENTY if limit is None else limit - (await session.scalar(query) or 0)
            if room < place.room:
                place.room = room
                place.refusal = QuotaExceededError(
                    f"cloud '{name}' takes at most {limit} instances {whose}", value=limit
                )
        return place

    def _new(self, service: Service, wish: Wish, index: int, cloud: str) -> Instance:
        now = self._clock.now()
        return Instance(
            id=ids.new("vm"),
            service_id=service.id,
            user_id=service.user_id,
            kind=wish.kind,
            meant_for=wish.cloud,
            cloud=cloud,
            size=Wanted.model_validate(service.wanted).sizes.get(cloud, ""),
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
            await self._launching[instance_id].wait()
            return
        self._launching[instance_id] = asyncio.Event()
        try:
            async with self._db.read() as session:
                instance = await instance_of(session, instance_id)
                service = await service_of(session, instance.service_id)
            if instance.launched is None and instance.state in {N.REQUESTED, N.BOOTING}:
                await self._create(service, instance)
        finally:
            self._launching.pop(instance_id).set()
        await self._finish_if_unwanted(instance_id)

    async def _create(self, service: Service, instance: Instance) -> None:
        """Ask for an instance where it is to be; where it is refused, ask the next cloud."""
        fallback = Wanted.model_validate(service.wanted).fallback
        refusals: list[str] = []
        for name in dict.fromkeys((instance.cloud, *fallback)):
            if name != instance.cloud:
                instance = await self._redirect(instance.id, name, refusals[-1])
            try:
                vm = await self._request(self._clouds.offered(name), service, instance)
            except PeerError as exc:  # the cloud may have made it, or not
                log.warning("launch-unknown", instance=instance.id, cloud=name, error=exc.message)
                if any(other in self._clouds.accounts and not self._clouds.account(other).silent for other in fallback):
                    await self.delete(instance.id, f"cloud '{name}' does not answer", failed=True)
                return  # else reconciliation looks for the token
            except ConpaasError as exc:
                refusals.append(exc.message)
            else:
                if vm is not None:
                    await self.adopt(instance.id, vm)
                return
        await self.never_made(instance.id, "; ".join(refusals))

    async def _request(self, account: Account, service: Service, instance: Instance) -> Vm | None:
        """Have an instance made, None if it was given back while it waited for its turn."""
        kind, agent = catalogue.kind_of(service.type), instance.kind == "agent"
        cloud = self._clouds.usable(account.name)
        request = VmRequest(
            token=instance.id,
            name=f"conpaas-{service.type}-{instance.kind}-{instance.id}",
            context=lambda address: self._document(service, instance, address),
            ports=kind.ports if agent else (MEMBER_PORT,),
            inner_ports=tuple(dict.fromkeys((MEMBER_PORT, *kind.inner_ports))),
            size=instance.size,
            zone=instance.zone,
            tags={"service": service.id, "kind": instance.kind},
        )
        until = self._clock.monotonic() + self._settings.timings.node_boot_timeout_s

        async def create() -> Vm | None:
            async with self._db.read() as session:
                wanted = (await instance_of(session, instance.id)).ended is None
            return await cloud.create(request) if wanted else None

        async def ask() -> Vm | None:
            while True:
                try:
                    return await account.ask("create", create)
                except ThrottledError:  # the account now calls less often: our turn comes
                    if self._clock.monotonic() >= until:
                        raise

        return await tasks.retry(
            ask,
            on=CloudBusyError,
            delays_s=self._settings.cloud_retry_s,
            clock=self._clock,
        )

    async def _redirect(self, instance_id: str, cloud: str, reason: str) -> Instance:
        """Write down that an instance is asked for at another cloud, since the one before has refused it."""
        now = self._clock.now()
        async with self._db.write() as session:
            instance = await instance_of(session, instance_id)
            service = await service_of(session, instance.service_id)
            message = f"{instance.id} goes to '{cloud}': {reason}"
            record(session, "cloud-refused", at=now, actor="director", service=service, message=message)
            instance.cloud, instance.zone = cloud, ""
            instance.size = Wanted.model_validate(service.wanted).sizes.get(cloud, "")
        log.warning("cloud-refused", instance=instance_id, next=cloud, reason=reason)
        return instance

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
            instance.enrol_until = now + timedelta(seconds=self._settings.enrol_token_s)
            if instance.state is N.REQUESTED:
                enter(instance, N.BOOTING, now, vm.reason)
            await self._note(session, instance, vm)
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
                service = await service_of(session, instance.service_id)
                money.end(session, await user_of(session, instance.user_id), service, instance, now)
                enter(instance, N.DELETING, now, reason)
                if failed:
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
            made = await self._cloud_ids(cloud, instance)
            for cloud_id in made:
                await self._clouds.account(instance.cloud).ask("delete", partial(cloud.delete, cloud_id))
        except ConpaasError as exc:
            log.warning("delete-delayed", instance=instance.id, cloud=instance.cloud, error=exc.message)
            return
        now = self._clock.now()
        async with self._db.write() as session:
            row = await instance_of(session, instance.id)
            if not made:
                money.refund(session, await user_of(session, row.user_id), row, now, "it was never made")
            if row.state is not N.GONE:
                enter(row, N.GONE, now)
        log.info("instance-gone", instance=instance.id)

    async def _cloud_ids(self, cloud: Cloud, instance: Instance) -> list[str]:
        if instance.cloud_id:
            return [instance.cloud_id]
        vms = await self._clouds.account(instance.cloud).ask("list", cloud.list)
        return [vm.id for vm in vms if vm.token == instance.id]  # its answer was lost

    # -- looking ----------------------------------------------------------------------------------------------------

    async def describe(self, instance_id: str) -> Instance:
        """Ask the cloud how an instance is, and write it down."""
        async with self._db.read() as session:
            instance = await instance_of(session, instance_id)
        if not instance.cloud_id or instance.state is N.GONE:
            return instance
        cloud = self._clouds.usable(instance.cloud)
        account = self._clouds.account(instance.cloud)
        vm = await account.ask("describe", lambda: cloud.describe(instance.cloud_id))
        return await self.observe(instance, vm)

    async def observe(self, instance: Instance, vm: Vm) -> Instance:
        """Write down what a cloud says of an instance, if it is news: its address, its trouble, or that it is lost."""
        if vm.state is VmState.RUNNING and vm.reason != self._troubles.get(instance.id, ""):
            await self._tell_trouble(instance, vm)
        lost = vm.state in {VmState.FAILED, VmState.GONE} and instance.ended is None
        if lost:
            self._troubles.pop(instance.id, None)
        moved = vm.address is not None and vm.address != instance.address
        waits = instance.state is N.BOOTING and not lost and vm.reason != instance.reason
        priced = instance.price is None and self._clouds.account(instance.cloud).price(instance.size)[0] is not None
        if not (lost or moved or waits or priced):
            return instance
        async with self._db.write() as session:
            row = await instance_of(session, instance.id)
            if lost:
                await self._lose(session, row, vm.reason or f"the cloud says it is {vm.state}")
            else:
                await self._note(session, row, vm)
            return row

    async def _tell_trouble(self, instance: Instance, vm: Vm) -> None:
        """Tell that an instance runs, and what keeps it from its work; or that nothing does so any more."""
        async with self._db.write() as session:
            service = await service_of(session, instance.service_id)
            what = "instance-hindered" if vm.reason else "instance-well-again"
            message = f"{instance.id}: {vm.reason}" if vm.reason else instance.id
            record(session, what, at=self._clock.now(), actor="director", service=service, message=message)
        log.warning(what, instance=instance.id, reason=vm.reason)
        if vm.reason:
            self._troubles[instance.id] = vm.reason
        else:
            del self._troubles[instance.id]

    async def _note(self, session: AsyncSession, row: Instance, vm: Vm) -> None:
        """Take over what a cloud says of an instance that lives; one whose address is another's is lost."""
        account = self._clouds.account(row.cloud)
        row.size, row.zone = vm.size or row.size, vm.zone or row.zone
        if row.price is None:
            price, row.currency = account.price(row.size)
            row.price = None if price is None else str(price)
        if row.state is N.BOOTING:
            row.reason = vm.reason
        if vm.address is None or vm.address == row.address:
            return
        row.address = vm.address
        twice = select(Instance.id).where(
            Instance.cloud == row.cloud,
            Instance.address == vm.address,
            Instance.id != row.id,
            Instance.ended.is_(None),
        )
        other = await session.scalar(twice.limit(1))
        if other is not None:
            await self._lose(session, row, f"cloud '{row.cloud}' gave it the address {vm.address} of {other}")

    async def _lose(self, session: AsyncSession, instance: Instance, reason: str) -> None:
        if instance.ended is not None:
            return
        now = self._clock.now()
        service = await service_of(session, instance.service_id)
        money.end(session, await user_of(session, instance.user_id), service, instance, now)
        enter(instance, N.LOST, now, reason)
        record(session, "instance-lost", at=now, actor="director", service=service, message=f"{instance.id}: {reason}")
        log.warning("instance-lost", instance=instance.id, reason=reason)

    # -- agreeing with the clouds -----------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Make ledger and clouds agree, touching nothing that does not bear this deployment's tag."""
        async with asyncio.TaskGroup() as group:  # a cloud that hangs holds up no other
            for account in list(self._clouds.accounts.values()):
                if account.cloud is not None:
                    work = self._reconcile(account, account.cloud)
                    group.create_task(self._or_skip(account.name, work), name=f"reconcile {account.name}")

    async def _or_skip(self, cloud: str, work: Awaitable[None]) -> None:
        """Do one part of a round; what a cloud cannot do now is for the next one, and keeps nothing else from it."""
        try:
            await work
        except ConpaasError as exc:
            log.warning("reconcile-skipped", cloud=cloud, error=exc.message)

    async def _reconcile(self, account: Account, cloud: Cloud) -> None:
        before, name = self._clock.now(), account.name
        vms = await account.ask("list", cloud.list)  # first: whatever is in it has had its row before
        async with self._db.read() as session:
            query = select(Instance).where(Instance.cloud == name, Instance.state != N.GONE)
            rows = {row.id: row for row in await session.scalars(query)}
        found = {vm.token: vm for vm in vms if _is(rows.get(vm.token), vm)}
        strange = [vm for vm in vms if not _is(rows.get(vm.token), vm) and vm.token not in self._launching]
        async with asyncio.TaskGroup() as group:
            for vm in strange:
                ending = self._end_orphan(account, cloud, vm, before)
                group.create_task(self._or_skip(name, ending), name=f"orphan {vm.id}")
            for row in rows.values():
                if row.id not in self._launching:
                    settling = self._settle(row, found.get(row.id), before)
                    group.create_task(self._or_skip(name, settling), name=f"settle {row.id}")
        for key in [key for key in self._orphans if key[0] == name and key[1] not in {vm.id for vm in strange}]:
            del self._orphans[key]

    async def _settle(self, row: Instance, vm: Vm | None, seen: datetime) -> None:
        """Bring one instance of the ledger forward, knowing whether its cloud lists it."""
        if row.state is N.DELETING:
            await self._delete_at_cloud(row)
        elif row.launched is None:
            await self._settle_intent(row, vm)
        elif vm is not None:
            await self.observe(row, vm)
        elif row.launched < seen - timedelta(seconds=self._settings.cloud_lag_s):
            await self.describe(row.id)  # lists may lag behind: ask for it by name

    async def _settle_intent(self, row: Instance, vm: Vm | None) -> None:
        """Finish what a crash or a lost answer left open: adopt it, ask again, or give it up."""
        if vm is not None and vm.state is VmState.FAILED:  # half made: asked for anew when it is out of the way
            cloud = self._clouds.usable(row.cloud)
            await self._clouds.account(row.cloud).ask("delete", lambda: cloud.delete(vm.id))
        elif vm is not None:
            await self.adopt(row.id, vm)
        elif self._clock.now() - row.created > timedelta(seconds=self._settings.timings.node_boot_timeout_s):
            await self.never_made(row.id, "the cloud has not made it in time")
        else:
            await self._launch(row.id)

    async def _end_orphan(self, account: Account, cloud: Cloud, vm: Vm, seen: datetime) -> None:
        """Deal with an instance that bears our tag and that the ledger does not know, or knows as gone.

        The first time it is only told; it is deleted when the next round finds it again.
        """
        key = (account.name, vm.id)
        async with self._db.write() as session:
            row = await session.scalar(select(Instance).where(Instance.id == vm.token))
            if row is not None and row.cloud == account.name and row.state is not N.GONE and _is(row, vm):
                return
            why = "is not in the ledger" if row is None else "was given back, or is another one's twin"
            what = "orphan-deleted" if key in self._orphans else "orphan-found"
            message = f"{vm.id} ({vm.token}) on '{account.name}' {why}"
            record(session, what, at=self._clock.now(), actor="director", message=message)
        log.warning(what, cloud=account.name, vm=vm.id, token=vm.token)
        if self._orphans.setdefault(key, seen) != seen:
            await account.ask("delete", lambda: cloud.delete(vm.id))


_PLENTY = 1_000_000_000


@dataclass
class _Place:
    """A cloud, and for how many more instances it has room."""

    cloud: str
    room: int
    silent: bool
    refusal: ConpaasError
    """Why there is no more room."""


def _is(row: Instance | None, vm: Vm) -> bool:
    """Tell whether an instance at a cloud is the one of a row; a second one with its token is not."""
    return row is not None and row.cloud_id in {"", vm.id}


async def _zones_to_take_over(session: AsyncSession, service: Service, wish: Wish) -> list[str]:
    """Return where new nodes must be made to take over the volumes that wait for one on their cloud, in turn."""
    if wish.kind != "agent":
        return []
    free = select(VolumeRow.zone).where(spare_volumes(service.id, wish.cloud), VolumeRow.zone != "")
    zones = list(await session.scalars(free.order_by(VolumeRow.seq)))
    idle = select(Instance).where(
        Instance.service_id == service.id,
        Instance.kind == "agent",
        Instance.cloud == wish.cloud,
        Instance.ended.is_(None),
        Instance.request_key != wish.key,
        ~select(VolumeRow.id).where(VolumeRow.instance_id == Instance.id, VolumeRow.deleted.is_(None)).exists(),
    )
    for node in await session.scalars(idle) if zones else ():
        if not node.roles and node.zone in zones:
            zones.remove(node.zone)  # it will take that one
    return zones


def spare_volumes(service: str, cloud: str) -> ColumnElement[bool]:
    """Select the volumes of a service on a cloud that no living node has."""
    held = select(Instance.id).where(Instance.id == VolumeRow.instance_id, Instance.ended.is_(None)).exists()
    living = (VolumeRow.service_id == service) & VolumeRow.deleted.is_(None)
    return living & (VolumeRow.cloud == cloud) & ~held


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
