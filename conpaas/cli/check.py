"""`conpaas quickstart --check`: the whole life of a service under load, and proof that nothing is left of it."""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from conpaas.cli import processes
from conpaas.cli.demo import CLOUD, HOST, Demo, page, site
from conpaas.cli.load import Load
from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import CommandFailedError, DeadlineError
from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.states import NodeState, ServiceState
from conpaas.sdk import Conpaas

NODES = 5
MORE = {"web": 2, "php": 2}
SECOND_VERSION = "2.0 (check)"
HEAL_TIMEOUT_S = 60.0
LEFT_TIMEOUT_S = 10.0
_BACKEND_ENGINES = ("php-fpm", "nginx")


class Check:
    """One run of the check, in a folder and on ports of its own."""

    def __init__(self, example: Path, say: Callable[[str], None]) -> None:
        self._example = example
        self._begun = SYSTEM_CLOCK.monotonic()
        self._print = say
        self._ports: list[tuple[str, int]] = []

    async def run(self) -> None:
        """Raise CommandFailedError if a request failed or anything is left; the folder is kept for a look then."""
        processes.adopt_orphans()
        folder = Path(tempfile.mkdtemp(prefix="conpaas-check-"))
        port = _free_port()
        self._ports.append((HOST, port))
        demo = Demo(folder / "data", port, say=self._say, env=_environment(folder / "tmp"))
        try:
            await self._live(demo)
            await demo.stop_director()
            await self._nothing_left(demo)
        except BaseException:
            self._print(f"what the daemons said is in {folder}")
            raise
        finally:
            processes.kill(processes.descendants(os.getpid()))
        shutil.rmtree(folder)
        self._say("no process, port or file is left")

    async def _live(self, demo: Demo) -> None:
        await demo.ensure_director()
        async with demo.connected() as client:
            service = await demo.deploy(client, self._example)
            url = urlsplit(site(service))
            self._ports.append((url.hostname or HOST, url.port or 80))
            await self._under_load(demo, client, service)
            await client.stop(service.id, wait=True)
            await self._is(client, service, ServiceState.STOPPED, nodes=0)
            self._say("stopped")
            await demo.terminate_all(client)
            if await client.services() or await client.instances():
                raise CommandFailedError("services or instances are left after terminate")

    async def _under_load(self, demo: Demo, client: Conpaas, service: ServiceView) -> None:
        url = site(service)
        async with Load(url) as load:
            await client.scale(service.id, MORE, wait=True)
            await self._is(client, service, ServiceState.RUNNING, nodes=NODES)
            self._say(f"scaled to {NODES} nodes")
            await self._second_version(demo, client, service)
            await self._kill_backend(demo.data_dir / "clouds" / CLOUD, client, service)
            await client.scale(service.id, {role: -count for role, count in MORE.items()}, wait=True)
            await self._is(client, service, ServiceState.RUNNING, nodes=1)
            self._say("scaled back to 1 node")
        if load.failed or not load.requests:
            seen = "\n".join(load.failures)
            raise CommandFailedError(f"{load.failed} of {load.requests} requests failed:\n{seen}", value=load.failed)
        self._say(f"{load.requests} requests, none failed, {len(load.backends)} backends answered")

    async def _second_version(self, demo: Demo, client: Conpaas, service: ServiceView) -> None:
        with tempfile.TemporaryDirectory(prefix="conpaas-") as folder:
            copy = Path(folder) / "second"
            shutil.copytree(self._example, copy)
            (copy / "version.txt").write_text(SECOND_VERSION, encoding="utf-8")
            operation = await demo.activate(client, service, copy)
        if operation is not None:
            await client.wait(operation)
        if SECOND_VERSION not in await page(site(service)):
            raise CommandFailedError("the second code version does not serve after its activation")
        self._say("second code version active")

    async def _kill_backend(self, cloud: Path, client: Conpaas, service: ServiceView) -> None:
        """Kill the engines of one php node; return when as many nodes serve as before."""
        nodes = (await client.service(service.id)).nodes
        node = next(node for node in nodes if node.kind == "agent" and node.roles == ("php",))
        killed = _engines(cloud, node)
        if not killed:
            raise CommandFailedError(f"no engine was found on node {node.id}", value=node.id)
        processes.kill(killed)
        self._say(f"killed {len(killed)} processes of backend {node.id}")
        pids = {process.pid for process in killed}

        async def healed() -> bool | None:
            now = await client.service(service.id)
            still = [one for one in _serving(now) if one.id == node.id]
            replaced = not still or {one.pid for one in _engines(cloud, still[0])} - pids
            return True if replaced and _so(now, ServiceState.RUNNING, NODES) else None

        await tasks.wait_for(healed, timeout_s=HEAL_TIMEOUT_S, what="healing", clock=SYSTEM_CLOCK, period_s=0.2)
        self._say("backend is back")

    async def _is(self, client: Conpaas, service: ServiceView, state: ServiceState, *, nodes: int) -> None:
        async def so() -> ServiceView | None:
            now = await client.service(service.id)
            return now if _so(now, state, nodes) else None

        await tasks.wait_for(so, timeout_s=HEAL_TIMEOUT_S, what=f"{state} with {nodes} nodes", clock=SYSTEM_CLOCK)

    async def _nothing_left(self, demo: Demo) -> None:
        async def none_left() -> bool | None:
            return None if processes.descendants(os.getpid()) else True

        try:
            await tasks.wait_for(none_left, timeout_s=LEFT_TIMEOUT_S, what="end of processes", clock=SYSTEM_CLOCK)
        except DeadlineError as exc:
            left = ", ".join(f"{one.pid} {one.name}" for one in processes.descendants(os.getpid()))
            raise CommandFailedError(f"processes are left: {left}") from exc
        for host, port in self._ports:
            if _listens(host, port):
                raise CommandFailedError(f"something still listens at {host}:{port}", value=port)
        instances = demo.data_dir / "clouds" / CLOUD
        left_over = [path for path in instances.rglob("*") if _of_an_instance(path, instances)]
        left_over += (demo.data_dir.parent / "tmp").iterdir()
        if left_over:
            raise CommandFailedError(f"files are left: {', '.join(map(str, left_over))}")

    def _say(self, text: str) -> None:
        self._print(f"{SYSTEM_CLOCK.monotonic() - self._begun:6.1f} s  {text}")


def _serving(service: ServiceView) -> list[NodeView]:
    return [node for node in service.nodes if node.kind == "agent" and node.state is NodeState.SERVING]


def _so(service: ServiceView, state: ServiceState, nodes: int) -> bool:
    agents = [node for node in service.nodes if node.kind == "agent" and node.state is not NodeState.GONE]
    return service.state is state and len(agents) == len(_serving(service)) == nodes


def _engines(cloud: Path, node: NodeView) -> list[processes.Running]:
    """Return the engines of a node, which descend from the first process of its instance."""
    first = json.loads((cloud / ".records" / f"{node.cloud_id}.pid").read_text(encoding="utf-8"))
    return [one for one in processes.descendants(first["pid"]) if one.name.startswith(_BACKEND_ENGINES)]


def _of_an_instance(path: Path, cloud: Path) -> bool:
    """Tell whether a file of the cloud's folder is an instance's: its own folder, or a record of it."""
    place = path.relative_to(cloud).parts
    return place[0] != ".records" or path.suffix in {".json", ".pid"}


def _environment(tmp: Path) -> dict[str, str]:
    """Return an environment for a director that has nothing to do with the user's own, and temporary files we see."""
    tmp.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith("CONPAAS_")}
    return {**own, "TMPDIR": str(tmp), "CONPAAS_INSTANCES_PORT": "0", "CONPAAS_SSH_PORT": "0"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
