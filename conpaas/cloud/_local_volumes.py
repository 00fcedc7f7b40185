"""Volumes of the local cloud: folders that outlive instances, and move between them by being renamed.

    <directory>/.volumes/<id>.json         token, deployment, name, size, and the instance that has it or had it last
    <directory>/.volumes/<id>/             the volume, while it is attached to nothing
    <directory>/<instance>/volumes/<id>/   the volume, while that instance has it

Where the folder is decides; the record says where to look. So there is no moment at which a crash loses anything, or
leaves more to repair than the next call does. Instances are trusted with their own folder and nothing else: no link
that one of them makes is followed.
"""

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conpaas.cloud import _local_machine as machine
from conpaas.core import files, units
from conpaas.core.cloud import Volume, VolumeRequest, VolumeState
from conpaas.core.errors import CloudRefusedError

_INSIDE = "volumes"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class _Record(NamedTuple):
    """One volume, as it is kept on disk."""

    token: str
    deployment: str
    name: str
    size: int
    vm: str | None = None


class Volumes:
    """The volumes of one deployment. Blocking; who locks an instance does so before calling, never while in here."""

    def __init__(self, cloud: str, deployment: str, directory: Path, lock: Path, users: range) -> None:
        self._cloud, self._deployment, self._directory, self._lock = cloud, deployment, directory, lock
        self._volumes = directory / ".volumes"
        self._users = users
        """Ids that instances may have."""

    def create(self, request: VolumeRequest) -> Volume:
        """Make an empty volume, or return the one that the token has made before."""
        self._volumes.mkdir(mode=0o700, exist_ok=True)
        with machine.locked(self._lock, request.token):
            record = self._read(request.token)
            if record is None:
                record = self._add(request)
            if record.vm is None:  # it was never attached: without a folder, its creation was interrupted
                self._folder(record).mkdir(mode=0o700, exist_ok=True)
            return self._look(record)

    def _add(self, request: VolumeRequest) -> _Record:
        if self._record_file(request.token).exists():
            raise CloudRefusedError(f"cloud {self._cloud}: another deployment has a volume {request.token}")
        free = files.free_bytes(self._volumes)
        if free < request.size:
            raise CloudRefusedError(
                f"cloud {self._cloud}: no room for a volume of {units.show_size(request.size)}: "
                f"{units.show_size(free)} of this machine's disk are free",
                value=request.size,
                hint="ask for less, or free some space and try again",
            )
        record = _Record(request.token, self._deployment, request.name, request.size)
        self._write(record)
        return record

    def describe(self, volume: str) -> Volume:
        """Return the volume by looking where it is."""
        record = self._read(volume)
        seen = _gone(volume) if record is None else self._look(record)
        if seen.state is not VolumeState.FAILED:
            return seen
        with machine.locked(self._lock, volume):  # or it was moved between two looks
            record = self._read(volume)
            return _gone(volume) if record is None else self._look(record)

    def list(self) -> list[Volume]:
        """Return every volume of the deployment."""
        seen = [self.describe(path.stem) for path in sorted(self._volumes.glob("*.json"))]
        return [volume for volume in seen if volume.state is not VolumeState.GONE]

    def attach(self, volume: str, vm: str, user: int | None) -> Volume:
        """Move the volume into the folder of an instance of ours, whose lock the caller holds; `user` will own it."""
        with machine.locked(self._lock, volume):
            record = self._read(volume)
            if record is None:
                raise CloudRefusedError(f"cloud {self._cloud}: there is no volume {volume}")
            seen = self._look(record)
            if seen.state is VolumeState.FAILED:
                raise CloudRefusedError(f"cloud {self._cloud}: volume {volume} cannot be attached: {seen.reason}")
            if seen.vm is None:
                record = record._replace(vm=vm)
                self._write(record)
                if user is not None:
                    self._give(self._folder(record), user)
                self._move_in(volume, vm)
            elif seen.vm != vm:
                raise CloudRefusedError(f"cloud {self._cloud}: volume {volume} is attached to {seen.vm}", value=seen.vm)
            return self._look(record)

    def detach(self, volume: str) -> Volume:
        """Move the volume out of its instance's folder, whether that lives or not."""
        with machine.locked(self._lock, volume):
            record = self._read(volume)
            if record is None:
                return _gone(volume)
            seen = self._look(record)
            if seen.vm is not None:
                self._move_out(volume, seen.vm)
                return self._look(record)
            return seen

    def take_back(self, vm: str) -> None:
        """Detach all that an instance has, before its folder is removed. It is dead, and the caller holds its lock."""
        if not self._volumes.exists():
            return
        for folder in (self._directory / vm, self._directory / vm / _INSIDE):
            _open_up(folder)
        for path in self._volumes.glob("*.json"):
            record = self._read(path.stem)
            if record is not None and record.vm == vm:
                self.detach(record.token)

    def delete(self, volume: str) -> None:
        """Remove a volume that is attached to nothing, and all data on it; its record goes last."""
        with machine.locked(self._lock, volume):
            record = self._read(volume)
            if record is None:
                return
            seen = self._look(record)
            if seen.vm is not None:
                raise CloudRefusedError(f"cloud {self._cloud}: volume {volume} is attached to {seen.vm}", value=seen.vm)
            folder = self._folder(record)
            if folder.is_symlink() or folder.is_file():  # an instance put it there
                folder.unlink()
            machine.remove_tree(folder)
            self._record_file(volume).unlink()

    # -- looking ----------------------------------------------------------------------------------------------------

    def _folder(self, record: _Record) -> Path:
        return self._volumes / record.token

    def _record_file(self, token: str) -> Path:
        return self._volumes / f"{token}.json"

    def _write(self, record: _Record) -> None:
        files.write_atomically(self._record_file(record.token), json.dumps(record._asdict()), mode=0o600)

    def _read(self, token: str) -> _Record | None:
        """Return the record of a volume of ours, None if there is none."""
        if not machine.is_id(token):
            return None
        try:
            record = _Record(**json.loads(self._record_file(token).read_bytes()))
        except FileNotFoundError:
            return None
        return record if record.deployment == self._deployment else None

    def _look(self, record: _Record) -> Volume:
        volume = Volume(id=record.token, token=record.token, state=VolumeState.AVAILABLE, size=record.size)
        if _is_folder(self._folder(record)):
            return volume
        if record.vm is None:
            return _failed(volume, "its creation was interrupted")
        inside = self._directory / record.vm / _INSIDE
        if _is_folder(inside) and _is_folder(inside / record.token):
            device = str(inside / record.token)
            return dataclasses.replace(volume, state=VolumeState.ATTACHED, vm=record.vm, devices=(device,))
        return _failed(volume, f"its folder is no longer in instance {record.vm}, which had it last")

    # -- moving -----------------------------------------------------------------------------------------------------

    def _move_in(self, volume: str, vm: str) -> None:
        with _opened(self._volumes) as ours, _opened(self._directory / vm) as home:
            with contextlib.suppress(FileExistsError):
                os.mkdir(_INSIDE, mode=0o755, dir_fd=home)
            with _opened(_INSIDE, home) as inside:
                os.rename(volume, volume, src_dir_fd=ours, dst_dir_fd=inside)

    def _move_out(self, volume: str, vm: str) -> None:
        with (
            _opened(self._volumes) as ours,
            _opened(self._directory / vm) as home,
            _opened(_INSIDE, home) as inside,
        ):
            _open_up(Path(f"/proc/self/fd/{inside}", volume))
            os.rename(volume, volume, src_dir_fd=inside, dst_dir_fd=ours)

    def _give(self, folder: Path, user: int) -> None:
        """Make a user the owner of a folder of ours and of all that is in it; interrupted, it is begun anew.

        A file with other names elsewhere is left alone if it was no instance's: one may have linked it here.
        """
        if folder.lstat().st_uid == user:
            return
        os.chown(folder, 0, 0, follow_symlinks=False)
        for _, folders, others, place in os.fwalk(folder):
            for name in (*folders, *others):
                facts = os.stat(name, dir_fd=place, follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode) or facts.st_nlink == 1 or facts.st_uid in self._users:
                    os.chown(name, user, user, dir_fd=place, follow_symlinks=False)
        os.chown(folder, user, user, follow_symlinks=False)


def _gone(volume: str) -> Volume:
    return Volume(id=volume, token="", state=VolumeState.GONE)


def _failed(volume: Volume, reason: str) -> Volume:
    return dataclasses.replace(volume, state=VolumeState.FAILED, reason=reason)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _open_up(folder: Path) -> None:
    """Let its owner enter and move a folder that an engine has closed; root needs no leave."""
    if os.geteuid() != 0 and _is_folder(folder):
        folder.chmod(stat.S_IMODE(folder.lstat().st_mode) | stat.S_IRWXU)


@contextlib.contextmanager
def _opened(folder: Path | str, beside: int | None = None) -> Iterator[int]:
    """Open a folder, by its path or by its name in an open one; a link is none."""
    descriptor = os.open(folder, _FOLDER, dir_fd=beside)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
