"""What `core.cloud` promises about volumes, asked of every driver that has them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial

import pytest

from conpaas.core.cloud import Cloud, HasVolumes, HasZones, Vm, Volume, VolumeState
from conpaas.core.errors import BadInputError, CloudRefusedError
from tests.contract._clouds import (
    EFFECTIVE,
    FAILURES,
    PATIENCE_S,
    VOLUME_VERBS,
    Trouble,
    eventually,
    make,
    nothing_left,
    past_the_hang,
    troubles,
)
from tests.fakes.clouds import Fault, Harness, volume_request


class Disks(HasVolumes, Cloud):
    """A cloud with volumes: what both protocols promise."""


@pytest.fixture
async def disks(account: Harness) -> AsyncIterator[Disks]:
    cloud = account.open()
    if not isinstance(cloud, HasVolumes):
        await cloud.close()
        pytest.skip("no volumes")
    yield cloud  # type: ignore[misc]
    await cloud.close()


async def becomes(disks: Disks, volume: Volume | str, state: VolumeState) -> Volume:
    """Wait until a volume is in a state."""
    volume_id = volume if isinstance(volume, str) else volume.id
    look = partial(disks.describe_volume, volume_id)
    return await eventually(look, lambda seen: seen.state is state, f"{volume_id} is {state}")


async def make_volume(disks: Disks, token: str = "v-one") -> Volume:
    return await becomes(disks, await disks.create_volume(volume_request(token)), VolumeState.AVAILABLE)


async def attach(disks: Disks, volume: Volume, vm: Vm) -> Volume:
    await disks.attach(volume.id, vm.id)
    return await becomes(disks, volume, VolumeState.ATTACHED)


async def detach(disks: Disks, volume: Volume) -> Volume:
    await disks.detach(volume.id)
    return await becomes(disks, volume, VolumeState.AVAILABLE)


async def volumes_listed(disks: Disks, *ids: str) -> None:
    """Wait until exactly these volumes are listed."""
    expected = sorted(ids)

    async def look() -> list[str]:
        return sorted(volume.id for volume in await disks.list_volumes())

    await eventually(look, lambda seen: seen == expected, f"{expected} are listed")


async def test_a_volume_comes_up_with_its_token_and_at_least_its_size(account: Harness, disks: Disks) -> None:
    volume = await make_volume(disks)

    assert volume.token == "v-one"
    assert volume.size >= volume_request("v-one").size
    assert (volume.vm, volume.reason) == (None, "")
    assert [(seen.id, seen.token, seen.state) for seen in await disks.list_volumes()] == [
        (volume.id, "v-one", VolumeState.AVAILABLE)
    ]
    await disks.delete_volume(volume.id)
    await becomes(disks, volume, VolumeState.GONE)
    await volumes_listed(disks)
    await nothing_left(account)


async def test_the_same_token_gives_the_same_volume_also_when_asked_for_at_once(account: Harness, disks: Disks) -> None:
    other = account.open()
    assert isinstance(other, HasVolumes)
    asked = [driver.create_volume(volume_request("v-one")) for driver in (disks, other, disks, other)]
    volumes = await asyncio.gather(*asked)
    volumes.append(await other.create_volume(volume_request("v-one")))
    await other.close()

    assert len({volume.id for volume in volumes}) == 1
    await volumes_listed(disks, volumes[0].id)


async def test_a_volume_is_no_instance_and_an_instance_no_volume(disks: Disks) -> None:
    volume, vm = await make_volume(disks), await make(disks)

    assert [seen.id for seen in await disks.list()] == [vm.id]
    await volumes_listed(disks, volume.id)


async def test_an_attached_volume_is_found_in_its_instance_and_attaching_twice_is_fine(disks: Disks) -> None:
    volume, vm = await make_volume(disks), await make(disks)
    for _ in range(2):
        seen = await attach(disks, volume, vm)

        assert (seen.vm, seen.token) == (vm.id, "v-one")
        assert seen.devices
        assert all(device.startswith("/") for device in seen.devices)


async def test_an_attached_volume_goes_to_no_other_instance(disks: Disks) -> None:
    volume, vm, other = await make_volume(disks), await make(disks), await make(disks, "i-two")
    await attach(disks, volume, vm)

    with pytest.raises(CloudRefusedError):
        await disks.attach(volume.id, other.id)
    assert (await disks.describe_volume(volume.id)).vm == vm.id


async def test_a_detached_volume_goes_to_another_instance_and_detaching_twice_is_fine(disks: Disks) -> None:
    volume, vm, other = await make_volume(disks), await make(disks), await make(disks, "i-two")
    await detach(disks, volume)
    await attach(disks, volume, vm)
    for _ in range(2):
        seen = await detach(disks, volume)
        assert seen.vm is None

    assert (await attach(disks, volume, other)).vm == other.id


async def test_an_instance_may_have_several_volumes(disks: Disks) -> None:
    vm = await make(disks)
    volumes = [await attach(disks, await make_volume(disks, token), vm) for token in ("v-one", "v-two")]

    assert {volume.vm for volume in volumes} == {vm.id}
    first, second = (set(volume.devices) for volume in volumes)
    assert not first & second


async def test_a_volume_outlives_its_instance_and_goes_to_the_next_one(account: Harness, disks: Disks) -> None:
    volume, vm = await make_volume(disks), await make(disks)
    await attach(disks, volume, vm)
    await disks.delete(vm.id)

    await volumes_listed(disks, volume.id)
    assert (await detach(disks, volume)).vm is None
    next_vm = await make(disks, "i-two")
    assert (await attach(disks, volume, next_vm)).vm == next_vm.id
    await disks.delete(next_vm.id)
    await becomes(disks, volume, VolumeState.AVAILABLE)
    await disks.delete_volume(volume.id)
    await nothing_left(account)


async def test_a_volume_can_be_taken_from_an_instance_that_died(account: Harness, disks: Disks) -> None:
    volume, vm = await make_volume(disks), await make(disks)
    await attach(disks, volume, vm)
    await account.kill(vm.id)

    await detach(disks, volume)
    assert (await attach(disks, volume, await make(disks, "i-two"))).state is VolumeState.ATTACHED


async def test_an_attached_volume_is_not_deleted(disks: Disks) -> None:
    volume, vm = await make_volume(disks), await make(disks)
    await attach(disks, volume, vm)

    with pytest.raises(CloudRefusedError):
        await disks.delete_volume(volume.id)
    assert (await disks.describe_volume(volume.id)).vm == vm.id


async def test_deleting_a_volume_twice_or_at_once_is_fine(account: Harness, disks: Disks) -> None:
    volume = await make_volume(disks)
    await asyncio.gather(disks.delete_volume(volume.id), disks.delete_volume(volume.id))
    await disks.delete_volume(volume.id)

    await becomes(disks, volume, VolumeState.GONE)
    await nothing_left(account)


async def test_an_unknown_volume_is_gone_can_be_deleted_and_not_be_attached(disks: Disks) -> None:
    vm = await make(disks)

    assert (await disks.describe_volume("v-unknown")).state is VolumeState.GONE
    await disks.delete_volume("v-unknown")
    assert (await disks.detach("v-unknown")).state is VolumeState.GONE
    with pytest.raises(CloudRefusedError, match="v-unknown"):
        await disks.attach("v-unknown", vm.id)


async def test_a_volume_is_not_attached_to_an_instance_that_is_not_ours(disks: Disks, foreign: str) -> None:
    volume = await make_volume(disks)

    for vm in ("i-unknown", foreign):
        with pytest.raises(CloudRefusedError, match=vm):
            await disks.attach(volume.id, vm)
    assert (await disks.describe_volume(volume.id)).state is VolumeState.AVAILABLE


async def test_volumes_of_others_are_neither_seen_nor_touched(account: Harness, disks: Disks) -> None:
    theirs = account.open("dep-theirs")
    assert isinstance(theirs, HasVolumes)
    volume = await theirs.create_volume(volume_request("v-theirs"))
    vm = await make(disks)

    await volumes_listed(disks)
    assert (await disks.describe_volume(volume.id)).state is VolumeState.GONE
    await disks.delete_volume(volume.id)
    assert (await disks.detach(volume.id)).state is VolumeState.GONE
    with pytest.raises(CloudRefusedError):
        await disks.attach(volume.id, vm.id)
    assert [(seen.id, seen.vm) for seen in await theirs.list_volumes()] == [(volume.id, None)]
    await theirs.delete_volume(volume.id)
    await theirs.close()


async def test_a_volume_is_in_the_zone_that_was_asked_for(disks: Disks) -> None:
    if not isinstance(disks, HasZones):
        pytest.skip("no zones")
    zone = (await disks.zones())[-1]
    volume = await disks.create_volume(replace(volume_request("v-one"), zone=zone))

    assert (await becomes(disks, volume, VolumeState.AVAILABLE)).zone == zone
    assert (await attach(disks, volume, await make(disks, zone=zone))).zone == zone
    with pytest.raises((BadInputError, CloudRefusedError), match="no-such-zone"):
        await disks.create_volume(replace(volume_request("v-two"), zone="no-such-zone"))
    await volumes_listed(disks, volume.id)


# -- bad days -------------------------------------------------------------------------------------------------------

Call = Callable[[], Awaitable[object]]
ATTACHED_VERBS = ("attach", "detach")


async def prepare(disks: Disks, verb: str) -> tuple[str, Call]:
    """Make what `verb` needs; return the volume's id (empty if the call makes it) and the call."""
    if verb == "create_volume":
        return "", partial(disks.create_volume, volume_request("v-one"))
    volume = await make_volume(disks)
    calls: dict[str, Call] = {
        "describe_volume": partial(disks.describe_volume, volume.id),
        "list_volumes": disks.list_volumes,
        "delete_volume": partial(disks.delete_volume, volume.id),
    }
    if verb in ATTACHED_VERBS:
        vm = await make(disks)
        calls |= {"attach": partial(disks.attach, volume.id, vm.id), "detach": partial(disks.detach, volume.id)}
    if verb == "detach":
        await calls["attach"]()
        await becomes(disks, volume, VolumeState.ATTACHED)
    return volume.id, calls[verb]


BEFORE = {"attach": VolumeState.AVAILABLE, "detach": VolumeState.ATTACHED}
AFTER = {"attach": VolumeState.ATTACHED, "detach": VolumeState.AVAILABLE, "delete_volume": VolumeState.GONE}


async def meet(account: Harness, call: Call, trouble: Trouble, times: int = 1) -> None:
    """Have a call fail."""
    await account.fail(trouble.verb, trouble.fault, times)
    for _ in range(times):
        async with asyncio.timeout(PATIENCE_S):
            with trouble.raised():
                await call()


def all_but(verb: str) -> Collection[str]:
    return [other for other in VOLUME_VERBS if other != verb]


@troubles(all_but("create_volume"), FAILURES - EFFECTIVE)
async def test_a_call_about_a_volume_that_fails_changes_nothing_and_can_be_repeated(
    account: Harness, disks: Disks, foreign: str, trouble: Trouble
) -> None:
    volume, call = await prepare(disks, trouble.verb)
    await meet(account, call, trouble, 2)

    await volumes_listed(disks, volume)
    assert (await disks.describe_volume(volume)).state is BEFORE.get(trouble.verb, VolumeState.AVAILABLE)
    await call()
    await becomes(disks, volume, AFTER.get(trouble.verb, VolumeState.AVAILABLE))


@troubles(all_but("create_volume"), EFFECTIVE)
async def test_a_call_about_a_volume_whose_answer_is_lost_is_obeyed_and_can_be_repeated(
    account: Harness, disks: Disks, foreign: str, trouble: Trouble
) -> None:
    volume, call = await prepare(disks, trouble.verb)
    await meet(account, call, trouble)

    await becomes(disks, volume, AFTER.get(trouble.verb, VolumeState.AVAILABLE))
    await call()
    await becomes(disks, volume, AFTER.get(trouble.verb, VolumeState.AVAILABLE))


@troubles(["create_volume"], FAILURES - EFFECTIVE)
async def test_a_create_of_a_volume_that_fails_makes_nothing_and_can_be_repeated(
    account: Harness, disks: Disks, foreign: str, trouble: Trouble
) -> None:
    _, call = await prepare(disks, "create_volume")
    await meet(account, call, trouble, 2)

    await volumes_listed(disks)
    volume = await make_volume(disks)
    await volumes_listed(disks, volume.id)
    await disks.delete_volume(volume.id)
    await becomes(disks, volume, VolumeState.GONE)
    await nothing_left(account)


@troubles(["create_volume"], EFFECTIVE)
async def test_a_volume_whose_answer_was_lost_is_found_by_its_token(
    account: Harness, disks: Disks, foreign: str, trouble: Trouble
) -> None:
    _, call = await prepare(disks, "create_volume")
    await meet(account, call, trouble)

    (lost,) = await eventually(disks.list_volumes, len, "the lost volume is listed")
    assert (await make_volume(disks)).id == lost.id
    await volumes_listed(disks, lost.id)
    await disks.delete_volume(lost.id)
    await becomes(disks, lost, VolumeState.GONE)
    await nothing_left(account)


@troubles(["create_volume", "describe_volume", "list_volumes"], {Fault.STALE})
async def test_a_volume_that_was_just_made_is_never_gone_nor_made_twice(
    account: Harness, disks: Disks, foreign: str, trouble: Trouble
) -> None:
    if trouble.verb == "create_volume":
        await account.fail(trouble.verb, Fault.STALE)
    volume = await disks.create_volume(volume_request("v-one"))
    if trouble.verb != "create_volume":
        await account.fail(trouble.verb, Fault.STALE)

    for _ in range(2):
        assert (await disks.describe_volume(volume.id)).state is not VolumeState.GONE
    assert (await disks.create_volume(volume_request("v-one"))).id == volume.id
    await volumes_listed(disks, volume.id)


@troubles(VOLUME_VERBS, {Fault.HANG})
async def test_a_call_about_a_volume_that_hangs_can_be_cancelled(
    account: Harness, disks: Disks, foreign: str, trouble: Trouble
) -> None:
    volume, call = await prepare(disks, trouble.verb)
    await account.fail(trouble.verb, Fault.HANG)
    calling = asyncio.ensure_future(call())
    await asyncio.wait([calling], timeout=0.05)
    assert not calling.done()
    calling.cancel()
    await asyncio.wait([calling], timeout=PATIENCE_S)

    assert calling.cancelled()
    await past_the_hang(call)
    volume = volume or (await disks.create_volume(volume_request("v-one"))).id
    await becomes(disks, volume, AFTER.get(trouble.verb, VolumeState.AVAILABLE))
