"""From "the cloud says that it runs" to "it serves": what we add to the boot of an instance, on each cloud.

Everywhere a node more is asked of a running PHP service. The providers `ec2` and `opennebula` are played: their
instances are processes of this computer, so that all of the time is ours. A virtual machine of `qemu` is compared with
the image's own boot: until systemd starts the first program of ours.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.goals import Measured
from conpaas.core.messages.model import NodeView
from conpaas.core.states import NodeState
from tests.fakes.built_image import built_image
from tests.fakes.played import PROVIDERS, played
from tests.fakes.stand import Stand, agents, stand
from tests.fakes.waiting import until

_POLL_S = 0.005
_DEADLINE_S = 300.0
_FIRST_WORDS = b"conpaas-boot:"


async def local(b: Bench) -> Mapping[str, Measured]:
    """Add nodes on the local cloud; one runs as soon as it is asked for."""
    async with stand(CONPAAS_CLOUDS=json.dumps({"local": {"driver": "local"}})) as here:
        growth = await _Growth.of(here, "local")
        times = []
        for _ in range(b.effort.repetitions):
            began = time.monotonic()
            _, served = await growth.add()
            times.append(served - began)
    return _result(b, "local", times)


async def providers(b: Bench) -> Mapping[str, Measured]:
    """Add nodes at providers that are played; one runs when they begin to boot it."""
    measured: dict[str, Measured] = {}
    for name in PROVIDERS:
        async with played(name, b.new_folder(name)) as there:
            ran: dict[str, float] = {}
            boot = there.booter.boot

            async def noted(vm: str, *words: str, ran: dict[str, float] = ran, boot: Any = boot) -> None:
                ran[vm] = time.monotonic()
                await boot(vm, *words)

            there.booter.boot = noted  # type: ignore[method-assign]
            growth = await _Growth.of(there.here, name)
            times = []
            for _ in range(b.effort.repetitions):
                node, served = await growth.add()
                times.append(served - ran[node.cloud_id])
            measured |= _result(b, name, times)
    return measured


async def machines(b: Bench) -> Mapping[str, Measured]:
    """Add virtual machines on this computer, one from its power button on, and one from a saved state."""
    measured: dict[str, Measured] = {}
    for name, warm in (("qemu", False), ("qemu_warm", True)):
        clouds = {"local": {"driver": "local"}, "vms": {"driver": "qemu", "image": str(built_image()), "warm": warm}}
        async with stand(CONPAAS_CLOUDS=json.dumps(clouds)) as here:
            growth = await _Growth.of(here, "vms", warm=warm)
            node, served = await growth.add()
            own, ran = growth.spoke[node.id], growth.ran[node.id]
            measured |= _result(b, name, [served - ran], None if warm else own - ran)
    return measured


def _result(b: Bench, cloud: str, times: list[float], floor: float | None = None) -> Mapping[str, Measured]:
    value = statistics.median(times)
    own = "" if floor is None else f", {floor:.2f} s of it the image's own boot"
    b.say(f"{cloud}: from running to serving {value:.2f} s{own} ({len(times)} times)")
    return {f"boot_{cloud}": Measured(value, floor)}


class _Growth:
    """A service of one node on the first cloud, that gets more of them on `cloud` and loses them again."""

    def __init__(self, here: Stand, cloud: str, service: str) -> None:
        self._here, self._cloud, self._service = here, cloud, service
        self.ran: dict[str, float] = {}
        """When the director first knew the id that its cloud gave each node."""
        self.spoke: dict[str, float] = {}
        """When each virtual machine wrote our first words on its console."""

    @classmethod
    async def of(cls, here: Stand, cloud: str, *, warm: bool = False) -> "_Growth":
        """Start the service; a cloud that has to warm up is given the time."""
        service = await here.client.create(type="php")
        await here.client.start(service.id, wait=True)
        growth = cls(here, cloud, service.id)
        if warm:
            await growth.add()
            await until(lambda: any((here.data / "clouds" / cloud / ".warm").glob("[!.]*/memory")), _DEADLINE_S)
        return growth

    async def add(self) -> tuple[NodeView, float]:
        """Add a node, and remove it when it serves; return it, and when that was."""
        known = {node.id for node in agents(await self._here.client.service(self._service))}
        await self._here.client.scale(self._service, {"php": 1}, cloud=self._cloud)
        async with asyncio.timeout(_DEADLINE_S):
            while True:
                view = await self._here.client.service(self._service)
                fresh = next((node for node in agents(view) if node.id not in known), None)
                if fresh is not None and self._look(fresh):
                    served = time.monotonic()
                    break
                await asyncio.sleep(_POLL_S)
        await self._here.client.scale(self._service, {"php": -1}, cloud=self._cloud, wait=True)
        return fresh, served

    def _look(self, node: NodeView) -> bool:
        """Note how far a node is; return whether it serves."""
        if node.cloud_id:
            self.ran.setdefault(node.id, time.monotonic())
            console = Path(self._here.data, "clouds", node.cloud, node.cloud_id, "console.log")
            if node.id not in self.spoke and console.exists() and _FIRST_WORDS in console.read_bytes():
                self.spoke[node.id] = time.monotonic()
        return node.state is NodeState.SERVING
