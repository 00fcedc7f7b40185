"""A director in a process of its own, with the local cloud: what system tests kill, restart and look at."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from conpaas.cli import processes
from conpaas.cloud import _local_machine as machine
from conpaas.core import run, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import ConpaasError, PeerError
from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.states import NodeState, ServiceState
from conpaas.sdk import Conpaas
from tests.fakes.ports import free_port

PASSWORD = "correct horse battery"
TIMEOUT_S = 120.0
PATIENT = {"CONPAAS_MANAGER_SILENT_S": "90", "CONPAAS_TIMINGS__NODE_SILENT_S": "60"}
"""Settings for tests in which nobody is to be replaced: a busy machine holds daemons up for a while."""


class Stand:
    """One deployment. `director` is its process id; `client` an administrator's client."""

    client: Conpaas

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.port = free_port()
        self.director = 0
        self.ending_s = 0.0
        """How long a cloud may take to end what it has promised to end."""
        self._started = 0
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CONPAAS_")},
            "CONPAAS_INSTANCES_PORT": str(free_port()),
            "CONPAAS_SSH_PORT": "0",
            "CONPAAS_ADMIN_PASSWORD": PASSWORD,
            "CONPAAS_RECONCILE_PERIOD_S": "1",
            **settings,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cloud(self) -> Path:
        return self.data / "clouds" / "local"

    async def start_director(self) -> None:
        """Start the director, and return when it answers."""
        argv = [sys.executable, "-m", "conpaas", "run", "director"]
        argv += ["--data-dir", str(self.data), "--port", str(self.port)]
        log = self.directory / "director.log"
        self.director = run.spawn(argv, cwd=self.directory, env=self._env, log=log)
        self._started = run.start_time(self.director) or 0
        async with client_at(self.url) as probe:

            async def answers() -> bool | None:
                assert run.alive(self.director, self._started), log.read_text()
                try:
                    await probe.version()
                except PeerError:
                    return None
                return True

            await tasks.wait_for(answers, timeout_s=TIMEOUT_S, what="the director", clock=SYSTEM_CLOCK)

    async def end_director(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the director, gracefully or not."""
        with suppress(ProcessLookupError):
            os.kill(self.director, number)
        assert await run.wait_gone(self.director, self._started, 60)

    # -- looking ----------------------------------------------------------------------------------------------------

    def daemon(self, node: NodeView) -> int:
        """Return the process id of the manager or agent on a node: its first process starts that before all else."""
        init = self.init(node)
        return _oldest_first([one for one in processes.descendants(init) if one.parent == init])[0]

    def init(self, node: NodeView) -> int:
        """Return the process id of a node's first process."""
        return _first(self.data / "clouds" / node.cloud / ".records" / f"{node.cloud_id}.pid").pid

    def engines(self, node: NodeView, name: str) -> list[int]:
        """Return the process ids of a node's processes of that name, the oldest first."""
        return _oldest_first([one for one in processes.descendants(self.init(node)) if one.name.startswith(name)])

    async def until(
        self, service: str, check: Callable[[ServiceView], Any], *, what: str, timeout_s: float = TIMEOUT_S
    ) -> ServiceView:
        """Wait until `check` holds of a service; a director that is away is waited for."""

        async def holds() -> ServiceView | None:
            try:
                view = await self.client.service(service)
            except PeerError:
                return None
            return view if check(view) else None

        try:
            return await tasks.wait_for(holds, timeout_s=timeout_s, what=what, clock=SYSTEM_CLOCK)
        except ConpaasError:
            raise AssertionError(f"{what}: {await self.client.service(service)}") from None

    async def running(self, service: str, nodes: int) -> ServiceView:
        """Wait until a service runs with so many nodes, all serving."""
        return await self.until(service, lambda view: is_running(view, nodes), what=f"{nodes} nodes running")

    async def nothing_is_left(self) -> None:
        """Assert that no cloud holds an instance: no process, no folder, no record."""

        async def ended() -> bool | None:
            return None if any((self.data / "clouds").glob("*/.records/*.json")) else True

        if self.ending_s:
            await tasks.wait_for(ended, timeout_s=self.ending_s, what="the end of instances", clock=SYSTEM_CLOCK)
        for cloud in (self.data / "clouds").iterdir():
            self.nothing_is_left_on(cloud.name)

    def nothing_is_left_on(self, cloud: str) -> None:
        """Assert that one cloud holds no instance."""
        home = self.data / "clouds" / cloud
        records = [path for path in (home / ".records").glob("*") if path.suffix in {".json", ".pid"}]
        folders = [path for path in home.glob("*") if path.is_dir() and path.name not in {".records", ".volumes"}]
        assert records == []
        assert folders == []
        assert self.processes(home) == []

    def processes(self, home: Path) -> list[str]:
        """Return the command lines of everything that runs in a cloud's folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if f"{home}/" in words:
                    found.append(f"{path.name} {words}")
        return found


def _first(record: Path) -> machine.First:
    return machine.First(**json.loads(record.read_text()))


def _oldest_first(found: list[processes.Running]) -> list[int]:
    """Return the ids of those that live, by age: a younger process may have a lower id, for the ids begin anew."""
    ages = [(started, one.pid) for one in found if (started := run.start_time(one.pid)) is not None]
    return [pid for _, pid in sorted(ages, key=lambda age: age[0])]  # of the same moment: the parent is found first


def agents(view: ServiceView) -> list[NodeView]:
    return [node for node in view.nodes if node.kind == "agent" and node.state is not NodeState.GONE]


def manager(view: ServiceView) -> NodeView:
    return next(node for node in view.nodes if node.kind == "manager" and node.state is not NodeState.GONE)


def is_running(view: ServiceView, nodes: int) -> bool:
    """Tell whether a service runs, with so many nodes, all serving, and nothing under way."""
    return (
        view.state is ServiceState.RUNNING
        and [node.state for node in agents(view)] == [NodeState.SERVING] * nodes
        and view.operation is None
    )


@asynccontextmanager
async def client_at(url: str, token: str | None = None) -> AsyncIterator[Conpaas]:
    client = Conpaas(url, token)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def stand(**settings: str) -> AsyncIterator[Stand]:
    """Run a deployment, in a folder that its instances' users can enter, until the end of the block."""
    directory = Path(tempfile.mkdtemp(prefix="cp-"))
    directory.chmod(0o755)
    one = Stand(directory, settings)
    await one.start_director()
    try:
        async with client_at(one.url) as anonymous:
            session = await anonymous.login("admin", PASSWORD)
        async with client_at(one.url, session.token.get_secret_value()) as one.client:
            yield one
            with suppress(PeerError):
                await asyncio.gather(
                    *[one.client.terminate(view.id, wait=True) for view in await one.client.services()]
                )
    finally:
        await one.end_director()
        for record in (one.data / "clouds").glob("*/.records/*.pid"):
            with suppress(FileNotFoundError):
                await asyncio.to_thread(machine.kill, _first(record))  # and wait: it writes no more into what we remove
        shutil.rmtree(directory)
