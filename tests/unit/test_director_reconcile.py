"""The director looks after its managers: what is gone or silent is replaced, once, and the service keeps its state."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from conpaas.core.errors import QuotaExceededError
from conpaas.core.messages.model import MetricPoint
from conpaas.core.states import NodeState, OperationState, ServiceState
from conpaas.director.db.models import MetricRow
from conpaas.director.ledger import service_of
from tests.fakes.director import DATABASES, HandClock, Rig, open_rig

S = ServiceState


@pytest.fixture(params=DATABASES)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, request.param) as rig:
        yield rig


@pytest.fixture
async def service(rig: Rig) -> str:
    return (await rig.running(await rig.add_user(), nodes=2)).id


async def test_a_manager_that_reports_stays(rig: Rig, service: str) -> None:
    before = await rig.manager(service)
    for _ in range(10):
        rig.clock.advance(seconds=10)
        await rig.report(service, S.RUNNING)
        await rig.reconciler.watch()

    assert (await rig.manager(service)).id == before.id


async def test_a_silent_manager_is_replaced_and_the_service_keeps_its_state(rig: Rig, service: str) -> None:
    old = await rig.manager(service)
    nodes = await rig.agents(service)
    rig.clock.advance(seconds=21)

    await rig.reconciler.watch()

    new = await rig.manager(service)
    row = await rig.service(service)
    assert (row.epoch, row.state, new.epoch) == (2, S.RUNNING, 2)
    assert rig.at_cloud() == {new.id, *nodes}
    assert (await rig.instance(old.id)).state is NodeState.GONE
    [event] = await rig.events("manager-replaced")
    assert event.message == "epoch 2: it has been silent for 21 s"


async def test_a_manager_whose_instance_is_gone_is_replaced_without_waiting(rig: Rig, service: str) -> None:
    old = await rig.manager(service)
    rig.clock.advance(seconds=6)
    await rig.cloud.kill(old.cloud_id)

    await rig.reconciler.watch()
    await rig.reconciler.watch()

    assert (await rig.manager(service)).id != old.id


async def test_a_new_manager_gets_its_time_to_come_up(rig: Rig, service: str) -> None:
    rig.clock.advance(seconds=21)
    await rig.reconciler.watch()
    new = await rig.manager(service)

    rig.clock.advance(seconds=100)
    await rig.reconciler.watch()
    assert (await rig.manager(service)).id == new.id

    await rig.enrol(new.id)
    rig.clock.advance(seconds=19)
    await rig.reconciler.watch()
    assert (await rig.manager(service)).id == new.id


async def test_a_manager_that_never_comes_up_is_replaced(rig: Rig, service: str) -> None:
    rig.clock.advance(seconds=21)
    await rig.reconciler.watch()
    rig.clock.advance(seconds=301)

    await rig.reconciler.watch()

    assert (await rig.manager(service)).epoch == 3
    assert len(rig.at_cloud()) == 3


async def test_attempts_in_vain_are_not_made_all_the_time(rig: Rig, service: str) -> None:
    rig.cloud.fail("create", *[QuotaExceededError("full")] * 10)
    rig.clock.advance(seconds=21)
    for _ in range(10):
        rig.clock.advance(seconds=2)
        await rig.reconciler.watch()

    assert len(await rig.events("manager-replaced")) == 1
    rig.clock.advance(seconds=30)
    await rig.reconciler.watch()
    assert len(await rig.events("manager-replaced")) == 2


async def test_a_manager_is_replaced_even_without_credit(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        user = await rig.add_user(credit=2)
        service = (await rig.running(user, nodes=1)).id
        rig.clock.advance(seconds=21)

        await rig.reconciler.watch()

        assert (await rig.manager(service)).epoch == 2
        assert await rig.credits(user) == -1


async def test_a_restart_of_the_director_replaces_no_manager(tmp_path: Path) -> None:
    clock = HandClock()
    async with open_rig(tmp_path, clock=clock) as rig:
        service = (await rig.running(await rig.add_user())).id
        manager = (await rig.manager(service)).id
    clock.advance(hours=3)
    async with open_rig(tmp_path, clock=clock) as rig:
        await rig.reconciler.watch()
        assert (await rig.manager(service)).id == manager

        rig.clock.advance(seconds=21)
        await rig.reconciler.watch()
        assert (await rig.manager(service)).id != manager


@pytest.mark.parametrize("command", ["stop", "terminate"])
async def test_an_end_that_a_restart_interrupts_is_brought_about(tmp_path: Path, command: str) -> None:
    clock = HandClock()
    async with open_rig(tmp_path, clock=clock) as rig:
        service = (await rig.running(await rig.add_user(), nodes=2)).id
        if command == "stop":
            operation = await rig.services.stop(service, actor="a", key=None, expected=None)
        else:
            operation = await rig.services.terminate(service, actor="a", expected=None)
    clock.advance(seconds=1)
    async with open_rig(tmp_path, clock=clock) as rig:
        rig.clock.advance(seconds=21)

        await rig.reconciler.watch()

        assert (await rig.operation(operation.id)).state is OperationState.DONE
        assert len(rig.at_cloud()) == (1 if command == "stop" else 0)


async def test_a_stop_whose_manager_dies_is_brought_about(rig: Rig, service: str) -> None:
    operation = await rig.services.stop(service, actor="a", key=None, expected=None)
    rig.clock.advance(seconds=21)

    await rig.reconciler.watch()

    assert (await rig.service(service)).state is S.STOPPED
    assert await rig.agents(service) == []
    assert (await rig.operation(operation.id)).state is OperationState.DONE


async def test_managers_that_a_crash_left_over_are_deleted(rig: Rig, service: str) -> None:
    async with rig.db.write() as session:
        (await service_of(session, service)).epoch = 7

    await rig.reconciler.reconcile()

    assert all(node.kind == "agent" for node in await rig.instances(service))
    await rig.reconciler.watch()
    assert (await rig.manager(service)).epoch == 8


async def test_old_metrics_are_forgotten(rig: Rig, service: str) -> None:
    point = MetricPoint(at=rig.clock.now(), values={"request_rate": 1.0})
    await rig.report(service, S.RUNNING, points=(point,))
    rig.clock.advance(hours=25)

    await rig.reconciler.prune()

    async with rig.db.read() as session:
        assert await session.scalar(select(func.count()).select_from(MetricRow)) == 0
