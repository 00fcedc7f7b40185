"""The driver of libcloud's clouds: its threads, its words, and what each provider is told."""

import asyncio
import base64
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from libcloud.common.exceptions import BaseHTTPError, exception_from_message
from libcloud.common.types import InvalidCredsError, LibcloudError, MalformedResponseError
from libcloud.compute.base import NodeSize

from conpaas.cloud import _libcloud_threads as threads
from conpaas.cloud import libcloud
from conpaas.cloud._libcloud_cloud import LibcloudCloud
from conpaas.cloud._libcloud_errors import GarbageError, OverdueError, readable, translate
from conpaas.cloud._libcloud_named import DIALECTS, Named
from conpaas.cloud._libcloud_ports import needed
from conpaas.cloud._libcloud_provider import name_prefix
from conpaas.cloud._libcloud_volumes import LibcloudDisks, OpenStackCloud
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CanExamine, Cloud, CloudContext, HasConsole, HasQuota, HasVolumes, Vm, VmState
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
from conpaas.director import catalogue
from tests.contract import test_cloud_volumes as volumes_contract
from tests.contract import test_clouds as contract
from tests.contract._clouds import ERRORS, Trouble, eventually, make, nothing_left, running
from tests.fakes import _libcloud_ec2 as ec2
from tests.fakes import cloud_libcloud as openstack
from tests.fakes import openstack_server as server
from tests.fakes.clouds import Fault, request, volume_request
from tests.fakes.waiting import until

T = TypeVar("T")

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[openstack.OpenStackHarness]:
    async with openstack.harness(tmp_path) as account:
        yield account


@pytest.fixture
async def cloud(stack: openstack.OpenStackHarness) -> AsyncIterator[OpenStackCloud]:
    opened = stack.open()
    assert isinstance(opened, OpenStackCloud)
    yield opened
    await opened.close()


@pytest.fixture
async def amazon(tmp_path: Path) -> AsyncIterator[ec2.Ec2Harness]:
    async with ec2.harness(tmp_path) as account:
        yield account


def open_cloud(directory: Path, **settings: Any) -> Cloud:
    context = CloudContext(name="c", deployment="dep", directory=directory, clock=SYSTEM_CLOCK, deadline_s=30.0)
    return libcloud.CLOUD.open(libcloud.LibcloudSettings(**settings), context)


# -- settings -------------------------------------------------------------------------------------------------------


def test_the_settings_load_without_the_library() -> None:
    code = "import sys, conpaas.cloud.libcloud; print('libcloud' in sys.modules, 'requests' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False"]


def test_a_provider_has_the_abilities_that_we_know_how_to_use(tmp_path: Path) -> None:
    stack = open_cloud(tmp_path, provider="openstack", url=NOWHERE, image="i")
    amazon = open_cloud(tmp_path, provider="ec2", image="i")
    ocean = open_cloud(tmp_path, provider="digitalocean", image="i")

    assert [isinstance(cloud, HasVolumes) for cloud in (stack, amazon, ocean)] == [True, True, False]
    assert [isinstance(cloud, HasConsole) for cloud in (stack, amazon, ocean)] == [True, True, False]
    assert [isinstance(cloud, HasQuota) for cloud in (stack, amazon, ocean)] == [True, False, False]
    assert all(isinstance(cloud, CanExamine) for cloud in (stack, amazon, ocean))


@pytest.mark.parametrize(
    ("provider", "words"), [("gandi", "passes no user data"), ("cumulonimbus", "knows no provider 'cumulonimbus'")]
)
def test_a_provider_that_cannot_be_used_is_refused_with_those_that_can(
    tmp_path: Path, provider: str, words: str
) -> None:
    with pytest.raises(CloudRefusedError, match=words) as caught:
        open_cloud(tmp_path, provider=provider, image="x")

    assert "digitalocean" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"provider": "openstack", "image": "x"}, "no url"),
        ({"provider": "ec2", "image": "x", "networks": ("a", "b")}, "one subnet only"),
        ({"provider": "digitalocean", "image": "x"}, "no zone"),
        ({"provider": "brightbox", "image": "x", "key_name": "ops", "networks": ("n",)}, "takes no key_name, networks"),
        ({"provider": "ec2", "image": "x", "region": "atlantis"}, "Invalid region: atlantis"),
        ({"provider": "linode", "image": "x", "zone": "nl", "options": {"api_version": "9"}}, "No Linode driver found"),
    ],
)
async def test_settings_that_cannot_work_are_refused_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    cloud = open_cloud(tmp_path, key="k", secret="s", **settings)
    with pytest.raises(CloudRefusedError, match=words):
        await cloud.create(request("i-one"))

    assert isinstance(cloud, CanExamine)
    (finding,) = await cloud.examine()
    assert not finding.ok
    assert words in finding.detail
    await cloud.close()


# -- what the provider is told --------------------------------------------------------------------------------------


async def test_an_openstack_is_told_all_that_the_settings_and_the_request_say(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud
) -> None:
    wanted = replace(request("i-one"), size="m1.small", zone="rack-2")
    vm = await cloud.create(wanted)

    body = stack.openstack.servers[vm.id].body
    assert base64.b64decode(body["user_data"]).decode() == wanted.context("")
    assert body["metadata"] == {
        "conpaas-deployment": "dep-ours",
        "conpaas-token": "i-one",
        "conpaas-service": "svc-test",
        "conpaas-kind": "agent",
    }
    assert (body["name"], body["imageRef"], body["flavorRef"]) == ("test i-one", server.IMAGE, "2")
    assert (body["availability_zone"], body["key_name"]) == ("rack-2", "ops")
    assert body["networks"] == [{"uuid": server.NETWORK}]
    assert body["security_groups"] == [{"name": "conpaas"}]


class Asked(Exception):  # noqa: N818 - what a driver object would have sent
    def __init__(self, action: str, data: str, params: dict[str, Any]) -> None:
        super().__init__(action)
        self.said = f"{data} {params}"


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_every_other_provider_is_given_the_context_and_a_name_that_tells_the_token(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialect = DIALECTS[name]
    settings = libcloud.LibcloudSettings(
        provider=name,
        url="https://cloud.example/client/api" if name == "cloudstack" else "",
        key="k" if name in {"brightbox", "cloudstack"} else "",
        secret="s",
        image="image-7",
        zone="ams3" if dialect.needs_zone else "",
        key_name="ops" if dialect.key else "",
        networks=("net-1",) if dialect.networks else (),
        security_groups=("open",) if dialect.security_groups else (),
    )
    provider = Named(dialect, settings, "dep")
    assert provider.problem() == ""
    driver = provider.open()

    def ask(action: str, params: Any = None, data: Any = None, **_: Any) -> None:
        raise Asked(action, str(data), params or {})

    monkeypatch.setattr(driver.connection, "request", ask)
    size = NodeSize("s-1", "s-1", 1024, 25, 0, 0.01, driver, extra={"locations": []})
    with pytest.raises(Asked) as caught:
        provider.create(driver, request("i-one"), size, settings.zone)

    said = caught.value.said
    context = request("i-one").context("")
    encoded = base64.b64encode(context.encode()).decode()
    assert encoded in said or context.replace('"', '\\"') in said
    for word in (provider.prefix + "i-one", "s-1", "image-7", settings.zone, settings.key_name):
        assert word in said
    for word in (*settings.networks, *settings.security_groups):
        assert word in said


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_nothing_about_a_provider_rests_on_more_than_libcloud_takes(name: str) -> None:
    dialect = DIALECTS[name]
    settings = libcloud.LibcloudSettings(
        provider=name, url="https://h.example/api" if name == "cloudstack" else "", key="", secret="s", image="i"
    )
    driver = Named(dialect, settings, "dep").open()
    words = {**dialect.userdata("x"), **dialect.more()}
    for makes in (dialect.key, dialect.networks, dialect.security_groups):
        words |= makes("x") if makes else {}

    assert set(words) <= set(inspect.signature(driver.create_node).parameters)


@pytest.mark.parametrize(
    ("name", "changes", "reads", "made"),
    [
        ("linode", [], 3, None),
        ("linode", ["{}"], 0, ""),
        ("cloudstack", [], 0, None),
        ("cloudstack", [], 1, ""),  # it asks for everything by GET
    ],
)
def test_a_create_that_failed_on_its_way_may_have_made_something(
    name: str, changes: list[str], reads: int, made: str | None
) -> None:
    call = threads.Call()
    call.changes, call.reads = changes, reads
    provider = Named(DIALECTS[name], libcloud.LibcloudSettings(provider=name, image="i"), "dep")

    assert provider.made(call) == made


# -- names that are marks -------------------------------------------------------------------------------------------

IDS = st.from_regex(r"[a-z][a-z0-9-]{0,19}", fullmatch=True)


@settings(max_examples=50)
@given(ours=IDS, theirs=IDS, token=IDS)
def test_a_name_tells_its_token_to_its_own_deployment_only(ours: str, theirs: str, token: str) -> None:
    name = name_prefix(ours) + token
    settings = libcloud.LibcloudSettings(image="i")

    def found(deployment: str) -> str:
        return Named(DIALECTS["vultr"], settings, deployment).token_in(name)

    assert found(ours) == token
    assert found(theirs) == (token if ours == theirs else "")


# -- errors ---------------------------------------------------------------------------------------------------------


def http(code: int, words: str, **headers: str) -> Exception:
    error: Exception = exception_from_message(code, words, headers)  # type: ignore[no-untyped-call]
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (http(400, "InstanceLimitExceeded: You have requested more instances than your limit"), QuotaExceededError),
        (http(403, "Quota exceeded for instances: Requested 1, but already used 10 of 10"), QuotaExceededError),
        (http(413, "VolumeLimitExceeded: Maximum number of volumes allowed (10) exceeded"), QuotaExceededError),
        (http(422, "creating this/these droplet(s) will exceed your droplet limit"), QuotaExceededError),
        (http(413, "Over limit", **{"retry-after": "7"}), ThrottledError),
        (http(429, "slow down", **{"retry-after": "7"}), ThrottledError),
        (http(503, "RequestLimitExceeded: Request limit exceeded."), ThrottledError),
        (http(503, "try later", **{"retry-after": "7"}), ThrottledError),
        (http(500, "InsufficientInstanceCapacity: We currently do not have sufficient capacity"), NoCapacityError),
        (http(401, "The request you have made requires authentication."), CloudCredentialsError),
        (http(403, "UnauthorizedOperation: You are not authorized"), CloudCredentialsError),
        (http(403, "Policy doesn't allow os_compute_api:servers:create to be performed."), CloudCredentialsError),
        (InvalidCredsError("no"), CloudCredentialsError),
        (http(400, "InvalidAMIID.NotFound: The image id '[ami-1]' does not exist"), UnknownImageError),
        (http(400, "Can not find requested image"), UnknownImageError),
        (http(400, "Image 7 is not active."), UnknownImageError),
        (http(400, "Invalid flavorRef provided."), CloudRefusedError),
        (http(404, "Network 7 could not be found"), CloudRefusedError),
        (http(409, "Cannot 'attach_volume' while it is in task_state spawning"), CloudBusyError),
        (http(500, "Unexpected API Error. Please report this"), PeerError),
        (http(502, "Bad Gateway"), PeerError),
        (http(504, "Quota service: gateway timeout"), PeerError),
        (MalformedResponseError("Failed to parse JSON", body="<html>"), PeerError),
        (GarbageError("a web page: It works!"), PeerError),
        (KeyError("server"), PeerError),
        (TypeError("string indices must be integers"), PeerError),
        (LibcloudError("Could not find specified endpoint"), CloudRefusedError),
        (NotImplementedError("list_volumes not implemented for this driver"), CloudRefusedError),
        (OverdueError(), DeadlineError),
        (requests.ReadTimeout("Read timed out."), DeadlineError),
        (requests.ConnectionError("Connection aborted."), PeerError),
        (ConnectionRefusedError(111, "Connection refused"), PeerError),
    ],
)
def test_what_the_provider_says_decides_what_is_done_about_it(error: Exception, kind: type[ConpaasError]) -> None:
    words = str(error) if isinstance(error, BaseHTTPError) else ""
    translated = translate(error, cloud="c", words=words)

    assert type(translated) is kind
    assert translated.message.startswith("cloud c: ")
    assert readable(words) in translated.message
    assert "<LibcloudError" not in translated.message
    if isinstance(translated, ThrottledError) and "retry-after" in (getattr(error, "headers", None) or {}):
        assert translated.retry_after_s == 7


BODIES = st.one_of(
    st.text(max_size=300),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["message", "error", "x"]), inner),
        max_leaves=8,
    ).map(lambda value: str(value).replace("'", '"')),
)


@settings(max_examples=50)
@given(body=BODIES, code=st.integers(400, 599), words=BODIES)
def test_any_answer_becomes_an_error_that_people_can_read(body: str, code: int, words: str) -> None:
    translated = translate(http(code, body), cloud="c", words=words)

    assert isinstance(translated, ConpaasError)
    assert len(translated.message) < 500
    assert "\n" not in translated.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"forbidden": {"code": 403, "message": "Quota exceeded"}}', "Quota exceeded"),
        ('{"id": "unauthorized", "message": "Unable to authenticate you"}', "Unable to authenticate you"),
        ('{"errors": [{"reason": "Invalid Token"}]}', "Invalid Token"),
        (
            "<Response><Errors><Error><Code>AuthFailure</Code><Message>No.</Message></Error></Errors></Response>",
            "AuthFailure: No.",
        ),
        ("<html><title>504</title> <h1>Gateway\n Time-out</h1></html>", "504 Gateway Time-out"),
        ("", ""),
    ],
)
def test_the_words_are_taken_from_where_providers_put_them(body: str, words: str) -> None:
    assert readable(body) == words


async def test_a_provider_that_nobody_is_at_home_at_is_named_without_what_was_sent(tmp_path: Path) -> None:
    for words in ({"provider": "openstack", "project": "p"}, {"provider": "ec2", "size": "t3.nano"}):
        cloud = open_cloud(tmp_path, url=NOWHERE, key="k", secret="top-secret", image="i", **words)
        with pytest.raises(PeerError, match="refused") as caught:
            await cloud.create(request("i-one"))
        await cloud.close()

        told = caught.value.message
        assert "top-secret" not in told
        assert "http" not in told


async def test_what_amazon_is_sent_is_not_in_the_error_of_a_connection_that_breaks(amazon: ec2.Ec2Harness) -> None:
    cloud = amazon.open()
    await amazon.fail("create", Fault.UNREACHABLE)
    with pytest.raises(PeerError) as caught:
        await cloud.create(request("i-one"))
    await cloud.close()

    error: BaseException | None = caught.value
    told = caught.value.message
    while error is not None and not error.__suppress_context__:
        error = error.__cause__ or error.__context__
        told += str(error or "")
    assert "UserData" not in told
    assert ec2.SECRET not in told


# -- trying an account ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wrong", "words"),
    [
        ({"secret": "guessed"}, "the credentials", "requires authentication"),
        ({"project": "another"}, "the credentials", "requires authentication"),
        ({"url": NOWHERE}, "the provider's address", "refused"),
        ({"region": "RegionNine"}, "the login", "Could not find specified endpoint"),
        ({"size": "m1.gigantic"}, "the size", "m1.gigantic"),
        ({"zone": "cellar"}, "the zone", "cellar"),
        ({"image": "i-forgot"}, "the image", "i-forgot"),
        ({"image": server.BROKEN_IMAGE}, "the image", server.BROKEN_IMAGE),
        ({"networks": ("net-7",)}, "networks, security groups and key", "no network net-7"),
        ({"security_groups": ("wall",)}, "networks, security groups and key", "no security group wall"),
        ({"key_name": "skeleton"}, "networks, security groups and key", "no key skeleton"),
        ({"security_groups": ()}, "the ports", "no rule lets in 5555, 8080"),
    ],
)
async def test_an_account_that_is_tried_tells_what_exactly_is_wrong(
    tmp_path: Path, settings: dict[str, Any], wrong: str, words: str
) -> None:
    async with openstack.harness(tmp_path, **settings) as account:
        cloud = account.open()
        assert isinstance(cloud, CanExamine)
        findings = await cloud.examine()
        await cloud.close()

    (finding,) = [finding for finding in findings if not finding.ok]
    assert finding.name == wrong
    assert words in finding.detail
    assert finding.hint
    assert server.PASSWORD not in str(findings)


@pytest.mark.parametrize(
    ("let_in", "shut"),
    [
        ([(1, 65535)], ""),
        ([(5000, 6000), (8080, 8080)], ""),
        ([(8080, 8080)], "no rule lets in 5555"),
        ([], "no rule lets in 5555, 8080"),
    ],
)
async def test_the_ports_of_all_service_types_must_be_let_in(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud, let_in: list[tuple[int, int]], shut: str
) -> None:
    stack.openstack.let_in = let_in
    (finding,) = [finding for finding in await cloud.examine() if finding.name == "the ports"]

    assert finding.ok == (not shut)
    assert shut in finding.detail
    wanted = finding.hint if shut else finding.detail
    for kind in catalogue.kinds().values():
        for port in (*kind.ports, *kind.inner_ports):
            assert str(port) in wanted


def test_the_documentation_names_all_ports() -> None:
    documented = (Path(__file__).parents[2] / "docs/clouds/libcloud.md").read_text()
    section = documented.partition("### Ports")[2].partition("## ")[0]
    ports = needed()

    assert ports.outer
    assert ports.inner
    for port in (*ports.outer, *ports.inner):
        assert re.search(rf"^\| .*\b{port}\b.* \|.*\|.*\|$", section, re.MULTILINE)


async def test_a_network_that_filters_nothing_needs_no_rules(tmp_path: Path) -> None:
    async with openstack.harness(tmp_path, networks=(server.OPEN_NETWORK,), security_groups=()) as account:
        cloud = account.open()
        assert isinstance(cloud, CanExamine)
        assert all(finding.ok for finding in await cloud.examine())
        await cloud.close()


async def test_where_nobody_can_tell_the_ports_are_named(tmp_path: Path) -> None:
    async with openstack.harness(tmp_path, security_groups=()) as account:
        account.openstack.no_groups = True
        cloud = account.open()
        assert isinstance(cloud, CanExamine)
        finding = (await cloud.examine())[-1]
        await cloud.close()

    assert (finding.name, finding.ok) == ("the ports", True)
    assert "none is opened for you: let in TCP 5555, 8080" in finding.detail


# -- instances of an OpenStack --------------------------------------------------------------------------------------


async def test_a_token_that_the_provider_has_forgotten_is_renewed_without_a_word(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud
) -> None:
    vm = await make(cloud)
    for _ in range(3):
        stack.openstack.tokens.clear()
        assert (await cloud.describe(vm.id)).state is VmState.RUNNING
        stack.openstack.tokens.clear()
        assert [volume.id for volume in await cloud.list_volumes()] == []


@pytest.mark.parametrize("at", ["GET /compute/v2.1/servers/detail", "POST /compute/v2.1/servers"])
async def test_a_token_that_is_forgotten_in_the_middle_of_a_create_costs_a_login_and_no_instance(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud, at: str
) -> None:
    forgetful = [at]

    def forget(said: str) -> None:
        if said in forgetful:
            forgetful.remove(said)
            stack.openstack.tokens.clear()

    stack.openstack.on_request = forget
    assert (await cloud.create(request("i-one"))).token == "i-one"
    assert forgetful == []
    assert len(stack.openstack.servers) == 1


async def test_an_instance_whose_follow_up_fails_was_made_all_the_same(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud
) -> None:
    for number, fault in enumerate((Fault.THROTTLED, Fault.GARBAGE, Fault.UNREACHABLE)):
        await stack.fail("describe", fault)  # libcloud asks for what it has just made
        vm = await cloud.create(request(f"i-{number}"))

        assert (vm.token, vm.state) == (f"i-{number}", VmState.PENDING)
        assert (await running(cloud, vm)).token == vm.token
    assert len(stack.openstack.servers) == 3


async def test_an_instance_that_found_no_host_is_failed_with_the_words_of_the_scheduler(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud
) -> None:
    vm = await cloud.create(request("i-one"))
    stack.openstack.servers[vm.id].status = "ERROR"
    stack.openstack.servers[vm.id].fault = "No valid host was found. There are not enough hosts available."

    seen = await cloud.describe(vm.id)
    assert (seen.state, seen.reason) == (VmState.FAILED, stack.openstack.servers[vm.id].fault)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("MIGRATING", VmState.RUNNING),
        ("REBOOT", VmState.RUNNING),
        ("PAUSED", VmState.FAILED),
        ("SHUTOFF", VmState.FAILED),
        ("SHELVED_OFFLOADED", VmState.FAILED),
        ("SOFT_DELETED", VmState.GONE),
        ("REBUILD", VmState.PENDING),
        ("UNKNOWN", VmState.PENDING),
    ],
)
async def test_a_state_that_an_operator_has_caused_is_told_apart(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud, status: str, state: VmState
) -> None:
    vm = await make(cloud)
    stack.openstack.servers[vm.id].status = status

    assert (await cloud.describe(vm.id)).state is state
    assert [seen.state for seen in await cloud.list()] == ([] if state is VmState.GONE else [state])


async def test_an_instance_that_is_being_deleted_is_gone_also_for_a_driver_that_did_not_ask(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud
) -> None:
    vm = await make(cloud)
    stack.openstack.servers[vm.id].task = "deleting"

    assert (await cloud.describe(vm.id)).state is VmState.GONE
    assert await cloud.list() == []
    await cloud.delete(vm.id)
    assert vm.id in stack.openstack.servers


@pytest.mark.parametrize(
    ("wanted", "address"), [("auto", "198.51.100.7"), ("public", "198.51.100.7"), ("private", "10.20.0.1")]
)
async def test_the_address_is_the_one_that_the_settings_want(tmp_path: Path, wanted: str, address: str) -> None:
    async with openstack.harness(tmp_path, address=wanted) as account:
        cloud = account.open()
        vm = await cloud.create(request("i-one"))
        account.openstack.servers[vm.id].floating = "198.51.100.7"
        account.openstack.servers[vm.id].number = 0

        assert (await running(cloud, vm)).address == address
        await cloud.close()


async def test_more_instances_than_fit_on_a_page_are_all_seen(stack: openstack.OpenStackHarness) -> None:
    stack.openstack.quota = 12
    cloud = stack.open()
    tokens = {f"i-{number}" for number in range(2 * server.PAGE + 1)}
    await asyncio.gather(*(cloud.create(request(token)) for token in tokens))

    assert {vm.token for vm in await cloud.list()} == tokens
    await cloud.close()


async def test_a_quota_leaves_out_what_is_not_limited(cloud: OpenStackCloud) -> None:
    rooms = {room.name: room.limit for room in await cloud.quota()}

    assert rooms == {"instances": 4, "memory": 51200 << 20}


# -- threads --------------------------------------------------------------------------------------------------------


def our_threads(name: str = "cloud-stack") -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(name)}


async def test_fifty_slow_calls_at_once_leave_the_loop_free(tmp_path: Path) -> None:
    async with openstack.harness(tmp_path, threads=64) as account:
        cloud = account.open()
        vm = await make(cloud)
        held = account.openstack.held = asyncio.Event()
        asked = [asyncio.ensure_future(cloud.describe(vm.id)) for _ in range(50)]
        await until(lambda: account.openstack.waiting == 50, timeout_s=30)  # none waits for another
        lags: list[float] = []
        loop = asyncio.get_running_loop()
        for _ in range(40):
            before = loop.time()
            await asyncio.sleep(0.005)
            lags.append(loop.time() - before - 0.005)
        held.set()
        seen = await asyncio.gather(*asked)
        await cloud.close()

    assert {found.state for found in seen} == {VmState.RUNNING}
    assert sorted(lags)[len(lags) // 2] < 0.1


async def test_calls_that_hang_take_no_more_threads_than_are_allowed_and_give_them_back(tmp_path: Path) -> None:
    async with openstack.harness(tmp_path, threads=4) as account:
        patient = account.open()
        vm = await make(patient)
        await patient.close()
        cloud, before = account.open(deadline_s=0.5), our_threads()
        await account.fail("describe", Fault.HANG, 100)
        answers = await asyncio.gather(*(cloud.describe(vm.id) for _ in range(40)), return_exceptions=True)

        assert len(our_threads() - before) == 4
        kinds = {type(answer) for answer in answers}
        assert kinds == {DeadlineError, CloudBusyError}
        busy = next(str(answer) for answer in answers if isinstance(answer, CloudBusyError))
        assert busy == "cloud stack: all 4 threads are busy"
        account.openstack.faults["describe"].clear()
        await eventually(lambda: quiet(cloud.describe(vm.id)), lambda seen: seen, "there are free threads again")
        await cloud.close()
        await eventually(lambda: ready(our_threads()), lambda found: not found - before, "its threads have ended")


async def quiet(call: Awaitable[Vm]) -> Vm | None:
    try:
        return await call
    except ConpaasError:
        return None


async def ready(value: T) -> T:
    return value


async def test_a_call_that_nobody_waits_for_sends_no_further_request(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud
) -> None:
    await make(cloud, "i-warm")
    held = stack.openstack.held = asyncio.Event()
    creating = asyncio.create_task(cloud.create(request("i-one")))
    await until(lambda: stack.openstack.waiting)
    creating.cancel()
    await asyncio.wait([creating])
    held.set()
    await cloud.close()

    assert stack.openstack.requests[-1] == "GET /compute/v2.1/servers/detail", "it has looked for the token only"


async def test_calls_with_one_token_follow_each_other_also_after_a_cancel(
    stack: openstack.OpenStackHarness, cloud: OpenStackCloud
) -> None:
    await make(cloud, "i-warm")
    stack.openstack.delay_s = 0.05
    other = stack.open()
    for _ in range(3):
        creating = [asyncio.create_task(driver.create(request("i-one"))) for driver in (cloud, other)]
        await asyncio.wait(creating, timeout=0.12)
        for task in creating:
            task.cancel()
    made = await asyncio.gather(cloud.create(request("i-one")), other.create(request("i-one")))
    await other.close()

    assert len({vm.id for vm in made}) == 1
    assert len(stack.openstack.servers) == 2


async def test_two_accounts_at_once_do_not_mind_each_other(tmp_path: Path) -> None:
    async with openstack.harness(tmp_path / "one") as one, openstack.harness(tmp_path / "two") as two:
        clouds = [one.open(), two.open()]
        made = await asyncio.gather(*(cloud.create(request("i-one")) for cloud in clouds for _ in range(2)))

        assert [len(account.openstack.servers) for account in (one, two)] == [1, 1]
        assert len({vm.id for vm in made}) == 2
        for cloud in clouds:
            await cloud.close()


async def test_a_driver_object_that_broke_is_not_used_again(tmp_path: Path) -> None:
    class Driver:
        made = 0

        def __init__(self) -> None:
            Driver.made += 1
            self.number = Driver.made

    pool = threads.Threads(Driver, name="c", count=1, deadline_s=5, renews=False, ca_file="")

    def fail(error: Exception) -> Callable[[Any, Any], int]:
        def act(_driver: Any, _call: Any) -> int:
            raise error

        return act

    for error, following in ((http(404, "no"), 1), (CloudBusyError("later"), 1), (KeyError("server"), 2)):
        with pytest.raises(ConpaasError):
            await pool.run(fail(error))
        assert await pool.run(lambda driver, _call: int(driver.number)) == following
    await pool.close()


# -- Amazon ---------------------------------------------------------------------------------------------------------

CHECKS = [
    contract.test_an_instance_comes_up_with_an_address_and_its_token,
    contract.test_instances_have_different_addresses,
    contract.test_the_same_token_gives_the_same_instance,
    contract.test_the_same_token_gives_the_same_instance_when_asked_for_at_once,
    contract.test_instances_can_be_made_at_once,
    contract.test_an_instance_outlives_the_driver_that_made_it,
    contract.test_a_cancelled_create_leaves_nothing_that_cannot_be_found,
    contract.test_a_deleted_instance_is_gone_and_leaves_nothing,
    contract.test_deleting_twice_or_at_once_is_fine,
    contract.test_an_unknown_instance_is_gone_and_can_be_deleted,
    contract.test_an_instance_can_be_deleted_while_it_is_made,
    contract.test_a_dead_instance_is_failed_with_a_reason_until_it_is_deleted,
    contract.test_beyond_the_quota_there_is_an_error_and_no_instance,
    contract.test_what_was_given_back_makes_room,
    contract.test_instances_of_others_are_neither_seen_nor_touched,
    contract.test_what_one_driver_makes_another_one_deletes,
    contract.test_sizes_are_sorted_by_price_and_one_is_the_default,
    contract.test_an_instance_has_the_size_that_was_asked_for,
    contract.test_an_instance_is_in_the_zone_that_was_asked_for,
    contract.test_images_have_ids_and_are_sorted_by_name,
    contract.test_a_console_shows_its_end_and_only_of_our_instances,
    contract.test_a_good_account_is_found_good_and_nothing_is_made,
    volumes_contract.test_a_volume_comes_up_with_its_token_and_at_least_its_size,
    volumes_contract.test_the_same_token_gives_the_same_volume_also_when_asked_for_at_once,
    volumes_contract.test_an_attached_volume_is_found_in_its_instance_and_attaching_twice_is_fine,
    volumes_contract.test_an_attached_volume_goes_to_no_other_instance,
    volumes_contract.test_a_detached_volume_goes_to_another_instance_and_detaching_twice_is_fine,
    volumes_contract.test_an_instance_may_have_several_volumes,
    volumes_contract.test_a_volume_outlives_its_instance_and_goes_to_the_next_one,
    volumes_contract.test_an_attached_volume_is_not_deleted,
    volumes_contract.test_deleting_a_volume_twice_or_at_once_is_fine,
    volumes_contract.test_an_unknown_volume_is_gone_can_be_deleted_and_not_be_attached,
    volumes_contract.test_a_volume_is_not_attached_to_an_instance_that_is_not_ours,
    volumes_contract.test_volumes_of_others_are_neither_seen_nor_touched,
    volumes_contract.test_a_volume_is_in_the_zone_that_was_asked_for,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("test_"))
async def test_amazon_by_libcloud_keeps_the_promise(check: Callable[..., Any], amazon: ec2.Ec2Harness) -> None:
    cloud = amazon.open()
    things = {"account": amazon, "cloud": cloud, "disks": cloud, "foreign": ""}
    if "foreign" in inspect.signature(check).parameters:
        things["foreign"] = await amazon.make_foreign()
    await check(**{name: things[name] for name in inspect.signature(check).parameters})
    await cloud.close()


@pytest.mark.parametrize(
    ("verb", "fault"), [(verb, fault) for verb, faults in ec2.FAULTS.items() for fault in sorted(faults)]
)
async def test_amazon_on_a_bad_day_loses_and_doubles_nothing(verb: str, fault: Fault, amazon: ec2.Ec2Harness) -> None:
    cloud = amazon.open()
    assert isinstance(cloud, LibcloudDisks)
    vm = await make(cloud, "i-before")
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: cloud.create(request("i-one")),
        "create_volume": lambda: cloud.create_volume(volume_request("v-one")),
        "describe": lambda: cloud.describe(vm.id),
        "list": cloud.list,
        "delete": lambda: cloud.delete(vm.id),
    }
    await amazon.fail(verb, fault)
    with pytest.raises(ERRORS[fault]) as caught:
        await calls[verb]()
    if fault in ec2.RECORDED:
        assert ec2.RECORDED[fault][2] in str(caught.value)
    await calls[verb]()
    for vm in await cloud.list():
        await cloud.delete(vm.id)
    for volume in await cloud.list_volumes():
        await cloud.delete_volume(volume.id)

    assert Trouble("libcloud", verb, fault).effective == (fault in {Fault.LOST_ANSWER, Fault.LATE})
    await nothing_left(amazon)
    await cloud.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"security_groups": ("wall",)}, "wall"),
        ({"networks": ("subnet-0123456789abcdef0",)}, "subnet-0123456789abcdef0"),
    ],
)
async def test_amazon_says_what_else_is_not_there(amazon: ec2.Ec2Harness, settings: dict[str, Any], words: str) -> None:
    cloud = amazon.open(**settings)
    assert isinstance(cloud, CanExamine)
    (finding,) = [finding for finding in await cloud.examine() if not finding.ok]
    await cloud.close()

    assert finding.name == "networks, security groups and key"
    assert words in finding.detail


async def test_tokens_that_only_end_differently_are_told_apart_by_amazon(amazon: ec2.Ec2Harness) -> None:
    cloud = amazon.open("dep-" + "x" * 60)
    for token in ("i-one", "i-two"):
        await cloud.create(request(token))
    await cloud.close()

    assert len(set(amazon.client_tokens)) == 2
    assert max(map(len, amazon.client_tokens)) <= 64


async def test_amazons_sizes_have_prices_of_an_hour(amazon: ec2.Ec2Harness) -> None:
    cloud = amazon.open()
    assert isinstance(cloud, LibcloudCloud)
    sizes = {size.name: size for size in await cloud.sizes()}
    await cloud.close()

    assert sizes["t3.nano"].default
    assert sizes["t3.nano"].cores == 2
    assert sizes["t3.nano"].price is not None
    assert Decimal("0.004") < sizes["t3.nano"].price < Decimal("0.008")


def test_a_months_price_is_told_as_an_hours(tmp_path: Path) -> None:
    provider = Named(DIALECTS["vultr"], libcloud.LibcloudSettings(provider="vultr", image="i"), "dep")

    assert provider.price(SimpleNamespace(price=7.3)) == Decimal("0.01")
    assert provider.price(SimpleNamespace(price=0)) is None
