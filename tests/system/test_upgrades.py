"""A deployment is upgraded: its director is installed anew and restarted, and everything follows under load.

Where instances run the director's own installation, as on the local cloud, their daemons start what is there now;
on a provider, whose image is as old as it is, they fetch the director's version and become it.
"""

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import conpaas
from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.run import find
from tests.fakes.load import Load
from tests.fakes.played import played
from tests.fakes.stand import Stand, agents, is_running, manager, stand
from tests.fakes.waiting import until
from tests.system.test_life import archive, deploy, site

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find("haproxy") is None, reason="the engines of php are not installed"),
]

PAGE = {"index.php": "<?php session_start(); echo $_SESSION['n'] = ($_SESSION['n'] ?? 0) + 1;"}
ENGINES = ("haproxy", "nginx", "php-fpm")


class Installation:
    """The package, as a package manager replaces it: `path` leads to what is installed now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / "installed"
        self.put(conpaas.__version__)

    def put(self, version: str) -> None:
        """Install `version`: the code under test, which says that it is that."""
        source = Path(conpaas.__file__).parent
        target = self._folder / version / source.name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        init = target / "__init__.py"
        text = init.read_text()
        assert conpaas.__version__ in text
        init.write_text(text.replace(conpaas.__version__, version))
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(version)


@dataclass
class Upgradable:
    """A deployment whose director runs an installation of its own."""

    here: Stand
    installation: Installation

    async def upgrade(self, version: str) -> None:
        """Do as an administrator does."""
        await self.here.end_director()
        await asyncio.to_thread(self.installation.put, version)  # the load goes on meanwhile
        await self.here.start_director()
        assert (await self.here.client.version()).version == version

    def versions(self, node: NodeView) -> list[str]:
        """Return the versions that have served on a node, oldest first."""
        log = self.here.data / "clouds" / node.cloud / node.cloud_id / f"{node.kind}.log"
        ready = [line for line in log.read_text().splitlines() if re.search(r"\bready\b", line)]
        return [found[1] for line in ready if (found := re.search(r"""version["']?[=:]\s*["']?([0-9.]+)""", line))]

    def engines(self, nodes: Iterable[NodeView]) -> list[int]:
        """Return the process ids of all first processes of engines."""
        return [self.here.engines(node, name)[0] for node in nodes for name in ENGINES]

    async def until_all_are(self, version: str, view: ServiceView) -> None:
        """Wait until manager and agents of a service run a version, and it is all right."""
        nodes = [manager(view), *agents(view)]
        await until(lambda: [self.versions(node)[-1] for node in nodes] == [version] * len(nodes), timeout_s=120)
        await self.here.until(view.id, lambda now: is_running(now, len(agents(view))), what="running")


@pytest.fixture
def installation() -> Iterator[Installation]:
    """Give an installation in a folder that instances' users can enter."""
    with tempfile.TemporaryDirectory(prefix="cp-") as folder:
        Path(folder).chmod(0o755)
        yield Installation(Path(folder))


@asynccontextmanager
async def upgradable(cloud: str, installation: Installation, folder: Path) -> AsyncIterator[Upgradable]:
    env = {"PYTHONPATH": str(installation.path)}
    if cloud == "local":
        async with stand(CONPAAS_CLOUDS=json.dumps({"local": {"driver": "local"}}), **env) as here:
            yield Upgradable(here, installation)
    else:
        async with played(cloud, folder, env) as there:
            yield Upgradable(there.here, installation)


async def serving(here: Stand, folder: Path) -> ServiceView:
    """Return a service that runs on one node, and counts its visits."""
    service = await here.client.create(type="php", name="blog")
    await here.client.start(service.id, wait=True)
    await deploy(here, service.id, archive(folder / "1.tar.gz", PAGE))
    return await here.running(service.id, 1)


@pytest.mark.parametrize("cloud", ["local", "ec2"])
async def test_a_deployment_is_upgraded_twice_and_no_engine_and_no_visitor_notices(
    cloud: str, installation: Installation, tmp_path: Path
) -> None:
    async with upgradable(cloud, installation, tmp_path) as it:
        here, client = it.here, it.here.client
        view = await serving(here, tmp_path)
        nodes = [manager(view), *agents(view)]
        await it.until_all_are(conpaas.__version__, view)
        engines, daemons = it.engines(agents(view)), [here.daemon(node) for node in nodes]

        async with Load(*site(view.urls), clients=2) as load:
            for version in ("9.0.0", "9.0.1"):
                await it.upgrade(version)
                await it.until_all_are(version, view)
                assert it.engines(agents(view)) == engines
            # On a provider the process has become another program: its instance has seen no end.
            assert ([here.daemon(node) for node in nodes] == daemons) is (cloud != "local")
            await client.scale(view.id, {"php": 2}, wait=True)
            view = await here.running(view.id, 3)
            await it.until_all_are("9.0.1", view)
        assert load.failures == []
        first = {it.versions(node)[0] for node in agents(view)}
        await client.terminate(view.id, wait=True)

    image = {conpaas.__version__}
    assert first == (image | {"9.0.1"} if cloud == "local" else image)


async def test_an_upgrade_that_is_taken_back_leaves_what_has_followed_and_all_serves(
    installation: Installation, tmp_path: Path
) -> None:
    async with upgradable("ec2", installation, tmp_path) as it:
        await it.upgrade("9.0.0")
        view = await serving(it.here, tmp_path)
        await it.until_all_are("9.0.0", view)
        before = {node.id for node in view.nodes}

        async with Load(*site(view.urls), clients=2) as load:
            await it.upgrade("8.9.9")
            await it.here.client.scale(view.id, {"php": 1}, wait=True)
            view = await it.here.running(view.id, 2)
            [newcomer] = [node for node in agents(view) if node.id not in before]
            await until(lambda: it.versions(newcomer)[-1] == "8.9.9", timeout_s=120)
        assert load.failures == []
        assert [it.versions(node)[-1] for node in view.nodes if node.id in before] == ["9.0.0"] * 2
        await it.here.client.terminate(view.id, wait=True)
