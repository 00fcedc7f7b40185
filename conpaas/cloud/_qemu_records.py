"""What the `qemu` cloud keeps of its instances: files, which outlive every driver.

    <directory>/.records/<id>.json   token, deployment, name, address, size
    <directory>/.records/<id>.pid    QEMU's process, written when it has started
    <directory>/<id>/                root.qcow2, seed.iso, qmp, console.log, qemu.log
    <directory>/<id>/turn            made when its turn to boot has come

An address belongs to whoever holds the abstract socket of its name: the driver while it creates, QEMU as long as it
runs. Blocking.
"""

import json
import random
import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import NamedTuple

from conpaas.cloud import _local_init as init
from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _qemu_machine as qemu
from conpaas.core import files, run
from conpaas.core.cloud import Vm, VmState
from conpaas.core.errors import QuotaExceededError

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
SETTLE_S = 5.0
"""How long it may take from the claim of an address to a process that one can see."""
_WORDS_BYTES = 600


class Record(NamedTuple):
    """One instance, as it is kept on disk."""

    token: str
    deployment: str
    name: str
    address: str
    user: int | None
    size: str
    memory: int
    """Bytes."""
    booted: str
    """What it prints when it has booted."""

    @property
    def mark(self) -> str:
        """What its process bears: an id may be in use elsewhere, an address is nobody else's."""
        return f"{self.token}@{self.address}"


class Records:
    """The instances of one folder: everybody's, and those of one deployment."""

    def __init__(self, directory: Path, deployment: str) -> None:
        self.directory, self._deployment = directory, deployment
        self.folder = directory / ".records"
        self.lock = self.folder / "lock"

    def home(self, record: Record) -> Path:
        """Return the instance's own folder."""
        return self.directory / record.token

    def exists(self, token: str) -> bool:
        """Tell whether anybody has an instance of this id."""
        return self._file(token).exists()

    def read(self, token: str) -> Record | None:
        """Return an instance of ours, None if there is none."""
        found = self._read(token) if ID.fullmatch(token) else None
        return found if found is not None and found.deployment == self._deployment else None

    def everybody(self) -> tuple[Record, ...]:
        """Return all instances."""
        found = (self._read(path.stem) for path in sorted(self.folder.glob("*.json")))
        return tuple(record for record in found if record is not None)

    def ours(self) -> tuple[Record, ...]:
        """Return the instances of our deployment."""
        return tuple(record for record in self.everybody() if record.deployment == self._deployment)

    def _read(self, token: str) -> Record | None:
        try:
            return Record(**json.loads(self._file(token).read_bytes()))
        except FileNotFoundError:
            return None

    def write(self, record: Record) -> None:
        """Make an instance known: the first thing that is done for it."""
        files.write_atomically(self._file(record.token), json.dumps(record._asdict()), mode=0o600)

    def forget(self, record: Record) -> None:
        """Make an instance unknown: the last thing that is done for it."""
        self._pid_file(record.token).unlink(missing_ok=True)
        self._file(record.token).unlink(missing_ok=True)

    def _file(self, token: str) -> Path:
        return self.folder / f"{token}.json"

    def _pid_file(self, token: str) -> Path:
        return self.folder / f"{token}.pid"

    # Processes

    def begun(self, record: Record, pid: int) -> None:
        """Write down which process an instance is."""
        started = run.start_time(pid)
        if started is not None:  # else it has ended already
            first = machine.First(pid, started, init.boot_id())
            files.write_atomically(self._pid_file(record.token), json.dumps(first._asdict()), mode=0o600)

    def process(self, record: Record) -> machine.First | None:
        """Return an instance's process; None if there never was one."""
        try:
            return machine.First(**json.loads(self._pid_file(record.token).read_bytes()))
        except FileNotFoundError:
            return self._unwritten(record)

    def _unwritten(self, record: Record) -> machine.First | None:
        """Find what a driver started that died before it could write that down."""
        if not machine.claimed(record.address):
            return None
        for pid in machine.processes(record.mark, None):
            started = run.start_time(pid)
            if started is not None:
                return machine.First(pid, started, init.boot_id())
        return None

    def settle(self, record: Record) -> machine.First | None:
        """Return the instance's process, which a driver that died may have been starting. Under its lock."""
        for _ in qemu.until(SETTLE_S):
            found = self.process(record)
            if found is not None or not machine.claimed(record.address):
                return found
        return None

    def alive(self, record: Record) -> machine.First | None:
        """Return the instance's process if it runs."""
        first = self.process(record)
        return first if first is not None and first.alive else None

    # States

    def turn(self, record: Record) -> Path:
        """Return the file whose presence says that the instance was told to boot, and when."""
        return self.home(record) / "turn"

    def look(self, record: Record) -> Vm:
        """Return an instance as it is now."""
        claimed, first = machine.claimed(record.address), self.process(record)  # in this order: it may begin in between
        state, reason = VmState.RUNNING, ""
        if not claimed and (first is None or not first.alive):
            state, reason = VmState.FAILED, self._last_words(record)
        elif first is None:
            state = VmState.PENDING
        elif not self.turn(record).exists():
            state, reason = VmState.PENDING, "it waits for its turn to boot"
        return Vm(
            id=record.token,
            token=record.token,
            state=state,
            address=record.address,
            reason=reason,
            size=record.size,
        )

    def _last_words(self, record: Record) -> str:
        said = (machine.tail(self.home(record) / name, _WORDS_BYTES) for name in (qemu.ERRORS, qemu.CONSOLE))
        words = " / ".join(" ".join(text.split()) for text in said if text.strip())
        printable = "".join(letter for letter in words if letter.isprintable())
        return f"its machine has ended: {printable}" if printable else "its machine has ended, or was never started"


def claim_any(block: IPv4Network, taken: set[str]) -> tuple[str, socket.socket]:
    """Claim an address at random: one that was just given back may still be in somebody's mind."""
    for address in _from_anywhere(block):
        claim = None if address in taken else machine.claim(address)
        if claim is not None:
            return address, claim
    raise QuotaExceededError(f"no address of {block} is free", value=str(block))


def _from_anywhere(block: IPv4Network) -> Iterator[str]:
    size, first = block.num_addresses, random.randrange(block.num_addresses)  # noqa: S311 - no secret
    for step in range(size):
        address = str(block[(first + step) % size])
        if not address.endswith((".0", ".255")):
            yield address
