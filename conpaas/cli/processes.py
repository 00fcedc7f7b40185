"""Looking at the machine's processes, for `quickstart`: who descends from whom, and what is left over."""

import contextlib
import ctypes
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from conpaas.core import run
from conpaas.core.errors import CommandFailedError

_PR_SET_CHILD_SUBREAPER = 36


class Running(NamedTuple):
    """A process that has not ended."""

    pid: int
    parent: int
    name: str


def adopt_orphans() -> None:
    """Make this process the parent of every orphan among its descendants, so that none can get out of sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise CommandFailedError(f"prctl: {os.strerror(ctypes.get_errno())}")


def descendants(pid: int) -> list[Running]:
    """Return the living processes below `pid`; our own children that have ended are reaped."""
    children: dict[int, list[Running]] = defaultdict(list)
    for process in _all():
        children[process.parent].append(process)
    found: list[Running] = []
    queue = [pid]
    while queue:
        below = children[queue.pop()]
        found.extend(below)
        queue.extend(process.pid for process in below)
    return found


def kill(processes: list[Running]) -> None:
    """Kill them; gone is fine."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _all() -> list[Running]:
    found: list[Running] = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = (directory / "stat").read_text(encoding="utf-8", errors="replace")
            head, _, tail = text.rpartition(")")
            state, parent = tail.split()[:2]
            pid = int(directory.name)
            if state not in "ZX":
                found.append(Running(pid, int(parent), head.partition("(")[2]))
            elif int(parent) == os.getpid():
                run.reap(pid)
    return found
