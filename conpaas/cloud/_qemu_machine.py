"""What the `qemu` cloud asks of QEMU: how it is started, spoken to, and whether this computer makes it fast.

Blocking, and free of state.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Literal, NamedTuple

import structlog

from conpaas.cloud import _local_init as init
from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _qemu_disk as disk
from conpaas.core import files, run
from conpaas.core.errors import CloudRefusedError, CommandFailedError, DeadlineError, PeerError

log = structlog.get_logger()

PROGRAM = "qemu-system-x86_64"
MONITOR, CONSOLE, ERRORS, ROOT, SEED = "qmp", "console.log", "qemu.log", "root.qcow2", "seed.iso"
"""Files of an instance."""

Accelerator = Literal["kvm", "tcg"]

# -- starting -------------------------------------------------------------------------------------------------------

_SANDBOX = "on,obsolete=deny,spawn=deny,resourcecontrol=deny,elevateprivileges="
_PROCESSORS = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,tb-size=64", "-cpu", "qemu64"],  # MiB of translated code; a processor that costs the least
}


class Machine(NamedTuple):
    """What a virtual machine is made of."""

    image: disk.BaseImage
    address: str
    """On this computer, where its ports appear."""
    ports: tuple[int, ...]
    cores: int
    memory: int
    """Bytes."""
    disk: int
    """Bytes."""
    accelerator: Accelerator
    user: int | None
    """To be dropped to, as user and as group; None: stay who we are."""
    incoming: int | None = None
    """Descriptor of a saved state to go on from."""


def _network(spec: Machine) -> list[str]:
    forwards = [f"hostfwd=tcp:{spec.address}:{port}-{disk.GUEST_ADDRESS}:{port}" for port in sorted(set(spec.ports))]
    user = ",".join(["user,id=net0,ipv6=off", *forwards])
    return ["-netdev", user, "-device", f"virtio-net-pci,netdev=net0,mac={disk.MAC},romfile="]


def _boot(image: disk.BaseImage) -> list[str]:
    if image.kernel is None:
        return []
    initrd = ["-initrd", str(image.initrd)] if image.initrd else []
    return ["-kernel", str(image.kernel), *initrd, "-append", image.manifest.cmdline]


def argv(spec: Machine) -> list[str]:
    """Return the command that starts the machine, halted, in the instance's directory."""
    elevation = "deny" if spec.user is None else "allow"  # else it may not become that user; it can start nothing
    return [
        PROGRAM,
        *("-M", "pc,dump-guest-core=off", "-nodefaults", "-no-user-config", "-nographic", "-vga", "none", "-S"),
        *_PROCESSORS[spec.accelerator],
        *("-smp", str(spec.cores), "-m", f"size={spec.memory // 1024}k"),
        *("-sandbox", _SANDBOX + elevation),
        *([] if spec.user is None else ["-runas", f"{spec.user}:{spec.user}"]),
        *("-chardev", f"socket,id=monitor,path={MONITOR},server=on,wait=off", "-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"file,id=console,path={CONSOLE},append=on", "-serial", "chardev:console"),
        *("-object", "rng-builtin,id=random", "-device", "virtio-rng-pci,rng=random"),
        *("-blockdev", json.dumps(_disk("root", ROOT) | {"driver": "qcow2"})),
        *("-device", json.dumps(_device("root") | ({} if spec.image.kernel else {"bootindex": 0}))),
        *_network(spec),
        *_boot(spec.image),
        *([] if spec.incoming is None else ["-incoming", f"fd:{spec.incoming}"]),
    ]


def environment(mark: str) -> dict[str, str]:
    """Return what QEMU finds in its environment: whose it is."""
    return {"PATH": os.defpath, "LANG": "C.UTF-8", init.MARKER: mark}


def user_of(base: int, address: str) -> int:
    """Return the user id that belongs to an address, as the local cloud counts them."""
    return base + (int(IPv4Address(address)) & 0xFF_FFFF)


_libc = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438  # of Linux, on every architecture since 5.6
BACKLOG = 1024


def widen_doors(pid: int) -> None:
    """Let more than one connection wait at each port of a machine, which is as many as QEMU lets.

    A handful at once would wait for seconds, or be lost. Raises OSError where we may not.
    """
    process = os.pidfd_open(pid)
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            copy = _libc.syscall(_PIDFD_GETFD, process, int(descriptor.name), 0)
            if copy < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            with socket.socket(fileno=copy) as door:
                if door.family == socket.AF_INET and door.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    door.listen(BACKLOG)  # of a socket that listens, it changes just that
    finally:
        os.close(process)


# -- speaking -------------------------------------------------------------------------------------------------------


class Refusal(Exception):  # noqa: N818 - an answer, that callers turn into an error of the contract
    """QEMU understood a command and does not obey; the text is its own."""


class Monitor:
    """A conversation with the QEMU of an instance: QMP, one at a time."""

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self._connection, self._deadline = connection, time.monotonic() + deadline_s
        self._received = b""
        self._name, self._number = os.urandom(8).hex(), 0

    def execute(self, command: str, words: Mapping[str, Any] | None = None, *, fds: Sequence[int] = ()) -> Any:
        """Return the answer to a command. Raises Refusal, PeerError if it breaks off, DeadlineError."""
        self._number += 1
        name = f"{self._name}-{self._number}"  # QEMU gives a late answer to whoever speaks to it then
        question = {"execute": command, "arguments": dict(words or {}), "id": name}
        with self._bad_days(command):
            self._connection.settimeout(self._left())
            socket.send_fds(self._connection, [json.dumps(question).encode() + b"\n"], list(fds))
            answer = self._receive(lambda message: message.get("id") == name)
            if "error" in answer:
                raise Refusal(answer["error"]["desc"])
            return answer["return"]

    def _receive(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the next message that is wanted."""
        while True:
            message = self._receive_any()
            if wanted(message):
                return message

    def _receive_any(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._connection.settimeout(self._left())
            part = self._connection.recv(65536)
            if not part:
                raise ConnectionResetError("it has ended")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    @contextlib.contextmanager
    def _bad_days(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as exc:
            raise DeadlineError(f"QEMU did not answer '{what}' in time") from exc
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise PeerError(f"QEMU broke off at '{what}': {exc}") from exc

    def begin(self) -> None:
        """Hear the greeting, and agree on what is spoken."""
        with self._bad_days("hello"):
            self._receive(lambda message: "QMP" in message)
        self.execute("qmp_capabilities")


@contextlib.contextmanager
def monitor(home: Path, deadline_s: float) -> Iterator[Monitor]:
    """Speak to the QEMU that runs in `home`. Raises PeerError if nobody listens, DeadlineError."""
    deadline = time.monotonic() + deadline_s
    folder = os.open(home, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            _connect(connection, f"/proc/self/fd/{folder}/{MONITOR}", deadline)  # the name of a socket has 107 bytes
            talk = Monitor(connection, deadline - time.monotonic())
            talk.begin()
            yield talk
    finally:
        os.close(folder)


def _connect(connection: socket.socket, name: str, deadline: float) -> None:
    connection.setblocking(False)  # noqa: FBT003 - of the standard library
    while True:
        try:
            connection.connect(name)
        except BlockingIOError as exc:  # others are waiting to speak
            if time.monotonic() > deadline:
                raise DeadlineError("QEMU has no time to listen") from exc
            machine.pause()
        except OSError as exc:
            raise PeerError(f"QEMU does not listen: {exc}") from exc
        else:
            return


# -- disks ----------------------------------------------------------------------------------------------------------


def _node(disk_id: str) -> str:
    return f"disk-{disk_id}"


def _disk(disk_id: str, file: str) -> dict[str, Any]:
    storage = {"driver": "file", "filename": file}
    return {"driver": "raw", "node-name": _node(disk_id), "discard": "unmap", "file": storage}


def _device(disk_id: str) -> dict[str, Any]:
    return {"driver": "virtio-blk-pci", "drive": _node(disk_id), "id": disk_id, "serial": disk_id}


def has_disk(talk: Monitor, disk_id: str) -> bool:
    """Tell whether the machine has the disk."""
    return disk_id in {device["name"] for device in talk.execute("qom-list", {"path": "/machine/peripheral"})}


def plug(talk: Monitor, disk_id: str, file: Path, *, read_only: bool = False) -> None:
    """Give the machine a disk that is a plain file, by a descriptor: QEMU itself may not open it.

    The machine finds it as `/dev/disk/by-id/virtio-<id>`, if the id has no more than 20 characters.
    """
    descriptor = os.open(file, os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR))
    try:
        number = talk.execute("add-fd", fds=[descriptor])["fdset-id"]
    finally:
        os.close(descriptor)
    forget_disk(talk, disk_id)
    talk.execute("blockdev-add", _disk(disk_id, f"/dev/fdset/{number}") | {"read-only": read_only})
    try:
        talk.execute("device_add", _device(disk_id))
    except Refusal:
        forget_disk(talk, disk_id)
        raise


def unplug(talk: Monitor, disk_id: str) -> None:
    """Ask the machine to let go of a disk. Refusal while it is asked already."""
    talk.execute("device_del", {"id": disk_id})


def forget_disk(talk: Monitor, disk_id: str) -> None:
    """Close the file of a disk that the machine no longer has. Refusal while it is on its way out."""
    nodes = talk.execute("query-named-block-nodes", {"flat": True})
    if _node(disk_id) in {node["node-name"] for node in nodes}:
        talk.execute("blockdev-del", {"node-name": _node(disk_id)})


# -- how fast -------------------------------------------------------------------------------------------------------

PROBE_S = 3.0
"""A kernel that is really run by the processor says its first word in a fraction of this."""
_PROC, _SYS, _KVM = Path("/proc"), Path("/sys"), Path("/dev/kvm")


def stamp(program: Path) -> str:
    """Return what changes when another QEMU is installed."""
    facts = program.stat()
    return f"{program} {facts.st_size} {facts.st_mtime_ns}"


def accelerator(choice: str, image: disk.BaseImage, cache: Path) -> Accelerator:
    """Return how machines are run here: `choice`, or for `auto` what a probe shows; that is remembered in `cache`.

    The device alone proves nothing: there are hosts whose KVM opens, and then interprets a kernel until it breaks.
    """
    if choice != "auto":
        return "kvm" if choice == "kvm" else "tcg"
    if not _promising():
        return "tcg"
    facts = {"boot": init.boot_id(), "qemu": stamp(program()), "kernel": str(image.kernel)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cache.read_bytes())
        if known["facts"] == facts:
            return "kvm" if known["kvm"] else "tcg"
    works = image.kernel is None or _probe(image.kernel, cache.with_suffix(".log"))
    log.info("kvm-probed", works=works)
    files.write_atomically(cache, json.dumps({"facts": facts, "kvm": works}))
    return "kvm" if works else "tcg"


def _promising() -> bool:
    """Tell whether the processor has what KVM needs, the kernel offers KVM itself, and we may use it."""
    words = set((_PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    real = words & {"svm", "vmx"} and not (_SYS / "module/kvm_pvm").exists()
    return bool(real) and os.access(_KVM, os.R_OK | os.W_OK)


def _probe(kernel: Path, console: Path) -> bool:
    """Boot a kernel with KVM until it speaks."""
    console.unlink(missing_ok=True)
    words = [PROGRAM, "-M", "pc", "-nodefaults", "-no-user-config", "-nographic", *_PROCESSORS["kvm"], "-m", "128"]
    words += ["-no-reboot", "-serial", "stdio", "-kernel", str(kernel), "-append", "earlyprintk=ttyS0 console=ttyS0"]
    pid = run.spawn(words, cwd=console.parent, env=environment(init.placeholder()), log=console)
    try:
        for _ in until(PROBE_S):
            alive = run.start_time(pid) is not None  # in this order: its last word counts
            if b"Linux version" in console.read_bytes():
                return True
            if not alive:
                break
        return False
    finally:
        end(pid)
        console.unlink(missing_ok=True)


def until(seconds: float) -> Iterator[None]:
    """Yield again and again, with pauses, until so many seconds have passed."""
    deadline = time.monotonic() + seconds
    while True:
        yield
        if time.monotonic() > deadline:
            return
        machine.pause()


def end(pid: int) -> None:
    """Kill a child of ours, and wait until it is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        run.signal_group(pid, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(machine.KILL_TIMEOUT_S * 1000)
        run.reap(pid)
    finally:
        os.close(descriptor)


def program() -> Path:
    """Return where QEMU is; CloudRefusedError if it is not installed."""
    found = run.find(PROGRAM)
    if found is None:
        raise CloudRefusedError(f"{PROGRAM} is not installed", hint="install it: 'apt install qemu-system-x86'")
    return found


def available_memory() -> int:
    """Return how many bytes of memory new processes can have, as the kernel guesses it."""
    for line in (_PROC / "meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise CommandFailedError("/proc/meminfo does not tell how much memory is available")
