"""A daemon becomes another version of itself, in real processes: bundles of our code with a daemon of the test's."""

import asyncio
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import conpaas
from conpaas.core import _upgrade_start, bundle, run
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import BadArchiveError, BadInputError, PeerError
from conpaas.core.upgrade import Upgrader
from tests.fakes.waiting import until

PACKAGE = Path(conpaas.__file__).parent
DAEMON = """
import asyncio, json, os, sys
from pathlib import Path
from conpaas import __version__
from conpaas.core import upgrade
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.engines import Supervisor
from conpaas.core.files import write_atomically
from conpaas.core.service import EngineSpec

def main():
    home = Path(sys.argv[sys.argv.index("--context") + 1]).parent
    upgrade.begin(home)
    BEHAVIOUR
    argv = asyncio.run(serve(home))
    if argv:
        upgrade.become(argv)

async def serve(home):
    async def download(sha256):
        yield (home / "bundles" / sha256).read_bytes()
    upgrader = upgrade.Upgrader(home, download=download, clock=SYSTEM_CLOCK)
    supervisor = Supervisor(home / "engines", home / "logs")
    new = await supervisor.ensure(EngineSpec("engine", ("/bin/sleep", "1000"), home))
    upgrader.settle()
    while True:
        state = {"version": __version__, "running": upgrader.running, "pid": os.getpid(),
                 "engine": supervisor.pid("engine"), "started": new, "argv": sys.orig_argv}
        write_atomically(home / "state.json", json.dumps(state))
        if (home / "wanted").exists():
            wanted = (home / "wanted").read_text()
            if await upgrader.prepare(wanted):
                await upgrader.calm((home / "busy").exists)
                argv = upgrader.arm(wanted)
                supervisor.close()
                return argv
            write_atomically(home / "refused", upgrader.failure(wanted))
        await SYSTEM_CLOCK.sleep(0.02)

if __name__ == "__main__":
    main()
"""


def make_bundle(folder: Path, version: str, *, behaviour: str = "pass", trial_s: int = 300, **manifest: str) -> str:
    """Write a bundle of our code, as `version`, whose daemon is the test's; return its hash."""
    members = {
        bundle.MANIFEST: json.dumps(
            {"version": version, "python": sys.implementation.cache_tag, "machine": os.uname().machine, **manifest}
        ),
        "__main__.py": bundle._MAIN,
        "conpaas/__init__.py": f"__version__ = {version!r}\n",
        "conpaas/__main__.py": DAEMON.replace("BEHAVIOUR", behaviour),
        "conpaas/agent/__init__.py": "",
        "conpaas/agent/app.py": "",
        "conpaas/manager/__init__.py": "",
        "conpaas/manager/app.py": "import nothing_of_that_name" if behaviour == "import" else "",
    }
    for path in (PACKAGE / "core").rglob("*.py"):
        members[f"conpaas/{path.relative_to(PACKAGE)}"] = path.read_text()
    start = "conpaas/core/_upgrade_start.py"
    members[start] = members[start].replace("TRIAL_S = 300", f"TRIAL_S = {trial_s}")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    sha256 = hashlib.sha256(packed.getvalue()).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / sha256).write_bytes(packed.getvalue())
    return sha256


class Machine:
    """A daemon's home, and a supervisor that starts the daemon again whenever it ends."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir()
        (home / "context.json").write_text("{}")

    @contextmanager
    def supervised(self, *command: str) -> Iterator[None]:
        again = 'while :; do "$@"; echo "$?" >> ends; done'
        argv = ["/bin/sh", "-c", again, "sh", *command, "run", "agent", "--context", str(self.home / "context.json")]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE.parent)}
        pid = run.spawn(argv, cwd=self.home, env=env, log=self.home / "log")
        try:
            yield
        finally:
            run.signal_group(pid, signal.SIGKILL)
            run.reap(pid)
            if self.state:
                run.signal_group(self.state["engine"], signal.SIGKILL)

    @property
    def state(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.home / "state.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def install(self, version: str) -> str:
        sha256 = make_bundle(self.home / "bundles", version)
        (self.home / "versions").mkdir()
        bundle.unpack(self.home / "bundles" / sha256, self.home / "versions", sha256)
        _upgrade_start.choose(self.home / "versions", sha256)
        return sha256

    def want(self, sha256: str) -> None:
        (self.home / "new").write_text(sha256)
        (self.home / "new").rename(self.home / "wanted")

    async def runs(self, version: str) -> dict[str, Any]:
        try:
            await until(lambda: self.state.get("version") == version)
        except TimeoutError:
            pytest.fail((self.home / "log").read_text())
        return self.state

    @property
    def ends(self) -> list[str]:
        path = self.home / "ends"
        return path.read_text().split() if path.exists() else []

    @property
    def refusal(self) -> str:
        path = self.home / "refused"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home")


@pytest.fixture
def current(machine: Machine) -> tuple[str, ...]:
    return (sys.executable, "-I", str(machine.home / "versions" / "current"))


async def test_a_newer_version_takes_over_in_the_same_process_and_the_engine_stays(
    machine: Machine, current: tuple[str, ...]
) -> None:
    machine.install("1.0")
    with machine.supervised(*current):
        before = await machine.runs("1.0")
        newer = make_bundle(machine.home / "bundles", "2.0")
        machine.want(newer)
        after = await machine.runs("2.0")

        assert after["pid"] == before["pid"]
        assert after["engine"] == before["engine"]
        assert not after["started"]
        assert after["running"] == newer
        assert after["argv"][-4:] == before["argv"][-4:]
        assert machine.ends == []
        assert not (machine.home / "versions" / "trial.json").exists()


async def test_an_engine_that_was_adopted_is_still_a_child_and_comes_back_when_it_dies(
    machine: Machine, current: tuple[str, ...]
) -> None:
    machine.install("1.0")
    with machine.supervised(*current):
        await machine.runs("1.0")
        machine.want(make_bundle(machine.home / "bundles", "2.0"))
        after = await machine.runs("2.0")
        os.kill(after["engine"], signal.SIGKILL)

        await until(lambda: machine.state["engine"] not in {None, after["engine"]})
        assert run.start_time(after["engine"]) is None  # reaped: no zombie is left


async def test_the_newer_version_is_what_a_restart_starts(machine: Machine, current: tuple[str, ...]) -> None:
    machine.install("1.0")
    with machine.supervised(*current):
        await machine.runs("1.0")
        machine.want(make_bundle(machine.home / "bundles", "2.0"))
        first = await machine.runs("2.0")
        os.kill(first["pid"], signal.SIGKILL)

        await until(lambda: machine.state["pid"] != first["pid"])
        assert machine.state["version"] == "2.0"
        assert machine.state["engine"] == first["engine"]


async def test_a_version_that_ends_before_it_serves_is_given_up_for_good(
    machine: Machine, current: tuple[str, ...]
) -> None:
    old = machine.install("1.0")
    with machine.supervised(*current):
        before = await machine.runs("1.0")
        bad = make_bundle(machine.home / "bundles", "2.0", behaviour="sys.exit(7)")
        machine.want(bad)
        await until(lambda: machine.refusal)

        assert "did not serve" in machine.refusal
        assert machine.ends == ["7"]  # one start, no loop
        assert machine.state["running"] == old
        assert machine.state["engine"] == before["engine"]
        assert _upgrade_start.current(machine.home / "versions") == old


async def test_a_version_that_hangs_is_ended_and_given_up(machine: Machine, current: tuple[str, ...]) -> None:
    old = machine.install("1.0")
    with machine.supervised(*current):
        await machine.runs("1.0")
        machine.want(make_bundle(machine.home / "bundles", "2.0", behaviour="import time; time.sleep(600)", trial_s=1))
        await until(lambda: machine.refusal)

        assert machine.ends == [str(128 + signal.SIGALRM)]
        assert machine.state["running"] == old


async def test_a_version_that_cannot_be_imported_is_never_started(machine: Machine, current: tuple[str, ...]) -> None:
    machine.install("1.0")
    with machine.supervised(*current):
        before = await machine.runs("1.0")
        bad = make_bundle(machine.home / "bundles", "2.0", behaviour="import")
        machine.want(bad)
        await until(lambda: machine.refusal)

        assert "nothing_of_that_name" in machine.refusal
        assert machine.state["pid"] == before["pid"]
        assert not (machine.home / "versions" / bad).exists()


async def test_nothing_is_taken_while_something_is_being_applied(machine: Machine, current: tuple[str, ...]) -> None:
    machine.install("1.0")
    (machine.home / "busy").touch()
    with machine.supervised(*current):
        await machine.runs("1.0")
        newer = make_bundle(machine.home / "bundles", "2.0")
        machine.want(newer)
        await until((machine.home / "versions" / newer / "__main__.py").exists)
        assert machine.state["version"] == "1.0"
        assert _upgrade_start.current(machine.home / "versions") != newer

        (machine.home / "busy").unlink()
        await machine.runs("2.0")


async def test_an_installation_becomes_a_bundle_and_comes_back_if_that_fails(machine: Machine) -> None:
    daemon = machine.home / "installed.py"
    daemon.write_text(DAEMON.replace("BEHAVIOUR", "pass"))
    with machine.supervised(sys.executable, str(daemon)):
        before = await machine.runs(conpaas.__version__)
        assert before["running"] == ""
        machine.want(make_bundle(machine.home / "bundles", "9.0", behaviour="sys.exit(1)"))
        await until(lambda: machine.refusal)
        assert machine.state["version"] == conpaas.__version__
        assert _upgrade_start.current(machine.home / "versions") == ""

        machine.want(make_bundle(machine.home / "bundles", "10.0"))
        after = await machine.runs("10.0")
        assert after["engine"] == before["engine"]
        os.kill(after["pid"], signal.SIGKILL)  # the supervisor starts the installation, which knows better
        await until(lambda: machine.state["pid"] != after["pid"])
        assert machine.state["version"] == "10.0"


# What is refused, without a process


async def content(path: Path) -> AsyncIterator[bytes]:
    yield path.read_bytes()


def upgrader(home: Path) -> Upgrader:
    return Upgrader(home, download=lambda sha256: content(home / "bundles" / sha256), clock=SYSTEM_CLOCK)


async def test_what_is_made_for_another_python_is_refused_once_and_for_all(machine: Machine) -> None:
    alien = make_bundle(machine.home / "bundles", "2.0", python="cpython-399")

    assert not await upgrader(machine.home).prepare(alien)
    assert "cpython-399" in upgrader(machine.home).failure(alien)
    shutil.rmtree(machine.home / "bundles")
    assert not await upgrader(machine.home).prepare(alien)  # not fetched again


async def test_a_bundle_that_was_damaged_on_its_way_is_fetched_again(machine: Machine) -> None:
    good = make_bundle(machine.home / "bundles", "2.0")
    whole = (machine.home / "bundles" / good).read_bytes()
    (machine.home / "bundles" / good).write_bytes(whole[:-7])

    with pytest.raises(BadInputError, match="instead of"):
        await upgrader(machine.home).prepare(good)
    assert [path.name for path in (machine.home / "versions").iterdir()] == []
    (machine.home / "bundles" / good).write_bytes(whole)
    assert await upgrader(machine.home).prepare(good)


async def test_a_download_that_breaks_leaves_nothing(machine: Machine) -> None:
    async def broken(sha256: str) -> AsyncIterator[bytes]:
        yield b"some"
        raise PeerError("gone")

    with pytest.raises(PeerError):
        await Upgrader(machine.home, download=broken, clock=SYSTEM_CLOCK).prepare("a" * 64)
    assert [path.name for path in (machine.home / "versions").iterdir()] == []


async def test_a_hash_that_is_a_path_is_refused(machine: Machine) -> None:
    with pytest.raises(BadArchiveError):
        await upgrader(machine.home).prepare("../../etc")


async def test_only_this_version_and_the_one_before_are_kept(machine: Machine) -> None:
    versions = [make_bundle(machine.home / "bundles", f"{number}.0") for number in range(3)]
    (machine.home / "versions").mkdir()
    for sha256 in versions:
        await asyncio.to_thread(bundle.unpack, machine.home / "bundles" / sha256, machine.home / "versions", sha256)
    _upgrade_start.choose(machine.home / "versions", versions[1])
    mine = upgrader(machine.home)
    mine.running = versions[1]
    mine.arm(versions[2])
    mine.running = versions[2]
    mine.settle()

    assert {path.name for path in (machine.home / "versions").iterdir()} == {"current", *versions[1:]}
