"""Several clouds: who takes over when one refuses or is silent, and how accounts are kept."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from conpaas.cloud import sim
from conpaas.core.errors import (
    BadInputError,
    CloudCredentialsError,
    CloudRefusedError,
    ConflictError,
    ConpaasError,
    DeadlineError,
    NoCapacityError,
    NotFoundError,
    QuotaExceededError,
)
from conpaas.core.messages import public
from conpaas.core.messages.internal import RequestInstances
from conpaas.core.messages.model import NodeView
from conpaas.core.states import NodeState
from conpaas.director.db.models import CloudAccount, EventRow
from tests.fakes.director import BLOCK, Rig, open_rig

N = NodeState
SPARE_BLOCK = "127.241.0.0/16"
SECRET = "wJalrXUtnFEMI-not-for-your-eyes"


@pytest.fixture
def clouds() -> dict[str, dict[str, Any]]:
    """Return the clouds of the director's settings; tests change them before they take `rig`."""
    return {"sim": {"driver": "sim", "block": BLOCK}, "spare": {"driver": "sim", "block": SPARE_BLOCK}}


@pytest.fixture
async def rig(tmp_path: Path, clouds: dict[str, dict[str, Any]]) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, clouds=clouds) as rig:
        yield rig


def provider(rig: Rig, name: str) -> sim.Account:
    return sim._accounts[rig.settings.data_dir / "clouds" / name]


async def started(rig: Rig, **words: Any) -> str:
    """Return a service on `sim` that falls back on `spare`, and is to run."""
    user = await rig.add_user()
    service = (await rig.create(user, **{"fallback": ("spare",), **words})).id
    await rig.services.start(service, actor="user:alice", key=None, expected=None)
    return service


async def ask(rig: Rig, service: str, count: int = 1, key: str = "k", cloud: str = "") -> list[NodeView]:
    return await rig.services.request_nodes(service, RequestInstances(count=count, cloud=cloud, key=key))


# -- failover -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        CloudRefusedError("no"),
        QuotaExceededError("4 of 4 instances are in use"),
        CloudCredentialsError("the key has expired"),
        NoCapacityError("no machine is free"),
        BadInputError("there is no size 'huge'"),
    ],
    ids=lambda error: error.code,
)
async def test_what_one_cloud_refuses_goes_to_the_next(rig: Rig, refusal: ConpaasError) -> None:
    service = await started(rig)
    provider(rig, "sim").fail("create", *[refusal] * 4)

    [node] = await ask(rig, service)

    assert (node.state, node.cloud, node.meant_for) == (N.BOOTING, "spare", "sim")
    assert node.id in {vm.token for vm in provider(rig, "spare").vms.values()}
    assert node.id not in {vm.token for vm in provider(rig, "sim").vms.values()}
    [event] = await rig.events("cloud-refused")
    assert event.message == f"{node.id} goes to 'spare': {refusal}"
    assert await rig.credits((await rig.service(service)).user_id) == 98


async def test_when_all_refuse_the_node_says_what_each_said(rig: Rig) -> None:
    service = await started(rig)
    provider(rig, "sim").fail("create", QuotaExceededError("4 of 4 instances are in use"))
    provider(rig, "spare").fail("create", CloudCredentialsError("the key has expired"))

    [node] = await ask(rig, service)

    assert (node.state, node.reason) == (N.GONE, "4 of 4 instances are in use; the key has expired")
    assert await rig.credits((await rig.service(service)).user_id) == 99
    assert len(rig.at_cloud()) == 1


async def test_without_another_cloud_nothing_falls_over(rig: Rig) -> None:
    service = await started(rig, fallback=())
    provider(rig, "sim").fail("create", QuotaExceededError("full"))

    [node] = await ask(rig, service)

    assert (node.state, node.reason) == (N.GONE, "full")
    assert provider(rig, "spare").vms == {}


async def test_a_manager_goes_to_the_next_cloud_too(rig: Rig) -> None:
    provider(rig, "sim").fail("create", QuotaExceededError("full"))
    user = await rig.add_user()

    service = (await rig.create(user, fallback=("spare",))).id

    assert (await rig.manager(service)).cloud == "spare"
    await rig.enrol_manager(service)
    await rig.report(service, (await rig.service(service)).state)
    await rig.reconciler.watch()
    await rig.settle()
    assert [row.cloud for row in await rig.instances(service)] == ["spare"]  # it is meant to be there for now


async def test_a_cloud_that_does_not_answer_is_left_and_what_it_made_is_deleted_when_it_answers_again(rig: Rig) -> None:
    service = await started(rig)
    lost = provider(rig, "sim")
    lost.fail("create", sim.Lost(DeadlineError("no answer")))
    lost.fail("list", *[DeadlineError("no answer")] * 3)
    lost.fail("delete", DeadlineError("no answer"))

    [node] = await ask(rig, service)
    assert node.state is N.DELETING
    assert node.id in rig.at_cloud()
    [event] = await rig.events("instance-failed")
    assert event.message == f"{node.id}: cloud 'sim' does not answer"

    [again] = await ask(rig, service, key="again")  # the manager still wants one
    assert (again.state, again.cloud) == (N.BOOTING, "spare")
    for _ in range(5):
        await rig.reconciler.reconcile()
        rig.clock.advance(seconds=10)

    assert node.id not in rig.at_cloud()
    assert (await rig.instance(node.id)).state is N.GONE
    assert again.id in {vm.token for vm in provider(rig, "spare").vms.values()}


async def test_a_cloud_that_answers_again_is_used_again(rig: Rig) -> None:
    service = await started(rig)
    provider(rig, "sim").fail("create", DeadlineError("no answer"))
    provider(rig, "sim").fail("list", DeadlineError("no answer"))
    await ask(rig, service)
    assert (await ask(rig, service, key="2"))[0].cloud == "spare"

    await rig.reconciler.reconcile()

    assert (await ask(rig, service, key="3"))[0].cloud == "sim"


async def test_a_cloud_that_hangs_holds_up_no_other(tmp_path: Path, clouds: dict[str, dict[str, Any]]) -> None:
    async with open_rig(tmp_path, clouds=clouds, cloud_deadline_s=20) as rig:
        service = await started(rig, fallback=())
        provider(rig, "sim").fail("create", DeadlineError("no connection"))
        [node] = await ask(rig, service)
        assert node.state is N.REQUESTED
        hung: Any = rig.director.clouds.usable("spare")
        never = asyncio.Event()

        async def hang() -> list[Any]:
            await never.wait()
            return []

        hung.list = hang
        round_ = asyncio.create_task(rig.reconciler.reconcile())
        async with asyncio.timeout(40):
            while (await rig.instance(node.id)).state is not N.BOOTING:
                assert not round_.done()
                await asyncio.sleep(0.01)
        never.set()
        await round_


async def test_a_call_that_never_returns_is_cut_off(tmp_path: Path, clouds: dict[str, dict[str, Any]]) -> None:
    async with open_rig(tmp_path, clouds=clouds, cloud_deadline_s=0.02) as rig:
        hung: Any = rig.director.clouds.usable("spare")
        hung.list = asyncio.Event().wait

        async with asyncio.timeout(40):
            await rig.reconciler.reconcile()

        account = rig.director.clouds.account("spare")
        assert account.silent
        assert "cloud spare: no answer within" in account.trouble


@pytest.mark.parametrize("garbage", [ZeroDivisionError("oh"), KeyError("State"), ValueError("not XML"), OSError(5)])
async def test_a_driver_that_breaks_ends_nothing_and_counts_as_silent(rig: Rig, garbage: Exception) -> None:
    service = await started(rig)
    broken: Any = rig.director.clouds.usable("sim")
    kept = {verb: getattr(broken, verb) for verb in ("create", "list", "describe", "delete")}

    async def break_down(*_: object) -> None:
        raise garbage

    for verb in kept:
        setattr(broken, verb, break_down)
    [node] = await ask(rig, service)
    await rig.reconciler.reconcile()
    [second] = await ask(rig, service, key="second")
    for verb, call in kept.items():
        setattr(broken, verb, call)
    for _ in range(3):
        await rig.reconciler.reconcile()
        rig.clock.advance(seconds=10)

    assert second.cloud == "spare"
    assert (await rig.instance(node.id)).state is N.GONE
    assert rig.at_cloud() == {(await rig.manager(service)).id}


async def test_an_address_that_is_sold_twice_costs_the_newcomer_only(rig: Rig) -> None:
    service = await started(rig)
    [first] = await ask(rig, service)
    cloud = provider(rig, "sim")
    cloud.addresses.append(first.address)

    [second] = await ask(rig, service, key="second")

    assert (await rig.instance(first.id)).state is N.BOOTING
    row = await rig.instance(second.id)
    assert row.state is N.LOST
    assert row.reason == f"cloud 'sim' gave it the address {first.address} of {first.id}"
    assert row.ended is not None


async def test_the_same_private_address_on_two_clouds_is_nobodys_fault(rig: Rig) -> None:
    service = await started(rig)
    [first] = await ask(rig, service)
    provider(rig, "spare").addresses.append(first.address)

    [second] = await ask(rig, service, key="second", cloud="spare")

    assert second.state is N.BOOTING


async def test_credentials_that_expire_stop_nothing_and_what_was_given_back_is_deleted_with_new_ones(rig: Rig) -> None:
    admin = await rig.add_user("root", admin=True)
    form = public.CloudForm(name="mine", driver="sim", settings={"block": "127.245.0.0/16"})
    await rig.director.cloud_accounts.add(form, admin)
    service = await started(rig, fallback=(), cloud="mine")
    kept, gone = await ask(rig, service, count=2)
    cloud = provider(rig, "mine")
    cloud.weather = CloudCredentialsError("the access key has expired")

    await rig.ledger.delete(gone.id, "no longer needed")
    for _ in range(4):
        rig.clock.advance(seconds=30)
        await rig.reconciler.reconcile()
        await rig.reconciler.watch()
    await rig.settle()

    assert (await rig.instance(kept.id)).state is N.BOOTING
    assert (await rig.instance(gone.id)).state is N.DELETING
    account = next(one for one in (await rig.director.cloud_accounts.accounts()).items if one.name == "mine")
    assert account.trouble == "the access key has expired"

    cloud.weather = None
    await rig.director.cloud_accounts.change("mine", form, admin)
    await rig.reconciler.reconcile()

    assert (await rig.instance(gone.id)).state is N.GONE
    assert {vm.token for vm in cloud.vms.values()} == {kept.id, (await rig.manager(service)).id}


# -- limits ---------------------------------------------------------------------------------------------------------


async def test_what_a_user_may_have_on_a_cloud_is_kept_to_and_the_rest_goes_elsewhere(
    tmp_path: Path, clouds: dict[str, dict[str, Any]]
) -> None:
    clouds["sim"]["user_instances"] = 3
    async with open_rig(tmp_path, clouds=clouds) as rig:
        service = await started(rig)
        nodes = await ask(rig, service, count=4)

        assert [node.cloud for node in nodes] == ["sim", "sim", "spare", "spare"]
        bob = await rig.add_user("bob")
        other = (await rig.create(bob, name="bobs")).id
        assert (await rig.manager(other)).cloud == "sim"


async def test_a_limit_with_nowhere_else_to_go_is_told(tmp_path: Path, clouds: dict[str, dict[str, Any]]) -> None:
    clouds["sim"]["instances"] = 2
    async with open_rig(tmp_path, clouds=clouds) as rig:
        service = await started(rig, fallback=())

        nodes = await ask(rig, service, count=3)

        assert [node.state for node in nodes] == [N.BOOTING, N.GONE, N.GONE]
        assert nodes[1].reason == "cloud 'sim' takes at most 2 instances in all"
        assert [event.message for event in await rig.events("cloud-full")] == [nodes[1].reason]
        user = (await rig.service(service)).user_id
        assert await rig.credits(user) == 98
        with pytest.raises(QuotaExceededError, match="at most 2 instances"):
            await rig.create(user, name="second")


# -- accounts -------------------------------------------------------------------------------------------------------

EC2 = {"region": "eu-west-1", "access_key": "AKIA", "secret_key": SECRET, "image": "ami-1"}


def amazon(**settings: Any) -> public.CloudForm:
    form = {name: value for name, value in {**EC2, **settings}.items() if value is not None}
    return public.CloudForm(name="amazon", driver="ec2", settings={**form, "endpoint": "http://127.0.0.1:9"})


async def files_of(rig: Rig) -> bytes:
    return b"".join(path.read_bytes() for path in rig.settings.data_dir.rglob("*") if path.is_file())


async def test_a_secret_is_nowhere_to_be_read(rig: Rig) -> None:
    kept = rig.director.cloud_accounts
    with capture_logs() as logs:
        view = await kept.add(amazon(), "user:root")
        await kept.change("amazon", amazon(region="eu-west-2", secret_key=None), "user:root")
        with pytest.raises(BadInputError) as refused:
            await kept.change("amazon", amazon(image="no such thing"), "user:root")
        findings = await kept.examine("amazon")
    [plan] = await kept.plans()
    await rig.reconciler.reconcile()

    assert view.settings["secret_key"] == "**********"
    async with rig.db.read() as session:
        row = await session.get(CloudAccount, "amazon")
    assert row is not None
    assert SECRET in rig.director.vault.unseal(row.settings)
    assert SECRET not in row.settings
    assert SECRET.encode() not in await files_of(rig)
    accounts = await kept.accounts()
    async with rig.db.read() as session:
        events = [(row.message, row.before, row.after) for row in await session.scalars(select(EventRow))]
    assert len(events) >= 2
    models = (view.model_dump_json(), accounts.model_dump_json(), findings.model_dump_json())
    shown = (*models, repr(logs), repr(events), repr(refused.value.__dict__), repr(rig.director.clouds.checked(plan)))
    assert not [text for text in shown if SECRET in text]


@pytest.mark.parametrize("sent", [None, "**********"])
async def test_a_secret_that_is_not_sent_again_stays(rig: Rig, tmp_path: Path, sent: str | None) -> None:
    kept = rig.director.cloud_accounts
    await kept.add(amazon(), "user:root")

    await kept.change("amazon", amazon(region="eu-west-2", secret_key=sent), "user:root")

    [plan] = await kept.plans()
    assert (plan.settings["secret_key"], plan.settings["region"]) == (SECRET, "eu-west-2")


async def test_a_secret_that_is_sent_replaces_the_old_one(rig: Rig) -> None:
    kept = rig.director.cloud_accounts
    await kept.add(amazon(), "user:root")

    await kept.change("amazon", amazon(secret_key="another"), "user:root")

    assert (await kept.plans())[0].settings["secret_key"] == "another"
    with pytest.raises(BadInputError, match="asterisks"):
        await kept.add(amazon(secret_key="**********").model_copy(update={"name": "second"}), "user:root")


async def test_accounts_are_there_after_a_restart(tmp_path: Path, clouds: dict[str, dict[str, Any]]) -> None:
    async with open_rig(tmp_path, clouds=clouds) as rig:
        form = public.CloudForm(
            name="mine",
            driver="sim",
            settings={"block": "127.245.0.0/16"},
            options=public.CloudOptions(title="My own", enabled=False, user_instances=7),
        )
        await rig.director.cloud_accounts.add(form, "user:root")
        await rig.director.cloud_accounts.add(amazon(), "user:root")
    async with open_rig(tmp_path, clouds=clouds) as rig:
        shown = {view.name: view for view in (await rig.director.cloud_accounts.accounts()).items}

        assert set(shown) == {"sim", "spare", "mine", "amazon"}
        assert (shown["mine"].options, shown["mine"].usable) == (form.options, True)
        assert shown["sim"].fixed
        assert not shown["mine"].fixed


async def test_an_account_with_instances_stays(rig: Rig) -> None:
    kept = rig.director.cloud_accounts
    await kept.add(public.CloudForm(name="mine", driver="sim", settings={"block": "127.245.0.0/16"}), "user:root")
    service = await started(rig)
    [node] = await ask(rig, service, cloud="mine")

    with pytest.raises(ConflictError, match="instances: 1, volumes: 0"):
        await kept.remove("mine", "user:root")
    with pytest.raises(ConflictError, match="its driver stays"):
        await kept.change("mine", amazon().model_copy(update={"name": "mine"}), "user:root")

    await rig.ledger.delete(node.id, "enough")
    await kept.remove("mine", "user:root")
    with pytest.raises(NotFoundError):
        await kept.examine("mine")
    await rig.reconciler.reconcile()


async def test_accounts_of_the_settings_file_and_the_default_one_cannot_be_changed_here(rig: Rig) -> None:
    kept = rig.director.cloud_accounts
    for name in ("sim", "spare"):
        with pytest.raises(ConflictError, match="own settings"):
            await kept.remove(name, "user:root")
    with pytest.raises(ConflictError, match="there is a cloud 'spare'"):
        await kept.add(public.CloudForm(name="spare", driver="sim"), "user:root")
    with pytest.raises(BadInputError, match="no driver 'moon'"):
        await kept.add(public.CloudForm(name="x", driver="moon"), "user:root")
    with pytest.raises(BadInputError):
        await kept.add(public.CloudForm(name="x", driver="sim", settings={"boots": 1}), "user:root")


async def test_a_disabled_cloud_takes_nothing_new_and_keeps_what_it_has(rig: Rig) -> None:
    kept = rig.director.cloud_accounts
    form = public.CloudForm(name="mine", driver="sim", settings={"block": "127.245.0.0/16"})
    await kept.add(form, "user:root")
    service = await started(rig, cloud="mine")
    [node] = await ask(rig, service)
    off = form.model_copy(update={"options": public.CloudOptions(enabled=False)})
    await kept.change("mine", off, "user:root")

    [next_] = await ask(rig, service, key="next")
    with pytest.raises(CloudRefusedError, match="takes no new instances"):
        await rig.create((await rig.service(service)).user_id, name="second", cloud="mine")
    await rig.reconciler.reconcile()
    await rig.reconciler.watch()

    assert (node.cloud, next_.cloud) == ("mine", "spare")
    assert (await rig.instance(node.id)).state is N.BOOTING
    assert (await rig.manager(service)).cloud == "mine"


async def test_trying_an_account_leaves_nothing(rig: Rig) -> None:
    kept = rig.director.cloud_accounts
    before = set(rig.director.clouds.accounts)
    form = public.CloudForm(name="trial", driver="sim", settings={"block": "127.245.0.0/16"})

    found = await kept.try_out(form)

    assert all(finding.ok for finding in found.findings)
    assert [room.name for room in found.quota] == ["instances", "volumes"]
    assert set(rig.director.clouds.accounts) == before
    assert await kept.plans() == []
    assert {path.name for path in (rig.settings.data_dir / "clouds").iterdir()} == before


async def test_trying_with_wrong_credentials_says_so(rig: Rig) -> None:
    provider(rig, "spare").weather = CloudCredentialsError("AuthFailure: no such key")

    found = await rig.director.cloud_accounts.examine("spare")

    assert [(one.name, one.ok, one.detail) for one in found.findings] == [
        ("the endpoint", True, ""),
        ("the credentials", False, "AuthFailure: no such key"),
    ]


async def test_our_own_prices_go_before_the_providers(tmp_path: Path, clouds: dict[str, dict[str, Any]]) -> None:
    clouds["sim"] |= {"prices": {"small": "0.5", "*": "2"}, "currency": "EUR"}
    async with open_rig(tmp_path, clouds=clouds) as rig:
        await rig.director.clouds.learn_sizes()
        shown = {view.name: view for view in (await rig.director.cloud_accounts.accounts()).items}

        assert [(one.name, one.price, one.currency) for one in shown["sim"].sizes] == [
            ("small", Decimal("0.5"), "EUR"),
            ("medium", Decimal(2), "EUR"),
            ("large", Decimal(2), "EUR"),
        ]
        assert [one.price for one in shown["spare"].sizes] == [Decimal("0.01"), Decimal("0.04"), Decimal("0.16")]


# -- rounds that break off ------------------------------------------------------------------------------------------


async def test_a_cloud_that_lists_and_then_fails_ends_nothing(rig: Rig) -> None:
    service = await started(rig)
    [node] = await ask(rig, service)
    rig.clock.advance(seconds=60)
    cloud = provider(rig, "sim")
    orphan = cloud.add_foreign(rig.director.trust.deployment)
    await cloud.vanish((await rig.instance(node.id)).cloud_id)
    cloud.fail("describe", DeadlineError("no answer"), CloudCredentialsError("expired"))
    await rig.reconciler.reconcile()
    rig.clock.advance(seconds=10)
    cloud.fail("delete", DeadlineError("no answer"))
    await rig.reconciler.reconcile()
    rig.clock.advance(seconds=10)

    await rig.reconciler.reconcile()

    assert orphan not in cloud.vms
    assert (await rig.instance(node.id)).state is N.LOST


async def test_what_a_crash_left_half_made_is_made_anew_and_paid_once(rig: Rig) -> None:
    service = await started(rig, fallback=())
    cloud = provider(rig, "sim")
    cloud.lifetimes_s.append(0)  # it will never run
    cloud.fail("create", sim.Lost(DeadlineError("no answer")))
    [node] = await ask(rig, service)

    for _ in range(3):
        await rig.reconciler.reconcile()
        rig.clock.advance(seconds=10)

    assert (await rig.instance(node.id)).state is N.BOOTING
    assert len(rig.at_cloud()) == 2
    assert await rig.credits((await rig.service(service)).user_id) == 98
