import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from conpaas.core import run
from conpaas.core.errors import BadInputError, CommandFailedError

PYTHON = sys.executable
Start: TypeAlias = Callable[..., int]
Begin: TypeAlias = Callable[[Sequence[str]], Coroutine[Any, Any, object]]


def python(code: str, *arguments: str) -> list[str]:
    return [PYTHON, "-I", "-c", code, *arguments]


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(45):
        while not condition():
            await asyncio.sleep(0.01)


async def reaped(pid: int) -> int:
    """Wait until the child has ended; return its exit code."""
    codes: list[int] = []

    def ended() -> bool:
        code = run.reap(pid)
        codes.extend([] if code is None else [code])
        return bool(codes)

    await eventually(ended)
    return codes[0]


def born(pid: int) -> int:
    start = run.start_time(pid)
    assert start is not None
    return start


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Start]:
    """Start a process; whatever is left of it is killed at the end."""
    pids = []

    def start(argv: Sequence[str], **options: Any) -> int:
        arguments = {"cwd": tmp_path, "env": dict(os.environ), "log": tmp_path / "log", **options}
        pid = run.spawn(argv, **arguments)
        pids.append(pid)
        return pid

    yield start
    for pid in pids:
        run.signal_group(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


async def test_a_command_gives_its_outputs_and_exit_code() -> None:
    done = await run.run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=45, check=False)

    assert done == run.Completed(3, b"out\n", b"err\n")


async def test_a_command_gets_its_input_directory_and_environment(tmp_path: Path) -> None:
    done = await run.run(["sh", "-c", "cat; pwd; echo $A"], timeout_s=45, cwd=tmp_path, env={"A": "b"}, stdin=b"in\n")

    assert done.stdout == f"in\n{tmp_path}\nb\n".encode()


async def test_a_command_without_input_reads_nothing() -> None:
    assert (await run.run(["cat"], timeout_s=45)).stdout == b""


async def test_much_input_and_output_do_not_block_each_other() -> None:
    data = b"x" * 900_000

    assert (await run.run(["cat"], timeout_s=45, stdin=data)).stdout == data


async def test_a_command_that_does_not_read_its_input_is_no_error() -> None:
    assert (await run.run(["true"], timeout_s=45, stdin=b"x" * 1_000_000)).returncode == 0


async def test_no_word_of_a_command_is_read_by_a_shell(tmp_path: Path) -> None:
    done = await run.run(["echo", f"; touch {tmp_path}/x; $(id)"], timeout_s=45)

    assert done.stdout.decode() == f"; touch {tmp_path}/x; $(id)\n"
    assert list(tmp_path.iterdir()) == []


async def test_output_is_capped_at_its_last_mib() -> None:
    done = await run.run(python("import sys; sys.stdout.write('x' * 5_000_000 + 'end')"), timeout_s=45)

    assert len(done.stdout) == run.OUTPUT_LIMIT_BYTES
    assert done.stdout.endswith(b"end")


async def test_a_failing_command_is_named_with_its_code_and_the_end_of_its_errors() -> None:
    with pytest.raises(CommandFailedError, match=r"(?s)^sh exited 7: .*the end$") as caught:
        await run.run(["sh", "-c", "yes x | head -c 2000 >&2; echo the end >&2; exit 7"], timeout_s=45)

    assert len(caught.value.message) <= len("sh exited 7: ") + run.SHOWN_BYTES
    assert caught.value.value == "sh"


async def test_a_command_ended_by_a_signal_is_told_by_its_name() -> None:
    with pytest.raises(CommandFailedError, match="sh was ended by SIGSEGV"):
        await run.run(["sh", "-c", "kill -SEGV $$"], timeout_s=45)


async def test_a_program_that_is_missing_is_told_apart_with_a_hint() -> None:
    with pytest.raises(run.CommandNotFoundError, match="no-such-engine is not installed") as caught:
        await run.run(["no-such-engine"], timeout_s=45)

    assert caught.value.code == "command-not-found"
    assert "engines install" in caught.value.hint


async def test_a_directory_that_is_missing_is_a_failed_command(tmp_path: Path) -> None:
    with pytest.raises(CommandFailedError, match="cannot start") as caught:
        await run.run(["true"], timeout_s=45, cwd=tmp_path / "missing")

    assert caught.value.code == "command-failed"


FAMILY = "sleep 1000 & echo $! > child; wait"  # a command with a child that ignores its end


async def child_in(folder: Path) -> int:
    """Wait until a FAMILY in a folder has its child; return that."""
    file = folder / "child"
    await eventually(lambda: file.exists() and file.read_text().endswith("\n"))
    return int(file.read_text())


async def test_at_the_deadline_a_command_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sh", "-c", f"read go; {FAMILY}"]  # it is told when its time has begun to run
    task = asyncio.create_task(run.run(command, timeout_s=1000, cwd=tmp_path, stdin=b"go\n"))
    child = await child_in(tmp_path)
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + 1000)

    with pytest.raises(CommandFailedError, match=r"sh did not end within 1000 s"):
        await task

    await eventually(lambda: run.start_time(child) is None)


async def test_on_cancel_a_command_is_killed_with_its_children(tmp_path: Path) -> None:
    task = asyncio.create_task(run.run(["sh", "-c", FAMILY], timeout_s=45, cwd=tmp_path))
    child = await child_in(tmp_path)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await eventually(lambda: run.start_time(child) is None)


def running_with(word: str) -> list[Path]:
    """Find the processes with `word` on their command line."""
    found: list[Path] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if word.encode() in path.read_bytes() else []
    return found


async def piped(argv: Sequence[str]) -> None:
    async with run.pipe(argv) as process:
        await process.wait()


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("start", [lambda argv: run.run(argv, timeout_s=45), piped], ids=["run", "pipe"])
async def test_a_cancel_at_any_step_of_the_start_leaves_no_process(start: Begin, steps: int) -> None:
    mark = f"60.{os.getpid()}{steps:02}"
    task = asyncio.create_task(start(["sh", "-c", f"sleep {mark} & wait"]))
    for _ in range(steps):
        await asyncio.sleep(0)

    task.cancel()
    async with asyncio.timeout(45):
        with pytest.raises(asyncio.CancelledError):
            await task

    await eventually(lambda: not running_with(mark))


async def test_a_cancel_does_not_hide_behind_a_command_that_cannot_start(tmp_path: Path) -> None:
    task = asyncio.create_task(run.run(["true"], timeout_s=45, cwd=tmp_path / "missing"))
    await asyncio.sleep(0)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_daemon_left_behind_lives_on_and_does_not_hold_up_the_command(tmp_path: Path) -> None:
    await run.run(["sh", "-c", "sleep 1000 & echo $! > child"], timeout_s=45, cwd=tmp_path)
    child = int((tmp_path / "child").read_text())

    assert run.start_time(child) is not None
    os.kill(child, signal.SIGKILL)


async def test_a_spawned_process_appends_its_outputs_to_the_log(tmp_path: Path, started: Start) -> None:
    (tmp_path / "log").write_text("before\n")
    pid = started(["sh", "-c", "cat; echo out; echo err >&2; exit 4"])

    await eventually(lambda: "err" in (tmp_path / "log").read_text())
    assert await reaped(pid) == 4

    assert (tmp_path / "log").read_text() == "before\nout\nerr\n"


async def test_a_spawned_process_leads_a_session_and_inherits_only_what_is_passed(
    tmp_path: Path, started: Start
) -> None:
    reader, writer = os.pipe()
    kept, other = os.dup(writer), os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(other, True)  # noqa: FBT003
    pid = started(["sh", "-c", f"ls /proc/self/fd; echo through > /dev/fd/{kept}; sleep 60"], pass_fds=[kept])
    os.close(writer)
    os.close(kept)
    try:
        assert os.read(reader, 100) == b"through\n"
        assert os.getsid(pid) == pid
        assert str(other) not in (tmp_path / "log").read_text().split()
    finally:
        os.close(reader)
        os.close(other)


def test_a_spawned_program_that_is_missing_is_told(started: Start) -> None:
    with pytest.raises(run.CommandNotFoundError):
        started(["no-such-engine"])


def test_a_process_is_known_by_its_id_and_start_time(started: Start) -> None:
    pid = started(["sleep", "60"])
    start = run.start_time(pid)

    assert start is not None
    assert run.alive(pid, start)
    assert not run.alive(pid, start - 1)


async def test_a_process_with_an_awkward_name_has_a_start_time(tmp_path: Path, started: Start) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    pid = started([str(program), "60"])
    await eventually(lambda: ") S 1 (" in Path(f"/proc/{pid}/stat").read_text())  # it is renamed after it has begun

    assert run.start_time(pid) == pytest.approx(run.start_time(os.getpid()), abs=3600 * 100 * 24)


async def test_a_zombie_of_ours_has_ended_and_is_reaped(started: Start) -> None:
    pid = started(["true"])

    await eventually(lambda: run.start_time(pid) is None)

    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_a_process_that_never_was_has_no_start_time(pid: int) -> None:
    assert run.start_time(pid) is None


def test_a_process_that_is_not_our_child_is_not_reaped() -> None:
    assert run.reap(os.getppid()) is None


async def test_waiting_ends_when_the_process_does_and_reaps_it(started: Start) -> None:
    pid = started(["sleep", "60"])
    start = born(pid)
    waiting = asyncio.create_task(run.wait_gone(pid, start, 30))
    await asyncio.sleep(0.05)
    assert not waiting.done()

    run.signal_group(pid, signal.SIGTERM)

    assert await waiting
    assert not Path(f"/proc/{pid}").exists()


async def test_waiting_gives_up_at_the_deadline(started: Start) -> None:
    pid = started(["sleep", "60"])

    assert not await run.wait_gone(pid, born(pid), 0.05)


async def test_waiting_for_what_is_gone_or_a_namesake_ends_at_once(started: Start) -> None:
    pid = started(["sleep", "60"])
    start = born(pid)

    assert await run.wait_gone(pid, start - 1, 30)
    run.signal_group(pid, signal.SIGKILL)
    await eventually(lambda: run.start_time(pid) is None)
    assert await run.wait_gone(pid, start, 30)


async def test_a_signal_reaches_the_whole_group_and_gone_is_fine(tmp_path: Path, started: Start) -> None:
    pid = started(["sh", "-c", FAMILY])
    child = await child_in(tmp_path)

    run.signal_group(pid, signal.SIGKILL)
    await eventually(lambda: run.start_time(pid) is None and run.start_time(child) is None)
    run.signal_group(pid, signal.SIGKILL)


@pytest.mark.parametrize("pid", [-1, 0, 1])
def test_a_signal_to_ourselves_or_to_all_is_refused(pid: int) -> None:
    with pytest.raises(BadInputError):
        run.signal_group(pid, signal.SIGTERM)


def test_a_program_is_found_by_name_by_path_and_among_the_systems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    system = tmp_path / "sbin"
    system.mkdir()
    (system / "engine").write_text("#!/bin/sh\n")
    (system / "engine").chmod(0o755)
    monkeypatch.setattr(run, "SYSTEM_PROGRAMS", (str(system),))

    assert run.find("engine") == system / "engine"
    assert run.find(str(system / "engine")) == system / "engine"
    assert run.find("no-such-engine") is None
