"""A deployment on a provider that is played: every instance that the provider makes boots on this computer.

The director is a process of its own, and speaks to the provider as to the real one; what it hands to an instance goes
by way of the provider. That an image boots by itself is tested in `tests.system.test_image`.
"""

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp

from tests.fakes import cloud_ec2, cloud_opennebula
from tests.fakes.booter import Booter, booter, network
from tests.fakes.clouds import Harness
from tests.fakes.opennebula_server import FakeOpenNebula, FakeVm
from tests.fakes.stand import Stand, stand

_ROOM = 40
_ENDING_S = 60.0


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
async def _ec2(directory: Path, block: str) -> AsyncIterator[Provider]:
    async with cloud_ec2.harness(directory) as account:
        await account.use_loopback(block)
        account.proxy.quota = _ROOM

        async def terminate(vm: str) -> None:
            form = {"Action": "TerminateInstances", "Version": "2016-11-15", "InstanceId.1": vm}
            async with aiohttp.ClientSession() as session, session.post(account.proxy.url, data=form) as answer:
                assert answer.status == 200

        def attach(booter: Booter) -> None:
            account.on_boot = lambda vm: booter.boot(vm.id, vm.address, vm.user_data)
            account.on_end = booter.end

        yield Provider(account, {"driver": "ec2", **account.words}, terminate, attach)


class _Leasing(FakeOpenNebula):
    """Its network is one that nobody else on this computer uses."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self._free = map(str, list(IPv4Network(block))[10:250])

    def _lease(self, vm: FakeVm) -> None:
        super()._lease(vm)
        vm.vectors("NIC")[0]["IP"] = next(self._free)


@asynccontextmanager
async def _opennebula(directory: Path, block: str) -> AsyncIterator[Provider]:
    server = _Leasing(block)
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


PROVIDERS = {"ec2": _ec2, "opennebula": _opennebula}


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
            here.ending_s = _ENDING_S
            provider.attach(computer)
            yield Played(here, provider, computer, foreign)
