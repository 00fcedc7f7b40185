"""Two ways to start a local instance: by executing its first process, or by asking a zygote to fork it."""

import os
import select
import socket
import sys
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

import conpaas
from conpaas.cloud import _local_init as init
from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _local_zygote as zygote
from conpaas.core import run
from conpaas.core.errors import CloudBusyError

log = structlog.get_logger()

START_TIMEOUT_S = 20.0
"""How long an instance's first process may take to begin: some 50 ms, on a machine that is not overloaded."""
_ZYGOTE_END_S = 2.0
_NO_ROOM = {str(number) for number in (*machine.BUSY, *machine.FULL)}
"""Errors that tell nothing about what this machine allows."""


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return what processes of an instance find in their environment: nothing of ours but where programs are."""
    path = os.pathsep.join(machine.search_path())
    found = {"PATH": path, "LANG": "C.UTF-8", "USER": init.DAEMON_USER, **extra}
    package = str(Path(conpaas.__file__).parents[1])
    libraries = [os.environ.get("PYTHONPATH", "")]
    if package not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        libraries.append(package)  # we run from a source tree
    found["PYTHONPATH"] = os.pathsep.join(filter(None, libraries))
    return found


class Starter:
    """Starts first processes. Blocking and thread-safe: for the driver's own threads."""

    def __init__(self, directory: Path, modules: Sequence[str] | None) -> None:
        self._directory = directory
        self._modules = modules
        """What a zygote loads; None: no zygote."""
        self._lock = threading.Lock()
        self._zygote: _Zygote | None = None
        self._broken = ""
        """The version of the code that no zygote can load."""

    @property
    def stamp(self) -> str:
        """The version of the code that a zygote would run; empty without one."""
        return "" if self._modules is None else zygote.code_stamp()

    def start(self, spec: init.Spec, claim: socket.socket) -> str:
        """Start the instance and return when it lives: the empty text, or why its world cannot be made.

        Raises CloudBusyError when there is no answer in time, OSError when this machine has no room just now.
        """
        answer = self._by_zygote(spec, claim) or self._by_execution(spec, claim)
        if answer == init.READY:
            return ""
        number, _, words = answer.decode(errors="replace").partition(" ")
        if number in _NO_ROOM:
            raise OSError(int(number), words)
        return words or "its first process died at once"

    def close(self) -> None:
        """End the zygote; instances stay."""
        with self._lock:
            if self._zygote is not None:
                self._zygote.close()
                self._zygote = None

    def _by_zygote(self, spec: init.Spec, claim: socket.socket) -> bytes:
        """Return the zygote's answer, nothing if there is none."""
        helper = self._current_zygote(spec)
        if helper is None:
            return b""
        reply, inlet = os.pipe()
        try:
            socket.send_fds(helper.channel, [spec.write().encode()], [claim.fileno(), inlet])
        except OSError as exc:
            log.warning("zygote-lost", error=str(exc))
            os.close(reply)
            return b""
        finally:
            os.close(inlet)
        answer = _answer(reply)
        if answer:
            helper.proven = True
        elif not helper.proven:
            log.warning("zygote-broken", log=str(self._directory / "zygote.log"))
            self._broken = spec.stamp
        return answer

    def _current_zygote(self, spec: init.Spec) -> "_Zygote | None":
        if self._modules is None or self._broken == spec.stamp:
            return None
        with self._lock:
            if self._zygote is not None and (self._zygote.stamp != spec.stamp or not self._zygote.alive):
                self._zygote.close()
                self._zygote = None
            if self._zygote is None:
                self._zygote = _Zygote(self._directory, self._modules, spec.stamp)
            return self._zygote

    def _by_execution(self, spec: init.Spec, claim: socket.socket) -> bytes:
        reply, inlet = os.pipe()
        try:
            pid = run.spawn(
                [sys.executable, "-P", "-S", "-E", init.__file__, spec.write(), str(claim.fileno()), str(inlet)],
                cwd=Path("/"),
                env=spec.env,
                log=self._directory / "init.log",
                pass_fds=(claim.fileno(), inlet),
            )
        finally:
            os.close(inlet)
        try:
            return _answer(reply)
        finally:
            _reap(pid)


class _Zygote:
    """A running zygote and the channel to it."""

    def __init__(self, directory: Path, modules: Sequence[str], stamp: str) -> None:
        self.stamp = stamp
        self.proven = False
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log_file = directory / "zygote.log"
        log_file.unlink(missing_ok=True)
        room = "-" * 300  # for the titles of the processes that it will become
        with theirs:
            self._pid = run.spawn(
                [sys.executable, "-m", zygote.__name__, str(theirs.fileno()), room, *modules],
                cwd=Path("/"),
                env=environment({init.MARKER: init.placeholder()}),
                log=log_file,
                pass_fds=(theirs.fileno(),),
            )
        self._started = run.start_time(self._pid)

    @property
    def alive(self) -> bool:
        return self._started is not None and run.alive(self._pid, self._started)

    def close(self) -> None:
        self.channel.close()
        _reap(self._pid)


def _answer(reply: int) -> bytes:
    """Read `reply` to its end, and close it."""
    parts: list[bytes] = []
    poll = select.poll()
    poll.register(reply, select.POLLIN)
    try:
        while poll.poll(START_TIMEOUT_S * 1000):
            part = os.read(reply, 4096)
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(reply)
    raise CloudBusyError(
        f"an instance's first process did not begin within {START_TIMEOUT_S:g} s", hint="the machine is overloaded"
    )


def _reap(pid: int) -> None:
    """Wait for the end of a child that is about to end; kill it if it does not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(_ZYGOTE_END_S * 1000):
            os.kill(pid, 9)  # still our child, so still this process
            poll.poll(_ZYGOTE_END_S * 1000)
        run.reap(pid)
    finally:
        os.close(descriptor)
