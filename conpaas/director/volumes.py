"""Volumes: disks that keep a role's data when its instance is replaced, or its service stopped.

As with instances, the intent is written before the cloud is asked, and a volume's id is the token by which its cloud
knows the request. A volume belongs to the node that it was last given to; when that has ended, the next node that
needs one for the same role, on the same cloud, gets it with all that is on it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import ids
from conpaas.core.clock import Clock
from conpaas.core.cloud import HasVolumes, Volume, VolumeRequest, VolumeState
from conpaas.core.errors import BadInputError, CloudRefusedError, ConflictError, ConpaasError
from conpaas.core.messages.internal import VolumeView
from conpaas.core.states import NodeState
from conpaas.director import catalogue
from conpaas.director.clouds import Account, Clouds
from conpaas.director.db.database import Database
from conpaas.director.db.models import EventRow, Instance, Service, VolumeRow
from conpaas.director.events import record
from conpaas.director.ledger import instance_of, service_of, spare_volumes

log = structlog.get_logger()

V = VolumeState


class Volumes:
    """Gives volumes to nodes, and deletes those that nobody will want again."""

    def __init__(self, db: Database, clouds: Clouds, clock: Clock) -> None:
        self._db, self._clouds, self._clock = db, clouds, clock
        self._told: set[tuple[str, str]] = set()
        """Volumes at clouds that no row accounts for, by cloud and id: each is told once."""

    # -- giving -----------------------------------------------------------------------------------------------------

    async def ensure(self, service_id: str, instance_id: str, role: str) -> VolumeView:
        """Bring the volume of a role to a node, by one step; called again until it is ready.

        Raises BadInputError for a role that keeps no data, ConflictError for a node that cannot have the volume, and
        what the cloud raises.
        """
        async with self._db.write() as session:
            service, instance = await service_of(session, service_id), await instance_of(session, instance_id)
            if instance.ended is not None or service.terminated is not None:
                raise ConflictError(f"instance {instance.id} has ended", value=instance.id)
            size = catalogue.kind_of(service.type).role(role).volume
            if not size:
                raise BadInputError(f"the role '{role}' keeps no data", value=role)
            account, cloud = self._clouds.account(instance.cloud), self._clouds.usable(instance.cloud)
            if not isinstance(cloud, HasVolumes):
                return await self._do_without(session, service, instance, role)
            row = await self._choose(session, service, instance, role, size)
        seen = await self._bring(_Disks(account, cloud), row, instance)
        ready = seen.state is V.ATTACHED and seen.vm == instance.cloud_id and bool(seen.devices)
        return VolumeView(id=row.id, role=role, ready=ready, devices=seen.devices if ready else (), reason=seen.reason)

    async def _do_without(self, session: AsyncSession, service: Service, instance: Instance, role: str) -> VolumeView:
        """Have a node keep its data in its own folder, since its cloud has no volumes; it is told once."""
        reason = f"cloud '{instance.cloud}' has no volumes: a '{role}' that is replaced there starts empty"
        told = select(EventRow.id).where(EventRow.service_id == service.id, EventRow.message == reason)
        if await session.scalar(told.limit(1)) is None:
            now = self._clock.now()
            record(session, "volume-refused", at=now, actor="director", service=service, message=reason)
        return VolumeView(id="", role=role, ready=True, reason=reason)

    async def _choose(
        self, session: AsyncSession, service: Service, instance: Instance, role: str, size: int
    ) -> VolumeRow:
        """Return the volume that the node has, or the oldest that no node has, or write down a new one."""
        own = select(VolumeRow).where(VolumeRow.instance_id == instance.id, VolumeRow.deleted.is_(None))
        row = await session.scalar(own.where(VolumeRow.role == role))
        row = row or await self._spare(session, service, instance, role)
        if row is None:
            row = VolumeRow(
                id=ids.new("vol"),
                service_id=service.id,
                role=role,
                cloud=instance.cloud,
                cloud_id="",
                zone=instance.zone,
                size=size,
                created=self._clock.now(),
            )
            session.add(row)
        row.instance_id = instance.id
        await session.flush()
        return row

    async def _spare(self, session: AsyncSession, service: Service, instance: Instance, role: str) -> VolumeRow | None:
        """Return a volume that waits for a node; ConflictError if it is where this one cannot have it."""
        free = spare_volumes(service.id, instance.cloud) & (VolumeRow.role == role)
        rows = (await session.scalars(select(VolumeRow).where(free).order_by(VolumeRow.seq))).all()
        fitting = [row for row in rows if not (row.zone and instance.zone) or row.zone == instance.zone]
        if rows and not fitting:
            raise ConflictError(
                f"the data of the '{role}' is on {rows[0].id} in {rows[0].zone}, and {instance.id} in {instance.zone}",
                value=instance.id,
                hint="give this node back: the next one is made where the data is",
            )
        return fitting[0] if fitting else None

    async def _bring(self, disks: "_Disks", row: VolumeRow, instance: Instance) -> Volume:
        """Make the next step towards an attached volume; return how it is."""
        if not row.cloud_id:
            return await self._create(disks, row)
        seen = await disks.describe(row.cloud_id)
        match seen.state:
            case V.FAILED:
                await self._replace(disks, row, seen)
            case V.GONE if not await disks.of(row.id):  # else it was mistaken for a moment
                await self._lose(row, seen.reason or "its cloud does not know it any more")
            case V.AVAILABLE:
                await self._note_use(row)
                return await disks.attach(row.cloud_id, instance.cloud_id)
            case V.ATTACHED if seen.vm != instance.cloud_id and not await self._is_held(row, seen):
                return await disks.detach(row.cloud_id)
            case _:
                pass
        return seen

    async def _replace(self, disks: "_Disks", row: VolumeRow, seen: Volume) -> None:
        """Give up a volume that could not be made; CloudRefusedError if there may be data on it: it is not ours to."""
        if row.used:
            raise CloudRefusedError(
                f"cloud '{row.cloud}' says that volume {row.cloud_id}, with the data of a '{row.role}', has failed:"
                f" {seen.reason or 'no reason is given'}",
                value=row.id,
                hint="repair it there, and all goes on; or terminate the service, and its data with it",
            )
        await disks.delete(row.cloud_id)
        await self._lose(row, seen.reason or "it could not be made")

    async def _note_use(self, row: VolumeRow) -> None:
        if not row.used:
            async with self._db.write() as session:
                (await _volume_of(session, row.id)).used = True

    async def _is_held(self, row: VolumeRow, seen: Volume) -> bool:
        """Tell whether the node that had the volume before may still write to it: it is to end first."""
        async with self._db.read() as session:
            query = select(Instance.id).where(Instance.cloud == row.cloud, Instance.cloud_id == seen.vm)
            holder = await session.scalar(query.where(Instance.state != NodeState.GONE).limit(1))
        return holder is not None

    async def _create(self, disks: "_Disks", row: VolumeRow) -> Volume:
        request = VolumeRequest(
            token=row.id,
            name=f"conpaas-{row.role}-{row.id}",
            size=row.size,
            zone=row.zone,
            tags={"service": row.service_id, "role": row.role},
        )
        made = await disks.create(request)
        async with self._db.write() as session:
            kept = await _volume_of(session, row.id)
            kept.cloud_id, kept.zone = made.id, made.zone or kept.zone
            kept.deleted = None  # it was given up before the cloud said yes: its end begins anew
        log.info("volume-made", volume=row.id, cloud_id=made.id, service=row.service_id)
        return made

    async def _lose(self, row: VolumeRow, reason: str) -> None:
        """Write down that a volume is gone, with what was on it; the next call makes an empty one."""
        now = self._clock.now()
        async with self._db.write() as session:
            kept = await _volume_of(session, row.id)
            if kept.deleted is not None:
                return
            kept.deleted, kept.instance_id = now, None
            service = await service_of(session, row.service_id)
            what = f"with the data of a '{row.role}'" if kept.used else f"for a '{row.role}', still empty"
            message = f"{row.id} {what}: {reason}"
            record(session, "volume-lost", at=now, actor="director", service=service, message=message)
        log.error("volume-lost", volume=row.id, reason=reason)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Delete the volumes of services that are terminated; what cannot be done now is repeated."""
        async with self._db.read() as session:
            used = set(await session.scalars(select(VolumeRow.cloud).distinct()))
        async with asyncio.TaskGroup() as group:  # a cloud that hangs holds up no other
            for account in list(self._clouds.accounts.values()):
                if account.name in used and isinstance(account.cloud, HasVolumes):
                    group.create_task(self._reconcile(_Disks(account, account.cloud)), name=f"volumes {account.name}")

    async def _reconcile(self, disks: "_Disks") -> None:
        name = disks.account.name
        try:
            before, listed = self._clock.now(), await disks.all()  # first: whatever is in it has had its row before
            async with self._db.read() as session:
                query = select(VolumeRow, Service.terminated).join(Service, Service.id == VolumeRow.service_id)
                known = VolumeRow.deleted.is_(None) | VolumeRow.id.in_([volume.token for volume in listed])
                rows = (await session.execute(query.where(VolumeRow.cloud == name, known))).all()
        except ConpaasError as exc:
            log.warning("volumes-skipped", cloud=name, error=exc.message)
            return
        over = [row for row, terminated in rows if terminated is not None]
        ours = {row.id for row in over} | {row.id for row, _ in rows if row.deleted is None}
        for row in over:
            try:
                await self._end(disks, row, [volume for volume in listed if volume.token == row.id], before)
            except ConpaasError as exc:
                log.warning("volume-stays", volume=row.id, cloud=name, error=exc.message)
        for volume in listed:
            if volume.token not in ours and (name, volume.id) not in self._told:
                await self._tell(name, volume)

    async def _end(self, disks: "_Disks", row: VolumeRow, listed: Sequence[Volume], before: datetime) -> None:
        """Make the next step towards the end of a volume that was `listed` at `before`, or was not."""
        mine = listed
        if not mine and row.cloud_id:  # lists may lag behind: ask for it by name
            mine = [seen for seen in [await disks.describe(row.cloud_id)] if seen.state is not V.GONE]
        for volume in mine:
            if volume.state is V.ATTACHED:
                await disks.detach(volume.id)
            elif volume.state is not V.PENDING:
                await disks.delete(volume.id)
        if mine or row.created >= before:
            return
        async with self._db.write() as session:
            kept = await _volume_of(session, row.id)
            kept.deleted, kept.instance_id = self._clock.now(), None
        log.info("volume-deleted", volume=row.id)

    async def _tell(self, cloud: str, volume: Volume) -> None:
        """Tell of a volume that bears our tag and belongs to no service that lives. It holds data: it stays."""
        self._told.add((cloud, volume.id))
        message = f"{volume.id} ({volume.token}) on '{cloud}' belongs to no service: delete it there if nobody needs it"
        async with self._db.write() as session:
            record(session, "volume-unknown", at=self._clock.now(), actor="director", message=message)
        log.warning("volume-unknown", cloud=cloud, volume=volume.id, token=volume.token)


@dataclass(frozen=True)
class _Disks:
    """The volumes of one account: each call is made when it is its turn, and bounded in time."""

    account: Account
    cloud: HasVolumes

    async def create(self, request: VolumeRequest) -> Volume:
        return await self.account.ask("volumes", lambda: self.cloud.create_volume(request))

    async def describe(self, volume: str) -> Volume:
        return await self.account.ask("volumes", lambda: self.cloud.describe_volume(volume))

    async def all(self) -> Sequence[Volume]:
        return await self.account.ask("volumes", self.cloud.list_volumes)

    async def of(self, token: str) -> list[Volume]:
        return [volume for volume in await self.all() if volume.token == token]

    async def attach(self, volume: str, vm: str) -> Volume:
        return await self.account.ask("volumes", lambda: self.cloud.attach(volume, vm))

    async def detach(self, volume: str) -> Volume:
        return await self.account.ask("volumes", lambda: self.cloud.detach(volume))

    async def delete(self, volume: str) -> None:
        await self.account.ask("volumes", lambda: self.cloud.delete_volume(volume))


async def _volume_of(session: AsyncSession, volume: str) -> VolumeRow:
    return (await session.scalars(select(VolumeRow).where(VolumeRow.id == volume))).one()
