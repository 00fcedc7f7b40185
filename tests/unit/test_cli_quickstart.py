"""`conpaas quickstart`: its parts, and (as system tests) the whole of it with real engines."""

import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner

from conpaas.cli import processes
from conpaas.cli.demo import Demo, Started
from conpaas.cli.load import Load
from conpaas.cli.root import root
from conpaas.core import run, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import BadInputError, CommandFailedError, ConflictError, NotFoundError
from tests.fakes.api import FakeApi, serving
from tests.fakes.ports import free_port

ROOT = Path(__file__).parents[2]
Answer = Callable[[int], web.StreamResponse]


@asynccontextmanager
async def site(answer: Answer) -> AsyncIterator[str]:
    """Serve what `answer` makes of the number of the request."""
    numbers = itertools.count(1)

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.path != "/":
            return web.Response(text="body {}")
        return answer(next(numbers))

    app = web.Application()
    app.router.add_get("/{path:.*}", serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def page(visits: int) -> web.Response:
    return web.Response(text=f'<dd id="backend">127.0.0.1</dd> <dd id="visits">{visits}</dd>')


async def until(so: Callable[[], bool]) -> None:
    async def check() -> bool | None:
        return so() or None

    await tasks.wait_for(check, timeout_s=45, what="it", clock=SYSTEM_CLOCK)


async def visit(answer: Answer, requests: int = 10) -> Load:
    async with site(answer) as url, Load(url, visitors=1, pause_s=0) as load:
        await until(lambda: load.requests >= requests)
    return load


async def test_a_site_that_always_answers_fails_no_request() -> None:
    load = await visit(page)

    assert load.requests >= 10
    assert load.failed == 0
    assert set(load.backends) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (lambda: web.Response(status=503, text="no server"), "503: no server"),
        (lambda: web.Response(text="It works!"), "not the page"),
        (lambda: page(1), "the session was lost"),
    ],
)
async def test_one_wrong_answer_is_noticed(broken: Callable[[], web.Response], what: str) -> None:
    load = await visit(lambda number: broken() if number == 3 else page(number))

    assert load.failed == 1
    assert what in load.failures[0]


async def test_an_error_under_load_stays_what_it_is() -> None:
    async with site(page) as url:
        with pytest.raises(CommandFailedError, match="mine"):
            async with Load(url):
                raise CommandFailedError("mine")


async def test_descendants_are_found_and_killed(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])"
    pid = run.spawn([sys.executable, "-c", script], cwd=tmp_path, env=os.environ, log=tmp_path / "log")
    started = run.start_time(pid)
    assert started is not None
    try:
        await until(lambda: bool(processes.descendants(pid)))
        found = processes.descendants(pid)
        assert found[0].parent == pid
        assert pid in {process.pid for process in processes.descendants(os.getpid())}

        processes.kill(found)

        assert await run.wait_gone(pid, started, 45)  # it waited for its child
        assert processes.descendants(pid) == []
    finally:
        run.signal_group(pid, signal.SIGKILL)


# -- the director of a folder


def demo(tmp_path: Path, port: int = 9) -> Demo:
    return Demo(tmp_path / "data", port, say=lambda _: None)


def test_nothing_is_known_of_an_empty_folder(tmp_path: Path) -> None:
    assert demo(tmp_path).known() is None


async def test_damaged_notes_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quickstart.json").write_text("[]")

    with pytest.raises(BadInputError, match="damaged"):
        demo(tmp_path).known()


async def test_the_director_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    async with serving(FakeApi()) as other:
        with pytest.raises(ConflictError, match="another director answers"):
            await demo(tmp_path, int(other.url.rpartition(":")[2])).ensure_director()

    assert not (tmp_path / "data").exists()


async def test_a_director_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    broken = Demo(
        tmp_path / "data", free_port(), say=lambda _: None, env={**os.environ, "CONPAAS_DEFAULT_CLOUD": "nowhere"}
    )

    with pytest.raises(CommandFailedError, match="the default cloud 'nowhere' is not configured"):
        await broken.ensure_director()

    known = broken.known()
    assert known is not None
    assert not known.alive
    assert stat.S_IMODE(broken.file.stat().st_mode) == 0o600


def test_a_process_of_the_same_number_is_not_the_director() -> None:
    assert not Started("http://127.0.0.1:9", "password", pid=os.getpid(), start=1).alive


def test_down_without_a_director_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    result = CliRunner().invoke(root, ["quickstart", "--down", "--data-dir", str(tmp_path / "data")])

    assert result.exit_code == 1
    assert "no director was started" in result.stderr


async def test_without_notes_nobody_can_log_in(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no director was started"):
        async with demo(tmp_path).connected():
            pass


# -- the whole


def conpaas(tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("CONPAAS_")}
    own |= {"XDG_CONFIG_HOME": str(tmp_path / "config"), **env}
    argv = [sys.executable, "-m", "conpaas", *words]
    return subprocess.run(argv, cwd=ROOT, env=own, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.system
@pytest.mark.timeout(240)
def test_the_check_passes_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()

    done = conpaas(tmp_path, "quickstart", "--check", TMPDIR=str(tmp_path / "tmp"))

    assert done.returncode == 0, done.stderr
    assert re.search(r"[1-9]\d+ requests, none failed", done.stderr)
    assert "no process, port or file is left" in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "config").exists()


@pytest.mark.system
@pytest.mark.timeout(240)
def test_quickstart_finds_what_runs_even_after_the_death_of_its_director(tmp_path: Path) -> None:
    data = tmp_path / "data"
    words = ("quickstart", "--data-dir", str(data), "--port", str(free_port()), "--json")
    env = {"CONPAAS_INSTANCES_PORT": str(free_port()), "CONPAAS_SSH_PORT": "0"}
    try:
        first = conpaas(tmp_path, *words, **env)
        assert first.returncode == 0, first.stderr
        known = json.loads((data / "quickstart.json").read_text())
        os.kill(known["pid"], signal.SIGKILL)

        second = conpaas(tmp_path, *words, **env)

        assert second.returncode == 0, second.stderr
        assert json.loads(second.stdout) == json.loads(first.stdout)
        with urllib.request.urlopen(json.loads(second.stdout)["site"], timeout=60) as answer:
            assert b"Guest book" in answer.read()
        assert "guestbook" in conpaas(tmp_path, "ls", **env).stdout
    finally:
        down = conpaas(tmp_path, "quickstart", "--data-dir", str(data), "--down", "--yes", **env)
    assert down.returncode == 0, down.stderr
    assert [path.name for path in (data / "clouds" / "local").iterdir()] == [".records"]
    assert str(data) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
