"""The driver of the `qemu` cloud: instances. What blocks runs in threads of the driver's own."""

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import structlog

from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _qemu_disk as disk
from conpaas.cloud import _qemu_machine as qemu
from conpaas.cloud import _qemu_records as records
from conpaas.cloud import _qemu_volumes as volumes
from conpaas.cloud import _qemu_warm as warm
from conpaas.cloud.qemu import QemuSettings, QemuSize
from conpaas.core import files, run, tasks
from conpaas.core.cloud import CloudContext, Finding, Room, Size, Vm, VmRequest, VmState, Volume, VolumeRequest
from conpaas.core.errors import (
    BadInputError,
    CloudBusyError,
    CloudRefusedError,
    ConpaasError,
    DiskFullError,
    NoCapacityError,
    PeerError,
    QuotaExceededError,
)

log = structlog.get_logger()

T = TypeVar("T")

CONSOLE_BYTES = 64 * 1024
CONSOLE_LIMIT_BYTES = 1024 * 1024
"""A longer console log is begun anew when somebody looks."""
TURN_PERIOD_S, IDLE_PERIOD_S = 0.1, 1.0
"""How often those who wait are looked at; and whether nobody boots."""
ROOM_BYTES = 16 * 1024 * 1024
"""With so much free on the disk, a machine that was halted because it was full goes on."""
_QUIT_S = 2.0
_ASK_S = 1.0
"""How long a machine may take to say whether it is halted; one that takes longer is taken for running."""
_THREADS = 8
_MIB, _GIB = 1 << 20, 1 << 30
_FULL_DISK = "no space left on this computer's disk"
_BUSY = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class QemuCloud:
    """The virtual machines of one deployment on this computer."""

    def __init__(self, settings: QemuSettings, context: CloudContext) -> None:
        self._settings, self._context = settings, context
        self._records = records.Records(context.directory.resolve(), context.deployment)
        self._threads = ThreadPoolExecutor(_THREADS, f"cloud-{context.name}")
        self._background = tasks.Background()
        self._pool = warm.Pool(self._records.directory, context.clock, self._in_thread)
        with _refusals(f"cloud {context.name}"):
            self._records.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._records.folder.mkdir(mode=0o700, exist_ok=True)
            self._volumes = volumes.Volumes(self._records, context.deployment, context.deadline_s)

    async def create(self, request: VmRequest) -> Vm:
        """Start a virtual machine, halted until its turn to boot has come.

        A cancelled call makes nothing if it has not begun, else all of the instance, which its token finds.
        """
        cancelled = threading.Event()
        try:
            vm = await self._in_thread(lambda: self._create(request, cancelled))
        except asyncio.CancelledError:
            cancelled.set()
            raise
        self._give_turns()
        if self._settings.warm:
            self._background.start("warm", self._save_for_next(request))
        return vm

    async def describe(self, vm: str) -> Vm:
        """Return the instance by looking at its files and its process."""
        found = await self._in_thread(lambda: self._describe(vm))
        self._give_turns_to(found)
        return found

    async def list(self) -> list[Vm]:
        """Return every instance of this deployment in this folder."""
        found = await self._in_thread(lambda: [self._look(record) for record in self._records.ours()])
        self._give_turns_to(*found)
        return found

    async def delete(self, vm: str) -> None:
        """End the machine and remove its files. On return nothing of it is left."""
        await self._in_thread(lambda: self._delete(vm))

    async def console(self, vm: str) -> str:
        """Return the end of what the machine has printed on its serial port."""
        return await self._in_thread(lambda: self._console(vm))

    async def sizes(self) -> Sequence[Size]:
        """Return the configured ones."""
        found = [
            Size(
                name=size.name,
                cores=size.cores,
                memory=size.memory_mib * _MIB,
                disk=size.disk_gib * _GIB,
                price=size.price,
                currency=self._settings.currency,
                default=number == 0,
            )
            for number, size in enumerate(self._settings.sizes)
        ]
        return sorted(found, key=lambda size: (size.price, size.memory))

    async def quota(self) -> Sequence[Room]:
        """Return how many instances there may be, everybody's in this folder, and how much memory (bytes)."""
        known = await self._in_thread(self._records.everybody)
        memory = sum(record.memory for record in known)
        return [
            Room(name="instances", used=len(known), limit=self._settings.max_instances),
            Room(name="memory", used=memory, limit=self._memory()),
        ]

    async def examine(self) -> Sequence[Finding]:
        """Look at QEMU, the image, the processor, and what room there is on the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._examine)

    async def create_volume(self, request: VolumeRequest) -> Volume:
        """Make a file with a hole of the volume's size: it takes only the room that is written to."""

        def make() -> Volume:
            self._require_disk()
            return self._volumes.create(request)

        return await self._in_thread(make)

    async def describe_volume(self, volume: str) -> Volume:
        """Return the volume by looking at its record, and asking the machine that has it."""
        return await self._in_thread(lambda: self._volumes.describe(volume))

    async def list_volumes(self) -> Sequence[Volume]:
        """Return every volume of this deployment in this folder."""
        return await self._in_thread(self._volumes.all)

    async def attach(self, volume: str, vm: str) -> Volume:
        """Plug the volume into the machine, as a disk whose serial number is the volume's id."""
        return await self._in_thread(lambda: self._volumes.attach(volume, vm))

    async def detach(self, volume: str) -> Volume:
        """Ask the machine to let go of the volume; it stays PENDING until the operating system in it has done so."""
        return await self._in_thread(lambda: self._volumes.detach(volume))

    async def delete_volume(self, volume: str) -> None:
        """Remove the volume's files."""
        await self._in_thread(lambda: self._volumes.delete(volume))

    async def close(self) -> None:
        """Wait for calls under way; instances stay."""
        await self._background.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def _in_thread(self, act: Callable[[], T]) -> T:
        def guarded() -> T:
            with _refusals(f"cloud {self._context.name}"):
                return act()

        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    # Creating

    def _create(self, request: VmRequest, cancelled: threading.Event) -> Vm:
        size = self._size(request)
        with machine.locked(self._records.lock, request.token):
            if cancelled.is_set():
                return Vm(id=request.token, token=request.token, state=VmState.GONE)  # nobody will see it
            record = self._records.read(request.token)
            if record is not None:
                if self._records.settle(record) is not None:
                    return self._look(record)
                self._remove(record)  # its driver died before it began: begin anew
            elif self._records.exists(request.token):
                raise CloudRefusedError(f"another deployment has an instance {request.token}", value=request.token)
            qemu.program()
            image = disk.read_image(self._settings.image)
            self._require_disk()
            with machine.locked(self._records.lock):
                record, claim = self._reserve(request, size, image)
            with claim:  # held here until QEMU holds it
                try:
                    self._start(record, claim, request, image, size)
                except BaseException:
                    self._remove(record)
                    raise
        return self._look(record)

    def _size(self, request: VmRequest) -> QemuSize:
        if not records.ID.fullmatch(request.token):
            raise BadInputError(f"{request.token!r} is no id of an instance", value=request.token)
        if request.zone:
            raise BadInputError(f"there is no zone '{request.zone}'", value=request.zone, hint="this cloud has none")
        names = [size.name for size in self._settings.sizes]
        if request.size and request.size not in names:
            raise BadInputError(
                f"there is no size '{request.size}'", value=request.size, hint=f"choose one of {', '.join(names)}"
            )
        return self._settings.sizes[names.index(request.size) if request.size else 0]

    def _reserve(
        self, request: VmRequest, size: QemuSize, image: disk.BaseImage
    ) -> tuple[records.Record, socket.socket]:
        """Choose a free address, claim it, and write the record. Under the lock of all."""
        known = self._records.everybody()
        memory = size.memory_mib * _MIB
        self._require_room(known, memory)
        address, claim = records.claim_any(self._settings.block, {record.address for record in known})
        record = records.Record(
            token=request.token,
            deployment=self._context.deployment,
            name=request.name,
            address=address,
            user=self._user(address),
            size=size.name,
            memory=memory,
            booted=image.manifest.booted,
        )
        try:
            self._records.write(record)
        except BaseException:
            claim.close()
            raise
        return record, claim

    def _require_room(self, known: tuple[records.Record, ...], memory: int) -> None:
        most, used = self._settings.max_instances, sum(record.memory for record in known)
        if len(known) >= most:
            raise QuotaExceededError(f"{len(known)} of {most} instances are in use", value=most)
        if used + memory > self._memory():
            raise QuotaExceededError(
                f"{used // _MIB} of {self._memory() // _MIB} MiB of memory are in use, {memory // _MIB} are wanted",
                value=memory // _MIB,
            )
        available = qemu.available_memory()
        if memory > available:
            raise NoCapacityError(
                f"{available // _MIB} MiB of memory are free on this computer, {memory // _MIB} are wanted",
                value=memory // _MIB,
            )

    def _memory(self) -> int:
        """Return how much memory all instances may have together, in bytes."""
        if self._settings.memory_mib:
            return self._settings.memory_mib * _MIB
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4

    def _require_disk(self) -> None:
        free = files.free_bytes(self._records.directory)
        if free < self._settings.reserve_mib * _MIB:
            raise DiskFullError(
                f"{free // _MIB} MiB are free on the disk of {self._records.directory}, "
                f"{self._settings.reserve_mib} must stay so",
                value=free // _MIB,
            )

    def _start(
        self, record: records.Record, claim: socket.socket, request: VmRequest, image: disk.BaseImage, size: QemuSize
    ) -> None:
        """Make the instance's folder and start its QEMU."""
        home = self._records.home(record)
        home.mkdir(mode=0o700)
        spec = self._machine(image, size, record.address)._replace(ports=(*request.ports, *request.inner_ports))
        saved = self._pool.find(spec) if self._settings.warm and image.manifest.warm else None
        _write(home / qemu.ROOT, disk.overlay(saved / qemu.ROOT if saved else image.disk, spec.disk))
        make_seed = disk.nocloud if self._settings.seed == "nocloud" else disk.opennebula
        _write(home / qemu.SEED, make_seed(record.token, request.context("")))
        with contextlib.ExitStack() as inherited:
            inherit = [claim.fileno()]
            if saved:
                inherit.append(warm.open_memory(saved))
                inherited.callback(os.close, inherit[-1])
                spec = spec._replace(incoming=inherit[-1])
            words, environment = qemu.argv(spec), qemu.environment(record.mark)
            pid = run.spawn(words, cwd=home, env=environment, log=home / qemu.ERRORS, pass_fds=inherit)
        self._records.begun(record, pid)

    def _machine(self, image: disk.BaseImage, size: QemuSize, address: str) -> qemu.Machine:
        return qemu.Machine(
            image=image,
            address=address,
            ports=(),
            cores=size.cores,
            memory=size.memory_mib * _MIB,
            disk=max(image.size, size.disk_gib * _GIB),
            accelerator=self._accelerator(image),
            user=self._user(address),
        )

    def _user(self, address: str) -> int | None:
        return qemu.user_of(self._settings.uid_base, address) if os.geteuid() == 0 else None

    # Saving

    async def _save_for_next(self, request: VmRequest) -> None:
        """Save a machine like this one when nobody boots, for the next ones to continue from."""
        spec = await self._in_thread(lambda: self._machine_to_save(request))
        if spec is None or await self._in_thread(lambda: self._pool.tried(spec)):
            return
        while await self._in_thread(lambda: any(map(self._is_busy, self._living()))):
            await self._context.clock.sleep(IDLE_PERIOD_S)
        await self._pool.make(spec)

    def _machine_to_save(self, request: VmRequest) -> qemu.Machine | None:
        """Return the machine; None if its image does not allow it, or there is no memory. DiskFullError."""
        image, size = disk.read_image(self._settings.image), self._size(request)
        if not image.manifest.warm or qemu.available_memory() < 2 * size.memory_mib * _MIB:
            return None
        self._require_disk()
        return self._machine(image, size, str(self._settings.block[0]))  # the address of none

    def _accelerator(self, image: disk.BaseImage) -> qemu.Accelerator:
        return qemu.accelerator(self._settings.acceleration, image, self._records.folder / "accelerator")

    # Turns to boot

    def _give_turns_to(self, *seen: Vm) -> None:
        if any(vm.state is VmState.PENDING for vm in seen):
            self._give_turns()

    def _give_turns(self) -> None:
        self._background.start("turns", self._turns())

    async def _turns(self) -> None:
        """Let those who wait boot, as others have done so, until nobody waits. Any driver does it for all."""
        while await self._in_thread(self._give_next_turns):
            await self._context.clock.sleep(TURN_PERIOD_S)

    def _give_next_turns(self) -> bool:
        """Let as many boot as there is room for; tell whether others wait."""
        with machine.locked(self._records.folder / "turns"):
            living = self._living()
            waiting = [record for record in living if not self._records.turn(record).exists()]
            if not waiting:
                return False
            booting = [record for record in living if record not in waiting and self._boots(record)]
            free = max(0, (self._settings.boots or os.cpu_count() or 1) - len(booting))
            return sum(self._let_boot(record) for record in waiting[:free]) < len(waiting)

    def _living(self) -> Sequence[records.Record]:
        return [record for record in self._records.everybody() if self._records.alive(record) is not None]

    def _boots(self, record: records.Record) -> bool:
        """Tell whether a machine still boots: it has not said that it is done, and it is not too long ago."""
        with contextlib.suppress(FileNotFoundError):  # it is being deleted
            since = time.time() - self._records.turn(record).stat().st_mtime
            console = self._records.home(record) / qemu.CONSOLE
            return since < self._settings.boot_s and record.booted.encode() not in console.read_bytes()
        return False

    def _is_busy(self, record: records.Record) -> bool:
        return self._boots(record) or not self._records.turn(record).exists()

    def _let_boot(self, record: records.Record) -> bool:
        """Let a machine boot; tell whether it could be told to."""
        try:
            with self._monitor(record) as talk:
                if talk.execute("query-status")["status"] == "inmigrate":  # its memory is still being read
                    return False
                if not qemu.has_disk(talk, "seed"):
                    self._furnish(record, talk)
                talk.execute("cont")
        except (PeerError, qemu.Refusal, FileNotFoundError) as exc:  # it is being started, or deleted
            log.debug("not-yet", instance=record.token, reason=str(exc))
            return False
        with contextlib.suppress(FileNotFoundError):  # it is being deleted
            self._records.turn(record).touch()
        return True

    def _furnish(self, record: records.Record, talk: qemu.Monitor) -> None:
        """Give a halted machine what QEMU does not take as an argument: doors, and last the seed."""
        first = self._records.alive(record)
        if first is not None:
            try:
                qemu.widen_doors(first.pid)
            except OSError as exc:
                log.warning("narrow-doors", instance=record.token, reason=str(exc))
        qemu.plug(talk, "seed", self._records.home(record) / qemu.SEED, read_only=True)

    @contextlib.contextmanager
    def _monitor(self, record: records.Record) -> Iterator[qemu.Monitor]:
        with qemu.monitor(self._records.home(record), self._context.deadline_s) as talk:
            yield talk

    # Looking

    def _describe(self, vm: str) -> Vm:
        record = self._records.read(vm)
        return Vm(id=vm, token=vm, state=VmState.GONE) if record is None else self._look(record)

    def _look(self, record: records.Record) -> Vm:
        with contextlib.suppress(FileNotFoundError):
            console = self._records.home(record) / qemu.CONSOLE
            if console.stat().st_size > CONSOLE_LIMIT_BYTES:
                os.truncate(console, 0)  # QEMU appends
        seen = self._records.look(record)
        return self._look_inside(record, seen) if seen.state is VmState.RUNNING else seen

    def _look_inside(self, record: records.Record, seen: Vm) -> Vm:
        """Ask the machine itself, whose process runs: it may be halted, or broken. What was full, and is not, goes on.

        One that does not say so in time has something else to do, or is on its way out.
        """
        free = files.free_bytes(self._records.directory)
        try:
            with qemu.monitor(self._records.home(record), min(_ASK_S, self._context.deadline_s)) as talk:
                status = talk.execute("query-status")["status"]
                if status == "io-error" and free >= ROOM_BYTES:
                    talk.execute("cont")
                    log.info("machine-goes-on", instance=record.token)
                    return seen
        except (PeerError, qemu.Refusal, FileNotFoundError):
            return seen
        match status:
            case "io-error":
                log.warning("machine-halted", instance=record.token, free_mib=free // _MIB)
                return replace(seen, reason=f"its machine is halted: {_FULL_DISK}; it goes on when there is room")
            case "internal-error":
                return replace(seen, state=VmState.FAILED, reason="its machine is broken: QEMU says internal-error")
            case _:
                return seen

    def _console(self, vm: str) -> str:
        record = self._records.read(vm)
        if record is None:
            return ""
        text = machine.tail(self._records.home(record) / qemu.CONSOLE, CONSOLE_BYTES)
        return text.encode()[-CONSOLE_BYTES:].decode(errors="ignore")  # what is no text has grown

    def _examine(self) -> Sequence[Finding]:
        found = []

        def image() -> str:
            manifest = disk.read_image(self._settings.image).manifest
            return f"{manifest.name}, {manifest.hash[:12]}"

        def processor() -> str:
            chosen = self._accelerator(disk.read_image(self._settings.image))
            return "machines run on it" if chosen == "kvm" else "machines are emulated in software: expect them slow"

        def room() -> str:
            self._require_disk()
            return f"{files.free_bytes(self._records.directory) // _MIB} MiB are free"

        looks = {"QEMU": lambda: str(qemu.program()), "the image": image, "the processor": processor, "the disk": room}
        for name, look in looks.items():
            try:
                with _refusals(f"cloud {self._context.name}"):
                    found.append(Finding(name=name, ok=True, detail=look()))
            except ConpaasError as exc:
                return [*found, Finding(name=name, ok=False, detail=exc.message, hint=exc.hint)]
        return found

    # Deleting

    def _delete(self, vm: str) -> None:
        if not records.ID.fullmatch(vm):
            return
        with machine.locked(self._records.lock, vm):
            record = self._records.read(vm)
            if record is not None:
                self._records.settle(record)
                self._remove(record)

    def _remove(self, record: records.Record) -> None:
        """End what runs, remove what is written; the record goes last, so that an interrupted removal is found."""
        first = self._records.alive(record)
        if first is not None:
            self._quit(record)
            machine.kill(first)
            run.reap(first.pid)
        machine.remove_tree(self._records.home(record))
        self._records.forget(record)

    def _quit(self, record: records.Record) -> None:
        """Have QEMU write what it holds of volumes; one that does not answer is killed all the same."""
        with (
            contextlib.suppress(PeerError, qemu.Refusal),
            qemu.monitor(self._records.home(record), min(_QUIT_S, self._context.deadline_s)) as talk,
        ):
            talk.execute("quit")


def _write(path: os.PathLike[str], data: bytes) -> None:
    """Write a new file, for us alone."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn what the operating system and QEMU say into the errors of the contract, with the cloud's name."""
    try:
        yield
    except qemu.Refusal as exc:
        raise CloudRefusedError(f"{what}: QEMU says: {exc}") from exc
    except OSError as exc:
        if exc.errno in _BUSY:
            raise CloudBusyError(f"{what}: {exc}") from exc
        if exc.errno in _FULL:
            raise DiskFullError(f"{what}: {_FULL_DISK}") from exc
        raise CloudRefusedError(f"{what}: {exc}", hint="see the director's log") from exc
    except ConpaasError as exc:
        raise type(exc)(f"{what}: {exc.message}", hint=exc.hint, value=exc.value) from exc
