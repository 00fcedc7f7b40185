"""An account at the `qemu` cloud: real QEMU, and a machine that is 512 bytes of its own.

It boots in some 0.2 s, says so on its serial port, and lets go of disks as an operating system would.
"""

import asyncio
import json
import os
import signal
import struct
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _qemu_machine, qemu
from conpaas.cloud._qemu_driver import QemuCloud
from conpaas.core import files
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, VmState
from conpaas.core.tasks import wait_for
from tests.fakes.clouds import Fault, request

HELLO = b"TINY"
DEADLINE_S = 30.0
IMPATIENT_S = 2.0
"""The deadline of a call to machines that are frozen."""
FAULTS = {
    "create": frozenset({Fault.NO_DISK, Fault.NO_CAPACITY, Fault.UNKNOWN_IMAGE, Fault.NEVER_BOOTS}),
    "create_volume": frozenset({Fault.NO_DISK}),
    "attach": frozenset({Fault.HANG}),
    "detach": frozenset({Fault.HANG}),
    "examine": frozenset({Fault.NO_DISK, Fault.UNKNOWN_IMAGE}),
}


def boot_sector() -> bytes:
    """Return a machine's first sector: it greets, and lets go of whatever disk it is asked for (ACPI, PIIX4)."""
    code = _printed(HELLO + b"\n")
    code += b"\xba\x10\xae\x66\x31\xc0\x66\xef"  # PCI bus 0
    loop = (
        b"\xfb\xf4"  # sti; hlt: until the timer's next tick
        b"\xba\x04\xae\x66\xed\x66\x85\xc0"  # which devices are to go? none:
        b"\x74\xf4"  # loop
        b"\xba\x08\xae\x66\xef"  # they may
        b"\xeb\xed"  # loop
    )
    return _sector(code + loop)


def writer_sector(writes: int) -> bytes:
    """Return the first sector of a machine that takes 64 KiB of its disk's room so many times, then says `DONE`."""
    origin = 0x7C00
    code = b"\x31\xc0\x8e\xd8"  # xor ax, ax; mov ds, ax
    code += b"\xb9" + writes.to_bytes(2, "little")  # mov cx, writes
    code += b"\xbe" + (origin + 0x100).to_bytes(2, "little")  # mov si, packet
    loop = (
        b"\xb8\x00\x43\xb2\x80\xcd\x13"  # BIOS: write what the packet says to the first disk
        b"\x81\x44\x08\x80\x00"  # add word [si + 8], 128: the next 64 KiB
        b"\x49"  # dec cx
    )
    code += loop + b"\x75" + bytes([256 - len(loop) - 2])  # jnz loop
    code += _printed(b"DONE\n") + b"\xfa\xf4"
    packet = struct.pack("<BBHHHQ", 16, 0, 1, origin, 0, 128)  # one sector, from this one, to sector 128 and on
    return _sector(code.ljust(0x100, b"\0") + packet)


def _printed(text: bytes) -> bytes:
    return b"".join(b"\xba\xf8\x03\xb0" + bytes([letter]) + b"\xee" for letter in text)  # out 0x3f8, letter


def _sector(code: bytes) -> bytes:
    return code.ljust(510, b"\0") + b"\x55\xaa"


HALT = _sector(b"\xfa\xf4")


def make_disk(path: Path, sector: bytes) -> None:
    """Write a disk of one MiB."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(sector.ljust(1 << 20, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    raw.unlink()


def make_image(directory: Path, sector: bytes | None = None, **manifest: Any) -> Path:
    """Write an image whose machine is one sector, the boot sector unless told otherwise; return its folder."""
    directory.mkdir(parents=True)
    make_disk(directory / "base.qcow2", boot_sector() if sector is None else sector)
    words = {"name": "tiny", "hash": "0" * 64, "booted": HELLO.decode()} | manifest
    (directory / "image.json").write_text(json.dumps(words))
    return directory


class QemuHarness:
    """Machines of 32 MiB that boot at once."""

    quota = 4

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory, self._images = directory / "cloud", directory / "images"
        self.image = settings.get("image") or make_image(directory / "image")
        defaults = {
            "image": self.image,
            "max_instances": self.quota,
            "sizes": ({"name": "small", "memory_mib": 32}, {"name": "large", "memory_mib": 48, "price": "0.01"}),
            "reserve_mib": 1,
            "boots": 4,
            "boot_s": 10,
        }
        self.settings = qemu.QemuSettings.model_validate(defaults | settings)
        self._deployments: set[str] = set()
        self._foreign: list[str] = []
        self._faults: dict[str, deque[Fault]] = {}

    def open(self, deployment: str = "dep-ours") -> Cloud:
        context = CloudContext(
            name="qemu", deployment=deployment, directory=self.directory, clock=SYSTEM_CLOCK, deadline_s=DEADLINE_S
        )
        self._deployments.add(deployment)
        driver = qemu.CLOUD.open(self.settings, context)
        assert isinstance(driver, QemuCloud)
        for verb in FAULTS:
            setattr(driver, verb, partial(self._call, driver, verb, getattr(driver, verb)))
        return driver

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        self._faults.setdefault(verb, deque()).extend([fault] * times)

    async def _call(self, driver: QemuCloud, verb: str, act: Callable[..., Awaitable[Any]], *words: Any) -> Any:
        """Call the driver, on a bad day if it is one."""
        queue = self._faults.get(verb)
        fault = queue.popleft() if queue else None
        with ExitStack() as day:
            if fault is not None:
                day.enter_context(self._bad_day(driver, fault))
            return await act(*words)

    @contextmanager
    def _bad_day(self, driver: QemuCloud, fault: Fault) -> Iterator[None]:
        match fault:
            case Fault.NO_DISK:
                with mock.patch.object(files, "free_bytes", return_value=1000):
                    yield
            case Fault.NO_CAPACITY:
                with mock.patch.object(_qemu_machine, "available_memory", return_value=1000):
                    yield
            case Fault.UNKNOWN_IMAGE | Fault.NEVER_BOOTS:  # the image itself stays: machines that start may read it
                image = self._deaf_image() if fault is Fault.NEVER_BOOTS else self._images / "none"
                with mock.patch.object(driver, "_settings", self.settings.model_copy(update={"image": image})):
                    yield
            case Fault.HANG:
                frozen = [self.process(path.stem).pid for path in self._records("pid")]
                for pid in frozen:
                    os.kill(pid, signal.SIGSTOP)
                try:
                    with mock.patch.object(driver._volumes, "_deadline_s", IMPATIENT_S):
                        yield
                finally:
                    for pid in frozen:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGCONT)
            case _:
                raise NotImplementedError(fault)

    def _deaf_image(self) -> Path:
        """Return an image whose machine says nothing and hears nothing."""
        folder = self._images / "deaf"
        return folder if folder.exists() else make_image(folder, HALT)

    def _records(self, suffix: str) -> list[Path]:
        return sorted((self.directory / ".records").glob(f"*.{suffix}"))

    def process(self, vm: str) -> machine.First:
        """Return the process of an instance."""
        return machine.First(**json.loads((self.directory / ".records" / f"{vm}.pid").read_bytes()))

    async def kill(self, vm: str) -> None:
        await asyncio.to_thread(machine.kill, self.process(vm))

    async def make_foreign(self) -> str:
        driver = self.open("dep-theirs")
        vm = await driver.create(request("i-theirs"))

        async def runs() -> bool | None:
            return (await driver.describe(vm.id)).state is VmState.RUNNING or None

        await wait_for(runs, timeout_s=40, what=f"{vm.id} runs", clock=SYSTEM_CLOCK)
        await driver.close()
        self._foreign.append(vm.id)
        return vm.id

    async def lives(self, vm: str) -> bool:
        return self.process(vm).alive

    async def leftovers(self) -> list[str]:
        """Return files of our instances and volumes, and their processes."""
        found = [path.name for path in self.directory.iterdir() if not path.name.startswith(".")]
        found += [path.name for kind in ("json", "pid") for path in self._records(kind)]
        found += [path.name for path in self.directory.glob(".volumes/*") if path.name != "lock"]
        return sorted({name for name in found if Path(name).stem not in self._foreign})

    async def close(self) -> None:
        for deployment in sorted(self._deployments):
            driver = self.open(deployment)
            for vm in await driver.list():
                await driver.delete(vm.id)
            await driver.close()


@asynccontextmanager
async def harness(directory: Path, **settings: Any) -> AsyncIterator[QemuHarness]:
    account = QemuHarness(directory, **settings)
    try:
        yield account
    finally:
        await account.close()
