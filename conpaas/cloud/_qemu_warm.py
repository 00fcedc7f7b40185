"""Saved machines, from which instances of the `qemu` cloud continue instead of booting.

    <directory>/.warm/<image and QEMU>-<what else decides>/   root.qcow2, memory
    <directory>/.warm/…/failed                                instead of these: why it cannot be done

A machine of an image that allows it is booted once without a seed, until it waits for one; then its memory is saved.
What continues from there finds its seed as a disk that appears. It must make names, clock and randomness its own.
Blocking, but for `make`, which takes as long as a boot.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _qemu_disk as disk
from conpaas.cloud import _qemu_machine as qemu
from conpaas.core import files, run, tasks
from conpaas.core.clock import Clock
from conpaas.core.errors import CloudBusyError, CommandFailedError, ConpaasError, DiskFullError

log = structlog.get_logger()

T = TypeVar("T")

MEMORY = "memory"
BOOT_S = 300.0
"""A machine that does not wait for its seed by then never will."""
_SAVE_S = 60.0
_PERIOD_S = 0.2
_NAME_CHARACTERS = 16


class InThread(Protocol):
    """Runs what blocks."""

    def __call__(self, act: Callable[[], T]) -> Awaitable[T]: ...


class Pool:
    """The saved machines of one folder."""

    def __init__(self, directory: Path, clock: Clock, in_thread: InThread) -> None:
        self._folder = directory / ".warm"
        self._clock, self._in_thread = clock, in_thread

    def _place(self, spec: qemu.Machine) -> Path:
        """Return where a machine is saved: equal ones, and no others, at the same place."""
        here = spec._replace(address="", ports=(), user=None, incoming=None)
        words = "\0".join([*qemu.argv(here), str(spec.image.disk), str(spec.disk)])
        rest = hashlib.sha256(words.encode()).hexdigest()[:_NAME_CHARACTERS]
        return self._folder / f"{_kin(spec.image)}-{rest}"

    def find(self, spec: qemu.Machine) -> Path | None:
        """Return the folder of the machine that `spec` can continue from, or None."""
        place = self._place(spec)
        return place if (place / MEMORY).exists() else None

    def tried(self, spec: qemu.Machine) -> bool:
        """Tell whether there is such a machine, or cannot be one."""
        return self._place(spec).exists()

    async def make(self, spec: qemu.Machine) -> None:
        """Boot a machine and save it, unless it is there, or another driver is at it, or it was tried in vain."""
        place = await self._in_thread(lambda: self._place(spec))
        name = hashlib.sha256(str(place).encode()).hexdigest()  # that of a socket may not be longer
        claim = None if place.exists() else machine.claim(f"warm-{name}")
        if claim is None:
            return
        with claim:
            if place.exists():  # made meanwhile
                return
            try:
                async with self._booting(place, spec) as work:
                    await self._waits_for_its_seed(work, spec.image.manifest.waiting)
                    await self._in_thread(lambda: _save(work))
                    await self._in_thread(lambda: self._keep(work, place))
                log.info("machine-saved", image=spec.image.manifest.name)
            except (CloudBusyError, DiskFullError):  # of this computer, at this time
                raise
            except ConpaasError as exc:
                why = exc.message
                log.warning("machine-not-saved", image=spec.image.manifest.name, error=why)
                await self._in_thread(lambda: _give_up(place, why))

    @contextlib.asynccontextmanager
    async def _booting(self, place: Path, spec: qemu.Machine) -> AsyncIterator[Path]:
        """Run a machine in a folder beside `place`; at the end both are gone, unless the folder was kept."""
        work, mark = place.with_name(f"{files.TEMPORARY_PREFIX}{place.name}"), f"warm@{place}"
        alone, over = threading.Lock(), threading.Event()
        started: list[int] = []

        def clean() -> None:
            for pid in (*started, *machine.processes(mark, None)):  # those of a driver that died, too
                qemu.end(pid)
            machine.remove_tree(work)

        def begin() -> None:
            with alone:
                if over.is_set():
                    return
                clean()
                self._folder.mkdir(mode=0o700, exist_ok=True)
                work.mkdir(mode=0o700)
                (work / qemu.ROOT).write_bytes(disk.overlay(spec.image.disk, spec.disk))
                environment = qemu.environment(mark)
                started.append(run.spawn(qemu.argv(spec), cwd=work, env=environment, log=work / qemu.ERRORS))

        def end() -> None:
            over.set()
            with alone:  # a cancelled call goes on in its thread
                clean()

        try:
            await self._in_thread(begin)
            yield work
        finally:
            await self._in_thread(end)

    async def _waits_for_its_seed(self, work: Path, words: str) -> None:
        started = False

        def waits() -> bool | None:
            nonlocal started
            if not started:
                with contextlib.suppress(ConpaasError), qemu.monitor(work, _SAVE_S) as talk:
                    talk.execute("cont")
                    started = True
            return words in machine.tail(work / qemu.CONSOLE, 1 << 20) or None

        async def look() -> bool | None:
            return await self._in_thread(waits)

        what = "a machine waits for its seed"
        await tasks.wait_for(look, timeout_s=BOOT_S, what=what, clock=self._clock, period_s=_PERIOD_S)

    def _keep(self, work: Path, place: Path) -> None:
        """Put a machine to its place, and remove those of other images and of another QEMU."""
        for name in (qemu.CONSOLE, qemu.ERRORS, qemu.MONITOR):
            (work / name).unlink(missing_ok=True)
        work.rename(place)
        for other in self._folder.iterdir():
            if not other.name.startswith((place.name.partition("-")[0], files.TEMPORARY_PREFIX)):
                machine.remove_tree(other)


def _give_up(place: Path, why: str) -> None:
    """Remember that it cannot be done."""
    place.mkdir(mode=0o700)
    files.write_atomically(place / "failed", why)


def _kin(image: disk.BaseImage) -> str:
    """Return what all saved machines have in common that can be of use together: one image, one QEMU."""
    words = f"{image.manifest.hash}\0{qemu.stamp(qemu.program())}"
    return hashlib.sha256(words.encode()).hexdigest()[:_NAME_CHARACTERS]


def open_memory(place: Path) -> int:
    """Open a saved memory, for a QEMU to read."""
    return os.open(place / MEMORY, os.O_RDONLY | os.O_CLOEXEC)


def _save(work: Path) -> None:
    """Halt a machine, write its memory, and end it."""
    descriptor = os.open(work / MEMORY, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with qemu.monitor(work, _SAVE_S) as talk:
            talk.execute("stop")
            talk.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            talk.execute("getfd", {"fdname": MEMORY}, fds=[descriptor])
            talk.execute("migrate", {"uri": f"fd:{MEMORY}"})
            _wait_for_migration(talk)
            talk.execute("quit")
        os.fsync(descriptor)
    except qemu.Refusal as exc:
        raise CommandFailedError(f"the memory was not saved: {exc}") from exc
    finally:
        os.close(descriptor)


def _wait_for_migration(talk: qemu.Monitor) -> None:
    state: Mapping[str, object] = {}
    for _ in qemu.until(_SAVE_S):
        state = talk.execute("query-migrate")
        if state["status"] == "completed":
            return
        if state["status"] in {"failed", "cancelled"}:
            break
    raise CommandFailedError(f"the memory was not saved: {state}")
