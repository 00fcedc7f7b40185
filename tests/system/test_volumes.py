"""A service that keeps data, on the local cloud: what was written is there whatever dies, until it is terminated."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.states import NodeState, ServiceState
from tests.fakes.stand import TIMEOUT_S, Stand, agents, is_running, manager, stand

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


@pytest.fixture
async def here() -> AsyncIterator[Stand]:
    async with stand() as one:
        yield one


def folders(here: Stand) -> list[Path]:
    """Return where volumes are, attached or not; folders that vanish meanwhile are none."""
    found = [Path(parent) / name for parent, names, _ in os.walk(here.cloud) for name in names]
    return sorted(path for path in found if path.name.startswith("vol-"))


async def read(url: str) -> str | None:
    with suppress(OSError, aiohttp.ClientError):
        async with aiohttp.ClientSession() as session, session.get(url) as reply:
            return await reply.text() if reply.status == 200 else None
    return None


async def serves(here: Stand, service: str, *notes: str) -> ServiceView:
    """Wait until a service runs, and serves exactly these notes."""
    view = await here.running(service, 1)
    expected = "".join(f"{note}\n" for note in notes)

    async def look() -> bool | None:
        return True if await read((await here.client.service(service)).urls.get("notes", "")) == expected else None

    await tasks.wait_for(look, timeout_s=TIMEOUT_S, what=f"it serves {notes}", clock=SYSTEM_CLOCK)
    return view


async def write_down(here: Stand, service: str, note: str) -> None:
    await here.client.change_settings(service, {"note": note}, wait=True)


async def begin(here: Stand) -> str:
    """Make a service with two notes; return its id."""
    service = (await here.client.create(type="notes", name="diary")).id
    await here.client.start(service, wait=True)
    await here.running(service, 1)
    for note in ("one", "two"):
        await write_down(here, service, note)
    await serves(here, service, "one", "two")
    return service


async def end_instance(here: Stand, node: NodeView) -> None:
    """End an instance as a power cut would."""
    os.kill(here.init(node), signal.SIGKILL)


async def replaced(here: Stand, service: str, before: NodeView) -> NodeView:
    """Wait until another node runs in the place of one."""

    def is_other(view: ServiceView) -> bool:
        return is_running(view, 1) and agents(view)[0].id != before.id

    return agents(await here.until(service, is_other, what=f"another one instead of {before.id}"))[0]


async def terminated(here: Stand, service: str) -> None:
    """Terminate a service, and wait until its data is gone from the disk."""
    await here.client.terminate(service, wait=True)

    async def gone() -> bool | None:
        return None if folders(here) or list(here.cloud.glob(".volumes/*.json")) else True

    await tasks.wait_for(gone, timeout_s=TIMEOUT_S, what="the volumes are gone", clock=SYSTEM_CLOCK)


async def test_the_data_outlives_its_node_its_service_and_ends_with_it(here: Stand) -> None:
    service = await begin(here)
    (volume,) = folders(here)
    assert (volume / "notes.txt").read_text() == "one\ntwo\n"

    node = agents(await here.client.service(service))[0]
    await end_instance(here, node)
    successor = await replaced(here, service, node)
    await serves(here, service, "one", "two")
    assert [folder.name for folder in folders(here)] == [volume.name]
    assert successor.id in str(folders(here)[0])

    await here.client.stop(service, wait=True)
    await here.until(service, lambda view: view.state is ServiceState.STOPPED, what="stopped")
    assert [folder.parent.name for folder in folders(here)] == [".volumes"]
    await here.client.start(service, wait=True)
    await serves(here, service, "one", "two")
    await write_down(here, service, "three")
    await serves(here, service, "one", "two", "three")

    await terminated(here, service)


async def test_every_node_has_a_volume_of_its_own_and_a_second_one_starts_empty(here: Stand) -> None:
    service = await begin(here)
    await here.client.scale(service, {"store": 1}, wait=True)
    await here.running(service, 2)

    texts = sorted((folder / "notes.txt").read_text() for folder in folders(here))
    assert texts == ["one\ntwo\n", "two\n"]


@pytest.mark.parametrize("victim", ["agent", "manager", "director"])
async def test_the_data_is_there_whoever_is_killed_as_well_while_a_node_is_replaced(here: Stand, victim: str) -> None:
    service = await begin(here)
    view = await here.client.service(service)
    node = agents(view)[0]
    if victim == "agent":  # its engine goes on, and it finds its volume again
        os.kill(here.daemon(node), signal.SIGKILL)
        await serves(here, service, "one", "two")
    await end_instance(here, node)
    if victim == "manager":
        os.kill(here.daemon(manager(view)), signal.SIGKILL)
    elif victim == "director":
        await here.end_director(signal.SIGKILL)
        await here.start_director()

    await replaced(here, service, node)
    await serves(here, service, "one", "two")
    assert len(folders(here)) == 1
    await terminated(here, service)


async def test_a_manager_that_is_replaced_takes_the_volumes_over(here: Stand) -> None:
    service = await begin(here)
    first = manager(await here.client.service(service))
    await end_instance(here, first)

    def is_replaced(view: ServiceView) -> bool:
        serving = [node.id for node in view.nodes if node.kind == "manager" and node.state is NodeState.SERVING]
        return is_running(view, 1) and serving not in ([], [first.id])

    view = await here.until(service, is_replaced, what="a new manager")
    node = agents(view)[0]
    await end_instance(here, node)
    await replaced(here, service, node)
    await serves(here, service, "one", "two")


async def test_a_director_killed_while_volumes_are_made_makes_none_twice(here: Stand) -> None:
    client = here.client
    ids = [(await client.create(type="notes", name=f"diary-{number}")).id for number in range(3)]
    for service in ids:
        await here.until(service, lambda view: view.manager and view.operation is None, what="a manager")
    await asyncio.gather(*(client.start(service) for service in ids))

    async def some() -> bool | None:
        return True if list(here.cloud.glob(".volumes/*.json")) else None

    await tasks.wait_for(some, timeout_s=TIMEOUT_S, what="the first volume", clock=SYSTEM_CLOCK, period_s=0.002)
    await here.end_director(signal.SIGKILL)
    await here.start_director()

    await asyncio.gather(*map(partial(here.running, nodes=1), ids))
    assert len(folders(here)) == len(list(here.cloud.glob(".volumes/*.json"))) == len(ids)
    await asyncio.gather(*(terminated(here, service) for service in ids))
