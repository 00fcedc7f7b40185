"""A command in a block's hands ends with the block."""

import sys
from pathlib import Path

import pytest

from conpaas.core import run
from conpaas.core.errors import CommandFailedError

SLEEPER = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"


async def test_streams_larger_than_memory_limits_pass_through() -> None:
    total = 0
    async with run.pipe(["head", "-c", "5000000", "/dev/zero"]) as process:
        assert process.stdout is not None
        while data := await process.stdout.read(65536):
            total += len(data)
        assert await process.wait() == 0
    assert total == 5_000_000


async def test_what_is_written_arrives_and_the_exit_code_is_the_commands() -> None:
    async with run.pipe(["sh", "-c", "cat >&2; exit 3"]) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"words")
        process.stdin.close()
        assert await process.stderr.read() == b"words"
        assert await process.wait() == 3


async def test_a_command_and_its_children_are_killed_at_the_end_of_the_block() -> None:
    async with run.pipe([sys.executable, "-c", SLEEPER]) as process:
        assert process.stdout is not None
        child = int(await process.stdout.readline())
        started = run.start_time(child)
        assert started is not None

    assert process.returncode == -9
    assert await run.wait_gone(child, started, 10)


async def test_also_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        await fail()


async def fail() -> None:
    async with run.pipe(["sleep", "600"]) as process:
        assert run.start_time(process.pid) is not None
        raise ZeroDivisionError


async def test_a_command_that_cannot_start_is_an_expected_error(tmp_path: Path) -> None:
    with pytest.raises(run.CommandNotFoundError):
        async with run.pipe(["no-such-program"]):
            pass
    with pytest.raises(CommandFailedError, match="cannot start"):
        async with run.pipe(["true"], cwd=tmp_path / "none"):
            pass
