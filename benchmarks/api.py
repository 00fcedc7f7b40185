"""The list of services: its rate against a bare handler that sends the same bytes, and its queries."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import aiohttp
from pydantic import SecretStr
from sqlalchemy import event

from benchmarks import bench
from benchmarks.bench import Bench
from benchmarks.goals import Measured, medians
from conpaas.core import rpc, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages import public
from conpaas.core.states import NodeState
from conpaas.director.app import Director
from conpaas.director.settings import DirectorSettings
from conpaas.sdk import Conpaas, connect

SERVICES = 20
_FEW = 2
_LOOKS = 5
_CONNECTIONS = 8
_SETTLE_S = 5.0
_PASSWORD = "benchmark"  # of a director that only we know


async def lists(b: Bench) -> Mapping[str, Measured]:
    """Load the list of 20 services, each with its living manager, and a bare handler of the same bytes, in turn."""
    values: list[float] = []
    floors: list[float] = []
    async with b.director() as deployment:
        for _ in range(SERVICES):
            await deployment.client.create(type="php")
        await tasks.wait_for(
            partial(_at_rest, deployment.client), timeout_s=bench.DEADLINE_S, what="managers", clock=SYSTEM_CLOCK
        )
        await asyncio.sleep(_SETTLE_S)
        url, header = await _login(deployment.demo.url, deployment.demo.known())
        body = await _body(url, header)
        with b.bare(body) as (bare_url, _):
            async with aiohttp.ClientSession() as session:
                await bench.until_page(session, bare_url)
            for number in range(b.effort.loads // 2):
                values.append(await bench.wrk(url, b.effort.load_s, connections=_CONNECTIONS, headers=[header]))
                floors.append(await bench.wrk(bare_url, b.effort.load_s, connections=_CONNECTIONS))
                b.say(f"lists {number + 1}: {values[-1]:.0f}/s of {len(body)} bytes, bare {floors[-1]:.0f}/s")
    return {"list_services": medians(values, floors)}


async def _at_rest(client: Conpaas) -> bool | None:
    nodes = [node for service in await client.services() for node in service.nodes]
    return True if all(node.state is NodeState.SERVING for node in nodes) else None


async def _login(url: str, known: Any) -> tuple[str, str]:
    async with connect(url) as visitor:
        session = await visitor.login("admin", known.password)
    return url + public.LIST_SERVICES.path, f"Authorization: Bearer {session.token.get_secret_value()}"


async def _body(url: str, header: str) -> bytes:
    name, _, value = header.partition(": ")
    async with aiohttp.ClientSession(headers={name: value}) as session, session.get(url) as answer:
        return await answer.read()


async def queries(b: Bench) -> Mapping[str, Measured]:
    """Count the queries of one list, with few services and with many; none is answered from memory."""
    async with _director_here(b) as (director, client, lists):
        counts: dict[int, int] = {}
        for size in (_FEW, SERVICES):
            while len(await client.services()) < size:
                service = await client.create(type="php")
                await client.start(service.id)
            counts[size] = await _count(director, lists)
    b.say(f"queries: {counts}")
    return {"list_queries": Measured(counts[SERVICES], counts[_FEW])}


async def _count(director: Director, client: rpc.Client) -> int:
    """Return the fewest queries of some lists: the director has work of its own besides."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    engine = director.db.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    counts = []
    try:
        for number in range(_LOOKS):
            seen.clear()
            await client.call(public.LIST_SERVICES, query=public.ServiceQuery(limit=SERVICES + number))
            counts.append(sum(statement.lstrip().upper().startswith("SELECT") for statement in seen))
    finally:
        event.remove(engine, "before_cursor_execute", note)
    return min(counts)


@asynccontextmanager
async def _director_here(b: Bench) -> AsyncIterator[tuple[Director, Conpaas, rpc.Client]]:
    """Run a director in this process, on a cloud whose instances are only numbers."""
    settings = DirectorSettings(
        data_dir=b.new_folder("director") / "data",
        port=0,
        instances_port=0,
        ssh_port=0,
        clouds={"local": {"driver": "sim"}},
        admin_password=SecretStr(_PASSWORD),
    )
    director = Director(settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(director.run(signals=False), name="director")
        await director.ready.wait()
        try:
            async with connect(director.url) as visitor:
                session = await visitor.login("admin", _PASSWORD)
            token = session.token.get_secret_value()
            raw = rpc.Client(director.url, headers={"Authorization": f"Bearer {token}"})
            async with connect(director.url, token) as client, AsyncExitStack() as stack:
                stack.push_async_callback(raw.close)
                yield director, client, raw
        finally:
            director.stop.set()
