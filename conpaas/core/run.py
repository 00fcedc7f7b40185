"""The one place that starts processes, and that asks whether they still live.

Commands are argument lists, never text for a shell. A process is known by its id *and* its start time, since
the system gives an id again.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conpaas.core.errors import BadInputError, CommandFailedError

OUTPUT_LIMIT_BYTES = 1024 * 1024
SHOWN_BYTES = 500  # of stderr, in an error message
_PIPE_GRACE_S = 1.0  # how long the last output may take after the exit; a daemon left behind may hold the pipe for ever
_KILL_GRACE_S = 5.0  # a killed process that is still there then sits in the kernel: nothing we can do
SYSTEM_PROGRAMS = (
    "/usr/local/sbin",
    "/usr/sbin",
    "/sbin",
)  # where engines are, but not on every user's PATH


class CommandNotFoundError(CommandFailedError):
    """The program is not installed."""

    code = "command-not-found"
    default_hint = "install it; an engine comes with 'conpaas engines install SERVICE_TYPE'"


@dataclass(frozen=True)
class Completed:
    """What a command left: exit code (negative: the signal that ended it) and the last MiB of each output."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
) -> Completed:
    """Run a command in a session of its own and return when it has ended; `env` None means ours.

    At the deadline, and on cancel, it is killed with everything it started. A daemon that it leaves behind on
    success lives on. Raises CommandNotFoundError, and CommandFailedError for a command that cannot start,
    does not end within `timeout_s` seconds or, with `check`, exits with another code than 0.
    """
    program, name = _program(argv), Path(argv[0]).name
    starting = asyncio.get_running_loop().subprocess_exec(
        _Output,
        program,
        *argv[1:],
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        cwd=cwd,
        env=None if env is None else dict(env),
        start_new_session=True,
    )
    with _start_failures_reported(name):
        transport, output = await _started(starting, lambda running: _end(*running))
    try:
        async with asyncio.timeout(timeout_s):
            await output.feed_and_wait(transport, stdin)
    except TimeoutError as exc:
        raise CommandFailedError(
            f"{name} did not end within {timeout_s:g} s",
            value=name,
            hint="the machine may be overloaded: try again",
        ) from exc
    finally:
        await _end(transport, output)
    completed = Completed(transport.get_returncode() or 0, output.last(1), output.last(2))
    if check and completed.returncode != 0:
        raise CommandFailedError(_failure(name, completed), value=name)
    return completed


@contextlib.asynccontextmanager
async def pipe(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a command for as long as the block lasts, its three streams in the block's hands; `env` None means ours.

    For what is too much to be kept in memory: the block reads, writes and waits. Raises as `run` for a command
    that cannot start. At the end of the block, what is left of it is killed with everything it started.
    """
    name = Path(argv[0]).name
    program = _program(argv)
    starting = asyncio.create_subprocess_exec(
        program,
        *argv[1:],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=None if env is None else dict(env),
        start_new_session=True,
    )
    with _start_failures_reported(name):
        process = await _started(starting, _end_pipe)
    try:
        yield process
    finally:
        await _end_pipe(process)


def spawn(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    pass_fds: Sequence[int] = (),
) -> int:
    """Start a process that outlives us, in a session of its own, and return its id.

    It reads nothing and appends both outputs to `log` (made with mode 0640). While we live we are its parent:
    collect its exit code with `reap`. Raises CommandNotFoundError, or CommandFailedError when it cannot
    start.
    """
    program = _program(argv)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        with _start_failures_reported(Path(argv[0]).name):
            process = subprocess.Popen(
                [program, *argv[1:]],
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=tuple(pass_fds),
            )
    finally:
        os.close(descriptor)
    process.returncode = 0  # from here on the id is all we hold: no warning, and no waiting, when this object goes
    return process.pid


_exit_codes: dict[int, int] = {}  # of children that ended while somebody only asked whether they live


def reap(pid: int) -> int | None:
    """Collect the exit code of a child that `spawn` started; None while it runs, or if it is not ours."""
    _collect(pid)
    return _exit_codes.pop(pid, None)


def _collect(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _exit_codes[pid] = os.waitstatus_to_exitcode(status)


def start_time(pid: int) -> int | None:
    """Return when the process started, in clock ticks since the machine did; None if it has ended.

    A zombie has ended, and is reaped if it is our child: ask only about processes of `spawn`, never of `run`.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything, also `)`
    if state in {"Z", "X"}:
        _collect(pid)
        return None
    return int(fields[18])  # the 22nd of all, where the state is the 3rd


def alive(pid: int, started: int) -> bool:
    """Tell whether the very process that began at `started` (see `start_time`) still runs."""
    return start_time(pid) == started


async def wait_gone(pid: int, started: int, timeout_s: float) -> bool:
    """Wait until the process has ended (a child of ours is reaped); False if it runs after `timeout_s`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        _collect(pid)
        return True
    try:
        if not alive(pid, started):  # gone before we looked, or the descriptor is of a namesake
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await _readable(descriptor)
    finally:
        os.close(descriptor)
    return not alive(pid, started)


def signal_group(pid: int, sig: signal.Signals) -> None:
    """Send `sig` to the process that `spawn` started and to all its children; gone is fine."""
    if pid <= 1:
        raise BadInputError(f"{pid} is not a process of ours", value=pid)  # 0 and 1 would mean us, and all
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, sig)


def find(program: str) -> Path | None:
    """Find an executable by name, on PATH or among the system's programs, or by path; None if missing."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PROGRAMS])
    found = shutil.which(program, path=path)
    return None if found is None else Path(found)


class _Output(asyncio.SubprocessProtocol):
    """Gathers what a process writes, and knows of its end apart from the end of its pipes."""

    def __init__(self) -> None:
        self._data = {1: bytearray(), 2: bytearray()}
        self._exited = asyncio.Event()
        self._closed = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        buffer = self._data[fd]
        buffer += data
        if len(buffer) > 2 * OUTPUT_LIMIT_BYTES:
            del buffer[:-OUTPUT_LIMIT_BYTES]

    def process_exited(self) -> None:
        self._exited.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the contract of asyncio
        self._closed.set()

    def last(self, fd: int) -> bytes:
        return bytes(self._data[fd][-OUTPUT_LIMIT_BYTES:])

    async def feed_and_wait(self, transport: asyncio.SubprocessTransport, stdin: bytes | None) -> None:
        pipe = transport.get_pipe_transport(0)
        if isinstance(pipe, asyncio.WriteTransport):
            pipe.write(stdin or b"")
            pipe.write_eof()
        await self.wait_exited()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PIPE_GRACE_S):
                await self._closed.wait()

    async def wait_exited(self) -> None:
        await self._exited.wait()


_Running = TypeVar("_Running")


async def _started(starting: Coroutine[Any, Any, _Running], end: Callable[[_Running], Awaitable[None]]) -> _Running:
    """Wait until the command runs; on cancel, also until `end` has killed it.

    Left to itself, asyncio would kill the command without its children, and wait for those as they hold the pipes.
    """
    task = asyncio.ensure_future(starting)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):  # it could not start
            await end(await task)
        raise


async def _end_pipe(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of the command, if it has not ended by itself, and let go of its pipes."""
    if process.returncode is None:
        signal_group(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_GRACE_S):
                await process.wait()
    process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - its pipes may have other ends


async def _end(transport: asyncio.SubprocessTransport, output: _Output) -> None:
    """Kill what is left of the command, if it has not ended by itself, and let go of its pipes."""
    try:
        if transport.get_returncode() is None:
            signal_group(transport.get_pid(), signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILL_GRACE_S):
                    await output.wait_exited()
    finally:
        transport.close()


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _program(argv: Sequence[str]) -> str:
    program = find(argv[0])
    if program is None:
        raise CommandNotFoundError(f"{argv[0]} is not installed", value=argv[0])
    return str(program)


@contextlib.contextmanager
def _start_failures_reported(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise CommandFailedError(f"{name} cannot start: {exc}", value=name) from exc


def _failure(name: str, completed: Completed) -> str:
    """Say how the command failed: `nginx exited 1: <the end of stderr>`."""
    code = completed.returncode
    how = f"exited {code}" if code >= 0 else f"was ended by {_signal_name(-code)}"
    said = completed.stderr[-SHOWN_BYTES:].decode("utf-8", "replace").strip()
    return f"{name} {how}: {said}" if said else f"{name} {how}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
