"""Moving, seen from a real manager with real agents, and from the director: nothing ends before it is replaced."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from conpaas.cloud import sim
from conpaas.core.errors import CloudRefusedError, ForbiddenError
from conpaas.core.states import NodeState, ServiceState
from conpaas.manager import app
from tests.fakes import deployment as fakes
from tests.fakes.deployment import FakeDirector, deployment
from tests.fakes.director import BLOCK, HandClock, Rig, open_rig

pytestmark = pytest.mark.timeout(180)

N, S = NodeState, ServiceState
HANDOVER_S = 0.4


# -- the manager ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def director(
    tmp_path: Path, new_address: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FakeDirector]:
    monkeypatch.setattr(fakes, "QUICK", fakes.QUICK.model_copy(update={"handover_s": HANDOVER_S}))
    monkeypatch.setattr(app, "UNDONE_S", 0.1)
    monkeypatch.setattr(app, "RESYNC_S", 0.5)
    async with deployment(tmp_path, new_address) as director:
        director.want(running=True, roles={"front": 1, "back": 1})
        await director.until_state(S.RUNNING)
        yield director


def on(director: FakeDirector, cloud: str) -> set[str]:
    """Return the nodes that serve on a cloud."""
    return {node.id for node in director.serving_nodes() if node.cloud == cloud and node.roles}


async def settled(director: FakeDirector) -> None:
    await director.until_state(S.RUNNING)


async def test_those_before_serve_until_their_successors_do_and_a_little_longer(director: FakeDirector) -> None:
    before = on(director, "test")

    director.want(cloud="other")
    await director.until(lambda: len(on(director, "other")) == 2)
    assert on(director, "test") == before  # the world still knows the old addresses
    await director.until(lambda: not on(director, "test"))
    await settled(director)

    assert set(director.deleted) == before
    assert not any(gone.failed for gone in director.deleted.values())
    assert {node.cloud for node in director.nodes.values()} == {"other"}


async def test_while_the_target_refuses_the_service_goes_on_where_it_is(director: FakeDirector) -> None:
    before = on(director, "test")
    director.refuse = 7

    director.want(cloud="full")
    await director.until(lambda: director.refuse == 0)
    assert on(director, "test") == before
    assert director.deleted == {} or before.isdisjoint(director.deleted)
    assert any("nodes refused: no capacity" in report.reason for report in director.reports)
    assert S.ERROR not in director.states

    await director.until(lambda: len(on(director, "full")) == 2)
    await settled(director)
    assert before <= set(director.deleted)


async def test_successors_that_never_boot_are_replaced_and_nothing_else_happens(director: FakeDirector) -> None:
    before = on(director, "test")
    director.never_boot = 1

    director.want(cloud="other")
    await director.give_up_one()
    assert on(director, "test") == before
    await director.until(lambda: not on(director, "test"))
    await settled(director)

    assert len(on(director, "other")) == 2


async def test_a_move_that_is_taken_back_in_the_middle_ends_where_it_began(director: FakeDirector) -> None:
    before = on(director, "test")
    director.never_boot = 2

    director.want(cloud="other")
    await director.until(lambda: len(director.nodes) == 4)
    director.want(cloud="test")
    await settled(director)

    assert on(director, "test") == before
    assert before.isdisjoint(director.deleted)


@pytest.mark.parametrize("moment", ["gathering", "overlapping"])
async def test_a_manager_that_is_replaced_in_the_middle_goes_on_with_it(director: FakeDirector, moment: str) -> None:
    before = on(director, "test")
    director.want(cloud="other")
    await director.until(lambda: len(director.nodes if moment == "gathering" else on(director, "other")) >= 2)
    await director.end_manager()
    director.epoch += 1

    await director.start_manager()
    await director.until(lambda: set(director.deleted) >= before)
    await settled(director)

    assert len(on(director, "other")) == 2
    assert len(director.nodes) == 2


async def test_one_that_dies_while_both_serve_is_replaced_at_the_new_place(director: FakeDirector) -> None:
    director.want(cloud="other")
    await director.until(lambda: len(on(director, "other")) == 2)
    victim = min(on(director, "other"))
    await director.end_agent(victim, with_engines=True)

    await director.until(lambda: victim in director.deleted)
    await director.until(lambda: len(on(director, "other")) == 2 and not on(director, "test"))
    await settled(director)


async def test_more_nodes_may_be_wanted_while_it_moves(director: FakeDirector) -> None:
    director.want(cloud="other")
    await director.until(lambda: len(director.nodes) == 4)
    director.want(roles={"front": 1, "back": 2}, places={"back": {"third": 1}})
    await director.until(lambda: len(on(director, "third")) == 1 and len(on(director, "other")) == 2)
    await director.until(lambda: not on(director, "test"))
    await settled(director)


async def test_a_stop_in_the_middle_gives_everything_back(director: FakeDirector) -> None:
    director.want(cloud="other")
    await director.until(lambda: len(director.nodes) == 4)

    director.want(running=False)
    await director.until(lambda: director.nodes == {})
    await director.until_state(S.STOPPED)


# -- the director: the manager itself moves -------------------------------------------------------------------------


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    clouds = {
        "sim": {"driver": "sim", "block": BLOCK},
        "other": {"driver": "sim", "block": "127.243.0.0/16"},
    }
    async with open_rig(tmp_path, clouds=clouds) as rig:
        yield rig


def provider(rig: Rig, name: str) -> sim.Account:
    return sim._accounts[rig.settings.data_dir / "clouds" / name]


async def moving(rig: Rig) -> str:
    """Return a service that runs without nodes, and is to be on `other`; its manager's successor is asked for."""
    user = await rig.add_user()
    service = (await rig.create(user)).id
    await rig.enrol_manager(service)
    await rig.services.start(service, actor="user:alice", key=None, expected=None)
    await rig.report(service, S.RUNNING)
    await rig.services.change(
        service, lambda _, wanted: wanted.model_copy(update={"cloud": "other"}), kind="move", actor="user:alice"
    )
    await rig.report(service, S.RUNNING)
    await rig.reconciler.watch()
    await rig.settle()
    return service


async def managers(rig: Rig, service: str) -> list[tuple[str, int, NodeState]]:
    rows = [row for row in await rig.instances(service) if row.kind == "manager" and row.state is not N.GONE]
    return [(row.cloud, row.epoch, row.state) for row in rows]


async def newest(rig: Rig, service: str) -> str:
    return [row.id for row in await rig.instances(service) if row.kind == "manager"][-1]


async def test_the_manager_stays_until_its_successor_reports(rig: Rig) -> None:
    service = await moving(rig)
    old = (await rig.manager(service)).id
    assert await managers(rig, service) == [("sim", 1, N.SERVING), ("other", 2, N.BOOTING)]
    assert (await rig.service(service)).epoch == 1

    await rig.enrol(await newest(rig, service))
    assert await managers(rig, service) == [("sim", 1, N.DRAINING), ("other", 2, N.CONFIGURING)]
    assert (await rig.service(service)).epoch == 2
    with pytest.raises(ForbiddenError, match="replaced"):
        await rig.enrol(old)
    await rig.reconciler.reconcile()
    await rig.reconciler.watch()
    assert len(await managers(rig, service)) == 2  # it has not said yet that all is as wanted

    await rig.report(service, S.RUNNING)
    await rig.reconciler.watch()
    await rig.settle()
    assert await managers(rig, service) == [("other", 2, N.SERVING)]
    assert provider(rig, "sim").vms == {}
    [event] = await rig.events("manager-moved")
    assert event.message.startswith("epoch 2: ")


async def test_a_cloud_that_refuses_the_manager_keeps_it_where_it_is(rig: Rig) -> None:
    provider(rig, "other").weather = CloudRefusedError("no more machines for you")
    service = await moving(rig)

    for _ in range(4):
        rig.clock.advance(seconds=5)
        await rig.report(service, S.RUNNING)
        await rig.reconciler.watch()
    await rig.settle()
    assert await managers(rig, service) == [("sim", 1, N.SERVING)]
    assert len(await rig.events("instance-refused")) == 1  # it is not asked all the time

    provider(rig, "other").weather = None
    rig.clock.advance(seconds=rig.settings.manager_retry_s)
    await rig.report(service, S.RUNNING)
    await rig.reconciler.watch()
    assert ("other", 2, N.BOOTING) in await managers(rig, service)


async def test_a_successor_that_never_boots_is_given_back_and_another_one_is_made(rig: Rig) -> None:
    service = await moving(rig)
    first = await newest(rig, service)
    for _ in range(31):
        rig.clock.advance(seconds=10)
        await rig.report(service, S.RUNNING)
    await rig.reconciler.watch()
    assert (await rig.instance(first)).state is N.GONE

    await rig.reconciler.watch()
    second = await newest(rig, service)
    assert second != first
    with pytest.raises(ForbiddenError, match="no longer wanted"):
        await rig.enrol(first)
    await rig.enrol(second)
    assert (await rig.service(service)).epoch == 2


async def test_a_successor_whose_machine_dies_leaves_nothing_behind(rig: Rig) -> None:
    service = await moving(rig)
    first = await newest(rig, service)
    rig.clock.advance(seconds=1)
    await provider(rig, "other").kill((await rig.instance(first)).cloud_id, "the host burns")

    for _ in range(3):
        await rig.reconciler.reconcile()
        rig.clock.advance(seconds=20)
        await rig.report(service, S.RUNNING)
        await rig.reconciler.watch()

    assert (await rig.instance(first)).state is N.GONE
    second = await newest(rig, service)
    assert {vm.token for vm in provider(rig, "other").vms.values()} == {second}
    await rig.enrol(second)
    await rig.report(service, S.RUNNING)
    await rig.reconciler.watch()
    await rig.settle()
    assert await managers(rig, service) == [("other", 2, N.SERVING)]


async def test_when_the_old_manager_dies_during_the_move_its_successor_takes_over_all_the_same(rig: Rig) -> None:
    service = await moving(rig)
    old = await rig.manager(service)
    rig.clock.advance(seconds=1)
    await provider(rig, "sim").kill(old.cloud_id)
    await rig.reconciler.reconcile()

    await rig.reconciler.watch()
    await rig.settle()
    await rig.reconciler.reconcile()

    assert await managers(rig, service) == [("other", 2, N.BOOTING)]
    assert provider(rig, "sim").vms == {}
    await rig.enrol(await newest(rig, service))
    await rig.report(service, S.RUNNING)
    assert await managers(rig, service) == [("other", 2, N.SERVING)]
    assert len(provider(rig, "other").vms) == 1


async def test_a_director_that_restarts_in_the_middle_finishes_it(tmp_path: Path) -> None:
    clouds = {"sim": {"driver": "sim", "block": BLOCK}, "other": {"driver": "sim", "block": "127.243.0.0/16"}}
    clock = HandClock()
    async with open_rig(tmp_path, clock=clock, clouds=clouds) as rig:
        service = await moving(rig)
        await rig.enrol(await newest(rig, service))
    async with open_rig(tmp_path, clock=clock, clouds=clouds) as rig:
        await rig.reconciler.reconcile()
        await rig.report(service, S.RUNNING)
        await rig.reconciler.watch()
        await rig.settle()

        assert await managers(rig, service) == [("other", 2, N.SERVING)]
        assert provider(rig, "sim").vms == {}
        assert await rig.credits((await rig.service(service)).user_id) == 98
