"""What the local cloud does beyond the contract of all clouds: worlds of their own, supervision, crashes."""

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _local_start as start
from conpaas.cloud import _local_zygote as zygote
from conpaas.cloud import local
from conpaas.cloud.local import LocalSettings
from conpaas.core import files, run, tls
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, Vm, VmRequest, VmState
from conpaas.core.errors import BadInputError, CloudRefusedError, QuotaExceededError
from conpaas.core.tasks import wait_for
from tests.fakes.cloud_local import LocalHarness, harness
from tests.fakes.clouds import request

ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="needs root")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A folder that users of instances can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="conpaas-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(params=["namespaces", "processes"])
async def isolation(request: pytest.FixtureRequest, directory: Path) -> str:
    if request.param == "namespaces":
        async with harness(directory / "probe", isolation="namespaces") as account:
            cloud = account.open()
            try:
                await cloud.create(request_for("true"))
            except CloudRefusedError as exc:
                if "does not work here" not in exc.message:
                    raise
                pytest.skip(f"no namespaces here: {exc}")
            finally:
                await cloud.close()
    return str(request.param)


def request_for(token: str) -> VmRequest:
    return request(token)


Make = Callable[..., Any]


@pytest.fixture
async def make(directory: Path, isolation: str) -> AsyncIterator[Make]:
    """Makes an instance that runs a shell script, and knows its account."""
    accounts: list[LocalHarness] = []

    async def make(script: str, token: str = "i-one", **settings: Any) -> tuple[LocalHarness, Cloud, Vm]:
        settings = {"isolation": isolation, "command": ("/bin/sh", "-c", script)} | settings
        account = LocalHarness(directory, **settings)
        accounts.append(account)
        cloud = account.open()
        vm = await cloud.create(request(token))
        assert vm.state is VmState.RUNNING
        return account, cloud, vm

    yield make
    for account in accounts:
        await account.close()


async def until(check: Callable[[], Any], what: str = "it happens", timeout_s: float = 45) -> Any:
    async def ask() -> Any:
        return check() or None

    return await wait_for(ask, timeout_s=timeout_s, what=what, clock=SYSTEM_CLOCK, period_s=0.01)


def home(directory: Path, vm: Vm) -> Path:
    return directory / "cloud" / vm.id


async def said(directory: Path, vm: Vm, pattern: str) -> re.Match[str]:
    """Wait until the instance's daemon has printed what matches."""
    log = home(directory, vm) / "agent.log"
    found: re.Match[str] = await until(
        lambda: re.search(pattern, log.read_text(), re.MULTILINE), f"{pattern} in the log"
    )
    return found


# A world of its own


async def test_the_daemon_runs_in_its_own_folder_with_its_context(make: Make, directory: Path) -> None:
    _, _, vm = await make("pwd; stat -c %a context.json; cat context.json; echo; echo end; exec sleep 1000")

    text = (await said(directory, vm, r"(?s)^(.*)^end$"))[1].splitlines()
    assert text[0] == str(home(directory, vm))
    assert text[1] == "600"
    assert json.loads(text[2])["address"] == vm.address


async def test_nothing_of_the_directors_environment_is_inherited(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONPAAS_DATABASE", "postgresql://secret")
    _, _, vm = await make("env; echo end; exec sleep 1000")

    text = (await said(directory, vm, r"(?s)^(.*)^end$"))[1]
    assert "secret" not in text
    assert f"HOME={home(directory, vm)}" in text


@only_root
async def test_started_by_root_each_instance_is_an_unprivileged_user_of_its_own(make: Make, directory: Path) -> None:
    script = "id -u; id -G; grep -E '^(CapEff|CapPrm|NoNewPrivs)' /proc/self/status; echo end; exec sleep 1000"
    _, cloud, first = await make(script)
    second = await cloud.create(request("i-two"))

    users = set()
    for vm in (first, second):
        text = (await said(directory, vm, r"(?s)^(.*)^end$"))[1].split()
        assert text[2:] == ["CapPrm:", "0" * 16, "CapEff:", "0" * 16, "NoNewPrivs:", "1"]
        assert text[0] == text[1] != "0"
        users.add(text[0])
        assert (home(directory, vm)).stat().st_uid == int(text[0])
    assert len(users) == 2


async def test_an_instance_cannot_read_the_files_of_another(make: Make, directory: Path, isolation: str) -> None:
    if isolation == "processes" and not ROOT:
        pytest.skip("plain processes of one user see each other's files")
    _, cloud, _first = await make(
        "cat ../i-one/*.json ../i-two/*.json ../.records/* | wc -c; echo end; exec sleep 1000"
    )
    second = await cloud.create(request("i-two"))

    own = len((home(directory, second) / "context.json").read_bytes())
    assert (await said(directory, second, r"(?s)(\d+)\s^end$"))[1] == str(own)


async def test_in_namespaces_an_instance_sees_only_itself(make: Make, directory: Path, isolation: str) -> None:
    if isolation == "processes":
        pytest.skip("plain processes")
    folder = directory / "cloud"
    Path("/tmp", f"{directory.name}-visible").touch()
    script = f"ls {folder}; ls -A /tmp; echo; ls -d /proc/[0-9]* | wc -l; echo end; exec sleep 1000"
    _, cloud, _first = await make(script)
    second = await cloud.create(request("i-two"))

    text = (await said(directory, second, r"(?s)^(.*)^end$"))[1].split()
    Path("/tmp", f"{directory.name}-visible").unlink()
    assert text[0] == "i-two"
    assert f"{directory.name}-visible" not in text
    assert int(text[-1]) <= 4  # first process, shell, ls, wc


async def test_the_usual_places_work(make: Make, directory: Path) -> None:
    script = (
        'echo x > /dev/null && echo x > "${TMPDIR:-/tmp}/file" && cat "${TMPDIR:-/tmp}/file" && '
        "head -c 4 /dev/urandom | wc -c && cat /proc/self/stat > /dev/null && ls /proc/self/fd > /dev/null && "
        "test ! -t 0 && cat && echo fine; exec sleep 1000"
    )
    _, _, vm = await make(script)

    await said(directory, vm, r"^fine$")


async def test_a_network_of_its_own_address(make: Make, directory: Path) -> None:
    code = (
        "import socket, json; a = json.load(open('context.json'))['address']; s = socket.create_server((a, 8080)); "
        "print('open', flush=True); s.accept()[0].sendall(b'hello')"
    )
    _, cloud, first = await make("", command=(sys.executable, "-c", code))
    second = await cloud.create(request("i-two"))

    for vm in (first, second):
        await said(directory, vm, "^open$")
        reader, writer = await asyncio.open_connection(vm.address, 8080)
        assert await reader.read() == b"hello"
        writer.close()


# Supervision


async def test_a_daemon_that_dies_is_started_again(make: Make, directory: Path) -> None:
    account, cloud, vm = await make("echo started $$; exec sleep 1000")
    await said(directory, vm, "^started")
    daemon = await until(lambda: [pid for pid in account.processes(vm) if has_title(pid, "sleep")], "it sleeps")
    for pid in daemon:
        os.kill(pid, signal.SIGKILL)

    await said(directory, vm, r"(?s)^started.*agent ended with -9.*^started")
    assert (await cloud.describe(vm.id)).state is VmState.RUNNING


async def test_a_daemon_that_keeps_dying_is_started_ever_more_slowly(make: Make, directory: Path) -> None:
    _, _, vm = await make("date +%s.%N; exit 3")

    times = await said(directory, vm, r"(?s)" + r"^([\d.]+)$.*?ended with 3.*?" * 4)
    first, second, third, fourth = (float(text) for text in times.groups())
    assert [second - first >= 0.1, third - second >= 0.2, fourth - third >= 0.4] == [True] * 3


async def test_what_the_daemon_prints_is_kept_within_bounds(make: Make, directory: Path) -> None:
    _, cloud, vm = await make("seq 1 20000; echo end; exec sleep 1000", log_bytes=10_000)

    def ended() -> bool:
        with contextlib.suppress(FileNotFoundError):  # just being replaced
            return "end" in (home(directory, vm) / "agent.log").read_text()
        return False

    await until(ended, "the log's end")
    sizes = [path.stat().st_size for path in home(directory, vm).glob("agent.log*")]
    assert len(sizes) == 2
    assert max(sizes) <= 2 * 65536
    assert (await cloud.console(vm.id)).endswith("end\n")


async def test_when_told_to_end_the_daemon_may_finish(make: Make, directory: Path) -> None:
    account, cloud, vm = await make("trap 'echo finished; exit' TERM; echo ready; while :; do sleep 0.01; done")
    await said(directory, vm, "^ready$")
    os.kill(account.first_process(vm.id).pid, signal.SIGTERM)

    await said(directory, vm, "^finished$")
    await until(lambda: not account.processes(vm), "no process is left")

    async def failed() -> bool | None:  # the kernel gives back its address a moment after its last process
        return (await cloud.describe(vm.id)).state is VmState.FAILED or None

    await wait_for(failed, timeout_s=45, what="it has failed", clock=SYSTEM_CLOCK, period_s=0.01)


async def test_a_daemon_that_does_not_finish_is_killed_with_all_it_started(make: Make, directory: Path) -> None:
    script = "trap '' TERM; setsid sleep 1000 & setsid setsid sleep 1001 & echo ready; while :; do sleep 0.01; done"
    account, _, vm = await make(script, stop_s=0.1)
    await said(directory, vm, "^ready$")
    os.kill(account.first_process(vm.id).pid, signal.SIGTERM)

    await until(lambda: not account.processes(vm), "no process is left")


TREE = "setsid sleep 1000 & (setsid sh -c 'sleep 1001 & sleep 1002' &); env -i sleep 1003 & echo ready; exec sleep 1004"


def sleepers(seconds: str, user: int) -> list[int]:
    """Return the processes of `user` that sleep so long."""
    return [pid for pid in machine.processes("no mark", user) if title(pid) == f"sleep {seconds}"]


async def test_a_deleted_instance_leaves_no_process(make: Make, directory: Path) -> None:
    account, cloud, vm = await make(TREE)
    await said(directory, vm, "^ready$")
    await until(lambda: len(account.processes(vm)) >= 5, "all run")
    await cloud.delete(vm.id)

    assert account.processes(vm) == []
    assert await account.leftovers() == []


async def test_a_killed_instance_leaves_no_process(make: Make, directory: Path, isolation: str) -> None:
    account, cloud, vm = await make(TREE)
    await said(directory, vm, "^ready$")
    await until(lambda: len(account.processes(vm)) >= 5, "all run")
    await account.kill(vm.id)

    assert (await cloud.describe(vm.id)).state is VmState.FAILED
    if isolation == "namespaces":
        assert account.processes(vm) == []
    await cloud.delete(vm.id)
    assert account.processes(vm) == []


@only_root
async def test_a_process_that_hides_its_mark_is_found_by_its_user(make: Make, directory: Path) -> None:
    account, cloud, vm = await make("env -i setsid sleep 98765 & echo ready; exec sleep 1000")
    hidden = await until(lambda: sleepers("98765", home(directory, vm).stat().st_uid), "it runs")
    await account.kill(vm.id)
    await cloud.delete(vm.id)

    assert [pid for pid in hidden if run.start_time(pid) is not None] == []


async def test_a_folder_that_an_engine_has_closed_is_removed(make: Make, directory: Path) -> None:
    script = "mkdir -p a/b && touch a/b/c && ln -s /etc link && chmod 0 a/b && chmod 500 a; echo ready; exec sleep 1000"
    account, cloud, vm = await make(script)
    await said(directory, vm, "^ready$")
    await cloud.delete(vm.id)

    assert await account.leftovers() == []
    assert Path("/etc/passwd").exists()


async def test_the_console_does_not_follow_links(make: Make, directory: Path) -> None:
    _, cloud, vm = await make("echo first; rm agent.log; ln -s /etc/hostname agent.log; exec sleep 1000")
    await until((home(directory, vm) / "agent.log").is_symlink, "the link")

    assert await cloud.console(vm.id) == ""


# Addresses


def small_block() -> str:
    """Return a network of its own for this test: four addresses that nobody else uses."""
    number = os.getpid()
    return f"127.44.{number // 64 % 256}.{number % 64 * 4}/30"


async def test_two_directors_never_give_the_same_address(directory: Path, tmp_path: Path) -> None:
    async with harness(directory, block=small_block()) as one, harness(tmp_path, block=small_block()) as other:
        clouds = [one.open("dep-one"), other.open("dep-two")]
        made = await asyncio.gather(
            *(clouds[number % 2].create(request(f"i-{number}")) for number in range(5)), return_exceptions=True
        )
        vms = [vm for vm in made if isinstance(vm, Vm)]
        refused = [error for error in made if isinstance(error, QuotaExceededError)]
        for cloud in clouds:
            await cloud.close()

        assert len({vm.address for vm in vms}) == len(vms) <= 4
        assert len(vms) + len(refused) == 5
        assert "no address" in str(refused[0])


async def test_an_address_is_free_again_when_its_instance_is_deleted(make: Make) -> None:
    _, cloud, vm = await make("exec sleep 1000")
    assert machine.claimed(vm.address)
    await cloud.delete(vm.id)

    assert not machine.claimed(vm.address)


@pytest.mark.parametrize("block", ["10.0.0.0/24", "127.1.1.0/31", "::/64", "0.0.0.0/0"])
def test_a_block_that_is_not_of_the_loopback_is_refused(block: str) -> None:
    with pytest.raises(ValueError, match="block"):
        LocalSettings.model_validate({"block": block})


# Bad days


@pytest.fixture
async def account(tmp_path: Path) -> AsyncIterator[LocalHarness]:
    async with harness(tmp_path) as account:
        yield account


@pytest.fixture
async def cloud(account: LocalHarness) -> AsyncIterator[Cloud]:
    driver = account.open()
    yield driver
    await driver.close()


@pytest.mark.parametrize("token", ["", "../up", ".records", "a/b", "x" * 61, "i one", "i\0"])
async def test_a_token_that_is_no_name_is_refused(account: LocalHarness, cloud: Cloud, token: str) -> None:
    with pytest.raises(BadInputError):
        await cloud.create(request(token))
    assert (await cloud.describe(token)).state is VmState.GONE
    await cloud.delete(token)
    assert await account.leftovers() == []


async def test_a_full_disk_is_said_clearly_and_leaves_nothing(
    account: LocalHarness, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.write_atomically

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "context.json":
            raise OSError(28, "No space left on device")
        real(path, *args, **kwargs)

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(CloudRefusedError, match="no space left"):
        await cloud.create(request("i-one"))
    assert await account.leftovers() == []


async def test_a_context_that_cannot_be_made_leaves_nothing(account: LocalHarness, cloud: Cloud) -> None:
    with pytest.raises(BadInputError):
        await cloud.create(VmRequest(token="i-one", name="", context=lambda _: json.dumps({"kind": "director"})))
    assert await account.leftovers() == []
    assert await cloud.list() == []


def interrupt(tmp_path: Path, address: str = "127.45.0.1") -> None:
    """Leave what a driver leaves that is killed before the instance's first process has begun."""
    record = {"token": "i-one", "deployment": "dep-ours", "name": "x", "address": address, "user": None}
    (tmp_path / "cloud" / ".records" / "i-one.json").write_text(json.dumps(record))
    (tmp_path / "cloud" / "i-one").mkdir()


async def test_an_interrupted_creation_is_found_and_cleaned(
    account: LocalHarness, cloud: Cloud, tmp_path: Path
) -> None:
    interrupt(tmp_path)

    assert [(vm.token, vm.state) for vm in await cloud.list()] == [("i-one", VmState.FAILED)]
    await cloud.delete("i-one")
    assert await account.leftovers() == []


async def test_an_interrupted_creation_is_completed(account: LocalHarness, cloud: Cloud, tmp_path: Path) -> None:
    interrupt(tmp_path)

    assert (await cloud.create(request("i-one"))).state is VmState.RUNNING
    assert len(await cloud.list()) == 1


DRIVER = """
import asyncio, sys, pathlib
from conpaas.cloud import local
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CloudContext
from tests.fakes.clouds import request

async def main():
    context = CloudContext(name="local", deployment="dep-ours", directory=pathlib.Path(sys.argv[1]), clock=SYSTEM_CLOCK)
    cloud = local.CLOUD.open(local.LocalSettings(command=("/bin/sleep", "1000")), context)
    print("begin", flush=True)
    for number in range(3):
        await cloud.create(request(f"i-{number}"))

asyncio.run(main())
"""


@pytest.mark.parametrize("after_s", [0, 0.01, 0.02, 0.04, 0.08, 0.15])
async def test_a_driver_killed_at_any_moment_leaves_nothing_that_cannot_be_found(
    account: LocalHarness, tmp_path: Path, after_s: float
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DRIVER,
        str(tmp_path / "cloud"),
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": str(Path(local.__file__).parents[2]), "PATH": os.environ["PATH"]},
    )
    assert process.stdout is not None
    await process.stdout.readline()
    await SYSTEM_CLOCK.sleep(after_s)
    process.kill()
    await process.wait()

    cloud = account.open()
    for number in range(3):
        await cloud.create(request(f"i-{number}"))

    async def all_run() -> list[Vm] | None:
        seen = await cloud.list()
        return seen if all(vm.state is VmState.RUNNING for vm in seen) else None

    seen = await wait_for(all_run, timeout_s=45, what="all run", clock=SYSTEM_CLOCK)
    assert [vm.token for vm in seen] == ["i-0", "i-1", "i-2"]
    for vm in seen:
        await begun(account, vm)
        await cloud.delete(vm.id)
        assert account.processes(vm) == []
    await cloud.close()
    assert await account.leftovers() == []


async def test_where_namespaces_are_not_allowed_there_are_plain_processes(
    account: LocalHarness, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = start.Starter.start

    def refuse(self: start.Starter, spec: Any, claim: Any) -> str:
        return "unshare does not work here" if spec.namespaces else real(self, spec, claim)

    monkeypatch.setattr(start.Starter, "start", refuse)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        async with harness(Path(name)) as open_account:
            driver = open_account.open()
            assert (await driver.create(request("i-one"))).state is VmState.RUNNING
            await driver.close()
    async with harness(account._directory / "strict", isolation="namespaces") as strict:
        driver = strict.open()
        with pytest.raises(CloudRefusedError, match="unshare"):
            await driver.create(request("i-one"))
        await driver.close()
        assert await strict.leftovers() == []


def test_an_interpreter_that_instances_cannot_run_is_said_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    (closed / "python").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(closed / "python"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    assert "closed to other users" in local.CLOUD.check(LocalSettings())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert local.CLOUD.check(LocalSettings()) == ""


async def test_a_second_boot_of_the_machine_makes_all_instances_failed(
    account: LocalHarness, cloud: Cloud, tmp_path: Path
) -> None:
    vm = await cloud.create(request("i-one"))
    file = tmp_path / "cloud" / ".records" / "i-one.pid"
    first = json.loads(file.read_bytes())
    file.write_text(json.dumps(first | {"boot": "another"}))

    assert (await cloud.describe(vm.id)).state is VmState.FAILED
    file.write_text(json.dumps(first))


async def test_files_of_instances_are_closed_to_others(account: LocalHarness, cloud: Cloud, tmp_path: Path) -> None:
    await cloud.create(request("i-one"))

    folder = tmp_path / "cloud"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder / ".records", folder / "i-one")}
    assert modes == {".records": 0o700, "i-one": 0o700}


# The zygote


def agent(token: str) -> VmRequest:
    """Return a request for an instance with a real agent, whose director will never answer."""
    words = {
        "deployment": "dep-ours",
        "kind": "agent",
        "instance": token,
        "service": "svc-one",
        "service_type": "php",
        "owner": "user-one",
        "epoch": 1,
        "director": "https://127.0.0.1:1",
        "ca": tls.Authority.create("dep-ours").certificate_pem.decode(),
        "token": "one-use",
    }
    return VmRequest(token=token, name=token, context=lambda address: json.dumps(words | {"address": address}))


@pytest.fixture
async def warm(tmp_path: Path) -> AsyncIterator[LocalHarness]:
    async with harness(tmp_path, command=()) as account:
        yield account


def title(pid: int) -> str:
    """Return what a process is called with; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    except OSError:
        return ""


def has_title(pid: int, beginning: str) -> bool:
    return title(pid).startswith(beginning)


async def running_daemon(account: LocalHarness, vm: Vm) -> int:
    """Wait until the instance has begun its daemon; return that process."""
    first = account.first_process(vm.id).pid
    others: set[int] = await until(lambda: set(account.processes(vm)) - {first}, "the daemon runs")
    return min(others)


async def begun(account: LocalHarness, vm: Vm) -> None:
    """Wait until the instance has exactly two processes: the first one begins the daemon when it lives itself."""
    await until(lambda: len(account.processes(vm)) == 2, "the daemon runs")


def zygotes() -> set[int]:
    """Return the zygotes that are children of this process."""
    children: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has just ended
            children |= set(map(int, path.read_text().split()))
    return {pid for pid in children if has_title(pid, "conpaas-zygote")}


async def test_daemons_are_forked_and_look_like_what_they_are(warm: LocalHarness, tmp_path: Path) -> None:
    cloud = warm.open()
    vms = [await cloud.create(agent(f"i-{number}")) for number in range(2)]

    keys = set()
    for vm in vms:
        daemon = await running_daemon(warm, vm)
        assert title(warm.first_process(vm.id).pid) == f"conpaas-init {vm.id}"
        await until(partial(has_title, daemon, "conpaas run agent --context /"), "the daemon's title")
        key = home(tmp_path, vm) / "next.key"
        await until(key.exists, "the daemon's key")
        keys.add(key.read_text())
    assert len(keys) == 2  # randomness is not shared
    await cloud.close()


async def test_instances_outlive_the_zygote_and_the_next_one_has_a_new_zygote(warm: LocalHarness) -> None:
    cloud = warm.open()
    first = await cloud.create(agent("i-one"))
    (old,) = zygotes()
    os.kill(old, signal.SIGKILL)
    second = await cloud.create(agent("i-two"))

    assert [(await cloud.describe(vm.id)).state for vm in (first, second)] == [VmState.RUNNING] * 2
    third = await cloud.create(agent("i-three"))
    assert zygotes()
    assert old not in zygotes()
    await cloud.close()
    assert not zygotes()
    await begun(warm, third)


async def test_after_an_upgrade_there_is_a_new_zygote(warm: LocalHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = warm.open()
    await cloud.create(agent("i-one"))
    old = zygotes()
    monkeypatch.setattr(zygote, "code_stamp", lambda: "upgraded")
    await cloud.create(agent("i-two"))

    assert len(zygotes()) == 1
    assert zygotes() != old
    await cloud.close()


async def test_without_a_zygote_daemons_are_executed(tmp_path: Path) -> None:
    async with harness(tmp_path, command=(), preload=("conpaas.no_such_module",)) as account:
        cloud = account.open()
        vms = [await cloud.create(agent(f"i-{number}")) for number in range(2)]
        assert not zygotes()
        for vm in vms:
            daemon = await running_daemon(account, vm)
            await until(partial(has_title, daemon, f"{sys.executable} -m conpaas run agent"), "the daemon's title")
        await cloud.close()
