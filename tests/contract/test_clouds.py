"""What `core.cloud` promises, asked of every driver. A new driver brings `tests/fakes/cloud_<name>.py`."""

import asyncio
import importlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import PACKAGE, Cloud, CloudType, Vm, VmState
from conpaas.core.errors import QuotaExceededError
from conpaas.core.plugins import discover
from conpaas.core.tasks import wait_for
from tests.fakes.clouds import Harness, request


@pytest.fixture(params=sorted(discover(PACKAGE, "CLOUD", CloudType)))
async def account(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    try:
        module = importlib.import_module(f"tests.fakes.cloud_{request.param}")
    except ModuleNotFoundError:
        pytest.fail(f"the cloud {request.param} needs tests/fakes/cloud_{request.param}.py: see tests/fakes/clouds.py")
    async with module.harness(tmp_path) as account:
        yield account


@pytest.fixture
async def cloud(account: Harness) -> AsyncIterator[Cloud]:
    driver = account.open()
    yield driver
    await driver.close()


async def running(cloud: Cloud, vm: Vm) -> Vm:
    async def check() -> Vm | None:
        seen = await cloud.describe(vm.id)
        return seen if seen.state is VmState.RUNNING and seen.address else None

    return await wait_for(check, timeout_s=20, what=f"{vm.id} runs", clock=SYSTEM_CLOCK)


async def make(cloud: Cloud, token: str = "i-one") -> Vm:
    return await running(cloud, await cloud.create(request(token)))


async def test_an_instance_comes_up_with_an_address_and_its_token(cloud: Cloud) -> None:
    vm = await make(cloud)

    assert vm.token == "i-one"
    assert [(seen.id, seen.token, seen.address) for seen in await cloud.list()] == [(vm.id, "i-one", vm.address)]


async def test_instances_have_different_addresses(cloud: Cloud) -> None:
    first, second = await make(cloud, "i-one"), await make(cloud, "i-two")

    assert first.address != second.address


async def test_the_same_token_gives_the_same_instance(cloud: Cloud) -> None:
    first = await cloud.create(request("i-one"))
    second = await cloud.create(request("i-one"))

    assert second.id == first.id
    assert len(await cloud.list()) == 1


async def test_the_same_token_gives_the_same_instance_when_asked_for_at_once(account: Harness, cloud: Cloud) -> None:
    other = account.open()
    vms = await asyncio.gather(*(driver.create(request("i-one")) for driver in (cloud, other, cloud, other)))
    await other.close()

    assert len({vm.id for vm in vms}) == 1
    assert len(await cloud.list()) == 1


async def test_instances_can_be_made_at_once(account: Harness, cloud: Cloud) -> None:
    tokens = [f"i-{number}" for number in range(account.quota)]
    vms = await asyncio.gather(*(cloud.create(request(token)) for token in tokens))

    assert [vm.token for vm in vms] == tokens
    assert sorted(vm.token for vm in await cloud.list()) == sorted(tokens)


async def test_an_instance_outlives_the_driver_that_made_it(account: Harness) -> None:
    first = account.open()
    vm = await make(first)
    await first.close()
    second = account.open()

    assert (await second.describe(vm.id)).state is VmState.RUNNING
    assert (await second.create(request("i-one"))).id == vm.id
    await second.delete(vm.id)
    assert await second.list() == []
    await second.close()


async def test_a_cancelled_create_leaves_nothing_that_cannot_be_found(account: Harness, cloud: Cloud) -> None:
    for wait_s in (0, 0.001, 0.003, 0.01):
        creating = asyncio.create_task(cloud.create(request("i-one")))
        await asyncio.wait([creating], timeout=wait_s)
        creating.cancel()
        await asyncio.wait([creating])
        vm = await make(cloud)
        assert [seen.id for seen in await cloud.list()] == [vm.id]
        await cloud.delete(vm.id)
        assert await account.leftovers() == []


async def test_a_deleted_instance_is_gone_and_leaves_nothing(account: Harness, cloud: Cloud) -> None:
    vm = await make(cloud)
    await cloud.delete(vm.id)

    assert (await cloud.describe(vm.id)).state is VmState.GONE
    assert await cloud.list() == []
    assert await account.leftovers() == []


async def test_deleting_twice_or_at_once_is_fine(account: Harness, cloud: Cloud) -> None:
    vm = await make(cloud)
    await asyncio.gather(cloud.delete(vm.id), cloud.delete(vm.id))
    await cloud.delete(vm.id)

    assert await account.leftovers() == []


async def test_an_unknown_instance_is_gone_and_can_be_deleted(cloud: Cloud) -> None:
    assert (await cloud.describe("i-unknown")).state is VmState.GONE
    await cloud.delete("i-unknown")


async def test_an_instance_can_be_deleted_while_it_is_made(account: Harness, cloud: Cloud) -> None:
    vm = await cloud.create(request("i-one"))
    await cloud.delete(vm.id)

    assert await cloud.list() == []
    assert await account.leftovers() == []


async def test_a_dead_instance_is_failed_with_a_reason_until_it_is_deleted(account: Harness, cloud: Cloud) -> None:
    vm = await make(cloud)
    await account.kill(vm.id)

    seen = await cloud.describe(vm.id)
    assert seen.state is VmState.FAILED
    assert seen.reason
    assert [listed.state for listed in await cloud.list()] == [VmState.FAILED]
    await cloud.delete(vm.id)
    assert await cloud.list() == []
    assert await account.leftovers() == []


async def test_beyond_the_quota_there_is_an_error_and_no_instance(account: Harness, cloud: Cloud) -> None:
    for number in range(account.quota):
        await cloud.create(request(f"i-{number}"))

    with pytest.raises(QuotaExceededError, match=str(account.quota)):
        await cloud.create(request("i-too-many"))
    assert len(await cloud.list()) == account.quota


async def test_what_was_given_back_makes_room(account: Harness, cloud: Cloud) -> None:
    vms = [await cloud.create(request(f"i-{number}")) for number in range(account.quota)]
    await cloud.delete(vms[0].id)

    assert (await cloud.create(request("i-new"))).token == "i-new"


async def test_instances_of_others_are_neither_seen_nor_touched(account: Harness, cloud: Cloud) -> None:
    theirs = await account.make_foreign()

    assert await cloud.list() == []
    assert (await cloud.describe(theirs)).state is VmState.GONE
    await cloud.delete(theirs)
    assert await account.lives(theirs)
