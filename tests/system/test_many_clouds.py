"""Two clouds on one machine: a service moves between them under load, or is on both; whoever dies, it ends right."""

import asyncio
import json
import os
import re
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import aiohttp
import pytest

from conpaas.core.errors import ConpaasError
from conpaas.core.messages.model import ServiceView
from conpaas.core.run import find
from conpaas.core.states import NodeState
from tests.fakes.load import Load
from tests.fakes.stand import Stand, agents, is_running, manager, stand
from tests.fakes.waiting import until
from tests.system.test_kills import credits_are_exact

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(240),
    pytest.mark.skipif(find("haproxy") is None, reason="the engines of php are not installed"),
]

HANDOVER_S = 3.0
CLOUDS = {"local": {"driver": "local"}, "other": {"driver": "local", "block": "127.43.0.0/16"}}


@pytest.fixture
async def here() -> AsyncIterator[Stand]:
    words = {
        "CONPAAS_CLOUDS": json.dumps(CLOUDS),
        "CONPAAS_TIMINGS": json.dumps({"handover_s": HANDOVER_S, "node_silent_s": 60}),
        "CONPAAS_MANAGER_SILENT_S": "60",  # who is killed here is started again, however long that takes
    }
    async with stand(**words) as one:
        yield one
        credits_are_exact(one.data / "director.sqlite")


async def site(here: Stand, **roles: int) -> ServiceView:
    """Make a PHP service that runs on `local`, with so many dedicated nodes."""
    service = await here.client.create(type="php", name="nomad")
    await here.until(service.id, lambda view: view.manager and view.operation is None, what="a manager")
    await here.client.start(service.id, wait=True)
    if roles:
        await here.client.scale(service.id, roles, wait=True)
    return await here.client.service(service.id)


async def visit(view: ServiceView, cookie: str = "") -> tuple[int, str]:
    """Visit the first page of the service; return how often this visitor was there, and his cookie."""
    headers = {"Cookie": cookie} if cookie else {}
    async with aiohttp.ClientSession() as visitor, visitor.get(view.urls["application"], headers=headers) as answer:
        found = re.search(r"Your visits</dt><dd>(\d+)", await answer.text())
        assert found is not None
        return int(found[1]), answer.headers.get("Set-Cookie", cookie).partition(";")[0]


@asynccontextmanager
async def visitors(here: Stand, view: ServiceView) -> AsyncIterator[Load]:
    """Run visitors that find the service where its view says it is; what is open stays open while it is answered."""
    url = urlsplit(view.urls["application"])
    load = Load(url.hostname or "", url.port or 0, clients=4)

    async def follow() -> None:
        while True:
            with suppress(ConpaasError):  # the director may be away: the address that is known goes on
                urls = (await here.client.service(view.id)).urls
                if "application" in urls:
                    url = urlsplit(urls["application"])
                    load.address, load.port = url.hostname or "", url.port or 0
            await asyncio.sleep(0.2)

    task = asyncio.create_task(follow())
    try:
        async with load:
            yield load
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def is_on(view: ServiceView, cloud: str, nodes: int) -> bool:
    """Tell whether the service runs with so many nodes, and all that it has, its manager included, is on `cloud`."""
    living = [node for node in view.nodes if node.state is not NodeState.GONE]
    return is_running(view, nodes) and len(living) == nodes + 1 and {node.cloud for node in living} == {cloud}


async def moved(here: Stand, service: str, cloud: str, nodes: int) -> ServiceView:
    return await here.until(service, lambda view: is_on(view, cloud, nodes), what=f"all is on {cloud}", timeout_s=90)


def epoch(here: Stand, service: str) -> int:
    with sqlite3.connect(here.data / "director.sqlite") as connection:
        return int(connection.execute("select epoch from services where id = ?", (service,)).fetchone()[0])


async def is_given_back(here: Stand, cloud: str) -> None:
    """Wait until nothing of ours is left on a cloud."""

    def nothing_is_left() -> bool:
        try:
            here.nothing_is_left_on(cloud)
        except AssertionError:
            return False
        return True

    await until(nothing_is_left, timeout_s=60)


@pytest.mark.parametrize("roles", [{}, {"php": 2, "web": 1}], ids=["one node", "four nodes"])
async def test_a_service_moves_under_load_and_nobody_notices(here: Stand, roles: dict[str, int]) -> None:
    view = await site(here, **roles)
    nodes = len(agents(view))
    before = {node.id for node in view.nodes}

    first, cookie = await visit(view)
    async with visitors(here, view) as load:
        operation = await here.client.move(view.id, cloud="other", wait=True)
        assert operation.state == "DONE"
        after = await moved(here, view.id, "other", nodes)
        await until(lambda: urlsplit(after.urls["application"]).hostname == load.address)
        assert load.address.startswith("127.43.")
        await load.more(50)

    assert load.failures == []
    assert (first, await visit(after, cookie)) == (1, (2, cookie)), "the session has not moved with the manager"
    assert not before & {node.id for node in after.nodes if node.state is not NodeState.GONE}
    assert sorted(node.roles for node in agents(after)) == sorted(node.roles for node in agents(view))
    assert epoch(here, view.id) == 2
    await is_given_back(here, "local")
    await here.client.scale(view.id, {"php": 1}, wait=True)  # the manager that took over knows its work
    await moved(here, view.id, "other", nodes + 1 if roles else 2)
    await here.client.terminate(view.id, wait=True)
    await here.nothing_is_left()


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        ("both", "at once"),
        ("director", "gathering"),
        ("manager", "gathering"),
        ("director", "overlapping"),
        ("manager", "overlapping"),
        ("both", "the manager moves"),
    ],
)
async def test_a_move_ends_right_whoever_is_killed(here: Stand, victim: str, moment: str) -> None:
    view = await site(here)
    [first] = agents(view)

    def has_come(now: ServiceView) -> bool:
        there = [node for node in agents(now) if node.cloud == "other"]
        new_manager = any(n.kind == "manager" and n.cloud == "other" for n in now.nodes)
        return {
            "at once": True,
            "gathering": bool(there),
            "overlapping": any(node.state is NodeState.SERVING for node in there),
            "the manager moves": new_manager,
        }[moment]

    async with visitors(here, view) as load:
        operation = await here.client.move(view.id, cloud="other")
        now = await here.until(view.id, has_come, what=moment)
        if victim in {"manager", "both"}:
            with suppress(FileNotFoundError, ValueError, ProcessLookupError, StopIteration):
                os.kill(here.daemon(manager(now)), signal.SIGKILL)
        if victim in {"director", "both"}:
            await here.end_director(signal.SIGKILL)
            await here.start_director()
        after = await moved(here, view.id, "other", 1)
        await load.more(20)

    assert load.failures == []
    assert (await here.client.operation(operation.id)).state == "DONE"
    assert first.id not in {node.id for node in after.nodes if node.state is not NodeState.GONE}
    await is_given_back(here, "local")


async def test_a_service_is_on_two_clouds_at_once(here: Stand) -> None:
    view = await site(here, php=1)

    async with visitors(here, view) as load:
        await here.client.scale(view.id, {"web": 1, "php": 1}, cloud="other", wait=True)
        both = await here.running(view.id, 4)
        assert sorted((node.cloud, node.roles) for node in agents(both)) == [
            ("local", ("php",)),
            ("local", ("proxy",)),
            ("other", ("php",)),
            ("other", ("web",)),
        ]
        assert manager(both).cloud == "local"
        await load.more(50)
        await here.client.scale(view.id, {"php": -1}, cloud="local", wait=True)
        fewer = await here.running(view.id, 3)
        assert sorted((node.cloud, node.roles) for node in agents(fewer)) == [
            ("local", ("proxy",)),
            ("other", ("php",)),
            ("other", ("web",)),
        ]
        await here.client.scale(view.id, {"web": -1, "php": -1}, cloud="other", wait=True)
        one = await here.running(view.id, 1)
        assert [node.cloud for node in agents(one)] == ["local"]

    assert load.failures == []
    await is_given_back(here, "other")


async def test_a_move_that_is_taken_back_leaves_the_service_where_it_was(here: Stand) -> None:
    view = await site(here)

    async with visitors(here, view) as load:
        await here.client.move(view.id, cloud="other")
        await here.until(view.id, lambda now: any(node.cloud == "other" for node in agents(now)), what="a successor")
        await here.client.move(view.id, cloud="local", wait=True)
        await moved(here, view.id, "local", 1)

    assert load.failures == []
    await is_given_back(here, "other")
