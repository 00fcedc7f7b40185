"""The volumes of a node: disks, or folders, that keep its roles' data when its instance is replaced.

`volumes.json` says by role which volume is used and where it is; it is written before the disk is touched, and a node
that comes back mounts again what it names. A disk gets a file system only if nothing at all is on it.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import NamedTuple

import structlog

from conpaas.core import files, run, tasks
from conpaas.core.clock import Clock
from conpaas.core.errors import CommandFailedError, ConflictError, ConpaasError
from conpaas.core.messages.agent import Mount

log = structlog.get_logger()

_NOTHING_FOUND = 2
"""What blkid(8) exits with when it knows nothing of what is on a disk."""
_LABEL_LENGTH = 16
"""The longest label of an ext4 file system."""
_DATA = "data"
"""The folder of a file system that is the role's: engines want an empty one, and mkfs(8) makes `lost+found`."""
_TOOL_S = 300.0
_REBOOT_S = 30.0
"""How long after a reboot a disk may take to appear."""


class _Use(NamedTuple):
    """How a role's volume is used."""

    volume: str
    path: str
    """The folder that is the volume, or where the disk is mounted."""
    disk: str = ""
    blank: bool = False
    """Nothing was on the disk, and its file system is not complete."""

    @property
    def there(self) -> bool:
        return not self.blank and Path(self.path).is_dir() and (not self.disk or Path(self.path).is_mount())

    @property
    def data(self) -> Path:
        return Path(self.path, _DATA) if self.disk else Path(self.path)


class Volumes:
    """The volumes of one node, below `directory`."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._directory, self._clock = directory / "volumes", clock
        self._file = directory / "volumes.json"
        known = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        self._used = {role: _Use(*use) for role, use in known.items()}
        self._lock = asyncio.Lock()

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose volume is there."""
        return tuple(sorted(role for role, use in self._used.items() if use.there))

    def has(self, role: str, volume: str) -> bool:
        """Tell whether a volume is the one that a role uses, or is about to."""
        return role in self._used and self._used[role].volume == volume

    def of(self, role: str) -> Path | None:
        """Return the folder of a role's data, None if it has no volume; ConflictError if that is not there now."""
        use = self._used.get(role)
        if use is None:
            return None
        if not use.there:
            raise ConflictError(f"the volume of '{role}' is not there: {use.volume} at {use.disk or use.path}")
        return use.data

    async def restore(self) -> None:
        """Mount again what was in use; what does not come back is left to the manager."""
        async with self._lock:
            await asyncio.gather(*(self._restore(role, use) for role, use in self._used.items()))

    async def _restore(self, role: str, use: _Use) -> None:
        if use.there or use.blank or not use.disk:
            return
        try:
            disk = await self._appears((use.disk,), use.volume, _REBOOT_S)
            await _mount(disk, role, use)
        except ConpaasError as exc:
            log.warning("volume-not-restored", role=role, error=exc.message)

    async def mount(self, role: str, wish: Mount) -> None:
        """Use a volume for a role's data; fine if it is in use already.

        Raises DeadlineError if it does not appear in time, CommandFailedError if it cannot be used.
        """
        async with self._lock:
            before = self._used.get(role)
            if before is not None and before.volume == wish.volume and before.there:
                return
            if before is not None and before.disk and before.there:
                await run.run(["umount", before.path], timeout_s=_TOOL_S)
            found = await self._appears(wish.devices, wish.volume, wish.timeout_s)
            if found.is_dir():
                self._remember(role, _Use(wish.volume, str(found)))
            else:
                use = _Use(wish.volume, str(self._directory / role), str(found))
                await self._mount(role, use, begun=before == use._replace(blank=True))

    async def _mount(self, role: str, use: _Use, *, begun: bool) -> None:
        """Mount a disk; one that is blank, or whose file system was `begun` and not completed, gets one before."""
        disk = Path(use.disk)
        if begun or await _is_blank(disk):
            self._remember(role, use._replace(blank=True))
            await run.run(["mkfs.ext4", "-q", "-F", "-L", role[:_LABEL_LENGTH], str(disk)], timeout_s=_TOOL_S)
        self._remember(role, use)
        await _mount(disk, role, use)

    async def _appears(self, devices: tuple[str, ...], volume: str, timeout_s: float) -> Path:
        async def first() -> Path | None:
            return next((Path(device) for device in devices if Path(device).exists()), None)

        what = f"volume {volume} appears at {' or '.join(devices)}"
        return await tasks.wait_for(first, timeout_s=timeout_s, what=what, clock=self._clock)

    async def release(self) -> None:
        """Unmount all: the instance is about to end, and its volumes go on."""
        async with self._lock:
            for role, use in self._used.items():
                if use.disk and use.there:
                    try:
                        await run.run(["umount", use.path], timeout_s=_TOOL_S)
                    except ConpaasError as exc:
                        log.warning("volume-not-unmounted", role=role, error=exc.message)

    def _remember(self, role: str, use: _Use) -> None:
        self._used[role] = use
        files.write_atomically(self._file, json.dumps(self._used))


async def _mount(disk: Path, role: str, use: _Use) -> None:
    """Mount a disk that bears the role's label: devices may have changed their names."""
    probe = await run.run(["blkid", "--probe", "--output", "export", str(disk)], timeout_s=_TOOL_S)
    facts = dict(line.partition("=")[::2] for line in probe.stdout.decode("utf-8", "replace").splitlines())
    label = facts.get("LABEL", "")
    if label != role[:_LABEL_LENGTH]:
        holds = f"the data of '{label}'" if label else f"something else ({facts.get('TYPE', 'no file system')})"
        raise CommandFailedError(f"{disk} holds {holds}, not that of '{role}'", value=str(disk))
    path = Path(use.path)
    path.mkdir(parents=True, exist_ok=True)
    await run.run(["mount", str(disk), str(path)], timeout_s=_TOOL_S)
    use.data.mkdir(exist_ok=True)


async def _is_blank(disk: Path) -> bool:
    """Tell whether nothing is on a disk; CommandFailedError if that is not certain."""
    probe = await run.run(["blkid", "--probe", str(disk)], timeout_s=_TOOL_S, check=False)
    if probe.returncode == 0:
        return False
    if probe.returncode != _NOTHING_FOUND or not await asyncio.to_thread(_begins_and_ends_with_zeros, disk):
        words = (probe.stdout + probe.stderr).decode("utf-8", "replace").strip()
        raise CommandFailedError(
            f"{disk} is not empty, and holds no file system: {words or 'unknown data'}", value=str(disk)
        )
    return True


def _begins_and_ends_with_zeros(disk: Path) -> bool:
    """Look at the first and the last MiB: blkid(8) does not know every format, and is silent if it cannot read."""
    piece = 1 << 20
    try:
        with disk.open("rb") as file:
            first = file.read(piece)
            file.seek(max(0, file.seek(0, os.SEEK_END) - piece))
            return not any(first) and not any(file.read(piece))
    except OSError as exc:
        raise CommandFailedError(f"{disk} cannot be read: {exc}", value=str(disk)) from exc
