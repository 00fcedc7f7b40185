"""Mounting for one who may not: the daemon of a machine has no root's rights, but mounts its volumes.

What it calls as `mount DISK FOLDER` and `umount FOLDER` asks (`ask`) a socket that only it can connect to. For each
request systemd starts a program of root's (`serve`) that can do nothing else than this: mount a disk that udev has
given to that user, at a folder of that user's for volumes. Standard library alone: it is to start at once.
"""

import contextlib
import ctypes
import json
import os
import pwd
import re
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

SOCKET = "/run/conpaas/mounts"
USER = "conpaas"
HOME = Path("/var/lib/conpaas")
REQUEST_BYTES = 64 * 1024
TYPE = b"ext4"
_PLACE = re.compile(r"[A-Za-z0-9][\w-]*/volumes/[A-Za-z0-9][\w-]*")
_DEVICE = re.compile(r"/dev/[a-z][a-z0-9]*")
_NOSUID, _NODEV = 2, 4  # MS_NOSUID, MS_NODEV of mount(2)
_NOFOLLOW = 8  # UMOUNT_NOFOLLOW of umount2(2)


class RefusedError(Exception):
    """Not this, or not for you."""


# -- root's side ----------------------------------------------------------------------------------------------------


def mount(disk: str, folder: str) -> None:
    """Mount a disk of USER's; what is on it belongs to USER from now on. Raises RefusedError, OSError."""
    device = _disk(disk)
    with _parent(folder) as (parent, name):
        place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            _call("mount", device.encode(), f"/proc/self/fd/{place}".encode(), TYPE, _NOSUID | _NODEV, None)
        finally:
            os.close(place)
        mounted = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            user = pwd.getpwnam(USER)
            os.fchown(mounted, user.pw_uid, user.pw_gid)
        finally:
            os.close(mounted)


def umount(folder: str) -> None:
    """End what `mount` has done. Raises RefusedError, OSError."""
    with _parent(folder) as (parent, name):
        _call("umount2", f"/proc/self/fd/{parent}/{name}".encode(), _NOFOLLOW)


def _disk(path: str) -> str:
    """Return the device that `path` leads to, if it is one of USER's."""
    device = os.path.realpath(path)
    status = Path(device).stat()
    if not _DEVICE.fullmatch(device) or not stat.S_ISBLK(status.st_mode) or status.st_gid != pwd.getpwnam(USER).pw_gid:
        raise RefusedError(f"{path} is no disk of {USER}'s")
    return device


@contextlib.contextmanager
def _parent(folder: str, home: Path | None = None) -> Iterator[tuple[int, str]]:
    """Open the folder around `folder`, link by link: whom they belong to could change them in between."""
    home = home or HOME
    place = folder.removeprefix(f"{home}/")
    if not _PLACE.fullmatch(place):
        raise RefusedError(f"{folder} is no folder for a volume")
    *ways, name = place.split("/")
    current = os.open(home, os.O_PATH | os.O_DIRECTORY)
    try:
        for way in ways:
            inner = os.open(way, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            os.close(current)
            current = inner
        yield current, name
    finally:
        os.close(current)


def _call(name: str, *words: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


PROGRAMS: Mapping[str, Callable[..., None]] = {"mount": mount, "umount": umount}


def serve(request: IO[bytes], answer: IO[bytes], programs: Mapping[str, Callable[..., None]] = PROGRAMS) -> None:
    """Do what one line asks for, and answer in one: empty, or why it cannot be done."""
    try:
        name, *words = json.loads(request.readline(REQUEST_BYTES))
        programs[name](*words)
        reason = ""
    except (RefusedError, OSError) as exc:
        reason = str(exc)
    except (ValueError, TypeError, KeyError):
        reason = "usage: mount DISK FOLDER, or umount FOLDER"
    answer.write(json.dumps(reason).encode() + b"\n")
    answer.flush()


# -- the daemon's side ----------------------------------------------------------------------------------------------


def ask(words: list[str], path: str = SOCKET) -> str:
    """Have it done; return why it cannot be, empty if it was."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            connection.sendall(json.dumps(words).encode() + b"\n")
            with connection.makefile("rb") as answer:
                return str(json.loads(answer.readline(REQUEST_BYTES)))
        except (OSError, ValueError) as exc:
            return f"nobody mounts at {path}: {exc}"


def main() -> None:
    """Run as `serve`, between systemd's socket and the kernel, or under the name of one of PROGRAMS, for the daemon."""
    name, *words = (Path(sys.argv[0]).name, *sys.argv[1:])
    if name not in PROGRAMS:
        serve(sys.stdin.buffer, sys.stdout.buffer)
        return
    reason = ask([name, *words])
    if reason:
        sys.exit(f"{name}: {reason}")
