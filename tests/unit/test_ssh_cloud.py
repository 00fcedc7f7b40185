"""The ssh cloud on bad days and step by step: real SSH servers; what apt-get and systemctl are told is written down."""

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import asyncssh
import pytest
from pydantic import ValidationError

from conpaas.cloud import _ssh_host, ssh
from conpaas.cloud import _ssh_plan as plan
from conpaas.core import bundle, files
from conpaas.core.bundle import Bundle
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CanExamine, Cloud, CloudContext, HasConsole, HasQuota, HasSizes, Vm, VmRequest, VmState
from conpaas.core.errors import (
    BadInputError,
    CloudCredentialsError,
    CloudRefusedError,
    DiskFullError,
    NoCapacityError,
    PeerError,
    QuotaExceededError,
)
from conpaas.core.tasks import wait_for
from tests.fakes import cloud_ssh
from tests.fakes.cloud_ssh import SLEEPER, SshHarness, SshServer
from tests.fakes.clouds import Fault, request
from tests.fakes.waiting import until

slow = pytest.mark.timeout(180)
"""For tests that wait until our code is packed, which takes a busy computer a while."""


@pytest.fixture
async def account(tmp_path: Path) -> AsyncIterator[SshHarness]:
    async with cloud_ssh.harness(tmp_path, count=1, own_pythons=True) as account:
        yield account


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[SshHarness]:
    async with cloud_ssh.harness(tmp_path, count=2, own_pythons=True) as account:
        yield account


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle.make(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def ours(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Return the bundle of our code; no driver of this test makes another one."""
    monkeypatch.setattr(bundle, "make", lambda _: built)
    return built


@pytest.fixture
def host(account: SshHarness) -> SshServer:
    return account.hosts[0]


@pytest.fixture
async def cloud(account: SshHarness) -> AsyncIterator[Cloud]:
    driver = account.open()
    yield driver
    await driver.close()


def php(token: str = "i-php") -> VmRequest:
    """Return a request whose service type needs engines."""

    def context(address: str) -> str:
        return json.dumps({"kind": "agent", "instance": token, "address": address, "service_type": "php"})

    return dataclasses.replace(request(token), context=context)


async def reach(cloud: Cloud, vm: Vm, state: VmState) -> Vm:
    async def check() -> Vm | None:
        seen = await cloud.describe(vm.id)
        assert seen.state in {state, VmState.PENDING}, seen
        return seen if seen.state is state else None

    return await wait_for(check, timeout_s=45, what=f"{vm.id} is {state}", clock=SYSTEM_CLOCK)


# -- preparing ------------------------------------------------------------------------------------------------------


async def test_engines_are_installed_without_their_servers_starting(cloud: Cloud, host: SshServer) -> None:
    if os.geteuid() != 0:
        pytest.skip("packages are root's")
    vm = await cloud.create(php())
    await reach(cloud, vm, VmState.RUNNING)
    update, install = host.text("apt.log").splitlines()

    assert update.startswith("-q -y")
    assert " install --no-install-recommends --no-remove haproxy nginx php" in install
    assert "DEBIAN_FRONTEND=noninteractive starts=no" in install
    assert not (host.folder / "policy-rc.d").exists()
    await cloud.delete(vm.id)
    assert "purge" not in host.text("apt.log")


async def test_packages_that_came_with_the_instance_leave_with_it_if_asked_for(
    account: SshHarness, host: SshServer
) -> None:
    if os.geteuid() != 0:
        pytest.skip("packages are root's")
    (host.folder / "packages").write_text("base-files\nnginx\n")
    cloud = account.open(remove_packages=True)
    vm = await cloud.create(php())
    await reach(cloud, vm, VmState.RUNNING)
    assert "libhaproxy" in host.text("packages")
    await cloud.delete(vm.id)
    await cloud.close()

    assert host.text("packages").split() == ["base-files", "nginx"]
    assert "nginx" not in host.text("apt.log").splitlines()[-1].split()
    assert await account.leftovers() == []


async def test_what_apt_get_complains_of_is_told_and_undone(account: SshHarness, cloud: Cloud, host: SshServer) -> None:
    if os.geteuid() != 0:
        pytest.skip("packages are root's")
    (host.folder / "apt-fails").write_text("E: Unable to locate package php8.2-fpm\n")
    vm = await cloud.create(php())
    seen = await reach(cloud, vm, VmState.FAILED)

    assert "Unable to locate package php8.2-fpm" in seen.reason
    assert seen.reason.startswith("installing ")
    await until(lambda: not (host.folder / "policy-rc.d").exists())  # it has failed before it is undone
    assert host.processes() == []
    assert isinstance(cloud, HasConsole)
    assert "apt-get" in await cloud.console(vm.id)
    await cloud.delete(vm.id)
    assert await account.leftovers() == []


async def test_a_host_given_back_while_apt_get_works_is_clean_when_that_has_ended(
    account: SshHarness, host: SshServer
) -> None:
    if os.geteuid() != 0:
        pytest.skip("packages are root's")
    (host.folder / "apt-waits").touch()
    patient_s, account.deadline_s = account.deadline_s, 1.0  # half of which the host itself waits
    cloud = account.open(stop_s=0.1)
    account.deadline_s = patient_s
    vm = await cloud.create(php())
    await until(lambda: host.text("apt.log"))
    assert (await cloud.describe(vm.id)).reason.startswith("installing ")
    await cloud.delete(vm.id)

    assert (await cloud.describe(vm.id)).state is VmState.GONE
    assert await cloud.list() == []
    with pytest.raises((QuotaExceededError, NoCapacityError)):
        await cloud.create(request("i-next"))
    (host.folder / "apt-waits").unlink()
    await until(lambda: not host.node.exists())
    assert (await cloud.create(request("i-next"))).token == "i-next"
    await cloud.close()


async def test_without_roots_rights_missing_packages_are_named_and_not_touched(
    account: SshHarness, host: SshServer
) -> None:
    cloud = account.open(as_root=False)
    vm = await cloud.create(php())
    seen = await reach(cloud, vm, VmState.FAILED)

    assert "apt-get install --no-install-recommends haproxy nginx" in seen.reason
    assert host.text("apt.log") == ""
    await cloud.delete(vm.id)
    await cloud.close()


async def test_where_there_is_systemd_it_starts_the_daemon_and_forgets_it_again(
    account: SshHarness, host: SshServer
) -> None:
    cloud = account.open(systemd="yes")
    vm = await cloud.create(request("i-one"))
    await reach(cloud, vm, VmState.RUNNING)
    (unit,) = (host.folder / "units").iterdir()
    text = unit.read_text()

    assert f"ExecStart={host.folder}/bin/python3 -I {host.node}/host.py supervise\n" in text
    assert "WantedBy=multi-user.target" in text
    await cloud.delete(vm.id)
    await cloud.close()
    told = host.text("systemctl.log").splitlines()
    assert told == [
        "daemon-reload",
        f"enable --now {unit.name}",
        f"disable --now {unit.name}",
        "daemon-reload",
    ]
    assert await account.leftovers() == []


async def test_a_daemon_that_ends_is_started_again(cloud: Cloud, host: SshServer) -> None:
    vm = await cloud.create(request("i-one"))
    await reach(cloud, vm, VmState.RUNNING)
    await until(lambda: host.running(SLEEPER[0]))
    (first,) = host.running(SLEEPER[0])
    os.kill(first, signal.SIGKILL)

    await until(lambda: host.running(SLEEPER[0]) not in ([], [first]))
    assert (await cloud.describe(vm.id)).state is VmState.RUNNING


async def test_a_daemon_of_roots_host_runs_as_nobody_that_the_system_knows(cloud: Cloud, host: SshServer) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    vm = await cloud.create(request("i-one"))
    await reach(cloud, vm, VmState.RUNNING)
    await until(lambda: any(Path(f"/proc/{pid}").stat().st_uid >= plan.USER_BASE for pid in host.processes()))

    assert (host.node / "home").stat().st_uid >= plan.USER_BASE
    assert (host.node / "home").stat().st_mode & 0o777 == 0o700
    assert (host.node / "lease.json").stat().st_uid == 0
    assert (host.node / "lease.json").stat().st_mode & 0o777 == 0o600


@slow
async def test_our_own_code_is_copied_and_its_daemon_started(
    account: SshHarness, host: SshServer, ours: Bundle
) -> None:
    cloud = account.open(command=())
    vm = await cloud.create(request("i-one"))
    assert vm.state is VmState.PENDING
    await reach(cloud, vm, VmState.RUNNING)
    version = host.node / "home" / "versions" / ours.sha256

    assert (version.parent / "current").resolve() == version
    assert (version / "conpaas" / "agent" / "app.py").exists()
    assert not (host.node / "bundle.tar.gz").exists()
    log = host.node / "log" / "agent.log"
    await until(lambda: log.exists() and "Context is malformed" in log.read_text())  # ours, and it has read the context
    await cloud.delete(vm.id)
    assert await account.leftovers() == []
    await cloud.close()


@slow
async def test_a_copy_that_was_interrupted_is_begun_anew_by_whoever_looks(
    account: SshHarness, host: SshServer, ours: Bundle
) -> None:
    first = account.open(command=())
    await account.fail("upload", Fault.UNREACHABLE)
    vm = await first.create(request("i-one"))
    await until(lambda: not list((account.directory / "faults").glob("upload.*")))
    await first.close()
    assert not (host.node / "bundle.tar.gz").exists()

    second = account.open(command=())
    (seen,) = await second.list()
    assert (seen.id, seen.state) == (vm.id, VmState.PENDING)
    await reach(second, vm, VmState.RUNNING)
    await second.close()


async def test_a_preparation_that_was_killed_goes_on(account: SshHarness, cloud: Cloud, host: SshServer) -> None:
    await account.fail("lease", Fault.NEVER_BOOTS)
    vm = await cloud.create(request("i-one"))
    state = host.node / "state.json"
    with held(await reader_of(host.folder / "os-release")):  # there it stops
        files.write_atomically(host.folder / "os-release", "ID=debian\n")  # for whoever goes on
        os.kill(json.loads(state.read_text())["worker"][0], signal.SIGKILL)

    await reach(cloud, vm, VmState.RUNNING)


async def reader_of(fifo: Path) -> int:
    """Wait until somebody reads a pipe, who will wait for as long as the descriptor that is returned is open."""
    found: list[int] = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # nobody reads it yet
            found.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    await until(is_read)
    return found[0]


@contextlib.contextmanager
def held(descriptor: int) -> Iterator[None]:
    """Keep a descriptor open for a while."""
    try:
        yield
    finally:
        os.close(descriptor)


def test_a_host_without_room_for_a_process_is_leased_and_prepared_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"token": "i-one", "deployment": "dep-ours", "disk_bytes": 0, "bundle": "", "address": "192.0.2.1"}
    with monkeypatch.context() as day:
        day.setattr(os, "fork", mock.Mock(side_effect=BlockingIOError(errno.EAGAIN, "no more processes")))
        answer = _ssh_host.lease(tmp_path / "node", {"spec": spec})

    assert plan.is_of(answer, "i-one")
    assert answer["needs"] == "prepare"


# -- what a host lacks ----------------------------------------------------------------------------------------------


async def test_a_host_that_cannot_be_used_says_exactly_why(account: SshHarness, host: SshServer) -> None:
    (host.folder / "os-release").write_text('ID=plan9\nPRETTY_NAME="Plan 9"\n')
    cloud = account.open(memory_mib=1 << 30)
    vm = await cloud.create(request("i-one"))
    seen = await reach(cloud, vm, VmState.FAILED)

    assert "checking the machine: operating system: Plan 9" in seen.reason
    assert "memory: " in seen.reason
    await cloud.delete(vm.id)
    await cloud.close()


async def test_a_port_that_is_taken_is_named(cloud: Cloud, host: SshServer) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), host.address, 8080)
    async with server:
        vm = await cloud.create(request("i-one"))
        seen = await reach(cloud, vm, VmState.FAILED)

    assert "port 8080" in seen.reason
    assert "in use" in seen.reason


async def test_a_host_without_python_says_so(account: SshHarness, host: SshServer) -> None:
    broken = host.settings() | {"python": "python-of-old"}
    cloud = account.open(hosts=[broken])

    with pytest.raises(CloudRefusedError, match="has no Python"):
        await cloud.create(request("i-one"))
    await cloud.close()


async def test_what_a_host_says_is_heard_also_when_it_ends_before_it_is_spoken_to(
    account: SshHarness, host: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = asyncssh.SSHClientConnection.create_process

    async def slowly(connection: asyncssh.SSHClientConnection, *words: Any, **more: Any) -> Any:
        process = await begin(connection, *words, **more)
        await process.channel.wait_closed()
        return process

    monkeypatch.setattr(asyncssh.SSHClientConnection, "create_process", slowly)
    cloud = account.open(hosts=[host.settings() | {"python": "python-of-old"}])

    with pytest.raises(CloudRefusedError, match="has no Python"):
        await cloud.create(request("i-one"))
    await cloud.close()


async def test_an_old_python_says_so(account: SshHarness, host: SshServer) -> None:
    (host.folder / "bin" / "python-of-old").write_text(
        "#!/bin/sh\nshift 2\nexec python3 -c 'import sys; sys.version_info = (3, 8); exec(sys.argv.pop(1))' \"$@\"\n"
    )
    (host.folder / "bin" / "python-of-old").chmod(0o755)
    cloud = account.open(hosts=[host.settings() | {"python": "python-of-old"}])

    with pytest.raises(CloudRefusedError, match=r"older than 3\.11"):
        await cloud.create(request("i-one"))
    await cloud.close()


@slow
async def test_an_examination_looks_at_everything_and_changes_nothing(account: SshHarness, ours: Bundle) -> None:
    cloud = account.open(command=(), disk_mib=1 << 40)
    assert isinstance(cloud, CanExamine)
    findings = {finding.name.rpartition(": ")[2]: finding for finding in await cloud.examine()}
    await cloud.close()

    assert {"operating system", "Python", "disk", "memory", "port 5555", "clock", "lease"} <= set(findings)
    assert [name for name, finding in findings.items() if not finding.ok] == ["disk"]
    assert "MiB are free" in findings["disk"].detail
    assert sys.implementation.cache_tag.removeprefix("cpython-")[0] in findings["Python"].detail
    assert await account.leftovers() == []


async def test_an_examination_says_why_there_is_nothing_to_copy(
    account: SshHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_directory: Path) -> Bundle:
        raise DiskFullError("no space left to write bundle")

    monkeypatch.setattr(bundle, "make", full)
    cloud = account.open(command=())
    assert isinstance(cloud, CanExamine)

    assert [(finding.ok, finding.detail) for finding in await cloud.examine()] == [
        (False, "no space left to write bundle")
    ]
    await cloud.close()


async def test_a_login_message_does_not_disturb(account: SshHarness, host: SshServer) -> None:
    wrapper = host.folder / "wrapper"
    wrapper.write_text(wrapper.read_text().replace("\ncase $fault", "\necho 'Welcome to this host!'\ncase $fault", 1))
    cloud = account.open()

    assert (await cloud.create(request("i-one"))).token == "i-one"
    await cloud.close()


# -- connections ----------------------------------------------------------------------------------------------------


async def test_a_host_with_another_key_than_the_known_one_is_refused(account: SshHarness, host: SshServer) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    cloud = account.open(hosts=[host.settings() | {"host_key": other}])

    with pytest.raises(CloudCredentialsError, match="not the host that is known"):
        await cloud.list()
    await cloud.close()


async def test_a_line_of_known_hosts_is_a_host_key(account: SshHarness, host: SshServer) -> None:
    line = f"[{host.address}]:{host.port},example.org {host.host_key} a comment"
    cloud = account.open(hosts=[host.settings() | {"host_key": line}])

    assert await cloud.list() == []
    await cloud.close()


async def test_trust_at_first_use_ends_with_the_first_use(account: SshHarness, host: SshServer) -> None:
    words: dict[str, Any] = {"hosts": [host.settings() | {"host_key": ""}], "trust_unknown_hosts": True}
    first = account.open(**words)
    assert await first.list() == []
    await first.close()
    host.stop()
    (host.folder / "host_key").write_bytes(asyncssh.generate_private_key("ssh-ed25519").export_private_key())
    await host.start()

    second = account.open(**words)
    with pytest.raises(CloudCredentialsError, match="not the one that it had at first"):
        await second.list()
    await second.close()


async def test_a_connection_that_died_in_silence_is_replaced(
    account: SshHarness, cloud: Cloud, host: SshServer
) -> None:
    assert await cloud.list() == []
    host.drop_sessions()

    assert await cloud.list() == []


async def test_a_host_that_is_away_is_neither_gone_nor_forgotten(two: SshHarness) -> None:
    cloud = two.open()
    vm = await cloud.create(request("i-one"))
    await reach(cloud, vm, VmState.RUNNING)
    host = two.host(vm.id)
    host.stop()
    for ask in (cloud.describe(vm.id), cloud.list(), cloud.delete(vm.id)):
        with pytest.raises(PeerError, match=host.address):
            await ask

    await host.start()
    assert [seen.id for seen in await cloud.list()] == [vm.id]
    await cloud.close()


async def test_a_dead_host_does_not_keep_the_others_from_being_used(two: SshHarness) -> None:
    two.hosts[0].stop()
    cloud = two.open()
    vm = await cloud.create(request("i-one"))

    assert two.host(vm.id) is two.hosts[1]
    with pytest.raises(PeerError, match=two.hosts[0].address):  # it may have what is asked for
        await cloud.create(request("i-two"))
    await cloud.close()


async def test_a_host_with_a_full_disk_does_not_keep_the_others_from_being_used(two: SshHarness) -> None:
    cloud = two.open()
    (two.directory / "faults" / "lease.1").write_text(Fault.NO_DISK)  # of whichever is asked first
    vm = await cloud.create(request("i-one"))

    assert vm.token == "i-one"
    assert [seen.id for seen in await cloud.list()] == [vm.id]
    await cloud.delete(vm.id)
    assert await two.leftovers() == []
    await cloud.close()


async def test_what_others_have_is_no_room_for_us_and_no_secret_is_shown(two: SshHarness) -> None:
    theirs = await two.make_foreign()
    cloud = two.open()
    assert isinstance(cloud, HasQuota)
    await cloud.create(request("i-one"))

    assert [(room.used, room.limit) for room in await cloud.quota()] == [(2, 2)]
    with pytest.raises(NoCapacityError, match="1 of 2 hosts are in use; 1 by others"):
        await cloud.create(request("i-two"))
    assert await two.lives(theirs)
    await cloud.close()


async def test_no_more_hosts_stay_connected_than_allowed(two: SshHarness) -> None:
    cloud = two.open(max_connections=1)
    assert await cloud.list() == []

    connections = cloud._connections  # type: ignore[attr-defined]
    assert len(connections._open) == 1
    assert await cloud.list() == []
    await cloud.close()


async def test_a_connection_on_which_a_call_is_just_beginning_is_not_one_too_many(
    two: SshHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = two.open(max_connections=1)
    begin, beginning, go_on = asyncssh.SSHClientConnection.create_process, asyncio.Event(), asyncio.Event()

    async def slowly(connection: asyncssh.SSHClientConnection, *words: Any, **more: Any) -> Any:
        if connection.get_extra_info("peername")[0] == two.hosts[0].address:
            beginning.set()
            await go_on.wait()
        return await begin(connection, *words, **more)

    monkeypatch.setattr(asyncssh.SSHClientConnection, "create_process", slowly)
    slow, quick = (cloud.describe(f"i-one@{host.address}:{host.port}") for host in two.hosts)
    waiting = asyncio.create_task(slow)
    await beginning.wait()
    await quick
    go_on.set()

    assert (await waiting).state is VmState.GONE
    await cloud.close()


async def test_a_host_has_its_price_and_can_be_asked_for(two: SshHarness) -> None:
    priced = [host.settings() | {"price": price} for host, price in zip(two.hosts, ("2.5", "0.5"), strict=True)]
    cloud = two.open(hosts=priced, currency="EUR")
    assert isinstance(cloud, HasSizes)
    any_, cheap, dear = await cloud.sizes()

    assert any_.default
    assert (str(cheap.price), str(dear.price), dear.currency) == ("0.5", "2.5", "EUR")
    assert cheap.name.startswith(two.hosts[1].address)
    vm = await cloud.create(dataclasses.replace(request("i-one"), size=dear.name))
    assert two.host(vm.id) is two.hosts[0]
    second = await cloud.create(request("i-two"))
    assert second.size == cheap.name
    await cloud.close()


# -- settings -------------------------------------------------------------------------------------------------------

KEY = asyncssh.generate_private_key("ssh-ed25519")
PRIVATE = KEY.export_private_key().decode()
PUBLIC = KEY.export_public_key().decode()
GOOD: dict[str, Any] = {"hosts": [{"address": "192.0.2.1", "host_key": PUBLIC}], "key": PRIVATE}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hosts": []}, "at least 1 item"),
        ({"key": None}, "private key is needed"),
        ({"hosts": [{"address": "192.0.2.1"}]}, "the host key of 192.0.2.1:22 is needed"),
        ({"hosts": [*GOOD["hosts"], *GOOD["hosts"]]}, "192.0.2.1:22 is named twice"),
        ({"hosts": [{"address": "db.example.org", "host_key": PUBLIC}]}, "not a valid IPv4 address"),
        ({"hosts": [{**GOOD["hosts"][0], "directory": "/opt/$(reboot)"}]}, "directory"),
        ({"hosts": [{**GOOD["hosts"][0], "python": "python3; reboot"}]}, "python"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    assert ssh.SshSettings.model_validate(GOOD).hosts
    with pytest.raises(ValidationError, match=words):
        ssh.SshSettings.model_validate({**GOOD, **changes})


@pytest.mark.parametrize("changes", [{"key": "no key"}, {"key": None, "key_file": "/no/such/file"}])
def test_a_key_that_is_none_is_told_without_being_shown(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = ssh.SshSettings.model_validate({**GOOD, **changes})
    context = CloudContext(name="mine", deployment="dep", directory=tmp_path, clock=SYSTEM_CLOCK)

    with pytest.raises(CloudCredentialsError, match=r"private key for 192\.0\.2\.1:22"):
        ssh.CLOUD.open(settings, context)


def test_a_private_key_is_never_shown() -> None:
    settings = ssh.SshSettings.model_validate({**GOOD, "hosts": [{**GOOD["hosts"][0], "key": PRIVATE}]})

    assert PRIVATE not in settings.model_dump_json()
    assert PRIVATE.splitlines()[1] not in repr(settings)


@pytest.mark.parametrize("token", ["", "a b", "i-1@host", "../i", "i\n[Service]"])
def test_what_is_no_id_is_refused(token: str) -> None:
    with pytest.raises(BadInputError, match="no id"):
        plan.eligible(ssh.SshSettings.model_validate(GOOD), request(token))


def test_each_token_has_an_order_of_hosts_of_its_own_the_cheapest_first() -> None:
    hosts = [{"address": f"192.0.2.{number}", "host_key": PUBLIC, "price": number // 10} for number in range(1, 20)]
    settings = ssh.SshSettings.model_validate({**GOOD, "hosts": hosts})
    orders = [[host.name for host in plan.eligible(settings, request(token))] for token in ("i-1", "i-1", "i-2")]

    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert {name.split(".")[3].split(":")[0] for name in order[:9]} == {str(number) for number in range(1, 10)}
