"""Volumes, consoles and quota of an account that apache-libcloud speaks to."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from conpaas.cloud._libcloud_cloud import ID, Lately, LibcloudCloud
from conpaas.cloud._libcloud_errors import is_gone
from conpaas.cloud._libcloud_openstack import OpenStack
from conpaas.cloud._libcloud_provider import GIB, DiskProvider
from conpaas.cloud.libcloud import LibcloudSettings
from conpaas.core.cloud import CloudContext, Room, Volume, VolumeRequest, VolumeState
from conpaas.core.errors import CloudBusyError, CloudRefusedError, ConpaasError

CONSOLE_BYTES = 64 * 1024


class LibcloudDisks(LibcloudCloud):
    """An account at a provider with volumes that we know how to find, and consoles."""

    def __init__(self, settings: LibcloudSettings, context: CloudContext, provider: DiskProvider) -> None:
        super().__init__(settings, context, provider)
        self._disks = provider
        self._volumes = Lately()

    async def console(self, vm: str) -> str:
        """Return the end of what the instance has printed."""
        text = await self._threads.run(lambda driver, _call: self._console(driver, vm))
        return text.encode()[-CONSOLE_BYTES:].decode(errors="ignore")

    def _console(self, driver: Any, vm: str) -> str:
        node = self._node(driver, vm)
        if node is None or not self._provider.token(node):
            return ""
        return self._disks.console(driver, node)

    async def create_volume(self, request: VolumeRequest) -> Volume:
        """Make a volume, unless the token has one. Our marks are in its name."""
        return await self._threads.run(
            lambda driver, _call: self._create_volume(driver, request), alone=f"{self._key}:{request.token}"
        )

    async def describe_volume(self, volume: str) -> Volume:
        """Return the volume."""
        return await self._threads.run(lambda driver, _call: self._volume(driver, volume)[1])

    async def list_volumes(self) -> Sequence[Volume]:
        """Return all that bear our marks."""
        return await self._threads.run(lambda driver, _call: self._our_volumes(driver))

    async def attach(self, volume: str, vm: str) -> Volume:
        """Ask for the volume to be attached, where the instance's own system, or we, think fit."""
        return await self._threads.run(lambda driver, _call: self._attach(driver, volume, vm))

    async def detach(self, volume: str) -> Volume:
        """Ask for the volume to be detached."""
        return await self._threads.run(lambda driver, _call: self._detach(driver, volume))

    async def delete_volume(self, volume: str) -> None:
        """Delete the volume."""
        await self._threads.run(lambda driver, _call: self._delete_volume(driver, volume))

    def _create_volume(self, driver: Any, request: VolumeRequest) -> Volume:
        found = [volume for volume in self._our_volumes(driver) if volume.token == request.token]
        if found:
            return min(found, key=lambda volume: volume.id)
        made = self._volumes.made(request.token)
        if made is not None and (seen := self._volume(driver, made)[1]).state is not VolumeState.GONE:
            return seen
        zone = self._zone(driver, request.zone)
        gib = -(-request.size // GIB)
        volume = self._disks.create_volume(driver, self._provider.prefix + request.token, gib, zone)
        self._volumes.make(volume, request.token)
        return Volume(id=volume, token=request.token, state=VolumeState.PENDING, size=gib * GIB, zone=zone)

    def _our_volumes(self, driver: Any) -> Sequence[Volume]:
        found = [
            self._seen(volume, token)
            for volume in self._disks.volumes(driver)
            if (token := self._provider.token_in(volume.name))
        ]
        return [volume for volume in found if volume.state is not VolumeState.GONE]

    def _volume(self, driver: Any, volume: str) -> tuple[Any, Volume]:
        """Return libcloud's volume, None if there is none of ours, and how it is."""
        found = self._disks.volume(driver, volume) if ID.fullmatch(volume) else None
        token = self._provider.token_in(found.name) if found is not None else ""
        if token:
            self._volumes.see(volume)
            return found, self._seen(found, token)
        made = self._volumes.unseen(volume) if found is None else ""
        return None, Volume(id=volume, token=made, state=VolumeState.PENDING if made else VolumeState.GONE)

    def _seen(self, volume: Any, token: str) -> Volume:
        seen = self._disks.look(volume, token)
        return replace(seen, state=VolumeState.GONE) if self._volumes.ended(seen.id) else seen

    def _attach(self, driver: Any, volume: str, vm: str) -> Volume:
        found, seen = self._volume(driver, volume)
        node = self._node(driver, vm)
        if seen.state is VolumeState.GONE:
            raise CloudRefusedError(f"cloud {self._name}: there is no volume {volume}", value=volume)
        if node is None or not self._provider.token(node):
            raise CloudRefusedError(f"cloud {self._name}: there is no instance {vm}", value=vm)
        if seen.vm == vm:
            return seen
        if seen.vm is not None:
            raise CloudRefusedError(f"cloud {self._name}: volume {volume} is attached to {seen.vm}", value=volume)
        if seen.state is not VolumeState.AVAILABLE:
            raise _not_yet(self._name, seen)
        self._disks.attach(driver, found, node)
        return replace(seen, state=VolumeState.PENDING, vm=vm)

    def _detach(self, driver: Any, volume: str) -> Volume:
        found, seen = self._volume(driver, volume)
        if found is None or seen.vm is None:
            return seen
        try:
            driver.detach_volume(found)
        except Exception as exc:
            if not is_gone(exc):
                raise
        return replace(seen, state=VolumeState.PENDING)

    def _delete_volume(self, driver: Any, volume: str) -> None:
        found, seen = self._volume(driver, volume)
        if seen.state is VolumeState.GONE:
            return
        if seen.vm is not None:
            raise CloudRefusedError(f"cloud {self._name}: volume {volume} is attached to {seen.vm}", value=volume)
        if found is None:
            raise _not_yet(self._name, seen)
        try:
            driver.destroy_volume(found)
        except Exception as exc:
            if not is_gone(exc):
                raise
        self._volumes.end(volume)


class OpenStackCloud(LibcloudDisks):
    """An account at an OpenStack, which tells its quota too."""

    def __init__(self, settings: LibcloudSettings, context: CloudContext, provider: OpenStack) -> None:
        super().__init__(settings, context, provider)
        self._openstack = provider

    async def quota(self) -> Sequence[Room]:
        """Return what the compute service allows the project."""
        return await self._threads.run(lambda driver, _call: self._openstack.quota(driver))


def _not_yet(cloud: str, volume: Volume) -> ConpaasError:
    if volume.state is VolumeState.FAILED:
        return CloudRefusedError(f"cloud {cloud}: volume {volume.id} is broken: {volume.reason}", value=volume.id)
    return CloudBusyError(f"cloud {cloud}: volume {volume.id} is being made, attached or detached", value=volume.id)
