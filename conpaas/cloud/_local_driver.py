"""The driver of the local cloud: what it does about instances. What blocks runs in threads of its own."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple, TypeVar

import structlog

from conpaas.cloud import _local_init as init
from conpaas.cloud import _local_machine as machine
from conpaas.cloud._local_start import START_TIMEOUT_S, Starter, environment
from conpaas.cloud._local_volumes import Volumes
from conpaas.cloud.local import LocalSettings
from conpaas.core import files, units
from conpaas.core.cloud import (
    CloudContext,
    Finding,
    Room,
    Size,
    Vm,
    VmRequest,
    VmState,
    Volume,
    VolumeRequest,
)
from conpaas.core.errors import BadInputError, CloudBusyError, CloudRefusedError, ConpaasError, QuotaExceededError

log = structlog.get_logger()

T = TypeVar("T")

CONSOLE_BYTES = 64 * 1024
_THREADS = 4  # forking is the kernel's work: more do not make it faster
_TMP = Path("/tmp")  # noqa: S108 - made private
SIZE = "machine"
"""The one size there is: an instance may use all that this machine has."""


class _Record(NamedTuple):
    """One instance, as it is kept on disk."""

    token: str
    deployment: str
    name: str
    address: str
    user: int | None

    @property
    def mark(self) -> str:
        """What its processes bear: an id may be in use elsewhere, an address is nobody else's."""
        return f"{self.token}@{self.address}"


class LocalCloud:
    """The instances of one deployment on this machine. What blocks runs in threads of the driver's own."""

    def __init__(self, settings: LocalSettings, context: CloudContext) -> None:
        self._settings = settings
        self._name, self._deployment = context.name, context.deployment
        self._directory = context.directory.resolve()
        self._records = self._directory / ".records"
        self._lock = self._records / "lock"
        self._threads = ThreadPoolExecutor(_THREADS, f"cloud-{context.name}")
        modules = settings.preload if settings.zygote and not settings.command else None
        self._starter = Starter(self._records, modules)
        self._namespaces = settings.isolation != "processes"
        users = range(settings.uid_base, settings.uid_base + 0x100_0000)
        self._volumes = Volumes(
            context.name, context.deployment, self._directory, self._records / "volumes.lock", users
        )
        with _refusals(f"cloud {self._name}"):
            self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._records.mkdir(mode=0o700, exist_ok=True)

    async def create(self, request: VmRequest) -> Vm:
        """Make an instance; on return its first process runs.

        A cancelled call makes nothing if it has not begun, else all of the instance, which its token finds.
        """
        cancelled = threading.Event()
        try:
            return await self._in_thread(lambda: self._create(request, cancelled))
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def describe(self, vm: str) -> Vm:
        """Return the instance by looking at its files and processes."""
        return await self._in_thread(lambda: self._describe(vm))

    async def list(self) -> list[Vm]:
        """Return every instance of this deployment in this folder."""
        return await self._in_thread(lambda: [self._look(record) for record in self._all()])

    async def delete(self, vm: str) -> None:
        """Kill the instance and remove its files. On return nothing of it is left."""
        await self._in_thread(lambda: self._delete(vm))

    async def console(self, vm: str) -> str:
        """Return the end of what the instance's daemon has printed."""
        return await self._in_thread(lambda: self._console(vm))

    async def create_volume(self, request: VolumeRequest) -> Volume:
        """Make an empty folder; its size is a wish, which nothing enforces."""
        _refuse_zone(request.zone)
        if not machine.is_id(request.token):
            raise BadInputError(f"{request.token!r} is no id of a volume", value=request.token)
        return await self._in_thread(lambda: self._volumes.create(request))

    async def describe_volume(self, volume: str) -> Volume:
        """Return the volume by looking where its folder is."""
        return await self._in_thread(lambda: self._volumes.describe(volume))

    async def list_volumes(self) -> Sequence[Volume]:
        """Return every volume of this deployment in this folder."""
        return await self._in_thread(self._volumes.list)

    async def attach(self, volume: str, vm: str) -> Volume:
        """Move the volume into the instance's folder."""
        return await self._in_thread(lambda: self._attach(volume, vm))

    async def detach(self, volume: str) -> Volume:
        """Move the volume out of its instance's folder."""
        return await self._in_thread(lambda: self._volumes.detach(volume))

    async def delete_volume(self, volume: str) -> None:
        """Remove the volume's folder."""
        await self._in_thread(lambda: self._volumes.delete(volume))

    async def sizes(self) -> Sequence[Size]:
        """Return this machine as the only size."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cores = os.cpu_count() or 1
        return (Size(name=SIZE, cores=cores, memory=memory, price=self._settings.price, default=True),)

    async def quota(self) -> Sequence[Room]:
        """Return how many instances there are, and how much of the disk is in use, by whomever."""
        return await self._in_thread(self._quota)

    async def examine(self) -> Sequence[Finding]:
        """Look at our own programs and at the folder of instances."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._examine)

    async def close(self) -> None:
        """Wait for calls under way and end the helper process; instances stay."""
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._starter.close)

    async def _in_thread(self, act: Callable[[], T]) -> T:
        def guarded() -> T:
            with _refusals(f"cloud {self._name}"):
                return act()

        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    # Creating

    def _create(self, request: VmRequest, cancelled: threading.Event) -> Vm:
        self._check_request(request)
        with machine.locked(self._lock, request.token):
            if cancelled.is_set():
                return Vm(id=request.token, token=request.token, state=VmState.GONE)  # nobody will see it
            record = self._read(request.token)
            if record is not None:
                self._settle(record)
                if self._first(record) is not None:
                    return self._look(record)
                self._remove(record)  # its driver died before it began: begin anew
            elif self._record_file(request.token).exists():
                raise CloudRefusedError(f"cloud {self._name}: another deployment has an instance {request.token}")
            with machine.locked(self._lock):
                record, claim = self._reserve(request)
            with claim:  # held here until the first process holds it
                try:
                    self._start(record, claim, request.context(record.address))
                except BaseException:
                    self._remove(record)
                    raise
        return self._look(record)

    def _check_request(self, request: VmRequest) -> None:
        if not machine.is_id(request.token):
            raise BadInputError(f"{request.token!r} is no id of an instance", value=request.token)
        if request.size not in {"", SIZE}:
            raise BadInputError(f"cloud {self._name}: there is no size '{request.size}'", value=request.size)
        _refuse_zone(request.zone)
        if reason := machine.inaccessible():
            raise CloudRefusedError(f"cloud {self._name}: {reason}", hint=machine.INACCESSIBLE_HINT)

    def _settle(self, record: _Record) -> None:
        """Wait while an instance is being started by what a driver that died has left behind. Under its lock."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._first(record) is None and machine.claimed(record.address) and time.monotonic() < deadline:
            machine.pause()

    def _reserve(self, request: VmRequest) -> tuple[_Record, socket.socket]:
        """Choose a free address, claim it, and write the record. Under the lock of all."""
        known = self._all()
        if len(known) >= self._settings.max_instances:
            raise QuotaExceededError(
                f"cloud {self._name}: {len(known)} of {self._settings.max_instances} instances are in use",
                value=self._settings.max_instances,
            )
        address, claim = self._claim_any({record.address for record in known})
        user = self._settings.uid_base + (int(IPv4Address(address)) & 0xFF_FFFF) if os.geteuid() == 0 else None
        record = _Record(request.token, self._deployment, request.name, address, user)
        try:
            files.write_atomically(self._record_file(record.token), json.dumps(record._asdict()), mode=0o600)
        except BaseException:
            claim.close()
            raise
        return record, claim

    def _claim_any(self, taken: set[str]) -> tuple[str, socket.socket]:
        """Claim an address at random: one that was just given back may still be in somebody's mind."""
        block = self._settings.block
        size, first = block.num_addresses, random.randrange(block.num_addresses)  # noqa: S311 - no secret
        for step in range(size):
            address = str(block[(first + step) % size])
            if address.endswith((".0", ".255")) or address in taken:
                continue
            claim = machine.claim(address)
            if claim is not None:
                return address, claim
        raise QuotaExceededError(f"cloud {self._name}: no address of {block} is free", value=str(block))

    def _start(self, record: _Record, claim: socket.socket, context: str) -> None:
        """Make the instance's directory and start its first process."""
        home = self._home(record)
        home.mkdir(mode=0o700)
        (home / "tmp").mkdir(mode=0o700)
        files.write_atomically(home / "context.json", context, mode=0o600)
        if record.user is not None:
            for path in (home, home / "tmp", home / "context.json"):
                os.chown(path, record.user, record.user)
        reason = self._starter.start(self._spec(record, context), claim)
        if reason and self._namespaces and self._settings.isolation == "auto":
            log.warning("no-namespaces", cloud=self._name, reason=reason)
            self._namespaces = False
            reason = self._starter.start(self._spec(record, context), claim)
        if reason:
            raise CloudRefusedError(
                f"cloud {self._name}: instance {record.token} cannot start: {reason}",
                hint="set 'isolation' of this cloud to 'auto', or allow namespaces on this machine",
            )

    def _spec(self, record: _Record, context: str) -> init.Spec:
        home = self._home(record)
        path = str(home / "context.json")
        kind = _kind(context)
        own_tmp = self._namespaces and not any(path.is_relative_to(_TMP) for path in machine.needed())
        argv = self._settings.command or (sys.executable, "-m", "conpaas", "run", "{kind}", "--context", "{context}")
        names = {"{kind}": kind, "{context}": path, "{address}": record.address}
        return init.Spec(
            id=record.token,
            mark=record.mark,
            kind=kind,
            home=str(home),
            context=path,
            records=str(self._records),
            user=record.user,
            namespaces=self._namespaces,
            hidden=tuple(map(str, [self._hidden(), *self._settings.hide])),
            private_tmp=own_tmp,
            argv=tuple(names.get(word, word) for word in argv),
            env=environment(
                {init.MARKER: record.mark, "HOME": str(home)} | ({} if own_tmp else {"TMPDIR": str(home / "tmp")})
            ),
            log_bytes=self._settings.log_bytes,
            stop_s=self._settings.stop_s,
            stamp=self._starter.stamp,
        )

    def _hidden(self) -> Path:
        """Return the topmost directory around all instances that is closed to others and holds no program of ours.

        So a data folder with mode 0700 is hidden as a whole, and need not be opened to reach the instances.
        """
        for folder in reversed(self._directory.parents):
            if not folder.stat().st_mode & stat.S_IXOTH and not any(
                path.is_relative_to(folder) for path in machine.needed()
            ):
                return folder
        return self._directory

    # Looking

    def _home(self, record: _Record) -> Path:
        return self._directory / record.token

    def _record_file(self, token: str) -> Path:
        return self._records / f"{token}.json"

    def _pid_file(self, token: str) -> Path:
        return self._records / f"{token}.pid"

    def _read(self, token: str) -> _Record | None:
        """Return the record of an instance of ours, None if there is none."""
        if not machine.is_id(token):
            return None
        try:
            record = _Record(**json.loads(self._record_file(token).read_bytes()))
        except FileNotFoundError:
            return None
        return record if record.deployment == self._deployment else None

    def _all(self) -> tuple[_Record, ...]:
        found = (self._read(path.stem) for path in sorted(self._records.glob("*.json")))
        return tuple(record for record in found if record is not None)

    def _first(self, record: _Record) -> machine.First | None:
        """Return the first process, None if it has not begun."""
        try:
            return machine.First(**json.loads(self._pid_file(record.token).read_bytes()))
        except FileNotFoundError:
            return None

    def _describe(self, vm: str) -> Vm:
        record = self._read(vm)
        return Vm(id=vm, token=vm, state=VmState.GONE) if record is None else self._look(record)

    def _look(self, record: _Record) -> Vm:
        claimed, first = machine.claimed(record.address), self._first(record)  # in this order: it may begin in between
        state, reason = VmState.RUNNING, ""
        if first is not None and not first.alive:
            state, reason = VmState.FAILED, "its first process has ended"
        elif first is None and claimed:
            state = VmState.PENDING
        elif first is None:
            state, reason = VmState.FAILED, "its creation was interrupted"
        return Vm(id=record.token, token=record.token, state=state, address=record.address, reason=reason, size=SIZE)

    def _console(self, vm: str) -> str:
        record = self._read(vm)
        if record is None:
            return ""
        logs = [self._home(record) / f"{kind}.log" for kind in ("manager", "agent")]
        return "".join(machine.tail(path, CONSOLE_BYTES) for path in logs)

    def _quota(self) -> Sequence[Room]:
        disk = shutil.disk_usage(self._directory)
        return [
            Room(name="instances", used=len(self._all()), limit=self._settings.max_instances),
            Room(name="disk", used=disk.used, limit=disk.total),
        ]

    def _examine(self) -> Sequence[Finding]:
        reason = machine.inaccessible()
        if reason:
            return [Finding(name="our programs", ok=False, detail=reason, hint=machine.INACCESSIBLE_HINT)]
        findings = [Finding(name="our programs", ok=True, detail=sys.executable)]
        try:
            with _refusals(str(self._directory)):
                files.write_atomically(self._records / "examined", "", mode=0o600, durable=False)
                free = units.show_size(files.free_bytes(self._directory))
        except ConpaasError as exc:
            return [*findings, Finding(name="the folder", ok=False, detail=exc.message, hint=exc.hint)]
        return [*findings, Finding(name="the folder", ok=True, detail=f"{self._directory}: {free} are free")]

    # Volumes

    def _attach(self, volume: str, vm: str) -> Volume:
        with machine.locked(self._lock, vm):
            record = self._read(vm)
            if record is None:
                raise CloudRefusedError(f"cloud {self._name}: there is no instance {vm}")
            return self._volumes.attach(volume, vm, record.user)

    # Deleting

    def _delete(self, vm: str) -> None:
        if not machine.is_id(vm):
            return
        with machine.locked(self._lock, vm):
            record = self._read(vm)
            if record is not None:
                self._settle(record)
                self._remove(record)

    def _remove(self, record: _Record) -> None:
        """Kill what runs, remove what is written; the record goes last, so that an interrupted removal is found."""
        first = self._first(record)
        if first is not None:
            machine.kill(first)
        with contextlib.ExitStack() as held:
            claim = machine.claim(record.address)  # the first process is dead: unless it was taken since, it is free
            if claim is not None:
                held.enter_context(claim)
            self._kill_rest(record, by_user=claim is not None)
            self._volumes.take_back(record.token)
            machine.remove_tree(self._home(record))
            self._pid_file(record.token).unlink(missing_ok=True)
            self._record_file(record.token).unlink(missing_ok=True)

    def _kill_rest(self, record: _Record, *, by_user: bool) -> None:
        """Kill every process that bears the instance's mark or, if nobody else has it now, its user id."""
        user = record.user if by_user else None
        deadline = time.monotonic() + machine.KILL_TIMEOUT_S
        while pids := machine.processes(record.mark, user):
            if time.monotonic() > deadline:
                raise CloudBusyError(f"processes {pids} of instance {record.token} do not end", value=pids)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            machine.pause()


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn what the operating system says into the errors of the contract."""
    try:
        yield
    except OSError as exc:
        if exc.errno in machine.BUSY:
            raise CloudBusyError(f"{what}: {exc}") from exc
        if exc.errno in machine.FULL:
            raise _disk_full(what) from exc
        raise CloudRefusedError(f"{what}: {exc}", hint="see the director's log") from exc
    except ConpaasError as exc:
        if exc.code == "disk-full":
            raise _disk_full(what) from exc
        raise


def _disk_full(what: str) -> CloudRefusedError:
    return CloudRefusedError(f"{what}: no space left on this machine's disk", hint="free some space, then try again")


def _refuse_zone(zone: str) -> None:
    if zone:
        raise BadInputError(f"there is no zone '{zone}': this machine is in none", value=zone)


def _kind(context: str) -> str:
    kind = json.loads(context)["kind"]
    if kind not in {"manager", "agent"}:
        raise BadInputError(f"there is no daemon '{kind}'", value=kind)
    return str(kind)
