"""Volumes of the local cloud: whose they are, what a crash leaves of them, what an instance may try."""

import asyncio
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from conpaas.cloud._local_driver import LocalCloud
from conpaas.core import run
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Vm, Volume, VolumeRequest, VolumeState
from conpaas.core.errors import BadInputError, CloudRefusedError, CommandFailedError
from conpaas.core.tasks import wait_for
from tests.fakes.cloud_local import LocalHarness, harness
from tests.fakes.clouds import request, volume_request

ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="needs root")
WRITER = 'until [ -d volumes/v-one ]; do sleep 0.01; done; echo "$HOME" >> volumes/v-one/note; exec sleep 1000'


@pytest.fixture
def directory() -> Iterator[Path]:
    """A folder that users of instances can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="conpaas-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@asynccontextmanager
async def opened(directory: Path, script: str) -> AsyncIterator[tuple[LocalHarness, LocalCloud]]:
    """Open an account whose instances run a shell script."""
    async with harness(directory, command=("/bin/sh", "-c", script)) as account:
        cloud = account.open()
        assert isinstance(cloud, LocalCloud)
        yield account, cloud
        await cloud.close()


async def attached(cloud: LocalCloud, token: str) -> tuple[Vm, Volume]:
    """Make an instance that has the volume v-one."""
    vm = await cloud.create(request(token))
    await cloud.create_volume(volume_request("v-one"))
    return vm, await cloud.attach("v-one", vm.id)


async def lines(path: Path, count: int) -> list[str]:
    """Wait for so many lines in a file."""

    async def look() -> list[str] | None:
        found = path.read_text().splitlines() if path.exists() else []
        return found if len(found) >= count else None

    return await wait_for(look, timeout_s=45, what=f"{count} lines in {path}", clock=SYSTEM_CLOCK, period_s=0.01)


# -- use ------------------------------------------------------------------------------------------------------------


async def test_what_one_instance_writes_the_next_one_finds_and_may_change(directory: Path) -> None:
    async with opened(directory, WRITER) as (_, cloud):
        for count, token in enumerate(("i-one", "i-two", "i-three"), start=1):
            vm, volume = await attached(cloud, token)
            folder = Path(volume.devices[0])
            assert folder.parent == directory / "cloud" / vm.id / "volumes"
            found = await lines(folder / "note", count)
            assert [Path(line).name for line in found] == ["i-one", "i-two", "i-three"][:count]
            await cloud.delete(vm.id)
        assert (directory / "cloud" / ".volumes" / "v-one" / "note").exists()


@only_root
async def test_a_volume_and_all_in_it_belongs_to_the_instance_that_has_it(directory: Path) -> None:
    script = (
        "until [ -d volumes/v-one ]; do sleep 0.01; done; cd volumes/v-one; "
        "mkdir -p a/b; touch a/b/c; ln -s /etc/passwd a/link; ln a/b/c a/twin; echo >> note; exec sleep 1000"
    )
    outside = Path("/etc/passwd").lstat().st_uid
    async with opened(directory, script) as (_, cloud):
        for count, token in enumerate(("i-one", "i-two"), start=1):
            vm, volume = await attached(cloud, token)
            folder = Path(volume.devices[0])
            await lines(folder / "note", count)
            user = (directory / "cloud" / vm.id).stat().st_uid
            assert {path.lstat().st_uid for path in (folder, *folder.rglob("*"))} == {user}
            assert len(list(folder.rglob("*"))) == 6
            await cloud.detach("v-one")
    assert Path("/etc/passwd").stat().st_uid == outside


async def test_volumes_that_nobody_has_are_closed_to_everybody(directory: Path) -> None:
    async with opened(directory, WRITER) as (_, cloud):
        await cloud.create_volume(volume_request("v-one"))

        assert stat.S_IMODE((directory / "cloud" / ".volumes").stat().st_mode) == 0o700


async def test_of_two_instances_that_ask_at_once_one_gets_the_volume(directory: Path) -> None:
    async with opened(directory, "exec sleep 1000") as (account, cloud):
        vms = [await cloud.create(request(f"i-{number}")) for number in range(4)]
        await cloud.create_volume(volume_request("v-one"))
        other = account.open()
        assert isinstance(other, LocalCloud)
        drivers = (cloud, other, cloud, other)
        asked = (driver.attach("v-one", vm.id) for driver, vm in zip(drivers, vms, strict=True))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await other.close()

        (won,) = [answer for answer in answers if isinstance(answer, Volume)]
        lost = [answer for answer in answers if isinstance(answer, CloudRefusedError)]
        assert len(lost) == 3
        assert all(str(won.vm) in error.message for error in lost)


async def test_a_volume_may_be_detached_while_its_instance_is_deleted(directory: Path) -> None:
    async with opened(directory, "exec sleep 1000") as (_, cloud):
        for _ in range(5):
            vm, volume = await attached(cloud, "i-one")
            Path(volume.devices[0], "data").write_text("precious")
            await asyncio.gather(cloud.delete(vm.id), cloud.detach("v-one"), cloud.list_volumes())

            assert (await cloud.describe_volume("v-one")).state is VolumeState.AVAILABLE
            assert (directory / "cloud" / ".volumes" / "v-one" / "data").read_text() == "precious"


async def test_a_volume_that_moves_all_the_time_is_never_seen_lost(directory: Path) -> None:
    async with opened(directory, "exec sleep 1000") as (_, cloud):
        vm, _ = await attached(cloud, "i-one")
        done = asyncio.Event()

        async def look() -> set[VolumeState]:
            seen = set()
            while not done.is_set():
                seen |= {volume.state for volume in await cloud.list_volumes()}
            return seen

        looking = [asyncio.ensure_future(look()) for _ in range(2)]
        for _ in range(50):
            await cloud.detach("v-one")
            await cloud.attach("v-one", vm.id)
        done.set()
        seen = set().union(*await asyncio.gather(*looking))
        assert seen <= {VolumeState.AVAILABLE, VolumeState.ATTACHED}


# -- refusals -------------------------------------------------------------------------------------------------------


async def test_a_volume_that_the_disk_has_no_room_for_is_refused(directory: Path) -> None:
    async with opened(directory, "exec sleep 1000") as (account, cloud):
        with pytest.raises(CloudRefusedError, match="no room for a volume of 1024P"):
            await cloud.create_volume(VolumeRequest(token="v-one", name="huge", size=1 << 60))
        assert await cloud.list_volumes() == []
        assert await account.leftovers() == []


@pytest.mark.parametrize("token", ["", "../up", ".records", "a/b", "x" * 61, "v one", "v\0"])
async def test_a_token_that_is_no_name_is_refused(directory: Path, token: str) -> None:
    async with opened(directory, "exec sleep 1000") as (account, cloud):
        with pytest.raises(BadInputError):
            await cloud.create_volume(volume_request(token))
        assert (await cloud.describe_volume(token)).state is VolumeState.GONE
        await cloud.delete_volume(token)
        assert await account.leftovers() == []


# -- what instances may try -----------------------------------------------------------------------------------------


async def test_links_that_an_instance_makes_are_not_followed(directory: Path) -> None:
    target = directory / "target"
    target.mkdir(mode=0o755)
    (target / "v-one").mkdir()
    (target / "v-one" / "kept").touch()
    script = (
        f"until [ -d volumes/v-one ]; do sleep 0.01; done; mv volumes away; ln -s {target} volumes; exec sleep 1000"
    )
    async with opened(directory, script) as (account, cloud):
        vm, _ = await attached(cloud, "i-one")

        async def lost() -> bool | None:
            return (await cloud.describe_volume("v-one")).state is VolumeState.FAILED or None

        await wait_for(lost, timeout_s=45, what="it is seen", clock=SYSTEM_CLOCK, period_s=0.01)
        await cloud.create_volume(volume_request("v-two"))
        with pytest.raises(CloudRefusedError):
            await cloud.attach("v-two", vm.id)
        with pytest.raises(CloudRefusedError, match="no longer in instance i-one"):
            await cloud.attach("v-one", vm.id)
        assert (await cloud.detach("v-one")).state is VolumeState.FAILED
        await cloud.delete(vm.id)
        for volume in ("v-one", "v-two"):
            await cloud.delete_volume(volume)
        assert await account.leftovers() == []
    assert [path.name for path in target.rglob("*")] == ["v-one", "kept"]


async def test_an_instance_cannot_take_a_volume_by_making_a_folder_of_its_name(directory: Path) -> None:
    script = "mkdir -p volumes/v-two volumes/v-one; touch volumes/v-one/forged; echo >> made; exec sleep 1000"
    async with opened(directory, script) as (_, cloud):
        vm = await cloud.create(request("i-one"))
        await lines(directory / "cloud" / vm.id / "made", 1)
        for volume in ("v-one", "v-two"):
            await cloud.create_volume(volume_request(volume))
        with pytest.raises(CloudRefusedError):
            await cloud.attach("v-one", vm.id)
        await cloud.delete(vm.id)

        assert {volume.state for volume in await cloud.list_volumes()} == {VolumeState.AVAILABLE}
        assert not (directory / "cloud" / ".volumes" / "v-one" / "forged").exists()


@only_root
async def test_a_file_of_somebody_else_that_was_linked_into_a_volume_is_not_given_away(directory: Path) -> None:
    async with opened(directory, "exec sleep 1000") as (_, cloud):
        vm, volume = await attached(cloud, "i-one")
        (directory / "theirs").touch()
        os.link(directory / "theirs", Path(volume.devices[0]) / "stolen")
        await cloud.detach("v-one")
        await cloud.delete(vm.id)
        _, volume = await attached(cloud, "i-two")

        assert Path(volume.devices[0], "stolen").stat().st_uid == 0


async def test_a_volume_that_an_engine_has_closed_is_moved_all_the_same(directory: Path) -> None:
    script = (
        "until [ -d volumes/v-one ]; do sleep 0.01; done; echo >> volumes/v-one/note; "
        "chmod 0 volumes/v-one; chmod 500 . ; exec sleep 1000"
    )
    async with opened(directory, script) as (account, cloud):
        vm, volume = await attached(cloud, "i-one")
        folder = Path(volume.devices[0])

        async def closed() -> bool | None:
            return stat.S_IMODE(folder.stat().st_mode) == 0 or None

        await wait_for(closed, timeout_s=45, what="it is closed", clock=SYSTEM_CLOCK, period_s=0.01)
        await cloud.delete(vm.id)

        assert (directory / "cloud" / ".volumes" / "v-one" / "note").exists()
        await cloud.delete_volume("v-one")
        assert await account.leftovers() == []


# -- crashes --------------------------------------------------------------------------------------------------------

CRASHES = '''
import asyncio, json, os, pathlib, shutil, sys, threading, traceback

from conpaas.cloud import _local_driver, _local_machine, local
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CloudContext, VolumeState
from conpaas.core.files import TEMPORARY_PREFIX
from tests.fakes.clouds import volume_request

_local_driver  # is loaded before the forks, once for all
_local_machine.processes = lambda mark, user: []  # there are none, and looking for them takes most of the time
os.fsync = lambda descriptor: None  # the driver dies, the machine does not
FOLDER = pathlib.Path(sys.argv[1])
CRASHED = 9
CHANGES = {"os.rename", "os.mkdir", "os.chown", "os.chmod", "os.remove", "os.rmdir", "os.symlink"}
counts = True
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def cloud():
    context = CloudContext(name="local", deployment="dep-ours", directory=FOLDER / "cloud", clock=SYSTEM_CLOCK)
    return local.CLOUD.open(local.LocalSettings(), context)

def add_instance(token, number):
    """Leave an instance that has a folder and no process."""
    user = 0x70000000 + number if os.geteuid() == 0 else None
    record = {"token": token, "deployment": "dep-ours", "name": "x", "address": f"127.45.0.{number}", "user": user}
    (FOLDER / "cloud" / ".records" / f"{token}.json").write_text(json.dumps(record))
    (FOLDER / "cloud" / token).mkdir()

def write(folder, owner):
    """Do as an instance does, which does not crash."""
    global counts
    counts = False
    folder.mkdir()
    (folder / "data").write_text("precious")
    for path in (folder, folder / "data"):
        os.chown(path, owner, owner)
    os.symlink("/", FOLDER / "written")
    counts = True

def crash_at(step):
    count, lock = 0, threading.Lock()
    def hook(event, args):
        nonlocal count
        if not counts:
            return
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            with lock:
                count += 1
                if count == step:
                    os._exit(CRASHED)
    sys.addaudithook(hook)

async def work(step):
    driver = cloud()
    add_instance("i-one", 1)
    add_instance("i-two", 2)
    await driver.list()  # what every driver loads is loaded
    crash_at(step)
    await driver.create_volume(volume_request("v-one"))
    volume = await driver.attach("v-one", "i-one")
    write(pathlib.Path(volume.devices[0], "folder"), owner=pathlib.Path(volume.devices[0]).stat().st_uid)
    await driver.detach("v-one")
    await driver.attach("v-one", "i-two")
    await driver.delete("i-two")
    os._exit(0)

async def check():
    driver = cloud()
    seen = await driver.describe_volume("v-one")
    written = (FOLDER / "written").is_symlink()
    assert not written or seen.state in {VolumeState.AVAILABLE, VolumeState.ATTACHED}, seen
    for vm in ("i-one", "i-two"):
        await driver.delete(vm)
    assert (await driver.create_volume(volume_request("v-one"))).state is VolumeState.AVAILABLE
    add_instance("i-next", 1)
    volume = await driver.attach("v-one", "i-next")
    assert volume.state is VolumeState.ATTACHED
    folder = pathlib.Path(volume.devices[0])
    if written:
        assert (folder / "folder" / "data").read_text() == "precious"
    user = 0x70000001 if os.geteuid() == 0 else os.geteuid()
    assert {path.lstat().st_uid for path in (folder, *folder.rglob("*"))} == {user}
    await driver.detach("v-one")
    await driver.delete_volume("v-one")
    await driver.delete("i-next")
    left = {path.name for path in (FOLDER / "cloud").rglob("*") if not path.name.startswith(TEMPORARY_PREFIX)}
    assert left <= {".records", ".volumes", "lock", "volumes.lock"}, left
    os._exit(0)

def forked(act):
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(act)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    act.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for step in range(1, 1000):
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "cloud" / ".records").mkdir(parents=True)
    ended = forked(work(step))
    assert ended in {0, CRASHED}, (step, ended)
    assert forked(check()) == 0, step
    if ended == 0:
        break
print("steps", step)
'''


@pytest.mark.timeout(180)
async def test_a_driver_killed_at_any_step_loses_no_data_and_leaves_nothing(directory: Path) -> None:
    """Kill it before each change that it makes on disk, in turn."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    argv = [sys.executable, "-c", CRASHES, str(directory / "crashes")]
    outcome = await run.run(argv, timeout_s=150, env=environment)

    assert int(outcome.stdout.split()[-1]) >= 30


# -- a full disk ----------------------------------------------------------------------------------------------------

FULL = '''
import asyncio, os, pathlib, sys

from conpaas.core.errors import CloudRefusedError
from tests.fakes.cloud_local import harness
from tests.fakes.clouds import request, volume_request

FOLDER = pathlib.Path(sys.argv[1])
PAGE = 4096

def fill(pages):
    """Leave so many pages free."""
    filler = FOLDER / "filler"
    filler.unlink(missing_ok=True)
    facts = os.statvfs(FOLDER)
    filler.write_bytes(bytes((facts.f_bavail - pages) * facts.f_frsize))

async def main():
    refused = 0
    async with harness(FOLDER, command=("/bin/sleep", "1000")) as account:
        cloud = account.open()
        before = await cloud.create(request("i-before"))
        isolated = cloud._namespaces
        for pages in range(12):
            fill(pages)
            for create in (cloud.create(request("i-one")), cloud.create_volume(volume_request("v-one"))):
                try:
                    await create
                except CloudRefusedError as exc:
                    assert "no space left" in exc.message or "no room" in exc.message, exc
                    refused += 1
            (FOLDER / "filler").unlink()
            await cloud.delete("i-one")
            assert await account.leftovers() == ["i-before", "i-before.json", "i-before.pid"], await account.leftovers()
            assert await account.lives(before.id)
        assert (await cloud.create(request("i-one"))).reason == ""
        assert cloud._namespaces == isolated  # a full disk is no reason to give up the walls between instances
        await cloud.close()
    print("refused", refused)

asyncio.run(main())
'''


@pytest.mark.timeout(180)
async def test_a_full_disk_is_said_clearly_and_leaves_nothing(directory: Path) -> None:
    """Create with every number of free pages that is too small, on a file system of the test's own."""
    script = f'mount -t tmpfs -o size=512k,mode=711 tmpfs "{directory}" && exec "$0" "$@"'
    inner = ["/bin/sh", "-c", script, sys.executable, "-c", FULL, str(directory)]
    unshare = [
        shutil.which("unshare") or "unshare",
        *(["-m"] if ROOT else ["-Um", "--map-current-user", "--keep-caps"]),
    ]
    if not await works([*unshare, "/bin/sh", "-c", script, "/bin/true"]):
        pytest.skip("no mounts of one's own here")
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    outcome = await run.run([*unshare, *inner], timeout_s=150, env=environment)

    assert int(outcome.stdout.split()[-1]) > 12


async def works(argv: list[str]) -> bool:
    try:
        await run.run(argv, timeout_s=30)
    except CommandFailedError:
        return False
    return True
