"""Engines are kept running, found again, and ended with everything they started."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from conpaas.core import engines, run
from conpaas.core.engines import Supervisor
from conpaas.core.errors import CommandFailedError
from conpaas.core.service import EngineSpec


async def until(check: Callable[[], bool], timeout_s: float = 45.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.01)


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(tmp_path / "run", tmp_path / "logs")
    yield supervisor
    for name in list(supervisor._engines):
        await supervisor.stop(name, number=signal.SIGKILL, timeout_s=5)


def sleep(tmp_path: Path, seconds: int = 1000) -> EngineSpec:
    return EngineSpec("sleep", ("sleep", str(seconds)), tmp_path)


async def test_ensuring_twice_starts_once(supervisor: Supervisor, tmp_path: Path) -> None:
    assert await supervisor.ensure(sleep(tmp_path))
    pid = supervisor.pid("sleep")

    assert not await supervisor.ensure(sleep(tmp_path))
    assert supervisor.pid("sleep") == pid
    assert supervisor.trouble("sleep") == ""


async def test_another_argument_list_restarts_the_engine(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.ensure(sleep(tmp_path))
    pid = supervisor.pid("sleep")

    assert await supervisor.ensure(sleep(tmp_path, 2000))
    assert supervisor.pid("sleep") != pid


async def test_an_engine_that_is_killed_comes_back(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.ensure(sleep(tmp_path))
    pid = supervisor.pid("sleep")
    assert pid is not None

    os.kill(pid, signal.SIGKILL)

    await until(lambda: supervisor.pid("sleep") not in {None, pid})


async def test_workers_that_outlive_their_master_are_ended_before_it_comes_back(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    script = "sleep 1001 & echo $! > worker; wait"
    await supervisor.ensure(EngineSpec("master", ("sh", "-c", script), tmp_path))
    worker_file = tmp_path / "worker"
    await until(lambda: worker_file.exists() and worker_file.read_text().strip() != "")
    worker, master = int(worker_file.read_text()), supervisor.pid("master")
    assert master is not None

    os.kill(master, signal.SIGKILL)

    await until(lambda: run.start_time(worker) is None)
    await until(lambda: supervisor.pid("master") not in {None, master})


async def test_an_engine_that_ends_again_and_again_is_told_with_its_last_words(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    await supervisor.ensure(EngineSpec("failing", ("sh", "-c", "echo no such thing; exit 3"), tmp_path))

    await until(lambda: re.search(r"ended ([3-9]|\d\d) times", supervisor.trouble("failing")) is not None)
    assert "code 3" in supervisor.trouble("failing")
    assert "no such thing" in supervisor.trouble("failing")


async def test_an_engine_outlives_its_supervisor_and_is_found_again(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.ensure(sleep(tmp_path))
    pid = supervisor.pid("sleep")
    supervisor.close()

    second = Supervisor(tmp_path / "run", tmp_path / "logs")
    assert not await second.ensure(sleep(tmp_path))
    assert second.pid("sleep") == pid

    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: second.pid("sleep") not in {None, pid})
    await second.stop("sleep", number=signal.SIGTERM, timeout_s=5)


async def test_a_file_of_an_earlier_boot_adopts_nobody(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.ensure(sleep(tmp_path))
    path = tmp_path / "run" / "sleep.json"
    stale = path.read_text().replace(f'"started": {run.start_time(supervisor.pid("sleep") or 0)}', '"started": 1')
    await supervisor.stop("sleep", number=signal.SIGTERM, timeout_s=5)
    path.write_text(stale.replace(stale.split(",")[0], f'{{"pid": {os.getpid()}'))

    second = Supervisor(tmp_path / "run", tmp_path / "logs")
    assert await second.ensure(sleep(tmp_path))
    assert second.pid("sleep") != os.getpid()
    await second.stop("sleep", number=signal.SIGTERM, timeout_s=5)


async def test_stopping_kills_what_does_not_listen(supervisor: Supervisor, tmp_path: Path) -> None:
    spec = EngineSpec("deaf", ("sh", "-c", "trap '' TERM; touch deaf; while :; do sleep 1; done"), tmp_path)
    await supervisor.ensure(spec)
    pid = supervisor.pid("deaf")
    await until((tmp_path / "deaf").exists)

    await supervisor.stop("deaf", number=signal.SIGTERM, timeout_s=0.1)

    assert pid is not None
    assert run.start_time(pid) is None
    await supervisor.stop("deaf", number=signal.SIGTERM, timeout_s=0.1)  # gone is fine


async def test_a_signal_to_an_engine_that_does_not_run_is_an_error(supervisor: Supervisor) -> None:
    with pytest.raises(CommandFailedError, match="was not started"):
        supervisor.signal("nothing", signal.SIGHUP)


def test_a_log_beyond_its_limit_keeps_its_end_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "role" / "engine.out"
    path.parent.mkdir()
    with path.open("a") as writer:
        writer.write("old " * 100 + "the end")
        writer.flush()
        engines.bound_logs(tmp_path, limit=100)
        writer.write("and on")

    assert path.read_text() == "and on"
    assert (path.parent / "engine.out.1").read_text().endswith("the end")
