"""EBS volumes."""

import asyncio
from typing import Any
from zlib import crc32

from conpaas.cloud._ec2_account import GIB, TOKEN, Account, Fresh, tags_of
from conpaas.cloud._ec2_client import Answer
from conpaas.cloud.ec2 import Ec2Settings
from conpaas.core.cloud import CloudContext, Volume, VolumeRequest, VolumeState
from conpaas.core.errors import CloudBusyError, CloudRefusedError, QuotaExceededError

DEVICES = tuple(f"/dev/sd{letter}" for letter in "fghijklmnop")  # what Amazon recommends for data volumes

_STATES = {
    "creating": VolumeState.PENDING,
    "available": VolumeState.AVAILABLE,
    "in-use": VolumeState.PENDING,  # unless its attachment says more
    "deleting": VolumeState.GONE,
    "deleted": VolumeState.GONE,
    "error": VolumeState.FAILED,
}


class Volumes(Account):
    """The volumes of one deployment."""

    def __init__(self, settings: Ec2Settings, context: CloudContext) -> None:
        super().__init__(settings, context)
        self._fresh_volumes: Fresh[Volume] = Fresh(context.clock)
        self._attaching = asyncio.Lock()

    async def create_volume(self, request: VolumeRequest) -> Volume:
        """Ask for an empty gp3 volume, in the zone of the first subnet if none is named."""
        known = await self._volumes(**{f"tag:{TOKEN}": request.token})
        for volume in known:
            if volume.state is not VolumeState.GONE:
                return volume
        subnet = await self._subnet(request.zone)  # elsewhere no instance could have it
        volume = await self._ec2.call(
            "create_volume",
            read_volume,
            AvailabilityZone=subnet.zone,
            Size=-(-request.size // GIB),
            VolumeType="gp3",
            Encrypted=self._settings.encrypted,
            ClientToken=self._client_token(request.token, len(known)),
            TagSpecifications=[self._specification("volume", request.name, request.token, request.tags)],
        )
        self._fresh_volumes.put(volume.id, volume)
        return volume

    async def describe_volume(self, volume: str) -> Volume:
        """Return the volume as Amazon shows it."""
        found = await self._volumes(volume_id=volume)
        if found:
            return found[0]
        return self._fresh_volumes.all().get(volume) or Volume(id=volume, token="", state=VolumeState.GONE)

    async def list_volumes(self) -> list[Volume]:
        """Return the deployment's volumes, and none of its instances' own disks."""
        found = {volume.id: volume for volume in await self._volumes()}
        every = dict(self._fresh_volumes.all()) | found
        return [volume for volume in every.values() if volume.state is not VolumeState.GONE]

    async def attach(self, volume: str, vm: str) -> Volume:
        """Ask for the volume to be attached under the first free device name."""
        async with self._attaching:  # or two would take the same name
            seen = await self._attachable(volume, vm)
            if seen.vm == vm:
                return seen
            taken = await self._device_names(vm)
            free = [device for device in _in_turn(volume) if device not in taken]
            if not free:
                raise QuotaExceededError(
                    f"cloud {self._context.name}: {vm} has {len(taken)} disks, and no device name left", value=vm
                )
            answer = await self._ec2.call("attach_volume", dict, VolumeId=volume, InstanceId=vm, Device=free[0])
        return Volume(
            id=volume,
            token=seen.token,
            state=VolumeState.ATTACHED if answer.get("State") == "attached" else VolumeState.PENDING,
            size=seen.size,
            zone=seen.zone,
            vm=vm,
            devices=devices(volume, free[0]),
        )

    async def detach(self, volume: str) -> Volume:
        """Ask for the volume to be detached."""
        raw = await self._raw_volume(volume)
        attachments = [item for item in raw.get("Attachments", []) if item.get("State") in ("attaching", "attached")]
        if not raw or not attachments:
            return read_volume(raw) if raw else await self.describe_volume(volume)
        await self._ec2.call(
            "detach_volume",
            dict,
            VolumeId=volume,
            InstanceId=attachments[0]["InstanceId"],
            Device=attachments[0]["Device"],
        )
        return await self.describe_volume(volume)

    async def delete_volume(self, volume: str) -> None:
        """Delete the volume."""
        known = await self._volumes(volume_id=volume)
        if known or volume in self._fresh_volumes.all():
            try:
                await self._ec2.call("delete_volume", dict, VolumeId=volume)
            except CloudBusyError as exc:
                if exc.value != "InvalidVolume.NotFound" or not known:
                    raise
        self._fresh_volumes.drop(volume)

    async def _attachable(self, volume: str, vm: str) -> Volume:
        """Return a volume of ours that is attached to nothing, or to `vm`."""
        seen = await self.describe_volume(volume)
        if seen.state is VolumeState.GONE:
            raise CloudRefusedError(f"cloud {self._context.name}: there is no volume {volume}", value=volume)
        if seen.vm not in (None, vm):
            raise CloudRefusedError(
                f"cloud {self._context.name}: volume {volume} is attached to {seen.vm}",
                value=seen.vm,
                hint="detach it first",
            )
        return seen

    async def _device_names(self, vm: str) -> set[str]:
        """Return the device names that an instance of ours has in use."""
        found = await self._ec2.call(
            "describe_instances",
            lambda answer: [item for group in answer["Reservations"] for item in group["Instances"]],
            Filters=self._ours(instance_id=vm),
        )
        if not found:
            raise CloudRefusedError(f"cloud {self._context.name}: there is no instance {vm}", value=vm)
        return {mapping["DeviceName"] for mapping in found[0].get("BlockDeviceMappings", [])}

    async def _volumes(self, **more: str) -> list[Volume]:
        found = await self._ec2.pages(
            "describe_volumes",
            lambda answer: [read_volume(item) for item in answer["Volumes"]],
            Filters=self._ours(**more),
        )
        for volume in found:
            self._fresh_volumes.drop(volume.id)  # deleted ones are not shown: once seen, and then not, is gone
        return found

    async def _raw_volume(self, volume: str) -> dict[str, Any]:
        found = await self._ec2.call(
            "describe_volumes", lambda answer: list(answer["Volumes"]), Filters=self._ours(volume_id=volume)
        )
        return dict(found[0]) if found else {}


def devices(volume: str, device: str) -> tuple[str, ...]:
    """Return where an instance finds a volume: by its id where disks are NVMe, else by the name it was given."""
    letter = device.removeprefix("/dev/sd")
    by_id = f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}"
    return (by_id, f"/dev/xvd{letter}", f"/dev/sd{letter}")


def read_volume(item: Answer) -> Volume:
    """Return the volume that Amazon describes."""
    state, attached = _STATES[item["State"]], [a for a in item.get("Attachments", []) if a.get("State") != "detached"]
    vm: str | None = None
    places: tuple[str, ...] = ()
    if attached and state is not VolumeState.GONE:
        vm, places = attached[0]["InstanceId"], devices(item["VolumeId"], attached[0]["Device"])
        state = VolumeState.ATTACHED if attached[0]["State"] == "attached" else VolumeState.PENDING
    return Volume(
        id=item["VolumeId"],
        token=tags_of(item).get(TOKEN, ""),
        state=state,
        size=int(item.get("Size", 0)) * GIB,
        zone=item.get("AvailabilityZone", ""),
        vm=vm,
        devices=places,
        reason="the volume has failed" if state is VolumeState.FAILED else "",
    )


def _in_turn(volume: str) -> tuple[str, ...]:
    """Return the device names in an order of the volume's own: lists lag, and two volumes should not collide."""
    start = crc32(volume.encode()) % len(DEVICES)
    return DEVICES[start:] + DEVICES[:start]
