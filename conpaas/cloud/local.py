"""The local cloud: an instance is a process tree with its own loopback address, directory and lifetime.

It needs no account and no privileges. Started by root, each instance runs under an unprivileged user id of its own;
where namespaces are allowed it has its own processes and sees no other instance's files; where they are not, it is a
plain process tree. All that is known of an instance is in its files, so that it outlives any driver:

    <directory>/.records/<id>.json   token, deployment, name, address
    <directory>/.records/<id>.pid    its first process, written when that begins
    <directory>/<id>/                its own files: context.json, <kind>.log, what its engines write

An address belongs to whoever holds the abstract socket of its name: the driver while it creates, the first process for
as long as it lives. The kernel makes that exclusive on the whole machine, whichever director asks.
"""

import asyncio
import contextlib
import errno
import json
import os
import random
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import structlog
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

import conpaas
from conpaas.cloud import _local_init as init
from conpaas.cloud import _local_machine as machine
from conpaas.cloud._local_start import START_TIMEOUT_S, Starter, environment
from conpaas.core import files
from conpaas.core.cloud import Cloud, CloudContext, CloudType, Vm, VmRequest, VmState
from conpaas.core.errors import BadInputError, CloudBusyError, CloudRefusedError, ConpaasError, QuotaExceededError
from conpaas.core.messages.base import Message

log = structlog.get_logger()

T = TypeVar("T")

CONSOLE_BYTES = 64 * 1024
_THREADS = 4  # forking is the kernel's work: more do not make it faster
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
_TMP = Path("/tmp")  # noqa: S108 - made private
_BUSY = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class LocalSettings(Message):
    """A local cloud."""

    block: IPv4Network = IPv4Network("127.42.0.0/16")
    """Where instances get their addresses from, within 127.0.0.0/8."""
    max_instances: PositiveInt = 64
    """How many instances there may be at once."""
    isolation: Literal["auto", "namespaces", "processes"] = "auto"
    """`namespaces`: own processes and mounts, or no instance; `processes`: a plain process tree; `auto`: what works."""
    uid_base: int = Field(default=0x7000_0000, ge=1000, le=0x7F00_0000)
    """Started by root, an instance's user id is this plus the lower 24 bits of its address.

    The default begins a range that no distribution uses.
    """
    hide: tuple[Path, ...] = ()
    """More directories that instances must not see; the folder of all instances is hidden in any case."""
    zygote: bool = True
    """Fork instances from a helper process that has loaded their code: they start in a tenth of the time."""
    preload: tuple[str, ...] = (
        "conpaas.core.daemon",
        "conpaas.core.keymaker",
        "conpaas.manager.app",
        "conpaas.agent.app",
    )
    """Modules that the helper process loads, besides those of the service types."""
    command: tuple[str, ...] = ()
    """Run this instead of a ConPaaS daemon; `{kind}`, `{context}` and `{address}` stand for the instance's own."""
    log_bytes: PositiveInt = 4 * 1024 * 1024
    """Size at which the daemon's log is replaced; one older log is kept."""
    stop_s: PositiveFloat = 10.0
    """How long a daemon may take to end when its instance is told to, in seconds. Deleting does not ask."""

    @field_validator("block")
    @classmethod
    def _is_loopback(cls, block: IPv4Network) -> IPv4Network:
        if not block.subnet_of(IPv4Network("127.0.0.0/8")) or block.prefixlen > 30:
            raise ValueError("must be a network of at least 4 addresses within 127.0.0.0/8")
        return block


class Record(NamedTuple):
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
        if not _ID.fullmatch(request.token):
            raise BadInputError(f"{request.token!r} is no id of an instance", value=request.token)
        if reason := _inaccessible():
            raise CloudRefusedError(f"cloud {self._name}: {reason}", hint=_INACCESSIBLE_HINT)
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

    def _settle(self, record: Record) -> None:
        """Wait while an instance is being started by what a driver that died has left behind. Under its lock."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._first(record) is None and machine.claimed(record.address) and time.monotonic() < deadline:
            machine.pause()

    def _reserve(self, request: VmRequest) -> tuple[Record, socket.socket]:
        """Choose a free address, claim it, and write the record. Under the lock of all."""
        known = self._all()
        if len(known) >= self._settings.max_instances:
            raise QuotaExceededError(
                f"cloud {self._name}: {len(known)} of {self._settings.max_instances} instances are in use",
                value=self._settings.max_instances,
            )
        address, claim = self._claim_any({record.address for record in known})
        user = self._settings.uid_base + (int(IPv4Address(address)) & 0xFF_FFFF) if os.geteuid() == 0 else None
        record = Record(request.token, self._deployment, request.name, address, user)
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

    def _start(self, record: Record, claim: socket.socket, context: str) -> None:
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

    def _spec(self, record: Record, context: str) -> init.Spec:
        home = self._home(record)
        path = str(home / "context.json")
        kind = _kind(context)
        own_tmp = self._namespaces and not any(path.is_relative_to(_TMP) for path in _needed())
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
            if not folder.stat().st_mode & stat.S_IXOTH and not any(path.is_relative_to(folder) for path in _needed()):
                return folder
        return self._directory

    # Looking

    def _home(self, record: Record) -> Path:
        return self._directory / record.token

    def _record_file(self, token: str) -> Path:
        return self._records / f"{token}.json"

    def _pid_file(self, token: str) -> Path:
        return self._records / f"{token}.pid"

    def _read(self, token: str) -> Record | None:
        """Return the record of an instance of ours, None if there is none."""
        if not _ID.fullmatch(token):
            return None
        try:
            record = Record(**json.loads(self._record_file(token).read_bytes()))
        except FileNotFoundError:
            return None
        return record if record.deployment == self._deployment else None

    def _all(self) -> tuple[Record, ...]:
        found = (self._read(path.stem) for path in sorted(self._records.glob("*.json")))
        return tuple(record for record in found if record is not None)

    def _first(self, record: Record) -> machine.First | None:
        """Return the first process, None if it has not begun."""
        try:
            return machine.First(**json.loads(self._pid_file(record.token).read_bytes()))
        except FileNotFoundError:
            return None

    def _describe(self, vm: str) -> Vm:
        record = self._read(vm)
        return Vm(id=vm, token=vm, state=VmState.GONE) if record is None else self._look(record)

    def _look(self, record: Record) -> Vm:
        claimed, first = machine.claimed(record.address), self._first(record)  # in this order: it may begin in between
        state, reason = VmState.RUNNING, ""
        if first is not None and not first.alive:
            state, reason = VmState.FAILED, "its first process has ended"
        elif first is None and claimed:
            state = VmState.PENDING
        elif first is None:
            state, reason = VmState.FAILED, "its creation was interrupted"
        return Vm(id=record.token, token=record.token, state=state, address=record.address, reason=reason)

    def _console(self, vm: str) -> str:
        record = self._read(vm)
        if record is None:
            return ""
        logs = [self._home(record) / f"{kind}.log" for kind in ("manager", "agent")]
        return "".join(machine.tail(path, CONSOLE_BYTES) for path in logs)

    # Deleting

    def _delete(self, vm: str) -> None:
        if not _ID.fullmatch(vm):
            return
        with machine.locked(self._lock, vm):
            record = self._read(vm)
            if record is not None:
                self._settle(record)
                self._remove(record)

    def _remove(self, record: Record) -> None:
        """Kill what runs, remove what is written; the record goes last, so that an interrupted removal is found."""
        first = self._first(record)
        if first is not None:
            machine.kill(first)
        with contextlib.ExitStack() as held:
            claim = machine.claim(record.address)  # the first process is dead: unless it was taken since, it is free
            if claim is not None:
                held.enter_context(claim)
            self._kill_rest(record, by_user=claim is not None)
            machine.remove_tree(self._home(record))
            self._pid_file(record.token).unlink(missing_ok=True)
            self._record_file(record.token).unlink(missing_ok=True)

    def _kill_rest(self, record: Record, *, by_user: bool) -> None:
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
        if exc.errno in _BUSY:
            raise CloudBusyError(f"{what}: {exc}") from exc
        if exc.errno in _FULL:
            raise _disk_full(what) from exc
        raise CloudRefusedError(f"{what}: {exc}", hint="see the director's log") from exc
    except ConpaasError as exc:
        if exc.code == "disk-full":
            raise _disk_full(what) from exc
        raise


def _disk_full(what: str) -> CloudRefusedError:
    return CloudRefusedError(f"{what}: no space left on this machine's disk", hint="free some space, then try again")


def _kind(context: str) -> str:
    kind = json.loads(context)["kind"]
    if kind not in {"manager", "agent"}:
        raise BadInputError(f"there is no daemon '{kind}'", value=kind)
    return str(kind)


# Our own programs


def _needed() -> list[Path]:
    """Return the places that processes of instances must reach: Python, our code, programs on PATH."""
    places = [sys.executable, os.path.realpath(sys.executable), sys.prefix, sys.base_prefix, conpaas.__file__]
    return [Path(place) for place in (*places, *machine.search_path())]


_INACCESSIBLE_HINT = "install ConPaaS where every user may read, such as /opt, with the Python of /usr/bin"


def _inaccessible() -> str:
    """Say which of our programs the users of instances cannot reach; empty if we are not root, or they can."""
    if os.geteuid() != 0:
        return ""
    for place in (sys.executable, os.path.realpath(sys.executable), sys.prefix, str(Path(conpaas.__file__).parent)):
        closed = machine.closed_to_others(Path(place))
        if closed is not None:
            return f"{closed} is closed to other users, so instances cannot run {place}"
    return ""


def _check(_settings: LocalSettings) -> str:
    if sys.platform != "linux":
        return "it needs Linux"
    reason = _inaccessible()
    return f"{reason}: {_INACCESSIBLE_HINT}" if reason else ""


def _driver(settings: LocalSettings, context: CloudContext) -> Cloud:
    return LocalCloud(settings, context)


CLOUD = CloudType(name="local", title="This machine", settings=LocalSettings, driver=_driver, check=_check)
