"""The knobs of the simulated cloud, in virtual time."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from looptime import LoopTimeProxy

from conpaas.cloud import sim
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, VmState, Volume, VolumeState
from conpaas.core.errors import (
    CloudBusyError,
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    DeadlineError,
    NoCapacityError,
    QuotaExceededError,
    ThrottledError,
)
from tests.fakes.clouds import request, volume_request


@pytest.fixture
async def account(tmp_path: Path) -> AsyncIterator[sim.Account]:
    settings = sim.SimSettings(boot_s=30, address_s=5, call_s=1, list_s=10, quota=3)
    account = sim.account(context(tmp_path), settings)
    yield account
    await account.close()


@pytest.fixture
def cloud(account: sim.Account, tmp_path: Path) -> sim.SimCloud:
    return opened(tmp_path)


def opened(directory: Path, settings: sim.SimSettings | None = None) -> sim.SimCloud:
    """Open a driver; the account of its directory is made with the settings of the first one."""
    cloud = sim.CLOUD.open(settings or sim.SimSettings(), context(directory))
    assert isinstance(cloud, sim.SimCloud)
    return cloud


def context(directory: Path) -> CloudContext:
    return CloudContext(name="sim", deployment="dep-one", directory=directory, clock=SYSTEM_CLOCK, deadline_s=20)


@pytest.mark.looptime
async def test_an_instance_boots_in_its_time(looptime: LoopTimeProxy, cloud: Cloud) -> None:
    vm = await cloud.create(request("i-one"))
    assert looptime == 1
    assert (vm.state, vm.address) == (VmState.PENDING, None)

    await asyncio.sleep(6)
    assert (await cloud.describe(vm.id)).address == "10.77.0.1"
    assert (await cloud.describe(vm.id)).state is VmState.PENDING
    await asyncio.sleep(30)
    assert (await cloud.describe(vm.id)).state is VmState.RUNNING


@pytest.mark.looptime
async def test_a_young_instance_is_not_listed_yet(looptime: LoopTimeProxy, cloud: Cloud) -> None:
    await cloud.create(request("i-one"))
    assert await cloud.list() == []

    await asyncio.sleep(10)
    assert [vm.token for vm in await cloud.list()] == ["i-one"]


@pytest.mark.looptime
async def test_calls_fail_as_told_and_then_succeed(looptime: LoopTimeProxy, account: sim.Account, cloud: Cloud) -> None:
    account.fail("create", CloudBusyError("not now"), QuotaExceededError("full"))
    for expected in (CloudBusyError, QuotaExceededError):
        with pytest.raises(expected):
            await cloud.create(request("i-one"))
    assert account.vms == {}

    await cloud.create(request("i-one"))
    assert account.calls == ["create"] * 3


@pytest.mark.looptime
@pytest.mark.parametrize("error", [CloudBusyError("reset"), DeadlineError("no answer")])
async def test_a_lost_answer_leaves_the_instance_which_the_token_finds(
    looptime: LoopTimeProxy, account: sim.Account, cloud: Cloud, error: ConpaasError
) -> None:
    account.fail("create", sim.Lost(error))
    with pytest.raises(type(error)):
        await cloud.create(request("i-one"))
    assert len(account.vms) == 1

    vm = await cloud.create(request("i-one"))
    assert list(account.vms) == [vm.id]
    account.fail("delete", sim.Lost(error))
    with pytest.raises(type(error)):
        await cloud.delete(vm.id)
    assert account.vms == {}


@pytest.mark.looptime
async def test_some_instances_never_boot_and_some_die(
    looptime: LoopTimeProxy, account: sim.Account, cloud: Cloud
) -> None:
    account.boot_times_s.extend([None, 0, 0])
    account.lifetimes_s.extend([None, 60])
    silent, mortal, steady = [await cloud.create(request(f"i-{number}")) for number in range(3)]

    await asyncio.sleep(100)
    states = {vm.id: (await cloud.describe(vm.id)).state for vm in (silent, mortal, steady)}
    assert states == {silent.id: VmState.PENDING, mortal.id: VmState.FAILED, steady.id: VmState.RUNNING}
    await account.vanish(steady.id)
    assert (await cloud.describe(steady.id)).state is VmState.GONE


@pytest.mark.looptime
async def test_others_instances_count_for_the_quota_but_are_never_touched(
    looptime: LoopTimeProxy, account: sim.Account, cloud: Cloud
) -> None:
    foreign = [account.add_foreign() for _ in range(3)]
    with pytest.raises(QuotaExceededError):
        await cloud.create(request("i-one"))
    await cloud.delete(foreign[0])

    assert list(account.vms) == foreign


@pytest.mark.looptime
async def test_a_hook_starts_and_ends_what_runs_on_an_instance(
    looptime: LoopTimeProxy, account: sim.Account, cloud: Cloud
) -> None:
    seen: list[tuple[str, str, float]] = []

    async def booted(vm: sim.SimVm) -> None:
        seen.append(("boot", vm.token, float(looptime)))

    async def ended(vm: sim.SimVm) -> None:
        seen.append(("end", vm.token, 0))

    account.on_boot, account.on_end = booted, ended
    early, late = await cloud.create(request("i-early")), await cloud.create(request("i-late"))
    await cloud.delete(late.id)
    await asyncio.sleep(60)
    await account.kill(early.id)

    assert [(what, token) for what, token, _ in seen] == [("end", "i-late"), ("boot", "i-early"), ("end", "i-early")]
    assert seen[1][2] == pytest.approx(30.5)


@pytest.mark.looptime
async def test_a_cancelled_create_may_have_taken_effect(
    looptime: LoopTimeProxy, account: sim.Account, cloud: Cloud
) -> None:
    for after_s, made in ((0.2, 0), (0.7, 1)):
        creating = asyncio.create_task(cloud.create(request("i-one")))
        await asyncio.sleep(after_s)
        creating.cancel()
        await asyncio.wait([creating])
        assert len(account.vms) == made


# -- the provider's limits ------------------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_who_asks_too_often_is_told_when_to_come_back(looptime: LoopTimeProxy, tmp_path: Path) -> None:
    cloud = opened(tmp_path, sim.SimSettings(creates_per_s=5, creates_burst=2))
    for number in range(2):
        await cloud.create(request(f"i-{number}"))
    for number in range(2, 10):
        with pytest.raises(ThrottledError, match="5 requests per second") as caught:
            await cloud.create(request(f"i-{number}"))
        await asyncio.sleep(caught.value.retry_after_s or 0)
        await cloud.create(request(f"i-{number}"))

    assert looptime == pytest.approx(8 / 5)
    assert len(await cloud.list()) == 10


@pytest.mark.looptime
async def test_two_hundred_at_once_are_throttled_by_the_account_not_by_the_driver(
    looptime: LoopTimeProxy, tmp_path: Path
) -> None:
    drivers = [opened(tmp_path, sim.SimSettings(creates_per_s=5, creates_burst=5)) for _ in range(2)]
    asked = (drivers[number % 2].create(request(f"i-{number}")) for number in range(200))
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert len([answer for answer in answers if isinstance(answer, ThrottledError)]) == 195
    assert len(await drivers[0].list()) == 5


@pytest.mark.looptime
async def test_a_full_provider_says_so_until_it_has_room(
    looptime: LoopTimeProxy, account: sim.Account, cloud: sim.SimCloud
) -> None:
    account.full = "no host has 4 cores free"
    with pytest.raises(NoCapacityError, match="no host has 4 cores free"):
        await cloud.create(request("i-one"))
    account.full = ""

    assert (await cloud.create(request("i-one"))).token == "i-one"


@pytest.mark.looptime
async def test_a_provider_that_queues_says_what_an_instance_waits_for(
    looptime: LoopTimeProxy, account: sim.Account, cloud: sim.SimCloud
) -> None:
    account.queued = "cannot dispatch: no host with enough memory"
    vm = await cloud.create(request("i-one"))
    assert (vm.state, vm.reason) == (VmState.PENDING, account.queued)

    await asyncio.sleep(60)
    seen = await cloud.describe(vm.id)
    assert (seen.state, seen.reason) == (VmState.RUNNING, "")


@pytest.mark.looptime
async def test_an_address_can_be_sold_twice(looptime: LoopTimeProxy, account: sim.Account, cloud: sim.SimCloud) -> None:
    account.addresses.extend(["10.77.0.9", "10.77.0.9"])
    for number in range(3):
        await cloud.create(request(f"i-{number}"))
    await asyncio.sleep(30)

    assert [vm.address for vm in await cloud.list()] == ["10.77.0.9", "10.77.0.9", "10.77.0.3"]


# -- weather --------------------------------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_credentials_may_expire_for_all_calls_until_they_are_renewed(
    looptime: LoopTimeProxy, account: sim.Account, cloud: sim.SimCloud
) -> None:
    vm = await cloud.create(request("i-one"))
    account.weather = CloudCredentialsError("the token has expired")
    calls = (cloud.list, lambda: cloud.describe(vm.id), lambda: cloud.delete(vm.id), cloud.list_volumes, cloud.sizes)
    for call in calls:
        with pytest.raises(CloudCredentialsError, match="expired"):
            await call()
    assert [(finding.name, finding.ok) for finding in await cloud.examine()] == [
        ("the endpoint", True),
        ("the credentials", False),
    ]
    account.weather = None

    assert (await cloud.describe(vm.id)).id == vm.id


@pytest.mark.looptime
@pytest.mark.parametrize(("outcome", "made"), [(sim.Hang(), 0), (sim.Late(20), 1)])
async def test_no_call_takes_longer_than_its_deadline(
    looptime: LoopTimeProxy, account: sim.Account, cloud: sim.SimCloud, outcome: sim.Outcome, made: int
) -> None:
    account.fail("create", outcome)
    with pytest.raises(DeadlineError, match="20 s"):
        await cloud.create(request("i-one"))

    assert looptime == 20
    assert len(account.vms) == made


@pytest.mark.looptime
async def test_a_late_answer_within_the_deadline_is_none(
    looptime: LoopTimeProxy, account: sim.Account, cloud: sim.SimCloud
) -> None:
    account.fail("create", sim.Late(18))

    assert (await cloud.create(request("i-one"))).token == "i-one"
    assert looptime == 19


@pytest.mark.looptime
async def test_a_driver_believes_itself_for_as_long_as_the_provider_may_lag(
    looptime: LoopTimeProxy, tmp_path: Path
) -> None:
    cloud = opened(tmp_path, sim.SimSettings(lag_s=10))
    account = sim.account(context(tmp_path))
    account.unknown_to.extend([{"describe", "list"}, set()])
    vm, vanished = await cloud.create(request("i-one")), await cloud.create(request("i-two"))
    await account.vanish(vanished.id)

    assert [found.token for found in await cloud.list()] == []
    assert [await cloud.describe(vm.id) for _ in range(2)] == [vm] * 2
    assert (await cloud.describe(vanished.id)).state is VmState.RUNNING
    await asyncio.sleep(10)
    assert (await cloud.describe(vanished.id)).state is VmState.GONE
    assert (await opened(tmp_path).describe("sim-9")).state is VmState.GONE


# -- volumes --------------------------------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_volumes_take_their_time(looptime: LoopTimeProxy, tmp_path: Path) -> None:
    cloud = opened(tmp_path, sim.SimSettings(volume_s=3))
    vm = await cloud.create(request("i-one"))
    made = await cloud.create_volume(volume_request("v-one"))

    async def settled(volume: Volume) -> Volume:
        assert volume.state is VolumeState.PENDING
        await asyncio.sleep(3)
        return await cloud.describe_volume(volume.id)

    assert (await settled(made)).state is VolumeState.AVAILABLE
    attached = await settled(await cloud.attach(made.id, vm.id))
    assert (attached.state, attached.vm) == (VolumeState.ATTACHED, vm.id)
    await cloud.delete(vm.id)
    assert (await settled(await cloud.describe_volume(made.id))).state is VolumeState.AVAILABLE


@pytest.mark.looptime
async def test_volumes_do_not_leave_their_zone_and_have_a_quota(looptime: LoopTimeProxy, tmp_path: Path) -> None:
    cloud = opened(tmp_path, sim.SimSettings(max_volumes=1))
    first, second = await cloud.zones()
    vm = await cloud.create(replace(request("i-one"), zone=first))
    volume = await cloud.create_volume(replace(volume_request("v-one"), zone=second))

    with pytest.raises(CloudRefusedError, match=f"{second}.*{first}"):
        await cloud.attach(volume.id, vm.id)
    with pytest.raises(QuotaExceededError, match="1 of 1 volumes"):
        await cloud.create_volume(volume_request("v-two"))
    assert {room.name: (room.used, room.limit) for room in await cloud.quota()}["volumes"] == (1, 1)


@pytest.mark.looptime
async def test_a_console_shows_the_end_of_what_was_printed(
    looptime: LoopTimeProxy, account: sim.Account, cloud: sim.SimCloud
) -> None:
    vm = await cloud.create(request("i-one"))
    account.vms[vm.id].printed = "ä" * 65536 + "the end"

    text = await cloud.console(vm.id)
    assert text.endswith("the end")
    assert len(text.encode()) in {65535, 65536}
