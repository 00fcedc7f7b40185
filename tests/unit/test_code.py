"""Code versions are kept whole, shared where they are equal, and never lost while somebody needs them."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select

from conpaas.core import archive, files
from conpaas.core.errors import (
    BadArchiveError,
    BadInputError,
    ConflictError,
    DiskFullError,
    NotFoundError,
    TooLargeError,
)
from conpaas.core.messages.model import Wanted
from conpaas.core.states import OperationState
from conpaas.director.code import CodeStore
from conpaas.director.db.models import EventRow, Operation, Service
from conpaas.director.settings import Limits
from tests.fakes.code_rig import WHEN, Rig, open_rig, stream, tar_gz

SITE = tar_gz({"index.php": b"<?php echo 1;"})
OTHER = tar_gz({"index.php": b"<?php echo 2;"})


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    limits = Limits(upload_bytes=1_000_000, code_versions=4)
    async with open_rig(tmp_path, monkeypatch, limits) as rig:
        yield rig


async def versions(rig: Rig, service: str = "svc-a") -> list[str]:
    return [view.id for view in await rig.store.list(service)]


async def upload(rig: Rig, content: bytes = SITE, *, service: str = "svc-a", filename: str = "site.tar.gz") -> str:
    return (await rig.store.upload(service, filename, "words", stream(content), "user:usr-a")).id


async def test_a_new_service_has_the_default_version_and_it_is_active(rig: Rig) -> None:
    [view] = await rig.store.list("svc-a")

    assert (view.id, view.filename, view.active) == ("code-default", "code-default.tar.gz", True)
    assert archive.check(rig.store.path(view.sha256)).files == 1


async def test_an_upload_is_listed_first_downloadable_and_not_yet_active(rig: Rig) -> None:
    version = await upload(rig)

    newest, default = await rig.store.list("svc-a")
    assert (newest.id, newest.filename, newest.description, newest.active) == (version, "site.tar.gz", "words", False)
    assert default.active
    assert rig.store.path(newest.sha256).read_bytes() == SITE
    assert (await rig.store.get("svc-a", version)).size == len(SITE)
    assert rig.leftovers() == []


async def test_an_upload_is_written_to_the_event_log(rig: Rig) -> None:
    version = await upload(rig)

    async with rig.db.read() as session:
        event = (await session.scalars(select(EventRow))).one()
    assert (event.kind, event.actor, event.service_id, event.user_id) == ("code-added", "user:usr-a", "svc-a", "usr-a")
    assert version in event.message


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", BadArchiveError),
        (b"hello, world" * 100, BadArchiveError),
        (SITE[:-20], BadArchiveError),
        (tar_gz({"../evil": b"x"}), BadArchiveError),
        (tar_gz({"/etc/evil": b"x"}), BadArchiveError),
        (tar_gz({"a": bytes(40_000_000)}), TooLargeError),
        (b"x" * 1_000_001, TooLargeError),
    ],
    ids=["empty", "no archive", "cut", "up", "absolute", "bomb", "too large"],
)
async def test_a_bad_upload_leaves_nothing(rig: Rig, content: bytes, error: type[Exception]) -> None:
    before = rig.blobs()

    with pytest.raises(error):
        await upload(rig, content)

    assert await versions(rig) == ["code-default"]
    assert (rig.blobs(), rig.leftovers()) == (before, [])


async def test_an_upload_that_is_cut_off_leaves_nothing(rig: Rig) -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield SITE[:50]
        raise BadInputError("the upload was cut off")

    with pytest.raises(BadInputError, match="cut off"):
        await rig.store.upload("svc-a", "site.tar.gz", "", cut(), "user:usr-a")

    assert (await versions(rig), rig.leftovers()) == (["code-default"], [])


async def test_an_upload_that_is_cancelled_leaves_nothing(rig: Rig) -> None:
    begun = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield SITE[:50]
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(rig.store.upload("svc-a", "site.tar.gz", "", slow(), "user:usr-a"))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (await versions(rig), rig.leftovers()) == (["code-default"], [])


async def test_a_full_disk_is_an_expected_error_and_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rig.blobs()

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(DiskFullError):
            await upload(rig)

    assert (rig.blobs(), rig.leftovers()) == (before, [])
    async with rig.db.read() as session:
        assert (await session.scalars(select(EventRow))).all() == []


async def test_a_full_disk_when_the_blob_is_placed_makes_no_version(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path) -> None:
        if len(directory.name) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = rig.blobs()
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_directory", full)
        with pytest.raises(DiskFullError):
            await upload(rig)

    assert await versions(rig) == ["code-default"]
    await rig.store.collect_garbage()
    assert (rig.blobs(), rig.leftovers()) == (before, [])


async def test_what_a_director_that_died_was_receiving_is_gone_after_its_restart(rig: Rig) -> None:
    (rig.settings.data_dir / "blobs" / "incoming" / "half").write_bytes(b"half")

    store = CodeStore(rig.db, rig.settings.data_dir, rig.settings)

    assert rig.leftovers() == []
    assert [view.id for view in await store.list("svc-a")] == ["code-default"]


async def test_too_many_versions_are_refused_before_anything_is_read(rig: Rig) -> None:
    for _ in range(3):
        await upload(rig)

    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("nothing is read")
        yield b""

    with pytest.raises(ConflictError, match="4 code versions, and 4 is the limit"):
        await rig.store.upload("svc-a", "site.tar.gz", "", unread(), "user:usr-a")


async def test_uploads_at_once_do_not_get_past_the_limit(rig: Rig) -> None:
    results = await asyncio.gather(*(upload(rig) for _ in range(8)), return_exceptions=True)

    assert sum(isinstance(result, str) for result in results) == 3
    assert all(isinstance(result, str | ConflictError) for result in results)
    assert len(await versions(rig)) == 4


async def test_equal_uploads_share_one_blob_until_the_last_is_deleted(rig: Rig) -> None:
    await rig.add_service("svc-b", name="other")
    first, second = await upload(rig), await upload(rig, service="svc-b")
    [blob] = set(rig.blobs()) - {(await rig.store.get("svc-a", "code-default")).sha256}

    await rig.store.delete("svc-a", first)
    assert blob in rig.blobs()
    await rig.store.delete("svc-b", second)
    assert blob not in rig.blobs()


async def test_deleting_and_uploading_the_same_at_once_keeps_what_is_listed(rig: Rig) -> None:
    version = await upload(rig)

    for _ in range(10):
        _, version = await asyncio.gather(rig.store.delete("svc-a", version), upload(rig))
        view = await rig.store.get("svc-a", version)
        assert rig.store.path(view.sha256).read_bytes() == SITE


async def test_the_active_version_stays(rig: Rig) -> None:
    with pytest.raises(ConflictError, match="code-default is active"):
        await rig.store.delete("svc-a", "code-default")


async def test_a_version_that_an_operation_may_bring_back_stays_till_its_end(rig: Rig) -> None:
    old, new = await upload(rig), await upload(rig, OTHER)
    async with rig.db.write() as session:
        service = (await session.scalars(select(Service))).one()
        service.wanted = Wanted(code=new).model_dump(mode="json")
        operation = Operation(
            id="op-1",
            service_id="svc-a",
            user_id="usr-a",
            kind="activate",
            generation=2,
            before=Wanted(code=old).model_dump(mode="json"),
            after=service.wanted,
            created=WHEN,
            deadline=WHEN,
        )
        session.add(operation)

    with pytest.raises(ConflictError, match="while the operation 'activate' is under way"):
        await rig.store.delete("svc-a", old)
    async with rig.db.write() as session:
        (await session.scalars(select(Operation))).one().state = OperationState.DONE
    await rig.store.delete("svc-a", old)

    assert await versions(rig) == [new, "code-default"]


async def test_strange_ids_are_not_found(rig: Rig) -> None:
    await rig.add_service("svc-b", name="other")
    version = await upload(rig, service="svc-b")

    for service, wrong in (("svc-a", version), ("svc-a", "code-nothin"), ("svc-nothing", "code-default")):
        with pytest.raises(NotFoundError):
            await rig.store.get(service, wrong)
        with pytest.raises(NotFoundError):
            await rig.store.delete(service, wrong)
    with pytest.raises(NotFoundError):
        await upload(rig, service="svc-nothing")


async def test_a_service_that_takes_no_code_says_so(rig: Rig) -> None:
    await rig.add_service("svc-bare", name="bare", kind="bare")

    with pytest.raises(ConflictError, match="a bare service takes no code"):
        await upload(rig, service="svc-bare")
    assert await versions(rig, "svc-bare") == []


async def test_the_versions_and_repository_of_a_terminated_service_are_collected(rig: Rig) -> None:
    await rig.add_service("svc-b", name="other")
    await upload(rig)
    await upload(rig, OTHER, service="svc-b")
    kept = await rig.store.repositories.open("svc-b")
    gone = await rig.store.repositories.open("svc-a")
    async with rig.db.write() as session:
        service = (await session.scalars(select(Service).where(Service.id == "svc-a"))).one()
        service.terminated = WHEN
    (rig.store.path("ab" * 32).parent).mkdir(exist_ok=True)
    rig.store.path("ab" * 32).write_bytes(b"left by a crash")

    await rig.store.collect_garbage()

    assert {(await rig.store.get("svc-b", version)).sha256 for version in await versions(rig, "svc-b")} == set(
        rig.blobs()
    )
    assert (kept.exists(), gone.exists()) == (True, False)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("site.tar.gz", "site.tar.gz"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\site.zip", "site.zip"),
        ("a\x00b\r\nc.zip", "abc.zip"),
        ("..", "code.tar.gz"),
        ("", "code.tar.gz"),
        ("<img src=x>'\"🎉.zip", "<img src=x>'\"🎉.zip"),
        ("x" * 10_000, "x" * 200),
    ],
)
async def test_a_file_name_is_only_a_name(rig: Rig, given: str, kept: str) -> None:
    version = await upload(rig, filename=given)

    assert (await rig.store.get("svc-a", version)).filename == kept
