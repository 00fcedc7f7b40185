"""The system tests of a PHP service, on providers that are played: every instance that they make boots here."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.run import find
from conpaas.core.states import NodeState
from tests.fakes.load import Load
from tests.fakes.played import PROVIDERS, Played, played
from tests.fakes.stand import agents, is_running, manager
from tests.fakes.waiting import until
from tests.system.test_kills import credits_are_exact
from tests.system.test_life import archive, deploy, site
from tests.system.test_life import test_a_service_lives_through_everything_under_load as live

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find("haproxy") is None, reason="the engines of php are not installed"),
]

NODES = 8
"""As the whole life takes on the local cloud: a manager, one node, three and two more, and one after the stop."""
PAGE = {"index.php": "<?php session_start(); echo 1, ' ', $_SERVER['SERVER_ADDR'];"}


@pytest.fixture(params=PROVIDERS)
async def there(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Played]:
    # Whose daemon is killed is started again, however long that takes: he is not to be given up.
    async with played(request.param, tmp_path, {"CONPAAS_TIMINGS": json.dumps({"node_silent_s": 60})}) as one:
        yield one


async def nothing_is_left(there: Played) -> None:
    """Assert that of a deployment nothing is left, and that everything was paid."""
    await there.nothing_is_left()
    credits_are_exact(there.here.data / "director.sqlite")


async def test_a_service_lives_through_the_same_as_on_the_local_cloud(there: Played, tmp_path: Path) -> None:
    await live(there.here, tmp_path)
    assert len(there.booter.booted) == NODES
    assert (await there.here.client.me()).credits == 9999 - NODES
    await nothing_is_left(there)


async def test_who_is_killed_or_terminated_is_replaced(there: Played, tmp_path: Path) -> None:
    here, client = there.here, there.here.client
    service = await client.create(type="php", name="victim")
    await client.start(service.id, wait=True)
    await deploy(here, service.id, archive(tmp_path / "1.tar.gz", PAGE))
    view = await here.running(service.id, 1)

    async with Load(*site(view.urls), clients=2) as load:
        operation = await client.scale(service.id, {"php": 2})
        await until(lambda: len(there.booter.booted) > 2, timeout_s=60)
        await here.end_director(signal.SIGKILL)
        await here.start_director()
        view = await here.running(service.id, 3)
        assert (await client.operation(operation.id)).state == "DONE"
        assert len(there.booter.booted) == 4, "an instance was made twice"

        front = next(node for node in agents(view) if "web" in node.roles)
        os.kill(here.daemon(front), signal.SIGKILL)
        lost = next(node for node in agents(view) if node.roles == ("php",))
        await there.provider.terminate(lost.cloud_id)
        view = await here.until(service.id, partial(is_without, lost, 3), what=f"{lost.id} replaced")
    assert load.failures == []
    assert sorted(node.roles for node in agents(view)) == [("php",), ("php",), ("proxy", "web")]

    before = manager(view)
    await there.provider.terminate(before.cloud_id)
    view = await here.until(service.id, partial(is_without, before, 3), what="another manager")
    await client.scale(service.id, {"php": -2}, wait=True)
    view = await here.running(service.id, 1)
    assert [node.id for node in agents(view)] == [front.id], "its daemon was killed, and started again by its instance"
    assert await pages(site(view.urls)) == {front.address}
    assert len(there.booter.booted) == 6
    await client.terminate(service.id, wait=True)
    await nothing_is_left(there)


def is_without(lost: NodeView, nodes: int, view: ServiceView) -> bool:
    """Tell whether a service runs with so many nodes and its manager, and `lost` is none of them."""
    living = [node for node in view.nodes if node.state is not NodeState.GONE]
    managers = [node.state for node in living if node.kind == "manager"]
    return is_running(view, nodes) and lost.id not in {node.id for node in living} and managers == [NodeState.SERVING]


async def pages(place: tuple[str, int], count: int = 20) -> set[str]:
    """Ask for the page, each time as a new visitor; return the addresses of those who answered."""
    return set(await asyncio.gather(*[page(*place) for _ in range(count)]))


async def page(host: str, port: int) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/") as answer:
        found = re.fullmatch(r"1 (127\.[0-9.]+)", await answer.text())
        assert found is not None
        return found[1]


async def test_one_service_has_nodes_on_this_computer_and_at_a_provider_at_once(tmp_path: Path) -> None:
    async with played("ec2", tmp_path, local={"driver": "local"}) as there:
        here, client = there.here, there.here.client
        service = await client.create(type="php", name="both", cloud="local")
        await client.start(service.id, wait=True)
        await deploy(here, service.id, archive(tmp_path / "1.tar.gz", PAGE))
        view = await here.running(service.id, 1)
        assert there.booter.booted == []

        async with Load(*site(view.urls), clients=2) as load:
            await client.scale(service.id, {"web": 1, "php": 1}, cloud="ec2", wait=True)
            view = await here.running(service.id, 3)
            places = {(node.cloud, *node.roles): node.address for node in agents(view)}
            assert set(places) == {("local", "proxy"), ("ec2", "web"), ("ec2", "php")}
            assert await pages(site(view.urls)) == {places["ec2", "php"]}
            await client.scale(service.id, {"web": -1, "php": -1}, cloud="ec2", wait=True)
            view = await here.running(service.id, 1)
        assert load.failures == []
        assert [node.cloud for node in agents(view)] == ["local"]
        assert await there.provider.account.leftovers() == []
        assert await pages(site(view.urls)) == {agents(view)[0].address}
        await client.terminate(service.id, wait=True)
        await nothing_is_left(there)
