"""The OpenNebula driver: its oddities one by one, and that its fake answers as the recorded server did."""

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import xmlrpc.client
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conpaas.cloud import _opennebula_model as model
from conpaas.cloud import _opennebula_rpc as rpc
from conpaas.cloud._opennebula_quota import rooms
from conpaas.cloud.opennebula import CLOUD, OpenNebulaSettings
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CanExamine, Cloud, CloudContext, HasVolumes, Vm, VmState, Volume, VolumeState
from conpaas.core.errors import (
    BadInputError,
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
from tests.fakes import opennebula_records as records
from tests.fakes.cloud_opennebula import PASSWORD, PATIENT_S, OpenNebulaHarness, harness
from tests.fakes.clouds import Fault, request, volume_request
from tests.fakes.opennebula_server import (
    DONE,
    EPILOG,
    ERROR,
    HOTPLUG,
    PENDING,
    PROLOG,
    RUNNING,
    SHUTDOWN,
    UNKNOWN,
    FakeImage,
    FakeOpenNebula,
    FakeVm,
    User,
)

SIZES = (
    {"name": "large", "cpu": 2, "vcpu": 4, "memory_mib": 4096, "price": "0.20"},
    {"name": "small", "cpu": 0.5, "memory_mib": 512, "price": "0.05"},
)
FROM_IMAGE: dict[str, Any] = {"template": None, "image": 0, "networks": (0,), "sizes": SIZES, "size": "small"}


class Disks(HasVolumes, Cloud):
    """What the driver is with a datastore."""


@pytest.fixture
async def account(tmp_path: Path) -> AsyncIterator[OpenNebulaHarness]:
    async with harness(tmp_path) as account:
        account.user.quotas = []
        account.deadline_s = PATIENT_S
        yield account


@pytest.fixture
async def server(account: OpenNebulaHarness) -> FakeOpenNebula:
    return account.server


@pytest.fixture
async def cloud(account: OpenNebulaHarness) -> AsyncIterator[Disks]:
    opened = account.open()
    yield opened  # type: ignore[misc]
    await opened.close()


async def until(look: Callable[[], object], what: str) -> None:
    async def check() -> bool | None:
        return bool(look()) or None

    await wait_for(check, timeout_s=30, what=what, clock=SYSTEM_CLOCK, period_s=0.005)


async def seen(cloud: Cloud, vm: Vm, state: VmState) -> Vm:
    async def check() -> Vm | None:
        found = await cloud.describe(vm.id)
        return found if found.state is state else None

    return await wait_for(check, timeout_s=30, what=f"{vm.id} is {state}", clock=SYSTEM_CLOCK, period_s=0.005)


async def becomes(cloud: Disks, volume: Volume, state: VolumeState) -> Volume:
    async def check() -> Volume | None:
        found = await cloud.describe_volume(volume.id)
        return found if found.state is state else None

    return await wait_for(check, timeout_s=30, what=f"{volume.id} is {state}", clock=SYSTEM_CLOCK, period_s=0.005)


async def make(cloud: Cloud, token: str = "i-one") -> Vm:
    return await seen(cloud, await cloud.create(request(token)), VmState.RUNNING)


async def make_volume(cloud: Disks, token: str = "v-one") -> Volume:
    return await becomes(cloud, await cloud.create_volume(volume_request(token)), VolumeState.AVAILABLE)


# -- the fake and the records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", records.names())
def test_the_fake_writes_answers_as_they_were_recorded(name: str) -> None:
    recorded = records.response(name)
    try:
        done, *rest = records.answer(name)
        written = records.success(rest[0]) if done else records.failure(*rest[:3])
    except xmlrpc.client.Fault as exc:
        written = records.fault(exc.faultCode, exc.faultString)
    assert written == recorded


def test_the_fake_writes_documents_as_they_were_recorded() -> None:
    def plain(element: Any) -> dict[str, str | int]:
        return {part.tag: part.text or "" for part in element if not len(part)}

    def again(vm: Any) -> str:
        history = [plain(record) for record in vm.iterfind("HISTORY_RECORDS/HISTORY")]
        own, tags = records.attributes(vm.find("TEMPLATE")), records.attributes(vm.find("USER_TEMPLATE"))
        return records.vm(plain(vm), own, tags, history)

    vms = [name for name in records.names() if name.startswith("vm_info_")]
    assert len(vms) == 5
    for name in vms:
        assert again(records.document(name)) == records.value(name)
    (vm,) = records.document("vmpool_infoextended")
    assert records.pool("VM_POOL", [again(vm)]) == records.value("vmpool_infoextended")
    history = [plain(record) for record in vm.iterfind("HISTORY_RECORDS/HISTORY")]
    short = records.short_vm(plain(vm), records.attributes(vm.find("TEMPLATE")), history)
    assert records.pool("VM_POOL", [short]) == records.value("vmpool_info")
    (image,) = records.document("imagepool_info")
    written = records.image(plain(image), [1], records.attributes(image.find("TEMPLATE")))
    assert records.pool("IMAGE_POOL", [written]) == records.value("imagepool_info")
    user = records.document("user_info")
    assert records.user(plain(user), records.attributes(user.find("TEMPLATE")), []) == records.value("user_info")


def the_recorded_vm(server: FakeOpenNebula, number: int, state: tuple[int, int] = RUNNING) -> FakeVm:
    vm = FakeVm(number, server.users[0], "conpaas-a1-mgr", [], {}, state, deployed=True)
    server.vms[number] = vm
    return vm


def _use_image(server: FakeOpenNebula) -> None:
    server.images[2] = FakeImage(2, server.users[0], "vol1", 2, 100, persistent=True, template=[], state=8, vms=[1])


def _limit(server: FakeOpenNebula) -> None:
    joe = User(2, "joe1795411889", "pw", [("VM", {"VMS": 1})])
    server.users[1:] = [joe]
    server.vms[7] = FakeVm(7, joe, "q1", [], {})


def _lock(server: FakeOpenNebula) -> None:
    the_recorded_vm(server, 4).locked = True


REPLAYED: dict[str, Callable[[FakeOpenNebula], object]] = {
    "err_attach_wrong_state": lambda server: the_recorded_vm(server, 1, HOTPLUG),
    "err_bad_auth": lambda server: the_recorded_vm(server, 1),
    "err_detach_nodisk": lambda server: the_recorded_vm(server, 1),
    "err_image_delete_in_use": _use_image,
    "err_image_no_exists": lambda server: None,
    "err_locked": _lock,
    "err_missing_args": lambda server: None,
    "err_no_lease": lambda server: setattr(server, "leases", 0),
    "err_no_method": lambda server: None,
    "err_no_template": lambda server: None,
    "err_no_vm": lambda server: None,
    "err_quota": _limit,
    "err_restricted": lambda server: None,
    "err_terminate_done": lambda server: the_recorded_vm(server, 1, DONE),
    "err_type_fault": lambda server: None,
    "system_version": lambda server: None,
    "template_info": lambda server: None,
    "template_instantiate": lambda server: None,
    "vm_action_terminate": lambda server: the_recorded_vm(server, 1),
}


@pytest.mark.parametrize("name", REPLAYED)
async def test_the_fake_answers_recorded_calls_as_the_server_did(name: str, server: FakeOpenNebula) -> None:
    REPLAYED[name](server)
    body = (records.RECORDS / f"{name}.request.xml").read_bytes()
    async with aiohttp.ClientSession() as client, client.post(server.endpoint, data=body) as response:
        assert (await response.read()).decode() == records.response(name).decode()


async def test_the_driver_calls_with_parameters_of_the_recorded_kinds_and_order(
    account: OpenNebulaHarness, cloud: Disks
) -> None:
    vm, volume = await make(cloud), await make_volume(cloud)
    await cloud.attach(volume.id, vm.id)
    await becomes(cloud, volume, VolumeState.ATTACHED)
    assert isinstance(cloud, CanExamine)
    await cloud.examine()
    await cloud.delete(vm.id)
    plain = account.open(**FROM_IMAGE)
    assert isinstance(plain, CanExamine)
    await plain.examine()
    await plain.create(request("i-two"))
    await plain.close()

    recorded = [records.request(name) for name in records.names() if name not in {"err_type_fault", "err_missing_args"}]
    kinds = {method: [type(value) for value in values[1:]] for method, values in recorded}
    compared = set()
    for method, values in account.server.calls:
        if method in kinds:
            assert [type(value) for value in values] == kinds[method][: len(values)], method
            compared.add(method)
    assert compared >= {
        "one.vm.allocate",
        "one.template.instantiate",
        "one.template.info",
        "one.vm.info",
        "one.vm.action",
        "one.vm.attach",
        "one.image.allocate",
        "one.user.info",
        "one.vn.info",
        "one.vmpool.infoextended",
    }


# -- errors ---------------------------------------------------------------------------------------------------------

RECORDED_ERRORS: dict[str, type[ConpaasError]] = {
    "err_attach_wrong_state": CloudBusyError,
    "err_bad_action": CloudBusyError,
    "err_bad_auth": CloudCredentialsError,
    "err_bad_template_syntax": CloudRefusedError,
    "err_detach_nodisk": CloudBusyError,
    "err_image_delete_in_use": CloudBusyError,
    "err_image_no_exists": rpc.NoSuchError,
    "err_locked": CloudRefusedError,
    "err_missing_args": CloudRefusedError,
    "err_no_lease": NoCapacityError,
    "err_no_method": rpc.NoMethodError,
    "err_no_template": rpc.NoSuchError,
    "err_no_vm": rpc.NoSuchError,
    "err_quota": QuotaExceededError,
    "err_restricted": CloudRefusedError,
    "err_type_fault": CloudRefusedError,
    "err_wrong_state": CloudBusyError,
}


@pytest.mark.parametrize(("name", "kind"), RECORDED_ERRORS.items())
def test_each_recorded_error_is_one_of_the_contract_in_the_servers_words(name: str, kind: type[ConpaasError]) -> None:
    try:
        words = records.value(name)
    except xmlrpc.client.Fault as exc:
        words = exc.faultString

    with pytest.raises(kind) as caught:
        rpc.understood("one", records.request(name)[0], records.response(name), rpc._result)
    assert type(caught.value) is kind or issubclass(type(caught.value), CloudBusyError)
    assert words in caught.value.message
    assert not isinstance(caught.value, CloudCredentialsError) or name == "err_bad_auth"


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        # The words are those of OpenNebula's source, of what no record shows.
        (
            0x4000,
            "Error allocating a new virtual machine. Cannot get IP/MAC lease from virtual network 2.",
            NoCapacityError,
        ),
        (0x4000, "Error allocating a new image. NAME is already taken by IMAGE 7.", rpc.NameTakenError),
        (0x4000, "Error allocating a new virtual machine. Image with ID: 9 does not exist", UnknownImageError),
        (0x4000, "User 2 does not own an image with name: base . Set IMAGE_UNAME", UnknownImageError),
        (0x2000, "Cannot acquire image 3, it is in state: DISABLED", UnknownImageError),
        (0x0800, "Cannot acquire image 3, it is locked", rpc.WrongStateError),
        (0x0800, "Cannot acquire image 3, it is persistent and already in use", CloudRefusedError),
        (0x0800, "Not enough space in datastore", CloudRefusedError),
        (0x0200, "User [2] : Not authorized to perform USE TEMPLATE [0].", CloudCredentialsError),
        (0x0200, "User Template includes a restricted attribute CPU", CloudRefusedError),
        (0x0200, "User [2] : group [1] limit of 10 reached for CPU quota in VM.", QuotaExceededError),
        (0x0200, "User [2] : limit of 20 reached for SIZE quota in DATASTORE with ID: 101.", QuotaExceededError),
        (0x2000, "Cannot process request, oned cluster in election mode", CloudBusyError),
        (0x8000, "The resource VM is locked. [4].", CloudRefusedError),
        (0x10000, "Error replicating log entry 12.", PeerError),
        (0x2000, "something that nobody has heard of", CloudRefusedError),
    ],
)
def test_what_the_words_say_goes_before_the_code(code: int, text: str, kind: type[ConpaasError]) -> None:
    error = rpc.error_for("one", code, f"[one.x.y] {text}")

    assert type(error) is kind
    assert text in error.message
    assert error.value == code


@given(name=st.sampled_from(["vm_info_running", "vmpool_infoextended", "err_quota", "err_no_method"]), data=st.data())
def test_an_answer_that_is_broken_anywhere_is_an_error_of_the_contract(name: str, data: st.DataObject) -> None:
    whole = records.response(name)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 200)))
    broken = whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:]

    def use(value: Any) -> object:
        root = rpc._document(value)
        return [model.machine(vm) for vm in ([root] if root.tag == "VM" else root)]

    with contextlib.suppress(ConpaasError):
        rpc.understood("one", "one.vm.info", broken, use)


async def answering(account: OpenNebulaHarness, answer: Callable[[web.Request], Any]) -> tuple[Cloud, web.AppRunner]:
    """Return a driver whose server answers so."""
    app = web.Application()
    app.router.add_post("/RPC2", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return account.open(endpoint=f"http://127.0.0.1:{runner.addresses[0][1]}/RPC2"), runner


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (500, {}, PeerError),
        (302, {"Location": "http://elsewhere.invalid/"}, PeerError),
        (404, {}, PeerError),
        (429, {"Retry-After": "7"}, ThrottledError),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, ThrottledError),
    ],
)
async def test_a_proxy_before_the_server_may_say_more_than_it(
    account: OpenNebulaHarness, status: int, headers: dict[str, str], kind: type[ConpaasError]
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, headers=headers)

    cloud, runner = await answering(account, answer)
    with pytest.raises(kind, match=str(status)) as caught:
        await cloud.list()
    if isinstance(caught.value, ThrottledError):
        assert caught.value.retry_after_s == (7 if status == 429 else None)
    await cloud.close()
    await runner.cleanup()


async def test_an_answer_without_end_is_not_read_to_its_end(
    account: OpenNebulaHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_BYTES", 1 << 20)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"<value>" * 1000)

    cloud, runner = await answering(account, answer)
    with pytest.raises(PeerError, match="1048576 bytes"):
        await cloud.list()
    await cloud.close()
    await runner.cleanup()


async def test_nobody_who_listens_is_an_unreachable_peer(account: OpenNebulaHarness) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        cloud = account.open(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}/RPC2")
        for call in (cloud.list(), cloud.describe("1"), cloud.create(request("i-one")), cloud.delete("1")):
            with pytest.raises(PeerError, match=r"127\.0\.0\.1"):
                await call
        assert isinstance(cloud, CanExamine)
        (finding,) = await cloud.examine()
        assert (finding.name, finding.ok) == ("the endpoint", False)
        await cloud.close()


async def test_reads_are_repeated_once_when_the_connection_breaks_and_changes_never(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    vm = await make(cloud)
    server.faults["one.vm.info"].append(Fault.LOST_ANSWER)
    server.counts.clear()
    assert (await cloud.describe(vm.id)).state is VmState.RUNNING
    assert server.counts["one.vm.info"] == 2

    server.faults["one.vm.info"].extend([Fault.LOST_ANSWER] * 2)
    with pytest.raises(PeerError):
        await cloud.describe(vm.id)
    assert server.counts["one.vm.info"] == 4

    server.faults["one.template.instantiate"].append(Fault.LOST_ANSWER)
    server.counts.clear()
    with pytest.raises(PeerError):
        await cloud.create(request("i-two"))
    assert server.counts["one.template.instantiate"] == 1


def make_certificate(certificate: Path, key: Path) -> None:
    """Make a certificate of 127.0.0.1 that nobody vouches for."""
    own = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "one")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, own.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(own, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    certificate.write_bytes(made.public_bytes(pem))
    unencrypted = serialization.NoEncryption()
    key.write_bytes(own.private_bytes(pem, serialization.PrivateFormat.PKCS8, unencrypted))


async def test_the_server_is_checked_by_its_certificate(account: OpenNebulaHarness, tmp_path: Path) -> None:
    certificate, key = tmp_path / "one.pem", tmp_path / "one.key"
    make_certificate(certificate, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    runner = web.AppRunner(web.Application(), access_log=None)
    runner.app.router.add_post("/RPC2", account.server._serve)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    endpoint = f"https://127.0.0.1:{runner.addresses[0][1]}/RPC2"

    for words in ({"ca_file": certificate}, {"verify": False}):
        cloud = account.open(endpoint=endpoint, **words)
        assert await cloud.list() == []
        await cloud.close()
    cloud = account.open(endpoint=endpoint)
    with pytest.raises(PeerError, match="certificate") as caught:
        await cloud.list()
    assert "ca_file" in caught.value.hint
    await cloud.close()
    await runner.cleanup()
    with pytest.raises(CloudRefusedError, match=r"missing\.pem"):
        account.open(ca_file=tmp_path / "missing.pem")


# -- templates ------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.text("a\\\"]>[=,#\n$'", max_size=12)


@given(TEXTS, TEXTS)
def test_a_template_is_read_as_it_was_meant_or_not_written(first: str, second: str) -> None:
    template: model.Template = {"A": first, "V": [{"X": first, "Y": second}, {"X": second}], "N": 7}
    texts = (first, second)
    if any("]]>" in text or text.endswith("\\") or not all(map(good, text)) for text in texts):
        with pytest.raises(BadInputError):
            model.render(template)
        return
    read = records.parse(model.render(template))
    assert read == [("A", first), ("V", {"X": first, "Y": second}), ("V", {"X": second}), ("N", "7")]


def good(sign: str) -> bool:
    return sign in "\t\n" or (sign >= " " and sign not in "\ufffe\uffff")


@given(st.text(max_size=200))
def test_any_name_can_be_given_to_an_object(text: str) -> None:
    name = model.proper_name(text)

    assert 0 < len(name.encode()) <= 128
    assert not set(name) & set("&|:\\\";/'#{}$<>\n\0")


@given(st.integers(0, 12), st.integers(0, 80))
def test_every_state_means_something(state: int, lcm: int) -> None:
    assert model.state_of(state, lcm) in VmState


@pytest.mark.parametrize(
    ("state", "lcm", "means"),
    [
        (0, 0, VmState.PENDING),
        (1, 0, VmState.PENDING),
        (2, 0, VmState.PENDING),
        (10, 0, VmState.PENDING),
        (3, 0, VmState.PENDING),
        (3, 1, VmState.PENDING),
        (3, 2, VmState.PENDING),
        (3, 20, VmState.PENDING),
        (3, 3, VmState.RUNNING),
        (3, 16, VmState.RUNNING),
        (3, 17, VmState.RUNNING),
        (3, 25, VmState.RUNNING),
        (3, 62, VmState.RUNNING),
        (3, 66, VmState.RUNNING),
        (3, 69, VmState.RUNNING),
        *((3, lcm, VmState.FAILED) for lcm in (36, 37, 38, 39, 40, 41, 42, 44, 46, 47, 48, 49, 50, 61)),
        (3, 11, VmState.GONE),
        (3, 12, VmState.GONE),
        (3, 23, VmState.GONE),
        (6, 0, VmState.GONE),
        (4, 0, VmState.FAILED),
        (5, 0, VmState.FAILED),
        (8, 0, VmState.FAILED),
        (9, 0, VmState.FAILED),
        (11, 0, VmState.FAILED),
    ],
)
def test_states_of_the_server_and_what_they_mean(state: int, lcm: int, means: VmState) -> None:
    assert model.state_of(state, lcm) is means


def test_the_recorded_vms_are_understood() -> None:
    pending, running, done, failed, escaped = (
        model.machine(records.document(f"vm_info_{name}"))
        for name in ("pending", "running", "done", "boot_failure", "escaped")
    )

    assert (pending.vm.state, pending.vm.address, pending.vm.reason) == (VmState.PENDING, "127.20.0.10", "")
    assert (running.vm.state, running.vm.id, running.number) == (VmState.RUNNING, "1", 1)
    assert done.gone
    assert failed.vm.state is VmState.FAILED
    assert failed.vm.reason == "BOOT_FAILURE: Mon Nov 23 05:31:22 2026: DEPLOY: node1:t:dummy"
    assert escaped.vm.state is VmState.RUNNING
    assert {image: (disk.id, disk.target) for image, disk in running.disks.items()} == {0: (0, "vda")}


# -- instances ------------------------------------------------------------------------------------------------------


async def test_the_context_is_handed_on_unchanged_in_base64_and_nothing_else_is_in_it(
    account: OpenNebulaHarness, server: FakeOpenNebula
) -> None:
    cloud = account.open(ssh_key="ssh-ed25519 AAAAC3Nz me@home")
    document = json.dumps({"instance": "i-one", "words": 'a "b" $NAME $NIC[IP] \\ é ]]> \n'})
    vm = await cloud.create(replace(request("i-one"), context=lambda address: document + address))
    await cloud.close()

    context = server.vms[int(vm.id)].context
    assert base64.b64decode(context["CONPAAS_CONTEXT_BASE64"]).decode() == document
    own = {name for name in context if not name.startswith("ETH0_")} - {"DISK_ID", "TARGET"}
    assert own == {"NETWORK", "SSH_PUBLIC_KEY", "CONPAAS_CONTEXT_BASE64"}
    assert context["ETH0_IP"] == vm.address


async def test_the_address_is_known_while_the_instance_is_pending(server: FakeOpenNebula, cloud: Disks) -> None:
    server.schedule_s = 60
    vm = await cloud.create(request("i-one"))

    assert (vm.state, vm.address, vm.reason) == (VmState.PENDING, "127.20.0.10", "")


async def test_names_that_opennebula_does_not_allow_are_changed(server: FakeOpenNebula, cloud: Disks) -> None:
    vm = await cloud.create(replace(request("i-one"), name="blog/php: 'α' $1;" + "x" * 200))

    name = server.vms[int(vm.id)].name
    assert name.startswith("blog-php- -α- -1-xxx")
    assert len(name.encode()) == 128


@pytest.mark.parametrize("settings", [{}, FROM_IMAGE], ids=["template", "image"])
async def test_a_network_without_a_free_address_has_no_capacity(
    account: OpenNebulaHarness, server: FakeOpenNebula, settings: dict[str, Any]
) -> None:
    server.leases = 0
    cloud = account.open(**settings)
    with pytest.raises(NoCapacityError, match="Cannot get IP/MAC lease from virtual network 0"):
        await cloud.create(request("i-one"))
    await cloud.close()

    assert server.vms == {}


async def test_an_instance_that_finds_no_host_waits_in_the_schedulers_words(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    server.faults["one.template.instantiate"].append(Fault.NO_CAPACITY)
    vm = await cloud.create(request("i-one"))
    await until(lambda: server.vms[1].user_template.get("SCHED_MESSAGE"), "the scheduler has spoken")

    waiting = await cloud.describe(vm.id)
    assert (waiting.state, waiting.reason) == (VmState.PENDING, server.vms[1].waits_for)
    await cloud.delete(vm.id)
    assert server.vms[1].seen == [PENDING, DONE]


async def test_a_failed_deployment_is_a_failure_with_its_error_and_can_be_deleted(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    server.deploy_fails = 1
    vm = await seen(cloud, await cloud.create(request("i-one")), VmState.FAILED)

    assert vm.reason.startswith("BOOT_FAILURE: ")
    assert "DEPLOY" in vm.reason
    await cloud.delete(vm.id)
    assert await cloud.list() == []


async def test_an_error_that_is_long_over_is_not_told(server: FakeOpenNebula, cloud: Disks) -> None:
    vm = await make(cloud)
    server.vms[1].user_template["ERROR"] = "Mon Nov 23 05:31:22 2026: ATTACHDISK: of yesterday"
    assert (await cloud.describe(vm.id)).reason == ""

    await server.kill(1)
    assert (await cloud.describe(vm.id)).reason == "POWEROFF"


async def test_an_instance_whose_host_is_silent_is_not_given_up(server: FakeOpenNebula, cloud: Disks) -> None:
    vm = await make(cloud)
    await server.kill(1, UNKNOWN)

    lost = await cloud.describe(vm.id)
    assert (lost.state, lost.reason) == (VmState.RUNNING, "UNKNOWN")


async def test_a_cancel_that_fails_brings_the_instance_back_to_be_deleted_again(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    vm = await make(cloud)
    server.cancel_fails, server.end_s = 1, 0.01
    await cloud.delete(vm.id)

    await until(lambda: server.vms[1].seen[-2:] == [SHUTDOWN, RUNNING], "it is back")
    assert (await cloud.describe(vm.id)).reason == ""
    assert [found.id for found in await cloud.list()] == [vm.id]
    await cloud.delete(vm.id)
    await until(lambda: server.vms[1].state == DONE, "it is done")
    assert server.vms[1].seen[-3:] == [SHUTDOWN, EPILOG, DONE]


async def test_an_instance_on_its_way_out_is_gone_and_its_token_makes_another(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    vm = await make(cloud)
    server.end_s = 60
    await cloud.delete(vm.id)

    assert server.vms[1].state == SHUTDOWN
    assert (await cloud.describe(vm.id)).state is VmState.GONE
    assert await cloud.list() == []
    await cloud.delete(vm.id)
    assert (await cloud.create(request("i-one"))).id != vm.id


async def test_an_instance_that_is_being_deployed_is_busy_until_it_runs(server: FakeOpenNebula, cloud: Disks) -> None:
    server.prolog_s = 60
    vm = await cloud.create(request("i-one"))
    await until(lambda: server.vms[1].state == PROLOG, "it is in PROLOG")
    with pytest.raises(CloudBusyError, match="wrong state PROLOG"):
        await cloud.delete(vm.id)

    assert (await cloud.describe(vm.id)).state is VmState.PENDING
    server.vms[1].move(RUNNING)
    await cloud.delete(vm.id)
    assert server.vms[1].seen == [PENDING, PROLOG, RUNNING, DONE]


async def test_a_locked_instance_is_refused_in_the_servers_words(server: FakeOpenNebula, cloud: Disks) -> None:
    vm = await make(cloud)
    server.vms[1].locked = True
    with pytest.raises(CloudRefusedError, match="VM is locked") as caught:
        await cloud.delete(vm.id)

    assert "unlock" in caught.value.hint


async def test_vms_of_other_users_are_not_taken_for_gone(
    account: OpenNebulaHarness, server: FakeOpenNebula, cloud: Disks
) -> None:
    the_recorded_vm(server, 77)
    with pytest.raises(CloudCredentialsError, match="Not authorized"):
        await cloud.describe("77")

    assert await cloud.list() == []


async def test_a_request_that_waits_in_the_queue_of_the_server_is_not_doubled_when_it_is_repeated(
    account: OpenNebulaHarness, server: FakeOpenNebula, cloud: Disks
) -> None:
    server.held["one.template.instantiate"] = asyncio.Event()
    account.deadline_s = None
    hasty = account.open()
    with pytest.raises(DeadlineError):
        await hasty.create(request("i-one"))
    await hasty.close()
    again = asyncio.ensure_future(cloud.create(request("i-one")))
    await until(lambda: server.counts["one.template.instantiate"] == 2, "both are in the queue")
    server.held["one.template.instantiate"].set()

    assert (await again).id == "1"
    assert server.vms[2].state == DONE
    assert [vm.id for vm in await cloud.list()] == ["1"]


async def test_what_was_doubled_all_the_same_is_ended_by_the_next_look(server: FakeOpenNebula, cloud: Disks) -> None:
    vm = await make(cloud)
    twin = FakeVm(9, server.users[1], "twin", server.vms[1].template, dict(server.vms[1].user_template), RUNNING)
    server.vms[9] = twin

    assert len(await cloud.list()) == 2
    assert (await cloud.create(request("i-one"))).id == vm.id
    assert twin.state == DONE


async def test_what_was_doubled_and_cannot_be_ended_yet_does_not_say_that_nothing_is_there(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    await make(cloud)
    twin = FakeVm(9, server.users[1], "twin", server.vms[1].template, dict(server.vms[1].user_template), PROLOG)
    server.vms[9] = twin

    with pytest.raises(PeerError, match=r"the VM 9 doubles the VM 1, and cannot be ended yet: .* wrong state PROLOG"):
        await cloud.create(request("i-one"))
    twin.state = RUNNING

    assert (await cloud.create(request("i-one"))).id == "1"
    assert twin.state == DONE


@pytest.mark.parametrize("fault", [Fault.CREDENTIALS, Fault.THROTTLED, Fault.GARBAGE])
async def test_an_error_after_the_instance_was_made_does_not_say_that_there_is_none(
    server: FakeOpenNebula, cloud: Disks, fault: Fault
) -> None:
    server.held["one.template.instantiate"] = asyncio.Event()
    creating = asyncio.ensure_future(cloud.create(request("i-one")))
    await until(lambda: server.counts["one.template.instantiate"], "the request is in the queue")
    server.faults["one.vmpool.infoextended"].append(fault)
    server.held["one.template.instantiate"].set()

    with pytest.raises(PeerError):
        await creating
    assert (await cloud.create(request("i-one"))).id == "1"


async def test_who_asks_for_the_same_instance_at_once_does_not_meet_its_own_quota(
    account: OpenNebulaHarness, server: FakeOpenNebula, cloud: Disks
) -> None:
    account.user.quotas = [("VM", {"VMS": 1})]
    other = account.open()
    vms = await asyncio.gather(*(driver.create(request("i-one")) for driver in (cloud, other, cloud)))
    await other.close()

    assert {vm.id for vm in vms} == {"1"}
    assert server.counts["one.template.instantiate"] == 1


async def test_no_more_calls_are_under_way_than_the_server_serves(server: FakeOpenNebula, cloud: Disks) -> None:
    server.held["one.vm.info"] = asyncio.Event()
    asked = [asyncio.ensure_future(cloud.describe("1")) for _ in range(40)]
    await until(lambda: server.counts["one.vm.info"] == rpc.CALLS, "as many calls are under way as may be")
    server.held["one.vm.info"].set()

    assert {vm.state for vm in await asyncio.gather(*asked)} == {VmState.GONE}
    assert server.most_at_once == rpc.CALLS


async def test_a_call_does_not_wait_for_its_turn_behind_a_server_that_hangs(
    account: OpenNebulaHarness, server: FakeOpenNebula
) -> None:
    """Each takes two deadlines at most, however many wait; what was never sent is told from what may have happened."""
    account.deadline_s = 1.0
    hasty = account.open()
    server.faults["one.vm.info"].extend([Fault.HANG] * 150)
    calls = [asyncio.ensure_future(hasty.describe(str(number))) for number in range(150)]
    begun = asyncio.get_running_loop().time()
    found = await asyncio.gather(*calls, return_exceptions=True)
    waited = asyncio.get_running_loop().time() - begun
    await hasty.close()

    assert waited < 7.0  # one after the other, they would take 10
    assert {type(one) for one in found} == {DeadlineError, CloudBusyError}
    assert 0 < server.counts["one.vm.info"] <= sum(isinstance(one, DeadlineError) for one in found)
    server.most_at_once = 0  # the fake does not see that nobody waits for its answers any more


async def test_fifty_at_once_share_their_looks_and_keep_to_what_the_server_serves(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    vms = await asyncio.gather(*(cloud.create(request(f"i-{number}")) for number in range(50)))

    assert len({vm.id for vm in vms}) == 50
    assert [vm.token for vm in vms] == [f"i-{number}" for number in range(50)]
    assert server.counts["one.template.instantiate"] == 50
    assert server.counts["one.vmpool.infoextended"] < 50
    assert server.most_at_once <= rpc.CALLS


async def test_a_look_that_is_cancelled_is_made_by_the_next_who_waits_for_it(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    vm = await make(cloud)
    server.faults["one.vmpool.infoextended"].append(Fault.HANG)
    first = asyncio.ensure_future(cloud.list())
    await until(lambda: server.counts["one.vmpool.infoextended"] > 2, "the first look is under way")
    second = asyncio.ensure_future(cloud.list())
    third = asyncio.ensure_future(cloud.list())
    await asyncio.sleep(0)
    first.cancel()

    assert [found.id for found in await second] == [found.id for found in await third] == [vm.id]


async def test_large_answers_are_read_beside_the_loop(
    server: FakeOpenNebula, cloud: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_LARGE_BYTES", 1000)
    vms = await asyncio.gather(*(cloud.create(request(f"i-{number}")) for number in range(30)))

    assert sorted(vm.id for vm in await cloud.list()) == sorted(vm.id for vm in vms)


@pytest.mark.parametrize(
    "version", ["5.4.13", "5.6.2", "5.8.0", "5.8.5", "5.10.5", "5.12.13", "6.0.3", "6.10.0.1", "7.4.0"]
)
async def test_all_versions_from_5_4_to_7_are_spoken_to_in_their_words(tmp_path: Path, version: str) -> None:
    async with harness(tmp_path, version=version) as account:  # which fails if a call has a parameter too many
        account.deadline_s = PATIENT_S
        cloud: Disks = account.open()  # type: ignore[assignment]
        vm, volume = await make(cloud), await make_volume(cloud)
        assert [(found.id, found.token) for found in await cloud.list()] == [(vm.id, "i-one")]
        assert (await cloud.create(request("i-one"))).id == vm.id
        await cloud.attach(volume.id, vm.id)
        await becomes(cloud, volume, VolumeState.ATTACHED)
        assert [found.vm for found in await cloud.list_volumes()] == [vm.id]
        await cloud.detach(volume.id)
        await becomes(cloud, volume, VolumeState.AVAILABLE)
        assert isinstance(cloud, CanExamine)
        assert [finding for finding in await cloud.examine() if not finding.ok] == []
        await cloud.delete_volume(volume.id)
        await becomes(cloud, volume, VolumeState.GONE)
        await cloud.delete(vm.id)
        assert await cloud.list() == []
        await cloud.close()
        assert account.server.complaints == []


async def test_a_test_can_play_what_boots(account: OpenNebulaHarness, server: FakeOpenNebula, cloud: Disks) -> None:
    booted: dict[int, str] = {}
    ended: list[int] = []

    async def on_boot(number: int, context: Any) -> str:
        booted[number] = base64.b64decode(context["CONPAAS_CONTEXT_BASE64"]).decode()
        return "127.99.0.7"

    async def on_end(number: int) -> None:
        ended.append(number)

    server.on_boot, server.on_end = on_boot, on_end
    vm = await make(cloud)
    assert vm.address == "127.99.0.7"
    assert json.loads(booted[1]) == {"kind": "agent", "instance": "i-one", "address": ""}

    await cloud.delete(vm.id)
    await until(lambda: ended == [1], "its end was told")


# -- what the account has -------------------------------------------------------------------------------------------


async def test_without_a_template_instances_are_made_of_image_networks_and_sizes(
    account: OpenNebulaHarness, server: FakeOpenNebula
) -> None:
    cloud = account.open(**FROM_IMAGE)
    vm = await seen(cloud, await cloud.create(request("i-one")), VmState.RUNNING)
    large = await cloud.create(replace(request("i-two"), size="large"))
    assert (vm.size, large.size) == ("small", "large")

    made = dict(server.vms[1].template)
    assert (made["CPU"], made["VCPU"], made["MEMORY"]) == ("0.5", "1", "512")
    assert [disk["IMAGE_ID"] for disk in server.vms[1].vectors("DISK")] == ["0"]
    assert dict(server.vms[2].template)["MEMORY"] == "4096"
    assert server.vms[1].user_template["CONPAAS_TAG_SERVICE"] == "svc-test"

    with pytest.raises(BadInputError, match="huge"):
        await cloud.create(replace(request("i-three"), size="huge"))
    server.faults["one.vm.allocate"].append(Fault.UNKNOWN_IMAGE)
    with pytest.raises(UnknownImageError, match="Image with ID: 0 does not exist"):
        await cloud.create(request("i-three"))
    await cloud.close()


async def test_sizes_are_those_of_the_settings_or_of_the_template(account: OpenNebulaHarness) -> None:
    named, plain = account.open(**FROM_IMAGE), account.open()

    sizes = await named.sizes()  # type: ignore[attr-defined]
    assert [(size.name, size.price, size.default) for size in sizes] == [
        ("small", Decimal("0.05"), True),
        ("large", Decimal("0.20"), False),
    ]
    (size,) = await plain.sizes()  # type: ignore[attr-defined]
    assert (size.name, size.cores, size.memory, size.default) == ("template", 0.1, 128 << 20, True)
    await named.close()
    await plain.close()


async def test_quotas_without_a_limit_are_none_and_defaults_hold(account: OpenNebulaHarness) -> None:
    cloud = account.open()
    account.user.quotas = [("VM", {"VMS": 4, "CPU": -2, "MEMORY": 2048}), ("DATASTORE", {"ID": 101, "SIZE": 100})]
    account.user.quotas.append(("DATASTORE", {"ID": 7, "IMAGES": 1}))
    await make(cloud)

    found = {room.name: (room.used, room.limit) for room in await cloud.quota()}  # type: ignore[attr-defined]
    assert found == {"instances": (1, 4), "memory": (0, 2 << 30), "volume space": (0, 100 << 20)}
    await cloud.close()


def test_default_quotas_hold_where_a_user_has_none() -> None:
    document = records.value("user_info").replace(
        "<VM_QUOTA></VM_QUOTA><IMAGE_QUOTA></IMAGE_QUOTA></DEFAULT_USER_QUOTAS>",
        "<VM_QUOTA><VM><VMS><![CDATA[9]]></VMS></VM></VM_QUOTA></DEFAULT_USER_QUOTAS>",
    )
    user = rpc.understood("one", "one.user.info", records.success(document), rpc._document)

    (room,) = rooms(user, None)
    assert (room.name, room.used, room.limit) == ("instances", 0, 9)


async def test_declared_ports_are_opened_by_a_group_that_instances_share(
    account: OpenNebulaHarness, server: FakeOpenNebula
) -> None:
    cloud = account.open(**FROM_IMAGE, security_groups=True)
    for token in ("i-one", "i-two"):
        await cloud.create(request(token))
    await cloud.create(replace(request("i-three"), ports=()))
    await cloud.close()

    assert [name for _, name, _ in server.groups.values()] == ["conpaas-dep-ours-5555-8080", "conpaas-dep-ours-5555"]
    rules = [rule for tag, rule in server.groups[100][2] if tag == "RULE"]
    assert {"PROTOCOL": "TCP", "RULE_TYPE": "inbound", "RANGE": "5555,8080"} in rules
    assert {"PROTOCOL": "ALL", "RULE_TYPE": "outbound"} in rules
    assert [vm.vectors("NIC")[0]["SECURITY_GROUPS"] for vm in server.vms.values()] == ["0,100", "0,100", "0,101"]


async def wrong(account: OpenNebulaHarness, **settings: Any) -> dict[str, str]:
    """Return what an examination finds wrong."""
    cloud = account.open(**settings)
    assert isinstance(cloud, CanExamine)
    findings = await cloud.examine()
    await cloud.close()
    return {finding.name: f"{finding.detail}; {finding.hint}" for finding in findings if not finding.ok}


async def test_an_examination_says_exactly_what_is_wrong(account: OpenNebulaHarness, server: FakeOpenNebula) -> None:
    assert await wrong(account) == {}
    assert await wrong(account, **FROM_IMAGE) == {}

    bad_password = await wrong(account, password="of yesterday")
    assert list(bad_password) == ["the credentials"]
    assert "User couldn't be authenticated" in bad_password["the credentials"]
    assert "Error getting virtual machine template [5]" in (await wrong(account, template=5))["the template"]
    assert "Error getting image [9]" in (await wrong(account, **FROM_IMAGE | {"image": 9}))["the image"]
    assert "Error getting virtual network [8]" in (await wrong(account, networks=(0, 8)))["the network 8"]
    assert "is not for images" in (await wrong(account, datastore=100))["the datastore"]

    server.network_state = 2
    assert "not ready" in (await wrong(account, networks=(0,)))["the network 0"]
    server.network_state, server.leases = 1, 1
    assert "no free address" in (await wrong(account, networks=(0,)))["the network 0"]
    server.images[0].state = ERROR
    server.images[0].template.append(("ERROR", "Error copying image in the datastore"))
    assert "is ERROR: Error copying image in the datastore" in (await wrong(account))["the image"]
    server.images[0].state, server.images[0].persistent = 1, True
    assert "nonpersistent 0" in (await wrong(account))["the image"]
    account.user.quotas = [("VM", {"VMS": 0})]
    assert "instances: 0 of 0" in (await wrong(account))["the quota"]


@pytest.mark.parametrize("version", ["5.2.1", "8.0.0", "unknown"])
async def test_a_version_that_is_not_supported_is_found_out(account: OpenNebulaHarness, version: str) -> None:
    account.server.said = version

    found = await wrong(account)
    assert list(found) == ["the endpoint"]
    assert version in found["the endpoint"]


def settings(**words: Any) -> OpenNebulaSettings:
    account = {"endpoint": "http://127.0.0.1:2633/RPC2", "user": "me", "password": "secret", "template": 0}
    return OpenNebulaSettings(**account | words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"endpoint": "ftp://x/"}, "endpoint"),
        ({"endpoint": "http://me:secret@x/RPC2"}, "endpoint"),
        ({"user": "a:b"}, "user"),
        ({"template": None}, "a template or an image"),
        ({"image": 3}, "a template or an image"),
        ({"template": None, "image": 3}, "networks and sizes"),
        ({"size": "small"}, "no size 'small'"),
        ({"sizes": (SIZES[0], SIZES[0])}, "same name"),
        ({"security_groups": True}, "needs networks"),
        ({"ssh_key": "ssh-rsa $(x)"}, "one line"),
    ],
)
def test_settings_that_make_no_instance_are_refused(words: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        settings(**words)


def test_without_a_datastore_there_are_no_volumes(tmp_path: Path) -> None:
    context = CloudContext(name="one", deployment="dep", directory=tmp_path, clock=SYSTEM_CLOCK)

    assert not isinstance(CLOUD.open(settings(), context), HasVolumes)
    assert isinstance(CLOUD.open(settings(datastore=1), context), HasVolumes)


def test_the_password_is_not_shown() -> None:
    assert "secret" not in f"{settings()!r} {settings().model_dump_json()}"
    assert PASSWORD not in repr(CLOUD)


# -- volumes --------------------------------------------------------------------------------------------------------


async def test_an_attach_that_fails_after_its_answer_leaves_the_volume_as_it_was(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    volume, vm = await make_volume(cloud), await make(cloud)
    server.attach_fails = 1
    await cloud.attach(volume.id, vm.id)

    await becomes(cloud, volume, VolumeState.AVAILABLE)
    assert server.vms[1].seen[-2:] == [HOTPLUG, RUNNING]
    await cloud.attach(volume.id, vm.id)
    attached = await becomes(cloud, volume, VolumeState.ATTACHED)
    assert attached.devices == (f"/dev/disk/by-id/virtio-conpaas-{volume.id}", "/dev/vdb")


async def test_an_instance_does_one_thing_with_its_disks_at_a_time(server: FakeOpenNebula, cloud: Disks) -> None:
    one, two, vm = await make_volume(cloud), await make_volume(cloud, "v-two"), await make(cloud)
    server.hotplug_s = 60
    asked = await cloud.attach(one.id, vm.id)
    assert (asked.state, asked.vm) == (VolumeState.PENDING, vm.id)
    assert (await cloud.attach(one.id, vm.id)).state is VolumeState.PENDING
    with pytest.raises(CloudBusyError, match="wrong state HOTPLUG"):
        await cloud.attach(two.id, vm.id)
    with pytest.raises(CloudBusyError, match="being attached"):
        await cloud.detach(one.id)
    with pytest.raises(CloudRefusedError, match="attached"):
        await cloud.delete_volume(one.id)


async def test_a_volume_stays_attached_while_another_one_is_on_its_way(server: FakeOpenNebula, cloud: Disks) -> None:
    one, two, vm = await make_volume(cloud), await make_volume(cloud, "v-two"), await make(cloud)
    await cloud.attach(one.id, vm.id)
    await becomes(cloud, one, VolumeState.ATTACHED)
    server.hotplug_s = 60
    asked = await cloud.attach(two.id, vm.id)

    assert asked.state is VolumeState.PENDING
    assert asked.devices[-1] == "/dev/vdc"
    assert (await cloud.describe_volume(one.id)).state is VolumeState.ATTACHED
    disks = {disk["IMAGE_ID"]: disk["DISK_ID"] for disk in server.vms[1].vectors("DISK")}
    assert disks == {"0": "0", one.id: "2", two.id: "3"}  # 1 is the context's


async def test_a_volume_that_is_being_made_is_not_attached_yet(server: FakeOpenNebula, cloud: Disks) -> None:
    server.lock_s = 60
    vm, volume = await make(cloud), await cloud.create_volume(volume_request("v-one"))

    assert volume.state is VolumeState.PENDING
    with pytest.raises(CloudBusyError, match="not ready"):
        await cloud.attach(volume.id, vm.id)


async def test_a_volume_is_not_attached_to_an_instance_without_a_host(server: FakeOpenNebula, cloud: Disks) -> None:
    server.schedule_s = 60
    volume, vm = await make_volume(cloud), await cloud.create(request("i-one"))

    with pytest.raises(CloudBusyError, match="not running in any host"):
        await cloud.attach(volume.id, vm.id)


async def test_the_volume_of_an_instance_on_its_way_out_is_free_when_it_is_out(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    volume, vm = await make_volume(cloud), await make(cloud)
    await cloud.attach(volume.id, vm.id)
    await becomes(cloud, volume, VolumeState.ATTACHED)
    server.end_s = 60
    await cloud.delete(vm.id)

    assert (await cloud.detach(volume.id)).state is VolumeState.PENDING
    with pytest.raises(CloudBusyError):
        await cloud.delete_volume(volume.id)
    server._done(server.vms[1])
    assert (await cloud.describe_volume(volume.id)).state is VolumeState.AVAILABLE


async def test_a_volume_that_opennebula_gave_up_says_so(server: FakeOpenNebula, cloud: Disks) -> None:
    volume, vm = await make_volume(cloud), await make(cloud)
    image = server.images[int(volume.id)]
    image.state = ERROR
    image.template.append(("ERROR", "Error copying image in the datastore"))

    failed = await cloud.describe_volume(volume.id)
    assert (failed.state, failed.reason) == (VolumeState.FAILED, "ERROR: Error copying image in the datastore")
    with pytest.raises(CloudRefusedError, match="Error copying"):
        await cloud.attach(volume.id, vm.id)
    await cloud.delete_volume(volume.id)
    await becomes(cloud, volume, VolumeState.GONE)


async def test_a_name_that_was_taken_meanwhile_is_the_volume_itself(
    account: OpenNebulaHarness, server: FakeOpenNebula, cloud: Disks
) -> None:
    server.held["one.image.allocate"] = asyncio.Event()
    other: Disks = account.open()  # type: ignore[assignment]
    asked = [asyncio.ensure_future(driver.create_volume(volume_request("v-one"))) for driver in (cloud, other)]
    await until(lambda: server.counts["one.image.allocate"] == 2, "both have looked and ask")
    server.held["one.image.allocate"].set()

    first, second = await asyncio.gather(*asked)
    assert first.id == second.id
    await other.close()


async def test_a_volume_that_is_there_is_found_though_there_is_no_room_for_another(
    server: FakeOpenNebula, cloud: Disks
) -> None:
    volume = await make_volume(cloud)
    server.datastore_full = True

    assert (await cloud.create_volume(volume_request("v-one"))).id == volume.id
    with pytest.raises(CloudRefusedError, match="Not enough space in datastore"):
        await cloud.create_volume(volume_request("v-two"))


async def test_while_a_volume_is_being_deleted_its_token_is_busy(server: FakeOpenNebula, cloud: Disks) -> None:
    volume = await make_volume(cloud)
    server.lock_s = 60
    await cloud.delete_volume(volume.id)

    assert await cloud.list_volumes() == []
    with pytest.raises(CloudBusyError, match="NAME is already taken"):
        await cloud.create_volume(volume_request("v-one"))


async def test_the_volumes_datastore_must_be_there(account: OpenNebulaHarness) -> None:
    cloud: Disks = account.open(datastore=7)  # type: ignore[assignment]
    with pytest.raises(CloudRefusedError, match=r"Error getting datastore \[7\]") as caught:
        await cloud.create_volume(volume_request("v-one"))

    assert "datastore" in caught.value.hint
    await cloud.close()


async def test_sizes_of_volumes_are_rounded_up_to_what_opennebula_counts_in(cloud: Disks) -> None:
    volume = await cloud.create_volume(replace(volume_request("v-one"), size=(1 << 20) + 1))

    assert volume.size == 2 << 20
    assert (await cloud.describe_volume(volume.id)).size == 2 << 20
