"""SIGKILL at every stage, for each kind of process: with no help the work is finished, and the site goes on."""

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from conpaas.core.messages.model import NodeView, OperationView, ServiceView
from conpaas.core.states import NodeState, ServiceState
from tests.fakes.load import Load
from tests.fakes.stand import Stand, agents, is_running, manager, stand
from tests.system.test_life import archive

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

STAGES = ("start", "scale up", "scale down", "deploy", "stop")
VICTIMS = ("director", "manager", "agent", "engine")


@pytest.fixture
async def here() -> AsyncIterator[Stand]:
    async with stand() as one:
        yield one
        credits_are_exact(one.data / "director.sqlite")


def credits_are_exact(database: Path) -> None:
    """Every instance that was made is charged once for each hour begun, and the balance is the sum of the ledger."""
    with sqlite3.connect(database) as connection:
        twice = connection.execute(
            "select instance_id, hour, sum(delta) from credit_entries where kind = 'charge'"
            " group by instance_id, hour having sum(delta) not in (0, -1)"
        ).fetchall()
        assert twice == []
        balances = connection.execute(
            "select u.credits, coalesce(sum(e.delta), 0) from users u"
            " left join credit_entries e on e.user_id = u.id group by u.id"
        ).fetchall()
        assert all(balance == total for balance, total in balances), balances


async def kill(here: Stand, victim: str, service: str, known: ServiceView) -> None:
    """Kill one process of the kind, wherever it now is; the director's supervisor starts it again."""
    if victim == "director":
        await here.end_director(signal.SIGKILL)
        await here.start_director()
        return
    view = await here.client.service(service)
    if victim == "manager":
        os.kill(here.daemon(manager(view)), signal.SIGKILL)
        return
    node = agents(view)[0] if agents(view) else None
    pids: list[int] = []
    if node is not None:
        with suppress(FileNotFoundError, ValueError):  # it has no process yet, or none any more
            pids = [here.daemon(node)] if victim == "agent" else here.engines(node, "nginx")[:1]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def prepare(here: Stand, stage: str, tmp_path: Path) -> ServiceView:
    """Bring a service to where the stage begins."""
    service = await here.client.create(type="php", name="victim")
    await here.until(service.id, lambda view: view.manager and view.operation is None, what="a manager")
    if stage == "start":
        return await here.client.service(service.id)
    await here.client.start(service.id, wait=True)
    if stage in {"scale down", "stop"}:
        await here.client.scale(service.id, {"php": 2}, wait=True)
        return await here.running(service.id, 3)
    return await here.running(service.id, 1)


async def begin(here: Stand, stage: str, service: str, tmp_path: Path) -> OperationView:
    client = here.client
    match stage:
        case "start":
            return await client.start(service)
        case "scale up":
            return await client.scale(service, {"php": 2})
        case "scale down":
            return await client.scale(service, {"php": -2})
        case "deploy":
            version = await client.upload(service, archive(tmp_path / "2.tar.gz", {"index.php": "two"}))
            return await client.activate(service, version.id)
        case _:
            return await client.stop(service)


def reached(stage: str) -> Callable[[ServiceView], bool]:
    nodes = {"start": 1, "scale up": 3, "scale down": 1, "deploy": 1}
    if stage == "stop":
        return lambda view: view.state is ServiceState.STOPPED and agents(view) == [] and view.operation is None
    return lambda view: is_running(view, nodes[stage])


def under_way(view: ServiceView) -> bool:
    """Tell whether some node is between two states."""
    moving = {NodeState.REQUESTED, NodeState.BOOTING, NodeState.CONFIGURING, NodeState.DRAINING, NodeState.DELETING}
    return view.operation is None or any(node.state in moving for node in agents(view))


@pytest.mark.parametrize("moment", ["at once", "under way"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("victim", VICTIMS)
async def test_the_work_is_finished_whoever_is_killed(
    here: Stand, victim: str, stage: str, moment: str, tmp_path: Path
) -> None:
    known = await prepare(here, stage, tmp_path)
    load = None
    if stage not in {"start", "stop"}:
        url = urlsplit(known.urls["application"])
        load = Load(url.hostname or "", url.port or 0, clients=2)
        await load.__aenter__()

    operation = await begin(here, stage, known.id, tmp_path)
    if moment == "under way":
        await here.until(known.id, under_way, what="under way")
    await kill(here, victim, known.id, known)

    await here.until(known.id, reached(stage), what=f"{stage} finished", timeout_s=150)
    assert (await here.client.operation(operation.id)).state == "DONE"
    if load is not None:
        await load.__aexit__(None, None, None)
        if victim != "engine":  # one whose engine is killed may lose what it was just answering
            assert load.failures == []
    versions = await here.client.code(known.id)
    assert len(versions) == (2 if stage == "deploy" else 1)
    await here.client.terminate(known.id, wait=True)
    await here.nothing_is_left()


async def serving_again(here: Stand, service: str, lost: NodeView, nodes: int) -> ServiceView:
    return await here.until(
        service,
        lambda view: (
            is_running(view, nodes) and lost.id not in {node.id for node in view.nodes if node.state != "GONE"}
        ),
        what=f"{lost.id} replaced",
    )


async def test_an_instance_that_is_destroyed_is_replaced_and_the_site_goes_on(here: Stand, tmp_path: Path) -> None:
    known = await prepare(here, "scale up", tmp_path)
    await here.client.scale(known.id, {"php": 2}, wait=True)
    view = await here.running(known.id, 3)
    url = urlsplit(view.urls["application"])
    lost = next(node for node in agents(view) if node.roles == ("php",))

    async with Load(url.hostname or "", url.port or 0, clients=2) as load:
        os.kill(here.init(lost), signal.SIGKILL)
        view = await serving_again(here, known.id, lost, 3)

    assert load.failures == []
    assert load.slowest_s < 20  # far less than the proxy's time-outs, far more than a busy machine takes
    assert sorted(node.roles for node in agents(view)) == [("php",), ("php",), ("proxy", "web")]


async def test_a_manager_whose_instance_is_destroyed_is_replaced_and_knows_everything(
    here: Stand, tmp_path: Path
) -> None:
    known = await prepare(here, "scale up", tmp_path)
    await here.client.scale(known.id, {"php": 1}, wait=True)
    view = await here.running(known.id, 2)
    before = {node.id for node in agents(view)}
    url = urlsplit(view.urls["application"])
    lost = manager(view)

    async with Load(url.hostname or "", url.port or 0, clients=2) as load:
        os.kill(here.init(lost), signal.SIGKILL)
        view = await serving_again(here, known.id, lost, 2)

    # One that was just reading its session when the store went may fail in PHP; the service itself refuses nobody.
    assert len(load.failures) <= load.clients
    assert all(failure.startswith("/: 500 ") for failure in load.failures)
    assert {node.id for node in agents(view)} == before
    await here.client.scale(known.id, {"php": -1}, wait=True)
    await here.running(known.id, 1)


async def test_everything_is_killed_at_once_and_comes_back(here: Stand, tmp_path: Path) -> None:
    known = await prepare(here, "scale down", tmp_path)
    view = await here.client.service(known.id)
    victims = [here.daemon(node) for node in view.nodes if node.state == NodeState.SERVING]

    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    await here.end_director(signal.SIGKILL)
    await here.start_director()

    await here.client.scale(known.id, {"web": 1})
    await here.running(known.id, 4)
    url = urlsplit((await here.client.service(known.id)).urls["application"])
    async with Load(url.hostname or "", url.port or 0, clients=2) as load:
        await load.more(20)
    assert load.failures == []


async def test_two_directors_on_one_machine_do_not_collide(here: Stand, tmp_path: Path) -> None:
    async with stand() as other:
        first, second = await asyncio.gather(*[one.client.create(type="php", name="same") for one in (here, other)])
        await asyncio.gather(here.client.start(first.id, wait=True), other.client.start(second.id, wait=True))
        mine, theirs = await here.running(first.id, 1), await other.running(second.id, 1)
        addresses = [node.address for node in (*mine.nodes, *theirs.nodes)]
        assert len(set(addresses)) == 4
        await other.client.terminate(second.id, wait=True)
        await other.nothing_is_left()
        assert is_running(await here.client.service(first.id), 1)
