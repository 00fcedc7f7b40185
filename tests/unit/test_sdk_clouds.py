"""Clouds through the SDK, against a director as its clients see it; kept secrets; prices as people read them."""

from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conpaas.core.errors import BadInputError, NotFoundError
from conpaas.core.messages.model import Cost
from conpaas.core.messages.public import CloudForm, CloudOptions
from conpaas.director import cloud_accounts
from conpaas.director.cloud_accounts import HIDDEN
from conpaas.sdk import Conpaas, connect, prices
from tests.fakes.api import TOKEN, FakeApi, serving


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with serving(FakeApi()) as running:
        yield running


@pytest.fixture
async def conpaas(api: FakeApi) -> AsyncIterator[Conpaas]:
    async with connect(api.url, TOKEN) as client:
        yield client


async def test_a_cloud_is_tried_added_changed_and_removed(api: FakeApi, conpaas: Conpaas) -> None:
    form = CloudForm(name="n2", driver="north", settings={"region": "a"}, options=CloudOptions(user_instances=2))

    assert all(finding.ok for finding in (await conpaas.try_cloud(form)).findings)
    assert (await conpaas.add_cloud(form)).options.user_instances == 2
    assert (await conpaas.change_cloud(form)).name == "n2"
    assert (await conpaas.examine_cloud("n2")).quota[0].name == "cores"
    await conpaas.remove_cloud("n2")

    assert [path for path, _, _ in api.calls] == [
        "/api/v1/admin/examine",
        "/api/v1/admin/clouds",
        "/api/v1/admin/clouds/n2",
        "/api/v1/admin/clouds/n2",
    ]


async def test_an_unknown_cloud_says_which_there_are(conpaas: Conpaas) -> None:
    assert (await conpaas.cloud_account("north")).instances == 4
    with pytest.raises(NotFoundError, match="no cloud 'mars'") as caught:
        await conpaas.cloud_account("mars")
    assert caught.value.hint == "there are: north"


async def test_a_move_is_waited_for(api: FakeApi, conpaas: Conpaas) -> None:
    service = api.add("blog")

    operation = await conpaas.move(service.id, cloud="ec2", sizes={"ec2": "large"}, wait=True)

    assert (operation.kind, operation.state) == ("move", "DONE")
    assert api.calls[0][2].fallback is None


# -- secrets, as they come back from those who were shown asterisks

KEPT = {"key": "one", "hosts": [{"address": "a", "key": "ka"}, {"address": "b", "key": "kb", "port": 22}]}


@pytest.mark.parametrize(
    ("hosts", "keys"),
    [
        ([{"address": "a", "key": HIDDEN}, {"address": "b", "key": HIDDEN}], ["ka", "kb"]),
        ([{"address": "b", "key": HIDDEN}], ["kb"]),  # the other one is removed
        ([{"address": "a", "key": HIDDEN}, {"address": "b", "key": HIDDEN, "port": 23}], ["ka", "kb"]),
        ([{"address": "c", "key": "kc"}, {"address": "a", "key": HIDDEN}], ["kc", "ka"]),
    ],
)
def test_a_hidden_secret_in_a_list_stays_with_its_own_item(hosts: list[dict[str, object]], keys: list[str]) -> None:
    restored = cloud_accounts._restored({"key": HIDDEN, "hosts": hosts}, KEPT)

    assert restored["key"] == "one"
    assert [host["key"] for host in restored["hosts"]] == keys


def test_asterisks_never_become_a_secret() -> None:
    for settings in ({"token": HIDDEN}, {"hosts": [{"address": "c", "key": HIDDEN}]}):
        with pytest.raises(BadInputError, match="none is kept"):
            cloud_accounts._restored(settings, KEPT)


# -- prices


@pytest.mark.parametrize(
    ("amounts", "words"),
    [
        ({}, ""),
        ({"EUR": Decimal(0)}, "free"),
        ({"USD": Decimal("0.0208")}, "0.0208 USD/h"),
        ({"USD": Decimal("0.02")}, "0.02 USD/h"),
        ({"USD": Decimal("0.1")}, "0.10 USD/h"),
        ({"USD": Decimal("1")}, "1.00 USD/h"),
        ({"USD": Decimal("12.3456")}, "12.35 USD/h"),
        ({"USD": Decimal("1E+3")}, "1000.00 USD/h"),
        ({"USD": Decimal("0.00001")}, "<0.0001 USD/h"),
        ({"USD": Decimal("0.01"), "EUR": Decimal("0.02")}, "0.02 EUR/h + 0.01 USD/h"),
        ({"USD": Decimal(0), "EUR": Decimal("0.02")}, "0.02 EUR/h"),
    ],
)
def test_amounts_are_shown_by_currency(amounts: dict[str, Decimal], words: str) -> None:
    assert prices.hourly(Cost(hourly=amounts)) == words


def test_what_has_ended_has_a_sum_and_no_price() -> None:
    spent = {"USD": Decimal("1.5")}
    assert prices.both(Cost(total=spent)) == "1.50 USD so far"
    assert prices.both(Cost(hourly={"USD": Decimal("0.04")}, total=spent)) == "0.04 USD/h, 1.50 USD so far"
    assert prices.both(Cost(hourly={"USD": Decimal(0)}, total={"USD": Decimal(0)})) == "free"
    assert prices.both(Cost()) == ""


@given(st.decimals(min_value="0.0001", max_value=10**9, allow_nan=False, allow_infinity=False))
def test_what_is_shown_is_within_half_a_unit_of_what_is_meant(amount: Decimal) -> None:
    shown = Decimal(prices.price(amount, "USD").removesuffix(" USD/h"))

    assert abs(shown - amount) <= (Decimal("0.005") if amount >= 10 else Decimal("0.00005"))
