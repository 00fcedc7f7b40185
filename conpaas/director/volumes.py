"""Volumes: disks that keep a role's data when its instance is replaced, or its service stopped.

As with instances, the intent is written before the cloud is asked, and a volume's id is the token by which its cloud
knows the request. A volume belongs to the node that it was last given to; when that has ended, the next node that
needs one for the same role, on the same cloud, gets it with all that is on it.
"""

from functools import partial

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import ids
from conpaas.core.clock import Clock
from conpaas.core.cloud import HasVolumes, Volume, VolumeRequest, VolumeState
from conpaas.core.errors import BadInputError, ConflictError, ConpaasError
from conpaas.core.messages.internal import VolumeView
from conpaas.director import catalogue
from conpaas.director.clouds import Account, Clouds
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, Service, VolumeRow
from conpaas.director.events import record
from conpaas.director.ledger import instance_of, service_of, spare_volumes

log = structlog.get_logger()


class Volumes:
    """Gives volumes to nodes, and deletes those that nobody will want again."""

    def __init__(self, db: Database, clouds: Clouds, clock: Clock) -> None:
        self._db, self._clouds, self._clock = db, clouds, clock

    async def ensure(self, service_id: str, instance_id: str, role: str) -> VolumeView:
        """Bring the volume of a role to a node; called again until it is ready. Raises BadInputError, CloudError."""
        async with self._db.write() as session:
            service, instance = await service_of(session, service_id), await instance_of(session, instance_id)
            if instance.ended is not None:
                raise ConflictError(f"instance {instance.id} has ended", value=instance.id)
            size = catalogue.kind_of(service.type).role(role).volume
            if not size:
                raise BadInputError(f"the role '{role}' keeps no data", value=role)
            row = await self._choose(session, service, instance, role, size)
        account = self._clouds.account(row.cloud)
        if not isinstance(account.cloud, HasVolumes):
            return VolumeView(id=row.id, role=role, ready=True, reason=f"cloud '{row.cloud}' has no volumes")
        seen = await self._bring(account, account.cloud, row, instance)
        ready = seen.state is VolumeState.ATTACHED and seen.vm == instance.cloud_id
        return VolumeView(id=row.id, role=role, ready=ready, devices=seen.devices, reason=seen.reason)

    async def _choose(
        self, session: AsyncSession, service: Service, instance: Instance, role: str, size: int
    ) -> VolumeRow:
        """Return the volume that the node has, or the one that is free the longest, or write down a new one."""
        own = select(VolumeRow).where(VolumeRow.instance_id == instance.id, VolumeRow.deleted.is_(None))
        row = await session.scalar(own.where(VolumeRow.role == role))
        if row is None:
            free = spare_volumes(service.id, instance.cloud) & (VolumeRow.role == role)
            row = await session.scalar(select(VolumeRow).where(free).order_by(VolumeRow.seq).limit(1))
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

    async def _bring(self, account: Account, cloud: HasVolumes, row: VolumeRow, instance: Instance) -> Volume:
        """Make the next step towards an attached volume; return how it is."""
        if not row.cloud_id:
            return await self._create(account, cloud, row)
        seen = await account.ask("volumes", lambda: cloud.describe_volume(row.cloud_id))
        if seen.state in {VolumeState.FAILED, VolumeState.GONE}:
            await self._lose(row, seen.reason or f"the cloud says it is {seen.state}")
        elif seen.state is VolumeState.AVAILABLE:
            return await account.ask("volumes", lambda: cloud.attach(row.cloud_id, instance.cloud_id))
        elif seen.state is VolumeState.ATTACHED and seen.vm != instance.cloud_id:
            return await account.ask("volumes", lambda: cloud.detach(row.cloud_id))
        return seen

    async def _create(self, account: Account, cloud: HasVolumes, row: VolumeRow) -> Volume:
        request = VolumeRequest(
            token=row.id,
            name=f"conpaas-{row.role}-{row.id}",
            size=row.size,
            zone=row.zone,
            tags={"service": row.service_id, "role": row.role},
        )
        made = await account.ask("volumes", lambda: cloud.create_volume(request))
        async with self._db.write() as session:
            kept = await _volume_of(session, row.id)
            kept.cloud_id, kept.zone = made.id, made.zone
        log.info("volume-made", volume=row.id, cloud_id=made.id, service=row.service_id)
        return made

    async def _lose(self, row: VolumeRow, reason: str) -> None:
        """Write down that a volume, and what was on it, is gone; the next call makes an empty one."""
        now = self._clock.now()
        async with self._db.write() as session:
            kept = await _volume_of(session, row.id)
            kept.deleted, kept.instance_id = now, None
            service = await service_of(session, row.service_id)
            message = f"{row.id} with the data of a '{row.role}': {reason}"
            record(session, "volume-lost", at=now, actor="director", service=service, message=message)
        log.error("volume-lost", volume=row.id, reason=reason)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Delete the volumes of services that are terminated; what cannot be done now is repeated."""
        query = (
            select(VolumeRow)
            .join(Service, Service.id == VolumeRow.service_id)
            .where(VolumeRow.deleted.is_(None), Service.terminated.is_not(None))
        )
        async with self._db.read() as session:
            rows = (await session.scalars(query)).all()
        for row in rows:
            try:
                await self._delete(row)
            except ConpaasError as exc:
                log.warning("volume-stays", volume=row.id, cloud=row.cloud, error=exc.message)

    async def _delete(self, row: VolumeRow) -> None:
        account = self._clouds.account(row.cloud)
        cloud = account.cloud
        if cloud is None:
            return
        if isinstance(cloud, HasVolumes) and not await self._gone(account, cloud, row):
            return
        async with self._db.write() as session:
            kept = await _volume_of(session, row.id)
            kept.deleted, kept.instance_id = self._clock.now(), None
        log.info("volume-deleted", volume=row.id)

    async def _gone(self, account: Account, cloud: HasVolumes, row: VolumeRow) -> bool:
        """Make the next step towards the end of a volume; return whether it is gone."""
        listed = await account.ask("volumes", cloud.list_volumes)  # by its token: the answer may have been lost
        mine = [volume for volume in listed if volume.token == row.id]
        for volume in mine:
            if volume.state is VolumeState.ATTACHED:
                await account.ask("volumes", partial(cloud.detach, volume.id))
            elif volume.state is not VolumeState.PENDING:
                await account.ask("volumes", partial(cloud.delete_volume, volume.id))
        return not mine


async def _volume_of(session: AsyncSession, volume: str) -> VolumeRow:
    return (await session.scalars(select(VolumeRow).where(VolumeRow.id == volume))).one()
