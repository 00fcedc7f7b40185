"""A node uses the volumes that it is given, finds them again, and never formats a disk on which anything is.

What is mounted is mounted for real, in a mount namespace: `scenario_…` run there, in a process of their own.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from conpaas.agent import volumes as module
from conpaas.agent.volumes import Volumes
from conpaas.core import run
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import CommandFailedError, ConflictError, ConpaasError, DeadlineError
from conpaas.core.messages.agent import Mount
from conpaas.core.roles import Roles

ROOT = Path(__file__).parents[2]
DISK_BYTES = 8 << 20


def volumes_of(directory: Path) -> Volumes:
    """Return the volumes of a node, as its daemon finds them when it starts."""
    directory.mkdir(exist_ok=True)
    return Volumes(directory, SYSTEM_CLOCK)


def wish(*devices: Path, volume: str = "vol-1", timeout_s: float = 5.0) -> Mount:
    return Mount(volume=volume, devices=tuple(map(str, devices)), timeout_s=timeout_s)


def disk(path: Path, *pieces: tuple[int, bytes]) -> Path:
    """Make a disk, in a file, with some bytes at some places and zeros elsewhere."""
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
        for place, content in pieces:
            file.seek(place)
            file.write(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "vol-1"
    path.mkdir()
    return path


# -- folders --------------------------------------------------------------------------------------------------------


async def test_a_folder_is_used_as_it_is_also_by_a_daemon_that_starts_anew(tmp_path: Path, folder: Path) -> None:
    first = volumes_of(tmp_path / "node")
    assert first.of("store") is None
    await first.mount("store", wish(tmp_path / "elsewhere", folder))
    assert (first.of("store"), first.roles) == (folder, ("store",))

    second = volumes_of(tmp_path / "node")
    await second.restore()
    assert (second.of("store"), second.roles, second.has("store", "vol-1")) == (folder, ("store",), True)
    await second.release()
    assert list(folder.iterdir()) == []


async def test_a_volume_that_is_not_there_any_more_is_never_replaced_by_an_empty_folder(
    tmp_path: Path, folder: Path
) -> None:
    """The role would serve nothing, and what it writes would be lost."""
    volumes = volumes_of(tmp_path / "node")
    await volumes.mount("store", wish(folder))
    roles = Roles(
        tmp_path / "node",
        instance="vm-1",
        address="127.0.0.1",
        agents={"store": "conpaas_notes:Store"},
        clock=SYSTEM_CLOCK,
        volume_of=volumes.of,
    )
    folder.rmdir()

    assert list(volumes.roles) == []
    with pytest.raises(ConflictError, match="volume of 'store' is not there: vol-1"):
        await roles.apply({"store": {"note": "x"}})
    assert await roles.status() == {}

    folder.mkdir()
    assert volumes.of("store") == folder


async def test_a_role_whose_volume_is_late_is_not_restored_and_not_forgotten(tmp_path: Path, folder: Path) -> None:
    volumes = volumes_of(tmp_path / "node")
    await volumes.mount("store", wish(folder))
    stored = {"store": {"wanted": {"note": "x"}, "made": {"note": "x"}}}
    (tmp_path / "node" / "roles.json").write_text(json.dumps(stored))
    folder.rmdir()
    roles = Roles(
        tmp_path / "node",
        instance="vm-1",
        address="127.0.0.1",
        agents={"store": "conpaas_notes:Store"},
        clock=SYSTEM_CLOCK,
        volume_of=volumes.of,
    )
    await roles.restore()

    assert await roles.status() == {}
    assert json.loads((tmp_path / "node" / "roles.json").read_text()) == stored


async def test_another_volume_takes_the_place_of_one_that_was_lost(tmp_path: Path, folder: Path) -> None:
    volumes, other = volumes_of(tmp_path / "node"), tmp_path / "vol-2"
    other.mkdir()
    await volumes.mount("store", wish(folder))
    await volumes.mount("store", wish(other, volume="vol-2"))

    assert (volumes.of("store"), volumes.has("store", "vol-1")) == (other, False)


async def test_a_volume_that_does_not_appear_is_told_with_where_it_was_looked_for(tmp_path: Path) -> None:
    volumes = volumes_of(tmp_path / "node")
    places = (tmp_path / "vdb", tmp_path / "vdc")

    with pytest.raises(DeadlineError, match=f"vol-1 appears at {places[0]} or {places[1]}: not within 0.1 s"):
        await volumes.mount("store", wish(*places, timeout_s=0.1))
    assert volumes.of("store") is None


async def test_a_volume_may_appear_late(tmp_path: Path, folder: Path) -> None:
    volumes, late = volumes_of(tmp_path / "node"), tmp_path / "late"
    mounting = asyncio.create_task(volumes.mount("store", wish(late)))
    await asyncio.sleep(0)
    folder.rename(late)
    await mounting

    assert volumes.of("store") == late


# -- what is on a disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([(0, b"my precious data")], id="at its beginning"),
        pytest.param([(DISK_BYTES - 16, b"my precious data")], id="at its end"),
        pytest.param([(4096, b"x")], id="one byte"),
    ],
)
async def test_a_disk_with_unknown_data_is_never_formatted(tmp_path: Path, pieces: list[tuple[int, bytes]]) -> None:
    image = disk(tmp_path / "disk", *pieces)
    before = image.read_bytes()
    volumes = volumes_of(tmp_path / "node")

    for _ in range(2):
        with pytest.raises(CommandFailedError, match="is not empty, and holds no file system"):
            await volumes.mount("store", wish(image))
    assert image.read_bytes() == before
    assert list(volumes.roles) == []


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["mkfs.ext4", "-q", "-L", "other", "DISK"], "the data of 'other'"),
        (["mkfs.ext4", "-q", "DISK"], "something else"),
        (["mkswap", "DISK"], "something else"),
    ],
)
async def test_a_disk_with_somebody_elses_data_is_left_alone(tmp_path: Path, argv: list[str], what: str) -> None:
    image = disk(tmp_path / "disk")
    await run.run([str(image) if word == "DISK" else word for word in argv], timeout_s=50)
    before = image.read_bytes()
    volumes = volumes_of(tmp_path / "node")

    with pytest.raises(CommandFailedError, match=what):
        await volumes.mount("store", wish(image))
    assert image.read_bytes() == before


async def test_a_disk_is_blank_only_if_it_can_be_read(tmp_path: Path) -> None:
    assert await module._is_blank(disk(tmp_path / "disk"))
    with pytest.raises(CommandFailedError, match="cannot be read"):
        await module._is_blank(tmp_path / "none")


async def test_a_tool_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConpaasError, match="is not installed"):
        await volumes_of(tmp_path / "node").mount("store", wish(disk(tmp_path / "disk")))


# -- mounted for real -----------------------------------------------------------------------------------------------


async def scenario_life(place: Path) -> None:
    """A blank disk: formatted, written to, unmounted, mounted again after a reboot, and by the next node."""
    image, node = disk(place / "disk"), volumes_of(place / "node")
    await node.mount("store", wish(place / "by-id", image))
    data = node.of("store")
    assert data is not None
    assert list(data.iterdir()) == [], "an engine wants it empty"
    (data / "notes").write_text("kept")
    await node.mount("store", wish(image))
    restarted = volumes_of(place / "node")
    await restarted.restore()
    assert list(restarted.roles) == ["store"]

    await restarted.release()
    assert not data.exists()
    assert list(restarted.roles) == []
    rebooted = volumes_of(place / "node")
    with pytest.raises(ConflictError):
        rebooted.of("store")
    await rebooted.restore()
    assert (data / "notes").read_text() == "kept"

    await rebooted.release()
    successor = volumes_of(place / "successor")
    await successor.mount("store", wish(image))
    found = successor.of("store")
    assert found is not None
    assert found != data
    assert (found / "notes").read_text() == "kept"


async def scenario_interrupted(place: Path) -> None:
    """A daemon that dies while it makes the file system makes it anew; it does not for another disk."""
    tools, path = place / "tools", os.environ["PATH"]
    tools.mkdir()
    broken = tools / "mkfs.ext4"
    broken.write_text(
        '#!/bin/sh\nfor disk; do :; done\nprintf half | dd of="$disk" conv=notrunc bs=1 seek=9000\nexit 1\n'
    )
    broken.chmod(0o755)
    os.environ["PATH"] = f"{tools}:{path}"
    image, other = disk(place / "disk"), disk(place / "other", (9000, b"data"))
    with pytest.raises(CommandFailedError, match=r"mkfs\.ext4"):
        await volumes_of(place / "node").mount("store", wish(image))
    os.environ["PATH"] = path

    again = volumes_of(place / "node")
    await again.restore()
    assert list(again.roles) == []
    with pytest.raises(CommandFailedError, match="not empty"):
        await again.mount("store", wish(other))
    await again.mount("store", wish(image))
    assert list(again.roles) == ["store"]


async def scenario_renamed(place: Path) -> None:
    """After a reboot disks bear each other's names: none is mounted for the wrong role."""
    one, two, node = disk(place / "vdb"), disk(place / "vdc"), volumes_of(place / "node")
    await node.mount("store", wish(one))
    await node.mount("index", wish(two, volume="vol-2"))
    await node.release()
    one.rename(place / "vdx")
    two.rename(one)
    (place / "vdx").rename(two)

    rebooted = volumes_of(place / "node")
    await rebooted.restore()
    assert list(rebooted.roles) == []
    await rebooted.mount("store", wish(two))
    await rebooted.mount("index", wish(one, volume="vol-2"))
    assert list(rebooted.roles) == ["index", "store"]


async def scenario_twice_at_once(place: Path) -> None:
    """A manager that repeats itself gets one file system."""
    image, node = disk(place / "disk"), volumes_of(place / "node")
    await asyncio.gather(*(node.mount("store", wish(image)) for _ in range(3)))
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    assert len([line for line in mounts if str(place) in line]) == 1


@pytest.mark.parametrize(
    "scenario",
    [scenario_life, scenario_interrupted, scenario_renamed, scenario_twice_at_once],
    ids=lambda f: f.__name__,
)
async def test_on_a_real_disk(scenario: Callable[[Path], Awaitable[None]], tmp_path: Path) -> None:
    disk(tmp_path / "probe")
    await run.run(["mkfs.ext4", "-q", str(tmp_path / "probe")], timeout_s=50)
    (tmp_path / "mnt").mkdir()
    alone = ["unshare", "--mount"]
    probe = [*alone, "mount", str(tmp_path / "probe"), str(tmp_path / "mnt")]
    if (await run.run(probe, timeout_s=50, check=False)).returncode != 0:
        pytest.skip("disks cannot be mounted here")
    code = f"import asyncio, pathlib; from {__name__} import {scenario.__name__} as it; asyncio.run(it(pathlib.Path("
    code += f"{str(tmp_path)!r})))"
    done = await run.run([*alone, sys.executable, "-c", code], timeout_s=50, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr.decode()
