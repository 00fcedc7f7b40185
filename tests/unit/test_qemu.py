"""What the `qemu` cloud does beyond the contract of all clouds: disks, turns, real guests, bad days."""

import asyncio
import contextlib
import errno
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conpaas.cloud import _local_machine as machine
from conpaas.cloud import _qemu_disk as disk
from conpaas.cloud import _qemu_machine as qemu
from conpaas.cloud._qemu_driver import QemuCloud
from conpaas.cloud.qemu import CLOUD, QemuSettings
from conpaas.core import files, run
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, Vm, VmState, VolumeState
from conpaas.core.errors import (
    BadInputError,
    CloudBusyError,
    CloudRefusedError,
    DeadlineError,
    DiskFullError,
    PeerError,
    QuotaExceededError,
    UnknownImageError,
)
from conpaas.core.tasks import wait_for
from tests.fakes.cloud_qemu import QemuHarness, harness, make_disk, make_image, writer_sector
from tests.fakes.clouds import request, volume_request
from tests.fakes.tiny_image import tiny_image

ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="needs root")
PATIENT_S = 40.0
BOOT_S = 100.0
emulated = pytest.mark.timeout(240)
"""For tests with real guests, or with many."""
ACCOUNT = ({"name": "small", "memory_mib": 96},)


def opened(account: QemuHarness, deployment: str = "dep-ours") -> QemuCloud:
    cloud = account.open(deployment)
    assert isinstance(cloud, QemuCloud)
    return cloud


@pytest.fixture
async def account(tmp_path: Path) -> AsyncIterator[QemuHarness]:
    async with harness(tmp_path) as account:
        yield account


@pytest.fixture
async def cloud(account: QemuHarness) -> AsyncIterator[QemuCloud]:
    cloud = opened(account)
    yield cloud
    await cloud.close()


async def reaches(cloud: Cloud, vm: str, state: VmState) -> Vm:
    async def look() -> Vm | None:
        seen = await cloud.describe(vm)
        return seen if seen.state is state else None

    return await wait_for(look, timeout_s=PATIENT_S, what=f"{vm} is {state}", clock=SYSTEM_CLOCK)


# -- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 20, (8 << 30) + 512, 5 << 40])
def test_an_overlay_is_a_sound_disk_that_reads_as_its_base(tmp_path: Path, size: int) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    make_disk(base, b"what is in the base")
    top.write_bytes(disk.overlay(base, size))

    subprocess.run(["qemu-io", "-c", f"write -P 7 {size - 512} 512", top], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-img", "check", "-q", top], check=True)
    found = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", top]))
    assert (found["virtual-size"], found["backing-filename"]) == (size, str(base))
    start = tmp_path / "start"
    subprocess.run(["qemu-img", "dd", "-O", "raw", "bs=512", "count=1", f"if={top}", f"of={start}"], check=True)
    assert start.read_bytes().startswith(b"what is in the base")


NAMES = st.from_regex(r"\A[a-z]{1,8}(-[a-z]{1,8})?(\.[a-z]{1,3})?\Z")


def read_iso(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Read label and files as Linux does: it shows names in lower case, without version and last dot."""
    volume = data[16 * 2048 :]
    assert volume[1:6] == b"CD001"
    at, files = struct.unpack_from("<I", volume, 156 + 2)[0] * 2048, {}
    while length := data[at]:
        sector, size = (struct.unpack_from("<I", data, at + offset)[0] for offset in (2, 10))
        name = data[at + 33 : at + 33 + data[at + 32]]
        if name not in {b"\0", b"\1"}:
            files[name.decode().removesuffix(";1").removesuffix(".").lower()] = data[sector * 2048 :][:size]
        at += length
    return volume[40:72].decode().rstrip(), files


@given(st.dictionaries(NAMES, st.binary(max_size=5000), max_size=5))
def test_what_is_put_on_a_cd_is_on_it(files: dict[str, bytes]) -> None:
    assert read_iso(disk.iso9660("cidata", files)) == ("cidata", files)


def test_a_seed_tells_an_instance_how_to_reach_this_computers_loopback_network() -> None:
    _, nocloud = read_iso(disk.nocloud("i-1_A", "{}"))
    label, opennebula = read_iso(disk.opennebula("i-1_A", "{}"))

    assert json.loads(nocloud["network-config"])["conpaas"] == {"loopback_via": "10.0.2.2"}
    assert json.loads(nocloud["meta-data"]) == {"instance-id": "i-1_A", "local-hostname": "i-1-a"}
    assert label == "CONTEXT"
    assert b"\nCONPAAS_LOOPBACK_VIA='10.0.2.2'\nCONPAAS_CONTEXT_BASE64='e30='\n" in opennebula["context.sh"]


def without_manifest(image: Path) -> None:
    (image / "image.json").unlink()


def with_bad_manifest(image: Path) -> None:
    (image / "image.json").write_text('{"name": "x"}')


def without_disk(image: Path) -> None:
    (image / "base.qcow2").unlink()


def with_no_qcow2(image: Path) -> None:
    (image / "base.qcow2").write_bytes(b"\0" * 4096)


def with_half_a_disk(image: Path) -> None:
    os.truncate(image / "base.qcow2", 70_000)


def with_a_part_of_another(image: Path) -> None:
    (image / "base.qcow2").write_bytes(disk.overlay(Path("/etc/shadow"), 1 << 20))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_manifest, "No such file.*image.json"),
        (with_bad_manifest, "hash: Field required"),
        (without_disk, "No such file.*base.qcow2"),
        (with_no_qcow2, "no qcow2 disk"),
        (with_half_a_disk, "cut off"),
        (with_a_part_of_another, "part of another"),
    ],
)
async def test_a_broken_image_is_named_and_nothing_is_made_of_it(
    account: QemuHarness, cloud: QemuCloud, damage: Callable[[Path], None], words: str
) -> None:
    vm = await cloud.create(request("i-before"))
    await reaches(cloud, vm.id, VmState.RUNNING)
    damage(account.image)

    with pytest.raises(UnknownImageError, match=words):
        await cloud.create(request("i-one"))
    assert not (await cloud.examine())[-1].ok
    assert [(seen.id, seen.state) for seen in await cloud.list()] == [(vm.id, VmState.RUNNING)]


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": "image"},
        {"block": "10.0.0.0/16"},
        {"block": "127.0.0.0/31"},
        {"sizes": [{"name": "a"}, {"name": "a", "cores": 2}]},
        {"sizes": []},
        {"sizes": [{"name": "a", "memory_mib": 0}]},
        {"seed": "floppy"},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QemuSettings.model_validate({"image": "/srv/image"} | wrong)


def test_it_says_why_it_cannot_be_used_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bootstrap/image/build" in CLOUD.check(QemuSettings(image=tmp_path))
    assert CLOUD.check(QemuSettings(image=make_image(tmp_path / "image"))) == ""
    monkeypatch.setattr(run, "find", lambda _program: None)
    assert "apt install" in CLOUD.check(QemuSettings(image=tmp_path / "image"))


# -- the processor --------------------------------------------------------------------------------------------------


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a computer whose processor has what KVM needs, and whose QEMU is a script."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/module").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("flags : fpu vmx sse\n")
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(qemu, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(qemu, "_SYS", tmp_path / "sys")
    monkeypatch.setattr(qemu, "_KVM", tmp_path / "kvm")
    monkeypatch.setattr(qemu, "PROGRAM", str(tmp_path / "qemu"))
    monkeypatch.setattr(qemu, "PROBE_S", PATIENT_S)
    return tmp_path


def chosen(computer: Path, script: str, choice: str = "auto") -> str:
    program, text = computer / "qemu", f"#!/bin/sh\necho x >> {computer}/calls\n{script}\n"
    if not program.exists() or program.read_text() != text:
        program.write_text(text)
        program.chmod(0o755)
    kernel = computer / "vmlinuz"
    kernel.touch()
    manifest = disk.Manifest(name="x", hash="x")
    return qemu.accelerator(choice, disk.BaseImage(manifest, kernel, 1, kernel, None), computer / "accelerator")


SPEAKS, DIES = "echo '[ 0.0] Linux version 6.1'; exec sleep 60", "echo 'KVM: entry failed' >&2; exit 1"


def test_a_kvm_that_boots_a_kernel_is_used_and_asked_once(computer: Path) -> None:
    assert [chosen(computer, SPEAKS) for _ in range(3)] == ["kvm"] * 3
    assert (computer / "calls").read_text() == "x\n"


@pytest.mark.parametrize(("script", "probe_s"), [("exec sleep 60", 0.5), (DIES, PATIENT_S)])
def test_a_kvm_that_opens_but_does_not_boot_is_not_used(
    computer: Path, monkeypatch: pytest.MonkeyPatch, script: str, probe_s: float
) -> None:
    monkeypatch.setattr(qemu, "PROBE_S", probe_s)

    assert chosen(computer, script) == "tcg"
    assert [pid for pid in machine_pids() if place(pid) == str(computer)] == []


def test_a_new_qemu_is_tried_again(computer: Path) -> None:
    assert chosen(computer, DIES) == "tcg"
    assert chosen(computer, SPEAKS) == "kvm"


def test_a_kvm_that_is_only_played_is_not_even_tried(computer: Path) -> None:
    (computer / "sys/module/kvm_pvm").mkdir()

    assert chosen(computer, SPEAKS) == "tcg"
    assert not (computer / "calls").exists()
    assert chosen(computer, SPEAKS, "kvm") == "kvm"


def test_without_the_processors_help_there_is_no_kvm(computer: Path) -> None:
    (computer / "proc/cpuinfo").write_text("flags : fpu sse notvmx\n")

    assert chosen(computer, SPEAKS) == "tcg"
    assert not (computer / "calls").exists()


# -- speaking to QEMU -----------------------------------------------------------------------------------------------

GREETING = b'{"QMP": {}}\n'
AGREED = b'{"return": {}, "id": %s}\n'
LATE = b'{"return": {"late": true}, "id": "somebody-else"}\n'
EVENT = b'{"event": "RTC_CHANGE"}\n'


@contextlib.contextmanager
def somebody(home: Path, *says: bytes) -> Iterator[None]:
    """Play a QEMU in `home` that answers one line after the other; `%s` stands for the id of the question."""

    def play(server: socket.socket) -> None:
        with server.accept()[0] as peer:
            peer.sendall(LATE + GREETING)
            for answer in says:
                question = json.loads(peer.recv(65536))
                peer.sendall(answer.replace(b"%s", json.dumps(question["id"]).encode()))
            stay.wait()

    stay = threading.Event()
    with contextlib.chdir(home), socket.create_server("qmp", family=socket.AF_UNIX) as server:
        server.settimeout(PATIENT_S)
        player = threading.Thread(target=play, args=(server,))
        player.start()
        try:
            yield
        finally:
            stay.set()
            player.join()


def test_answers_to_others_and_events_are_not_taken_for_answers(tmp_path: Path) -> None:
    with (
        somebody(tmp_path, LATE + AGREED, EVENT + LATE + b'{"return": 7, "id": %s}\n'),
        qemu.monitor(tmp_path, PATIENT_S) as talk,
    ):
        assert talk.execute("query-status") == 7


@pytest.mark.parametrize(
    ("says", "deadline_s", "error", "words"),
    [
        (b'{"error": {"desc": "no such device"}, "id": %s}\n', PATIENT_S, qemu.Refusal, "no such device"),
        (b"SSH-2.0-OpenSSH\n", PATIENT_S, PeerError, "query-status"),
        (b'["return"]\n', PATIENT_S, PeerError, "query-status"),
        (EVENT, 0.3, DeadlineError, "query-status"),
    ],
)
def test_what_qemu_says_on_bad_days_becomes_an_error(
    tmp_path: Path, says: bytes, deadline_s: float, error: type[Exception], words: str
) -> None:
    with somebody(tmp_path, AGREED, says), qemu.monitor(tmp_path, PATIENT_S) as talk:
        talk._deadline = time.monotonic() + deadline_s  # it counts from here: they have greeted each other
        with pytest.raises(error, match=words):
            talk.execute("query-status")


def test_where_nobody_listens_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="does not listen"), qemu.monitor(tmp_path, PATIENT_S):
        pytest.fail("nobody spoke")


# -- instances ------------------------------------------------------------------------------------------------------


async def test_a_machine_that_dies_at_once_is_failed_with_its_own_words(account: QemuHarness, cloud: QemuCloud) -> None:
    (account.image / "vmlinuz").write_bytes(b"no kernel at all")
    await cloud.create(request("i-one"))

    assert "qemu" in (await reaches(cloud, "i-one", VmState.FAILED)).reason
    await cloud.delete("i-one")
    assert await account.leftovers() == []


async def test_no_more_boot_at_once_than_may_and_another_driver_goes_on(tmp_path: Path) -> None:
    async with harness(tmp_path, boots=1, boot_s=1000) as account:
        make_disk(account.image / "base.qcow2", b"")  # nothing ever says that it has booted
        first, second = opened(account), opened(account)
        await first.create(request("i-one"))
        await reaches(first, "i-one", VmState.RUNNING)
        waiting = await first.create(request("i-two"))
        await first.close()

        assert waiting.state is VmState.PENDING
        assert "turn" in (await second.describe("i-two")).reason
        await second.delete("i-one")
        await reaches(second, "i-two", VmState.RUNNING)
        await second.close()


async def test_one_that_has_booted_makes_room_for_the_next(tmp_path: Path) -> None:
    async with harness(tmp_path, boots=1, boot_s=1000) as account:
        cloud = opened(account)
        for token in ("i-one", "i-two", "i-three"):
            await cloud.create(request(token))
        for token in ("i-one", "i-two", "i-three"):
            await reaches(cloud, token, VmState.RUNNING)
        await cloud.close()


async def test_a_frozen_machine_can_be_deleted_and_no_process_is_left(account: QemuHarness, cloud: QemuCloud) -> None:
    await cloud.create(request("i-one"))
    await reaches(cloud, "i-one", VmState.RUNNING)
    volume = await cloud.create_volume(volume_request("v-one"))
    await cloud.attach(volume.id, "i-one")
    pid = account.process("i-one").pid
    os.kill(pid, signal.SIGSTOP)
    await cloud.delete("i-one")

    assert not Path(f"/proc/{pid}").exists()
    assert (await cloud.describe_volume(volume.id)).state is VolumeState.AVAILABLE


async def test_many_may_knock_at_once_while_a_machine_is_busy(account: QemuHarness, cloud: QemuCloud) -> None:
    vm = await cloud.create(request("i-one"))
    await reaches(cloud, vm.id, VmState.RUNNING)
    os.kill(account.process(vm.id).pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(PATIENT_S):  # it lets nobody in, so who has no place at its door never gets one
            doors = await asyncio.gather(*(asyncio.open_connection(vm.address, 8080) for _ in range(50)))
    finally:
        os.kill(account.process(vm.id).pid, signal.SIGCONT)
    for _, writer in doors:
        writer.close()


async def test_a_console_log_is_kept_short(account: QemuHarness, cloud: QemuCloud) -> None:
    vm = await cloud.create(request("i-one"))
    await reaches(cloud, vm.id, VmState.RUNNING)
    log = account.directory / vm.id / "console.log"
    log.write_bytes(b"\xff" * (2 << 20))

    assert len((await cloud.console(vm.id)).encode()) <= 1 << 16
    await cloud.describe(vm.id)
    assert log.stat().st_size < 1 << 16


async def test_a_volume_whose_removal_was_interrupted_is_found_and_removed(
    account: QemuHarness, cloud: QemuCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, *, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        raise OSError(errno.EIO, "the computer went away")

    volume, unlink = await cloud.create_volume(volume_request("v-one")), Path.unlink
    with monkeypatch.context() as day:
        day.setattr(Path, "unlink", interrupted)
        with pytest.raises(CloudRefusedError, match="went away"):
            await cloud.delete_volume(volume.id)

    assert [seen.id for seen in await cloud.list_volumes()] == [volume.id]
    await cloud.delete_volume(volume.id)
    assert await account.leftovers() == []


async def test_instances_share_an_amount_of_memory(tmp_path: Path) -> None:
    async with harness(tmp_path, memory_mib=70) as account:
        cloud = opened(account)
        await cloud.create(request("i-one"))
        await cloud.create(request("i-two"))
        with pytest.raises(QuotaExceededError, match="64 of 70 MiB"):
            await cloud.create(request("i-three"))
        assert [room.used for room in await cloud.quota()] == [2, 64 << 20]
        await cloud.close()


async def test_what_is_no_name_is_refused(cloud: QemuCloud) -> None:
    for token in ("../i-one", "", "a" * 61):
        with pytest.raises(BadInputError):
            await cloud.create(request(token))
        with pytest.raises(BadInputError):
            await cloud.create_volume(volume_request(token))
        await cloud.delete(token)
        assert (await cloud.describe(token)).state is VmState.GONE


@only_root
async def test_a_machine_runs_as_nobody_else_and_may_start_nothing(account: QemuHarness, cloud: QemuCloud) -> None:
    vm = await cloud.create(request("i-one"))
    await reaches(cloud, vm.id, VmState.RUNNING)
    status = Path(f"/proc/{account.process(vm.id).pid}/status").read_text()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)

    assert vm.address
    user = qemu.user_of(account.settings.uid_base, vm.address)
    assert facts["Uid"].split() == facts["Gid"].split() == [str(user)] * 4
    assert facts["Groups"].split() == [str(user)]
    assert facts["CapEff"].strip("0") == ""
    assert facts["Seccomp"] == "2"


@contextlib.asynccontextmanager
async def small_disk(directory: Path, size: str) -> AsyncIterator[Path]:
    """Let the cloud's folder be a disk of its own."""
    place = directory / "cloud"
    place.mkdir()
    await run.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], timeout_s=30)
    try:
        yield place
    finally:
        await run.run(
            ["umount", "--lazy", str(place)], timeout_s=30
        )  # a machine that was just killed may hold it still


@only_root
async def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    async with small_disk(tmp_path, "200k"), harness(tmp_path, reserve_mib=0) as account:
        cloud = opened(account)
        with pytest.raises(DiskFullError):
            await cloud.create(request("i-one"))
        assert await account.leftovers() == []
        assert await cloud.list() == []
        await cloud.close()


@only_root
async def test_a_machine_that_has_filled_the_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conpaas.cloud._qemu_driver._ASK_S", PATIENT_S)
    async with small_disk(tmp_path, "32m") as place, harness(tmp_path, reserve_mib=0) as account:
        make_disk(account.image / "base.qcow2", writer_sector(100))
        cloud = opened(account)
        for token in ("i-one", "i-two"):
            filler = place / ".filler"
            filler.write_bytes(bytes(files.free_bytes(place) - (4 << 20)))  # first: the machine begins at once
            await cloud.create(request(token))

            async def halted(vm: str = token) -> Vm | None:
                seen = await cloud.describe(vm)
                assert "DONE" not in await cloud.console(vm)
                return seen if seen.reason and seen.state is VmState.RUNNING else None

            seen = await wait_for(halted, timeout_s=PATIENT_S, what="it is halted", clock=SYSTEM_CLOCK)
            assert "no space left" in seen.reason
            assert seen in await cloud.list()
            if token == "i-one":
                await cloud.delete(token)
            filler.unlink()

        await says(cloud, "i-two", "DONE")
        assert [vm.reason for vm in await cloud.list()] == [""]
        await cloud.close()


async def says(cloud: QemuCloud, vm: str, words: str) -> None:
    async def look() -> bool | None:
        await cloud.describe(vm)
        return words in await cloud.console(vm) or None

    await wait_for(look, timeout_s=PATIENT_S, what=f"{vm} says {words}", clock=SYSTEM_CLOCK)


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        ("io-error", VmState.RUNNING, "no space left"),
        ("internal-error", VmState.FAILED, "internal-error"),
        ("running", VmState.RUNNING, "^$"),
    ],
)
async def test_what_a_machine_says_of_itself_is_told(
    account: QemuHarness, cloud: QemuCloud, monkeypatch: pytest.MonkeyPatch, status: str, state: VmState, words: str
) -> None:
    await cloud.create(request("i-one"))
    await reaches(cloud, "i-one", VmState.RUNNING)
    home = account.directory / "i-one"
    (home / "qmp").rename(home / "away")
    monkeypatch.setattr(files, "free_bytes", lambda _path: 1000)
    monkeypatch.setattr("conpaas.cloud._qemu_driver._ASK_S", PATIENT_S)
    with somebody(home, AGREED, b'{"return": {"status": "%s"}, "id": %%s}\n' % status.encode()):
        seen = await cloud.describe("i-one")

    assert seen.state is state
    assert re.search(words, seen.reason)


async def test_a_machine_whose_monitor_is_silent_is_taken_for_running(account: QemuHarness, cloud: QemuCloud) -> None:
    await cloud.create(request("i-one"))
    await reaches(cloud, "i-one", VmState.RUNNING)
    pid = account.process("i-one").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        (seen,) = await cloud.list()
    finally:
        os.kill(pid, signal.SIGCONT)

    assert (seen.state, seen.reason) == (VmState.RUNNING, "")


KILLED_AT = """
import asyncio, os, sys
from pathlib import Path
from conpaas.cloud.qemu import CLOUD, QemuSettings
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CloudContext
from tests.fakes.clouds import request

directory, settings = Path(sys.argv[1]), QemuSettings.model_validate_json(sys.argv[2])
context = CloudContext(name="qemu", deployment="dep-ours", directory=directory, clock=SYSTEM_CLOCK)
STEPS = {"os.mkdir", "os.rename", "os.remove", "os.chmod", "os.truncate", "subprocess.Popen", "socket.bind"}

def step(event, words):
    global left
    writes = event == "open" and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in STEPS:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)

async def create():
    cloud = CLOUD.open(settings, context)
    sys.addaudithook(step)
    await cloud.create(request("i-one"))
    os._exit(0)

for line in sys.stdin:
    left, pid = int(line), os.fork()
    if pid == 0:
        asyncio.run(create())
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@emulated
async def test_a_driver_that_is_killed_at_any_step_leaves_nothing_that_is_not_found(account: QemuHarness) -> None:
    words = [str(account.directory), account.settings.model_dump_json()]
    async with run.pipe([sys.executable, "-c", KILLED_AT, *words]) as drivers:
        assert drivers.stdin
        assert drivers.stdout
        for steps in itertools.count(1):
            drivers.stdin.write(f"{steps}\n".encode())
            ended = int(await drivers.stdout.readline())
            assert ended in {0, -signal.SIGKILL}
            await find_and_delete(account, again=steps % 2 == 0)
            if ended == 0:
                break
    assert steps > 8


async def find_and_delete(account: QemuHarness, *, again: bool) -> None:
    """Do what a director does that finds a request without an answer: it asks again, or gives up."""
    cloud = opened(account)
    seen = await cloud.list()
    assert [vm.id for vm in seen] == ["i-one"] * len(seen)
    assert seen or await account.leftovers() == []
    if again:
        await cloud.create(request("i-one"))
        await reaches(cloud, "i-one", VmState.RUNNING)
    await cloud.delete("i-one")
    assert await account.leftovers() == []
    assert not seen or machine.processes(f"i-one@{seen[0].address}", None) == []
    await cloud.close()


# -- real guests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny() -> Path:
    return tiny_image()


@pytest.fixture
def listener(new_address: Callable[[], str]) -> Iterator[Callable[[str], tuple[str, int]]]:
    """Make listeners on this computer that greet everybody."""
    servers: list[subprocess.Popen[bytes]] = []

    def listen(address: str) -> tuple[str, int]:
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            script = (
                "import socket,sys\ns=socket.socket(fileno=int(sys.argv[1]))\n"
                "while True:\n c=s.accept()[0]; c.recv(99); c.sendall(b'hello from the host'); c.close()"
            )
            words = [sys.executable, "-c", script, str(server.fileno())]
            servers.append(subprocess.Popen(words, pass_fds=(server.fileno(),)))
        return address, port

    yield listen
    for server in servers:
        server.kill()
        server.wait()


async def page(vm: Vm, name: str) -> str:
    """Return what a guest answers; while it boots there is no answer, or one that breaks off."""

    async def ask() -> str | None:
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(vm.address, 8080)
                try:
                    writer.write(f"GET /cgi-bin/{name} HTTP/1.0\r\n\r\n".encode())
                    answer = (await reader.read()).decode()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None
        return answer.partition("\n\n")[2].partition("\r\n\r\n")[2] or answer if "200 OK" in answer else None

    return await wait_for(ask, timeout_s=BOOT_S, what=f"{vm.id} answers {name}", clock=SYSTEM_CLOCK)


@emulated
async def test_guests_reach_each_other_local_instances_and_the_director(
    tmp_path: Path, tiny: Path, listener: Callable[[str], tuple[str, int]], address: str
) -> None:
    async with (
        harness(tmp_path / "one", image=tiny, sizes=ACCOUNT, warm=False, seed="nocloud") as ours,
        harness(tmp_path / "two", image=tiny, sizes=ACCOUNT, warm=False, seed="context") as theirs,
    ):
        clouds = [opened(ours), opened(theirs)]
        first, second = [await cloud.create(request(f"i-{seed}")) for cloud, seed in zip(clouds, "ab", strict=True)]

        for vm in (first, second):
            assert f'"instance": "{vm.id}"' in await page(vm, "context")
        assert "i-b" in await page(first, f"get?{second.address}+8080")
        assert "i-a" in await page(second, f"get?{first.address}+8080")
        assert "i-a" in await page(first, f"get?{first.address}+8080")
        assert "hello from the host" in await page(first, "get?{}+{}".format(*listener(address)))
        _, port = listener("127.0.0.1")
        assert "hello from the host" in await page(second, f"get?{CLOUD.host_alias}+{port}")
        for cloud in clouds:
            await cloud.close()


@emulated
async def test_a_volume_goes_from_guest_to_guest_and_a_second_guest_continues_from_a_saved_one(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, image=tiny, sizes=ACCOUNT) as account:
        cloud = opened(account)
        first = await cloud.create(request("i-one"))
        await page(first, "context")
        volume = await cloud.create_volume(volume_request("v-one"))
        assert (await cloud.attach(volume.id, first.id)).devices == (f"/dev/disk/by-id/virtio-{volume.id}",)
        await answers(first, "disks", volume.id)
        await page(first, f"write?{volume.id}+kept")
        await cloud.detach(volume.id)
        await is_free(cloud, volume.id)
        assert volume.id not in await page(first, "disks")

        await saved(account)
        with monkeypatch.context() as early:
            early.setattr(cloud, "_give_turns", lambda: None)
            second = await cloud.create(request("i-two"))
            with pytest.raises(CloudBusyError, match="still being started"):
                await cloud.attach(volume.id, second.id)
        await reaches(cloud, second.id, VmState.RUNNING)
        await cloud.attach(volume.id, second.id)
        assert '"instance": "i-two"' in await page(second, "context")
        assert "SeaBIOS" not in await cloud.console(second.id), "it has booted"
        await answers(second, "disks", volume.id)
        assert "kept" in await page(second, f"read?{volume.id}")
        await page(second, f"write?{volume.id}+changed")
        await cloud.delete(second.id)
        await cloud.attach(volume.id, first.id)
        await answers(first, f"read?{volume.id}", "changed")
        await cloud.close()


async def answers(vm: Vm, name: str, words: str) -> None:
    async def look() -> bool | None:
        return words in await page(vm, name) or None

    await wait_for(look, timeout_s=PATIENT_S, what=f"{name} of {vm.id} says {words}", clock=SYSTEM_CLOCK)


async def is_free(cloud: QemuCloud, volume: str) -> None:
    async def look() -> bool | None:
        return (await cloud.describe_volume(volume)).state is VolumeState.AVAILABLE or None

    await wait_for(look, timeout_s=PATIENT_S, what=f"{volume} is free", clock=SYSTEM_CLOCK)


async def saved(account: QemuHarness) -> None:
    async def look() -> bool | None:
        return any(account.directory.glob(".warm/[!.]*/memory")) or None

    await wait_for(look, timeout_s=BOOT_S, what="a machine is saved", clock=SYSTEM_CLOCK)


async def test_a_machine_that_does_not_wait_for_its_seed_is_not_saved_nor_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conpaas.cloud._qemu_warm.BOOT_S", 0.5)
    async with harness(tmp_path, image=make_image(tmp_path / "image", warm=True)) as account:
        cloud = opened(account)
        await cloud.create(request("i-one"))

        async def failed() -> Path | None:
            return next(account.directory.glob(".warm/[!.]*/failed"), None)

        why = await wait_for(failed, timeout_s=PATIENT_S, what="it is given up", clock=SYSTEM_CLOCK)
        assert "waits for its seed" in why.read_text()
        await cloud.create(request("i-two"))
        await reaches(cloud, "i-two", VmState.RUNNING)
        assert [path.name for path in why.parent.iterdir()] == ["failed"]
        assert [path.name for path in why.parent.parent.iterdir()] == [why.parent.name]
        assert machine.processes(f"warm@{why.parent}", None) == []
        await cloud.close()


async def test_what_is_full_only_now_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with harness(tmp_path, image=make_image(tmp_path / "image", warm=True)) as account:
        cloud = opened(account)
        spec = cloud._machine(disk.read_image(account.image), account.settings.sizes[0], "127.43.0.0")
        with monkeypatch.context() as day:
            day.setattr(disk, "overlay", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
            with pytest.raises(DiskFullError):
                await cloud._pool.make(spec)
        assert not cloud._pool.tried(spec)
        monkeypatch.setattr("conpaas.cloud._qemu_warm.BOOT_S", 0.0)
        await cloud._pool.make(spec)
        assert cloud._pool.tried(spec)
        await cloud.close()


async def test_a_driver_that_is_closed_while_it_starts_a_machine_to_save_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, closing, spawn = threading.Event(), threading.Event(), run.spawn

    def slowly(*words: Any, **more: Any) -> int:
        if "cwd" in more and more["cwd"].parent.name == ".warm":
            starting.set()
            closing.wait(PATIENT_S)
        return spawn(*words, **more)

    async with harness(tmp_path, image=make_image(tmp_path / "image", warm=True)) as account:
        cloud = opened(account)
        monkeypatch.setattr(run, "spawn", slowly)
        await cloud.create(request("i-one"))
        assert await asyncio.to_thread(starting.wait, PATIENT_S)
        task = asyncio.create_task(cloud.close())
        await asyncio.wait([task], timeout=0.05)
        closing.set()
        await task
        monkeypatch.undo()

        assert list(account.directory.glob(".warm/*")) == []
        assert [pid for pid in machine_pids() if f"warm@{account.directory}" in environ(pid)] == []


def machine_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[1-9]*")]


def place(pid: int) -> str:
    """Return where a process is; nothing if it has ended."""
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return ""


def environ(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def test_its_context_needs_no_driver_of_its_own(tmp_path: Path) -> None:
    context = CloudContext(name="q", deployment="d", directory=tmp_path / "new", clock=SYSTEM_CLOCK)

    assert isinstance(CLOUD.open(QemuSettings(image=tmp_path), context), QemuCloud)
