"""The volumes of the `qemu` cloud: raw files with holes, plugged into running machines.

    <directory>/.volumes/<id>.json   token, deployment, name, size, and who has it
    <directory>/.volumes/<id>.raw    its content

A volume is attached to a *process*: with that it is free again, whatever became of the instance. What the record says
of it is only what was asked for; QEMU is asked what is. Blocking.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _qemu_machine as qemu
from conpaas.cloud import _qemu_records as records
from conpaas.core import files
from conpaas.core.cloud import Volume, VolumeRequest, VolumeState
from conpaas.core.errors import BadInputError, CloudBusyError, CloudRefusedError

_SECTOR = 512
SERIAL_CHARACTERS = 20
"""As many as virtio gives a disk to name itself."""


class Holder(NamedTuple):
    """The instance that a volume was given to."""

    vm: str
    process: machine.First
    leaving: bool
    """It was asked to let go of it."""


class Record(NamedTuple):
    """One volume, as it is kept on disk."""

    id: str
    token: str
    deployment: str
    name: str
    size: int
    """Bytes."""
    holder: Holder | None = None


class Volumes:
    """The volumes of one deployment."""

    def __init__(self, instances: records.Records, deployment: str, deadline_s: float) -> None:
        self._instances, self._deployment, self._deadline_s = instances, deployment, deadline_s
        self._folder = instances.directory / ".volumes"
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def create(self, request: VolumeRequest) -> Volume:
        """Make an empty one; the record goes last, so that what has one is whole."""
        if not records.ID.fullmatch(request.token) or request.zone:
            raise BadInputError(f"volume {request.token!r}: not its name, or a zone '{request.zone}': there is none")
        volume = self._id(request.token)
        with self._locked(volume):
            if self._read(volume) is None:
                size = -(-request.size // _SECTOR) * _SECTOR
                self._content(volume).touch(mode=0o600)
                os.truncate(self._content(volume), size)
                self._write(Record(volume, request.token, self._deployment, request.name, size))
            return self._look(volume)

    def describe(self, volume: str) -> Volume:
        """Return the volume as it is now; what was half detached is so in whole."""
        with self._locked(volume):
            return self._look(volume)

    def all(self) -> Sequence[Volume]:
        """Return our volumes."""
        found = [self.describe(path.stem) for path in sorted(self._folder.glob("*.json"))]
        return [volume for volume in found if volume.state is not VolumeState.GONE]

    def attach(self, volume: str, vm: str) -> Volume:
        """Plug the volume into a running machine."""
        with self._locked(volume):
            record, seen = self._read(volume), self._look(volume)
            if record is None:
                raise CloudRefusedError(f"there is no volume {volume}", value=volume)
            if seen.vm not in {None, vm}:
                raise CloudRefusedError(f"volume {volume} is attached to {seen.vm}", value=volume)
            if seen.state is VolumeState.PENDING:
                raise CloudBusyError(f"volume {volume} is being detached from {vm}", value=volume)
            if seen.vm is None:
                self._plug(record, vm)
            return self._look(volume)

    def detach(self, volume: str) -> Volume:
        """Ask the machine to let go of the volume: its operating system takes a moment, or does not."""
        with self._locked(volume):
            record, seen = self._read(volume), self._look(volume)
            if record is not None and record.holder is not None and seen.state is VolumeState.ATTACHED:
                with self._monitor(record.holder) as talk:
                    self._write(record._replace(holder=record.holder._replace(leaving=True)))
                    qemu.unplug(talk, volume)
                return self._look(volume)
            return seen

    def delete(self, volume: str) -> None:
        """Remove the volume; the record goes last, so that an interrupted removal is found."""
        with self._locked(volume):
            seen = self._look(volume)
            if seen.vm is not None:
                raise CloudRefusedError(f"volume {volume} is attached to {seen.vm}", value=volume)
            if seen.state is not VolumeState.GONE:
                self._content(volume).unlink(missing_ok=True)
                self._file(volume).unlink(missing_ok=True)

    # Files

    def _id(self, token: str) -> str:
        words = f"{self._deployment} {token}".encode()
        return f"v{hashlib.sha256(words).hexdigest()}"[:SERIAL_CHARACTERS]

    def _file(self, volume: str) -> Path:
        return self._folder / f"{volume}.json"

    def _content(self, volume: str) -> Path:
        return self._folder / f"{volume}.raw"

    def _locked(self, volume: str) -> AbstractContextManager[None]:
        return machine.locked(self._folder / "lock", volume)

    def _write(self, record: Record) -> None:
        words = record._asdict()
        if record.holder is not None:
            words["holder"] = record.holder._asdict() | {"process": record.holder.process._asdict()}
        files.write_atomically(self._file(record.id), json.dumps(words), mode=0o600)

    def _read(self, volume: str) -> Record | None:
        """Return a volume of ours, None if there is none."""
        if not records.ID.fullmatch(volume):
            return None
        try:
            words = json.loads(self._file(volume).read_bytes())
        except FileNotFoundError:
            return None
        if words["holder"] is not None:
            words["holder"]["process"] = machine.First(**words["holder"]["process"])
            words["holder"] = Holder(**words["holder"])
        return Record(**words) if words["deployment"] == self._deployment else None

    # Looking

    def _look(self, volume: str) -> Volume:
        record = self._read(volume)
        if record is None:
            return Volume(id=volume, token="", state=VolumeState.GONE)
        holder = self._settled(record)
        state = VolumeState.AVAILABLE
        if holder is not None:
            state = VolumeState.PENDING if holder.leaving else VolumeState.ATTACHED
        return Volume(
            id=volume,
            token=record.token,
            state=state,
            size=record.size,
            vm=None if holder is None else holder.vm,
            devices=() if holder is None else (f"/dev/disk/by-id/virtio-{volume}",),
            reason=f"{holder.vm} has not let go of it yet" if holder is not None and holder.leaving else "",
        )

    def _settled(self, record: Record) -> Holder | None:
        """Return who has the volume; bring to its end what was begun with it."""
        holder = record.holder
        if holder is None:
            return None
        if holder.process.alive:
            with self._monitor(holder) as talk:
                if qemu.has_disk(talk, record.id):
                    if holder.leaving:  # again: while it boots, a machine does not hear it
                        with suppress(qemu.Refusal):
                            qemu.unplug(talk, record.id)
                    return holder
                try:
                    qemu.forget_disk(talk, record.id)
                except qemu.Refusal:  # the device is on its way out
                    return holder._replace(leaving=True)
        self._write(record._replace(holder=None))
        return None

    # QEMU

    @contextmanager
    def _monitor(self, holder: Holder) -> Iterator[qemu.Monitor]:
        with (
            machine.locked(self._instances.lock, holder.vm),
            qemu.monitor(self._instances.directory / holder.vm, self._deadline_s) as talk,
        ):
            yield talk

    def _plug(self, record: Record, vm: str) -> None:
        instance = self._instances.read(vm)
        process = None if instance is None else self._instances.alive(instance)
        if instance is None or process is None:
            raise CloudRefusedError(f"there is no instance {vm}", value=vm)
        if not self._instances.turn(instance).exists():
            raise CloudBusyError(f"instance {vm} is still being started", value=vm)
        holder = Holder(vm, process, leaving=False)
        with self._monitor(holder) as talk:
            self._write(record._replace(holder=holder))
            qemu.plug(talk, record.id, self._content(record.id))
