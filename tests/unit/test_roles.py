"""The roles of a node: wanted on disk before the first act, made so again after any end, applied once."""

import asyncio
import errno
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from conpaas.core import archive, files
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import (
    BadInputError,
    BlobMissingError,
    CommandFailedError,
    ConflictError,
    ConpaasError,
    DiskFullError,
    NotFoundError,
)
from conpaas.core.messages.base import Message
from conpaas.core.roles import Roles
from conpaas.core.service import Health, RoleAgent
from tests.fakes.waiting import until


class Wish(Message):
    """Configuration of the tests' role."""

    port: int = Field(default=1, ge=1, le=10)
    code: str | None = None


class Recorder(RoleAgent[Wish]):
    """Notes what it is asked, for all its instances; fails when told to."""

    config = Wish
    applied: ClassVar[list[tuple[str, int]]] = []
    stopped: ClassVar[list[tuple[str, float]]] = []
    on_disk: ClassVar[list[dict[str, Any]]] = []
    failure: ClassVar[ConpaasError | None] = None
    sick: ClassVar[str] = ""
    blind: ClassVar[ConpaasError | None] = None
    hold: ClassVar[asyncio.Event | None] = None

    async def apply(self, config: Wish) -> None:
        role = self.host.directory.name
        self.on_disk.append(stored(self.host.directory.parents[1]))
        if config.code is not None:
            await self.host.unpacked(config.code)
        if Recorder.hold is not None:
            await Recorder.hold.wait()
        if Recorder.failure is not None:
            raise Recorder.failure
        self.applied.append((role, config.port))

    async def health(self) -> Health:
        if Recorder.blind is not None:
            raise Recorder.blind
        return Health(not self.sick, self.sick)

    async def metrics(self) -> dict[str, float]:
        if Recorder.blind is not None:
            raise Recorder.blind
        return {"request_rate": 2.0}

    async def stop(self, drain_s: float) -> None:
        self.stopped.append((self.host.directory.name, drain_s))


def fresh(folder: Path) -> Roles:
    references = dict.fromkeys(("web", "php"), f"{__name__}:Recorder")
    return Roles(folder, instance="i-1", address="127.0.0.1", agents=references, clock=SYSTEM_CLOCK)


@pytest.fixture(autouse=True)
def recorder() -> Iterator[None]:
    yield
    for notes in (Recorder.applied, Recorder.stopped, Recorder.on_disk):
        notes.clear()
    Recorder.failure = Recorder.blind = Recorder.hold = None
    Recorder.sick = ""


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    return fresh(tmp_path)


def stored(folder: Path) -> dict[str, Any]:
    """Return what is wanted, by role, as it stands on disk."""
    found: dict[str, Any] = json.loads((folder / "roles.json").read_text())
    return {role: known["wanted"] for role, known in found.items()}


async def body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def make_blob(tmp_path: Path, word: str = "hello") -> tuple[str, bytes]:
    source = tmp_path / f"source-{word}"
    source.mkdir()
    (source / "index.php").write_text(word)
    archive.pack(source, tmp_path / "code.tar.gz")
    blob = (tmp_path / "code.tar.gz").read_bytes()
    return hashlib.sha256(blob).hexdigest(), blob


# -- applying ---------------------------------------------------------------------------------------------------------


async def test_what_is_wanted_is_on_disk_before_the_first_act(roles: Roles, tmp_path: Path) -> None:
    await roles.apply({"web": {"port": 2}, "php": {"port": 3}})
    assert Recorder.on_disk == [{"web": {"port": 2}, "php": {"port": 3}}] * 2
    assert (tmp_path / "roles.json").stat().st_mode & 0o777 == 0o600  # configurations hold passwords


async def test_applying_the_same_twice_does_nothing(roles: Roles) -> None:
    await roles.apply({"web": {"port": 2}})
    await roles.apply({"web": {"port": 2}})
    assert Recorder.applied == [("web", 2)]
    await roles.apply({"web": {"port": 3}})
    await roles.apply({"web": {"port": 2}})
    assert Recorder.applied == [("web", 2), ("web", 3), ("web", 2)]


async def test_what_is_not_healthy_is_applied_again(roles: Roles) -> None:
    await roles.apply({"web": {"port": 2}})
    Recorder.sick = "it fell over"
    await roles.apply({"web": {"port": 2}})
    assert Recorder.applied == [("web", 2)] * 2


async def test_roles_not_named_are_left_alone(roles: Roles, tmp_path: Path) -> None:
    await roles.apply({"web": {}})
    await roles.apply({"php": {}})
    assert Recorder.applied == [("web", 1), ("php", 1)]
    assert set(stored(tmp_path)) == {"web", "php"}


async def test_a_role_that_fails_is_wanted_still_and_done_at_the_next_attempt(roles: Roles, tmp_path: Path) -> None:
    Recorder.failure = CommandFailedError("nginx: no")
    with pytest.raises(CommandFailedError, match="nginx: no"):
        await roles.apply({"web": {"port": 2}})
    status = (await roles.status())["web"]
    assert (status.healthy, status.digest) == (False, "")
    assert stored(tmp_path) == {"web": {"port": 2}}
    Recorder.failure = None
    await roles.apply({"web": {"port": 2}})
    assert (await roles.status())["web"].healthy


async def test_a_change_that_fails_is_not_taken_for_what_was_applied_before(roles: Roles) -> None:
    await roles.apply({"web": {"port": 2}})
    Recorder.failure = CommandFailedError("no")
    with pytest.raises(CommandFailedError):
        await roles.apply({"web": {"port": 3}})
    Recorder.failure = None
    await roles.apply({"web": {"port": 2}})  # half of 3 may be there: it must be made so
    assert Recorder.applied == [("web", 2), ("web", 2)]


async def test_while_it_is_busy_it_says_so(roles: Roles) -> None:
    Recorder.hold = asyncio.Event()
    applying = asyncio.create_task(roles.apply({"web": {}}))
    await until(lambda: Recorder.on_disk)
    status = (await roles.status())["web"]
    assert (status.healthy, status.detail) == (False, "applying")
    Recorder.hold.set()
    await applying


async def test_a_change_that_comes_while_another_is_applied_wins(roles: Roles) -> None:
    Recorder.hold = asyncio.Event()
    first = asyncio.create_task(roles.apply({"web": {"port": 2}}))
    await until(lambda: Recorder.on_disk)
    assert not first.done()
    second = asyncio.create_task(roles.apply({"web": {"port": 3}}))
    await asyncio.sleep(0)
    Recorder.hold.set()
    await asyncio.gather(first, second)
    assert Recorder.applied[-1] == ("web", 3)
    await roles.apply({"web": {"port": 3}})
    assert Recorder.applied == [("web", 2), ("web", 3)]


async def test_an_unknown_role_is_refused_and_nothing_begun(roles: Roles, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        await roles.apply({"web": {}, "mail": {}})
    assert caught.value.value == "mail"
    assert Recorder.applied == []


@pytest.mark.parametrize(
    ("config", "field"), [({"port": 11}, "port"), ({"port": "x"}, "port"), ({"port": None}, "port")]
)
async def test_a_configuration_that_is_none_is_refused_and_its_field_named(
    roles: Roles, config: dict[str, Any], field: str
) -> None:
    with pytest.raises(BadInputError, match=f"configuration of web: {field}"):
        await roles.apply({"web": config})
    assert Recorder.applied == []


async def test_a_refused_configuration_does_not_take_the_place_of_the_good_one(tmp_path: Path) -> None:
    roles = fresh(tmp_path)
    await roles.apply({"web": {"port": 2}})
    with pytest.raises(BadInputError):
        await roles.apply({"web": {"port": 99}})
    with pytest.raises(NotFoundError):
        await roles.apply({"web": {"port": 3}, "mail": {}})
    assert stored(tmp_path) == {"web": {"port": 2}}
    assert (await roles.status())["web"].healthy


async def test_fields_of_a_newer_manager_are_dropped(roles: Roles) -> None:
    await roles.apply({"web": {"port": 2, "newer": True}})
    assert Recorder.applied == [("web", 2)]


async def test_on_a_full_disk_nothing_is_begun_and_what_was_wanted_stays(
    roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await roles.apply({"web": {"port": 2}})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError):
            await roles.apply({"web": {"port": 3}})
    assert Recorder.applied == [("web", 2)]
    assert stored(tmp_path) == {"web": {"port": 2}}
    assert not list(tmp_path.glob(f"{files.TEMPORARY_PREFIX}*"))
    await roles.apply({"web": {"port": 3}})
    assert Recorder.applied[-1] == ("web", 3)
    assert stored(tmp_path) == {"web": {"port": 3}}


# -- restarts, stops --------------------------------------------------------------------------------------------------


async def test_after_a_restart_everything_is_made_so_again(roles: Roles, tmp_path: Path) -> None:
    await roles.apply({"web": {"port": 2}, "php": {"port": 3}})
    roles.close()
    again = fresh(tmp_path)
    await again.restore()
    assert sorted(Recorder.applied[2:]) == [("php", 3), ("web", 2)]
    assert {role: one.healthy for role, one in (await again.status()).items()} == {"web": True, "php": True}
    await again.apply({"web": {"port": 2}})
    assert len(Recorder.applied) == 4


async def test_what_cannot_be_restored_stays_wanted_and_holds_nothing_else_up(roles: Roles, tmp_path: Path) -> None:
    await roles.apply({"web": {"port": 2}, "php": {"port": 3}})
    (tmp_path / "roles.json").write_text(
        json.dumps(
            {
                role: {"wanted": config, "made": config}
                for role, config in {"web": {"port": 2, "code": "0" * 64}, "php": {"port": 3}}.items()
            }
        )
    )
    again = fresh(tmp_path)
    await again.restore()
    status = await again.status()
    assert (status["web"].healthy, status["php"].healthy) == (False, True)
    assert set(stored(tmp_path)) == {"web", "php"}


async def test_a_crash_in_the_middle_of_a_restore_forgets_no_role(roles: Roles, tmp_path: Path) -> None:
    await roles.apply({"web": {"port": 2}, "php": {"port": 3}})
    again = fresh(tmp_path)
    Recorder.hold = asyncio.Event()
    restoring = asyncio.create_task(again.restore())
    await until(lambda: len(Recorder.on_disk) >= 3)
    restoring.cancel()
    await asyncio.gather(restoring, return_exceptions=True)
    assert stored(tmp_path) == {"web": {"port": 2}, "php": {"port": 3}}


async def test_without_a_file_there_is_nothing_to_restore(roles: Roles) -> None:
    await roles.restore()
    assert await roles.status() == {}


async def test_a_stopped_role_is_forgotten_also_after_a_restart(roles: Roles, tmp_path: Path) -> None:
    await roles.apply({"web": {}, "php": {}})
    await roles.stop("web", 3.0)
    await roles.stop("web", 3.0)  # gone is fine
    await roles.stop("mail", 3.0)
    assert Recorder.stopped == [("web", 3.0)]
    assert set(stored(tmp_path)) == {"php"}
    again = fresh(tmp_path)
    await again.restore()
    assert set(await again.status()) == {"php"}


async def test_an_apply_that_waited_for_a_stop_is_refused_and_starts_nothing(roles: Roles, tmp_path: Path) -> None:
    Recorder.hold = asyncio.Event()
    first = asyncio.create_task(roles.apply({"web": {"port": 2}}))
    await until(lambda: Recorder.on_disk)
    stopping = asyncio.create_task(roles.stop("web", 0))
    await asyncio.sleep(0)
    late = asyncio.create_task(roles.apply({"web": {"port": 3}}))
    await asyncio.sleep(0)
    Recorder.hold.set()
    await asyncio.gather(first, stopping)
    with pytest.raises(ConflictError, match="stopped meanwhile"):
        await late
    assert Recorder.applied == [("web", 2)]
    assert stored(tmp_path) == {}


async def test_stop_all_ends_every_role(roles: Roles, tmp_path: Path) -> None:
    await roles.apply({"web": {}, "php": {}})
    await roles.stop_all(1.0)
    assert sorted(Recorder.stopped) == [("php", 1.0), ("web", 1.0)]
    assert stored(tmp_path) == {}


# -- health and metrics -----------------------------------------------------------------------------------------------


async def test_a_role_is_as_its_agent_says(roles: Roles) -> None:
    await roles.apply({"web": {}})
    assert (await roles.status())["web"].healthy
    Recorder.sick = "2 of 3 workers"
    status = (await roles.status())["web"]
    assert (status.healthy, status.detail) == (False, "2 of 3 workers")
    Recorder.blind = CommandFailedError("cannot ask nginx")
    status = (await roles.status())["web"]
    assert (status.healthy, status.detail) == (False, "cannot ask nginx")


async def test_metrics_that_cannot_be_taken_are_none(roles: Roles) -> None:
    await roles.apply({"web": {}})
    await roles.measure()
    assert (await roles.status())["web"].metrics == {"request_rate": 2.0}
    Recorder.blind = CommandFailedError("cannot ask nginx")
    await roles.measure()
    Recorder.blind = None
    assert (await roles.status())["web"].metrics == {}


# -- code -------------------------------------------------------------------------------------------------------------


async def test_code_that_was_not_sent_is_missing_and_can_be_sent(roles: Roles, tmp_path: Path) -> None:
    sha256, blob = make_blob(tmp_path)
    with pytest.raises(BlobMissingError) as caught:
        await roles.apply({"web": {"code": sha256}})
    assert caught.value.value == sha256
    assert not roles.has_blob(sha256)
    await roles.receive_blob(sha256, body(blob[:10], blob[10:]))
    assert roles.has_blob(sha256)
    await roles.apply({"web": {"code": sha256}})
    assert (await roles.unpacked(sha256) / "index.php").read_text() == "hello"


async def test_a_blob_that_is_another_than_announced_is_refused_and_not_kept(roles: Roles, tmp_path: Path) -> None:
    sha256, blob = make_blob(tmp_path)
    with pytest.raises(BadInputError, match="instead of"):
        await roles.receive_blob(sha256, body(blob[:-1]))
    assert not roles.has_blob(sha256)
    assert list((tmp_path / "blobs").iterdir()) == []


async def test_a_blob_that_is_cut_off_is_not_kept(roles: Roles, tmp_path: Path) -> None:
    sha256, blob = make_blob(tmp_path)

    async def cut() -> AsyncIterator[bytes]:
        yield blob[:10]
        raise BadInputError("the upload was cut off")

    with pytest.raises(BadInputError):
        await roles.receive_blob(sha256, cut())
    assert list((tmp_path / "blobs").iterdir()) == []


@pytest.mark.parametrize("name", ["../roles.json", "..", "x/../../y", "", "A" * 64, "0" * 63])
async def test_a_blob_has_the_name_of_a_hash_and_no_other(roles: Roles, tmp_path: Path, name: str) -> None:
    (tmp_path / "roles.json").write_text("{}")
    for folder in ("blobs", "code"):
        (tmp_path / folder).mkdir()
    assert not roles.has_blob(name)
    with pytest.raises((BadInputError, BlobMissingError)):
        await roles.unpacked(name)
    with pytest.raises(BadInputError):
        await roles.receive_blob(name, body(b"x"))


async def test_two_roles_that_unpack_the_same_code_at_once_share_it(roles: Roles, tmp_path: Path) -> None:
    sha256, blob = make_blob(tmp_path)
    await roles.receive_blob(sha256, body(blob))
    first, second = await asyncio.gather(roles.unpacked(sha256), roles.unpacked(sha256))
    assert first == second


async def test_code_no_longer_needed_is_forgotten_and_the_rest_is_kept(roles: Roles, tmp_path: Path) -> None:
    shas = []
    for word in ("one", "two", "three"):
        sha256, blob = make_blob(tmp_path, word)
        await roles.receive_blob(sha256, body(blob))
        await roles.unpacked(sha256)
        shas.append(sha256)
    await roles.forget_unpacked(frozenset({shas[1]}))
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [shas[1]]
    assert [path.name for path in (tmp_path / "code").iterdir()] == [shas[1][:16]]
    await roles.forget_unpacked(frozenset())
    assert not roles.has_blob(shas[1])


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_logs(roles: Roles, tmp_path: Path) -> Roles:
    (tmp_path / "logs" / "web").mkdir(parents=True)
    (tmp_path / "logs" / "web" / "access.log").write_text("0123456789")
    (tmp_path / "logs" / "web" / "nginx.out").write_bytes(b"\xffoops")
    (tmp_path / "logs" / "web" / "secret.key").write_text("no log")
    (tmp_path / "agent.log").write_text("")
    return roles


def test_logs_have_names_and_sizes(with_logs: Roles) -> None:
    assert with_logs.log_names() == {"agent.log": 0, "web.access.log": 10, "web.nginx.out": 5}


@pytest.mark.parametrize(
    ("offset", "limit", "text", "following"),
    [
        (0, 100, "0123456789", 10),
        (0, 4, "0123", 4),
        (4, 4, "4567", 8),
        (10, 4, "", 10),
        (11, 4, "", 10),
        (10**18, 4, "", 10),
        (-3, 100, "789", 10),
        (-3, 1, "7", 8),
        (-100, 100, "0123456789", 10),
    ],
)
def test_a_log_is_read_by_pieces(with_logs: Roles, offset: int, limit: int, text: str, following: int) -> None:
    chunk = with_logs.read_log("web.access.log", offset, limit)
    assert (chunk.text, chunk.next, chunk.size) == (text, following, 10)


def test_a_log_that_is_no_text_is_shown_as_well_as_it_goes(with_logs: Roles) -> None:
    assert with_logs.read_log("web.nginx.out", 0, 10).text == "\N{REPLACEMENT CHARACTER}oops"


@pytest.mark.parametrize("name", ["web.secret.key", "roles.json", "../agent.log", "/etc/passwd", "", "web"])
def test_there_is_no_way_to_other_files(with_logs: Roles, name: str) -> None:
    with pytest.raises(NotFoundError):
        with_logs.read_log(name, 0, 10)


def test_a_character_that_is_cut_by_the_limit_is_not_lost(with_logs: Roles, tmp_path: Path) -> None:
    (tmp_path / "agent.log").write_text("aaaé€€")
    text, offset = "", 0
    for _ in range(10):
        chunk = with_logs.read_log("agent.log", offset, 4)
        text, offset = text + chunk.text, chunk.next
    assert text == "aaaé€€"


async def test_what_was_only_begun_when_the_daemon_ended_is_put_back_to_what_it_was(
    roles: Roles, tmp_path: Path
) -> None:
    known = {"web": {"wanted": {"port": 9}, "made": {"port": 2}}, "php": {"wanted": {"port": 3}, "made": None}}
    (tmp_path / "roles.json").write_text(json.dumps(known))

    await roles.restore()

    status = await roles.status()
    assert stored(tmp_path) == {"web": {"port": 2}, "php": {"port": 3}}
    assert status["web"].healthy
    assert not status["php"].healthy  # known, so that it can be stopped, and left to the manager
    assert status["php"].detail == "not applied yet"
