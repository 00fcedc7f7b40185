"""The ledger makes what it has written down, once, and leaves nothing behind whatever the cloud does."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from conpaas.cloud.sim import Lost
from conpaas.core.errors import (
    CloudBusyError,
    CloudRefusedError,
    ConflictError,
    DeadlineError,
    NoCreditError,
    NotFoundError,
    PeerError,
    QuotaExceededError,
)
from conpaas.core.messages.internal import Gone, NodeReport, RequestInstances
from conpaas.core.states import NodeState, ServiceState
from tests.fakes.director import BLOCK, DATABASES, Rig, open_rig


@pytest.fixture(params=DATABASES)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, request.param) as rig:
        yield rig


async def started(rig: Rig, credit: int = 100) -> tuple[str, str]:
    """Return a user and a service that is to run and has no nodes yet."""
    user = await rig.add_user(credit=credit)
    service = (await rig.create(user)).id
    await rig.services.start(service, actor="user:alice", key=None, expected=None)
    return user, service


async def test_credits_fall_as_on_the_slides(rig: Rig) -> None:
    user = await rig.add_user(credit=9999)
    service = (await rig.create(user)).id
    assert await rig.credits(user) == 9998

    await rig.services.start(service, actor="user:alice", key=None, expected=None)
    await rig.add_nodes(service, 1)
    assert await rig.credits(user) == 9997

    await rig.add_nodes(service, 3, key="second")
    assert await rig.credits(user) == 9994


async def test_asking_twice_with_one_key_makes_the_instances_once(rig: Rig) -> None:
    user, service = await started(rig)

    first = await rig.add_nodes(service, 3)
    again = await rig.add_nodes(service, 3)

    assert first == again
    assert len(rig.at_cloud()) == 4
    assert await rig.credits(user) == 96


async def test_asking_twice_at_the_same_time_makes_the_instances_once(rig: Rig) -> None:
    _, service = await started(rig)

    one, other = await asyncio.gather(rig.add_nodes(service, 2), rig.add_nodes(service, 2))

    assert one == other
    assert len(rig.at_cloud()) == 3


async def test_a_refused_instance_is_gone_with_the_clouds_words_and_costs_nothing(rig: Rig) -> None:
    user, service = await started(rig)
    rig.cloud.fail("create", None, QuotaExceededError("4 of 4 instances are in use"))

    body = RequestInstances(count=2, cloud="", key="k")
    nodes = await rig.services.request_nodes(service, body)

    assert sorted((node.state, node.reason) for node in nodes) == [
        (NodeState.BOOTING, ""),
        (NodeState.GONE, "4 of 4 instances are in use"),
    ]
    assert await rig.credits(user) == 98
    assert [event.message for event in await rig.events("instance-refused")] == ["4 of 4 instances are in use"]


async def test_a_busy_cloud_is_asked_again(rig: Rig) -> None:
    _, service = await started(rig)
    rig.cloud.fail("create", CloudBusyError("slow down"), CloudBusyError("slow down"))

    [node] = await rig.add_nodes(service, 1)

    assert (await rig.instance(node)).state is NodeState.BOOTING


async def test_a_lost_answer_leaves_an_intent_that_reconciliation_adopts(rig: Rig) -> None:
    user, service = await started(rig)
    rig.cloud.fail("create", Lost(DeadlineError("no answer")))

    [node] = await rig.add_nodes(service, 1)
    assert (await rig.instance(node)).state is NodeState.REQUESTED

    await rig.reconciler.reconcile()

    row = await rig.instance(node)
    assert row.state is NodeState.BOOTING
    assert row.cloud_id
    assert row.address
    assert await rig.credits(user) == 98


async def test_an_intent_that_the_cloud_never_heard_of_is_asked_for_again(rig: Rig) -> None:
    _, service = await started(rig)
    rig.cloud.fail("create", DeadlineError("no connection"))
    [node] = await rig.add_nodes(service, 1)
    assert node not in rig.at_cloud()

    await rig.reconciler.reconcile()

    assert node in rig.at_cloud()


async def test_an_intent_that_cannot_be_made_in_time_is_given_up_and_refunded(rig: Rig) -> None:
    user, service = await started(rig)
    rig.cloud.fail("create", *[DeadlineError("no connection")] * 3)
    [node] = await rig.add_nodes(service, 1)
    await rig.reconciler.reconcile()

    rig.clock.advance(seconds=301)
    await rig.reconciler.reconcile()

    assert (await rig.instance(node)).state is NodeState.GONE
    assert await rig.credits(user) == 99


async def test_credits_that_run_out_in_the_middle_give_what_they_pay_for(rig: Rig) -> None:
    user, service = await started(rig, credit=3)

    nodes = await rig.services.request_nodes(service, RequestInstances(count=5, cloud="", key="k"))

    assert [node.state for node in nodes].count(NodeState.GONE) == 3
    assert nodes[-1].reason == "the credits pay for 2 of 5 instances"
    assert await rig.credits(user) == 0
    [event] = await rig.events("credits-short")
    assert event.message == "the credits pay for 2 of 5 instances"


async def test_without_credit_no_service_is_made(rig: Rig) -> None:
    user = await rig.add_user(credit=0)

    with pytest.raises(NoCreditError):
        await rig.create(user)

    assert rig.at_cloud() == set()
    assert await rig.events("service-created") == []


async def test_without_credit_no_service_is_started(rig: Rig) -> None:
    user = await rig.add_user(credit=1)
    service = (await rig.create(user)).id

    with pytest.raises(NoCreditError):
        await rig.services.start(service, actor="user:alice", key=None, expected=None)

    assert (await rig.service(service)).state is ServiceState.INIT


async def test_a_service_that_is_not_to_run_gets_no_nodes(rig: Rig) -> None:
    user = await rig.add_user()
    service = (await rig.create(user)).id

    with pytest.raises(ConflictError, match="not to run"):
        await rig.add_nodes(service, 1)


async def test_another_services_node_cannot_be_deleted(rig: Rig) -> None:
    user, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)
    other = (await rig.create(user, name="other")).id

    with pytest.raises(NotFoundError):
        await rig.services.delete_node(other, node, Gone())
    with pytest.raises(NotFoundError):
        await rig.services.delete_node(service, (await rig.manager(service)).id, Gone())

    assert node in rig.at_cloud()


async def test_deleting_twice_is_fine(rig: Rig) -> None:
    _, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)

    await asyncio.gather(rig.ledger.delete(node, "a"), rig.ledger.delete(node, "b"))
    await rig.ledger.delete(node, "c")

    assert node not in rig.at_cloud()
    assert (await rig.instance(node)).state is NodeState.GONE


async def test_what_a_cloud_does_not_delete_now_is_deleted_later(rig: Rig) -> None:
    _, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)
    rig.cloud.fail("delete", CloudBusyError("later"))

    await rig.ledger.delete(node, "enough")
    assert (await rig.instance(node)).state is NodeState.DELETING

    await rig.reconciler.reconcile()
    assert (await rig.instance(node)).state is NodeState.GONE
    assert node not in rig.at_cloud()


async def test_an_instance_deleted_while_it_is_being_made_does_not_stay(rig: Rig) -> None:
    _, service = await started(rig)
    rig.cloud.fail("create", Lost(DeadlineError("no answer")))
    [node] = await rig.add_nodes(service, 1)

    await rig.ledger.delete(node, "changed my mind")  # its cloud id is unknown: found by its token

    assert node not in rig.at_cloud()
    assert (await rig.instance(node)).state is NodeState.GONE


async def test_an_instance_given_back_before_its_turn_is_never_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    user, service = await started(rig)
    account = rig.director.clouds.account("sim")
    account.calls = asyncio.Semaphore(1)
    asked: list[object] = []
    monkeypatch.setattr(account.cloud, "create", asked.append)

    async with account.calls, asyncio.timeout(45):
        asking = asyncio.create_task(rig.add_nodes(service, 1))
        while not (nodes := await rig.agents(service)) or not account.calls._waiters:
            await asyncio.sleep(0)
        await rig.ledger.delete(nodes[0], "changed my mind")
        assert (await rig.instance(nodes[0])).state is NodeState.DELETING
    await asking
    await rig.settle()

    assert asked == []
    assert (await rig.instance(nodes[0])).state is NodeState.GONE
    assert await rig.credits(user) == 99  # the manager's


async def test_an_instance_that_dies_is_lost_and_costs_no_more(rig: Rig) -> None:
    user, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)
    rig.clock.advance(seconds=1)
    await rig.cloud.kill((await rig.instance(node)).cloud_id, "the host burns")

    await rig.reconciler.reconcile()
    rig.clock.advance(hours=5)
    await rig.reconciler.charge()

    row = await rig.instance(node)
    assert (row.state, row.reason) == (NodeState.LOST, "the host burns")
    assert row.charged == 1
    assert await rig.credits(user) == 100 - 1 - 6  # the manager runs on


async def test_an_instance_that_vanishes_is_lost(rig: Rig) -> None:
    _, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)
    rig.clock.advance(seconds=30)
    await rig.cloud.vanish((await rig.instance(node)).cloud_id)

    await rig.reconciler.reconcile()

    assert (await rig.instance(node)).state is NodeState.LOST


async def test_what_hinders_an_instance_that_runs_is_told_when_it_begins_and_when_it_ends(rig: Rig) -> None:
    _, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)
    vm = await rig.director.clouds.usable("sim").describe((await rig.instance(node)).cloud_id)
    halted = replace(vm, reason="the disk is full")

    for seen in (vm, halted, halted, vm, vm):
        await rig.ledger.observe(await rig.instance(node), seen)

    assert [event.message for event in await rig.events("instance-hindered")] == [f"{node}: the disk is full"]
    assert [event.message for event in await rig.events("instance-well-again")] == [node]


async def test_a_list_that_lags_behind_loses_nothing(tmp_path: Path) -> None:
    clouds = {"sim": {"driver": "sim", "block": BLOCK, "list_s": 60}}
    async with open_rig(tmp_path, clouds=clouds) as rig:
        _, service = await started(rig)
        [node] = await rig.add_nodes(service, 1)
        rig.clock.advance(seconds=30)

        await rig.reconciler.reconcile()

        assert (await rig.instance(node)).state is NodeState.BOOTING
        assert len(rig.at_cloud()) == 2


async def test_only_orphans_with_our_tag_are_deleted(rig: Rig) -> None:
    _, service = await started(rig)
    foreign = rig.cloud.add_foreign()
    ours = rig.cloud.add_foreign(rig.director.trust.deployment)

    await rig.reconciler.reconcile()
    assert ours in rig.cloud.vms  # told before anything is done
    assert [event.message for event in await rig.events("orphan-found")] == [
        f"{ours} ({rig.cloud.vms[ours].token}) on 'sim' is not in the ledger"
    ]
    rig.clock.advance(seconds=10)
    await rig.reconciler.reconcile()

    assert foreign in rig.cloud.vms
    assert ours not in rig.cloud.vms
    assert len(await rig.events("orphan-deleted")) == 1
    assert len(await rig.instances(service)) == 1


async def test_an_instance_that_comes_back_from_the_dead_is_deleted_again(rig: Rig) -> None:
    _, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)
    rig.cloud.fail("delete", None)
    vm = rig.cloud.vms[(await rig.instance(node)).cloud_id]
    await rig.ledger.delete(node, "enough")
    rig.cloud.vms[vm.id] = vm

    for _ in range(2):
        await rig.reconciler.reconcile()
        rig.clock.advance(seconds=10)

    assert vm.id not in rig.cloud.vms


async def test_a_cloud_that_is_away_stops_nothing_else(rig: Rig) -> None:
    await started(rig)
    rig.cloud.fail("list", CloudBusyError("maintenance"))

    await rig.reconciler.reconcile()


async def test_a_driver_that_breaks_ends_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    user, service = await started(rig)
    cloud = rig.director.clouds.usable("sim")

    async def break_down(*_: object) -> None:
        raise ZeroDivisionError("oh")

    with monkeypatch.context() as patch:
        for verb in ("create", "list", "delete", "describe"):
            patch.setattr(cloud, verb, break_down)
        [node] = await rig.add_nodes(service, 1)
        await rig.reconciler.reconcile()
        await rig.reconciler.watch()
        assert (await rig.instance(node)).state is NodeState.REQUESTED
    await rig.reconciler.reconcile()

    assert (await rig.instance(node)).state is NodeState.BOOTING
    assert await rig.credits(user) == 98


async def test_a_cloud_that_cannot_be_used_says_why(rig: Rig) -> None:
    user = await rig.add_user()

    with pytest.raises(CloudRefusedError, match="there is no driver 'nonesuch'"):
        await rig.create(user, cloud="broken")
    with pytest.raises(NotFoundError, match="no cloud 'moon'"):
        await rig.create(user, cloud="moon")


async def test_hours_are_charged_when_they_have_begun(rig: Rig) -> None:
    user, service = await started(rig)
    [node] = await rig.add_nodes(service, 1)
    await rig.reconciler.charge()
    assert await rig.credits(user) == 98

    rig.clock.advance(hours=1)
    await rig.reconciler.charge()
    assert await rig.credits(user) == 98  # an hour on the dot is one hour

    rig.clock.advance(seconds=1)
    await rig.reconciler.charge()
    await rig.reconciler.charge()
    assert await rig.credits(user) == 96

    rig.clock.advance(hours=7)  # nobody looked meanwhile
    await rig.ledger.delete(node, "enough")
    await rig.reconciler.charge()
    assert (await rig.instance(node)).charged == 9
    assert await rig.credits(user) == 100 - 9 - 9


async def test_low_credits_are_told_once(rig: Rig) -> None:
    user, service = await started(rig, credit=8)
    await rig.add_nodes(service, 1)
    await rig.reconciler.charge()
    assert await rig.events("credits-low") == []

    rig.clock.advance(hours=1, seconds=1)
    await rig.reconciler.charge()
    await rig.reconciler.charge()

    [event] = await rig.events("credits-low")
    assert (event.user_id, event.message) == (user, "4 credits are left for 2 instances: fewer than 3 hours")


async def test_services_that_are_not_paid_are_stopped_and_never_terminated(rig: Rig) -> None:
    user = await rig.add_user(credit=4)
    service = (await rig.running(user, nodes=1)).id

    for _ in range(2):
        rig.clock.advance(hours=1, seconds=1)
        await rig.reconciler.charge()
    await rig.settle()

    assert await rig.credits(user) < 0
    row = await rig.service(service)
    assert row.wanted["running"] is False
    assert (row.state, row.terminated) == (ServiceState.STOPPED, None)
    assert rig.at_cloud() == {(await rig.manager(service)).id}


async def test_a_node_that_its_manager_takes_for_booting_is_still_asked_for(rig: Rig) -> None:
    """As when the director dies between the intent and the call: the manager knows the node, its cloud does not."""
    _, service = await started(rig)
    rig.cloud.fail("create", PeerError("the power went"))
    [node] = await rig.add_nodes(service, 1)
    await rig.report(service, ServiceState.PROLOGUE, nodes=(NodeReport(id=node, state=NodeState.BOOTING),))

    await rig.reconciler.reconcile()

    instance = await rig.instance(node)
    assert instance.cloud_id
    assert node in rig.at_cloud()
