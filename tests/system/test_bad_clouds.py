"""Bad days with real processes: the director is killed in the middle of 50 creates; accounts go bad and come back."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import ConflictError, ConpaasError, PeerError
from conpaas.core.messages import public
from conpaas.core.messages.model import ServiceView
from conpaas.core.states import NodeState
from tests.fakes.stand import Stand, stand
from tests.system.test_kills import credits_are_exact

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

COUNT = 50
SLEEPER = {"driver": "local", "command": ["/bin/sleep", "1000"], "max_instances": 2 * COUNT}


@pytest.fixture
async def here() -> AsyncIterator[Stand]:
    words = {
        "CONPAAS_CLOUDS": json.dumps({"local": SLEEPER}),
        "CONPAAS_LIMITS": json.dumps({"services": 2 * COUNT}),
        "CONPAAS_RECONCILE_PERIOD_S": "0.5",
    }
    async with stand(**words) as one:
        yield one
        credits_are_exact(one.data / "director.sqlite")


def made(here: Stand) -> list[str]:
    """Return the tokens of the instances that the cloud has."""
    records = (here.cloud / ".records").glob("*.json")
    return [json.loads(path.read_text())["token"] for path in records]


async def create(here: Stand, number: int) -> ServiceView | None:
    """Ask for one service, and so for one instance; None if there is no answer."""
    try:
        return await here.client.create(type="php", name=f"service {number}", key=f"key-{number}")
    except PeerError:
        return None


@pytest.mark.parametrize("after", [0, 10, 30])
async def test_a_director_that_is_killed_among_50_creates_leaves_each_of_them_once(here: Stand, after: int) -> None:
    asking = asyncio.gather(*[create(here, number) for number in range(COUNT)])

    async def far_enough() -> bool | None:
        return True if len(made(here)) >= after else None

    await tasks.wait_for(far_enough, timeout_s=60, what=f"{after} instances", clock=SYSTEM_CLOCK, period_s=0.002)
    await here.end_director(signal.SIGKILL)
    await asking
    await here.start_director()
    views = await asyncio.gather(*[create(here, number) for number in range(COUNT)])

    async def all_there() -> bool | None:
        services = await here.client.services()
        nodes = [node for view in services for node in view.nodes if node.state is not NodeState.GONE]
        settled = all(node.state is NodeState.BOOTING for node in nodes)
        return True if settled and len(nodes) == len(services) == COUNT else None

    await tasks.wait_for(all_there, timeout_s=60, what="50 instances", clock=SYSTEM_CLOCK)
    assert None not in views
    services = await here.client.services()
    assert Counter(made(here)) == Counter(node.id for view in services for node in view.nodes)
    assert (await here.client.me()).credits == 9999 - COUNT
    await asyncio.gather(*[here.client.terminate(view.id, wait=True) for view in services])
    await here.nothing_is_left()


async def test_an_account_is_added_used_and_removed_while_the_director_runs(here: Stand) -> None:
    client = here.client
    settings = {"command": SLEEPER["command"], "block": "127.44.0.0/16"}
    form = public.CloudForm(name="second", driver="local", settings=settings)
    tried = await client.try_cloud(form)
    assert all(finding.ok for finding in tried.findings)
    assert [account.name for account in await client.cloud_accounts()] == ["local"]

    await client.add_cloud(form)
    service = await client.create(type="php", name="there", cloud="second")
    await here.until(service.id, lambda view: view.nodes[0].state is NodeState.BOOTING, what="an instance there")
    with pytest.raises(ConflictError, match="instances: 1"):
        await client.remove_cloud("second")
    await here.end_director(signal.SIGKILL)
    await here.start_director()
    assert {account.name for account in await client.cloud_accounts()} == {"local", "second"}

    await client.change_cloud(form.model_copy(update={"options": public.CloudOptions(enabled=False)}))
    with pytest.raises(ConpaasError, match="takes no new instances"):
        await client.create(type="php", name="more", cloud="second")
    await client.terminate(service.id, wait=True)
    await client.remove_cloud("second")
    await here.nothing_is_left()
