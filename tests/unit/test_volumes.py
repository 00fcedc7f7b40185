"""The director gives each node its volume once, with the data that was there, and leaves none behind."""

from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from conpaas.cloud import sim
from conpaas.cloud.sim import Lost
from conpaas.core.cloud import Cloud, CloudContext, Vm, VmRequest, Volume, VolumeRequest, VolumeState
from conpaas.core.errors import BadInputError, CloudRefusedError, ConflictError, ConpaasError, PeerError
from conpaas.core.messages.internal import RequestInstances, VolumeView
from conpaas.core.states import NodeState
from conpaas.director.db.models import VolumeRow
from conpaas.director.volumes import Volumes
from tests.fakes.director import BLOCK, DATABASES, Rig, open_rig

STEPS = ("create_volume", "describe_volume", "attach", "detach", "list_volumes", "delete_volume")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


@pytest.fixture(params=DATABASES)
async def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, request.param) as rig:
        yield rig


def volumes(rig: Rig) -> Volumes:
    return rig.director.volumes


async def started(rig: Rig, nodes: int = 1, owner: str = "alice", **words: Any) -> tuple[str, list[str]]:
    """Return a service that keeps data, and its nodes."""
    service = (await rig.create(await rig.add_user(owner), kind="notes", **words)).id
    await rig.enrol_manager(service)
    await rig.services.start(service, actor="user:alice", key=None, expected=None)
    return service, await rig.add_nodes(service, nodes)


async def another(rig: Rig, service: str, key: str = "another", cloud: str = "") -> str:
    """Do as a manager does that needs one node more; return its id."""
    body = RequestInstances(count=1, cloud=cloud, key=key)
    return (await rig.services.request_nodes(service, body))[0].id


async def bring(rig: Rig, service: str, node: str) -> VolumeView:
    """Do as a manager does: ask until the volume is there, whatever goes wrong meanwhile."""
    seen: list[VolumeView | ConpaasError] = []
    for _ in range(10):
        try:
            seen.append(view := await volumes(rig).ensure(service, node, "store"))
        except PeerError as exc:
            seen.append(exc)
            continue
        if view.ready:
            return view
        rig.clock.advance(seconds=1)
    raise AssertionError(f"it does not come: {seen}")


async def ended(rig: Rig, service: str) -> None:
    """Terminate a service and let the director look after what is left."""
    if (await rig.service(service)).terminated is None:
        await rig.services.terminate(service, actor="user:alice", expected=None)
    await rig.settle()
    for _ in range(5):
        rig.clock.advance(minutes=5)
        await rig.reconciler.watch()
        await rig.reconciler.reconcile()
        await volumes(rig).reconcile()
        await rig.settle()


async def rows(rig: Rig) -> Sequence[VolumeRow]:
    async with rig.db.read() as session:
        return (await session.scalars(select(VolumeRow).order_by(VolumeRow.seq))).all()


async def cloud_id(rig: Rig, node: str) -> str:
    return (await rig.instance(node)).cloud_id


def holders(rig: Rig) -> dict[str, str | None]:
    """Return which instance has which volume, at the cloud."""
    return {volume.id: volume.vm for volume in rig.cloud.volumes.values()}


# -- giving ---------------------------------------------------------------------------------------------------------


async def test_a_node_gets_one_volume_however_often_it_is_asked_for(anywhere: Rig) -> None:
    rig = anywhere
    service, (node,) = await started(rig)
    first = await bring(rig, service, node)
    again = await bring(rig, service, node)

    assert first == again
    assert first.devices
    (volume,) = rig.cloud.volumes.values()
    assert (volume.token, volume.vm) == (first.id, await cloud_id(rig, node))
    (row,) = await rows(rig)
    assert (row.id, row.cloud_id, row.instance_id, row.zone) == (first.id, volume.id, node, "zone-a")


async def test_a_volume_that_takes_long_is_waited_for(tmp_path: Path) -> None:
    async with open_rig(tmp_path, clouds={"sim": {"driver": "sim", "block": BLOCK, "volume_s": 5}}) as rig:
        service, (node,) = await started(rig)
        view = await volumes(rig).ensure(service, node, "store")
        assert (view.ready, view.devices) == (False, ())
        rig.clock.advance(seconds=3)
        assert not (await volumes(rig).ensure(service, node, "store")).ready

        assert (await bring(rig, service, node)).ready
        assert rig.cloud.calls.count("create_volume") == 1


async def test_two_nodes_get_two_volumes(rig: Rig) -> None:
    service, nodes = await started(rig, 2)
    views = [await bring(rig, service, node) for node in nodes]

    assert len({view.id for view in views}) == 2
    assert sorted(map(str, holders(rig).values())) == sorted([await cloud_id(rig, node) for node in nodes])


async def test_who_keeps_no_data_gets_no_volume(rig: Rig) -> None:
    service, (node,) = await started(rig)
    echo = await rig.running(await rig.add_user("bob"), kind="echo")
    (front,) = await rig.agents(echo.id)

    with pytest.raises(BadInputError, match="'front' keeps no data"):
        await volumes(rig).ensure(echo.id, front, "front")
    with pytest.raises(BadInputError, match="no role 'proxy'"):
        await volumes(rig).ensure(service, node, "proxy")
    await rig.ledger.delete(node)
    with pytest.raises(ConflictError, match="has ended"):
        await volumes(rig).ensure(service, node, "store")
    assert rig.cloud.volumes == {}
    assert await rows(rig) == []


async def test_a_cloud_that_refuses_says_why_and_nothing_is_left(rig: Rig) -> None:
    service, (node,) = await started(rig)
    rig.cloud.fail("create_volume", CloudRefusedError("the datastore is full"))
    with pytest.raises(CloudRefusedError, match="the datastore is full"):
        await volumes(rig).ensure(service, node, "store")

    assert (await bring(rig, service, node)).ready
    assert len(rig.cloud.volumes) == len(await rows(rig)) == 1


# -- taking over ----------------------------------------------------------------------------------------------------


async def test_the_next_node_takes_over_the_volume_of_one_that_died(anywhere: Rig) -> None:
    rig = anywhere
    service, (node,) = await started(rig)
    before = await bring(rig, service, node)
    await rig.cloud.kill(await cloud_id(rig, node))
    await rig.reconciler.reconcile()
    await rig.ledger.delete(node, "lost", failed=True)
    successor = await another(rig, service)

    after = await bring(rig, service, successor)
    assert after.id == before.id
    assert list(holders(rig).values()) == [await cloud_id(rig, successor)]


async def test_a_volume_is_not_torn_from_a_node_that_may_still_write_to_it(rig: Rig) -> None:
    service, (node,) = await started(rig)
    before = await bring(rig, service, node)
    rig.cloud.fail("delete", PeerError("connection refused"))
    await rig.ledger.delete(node, "silent", failed=True)
    assert (await rig.instance(node)).state is NodeState.DELETING
    successor = await another(rig, service)
    for _ in range(3):
        view = await volumes(rig).ensure(service, successor, "store")
        assert (view.id, view.ready) == (before.id, False)
    assert list(holders(rig).values()) == [await cloud_id(rig, node)]

    await rig.reconciler.reconcile()
    assert (await bring(rig, service, successor)).id == before.id


async def test_a_volume_that_its_dead_instance_still_holds_is_detached(rig: Rig) -> None:
    """Some clouds detach it late, or never."""
    service, (node,) = await started(rig)
    view = await bring(rig, service, node)
    await rig.ledger.delete(node)
    (volume,) = rig.cloud.volumes.values()
    volume.vm = await cloud_id(rig, node)
    successor = await another(rig, service)

    assert (await bring(rig, service, successor)).id == view.id
    assert "detach" in rig.cloud.calls


async def test_a_stopped_service_keeps_its_volumes_and_its_nodes_get_them_back(rig: Rig) -> None:
    service, nodes = await started(rig, 2)
    before = {(await bring(rig, service, node)).id for node in nodes}
    for node in nodes:
        await rig.ledger.delete(node)
    await volumes(rig).reconcile()
    assert list(holders(rig).values()) == [None, None]

    after = {(await bring(rig, service, await another(rig, service, key))).id for key in ("a", "b")}
    assert after == before
    assert len(rig.cloud.volumes) == 2


async def test_the_oldest_volume_is_taken_over_first_and_never_another_services(rig: Rig) -> None:
    service, nodes = await started(rig, 2)
    mine = [(await bring(rig, service, node)).id for node in nodes]
    other, (theirs,) = await started(rig, owner="bob")
    for node in reversed(nodes):
        await rig.ledger.delete(node)

    assert (await bring(rig, other, theirs)).id not in mine
    assert (await bring(rig, service, await another(rig, service))).id == mine[0]


# -- zones ----------------------------------------------------------------------------------------------------------


async def in_zone_b(rig: Rig) -> tuple[str, str]:
    """Return a service whose data is in the zone that nobody chooses, and its one node."""
    rig.cloud.zones = ("zone-b", "zone-a")
    service, (node,) = await started(rig)
    await bring(rig, service, node)
    rig.cloud.zones = ("zone-a", "zone-b")
    return service, node


async def test_who_is_to_take_over_a_volume_is_made_in_its_zone(rig: Rig) -> None:
    service, node = await in_zone_b(rig)
    elsewhere = await another(rig, service, "one more")
    await bring(rig, service, elsewhere)
    await rig.ledger.delete(node)
    successor = await another(rig, service)
    beyond = await another(rig, service, "beyond")

    zones = [(await rig.instance(one)).zone for one in (elsewhere, successor, beyond)]
    assert zones == ["zone-a", "zone-b", "zone-a"], "one volume needs one successor"
    assert (await bring(rig, service, successor)).ready
    assert (await bring(rig, service, beyond)).ready
    assert len(rig.cloud.volumes) == 3


async def test_no_node_starts_empty_because_it_is_where_the_data_is_not(rig: Rig) -> None:
    service, node = await in_zone_b(rig)
    idle = await another(rig, service)
    await rig.ledger.delete(node)

    with pytest.raises(ConflictError, match=r"is on vol-\w+ in zone-b, and vm-\w+ in zone-a") as caught:
        await volumes(rig).ensure(service, idle, "store")
    assert "give this node back" in caught.value.hint
    await rig.ledger.delete(idle)
    assert (await bring(rig, service, await another(rig, service, "again"))).ready
    assert len(rig.cloud.volumes) == 1


async def test_a_node_that_goes_to_another_cloud_is_not_bound_to_a_zone_of_the_first(tmp_path: Path) -> None:
    clouds = {name: {"driver": "sim", "block": BLOCK} for name in ("sim", "other")}
    async with open_rig(tmp_path, clouds=clouds) as rig:
        other = sim.account(
            CloudContext(
                name="other",
                deployment=rig.director.trust.deployment,
                directory=rig.settings.data_dir / "clouds" / "other",
                clock=rig.clock,
            )
        )
        other.zones = ("elsewhere",)
        rig.cloud.zones = ("zone-b",)
        service, (node,) = await started(rig, fallback=("other",))
        before = await bring(rig, service, node)
        await rig.ledger.delete(node)
        rig.cloud.full = "no host is free"
        successor = await another(rig, service, cloud="sim")

        instance = await rig.instance(successor)
        assert (instance.cloud, instance.zone) == ("other", "elsewhere")
        assert (await bring(rig, service, successor)).id != before.id
        assert len(other.volumes) == len(rig.cloud.volumes) == 1


# -- bad days -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The director is, here."""


@contextmanager
def survived() -> Iterator[None]:
    """End the block where the director is killed."""
    try:
        yield
    except Killed:
        pass
    except BaseExceptionGroup as group:
        _, others = group.split(Killed)
        if others is not None:
            raise others from None


def kill_at(rig: Rig, step: int, *, done: bool) -> list[sim.Verb]:
    """Kill the director at so manyeth call about volumes, before its effect or after; return the calls it made."""
    begin = rig.cloud.begin
    seen: list[sim.Verb] = []

    def begin_or_die(verb: sim.Verb) -> sim.Outcome:
        outcome = begin(verb)
        if verb in STEPS:
            seen.append(verb)
            if len(seen) == step:
                if done:
                    return Lost(Killed())  # type: ignore[arg-type]
                raise Killed
        return outcome

    rig.cloud.begin = begin_or_die  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(1, 10))
async def test_a_director_killed_at_any_step_loses_no_data_and_leaves_nothing(
    tmp_path: Path, step: int, done: bool
) -> None:
    async with open_rig(tmp_path) as rig:
        service, (node,) = await started(rig)
        clock, account = rig.clock, rig.cloud
        seen = kill_at(rig, step, done=done)
    phase, first, second, given = 0, node, "", set[str]()
    while phase < 4:
        with survived():
            async with open_rig(tmp_path, clock=clock) as rig:
                if phase == 0:
                    given.add((await bring(rig, service, first)).id)
                    phase = 1
                if phase == 1:
                    await rig.ledger.delete(first)
                    second = await another(rig, service)
                    volume = next(iter(account.volumes.values()))
                    volume.vm = await cloud_id(rig, first)  # it is to be detached
                    phase = 2
                if phase == 2:
                    given.add((await bring(rig, service, second)).id)
                    assert list(holders(rig).values()) == [await cloud_id(rig, second)]
                    phase = 3
                await ended(rig, service)
                assert account.volumes == {}
                assert all(row.deleted is not None for row in await rows(rig))
                phase = 4
    assert len(seen) > step, "the step is reached, and others after it"
    assert len(given) == 1, "one and the same volume"


@pytest.mark.parametrize("verb", STEPS[:3])
async def test_an_answer_that_is_lost_makes_nothing_twice(rig: Rig, verb: sim.Verb) -> None:
    service, (node,) = await started(rig)
    rig.cloud.fail(verb, Lost(PeerError("connection reset")))

    assert (await bring(rig, service, node)).ready
    assert rig.cloud.outcomes[verb] == deque()
    assert len(rig.cloud.volumes) == len(await rows(rig)) == 1


async def test_a_volume_that_its_cloud_lost_is_told_and_replaced_by_an_empty_one(rig: Rig) -> None:
    service, (node,) = await started(rig)
    before = await bring(rig, service, node)
    rig.cloud.volumes.clear()

    after = await bring(rig, service, node)
    assert after.id != before.id
    (event,) = await rig.events("volume-lost")
    assert before.id in event.message
    assert event.service_id == service


def has_failed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the cloud say so of every volume that it is asked about."""
    look = rig.cloud.look_volume

    def failed(volume: sim.SimVolume) -> Volume:
        return replace(look(volume), state=VolumeState.FAILED, vm=None, devices=(), reason="bad blocks")

    monkeypatch.setattr(rig.cloud, "look_volume", failed)


async def test_a_volume_that_could_not_be_made_is_deleted_and_made_anew(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, (node,) = await started(rig)
    first = await volumes(rig).ensure(service, node, "store")
    with monkeypatch.context() as patch:
        has_failed(rig, patch)
        assert not (await volumes(rig).ensure(service, node, "store")).ready
    (event,) = await rig.events("volume-lost")
    assert "still empty: bad blocks" in event.message

    assert (await bring(rig, service, node)).id != first.id
    assert len(rig.cloud.volumes) == 1


async def test_a_failed_volume_with_data_on_it_is_left_to_be_repaired(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, (node,) = await started(rig)
    before = await bring(rig, service, node)
    with monkeypatch.context() as patch:
        has_failed(rig, patch)
        with pytest.raises(CloudRefusedError, match="the data of a 'store', has failed: bad blocks") as caught:
            await volumes(rig).ensure(service, node, "store")
        assert "repair it there" in caught.value.hint

    assert (await bring(rig, service, node)).id == before.id
    assert await rig.events("volume-lost") == []


async def test_a_cloud_that_is_mistaken_for_a_moment_loses_no_data(rig: Rig) -> None:
    service, (node,) = await started(rig)
    before = await bring(rig, service, node)
    (volume,) = rig.cloud.volumes.values()
    volume.unknown_to.add("describe_volume")

    assert not (await volumes(rig).ensure(service, node, "store")).ready
    assert (await bring(rig, service, node)).id == before.id
    assert await rig.events("volume-lost") == []


# -- the end --------------------------------------------------------------------------------------------------------


async def test_a_terminated_services_volumes_are_deleted_and_nobody_elses(anywhere: Rig) -> None:
    rig = anywhere
    service, nodes = await started(rig, 2)
    for node in nodes:
        await bring(rig, service, node)
    other, (theirs,) = await started(rig, owner="bob")
    kept = await bring(rig, other, theirs)
    foreign = rig.cloud.make_volume(VolumeRequest(token="x", name="x", size=1), "somebody-else")
    for verb in ("list_volumes", "detach", "delete_volume"):
        rig.cloud.fail(verb, PeerError("connection refused"))

    await ended(rig, service)
    assert {volume.token for volume in rig.cloud.volumes.values()} == {kept.id, foreign.token}
    assert [row.id for row in await rows(rig) if row.deleted is None] == [kept.id]
    assert (await bring(rig, other, theirs)).id == kept.id
    calls = len(rig.cloud.calls)
    await volumes(rig).reconcile()
    assert rig.cloud.calls[calls:] == ["list_volumes"]


async def test_an_unknown_volume_that_bears_our_tag_is_told_once_and_stays(rig: Rig) -> None:
    service, (node,) = await started(rig)
    await bring(rig, service, node)
    deployment = rig.director.trust.deployment
    unknown = rig.cloud.make_volume(VolumeRequest(token="vol-lost", name="x", size=1), deployment)
    rig.cloud.make_volume(VolumeRequest(token="x", name="x", size=1), "somebody-else")
    for _ in range(3):
        await volumes(rig).reconcile()

    (event,) = await rig.events("volume-unknown")
    assert unknown.id in event.message
    assert unknown.id in rig.cloud.volumes


async def test_a_volume_that_is_made_while_its_service_is_terminated_is_deleted(rig: Rig) -> None:
    service, (node,) = await started(rig)
    driver = rig.director.clouds.usable("sim")
    make = driver.create_volume  # type: ignore[attr-defined]

    async def make_late(request: VolumeRequest) -> Volume:
        await ended(rig, service)
        assert [row.deleted is None for row in await rows(rig)] == [False]
        return await make(request)  # type: ignore[no-any-return]

    driver.create_volume = make_late  # type: ignore[attr-defined]
    await volumes(rig).ensure(service, node, "store")
    assert len(rig.cloud.volumes) == 1

    rig.clock.advance(minutes=1)
    for _ in range(2):
        await volumes(rig).reconcile()
    assert rig.cloud.volumes == {}
    assert all(row.deleted is not None for row in await rows(rig))


# -- clouds without volumes -----------------------------------------------------------------------------------------


class Diskless:
    """A cloud that has instances and nothing else."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def create(self, request: VmRequest) -> Vm:
        return await self._cloud.create(request)

    async def describe(self, vm: str) -> Vm:
        return await self._cloud.describe(vm)

    async def list(self) -> list[Vm]:
        return await self._cloud.list()

    async def delete(self, vm: str) -> None:
        await self._cloud.delete(vm)

    async def close(self) -> None:
        await self._cloud.close()


async def test_on_a_cloud_without_volumes_the_node_keeps_its_data_itself_and_it_is_told_once(rig: Rig) -> None:
    account = rig.director.clouds.account("sim")
    account.cloud = Diskless(rig.director.clouds.usable("sim"))
    service, nodes = await started(rig, 2)
    for node in [*nodes, *nodes]:
        view = await volumes(rig).ensure(service, node, "store")
        assert (view.ready, view.devices) == (True, ())
        assert "has no volumes" in view.reason

    (event,) = await rig.events("volume-refused")
    assert "starts empty" in event.message
    assert await rows(rig) == []
    await volumes(rig).reconcile()


async def test_a_cloud_that_cannot_be_used_now_is_not_one_without_volumes(rig: Rig) -> None:
    service, (node,) = await started(rig)
    account = rig.director.clouds.account("sim")
    cloud, account.cloud = account.cloud, None
    with pytest.raises(CloudRefusedError, match="cannot be used"):
        await volumes(rig).ensure(service, node, "store")
    account.cloud = cloud

    assert (await bring(rig, service, node)).devices
