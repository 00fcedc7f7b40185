"""What the local cloud asks of the machine: who has an address, which processes are whose, what a folder holds.

Blocking, and free of state.
"""

import contextlib
import errno
import fcntl
import os
import re
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import conpaas
from conpaas.cloud import _local_init as init
from conpaas.core import run
from conpaas.core.errors import CloudBusyError

KILL_TIMEOUT_S = 10.0
BUSY = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
FULL = (errno.ENOSPC, errno.EDQUOT)
_POLL_S = 0.005
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")


def is_id(text: str) -> bool:
    """Tell whether a text may name an instance or a volume, and so a file."""
    return _ID.fullmatch(text) is not None


class First(NamedTuple):
    """An instance's first process."""

    pid: int
    start: int
    boot: str

    @property
    def alive(self) -> bool:
        """It runs: its id was not given to another process, nor was the machine started again."""
        return self.boot == init.boot_id() and run.alive(self.pid, self.start)


def _claim_name(address: str) -> str:
    return f"\0conpaas-address-{address}"


def claim(address: str) -> socket.socket | None:
    """Take possession of an address on this machine; None if somebody has it."""
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        taken.bind(_claim_name(address))
    except OSError as exc:
        taken.close()
        if exc.errno == errno.EADDRINUSE:
            return None
        raise
    return taken


def claimed(address: str) -> bool:
    """Tell whether somebody has the address, without disturbing anybody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_claim_name(address))
        except ConnectionRefusedError:
            return False
    return True


# Processes and files


@contextlib.contextmanager
def locked(file: Path, name: str = "") -> Iterator[None]:
    """Keep every other thread and process from whatever is done under the same name, empty for all that has none.

    The lock is one byte of `file`, held by the open file rather than the process, and ends with it.
    """
    place = zlib.crc32(name.encode()) + 1 if name else 0
    with file.open("ab") as held:
        wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        fcntl.fcntl(held, fcntl.F_OFD_SETLKW, wanted)
        yield


def pause() -> None:
    """Let a moment pass between two looks, in a thread that may block."""
    select.select([], [], [], _POLL_S)


def kill(first: First) -> None:
    """Kill the first process, and wait until it is gone; in namespaces its end is the end of them all."""
    try:
        descriptor = os.pidfd_open(first.pid)
    except ProcessLookupError:
        return
    try:
        if not first.alive:  # asked after opening: the descriptor is of this very process, or not used
            return
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(KILL_TIMEOUT_S * 1000):
            raise CloudBusyError(f"process {first.pid} does not end", value=first.pid)
    finally:
        os.close(descriptor)


def processes(mark: str, user: int | None) -> list[int]:
    """Return the living processes that bear `mark` or belong to `user`."""
    words = f"\0{init.MARKER}={mark}\0".encode()
    return [int(path.name) for path in Path("/proc").glob("[1-9]*") if _is_of(path, words, user)]


def _is_of(process: Path, mark: bytes, user: int | None) -> bool:
    try:
        if mark in b"\0" + (process / "environ").read_bytes() + b"\0":
            return True
        if user is None:
            return False
        status = (process / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended, or belongs to somebody else
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return not fields["State"].strip().startswith("Z") and fields["Uid"].split()[0] == str(user)


def remove_tree(directory: Path) -> None:
    """Remove a directory that an instance wrote to, without following its links; gone is fine."""
    try:
        _remove_tree(directory)
    except PermissionError:  # never for root: an engine has closed a directory to itself
        directory.chmod(0o700)
        for folder, names, _ in os.walk(directory):
            for path in (Path(folder, name) for name in names):
                if not path.is_symlink():
                    path.chmod(0o700)
        _remove_tree(directory)


def _remove_tree(directory: Path) -> None:
    def gone_is_fine(_function: Callable[..., Any], _path: str, error: Any) -> None:
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    shutil.rmtree(directory, onerror=gone_is_fine)


def tail(path: Path, limit: int) -> str:
    """Return the last `limit` bytes of a log that an instance writes: a plain file, or nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            return ""
        file.seek(max(0, facts.st_size - limit))
        return file.read(limit).decode("utf-8", errors="replace")


def closed_to_others(place: Path) -> Path | None:
    """Return the first of `place` and the folders above it that other users cannot enter, None if they can."""
    for path in (*reversed(place.parents), place):
        if not path.stat().st_mode & stat.S_IXOTH:
            return path
    return None


def search_path() -> list[str]:
    """Return the folders of PATH, and the interpreter's, as far as instances can look into them."""
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), str(Path(sys.executable).parent)]
    found = [folder for folder in dict.fromkeys(folders) if Path(folder).is_absolute() and os.access(folder, os.X_OK)]
    if os.geteuid() != 0:
        return found
    return [folder for folder in found if closed_to_others(Path(folder)) is None]


# Our own programs


def needed() -> list[Path]:
    """Return the places that processes of instances must reach: Python, our code, programs on PATH."""
    places = [sys.executable, os.path.realpath(sys.executable), sys.prefix, sys.base_prefix, conpaas.__file__]
    return [Path(place) for place in (*places, *search_path())]


INACCESSIBLE_HINT = "install ConPaaS where every user may read, such as /opt, with the Python of /usr/bin"


def inaccessible() -> str:
    """Say which of our programs the users of instances cannot reach; empty if we are not root, or they can."""
    if os.geteuid() != 0:
        return ""
    for place in (sys.executable, os.path.realpath(sys.executable), sys.prefix, str(Path(conpaas.__file__).parent)):
        closed = closed_to_others(Path(place))
        if closed is not None:
            return f"{closed} is closed to other users, so instances cannot run {place}"
    return ""
