"""The system tests of a PHP service, on providers that are played: every instance that they make boots here.

The director is a process of its own, and speaks to the provider as to the real one; what it hands to an instance goes
by way of the provider. That an image boots by itself is tested in `test_image`.
"""

import asyncio
import base64
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import pytest

from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.run import find
from conpaas.core.states import NodeState
from tests.fakes import cloud_ec2, cloud_opennebula
from tests.fakes.booter import Booter, booter, network
from tests.fakes.clouds import Harness
from tests.fakes.load import Load
from tests.fakes.opennebula_server import FakeOpenNebula, FakeVm
from tests.fakes.stand import Stand, agents, is_running, manager, stand
from tests.fakes.waiting import until
from tests.system.test_kills import credits_are_exact
from tests.system.test_life import archive, deploy, site
from tests.system.test_life import test_a_service_lives_through_everything_under_load as live

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find("haproxy") is None, reason="the engines of php are not installed"),
]

ROOM = 40
ENDING_S = 10.0
NODES = 8
"""As the whole life takes on the local cloud: a manager, one node, three and two more, and one after the stop."""
PAGE = {"index.php": "<?php session_start(); echo 1, ' ', $_SERVER['SERVER_ADDR'];"}


@dataclass
class Provider:
    """A played provider, as a test needs it beside its harness."""

    account: Harness
    settings: Mapping[str, Any]
    """Of a cloud account of the director's."""
    terminate: Callable[[str], Awaitable[None]]
    """End an instance as somebody at the provider's console would: nobody tells the director."""
    attach: Callable[[Booter], None]
    """Have instances booted, and ended, by this one."""


@asynccontextmanager
async def ec2(directory: Path, block: str) -> AsyncIterator[Provider]:
    async with cloud_ec2.harness(directory) as account:
        await account.use_loopback(block)
        account.proxy.quota = ROOM

        async def terminate(vm: str) -> None:
            form = {"Action": "TerminateInstances", "Version": "2016-11-15", "InstanceId.1": vm}
            async with aiohttp.ClientSession() as session, session.post(account.proxy.url, data=form) as answer:
                assert answer.status == 200

        def attach(booter: Booter) -> None:
            account.on_boot = lambda vm: booter.boot(vm.id, vm.address, vm.user_data)
            account.on_end = booter.end

        yield Provider(account, {"driver": "ec2", **account.words}, terminate, attach)


class Leasing(FakeOpenNebula):
    """Its network is one that nobody else on this computer uses."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self._free = map(str, list(IPv4Network(block))[10:250])

    def _lease(self, vm: FakeVm) -> None:
        super()._lease(vm)
        vm.vectors("NIC")[0]["IP"] = next(self._free)


@asynccontextmanager
async def opennebula(directory: Path, block: str) -> AsyncIterator[Provider]:
    server = Leasing(block)
    await server.start()
    account = cloud_opennebula.OpenNebulaHarness(directory, server)

    async def terminate(vm: str) -> None:
        server.vm_action(account.user, None, "terminate-hard", int(vm))

    def attach(booter: Booter) -> None:
        account.user.quotas = []
        server.on_boot = lambda number, context: boot(booter, number, context)
        server.on_end = lambda number: booter.end(str(number))

    async def boot(booter: Booter, number: int, context: Mapping[str, str]) -> None:
        document = base64.b64decode(context["CONPAAS_CONTEXT_BASE64"]).decode()
        await booter.boot(str(number), context["ETH0_IP"], document)

    whole = {"driver": "opennebula", "endpoint": server.endpoint, "user": account.user.name}
    try:
        yield Provider(account, {**whole, "password": cloud_opennebula.PASSWORD, **account.settings}, terminate, attach)
    finally:
        await server.close()
    assert server.complaints == []


PROVIDERS = {"ec2": ec2, "opennebula": opennebula}


@dataclass
class Played:
    """A deployment on a played provider."""

    here: Stand
    provider: Provider
    booter: Booter
    foreign: str
    """Id of somebody else's instance in the same account."""

    async def nothing_is_left(self) -> None:
        """Assert that nothing of ours runs here or is at the provider, and that the foreign instance still runs."""
        await self.here.nothing_is_left()
        assert await self.provider.account.leftovers() == []
        assert await self.provider.account.lives(self.foreign)
        credits_are_exact(self.here.data / "director.sqlite")


@asynccontextmanager
async def played(
    name: str, directory: Path, env: Mapping[str, str] = MappingProxyType({}), **clouds: Any
) -> AsyncIterator[Played]:
    """Run a director with an account at a provider, and somebody else's instance in it; `env` is the director's."""
    async with network() as block, PROVIDERS[name](directory, block) as provider:
        foreign = await provider.account.make_foreign()
        accounts = {**clouds, name: dict(provider.settings)}
        default = next(iter(accounts))
        async with (
            stand(CONPAAS_CLOUDS=json.dumps(accounts), CONPAAS_DEFAULT_CLOUD=default, **env) as here,
            booter(here.data / "clouds" / name) as computer,
        ):
            here.ending_s = ENDING_S
            provider.attach(computer)
            yield Played(here, provider, computer, foreign)


@pytest.fixture(params=PROVIDERS)
async def there(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Played]:
    async with played(request.param, tmp_path) as one:
        yield one


async def test_a_service_lives_through_the_same_as_on_the_local_cloud(there: Played, tmp_path: Path) -> None:
    await live(there.here, tmp_path)
    assert len(there.booter.booted) == NODES
    assert (await there.here.client.me()).credits == 9999 - NODES
    await there.nothing_is_left()


async def test_who_is_killed_or_terminated_is_replaced(there: Played, tmp_path: Path) -> None:
    here, client = there.here, there.here.client
    service = await client.create(type="php", name="victim")
    await client.start(service.id, wait=True)
    await deploy(here, service.id, archive(tmp_path / "1.tar.gz", PAGE))
    view = await here.running(service.id, 1)

    async with Load(*site(view.urls), clients=2) as load:
        operation = await client.scale(service.id, {"php": 2})
        await until(lambda: len(there.booter.booted) > 2)
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
    await there.nothing_is_left()


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
        await there.nothing_is_left()
