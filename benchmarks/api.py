"""The list of services: its rate against a bare handler that sends the same bytes, and its queries."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import aiohttp
from sqlalchemy import event

from benchmarks import bench
from benchmarks.bench import Bench
from benchmarks.goals import Measured, medians
from benchmarks.here import director_here
from conpaas.core import rpc, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages import public
from conpaas.core.states import NodeState
from conpaas.director.app import Director
from conpaas.sdk import Conpaas, connect

SERVICES = 20
_FEW = 2
_LOOKS = 5
_CONNECTIONS = 8
_SETTLE_S = 5.0


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
    counts: dict[int, int] = {}
    async with director_here(b.new_folder("queries")) as (director, client, token), AsyncExitStack() as stack:
        lists = rpc.Client(director.url, headers={"Authorization": f"Bearer {token}"})
        stack.push_async_callback(lists.close)
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
