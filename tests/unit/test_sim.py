"""The knobs of the simulated cloud, in virtual time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from looptime import LoopTimeProxy

from conpaas.cloud import sim
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, VmState
from conpaas.core.errors import CloudBusyError, ConpaasError, DeadlineError, QuotaExceededError
from tests.fakes.clouds import request


@pytest.fixture
async def account(tmp_path: Path) -> AsyncIterator[sim.Account]:
    settings = sim.SimSettings(boot_s=30, address_s=5, call_s=1, list_s=10, quota=3)
    account = sim.account(context(tmp_path), settings)
    yield account
    await account.close()


@pytest.fixture
def cloud(account: sim.Account, tmp_path: Path) -> Cloud:
    return sim.CLOUD.driver(sim.SimSettings(), context(tmp_path))


def context(directory: Path) -> CloudContext:
    return CloudContext(name="sim", deployment="dep-one", directory=directory, clock=SYSTEM_CLOCK)


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
