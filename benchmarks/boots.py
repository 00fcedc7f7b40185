"""From "the cloud says that it runs" to "it serves": what we add to the boot of an instance, on each cloud.

Everywhere a node more is asked of a running PHP service. The providers `ec2` and `opennebula` are played: their
instances are processes of this computer, so that all of the time is ours. A virtual machine of `qemu` is compared with
the image's own boot: until systemd starts the first program of ours.
"""

import json
import statistics
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.goals import Measured
from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages.model import NodeView
from conpaas.core.states import NodeState
from tests.fakes.built_image import built_image
from tests.fakes.played import PROVIDERS, played
from tests.fakes.stand import Stand, agents, stand
from tests.fakes.waiting import until

_POLL_S = 0.005
_DEADLINE_S = 300.0
_FIRST_WORDS = b"conpaas.service"  # systemd: "Starting conpaas.service"


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
            ran = _note_boots(there.booter)
            growth = await _Growth.of(there.here, name)
            times = []
            for _ in range(b.effort.repetitions):
                node, served = await growth.add()
                times.append(served - ran[node.cloud_id])
            measured |= _result(b, name, times)
    return measured


async def machines(b: Bench) -> Mapping[str, Measured]:
    """Add virtual machines on this computer, one from its power button on, and as many from a saved state.

    Both are compared with the image's own boot, which the latter are spared.
    """
    measured: dict[str, Measured] = {}
    floor = 0.0
    for name, warm in (("qemu", False), ("qemu_warm", True)):
        clouds = {"local": {"driver": "local"}, "vms": {"driver": "qemu", "image": str(built_image()), "warm": warm}}
        async with stand(CONPAAS_CLOUDS=json.dumps(clouds)) as here:
            growth = await _Growth.of(here, "vms", warm=warm)
            times = []
            for _ in range(b.effort.repetitions if warm else 1):
                node, served = await growth.add()
                times.append(served - growth.ran[node.id])
                floor = floor or growth.booted[node.id] - growth.ran[node.id]
            measured |= _result(b, name, times, floor)
    return measured


def _note_boots(booter: Any) -> dict[str, float]:
    """Return when each instance began to boot, as long as it is looked at."""
    began: dict[str, float] = {}
    boot = booter.boot

    async def noted(vm: str, address: str, document: str) -> None:
        began[vm] = time.monotonic()
        await boot(vm, address, document)

    booter.boot = noted
    return began


def _result(b: Bench, cloud: str, times: list[float], floor: float | None = None) -> Mapping[str, Measured]:
    value = statistics.median(times)
    own = "" if floor is None else f", beside {floor:.2f} s of the image's own boot"
    b.say(f"{cloud}: from running to serving {value:.2f} s{own} ({len(times)} times)")
    return {f"boot_{cloud}": Measured(value, floor)}


class _Growth:
    """A service of one node on the first cloud, that gets more of them on `cloud` and loses them again."""

    def __init__(self, here: Stand, cloud: str, service: str) -> None:
        self._here, self._cloud, self._service = here, cloud, service
        self.ran: dict[str, float] = {}
        """When the director first knew the id that its cloud gave each node."""
        self.booted: dict[str, float] = {}
        """When the system of each virtual machine said that it starts our program."""

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
        fresh = await tasks.wait_for(
            lambda: self._served(known), timeout_s=_DEADLINE_S, what="a node", clock=SYSTEM_CLOCK, period_s=_POLL_S
        )
        served = time.monotonic()
        await self._here.client.scale(self._service, {"php": -1}, cloud=self._cloud, wait=True)
        return fresh, served

    async def _served(self, known: Collection[str]) -> NodeView | None:
        """Return the node that is not known yet, if it serves; note how far it is."""
        view = await self._here.client.service(self._service)
        fresh = next((node for node in agents(view) if node.id not in known), None)
        if fresh is None or not fresh.cloud_id:
            return None
        self.ran.setdefault(fresh.id, time.monotonic())
        console = Path(self._here.data, "clouds", fresh.cloud, fresh.cloud_id, "console.log")
        if fresh.id not in self.booted and console.exists() and _FIRST_WORDS in console.read_bytes():
            self.booted[fresh.id] = time.monotonic()
        return fresh if fresh.state is NodeState.SERVING else None
