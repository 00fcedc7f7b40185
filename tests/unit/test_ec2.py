"""The driver of Amazon EC2, beyond the contract: what it asks for, and what it makes of Amazon's oddities."""

import asyncio
import base64
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conpaas.cloud import (
    _ec2_account,
    _ec2_client,
    _ec2_driver,
    _ec2_groups,
    _ec2_offers,
    _ec2_prices,
    _ec2_volumes,
    ec2,
)
from conpaas.core.clock import SYSTEM_CLOCK, SystemClock
from conpaas.core.cloud import VERBS, CloudContext, VmState, VolumeState
from conpaas.core.errors import (
    CloudBusyError,
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    DeadlineError,
    NoCapacityError,
    PeerError,
    QuotaExceededError,
    ThrottledError,
    UnknownImageError,
)
from conpaas.core.tasks import wait_for
from tests.fakes import ec2_errors
from tests.fakes.cloud_ec2 import SECRET, TOKEN, Booting, Ec2Harness, harness
from tests.fakes.clouds import Fault, request, volume_request
from tests.fakes.ec2_errors import AmazonError
from tests.fakes.ec2_proxy import Form, filters_of

MINIMAL = {"region": "eu-west-1", "image": "ami-0123456789abcdef0"}


@pytest.fixture
async def account(tmp_path: Path) -> AsyncIterator[Ec2Harness]:
    async with harness(tmp_path) as account:
        yield account


@pytest.fixture
async def open_cloud(account: Ec2Harness) -> AsyncIterator[Callable[..., _ec2_driver.Ec2Cloud]]:
    opened: list[_ec2_driver.Ec2Cloud] = []

    def make(**words: Any) -> _ec2_driver.Ec2Cloud:
        opened.append(account.open(**words))
        return opened[-1]

    yield make
    for cloud in opened:
        await cloud.close()


Open = Callable[..., _ec2_driver.Ec2Cloud]


@pytest.fixture
def cloud(open_cloud: Open) -> _ec2_driver.Ec2Cloud:
    return open_cloud()


class Hasty(SystemClock):
    """A clock whose sleeps take no time, and whose time can be moved."""

    def __init__(self) -> None:
        self.later = timedelta()
        self.slept: list[float] = []

    def now(self) -> datetime:
        return datetime.now(UTC) + self.later

    def monotonic(self) -> float:
        return super().monotonic() + self.later.total_seconds()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


async def until(check: Callable[[], Awaitable[object]], what: str) -> None:
    async def look() -> bool | None:
        return True if await check() else None

    await wait_for(look, timeout_s=40, what=what, clock=SYSTEM_CLOCK, period_s=0.01)


def calls(account: Ec2Harness, action: str) -> list[Form]:
    return [form for made, form in account.proxy.calls if made == action]


def tags(form: Form, kind: str) -> dict[str, str]:
    """Return the tags that a call gives to things of a kind."""
    for key, value in form.items():
        if key.endswith(".ResourceType") and value == kind:
            prefix = key.removesuffix("ResourceType") + "Tag."
            keys = {name: form[name.replace(".Key", ".Value")] for name in form if name.startswith(prefix)}
            return {form[name]: value for name, value in keys.items() if name.endswith(".Key")}
    return {}


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"region": "eu west 1"}, "region"),
        ({"image": "debian-12"}, "image"),
        ({"access_key": "AKIA"}, "go together"),
        ({"secret_key": "x"}, "go together"),
        ({"session_token": "x"}, "session_token needs"),
        ({"endpoint": "ec2.example.org"}, "endpoint"),
        ({"inner_networks": [f"10.{number}.0.0/16" for number in range(9)]}, "at most 8"),
        ({"spot_max_price": 0}, "spot_max_price"),
        ({"regoin": "eu-west-1"}, "regoin"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        ec2.Ec2Settings.model_validate(MINIMAL | words)


def test_secrets_are_not_shown() -> None:
    settings = ec2.Ec2Settings.model_validate(
        MINIMAL | {"access_key": "AKIA", "secret_key": SECRET, "session_token": TOKEN}
    )

    for text in (repr(settings), settings.model_dump_json()):
        assert SECRET not in text
        assert TOKEN not in text


def test_every_verb_is_limited() -> None:
    assert set(ec2.CLOUD.rates) == set(VERBS)
    assert ec2.CLOUD.rates["create"].per_s <= 2


# -- errors ---------------------------------------------------------------------------------------------------------

WRONG_KEY = AmazonError(401, "AuthFailure", "AWS was not able to validate the provided access credentials")
NOT_FOR_US = AmazonError(401, "AuthFailure", "Not authorized for images: [ami-0123456789abcdef0]")

ERRORS: list[tuple[AmazonError, type[ConpaasError]]] = [
    *((error, kind) for error, kind in zip(ec2_errors.BY_FAULT.values(), (
        ThrottledError, NoCapacityError, CloudCredentialsError, UnknownImageError, QuotaExceededError), strict=True)),
    (AmazonError(400, "Throttling", "Rate exceeded"), ThrottledError),
    (AmazonError(400, "SpotMaxPriceTooLow", "Your Spot request price is too low"), NoCapacityError),
    (AmazonError(400, "InsufficientFreeAddressesInSubnet", "no free addresses in subnet-1"), NoCapacityError),
    (AmazonError(400, "InstanceLimitExceeded", "Your quota allows for 0 more"), QuotaExceededError),
    (AmazonError(400, "MaxSpotInstanceCountExceeded", "Max spot instance count exceeded"), QuotaExceededError),
    (AmazonError(400, "RulesPerSecurityGroupLimitExceeded", "The maximum number of rules"), QuotaExceededError),
    (WRONG_KEY, CloudCredentialsError),
    (AmazonError(403, "UnauthorizedOperation", ec2_errors.NOT_ALLOWED), CloudCredentialsError),
    (AmazonError(400, "ExpiredTokenException", "The security token is expired"), CloudCredentialsError),
    (AmazonError(401, "OptInRequired", "You are not subscribed to this service."), CloudCredentialsError),
    (NOT_FOR_US, UnknownImageError),
    (AmazonError(400, "InvalidAMIID.Unavailable", "The image ID 'ami-1' is no longer available"), UnknownImageError),
    (AmazonError(503, "Unavailable", "The server is overloaded and can't handle the request."), CloudBusyError),
    (AmazonError(400, "IncorrectState", "instance is not in a valid state"), CloudBusyError),
    (AmazonError(400, "InvalidGroup.NotFound", "The security group 'sg-1' does not exist"), CloudBusyError),
    (AmazonError(500, "InternalError", "An internal error has occurred"), PeerError),
    (AmazonError(500, "InternalFailure", "The request processing has failed"), PeerError),
    (ec2_errors.MISMATCH, PeerError),
    (ec2_errors.TERMINATED, CloudRefusedError),
    (AmazonError(400, "InvalidParameterValue", "Invalid value 't9.huge' for InstanceType."), CloudRefusedError),
    (AmazonError(400, "Unsupported", "The requested configuration is currently not supported."), CloudRefusedError),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=[error.code for error, _ in ERRORS])
async def test_each_of_amazons_errors_says_what_to_do_in_amazons_words(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud, error: AmazonError, kind: type[ConpaasError]
) -> None:
    account.proxy.answers["RunInstances"].append(error)
    with pytest.raises(ConpaasError) as caught:
        await cloud.create(request("i-one"))

    assert type(caught.value) is kind
    assert error.message.partition(" Encoded")[0] in caught.value.message
    assert caught.value.value == error.code
    assert "4GIOHl" not in caught.value.message
    assert len(calls(account, "RunInstances")) == 1, "it was repeated"


def test_a_throttled_call_says_how_long_to_wait_if_amazon_does() -> None:
    def error(headers: dict[str, str]) -> ConpaasError:
        metadata = {"HTTPStatusCode": 503, "HTTPHeaders": headers}
        answer = {"Error": {"Code": "RequestLimitExceeded"}, "ResponseMetadata": metadata}
        return _ec2_client.error_for("x", "y", answer)

    pauses = [
        error(headers).__dict__["retry_after_s"] for headers in ({"retry-after": "7"}, {}, {"retry-after": "soon"})
    ]
    assert pauses == [7, None, None]


INSTANCE = (
    "<DescribeInstancesResponse><requestId>1</requestId><reservationSet><item><instancesSet><item>{}</item>"
    "</instancesSet></item></reservationSet></DescribeInstancesResponse>"
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<",
        "it works",
        "<html/>",
        '{"Reservations": []}',
        "<DescribeInstancesResponse><reservationSet/></DescribeInstancesResponse>",
        "<DescribeInstancesResponse><requestId>1</requestId></DescribeInstancesResponse>",
        INSTANCE.format(""),
        INSTANCE.format("<instanceId>i-1</instanceId><instanceState><name>dreaming</name></instanceState>"),
        INSTANCE.format("<instanceState><code>x</code></instanceState>"),
    ],
)
async def test_an_answer_that_is_not_amazons_is_never_taken_for_an_empty_list(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud, text: str
) -> None:
    account.proxy.answers["DescribeInstances"].extend([text, text])
    with pytest.raises(PeerError):
        await cloud.list()
    with pytest.raises(PeerError):
        await cloud.describe("i-one")


async def test_of_a_long_answer_that_is_not_amazons_only_the_beginning_is_told(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    account.proxy.answers["DescribeInstances"].append("<p>Please sign in\n" * 1000)
    with pytest.raises(PeerError, match="<p>Please sign in") as caught:
        await cloud.list()

    assert len(caught.value.message) < 1000
    assert "\n" not in caught.value.message


KEYS = (
    "AccountAttributes AttributeName AttributeValues Attachments BlockDeviceMappings Ebs FromPort Images InstanceId "
    "Instances IpPermissions IpProtocol Key Name Reservations RequestId ResponseMetadata SecurityGroups State Subnets "
    "Tags VolumeId Volumes attributes product terms"
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=5),
    max_leaves=12,
)
READERS = (
    _ec2_account._read_subnets,
    _ec2_account._read_amis,
    _ec2_groups._read_groups,
    _ec2_groups._read_members,
    _ec2_offers._read_images,
    _ec2_offers._read_use,
    _ec2_offers._read_size,
    _ec2_offers._read_most_instances,
    _ec2_prices._price,
    _ec2_volumes.read_volume,
)


@given(JSON, st.sampled_from(READERS))
async def test_whatever_an_answer_holds_it_is_read_or_refused(answer: Any, read: Callable[[Any], object]) -> None:
    class Service:
        async def ask(self) -> Any:
            return answer

    settings = ec2.Ec2Settings.model_validate(MINIMAL)
    context = CloudContext(name="x", deployment="d", directory=Path("/"), clock=SYSTEM_CLOCK)
    client = _ec2_client.Client("ec2", settings, context, endpoint="")
    client._client = Service()
    try:
        await client.call("ask", read)
    except PeerError as exc:
        assert "makes no sense" in exc.message  # noqa: PT017


async def test_a_closed_port_is_a_peer_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        settings = ec2.Ec2Settings.model_validate(
            MINIMAL
            | {"access_key": "a", "secret_key": "b", "endpoint": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        )
        context = CloudContext(name="x", deployment="d", directory=tmp_path, clock=SYSTEM_CLOCK)
        cloud = ec2.CLOUD.open(settings, context)
        with pytest.raises(PeerError, match="http://127"):
            await cloud.list()
        findings = await cloud.examine()  # type: ignore[attr-defined]
        await cloud.close()

    assert [(finding.name, finding.ok) for finding in findings] == [("the endpoint", False)]
    assert "'region' and 'endpoint'" in findings[0].hint


async def test_without_credentials_anywhere_it_says_so(
    account: Ec2Harness, open_cloud: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(_ec2_client, "session", _ec2_client.session.__wrapped__)

    with pytest.raises(CloudCredentialsError, match="credentials"):
        await open_cloud(access_key="", secret_key="", session_token="").list()


async def test_neither_secrets_nor_what_instances_are_given_are_logged(
    account: Ec2Harness,
    cloud: _ec2_driver.Ec2Cloud,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.DEBUG):
        await cloud.create(replace(request("i-one"), context=lambda _: "one-use-token"))
        account.proxy.answers["RunInstances"].append(
            AmazonError(400, "SignatureDoesNotMatch", "The signature differs.")
        )
        with pytest.raises(CloudCredentialsError):
            await cloud.create(request("i-two"))

    told = caplog.text + "".join(capsys.readouterr())
    given_text = base64.b64encode(b"one-use-token").decode()
    for secret in (SECRET, TOKEN, "one-use-token", given_text):
        assert secret not in told


# -- instances ------------------------------------------------------------------------------------------------------


async def test_an_instance_is_what_the_settings_say(account: Ec2Harness, open_cloud: Open) -> None:
    await account.proxy.ask("CreateKeyPair", KeyName="ours")
    cloud = open_cloud(key_pair="ours", disk_gib=40)
    vm = await cloud.create(replace(request("i-one"), size="t2.medium", zone="us-east-1c"))

    (form,) = calls(account, "RunInstances")
    expected = {
        "ImageId": account.words["image"],
        "InstanceType": "t2.medium",
        "KeyName": "ours",
        "MinCount": "1",
        "MaxCount": "1",
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions.HttpTokens": "required",
        "MetadataOptions.HttpPutResponseHopLimit": "1",
        "NetworkInterface.1.AssociatePublicIpAddress": "true",
        "BlockDeviceMapping.1.Ebs.Encrypted": "true",
        "BlockDeviceMapping.1.Ebs.VolumeType": "gp3",
        "BlockDeviceMapping.1.Ebs.VolumeSize": "40",
        "BlockDeviceMapping.1.Ebs.DeleteOnTermination": "true",
    }
    assert {name: form.get(name) for name in expected} == expected
    assert (vm.size, vm.zone) == ("t2.medium", "us-east-1c")
    assert tags(form, "instance") == {
        "Name": "test i-one",
        "conpaas:deployment": "dep-ours",
        "conpaas:token": "i-one",
        "conpaas:service": "svc-test",
        "conpaas:kind": "agent",
    }
    assert "conpaas:token" not in tags(form, "volume"), "its own disk would look like a volume"
    assert not any(name.startswith("InstanceMarketOptions") for name in form)
    assert len(form["ClientToken"]) <= 64


async def test_an_instance_reads_its_context_unchanged_from_its_user_data(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    asked: list[str] = []

    def context(address: str) -> str:
        asked.append(address)
        return '{"kind": "agent", "motto": "“$HOME” & <b>"}'

    vm = await cloud.create(replace(request("i-one"), context=context))

    assert await account.boot(vm.id) == context("")
    assert set(asked) == {""}, "it finds its address out by itself"


async def test_spot_instances_are_asked_for_once_and_end_when_they_are_taken_away(
    account: Ec2Harness, open_cloud: Open
) -> None:
    await open_cloud(spot=True, spot_max_price="0.02", encrypted=False).create(request("i-one"))

    (form,) = calls(account, "RunInstances")
    assert {name: value for name, value in form.items() if name.startswith("InstanceMarketOptions")} == {
        "InstanceMarketOptions.MarketType": "spot",
        "InstanceMarketOptions.SpotOptions.SpotInstanceType": "one-time",
        "InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior": "terminate",
        "InstanceMarketOptions.SpotOptions.MaxPrice": "0.02",
    }
    assert tags(form, "spot-instances-request")["conpaas:deployment"] == "dep-ours"
    assert "BlockDeviceMapping.1.Ebs.Encrypted" not in form


@pytest.mark.parametrize(("address", "start"), [("public", "54."), ("private", "172.31."), ("name", "ec2-54-")])
async def test_an_instance_is_reached_as_the_settings_say(
    account: Ec2Harness, open_cloud: Open, address: str, start: str
) -> None:
    vm = await open_cloud(address=address).create(request("i-one"))

    assert (vm.address or "").startswith(start)
    (form,) = calls(account, "RunInstances")
    assert form["NetworkInterface.1.AssociatePublicIpAddress"] == str(address != "private").lower()


async def test_instances_are_made_in_the_first_of_the_subnets_that_are_named(
    account: Ec2Harness, open_cloud: Open
) -> None:
    answer = await account.proxy.ask("DescribeSubnets")
    by_zone = {item.findtext("availabilityZone", ""): item.findtext("subnetId", "") for item in answer.iter("item")}
    cloud = open_cloud(subnets=[by_zone["us-east-1d"], by_zone["us-east-1b"]])

    assert (await cloud.create(request("i-one"))).zone == "us-east-1d"
    assert (await cloud.create(replace(request("i-two"), zone="us-east-1b"))).zone == "us-east-1b"
    assert await cloud.zones() == ["us-east-1b", "us-east-1d"]
    with pytest.raises(CloudRefusedError, match="us-east-1a"):
        await cloud.create(replace(request("i-three"), zone="us-east-1a"))
    assert (await open_cloud(zone="us-east-1f").create(request("i-four"))).zone == "us-east-1f"


async def test_one_token_with_two_contexts_makes_one_instance(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud) -> None:
    vm = await cloud.create(request("i-one"))
    account.proxy.fail("lookup", Fault.STALE, 1)
    with pytest.raises(PeerError, match="inconsistent"):
        await cloud.create(replace(request("i-one"), context=lambda _: "another one-use token"))

    assert (await cloud.create(replace(request("i-one"), context=lambda _: "a third"))).id == vm.id
    assert [seen.id for seen in await cloud.list()] == [vm.id]


async def test_a_token_can_be_used_again_when_its_instance_has_ended(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    ids = []
    for _ in range(3):
        ids.append((await cloud.create(request("i-one"))).id)
        await cloud.delete(ids[-1])

    assert len(set(ids)) == 3


async def test_a_launch_that_hangs_has_a_deadline(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud) -> None:
    account.proxy.fail("create", Fault.LATE, 1)
    with pytest.raises(DeadlineError, match="run_instances: no answer in time"):
        await cloud.create(request("i-one"))


async def test_an_ended_instance_is_gone_and_says_why(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud) -> None:
    vm = await cloud.create(request("i-one"))
    await account.proxy.ask("TerminateInstances", **{"InstanceId.1": vm.id})

    seen = await cloud.describe(vm.id)
    assert (seen.state, seen.token, seen.address) == (VmState.GONE, "i-one", None)
    assert "shutdown" in seen.reason
    assert await cloud.list() == []


@pytest.mark.parametrize("state", ["pending", "shutting-down", "stopping"])
async def test_every_state_has_a_meaning(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud, state: str) -> None:
    text = INSTANCE.format(f"<instanceId>i-1</instanceId><instanceState><name>{state}</name></instanceState>")
    account.proxy.answers["DescribeInstances"].append(text)
    seen = await cloud.describe("i-1")

    assert seen.state is {"pending": VmState.PENDING, "shutting-down": VmState.GONE}.get(state, VmState.FAILED)
    assert bool(seen.reason) == (state != "pending")


async def test_what_was_just_made_is_only_believed_in_for_a_while(account: Ec2Harness, open_cloud: Open) -> None:
    clock = Hasty()
    cloud = open_cloud(clock=clock)
    vm = await cloud.create(request("i-one"))
    account.proxy.fail("describe", Fault.STALE, 1)
    assert (await cloud.describe(vm.id)).state is not VmState.GONE

    clock.later = timedelta(minutes=1)
    account.proxy.fail("describe", Fault.STALE, 1)
    assert (await cloud.describe(vm.id)).state is VmState.GONE


async def test_what_amazon_does_not_know_yet_is_not_taken_for_deleted(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    vm = await cloud.create(request("i-one"))
    account.proxy.fail("describe", Fault.STALE, 1)
    account.proxy.answers["TerminateInstances"].append(
        AmazonError(400, "InvalidInstanceID.NotFound", f"The instance ID '{vm.id}' does not exist")
    )
    with pytest.raises(CloudBusyError, match="does not exist"):
        await cloud.delete(vm.id)

    assert await account.lives(vm.id)
    await cloud.delete(vm.id)
    assert await account.leftovers() == []


async def test_somebody_elses_instance_is_not_even_asked_to_end(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    await cloud.delete(await account.make_foreign())

    assert calls(account, "TerminateInstances") == []


async def test_a_long_list_is_asked_for_in_pages_of_ours_only(account: Ec2Harness, open_cloud: Open) -> None:
    account.proxy.quota = 20
    cloud = open_cloud(page=5)
    made = await asyncio.gather(*(cloud.create(request(f"i-{number}")) for number in range(12)))
    before = len(calls(account, "DescribeInstances"))

    assert {vm.id for vm in await cloud.list()} == {vm.id for vm in made}
    asked = calls(account, "DescribeInstances")[before:]
    assert [form["MaxResults"] for form in asked] == ["5"] * 3
    assert all(filters_of(form)["tag:conpaas:deployment"] == ["dep-ours"] for form in asked)


async def test_old_instance_types_have_only_an_old_console(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud) -> None:
    vm = await cloud.create(request("i-one"))
    text = base64.b64encode(b"x" * 100_000 + "Ende ä".encode()).decode()
    account.proxy.answers["GetConsoleOutput"].extend(
        [
            AmazonError(
                400, "UnsupportedOperation", "This instance type does not support retrieving the latest console logs."
            ),
            f"<GetConsoleOutputResponse><requestId>1</requestId><output>{text}</output></GetConsoleOutputResponse>",
        ]
    )
    shown = await cloud.console(vm.id)

    assert shown.endswith("xEnde ä")
    assert len(shown.encode()) <= 64 * 1024
    assert [form.get("Latest") for form in calls(account, "GetConsoleOutput")] == ["true", None]


# -- security groups ------------------------------------------------------------------------------------------------

GROUP = "conpaas-dep-ours-svc-test"


async def rules(account: Ec2Harness, name: str = GROUP) -> set[tuple[str, str]]:
    """Return the ports of a group, and whom it lets in there."""
    entries = (await account.groups())[name].find("ipPermissions")
    assert entries is not None
    found = set()
    for entry in entries:
        assert entry.findtext("fromPort") == entry.findtext("toPort")
        for source in entry.iter():
            if source.tag in ("cidrIp", "cidrIpv6", "groupId"):
                found.add((entry.findtext("fromPort", ""), source.text or ""))
    return found


async def test_ports_are_open_to_all_and_inner_ports_to_the_service_itself(
    account: Ec2Harness, open_cloud: Open
) -> None:
    cloud = open_cloud(inner_networks=["192.0.2.7/32", "2001:db8::/32"])
    await cloud.create(request("i-one"))

    group = (await account.groups())[GROUP].findtext("groupId", "")
    opened = {
        ("8080", "0.0.0.0/0"),
        ("8080", "::/0"),
        *(("5555", who) for who in (group, "192.0.2.7/32", "2001:db8::/32")),
    }
    assert await rules(account) == opened
    assert calls(account, "RunInstances")[0]["NetworkInterface.1.SecurityGroupId.1"] == group

    await cloud.create(replace(request("i-two"), ports=(80, 8080), inner_ports=()))
    assert await rules(account) == opened | {("80", "0.0.0.0/0"), ("80", "::/0")}
    assert len(calls(account, "CreateSecurityGroup")) == 1
    await cloud.create(request("i-three"))
    assert len(calls(account, "AuthorizeSecurityGroupIngress")) == 2


async def test_each_service_has_a_group_that_goes_with_its_last_instance(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    one, two = await cloud.create(request("i-one")), await cloud.create(request("i-two"))
    await cloud.create(replace(request("i-other"), tags={"service": "svc-other"}))
    assert set(await account.groups()) == {GROUP, "conpaas-dep-ours-svc-other"}

    before = len(calls(account, "DescribeSecurityGroups"))
    await cloud.delete(one.id)

    async def swept() -> bool:
        return len(calls(account, "DescribeSecurityGroups")) > before

    await until(swept, "the groups were looked at")
    assert GROUP in await account.groups()
    await cloud.delete(two.id)

    async def gone() -> bool:
        return set(await account.groups()) == {"conpaas-dep-ours-svc-other"}

    await until(gone, "the group is gone")


async def test_a_group_is_deleted_when_amazon_has_ended_its_instances(account: Ec2Harness, open_cloud: Open) -> None:
    clock = Hasty()
    cloud = open_cloud(clock=clock)
    vm = await cloud.create(request("i-one"))
    held = AmazonError(400, "DependencyViolation", "resource sg-1 has a dependent object")
    account.proxy.answers["DeleteSecurityGroup"].extend([held] * 4)
    await cloud.delete(vm.id)

    async def gone() -> bool:
        return not await account.groups()

    await until(gone, "the group is gone")
    assert clock.slept == [5, 10, 15, 30]


async def test_a_group_is_deleted_also_after_amazon_did_not_answer(account: Ec2Harness, open_cloud: Open) -> None:
    cloud = open_cloud(clock=Hasty())
    vm = await cloud.create(request("i-one"))
    for error in (
        AmazonError(500, "InternalError", "An internal error has occurred"),
        ec2_errors.BY_FAULT[Fault.THROTTLED],
    ):
        account.proxy.answers["DescribeSecurityGroups"].append(error)
    await cloud.delete(vm.id)

    async def gone() -> bool:
        return not await account.groups()

    await until(gone, "the group is gone")


async def test_groups_that_an_earlier_run_left_are_swept_and_others_are_not(
    account: Ec2Harness, open_cloud: Open
) -> None:
    earlier = account.open(clock=SYSTEM_CLOCK)
    account.proxy.answers["DeleteSecurityGroup"].append(AmazonError(400, "DependencyViolation", "in use"))
    vm = await earlier.create(request("i-one"))
    await earlier.delete(vm.id)

    async def tried() -> bool:
        return bool(calls(account, "DeleteSecurityGroup"))

    await until(tried, "the group could not be deleted")
    await earlier.close()
    theirs = open_cloud(deployment="dep-theirs")
    await theirs.create(request("i-theirs"))
    await account.proxy.ask("CreateSecurityGroup", GroupName="conpaas-dep-ours-handmade", GroupDescription="x")

    cloud = open_cloud()
    other = await cloud.create(replace(request("i-two"), tags={"service": "svc-other"}))
    await cloud.delete(other.id)

    async def swept() -> bool:
        return set(await account.groups()) == {"conpaas-dep-theirs-svc-test", "conpaas-dep-ours-handmade"}

    await until(swept, "only others' groups are left")


async def test_a_group_is_kept_while_an_instance_is_being_made_in_it(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    launch = account.proxy.held["RunInstances"] = asyncio.Event()
    creating = asyncio.ensure_future(cloud.create(request("i-one")))

    async def launching() -> bool:
        return bool(calls(account, "RunInstances"))

    await until(launching, "it is being launched")
    assert not await cloud._groups._sweep_once()
    assert GROUP in await account.groups()
    launch.set()
    assert (await creating).token == "i-one"


async def test_a_launch_that_is_refused_leaves_no_group(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud) -> None:
    account.proxy.answers["RunInstances"].append(ec2_errors.BY_FAULT[Fault.NO_CAPACITY])
    with pytest.raises(NoCapacityError):
        await cloud.create(request("i-one"))

    async def gone() -> bool:
        return not await account.groups()

    await until(gone, "the group is gone")


async def test_a_group_of_our_name_that_is_not_ours_is_not_used(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    await account.proxy.ask("CreateSecurityGroup", GroupName=GROUP, GroupDescription="handmade")
    with pytest.raises(CloudRefusedError, match=GROUP):
        await cloud.create(request("i-one"))

    assert await rules(account) == set()
    assert await account.leftovers() == []


async def test_two_drivers_may_make_the_same_group_at_once(account: Ec2Harness, open_cloud: Open) -> None:
    drivers = [open_cloud() for _ in range(3)]
    vms = await asyncio.gather(*(driver.create(request(f"i-{place}")) for place, driver in enumerate(drivers)))

    assert len({vm.id for vm in vms}) == 3
    assert set(await account.groups()) == {GROUP}
    assert {port for port, _ in await rules(account)} == {"8080", "5555"}


GROUPS = (
    "<DescribeSecurityGroupsResponse><requestId>1</requestId><securityGroupInfo>{}</securityGroupInfo>"
    "</DescribeSecurityGroupsResponse>"
)


async def test_a_group_that_the_lists_do_not_know_yet_is_used(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud) -> None:
    await cloud.create(request("i-one"))
    account.proxy.answers["DescribeSecurityGroups"].append(GROUPS.format(""))
    await cloud.create(replace(request("i-two"), ports=(80,)))

    assert len(calls(account, "CreateSecurityGroup")) == 1
    assert {port for port, _ in await rules(account)} == {"80", "8080", "5555"}
    one, two = calls(account, "RunInstances")
    assert one["NetworkInterface.1.SecurityGroupId.1"] == two["NetworkInterface.1.SecurityGroupId.1"]


async def test_a_group_that_another_driver_has_just_made_is_waited_for(account: Ec2Harness, open_cloud: Open) -> None:
    await open_cloud().create(request("i-one"))
    other = open_cloud()
    account.proxy.answers["DescribeSecurityGroups"].extend([GROUPS.format("")] * 3)
    with pytest.raises(CloudBusyError, match=GROUP):
        await other.create(request("i-two"))

    assert (await other.create(request("i-two"))).token == "i-two"


async def test_rules_that_the_lists_do_not_know_yet_keep_no_other_rule_out(
    account: Ec2Harness, open_cloud: Open
) -> None:
    await open_cloud().create(request("i-one"))
    group = (await account.groups())[GROUP].findtext("groupId", "")
    empty = GROUPS.format(f"<item><groupId>{group}</groupId><groupName>{GROUP}</groupName></item>")
    account.proxy.answers["DescribeSecurityGroups"].append(empty)
    before = await rules(account)
    await open_cloud().create(replace(request("i-two"), ports=(80, 8080)))

    assert await rules(account) == before | {("80", "0.0.0.0/0"), ("80", "::/0")}


PORTS = st.integers(1, 65535)
SOURCES = st.sampled_from([_ec2_groups.THEMSELVES, "0.0.0.0/0", "::/0", "10.0.0.0/8", "2001:db8::/32"])


@given(st.frozensets(st.tuples(PORTS, SOURCES), max_size=20))
def test_rules_are_read_as_they_were_written(wanted: frozenset[_ec2_groups.Rule]) -> None:
    entries = _ec2_groups.permissions(wanted, "sg-1")

    assert _ec2_groups.read_rules("sg-1", entries) == wanted
    assert len({entry["FromPort"] for entry in entries}) == len(entries)


# -- volumes --------------------------------------------------------------------------------------------------------


async def test_a_volume_is_gp3_encrypted_and_rounded_up(account: Ec2Harness, open_cloud: Open) -> None:
    volume = await open_cloud().create_volume(replace(volume_request("v-one"), size=(5 << 30) + 1))
    await open_cloud(encrypted=False).create_volume(volume_request("v-two"))

    assert volume.size == 6 << 30
    first, second = calls(account, "CreateVolume")
    assert (first["Size"], first["VolumeType"], first["Encrypted"]) == ("6", "gp3", "true")
    assert (second["Size"], second["Encrypted"]) == ("1", "false")
    assert tags(first, "volume")["conpaas:token"] == "v-one"


async def test_an_instance_finds_a_volume_by_its_id_first(cloud: _ec2_driver.Ec2Cloud) -> None:
    vm, volume = await cloud.create(request("i-one")), await cloud.create_volume(volume_request("v-one"))
    seen = await cloud.attach(volume.id, vm.id)

    by_id, xen, name = seen.devices
    assert by_id == f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{volume.id.replace('-', '')}"
    assert (xen.removeprefix("/dev/xvd"), name.removeprefix("/dev/sd")) == (name[-1], name[-1])
    assert (await cloud.describe_volume(volume.id)).devices == seen.devices


async def test_an_instance_takes_as_many_volumes_as_it_has_device_names(cloud: _ec2_driver.Ec2Cloud) -> None:
    vm = await cloud.create(request("i-one"))
    tokens = [f"v-{number}" for number in range(len(_ec2_volumes.DEVICES) + 1)]
    volumes = await asyncio.gather(*(cloud.create_volume(volume_request(token)) for token in tokens))
    attached = await asyncio.gather(*(cloud.attach(volume.id, vm.id) for volume in volumes[:-1]))

    assert len({volume.devices[-1] for volume in attached}) == len(_ec2_volumes.DEVICES)
    with pytest.raises(QuotaExceededError, match=vm.id):
        await cloud.attach(volumes[-1].id, vm.id)


async def test_a_volume_waits_until_its_instance_runs(account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud) -> None:
    vm, volume = await cloud.create(request("i-one")), await cloud.create_volume(volume_request("v-one"))
    account.proxy.answers["AttachVolume"].append(
        AmazonError(400, "IncorrectState", f"Instance '{vm.id}' is not 'running'.")
    )
    with pytest.raises(CloudBusyError, match="not 'running'"):
        await cloud.attach(volume.id, vm.id)

    assert (await cloud.attach(volume.id, vm.id)).vm == vm.id


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("InvalidVolume.NotFound", "The volume 'vol-1' does not exist."),
        (
            "InvalidParameterValue",
            "Invalid value '/dev/sdf' for unixDevice. Attachment point /dev/sdf is already in use",
        ),
    ],
)
async def test_what_amazons_lists_do_not_know_yet_is_no_reason_to_give_a_volume_up(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud, code: str, words: str
) -> None:
    vm, volume = await cloud.create(request("i-one")), await cloud.create_volume(volume_request("v-one"))
    account.proxy.answers["AttachVolume"].append(AmazonError(400, code, words))
    with pytest.raises(CloudBusyError, match=code):
        await cloud.attach(volume.id, vm.id)

    await cloud.attach(volume.id, vm.id)
    account.proxy.answers["DetachVolume"].append(AmazonError(400, "InvalidAttachment.NotFound", "It is not attached."))
    with pytest.raises(CloudBusyError, match="not attached"):
        await cloud.detach(volume.id)


@pytest.mark.parametrize(
    ("state", "attachment", "seen"),
    [
        ("creating", "", VolumeState.PENDING),
        ("in-use", "attaching", VolumeState.PENDING),
        ("in-use", "attached", VolumeState.ATTACHED),
        ("in-use", "busy", VolumeState.PENDING),
        ("in-use", "detaching", VolumeState.PENDING),
        ("available", "detached", VolumeState.AVAILABLE),
        ("deleting", "", VolumeState.GONE),
        ("error", "", VolumeState.FAILED),
    ],
)
def test_every_state_of_a_volume_has_a_meaning(state: str, attachment: str, seen: VolumeState) -> None:
    attached = {"State": attachment, "InstanceId": "i-1", "Device": "/dev/sdf"}
    volume = _ec2_volumes.read_volume(
        {"VolumeId": "vol-1", "State": state, "Attachments": [attached] if attachment else []}
    )

    assert volume.state is seen
    assert (volume.vm == "i-1") == (attachment not in ("", "detached"))
    assert bool(volume.reason) == (seen is VolumeState.FAILED)


# -- prices and quota -----------------------------------------------------------------------------------------------


async def test_sizes_have_the_prices_of_amazons_list_which_is_asked_once_a_day(
    account: Ec2Harness, open_cloud: Open
) -> None:
    clock = Hasty()
    for _ in range(2):
        sizes = await open_cloud(clock=clock).sizes()
        assert [(size.name, size.price, size.default) for size in sizes] == [
            ("t2.nano", Decimal("0.0058"), False),
            ("t2.small", Decimal("0.0230"), True),
            ("t2.medium", Decimal("0.0464"), False),
        ]
    assert len(calls(account, "GetProducts")) == 1

    clock.later = timedelta(days=1, minutes=1)
    await open_cloud(clock=clock).sizes()
    assert len(calls(account, "GetProducts")) == 2


async def test_an_old_price_list_is_better_than_none(account: Ec2Harness, open_cloud: Open) -> None:
    clock = Hasty()
    await open_cloud(clock=clock).sizes()
    clock.later = timedelta(days=2)
    account.proxy.answers["GetProducts"].append(AmazonError(400, "AccessDeniedException", "not authorized"))
    cloud = open_cloud(clock=clock)

    for _ in range(3):
        assert (await cloud.sizes())[0].price == Decimal("0.0058")
    assert len(calls(account, "GetProducts")) == 2, "asked again and again, in vain"
    clock.later += timedelta(hours=2)
    await cloud.sizes()
    assert len(calls(account, "GetProducts")) == 3


async def test_a_price_list_that_is_unreadable_is_asked_for_again(account: Ec2Harness, open_cloud: Open) -> None:
    await open_cloud().sizes()
    (file,) = (account._directory).glob("prices-*.json")
    for text in ("", "[]", '{"asked": "yesterday", "prices": {}}', '{"asked": 1, "prices": {"t2.nano": ["x", "USD"]}}'):
        file.write_text(text)
        assert (await open_cloud().sizes())[0].price == Decimal("0.0058")


async def test_a_price_list_that_cannot_be_kept_is_used_all_the_same(account: Ec2Harness, open_cloud: Open) -> None:
    (account._directory / "prices-us-east-1.json").mkdir()

    assert (await open_cloud().sizes())[0].price == Decimal("0.0058")


async def test_the_settings_prices_go_first_and_do_without_any_list(account: Ec2Harness, open_cloud: Open) -> None:
    mixed = await open_cloud(prices={"t2.nano": "0.5"}).sizes()
    assert [(size.name, size.price) for size in mixed][-1] == ("t2.nano", Decimal("0.5"))

    for file in account._directory.glob("prices-*.json"):
        file.unlink()
    asked = len(calls(account, "GetProducts"))
    alone = await open_cloud(prices={"t2.medium": "0.4"}, services_endpoint="").sizes()
    assert len(calls(account, "GetProducts")) == asked
    assert [(size.name, size.price) for size in alone] == [
        ("t2.medium", Decimal("0.4")),
        ("t2.nano", None),
        ("t2.small", None),
    ]
    assert (alone[0].memory, alone[0].cores) == (4 << 30, 2)


async def test_sizes_to_choose_from_may_be_patterns(account: Ec2Harness, open_cloud: Open) -> None:
    await open_cloud(sizes=["t2.n*", "m7i.*"]).sizes()

    for action in ("DescribeInstanceTypes", "DescribeInstanceTypeOfferings"):
        (form,) = calls(account, action)
        assert filters_of(form)["instance-type"] == ["m7i.*", "t2.n*", "t2.small"]


async def test_spot_prices_are_those_of_the_market(account: Ec2Harness, open_cloud: Open) -> None:
    account.proxy.answers["DescribeSpotPriceHistory"].append(
        "<DescribeSpotPriceHistoryResponse><requestId>1</requestId><spotPriceHistorySet><item><instanceType>t2.small"
        "</instanceType><spotPrice>0.006900</spotPrice></item></spotPriceHistorySet></DescribeSpotPriceHistoryResponse>"
    )
    sizes = await open_cloud(spot=True).sizes()

    assert {size.name: size.price for size in sizes}["t2.small"] == Decimal("0.0069")
    (form,) = calls(account, "DescribeSpotPriceHistory")
    assert (form["ProductDescription.1"], form["AvailabilityZone"]) == ("Linux/UNIX", "us-east-1a")
    assert calls(account, "GetProducts") == []


def test_a_price_is_by_the_hour_and_for_all_hours() -> None:
    def entry(*dimensions: tuple[str, dict[str, str]]) -> dict[str, Any]:
        terms = {str(place): {"unit": unit, "pricePerUnit": price} for place, (unit, price) in enumerate(dimensions)}
        return {
            "product": {"attributes": {"instanceType": "t3.small"}},
            "terms": {"OnDemand": {"x": {"priceDimensions": terms}}},
        }

    assert _ec2_prices._price(entry(("Quantity", {"USD": "9"}), ("Hrs", {"CNY": "0.1"})))[1] == (Decimal("0.1"), "CNY")
    assert _ec2_prices._price(entry(("Hrs", {"USD": "0.0000000000"})))[1] is None, "a reserved host's"
    assert _ec2_prices._price({"product": {"attributes": {"instanceType": "x"}}, "terms": {}})[1] is None


async def test_elsewhere_the_quota_is_a_number_of_instances(account: Ec2Harness, open_cloud: Open) -> None:
    cloud = open_cloud(services_endpoint="")
    await cloud.create(request("i-one"))
    await account.make_foreign()

    (room,) = await cloud.quota()
    assert (room.name, room.used) == ("instances", 2)
    assert room.limit > 2


# -- examination ----------------------------------------------------------------------------------------------------

Spoil = Callable[[Ec2Harness], Awaitable[object]]


def answers(action: str, error: AmazonError) -> Spoil:
    async def spoil(account: Ec2Harness) -> None:
        account.proxy.answers[action].append(error)

    return spoil


async def fill(account: Ec2Harness) -> None:
    for _ in range(account.quota):
        await account.make_foreign()


async def nothing(_account: Ec2Harness) -> None: ...


ARM = (
    "<DescribeInstanceTypesResponse><requestId>1</requestId><instanceTypeSet><item><instanceType>t4g.small</instanceType>"
    "<processorInfo><supportedArchitectures><item>arm64</item></supportedArchitectures></processorInfo></item>"
    "</instanceTypeSet></DescribeInstanceTypesResponse>"
)
IMAGE = (
    "<DescribeImagesResponse><requestId>1</requestId><imagesSet><item><imageId>ami-1</imageId><imageState>{}</imageState>"
    "<architecture>x86_64</architecture><rootDeviceName>/dev/xvda</rootDeviceName></item></imagesSet>"
    "</DescribeImagesResponse>"
)


async def arm(account: Ec2Harness) -> None:
    account.proxy.answers["DescribeInstanceTypes"].append(ARM)
    account.proxy.answers["DescribeImages"].append(IMAGE.format("available"))


async def unfinished(account: Ec2Harness) -> None:
    account.proxy.answers["DescribeImages"].append(IMAGE.format("pending"))


async def nameless(account: Ec2Harness) -> None:
    account.proxy.answers["DescribeVpcAttribute"].append(
        "<DescribeVpcAttributeResponse><requestId>1</requestId><vpcId>vpc-1</vpcId><enableDnsHostnames>"
        "<value>false</value></enableDnsHostnames></DescribeVpcAttributeResponse>"
    )


DENIED = AmazonError(403, "UnauthorizedOperation", ec2_errors.NOT_ALLOWED)


@pytest.mark.parametrize(
    ("words", "spoil", "name", "detail"),
    [
        ({}, answers("DescribeAvailabilityZones", WRONG_KEY), "the credentials", "not able to validate"),
        ({}, answers("DescribeAvailabilityZones", DENIED), "the permissions", "not authorized"),
        ({"zone": "us-east-1x"}, nothing, "the zone", "us-east-1a"),
        ({"image": "ami-0123456789abcdef0"}, nothing, "the image", "ami-0123456789abcdef0"),
        ({"image": "ami-1"}, unfinished, "the image", "pending"),
        ({"size": "t2.vast"}, nothing, "the size", "no instance type 't2.vast'"),
        ({"size": "t4g.small", "image": "ami-1"}, arm, "the size", "t4g.small is arm64, the image is x86_64"),
        ({"subnets": ["subnet-0123456789abcdef0"]}, nothing, "the subnets", "subnet-0123456789abcdef0"),
        ({"key_pair": "lost"}, nothing, "the key pair", "lost"),
        ({"address": "public", "inner_networks": []}, nothing, "the network", "nobody is let in"),
        ({"address": "public", "inner_networks": ["198.51.100.7/32"]}, nothing, "the network", "only 198.51.100.7/32"),
        ({"address": "name"}, nameless, "the network", "'DNS hostnames' are off"),
        ({}, answers("RunInstances", DENIED), "permission to make instances", "not authorized"),
        ({}, answers("CreateVolume", DENIED), "permission to make volumes", "not authorized"),
        ({}, answers("CreateSecurityGroup", DENIED), "permission to make security groups", "not authorized"),
        ({}, fill, "the quota", "4 of 4"),
    ],
)
async def test_an_examination_says_exactly_what_is_wrong(
    account: Ec2Harness, open_cloud: Open, words: dict[str, Any], spoil: Spoil, name: str, detail: str
) -> None:
    await spoil(account)
    findings = await open_cloud(**words).examine()

    finding, *others = [finding for finding in findings if not finding.ok]
    assert finding.name == name
    assert [other.name for other in others] == (["the subnets"] if name == "the zone" else [])
    assert detail in finding.detail
    assert finding.hint
    assert await account.leftovers() == []
    assert await account.groups() == {}


async def test_an_examination_sees_that_instances_are_not_let_in_by_each_other(
    open_cloud: Open,
) -> None:
    cloud = open_cloud(address="public")
    assert all(finding.ok for finding in await cloud.examine())
    vm = await cloud.create(request("i-one"))
    (finding,) = [finding for finding in await cloud.examine() if not finding.ok]

    assert finding.name == "the network"
    assert f"{vm.address} is not in 'inner_networks'" in finding.detail
    assert "'address' to 'name'" in finding.hint


async def test_an_examination_takes_nothing_from_an_earlier_one(
    account: Ec2Harness, cloud: _ec2_driver.Ec2Cloud
) -> None:
    assert all(finding.ok for finding in await cloud.examine())
    await account.proxy.ask("DeregisterImage", ImageId=account.words["image"])

    assert "the image" in {finding.name for finding in await cloud.examine() if not finding.ok}


@pytest.mark.parametrize("spoiled", [False, True])
async def test_names_will_do_where_they_are_given_or_nobody_knows(
    account: Ec2Harness, open_cloud: Open, *, spoiled: bool
) -> None:
    if spoiled:
        account.proxy.answers["DescribeVpcAttribute"].append(DENIED)
    findings = await open_cloud(address="name", inner_networks=[]).examine()

    assert all(finding.ok for finding in findings)
    (detail,) = [finding.detail for finding in findings if finding.name == "the network"]
    assert ("unknown" in detail) == spoiled


async def test_not_to_know_the_quota_is_no_hindrance(account: Ec2Harness, open_cloud: Open) -> None:
    account.proxy.answers["GetServiceQuota"].append(AmazonError(400, "AccessDeniedException", "not authorized"))
    findings = await open_cloud().examine()

    assert all(finding.ok for finding in findings)
    assert "unknown" in findings[-1].detail


# -- the boot, played -----------------------------------------------------------------------------------------------


async def test_a_test_can_play_the_boot_of_an_instance_on_this_computer(
    account: Ec2Harness, open_cloud: Open, new_address: Callable[[], str]
) -> None:
    network = f"{new_address().rpartition('.')[0]}.0/24"
    await account.use_loopback(network)
    booted: asyncio.Queue[Booting] = asyncio.Queue()
    ended: asyncio.Queue[str] = asyncio.Queue()
    account.on_boot, account.on_end = booted.put, ended.put
    cloud = open_cloud()
    vm = await cloud.create(request("i-one"))

    async with asyncio.timeout(40):
        booting = await booted.get()
        assert (booting.id, booting.address) == (vm.id, (await cloud.describe(vm.id)).address)
        assert booting.address.startswith(network.removesuffix("0/24"))
        assert json.loads(booting.user_data)["instance"] == "i-one"
        await cloud.delete(vm.id)
        assert await ended.get() == vm.id
