"""What instances cost at their providers: exact decimals, unknown stays unknown, and nothing is forgotten."""

from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conpaas.cloud import sim
from conpaas.core.errors import CloudRefusedError
from conpaas.core.messages.internal import RequestInstances
from conpaas.core.messages.model import Cost
from conpaas.core.states import NodeState
from conpaas.director import costs
from conpaas.director.db.models import Instance
from tests.fakes.director import BLOCK, START, Rig, open_rig

HOUR = timedelta(hours=1)
CLOUDS = {
    "sim": {"driver": "sim", "block": BLOCK, "prices": {"*": "0.0123"}},
    "euro": {"driver": "sim", "block": "127.243.0.0/16", "prices": {"*": "0.1"}, "currency": "EUR"},
}
PRICES = st.decimals(0, 100, places=4)
SECONDS = st.integers(0, 10**7)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, clouds=CLOUDS) as rig:
        await rig.director.clouds.learn_sizes()
        yield rig


def provider(rig: Rig, name: str) -> sim.Account:
    return sim._accounts[rig.settings.data_dir / "clouds" / name]


def instance(price: str | None, seconds: int, *, ended: bool = False) -> Instance:
    end = START + timedelta(seconds=seconds)
    return Instance(price=price, currency="USD", launched=START, ended=end if ended else None)


async def add(rig: Rig, service: str, cloud: str, key: str, count: int = 1) -> list[str]:
    body = RequestInstances(count=count, cloud=cloud, key=key)
    return [node.id for node in await rig.services.request_nodes(service, body)]


# -- sums -----------------------------------------------------------------------------------------------------------


@given(PRICES, SECONDS)
def test_a_running_instance_costs_its_price_for_as_long_as_it_has_run(price: Decimal, seconds: int) -> None:
    cost = costs.of(instance(str(price), seconds), START + timedelta(seconds=seconds))

    assert cost.hourly == {"USD": price}
    assert abs(cost.total["USD"] - price * seconds / 3600) <= Decimal("0.000001")


@given(PRICES, SECONDS, SECONDS)
def test_one_that_has_ended_costs_no_more(price: Decimal, seconds: int, later: int) -> None:
    one = instance(str(price), seconds, ended=True)

    cost = costs.of(one, START + timedelta(seconds=seconds + later))

    assert cost.hourly == {}
    assert cost.total == costs.of(one, START + timedelta(seconds=seconds)).total


@given(st.lists(st.tuples(PRICES, SECONDS, st.booleans()), max_size=10))
def test_the_sum_is_the_same_whether_instances_have_ended_or_not(parts: list[tuple[Decimal, int, bool]]) -> None:
    now = START + timedelta(seconds=10**7)
    spent: dict[str, str] = {}
    living, expected = [], Decimal(0)
    for price, seconds, ended in parts:
        one = instance(str(price), seconds, ended=ended)
        expected += costs.of(one, now).total["USD"]
        if ended:
            spent = costs.add(spent, costs.of(one, now))
        else:
            living.append(one)

    assert costs.of_all(living, [spent], now).total.get("USD", Decimal(0)) == expected


def test_a_price_that_nobody_knows_is_no_price() -> None:
    assert costs.of(instance(None, 3600), START + HOUR) == Cost()
    assert costs.of(Instance(price="1", currency="USD", launched=None), START + HOUR) == Cost()
    both = costs.of_all([instance(None, 0), instance("0.5", 0)], [], START + HOUR)
    assert both.hourly == {"USD": Decimal("0.5")}


def test_free_is_not_unknown() -> None:
    assert costs.of(instance("0", 0), START + HOUR).hourly == {"USD": Decimal(0)}


# -- services -------------------------------------------------------------------------------------------------------


async def test_what_has_been_spent_survives_the_end_of_instances(rig: Rig) -> None:
    user = await rig.add_user()
    service = (await rig.create(user)).id
    await rig.services.start(service, actor="user:alice", key=None, expected=None)
    [node] = await add(rig, service, "sim", "a")
    [euro] = await add(rig, service, "euro", "b")
    rig.clock.advance(hours=2)
    await rig.ledger.delete(node, "enough")
    rig.clock.advance(hours=1)

    view = await rig.view(service)

    assert view.cost.hourly == {"USD": Decimal("0.0123"), "EUR": Decimal("0.1")}
    assert view.cost.total == {"USD": Decimal("0.0123") * 5, "EUR": Decimal("0.3")}
    own = {node.id: node.cost for node in view.nodes}
    assert own[euro] == Cost(hourly={"EUR": Decimal("0.1")}, total={"EUR": Decimal("0.3")})
    assert sum((cost.total.get("USD", Decimal(0)) for cost in own.values()), Decimal(0)) == Decimal("0.0123") * 3


async def test_one_that_is_lost_costs_until_then_and_one_that_was_refused_nothing(rig: Rig) -> None:
    user = await rig.add_user()
    service = (await rig.create(user)).id
    await rig.services.start(service, actor="user:alice", key=None, expected=None)
    [node] = await add(rig, service, "euro", "a")
    provider(rig, "euro").fail("create", CloudRefusedError("no"))
    await add(rig, service, "euro", "b")
    rig.clock.advance(hours=1)
    await provider(rig, "euro").kill((await rig.instance(node)).cloud_id)
    await rig.reconciler.reconcile()
    assert (await rig.instance(node)).state is NodeState.LOST
    rig.clock.advance(hours=5)
    await rig.ledger.delete(node, "lost")

    view = await rig.view(service)

    assert "EUR" not in view.cost.hourly
    assert view.cost.total["EUR"] == Decimal("0.1")


async def test_a_price_that_becomes_known_later_counts_from_the_start_and_then_stays(tmp_path: Path) -> None:
    clouds = {"sim": {"driver": "sim", "block": BLOCK}}
    async with open_rig(tmp_path, clouds=clouds) as rig:
        user = await rig.add_user()
        service = (await rig.create(user)).id
        rig.clock.advance(hours=1)
        assert (await rig.view(service)).cost == Cost()  # the cloud has not been asked yet

        await rig.director.clouds.learn_sizes()
        await rig.reconciler.reconcile()
        assert (await rig.view(service)).cost.total == {"USD": Decimal("0.01")}

        rig.director.clouds.account("sim").sizes = ()
        await rig.reconciler.reconcile()
        rig.clock.advance(hours=1)
        assert (await rig.view(service)).cost.total == {"USD": Decimal("0.02")}
