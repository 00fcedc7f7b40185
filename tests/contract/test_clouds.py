"""What `core.cloud` promises, asked of every driver. A new driver brings `tests/fakes/cloud_<name>.py`."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from types import ModuleType

import pytest

from conpaas.core.cloud import CanExamine, Cloud, HasConsole, HasImages, HasQuota, HasSizes, HasZones, Vm, VmState
from conpaas.core.errors import (
    BadInputError,
    CloudBusyError,
    CloudRefusedError,
    NoCapacityError,
    PeerError,
    QuotaExceededError,
)
from tests.contract._clouds import (
    DRIVERS,
    EFFECTIVE,
    FAILURES,
    INSTANCE_VERBS,
    LOOKING_VERBS,
    PATIENCE_S,
    Trouble,
    eventually,
    fake,
    listed,
    make,
    nothing_left,
    past_the_hang,
    running,
    troubles,
)
from tests.fakes.clouds import Fault, Harness, request

CONSOLE_BYTES = 64 * 1024


@pytest.mark.parametrize("driver", DRIVERS, indirect=True)
def test_a_driver_has_a_provider_to_play_with_that_says_what_can_go_wrong(driver: str) -> None:
    found = fake(driver)

    assert isinstance(found, ModuleType), found
    assert found.FAULTS, f"no FAULTS in {found.__name__}"


async def test_an_instance_comes_up_with_an_address_and_its_token(cloud: Cloud) -> None:
    vm = await make(cloud)

    assert (vm.token, vm.reason) == ("i-one", "")
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


async def test_what_one_driver_makes_another_one_deletes(account: Harness, cloud: Cloud) -> None:
    other = account.open()
    vms = [await make(driver, token) for driver, token in ((cloud, "i-one"), (other, "i-two"))]
    for driver in (cloud, other):
        await listed(driver, *(vm.id for vm in vms))
    await asyncio.gather(cloud.delete(vms[1].id), other.delete(vms[0].id))

    for driver, vm in ((cloud, vms[0]), (other, vms[1])):
        await eventually(partial(driver.describe, vm.id), lambda seen: seen.state is VmState.GONE, "it is gone")
    await listed(cloud)
    await nothing_left(account)
    await other.close()


# -- bad days -------------------------------------------------------------------------------------------------------


@troubles(["create"], FAILURES - EFFECTIVE - {Fault.NO_CAPACITY})
async def test_a_create_that_fails_makes_nothing_and_can_be_repeated(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    before = await make(cloud, "i-before")
    await account.fail("create", trouble.fault, 2)
    for _ in range(2):
        async with asyncio.timeout(PATIENCE_S):
            with trouble.raised():
                await cloud.create(request("i-one"))

    await listed(cloud, before.id)
    vm = await make(cloud)
    assert vm.token == "i-one"
    await listed(cloud, before.id, vm.id)
    for made in (before, vm):
        await cloud.delete(made.id)
    await nothing_left(account)


@troubles(["create"], FAILURES - EFFECTIVE - {Fault.NO_CAPACITY, Fault.HANG, Fault.GARBAGE, Fault.UNREACHABLE})
async def test_a_create_that_was_answered_with_an_error_leaves_nothing(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    await account.fail("create", trouble.fault)
    with trouble.raised():
        await cloud.create(request("i-one"))

    await nothing_left(account)


@troubles(["create"], EFFECTIVE)
async def test_an_instance_whose_answer_was_lost_is_found_by_its_token(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    await account.fail("create", trouble.fault)
    async with asyncio.timeout(PATIENCE_S):
        with trouble.raised():
            await cloud.create(request("i-one"))

    (lost,) = await eventually(cloud.list, len, "the lost instance is listed")
    assert lost.token == "i-one"
    other = account.open()
    for driver in (cloud, other):
        assert (await driver.create(request("i-one"))).id == lost.id
    await other.close()
    await running(cloud, lost)
    await listed(cloud, lost.id)
    await cloud.delete(lost.id)
    await nothing_left(account)


@troubles(["create"], EFFECTIVE)
async def test_a_lost_answer_does_not_double_what_two_drivers_ask_for_at_once(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    other = account.open()
    await account.fail("create", trouble.fault)
    asked = (driver.create(request("i-one")) for driver in (cloud, other))
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert [answer for answer in answers if isinstance(answer, PeerError)]
    assert all(isinstance(answer, Vm | PeerError | CloudBusyError) for answer in answers), answers
    vm = await other.create(request("i-one"))
    await other.close()
    assert {answer.id for answer in answers if isinstance(answer, Vm)} <= {vm.id}
    await listed(cloud, vm.id)


@troubles(["create"], {Fault.NO_CAPACITY})
async def test_without_capacity_there_is_an_error_or_an_instance_that_says_what_it_waits_for(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    await account.fail("create", trouble.fault)
    try:
        vm = await cloud.create(request("i-one"))
    except NoCapacityError as exc:
        trouble.check_words(exc)
    else:
        seen = await eventually(lambda: cloud.describe(vm.id), lambda seen: seen.reason, "it says what it waits for")
        assert seen.state is VmState.PENDING
        await cloud.delete(vm.id)

    await nothing_left(account)
    assert (await make(cloud)).token == "i-one"


@troubles(["create"], {Fault.NEVER_BOOTS})
async def test_an_instance_that_never_boots_is_no_error_and_can_be_deleted(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    await account.fail("create", trouble.fault)
    vm = await cloud.create(request("i-one"))

    for _ in range(3):
        assert (await cloud.describe(vm.id)).state in {VmState.PENDING, VmState.RUNNING}
    await listed(cloud, vm.id)
    assert (await cloud.create(request("i-one"))).id == vm.id
    await cloud.delete(vm.id)
    await nothing_left(account)
    assert (await make(cloud, "i-two")).token == "i-two"


@troubles(["create", "describe", "list"], {Fault.STALE})
async def test_what_was_just_made_is_never_gone_nor_made_twice(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    if trouble.verb == "create":
        await account.fail("create", Fault.STALE)
    vm = await cloud.create(request("i-one"))
    if trouble.verb != "create":
        await account.fail(trouble.verb, Fault.STALE)

    seen = [await cloud.describe(vm.id), *await cloud.list(), await cloud.describe(vm.id)]
    assert {(found.id, found.token) for found in seen} == {(vm.id, "i-one")}
    assert VmState.GONE not in {found.state for found in seen}
    assert (await cloud.create(request("i-one"))).id == vm.id
    await running(cloud, vm)
    await listed(cloud, vm.id)
    await cloud.delete(vm.id)
    await eventually(lambda: cloud.describe(vm.id), lambda found: found.state is VmState.GONE, "it is gone")
    await nothing_left(account)


@troubles(["create", "describe", "list", "delete"], {Fault.CREDENTIALS})
async def test_credentials_that_expire_and_are_renewed_cost_no_instance(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    vm = await make(cloud)
    await account.fail(trouble.verb, Fault.CREDENTIALS, 3)
    for _ in range(3):
        with trouble.raised():
            await call(trouble.verb, cloud, vm)

    assert await account.lives(vm.id)
    await listed(cloud, vm.id)
    assert (await make(cloud, "i-two")).token == "i-two"


def call(verb: str, cloud: Cloud, vm: Vm) -> Awaitable[object]:
    """Call what is done with an instance, or make another one."""
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: cloud.create(request("i-two")),
        "describe": lambda: cloud.describe(vm.id),
        "list": cloud.list,
        "delete": lambda: cloud.delete(vm.id),
    }
    return calls[verb]()


@troubles(["describe", "list"], FAILURES)
async def test_a_look_that_fails_says_so_instead_of_seeing_nothing(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    vm = await make(cloud)
    await account.fail(trouble.verb, trouble.fault)
    async with asyncio.timeout(PATIENCE_S):
        with trouble.raised():
            await call(trouble.verb, cloud, vm)

    await listed(cloud, vm.id)
    assert (await cloud.describe(vm.id)).state is VmState.RUNNING


@troubles(["delete"], FAILURES)
async def test_a_delete_that_fails_can_be_repeated(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    vm, other = await make(cloud), await make(cloud, "i-other")
    await account.fail("delete", trouble.fault)
    async with asyncio.timeout(PATIENCE_S):
        with trouble.raised():
            await cloud.delete(vm.id)

    if trouble.effective:
        await listed(cloud, other.id)
    else:
        await listed(cloud, vm.id, other.id)
        assert await account.lives(vm.id)
    for _ in range(2):
        await cloud.delete(vm.id)
    await eventually(lambda: cloud.describe(vm.id), lambda seen: seen.state is VmState.GONE, "it is gone")
    assert await account.lives(other.id)
    await cloud.delete(other.id)
    await nothing_left(account)


@troubles(INSTANCE_VERBS, {Fault.HANG})
async def test_a_call_that_hangs_can_be_cancelled_and_holds_up_no_other(
    account: Harness, cloud: Cloud, foreign: str, trouble: Trouble
) -> None:
    vm = await make(cloud)
    await account.fail(trouble.verb, Fault.HANG)
    calling = asyncio.ensure_future(call(trouble.verb, cloud, vm))
    await asyncio.wait([calling], timeout=0.05)
    assert not calling.done()
    calling.cancel()
    await asyncio.wait([calling], timeout=PATIENCE_S)

    assert calling.cancelled()
    await listed(cloud, vm.id)
    two = await past_the_hang(lambda: make(cloud, "i-two"))
    for made in (vm, two):
        await past_the_hang(partial(cloud.delete, made.id))
    await nothing_left(account)


# -- abilities ------------------------------------------------------------------------------------------------------


async def test_sizes_are_sorted_by_price_and_one_is_the_default(account: Harness, cloud: Cloud) -> None:
    if not isinstance(cloud, HasSizes):
        pytest.skip("no sizes")
    sizes = await cloud.sizes()

    assert len([size for size in sizes if size.default]) == 1
    assert len({size.name for size in sizes}) == len(sizes)
    prices = [size.price for size in sizes if size.price is not None]
    assert prices == sorted(prices)
    assert all(price >= 0 for price in prices)
    assert all(size.name and size.cores > 0 and size.memory > 0 and size.disk >= 0 for size in sizes)


async def test_an_instance_has_the_size_that_was_asked_for(account: Harness, cloud: Cloud) -> None:
    if not isinstance(cloud, HasSizes):
        pytest.skip("no sizes")
    sizes = await cloud.sizes()
    wanted = next((size for size in sizes if not size.default), sizes[0])
    vm = await make(cloud, size=wanted.name)

    assert vm.size == wanted.name
    with pytest.raises((BadInputError, CloudRefusedError), match="no-such-size"):
        await make(cloud, "i-two", size="no-such-size")
    await listed(cloud, vm.id)
    await cloud.delete(vm.id)
    await nothing_left(account)


async def test_an_instance_is_in_the_zone_that_was_asked_for(account: Harness, cloud: Cloud) -> None:
    if not isinstance(cloud, HasZones):
        pytest.skip("no zones")
    zones = await cloud.zones()
    assert zones
    assert list(zones) == sorted(set(zones))
    vm = await make(cloud, zone=zones[-1])

    assert vm.zone == zones[-1]
    with pytest.raises((BadInputError, CloudRefusedError), match="no-such-zone"):
        await make(cloud, "i-two", zone="no-such-zone")
    await listed(cloud, vm.id)


async def test_images_have_ids_and_are_sorted_by_name(cloud: Cloud) -> None:
    if not isinstance(cloud, HasImages):
        pytest.skip("no images")
    images = await cloud.images()

    assert [image.name for image in images] == sorted(image.name for image in images)
    assert len({image.id for image in images}) == len(images) > 0


async def test_a_quota_counts_what_was_made(cloud: Cloud) -> None:
    if not isinstance(cloud, HasQuota):
        pytest.skip("no quota")

    async def used() -> dict[str, float]:
        rooms = await cloud.quota()
        assert all(0 <= room.used <= room.limit for room in rooms)
        assert len({room.name for room in rooms}) == len(rooms)
        return {room.name: room.used for room in rooms}

    before = await used()
    assert before["instances"] == 0
    vm = await make(cloud)
    assert (await used())["instances"] == 1
    await cloud.delete(vm.id)
    await eventually(used, lambda now: now["instances"] == 0, "the room is free again")


async def test_a_console_shows_its_end_and_only_of_our_instances(cloud: Cloud, foreign: str) -> None:
    if not isinstance(cloud, HasConsole):
        pytest.skip("no console")
    vm = await make(cloud)

    assert len((await cloud.console(vm.id)).encode()) <= CONSOLE_BYTES
    for other in ("i-unknown", foreign):
        assert await cloud.console(other) == ""


async def test_a_good_account_is_found_good_and_nothing_is_made(account: Harness, cloud: Cloud, foreign: str) -> None:
    if not isinstance(cloud, CanExamine):
        pytest.skip("cannot be examined")
    findings = await cloud.examine()

    assert findings
    assert [finding for finding in findings if not finding.ok] == []
    assert all(finding.name for finding in findings)
    await nothing_left(account)


@troubles(["examine"], FAILURES)
async def test_an_examination_never_raises_and_says_what_is_wrong(
    account: Harness, cloud: Cloud, trouble: Trouble
) -> None:
    assert isinstance(cloud, CanExamine)
    await account.fail("examine", trouble.fault)
    async with asyncio.timeout(PATIENCE_S):
        findings = await cloud.examine()

    wrong = [finding for finding in findings if not finding.ok]
    assert wrong
    if trouble.fault in {Fault.CREDENTIALS, Fault.UNREACHABLE, Fault.HANG, Fault.GARBAGE}:
        assert wrong == [findings[-1]], "it goes on, though the rest is impossible"
    for finding in wrong:
        assert finding.name
        trouble.check_words(CloudRefusedError(finding.detail, hint=finding.hint))
    assert [finding for finding in await cloud.examine() if not finding.ok] == []


@troubles([verb for verb in LOOKING_VERBS if verb != "examine"], FAILURES)
async def test_a_question_about_the_account_that_fails_says_so(
    account: Harness, cloud: Cloud, trouble: Trouble
) -> None:
    vm = await make(cloud)
    ask = getattr(cloud, trouble.verb)
    words = (vm.id,) if trouble.verb == "console" else ()
    await account.fail(trouble.verb, trouble.fault)
    async with asyncio.timeout(PATIENCE_S):
        with trouble.raised():
            await ask(*words)

    await ask(*words)
