"""A PHP service against the same engines by hand: its start, its growth, its requests, its changes under load."""

import asyncio
import itertools
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from benchmarks import bench
from benchmarks.bench import Bench, Deployment
from benchmarks.goals import Measured, medians
from benchmarks.hand import ByHand
from conpaas.cli import processes
from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages.model import ServiceView
from conpaas.core.states import NodeState
from tests.fakes.load import Load

CHANGES = 20
_PAGE = "<?php echo 'Hello, version {version}.';"
_REST_S = 0.3
"""Between two runs of load."""
_ENGINES = ("nginx", "haproxy", "php-fpm", "redis-server", "valkey-server")


async def start(b: Bench) -> Mapping[str, Measured]:
    """Start services, and the same engines by hand, in turn."""
    starts: list[float] = []
    both: list[float] = []
    floors: list[float] = []
    async with b.director() as deployment, _visitor() as session:
        client = deployment.client
        async with _service(deployment) as service:  # the first start is never like the others: not counted
            await client.start(service.id, wait=True)
            hand = ByHand(b, deployment, await client.service(service.id))
        for number in range(b.effort.repetitions):
            async with _service(deployment) as service:
                starts.append(await _start_to_page(deployment, session, service))
            floors.append(await _by_hand_to_page(session, hand))
            began = time.monotonic()
            async with _service(deployment, ready=False) as service:
                await _start_to_page(deployment, session, service)
                both.append(time.monotonic() - began)
            floors.append(await _by_hand_to_page(session, hand))
            b.say(f"start {number + 1}: {starts[-1]:.3f} s, with create {both[-1]:.3f} s, by hand {floors[-1]:.3f} s")
    return {"start_to_first_page": medians(starts, floors), "create_and_start": medians(both, floors)}


def _visitor() -> aiohttp.ClientSession:
    """Return a session that keeps no connection: a proxy that stops would wait for it to end."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))


@asynccontextmanager
async def _service(deployment: Deployment, *, ready: bool = True) -> AsyncIterator[ServiceView]:
    """Make a PHP service, destroyed at the end of the block; if `ready`, its manager waits for commands."""
    client = deployment.client
    service = await client.create(type="php")

    async def serving() -> bool | None:
        nodes = (await client.service(service.id)).nodes
        return True if any(node.state is NodeState.SERVING for node in nodes) else None

    if ready:
        await tasks.wait_for(serving, timeout_s=bench.DEADLINE_S, what="a manager", clock=SYSTEM_CLOCK)
    try:
        yield service
    finally:
        await client.terminate(service.id, wait=True)


async def _start_to_page(deployment: Deployment, session: aiohttp.ClientSession, service: ServiceView) -> float:
    began = time.monotonic()
    await deployment.client.start(service.id)

    async def site() -> str | None:
        return (await deployment.client.service(service.id)).urls.get("application")

    url = await tasks.wait_for(site, timeout_s=bench.DEADLINE_S, what="a site", clock=SYSTEM_CLOCK, period_s=0.01)
    await bench.until_page(session, url)
    return time.monotonic() - began


async def _by_hand_to_page(session: aiohttp.ClientSession, hand: ByHand) -> float:
    began = time.monotonic()
    try:
        hand.launch()
        await bench.until_page(session, hand.url)
        return time.monotonic() - began
    finally:
        hand.end()


async def growth(b: Bench) -> Mapping[str, Measured]:
    """Add one node and eight nodes, in turn."""
    ones: list[float] = []
    eights: list[float] = []
    async with b.director() as deployment, _running(b, deployment) as service:
        for number in range(b.effort.repetitions):
            ones.append(await _scale(deployment, service, {"php": 1}))
            await _scale(deployment, service, {"php": -1})
            eights.append(await _scale(deployment, service, {"php": 8}))
            await _scale(deployment, service, {"php": -8})
            b.say(f"growth {number + 1}: +1 in {ones[-1]:.3f} s, +8 in {eights[-1]:.3f} s")
    return {"add_8_over_add_1": medians(eights, ones)}


async def _scale(deployment: Deployment, service: ServiceView, roles: Mapping[str, int]) -> float:
    began = time.monotonic()
    await deployment.client.scale(service.id, roles, wait=True)
    return time.monotonic() - began


@asynccontextmanager
async def _running(b: Bench, deployment: Deployment) -> AsyncIterator[ServiceView]:
    """Make a running PHP service with a page of ours."""
    client = deployment.client
    async with _service(deployment) as service:
        await client.upload(service.id, _code(b, 1), activate=True)
        await client.start(service.id, wait=True)
        yield await client.service(service.id)


def _code(b: Bench, version: int) -> Path:
    folder = b.new_folder("code")
    (folder / "index.php").write_text(_PAGE.format(version=version), encoding="utf-8")
    (folder / "style.css").write_text(f"/* version {version}. */", encoding="utf-8")
    return folder


async def requests(b: Bench) -> Mapping[str, Measured]:
    """Load a service of four nodes, and the same engines by hand while ConPaaS is frozen, in turn."""
    values: list[float] = []
    floors: list[float] = []
    async with b.director() as deployment, _visitor() as session, _running(b, deployment) as service:
        await _scale(deployment, service, {"php": 2, "web": 1})
        hand = ByHand(b, deployment, await deployment.client.service(service.id))
        hand.launch()
        try:
            await bench.until_page(session, hand.url)
            for number in range(b.effort.loads):
                for ours in (True, False) if number % 2 else (False, True):
                    await asyncio.sleep(_REST_S)
                    if ours:
                        values.append(await bench.wrk(service.urls["application"], b.effort.load_s))
                    else:
                        with _conpaas_frozen():
                            floors.append(await bench.wrk(hand.url, b.effort.load_s))
                b.say(f"requests {number + 1}: {values[-1]:.0f}/s, by hand {floors[-1]:.0f}/s")
        finally:
            hand.end()
    paired = statistics.median(value / floor for value, floor in zip(values, floors, strict=True))
    both = medians(values, floors)
    return {"requests_through": Measured(both.value, both.floor, paired)}


@contextmanager
def _conpaas_frozen() -> Iterator[None]:
    """Stop director, managers and agents for a moment: engines by hand have none of them beside them."""
    ours = [one.pid for one in processes.descendants(os.getpid()) if not one.name.startswith(_ENGINES)]
    try:
        for pid in ours:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in ours:
            os.kill(pid, signal.SIGCONT)


async def disturbance(b: Bench) -> Mapping[str, Measured]:
    """Change a service under load, and count the requests that fail."""
    async with b.director() as deployment, _running(b, deployment) as service:
        url = urlsplit(service.urls["application"])
        made: list[str] = []
        async with Load(
            url.hostname or "",
            url.port or 80,
            paths=("/", "/style.css"),
            good=lambda reply: reply.status == 200 and b"version " in reply.body,
        ) as load:
            for number, change in zip(range(CHANGES), _changes(), strict=False):
                began, before = time.monotonic(), load.done
                await _change(b, deployment, service, change, number)
                await load.more(20)
                made.append(change)
                took, failed = time.monotonic() - began, len(load.failures)
                b.say(f"change {number + 1}: {change} in {took:.2f} s, {load.done - before} requests, {failed} failed")
        for failure in load.failures[:20]:
            b.say(failure)
        b.say(f"{load.done} requests, the slowest took {load.slowest_s:.3f} s")
    return {"failed_requests": Measured(len(load.failures), 0.0)}


def _changes() -> Iterator[str]:
    return itertools.cycle(("php+2", "deploy", "settings", "web+1", "deploy", "php-2", "settings", "proxy", "web-1"))


async def _change(b: Bench, deployment: Deployment, service: ServiceView, change: str, number: int) -> None:
    client = deployment.client
    if change == "deploy":
        await client.upload(service.id, _code(b, number + 2), activate=True)
    elif change == "settings":
        await client.change_settings(service.id, {"memory_limit": f"{65 + number}M"}, wait=True)
    elif change == "proxy":
        await client.change_settings(service.id, {"max_execution_time": 60 + number}, wait=True)
    else:
        await client.scale(service.id, {change[:3]: int(change[3:])}, wait=True)
