"""Volumes at an OpenNebula: persistent images, each named after its token, which makes their creation idempotent.

Attaching and detaching are answered before they are done, and `true` even if they fail then: what a volume is
attached to is read from the disks of the VM that its image names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from xml.etree.ElementTree import Element

from conpaas.cloud._opennebula_instances import ALL_IDS, MINE, OpenNebula
from conpaas.cloud._opennebula_model import (
    DEPLOYMENT,
    MIB,
    TOKEN,
    Disk,
    Machine,
    Template,
    Vector,
    id_of,
    image_trouble,
    number_of,
    proper_name,
    render,
    text_of,
)
from conpaas.cloud._opennebula_rpc import NameTakenError, NoSuchError
from conpaas.core.cloud import Volume, VolumeRequest, VolumeState
from conpaas.core.errors import CloudBusyError, CloudRefusedError, PeerError

_STATES = {1: VolumeState.AVAILABLE, 3: VolumeState.FAILED, 5: VolumeState.FAILED, 7: VolumeState.GONE}
"""READY, DISABLED, ERROR and DELETE; LOCKED and CLONE pass."""
_USED = {2, 8}


class _Held(NamedTuple):
    """A volume, and what holds it."""

    volume: Volume
    number: int = -1
    machine: Machine | None = None
    disk: Disk | None = None


@dataclass(frozen=True)
class _Image:
    """An image of ours."""

    number: int
    used_by: int | None
    """Id of the VM that it is attached to, or about to be or no longer to be."""
    volume: Volume


def _image(image: Element) -> _Image:
    """Read an `IMAGE` element."""
    number, state = number_of(image, "ID"), number_of(image, "STATE")
    seen = _STATES.get(state, VolumeState.PENDING)
    volume = Volume(
        id=str(number),
        token=text_of(image, f"TEMPLATE/{TOKEN}"),
        state=seen,
        size=number_of(image, "SIZE") * MIB,
        reason=image_trouble(image) if seen is VolumeState.FAILED else "",
    )
    vms = [number_of(vm, ".") for vm in image.iterfind("VMS/ID")] if state in _USED else []
    return _Image(number, next(iter(vms), None), volume)


def _held(image: _Image, machine: Machine | None) -> _Held:
    """Combine what the image says with what the VM that uses it says."""
    if image.used_by is None:
        return _Held(image.volume, image.number)
    disk = None if machine is None or machine.gone else machine.disks.get(image.number)
    if machine is None or disk is None:  # on its way in or out
        return _Held(image.volume, image.number)
    state = VolumeState.PENDING if disk.changing else VolumeState.ATTACHED
    volume = replace(image.volume, state=state, vm=machine.vm.id, devices=_devices(image.number, disk))
    return _Held(volume, image.number, machine, disk)


def _serial(image: int) -> str:
    return f"conpaas-{image}"


def _devices(image: int, disk: Disk) -> tuple[str, ...]:
    """Return where the disk may be found: by its serial number from OpenNebula 7.4 on, which others ignore."""
    by_serial = (f"/dev/disk/by-id/virtio-{_serial(image)}",) if disk.target.startswith("vd") else ()
    return (*by_serial, f"/dev/{disk.target}")


class OpenNebulaWithVolumes(OpenNebula):
    """A user of an OpenNebula, with volumes in a datastore: see `conpaas.core.cloud.HasVolumes`."""

    async def create_volume(self, request: VolumeRequest) -> Volume:
        """Ask for an empty persistent image."""
        found = await self._volume_with_token(request.token)
        if found is not None:
            return found
        template: Template = {
            "NAME": proper_name(f"conpaas-{self._deployment}-{request.token}"),
            "DESCRIPTION": proper_name(request.name),
            "TYPE": "DATABLOCK",
            "SIZE": -(-request.size // MIB),
            "PERSISTENT": "YES",
            "DEV_PREFIX": self._settings.device_prefix,
            TOKEN: request.token,
            DEPLOYMENT: self._deployment,
        }
        try:
            number = await self._server.ask("one.image.allocate", render(template), self._settings.datastore or 0)
        except NameTakenError as exc:
            found = await self._volume_with_token(request.token)
            if found is None:  # it is being deleted
                raise CloudBusyError(exc.message, value=exc.value) from exc
            return found
        except NoSuchError as exc:
            raise CloudRefusedError(exc.message, hint="correct the datastore of this cloud") from exc
        if not isinstance(number, int):
            raise PeerError(f"cloud {self._name}: the answer names {number!r} as the image that was made")
        return Volume(
            id=str(number), token=request.token, state=VolumeState.PENDING, size=-(-request.size // MIB) * MIB
        )

    async def describe_volume(self, volume: str) -> Volume:
        """Return a volume, as its image and the VM that uses it show it."""
        return (await self._look(volume)).volume

    async def list_volumes(self) -> Sequence[Volume]:
        """Return the volumes of this deployment."""
        images = [image for image in await self._our_images() if image.volume.state is not VolumeState.GONE]
        used = any(image.used_by is not None for image in images)
        machines = {found.number: found for found in await self._listing.fresh()} if used else {}
        return [_held(image, machines.get(-1 if image.used_by is None else image.used_by)).volume for image in images]

    async def attach(self, volume: str, vm: str) -> Volume:
        """Ask for a volume to be attached. CloudBusyError while either of the two is busy with something else."""
        held, found = await self._look(volume), await self._ours(vm)
        seen = held.volume
        if seen.state is VolumeState.GONE:
            raise CloudRefusedError(f"cloud {self._name}: there is no volume {volume}", value=volume)
        if found is None or found.gone:
            raise CloudRefusedError(f"cloud {self._name}: there is no instance {vm}", value=vm)
        if seen.vm == vm:
            return seen
        if seen.vm is not None:
            raise CloudRefusedError(f"cloud {self._name}: the volume {volume} is attached to {seen.vm}", value=seen.vm)
        if seen.state is VolumeState.FAILED:
            raise CloudRefusedError(f"cloud {self._name}: the volume {volume} is in the state {seen.reason}")
        if seen.state is not VolumeState.AVAILABLE:
            raise CloudBusyError(f"cloud {self._name}: the volume {volume} is not ready")
        disk: Vector = {"IMAGE_ID": held.number, "SERIAL": _serial(held.number)}
        await self._server.ask("one.vm.attach", found.number, render({"DISK": disk}))
        return await self.describe_volume(volume)

    async def detach(self, volume: str) -> Volume:
        """Ask for a volume to be detached. CloudBusyError while it is being attached or detached."""
        held = await self._look(volume)
        if held.machine is None or held.disk is None:
            return held.volume
        if held.disk.changing:
            raise CloudBusyError(f"cloud {self._name}: the volume {volume} is being attached or detached")
        await self._server.ask("one.vm.detach", held.machine.number, held.disk.id)
        return await self.describe_volume(volume)

    async def delete_volume(self, volume: str) -> None:
        """Delete an image. CloudBusyError while it is on its way to or from an instance."""
        held = await self._look(volume)
        if held.volume.state is VolumeState.GONE:
            return
        if held.volume.vm is not None:
            raise CloudRefusedError(
                f"cloud {self._name}: the volume {volume} is attached to {held.volume.vm}",
                hint="detach it first",
                value=held.volume.vm,
            )
        try:
            await self._server.ask("one.image.delete", held.number)
        except NoSuchError:
            return

    async def _look(self, volume: str) -> _Held:
        number = id_of(volume)
        gone = _Held(Volume(id=volume, token="", state=VolumeState.GONE))
        if number is None:
            return gone
        try:
            element = await self._server.read("one.image.info", number)
        except NoSuchError:
            return gone
        image = self._ours_of(element)
        if image is None:
            return gone
        return _held(image, None if image.used_by is None else await self._machine(str(image.used_by)))

    def _ours_of(self, image: Element) -> _Image | None:
        return _image(image) if text_of(image, f"TEMPLATE/{DEPLOYMENT}") == self._deployment else None

    async def _our_images(self) -> list[_Image]:
        pool = await self._server.read("one.imagepool.info", MINE, *ALL_IDS)
        found = [self._ours_of(image) for image in pool.iterfind("IMAGE")]
        return [image for image in found if image is not None]

    async def _volume_with_token(self, token: str) -> Volume | None:
        for image in await self._our_images():
            if image.volume.token == token and image.volume.state is not VolumeState.GONE:
                return image.volume
        return None
