import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

from conpaas.core import files
from conpaas.core.errors import BadInputError, DiskFullError, TooLargeError

MIB = 1024 * 1024


async def stream_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


async def endless(started: asyncio.Event) -> AsyncIterator[bytes]:
    yield b"x" * (2 * MIB)
    started.set()
    await asyncio.Event().wait()


async def broken() -> AsyncIterator[bytes]:
    yield b"x" * MIB
    raise ConnectionResetError("the client went away")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("data", ["grün", "grün".encode()])
def test_a_file_is_written_whole_as_text_or_bytes(tmp_path: Path, data: str | bytes) -> None:
    files.write_atomically(tmp_path / "a", data)

    assert (tmp_path / "a").read_text(encoding="utf-8") == "grün"
    assert names(tmp_path) == ["a"]


def test_a_file_has_the_mode_asked_for_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        files.write_atomically(tmp_path / "open", "")
        files.write_atomically(tmp_path / "secret", "", mode=0o600)
    finally:
        os.umask(before)

    assert (tmp_path / "open").stat().st_mode & 0o7777 == 0o644
    assert (tmp_path / "secret").stat().st_mode & 0o7777 == 0o600


def test_a_reader_keeps_the_old_file_while_a_new_one_is_written(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "a", "old")
    with (tmp_path / "a").open() as reader:
        files.write_atomically(tmp_path / "a", "new")

        assert reader.read() == "old"
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    with pytest.raises(DiskFullError, match="no space left to write a"):
        files.write_atomically(tmp_path / "a", "new")

    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "missing" / "a", "")


def test_free_space_is_counted_in_bytes(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path) > 0


@pytest.mark.parametrize("pieces", [(), (b"",), (b"a", b"b" * 3 * MIB, b"c"), tuple(b"%d" % i for i in range(1000))])
async def test_a_received_stream_is_stored_and_hashed(tmp_path: Path, pieces: tuple[bytes, ...]) -> None:
    content = b"".join(pieces)

    result = await files.receive(stream_of(*pieces), tmp_path / "a", limit=10 * MIB)

    assert result == (hashlib.sha256(content).hexdigest(), len(content))
    assert (tmp_path / "a").read_bytes() == content
    assert names(tmp_path) == ["a"]


async def test_a_stream_of_exactly_the_limit_is_received(tmp_path: Path) -> None:
    assert (await files.receive(stream_of(b"x" * MIB), tmp_path / "a", limit=MIB))[1] == MIB


async def test_a_stream_over_the_limit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TooLargeError, match="larger than 1M"):
        await files.receive(stream_of(b"x" * MIB, b"x"), tmp_path / "a", limit=MIB)

    assert names(tmp_path) == []


@pytest.mark.usefixtures("full_disk")
async def test_a_stream_that_fills_the_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError):
        await files.receive(stream_of(b"x"), tmp_path / "a", limit=MIB)

    assert names(tmp_path) == []


async def test_a_stream_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    with pytest.raises(ConnectionResetError):
        await files.receive(broken(), tmp_path / "a", limit=10 * MIB)

    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


async def test_a_cancelled_upload_leaves_nothing(tmp_path: Path) -> None:
    started = asyncio.Event()
    task = asyncio.create_task(files.receive(endless(started), tmp_path / "a", limit=10 * MIB))
    await started.wait()
    assert len(names(tmp_path)) == 1

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert names(tmp_path) == []


async def test_a_blob_is_named_by_its_hash_and_stored_once(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"hello").hexdigest()

    for _ in range(2):
        assert await files.receive_blob(stream_of(b"hello"), tmp_path, limit=10) == (sha256, 5)

    assert names(tmp_path) == [sha256]


async def test_a_blob_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    sha256, _ = await files.receive_blob(stream_of(b"hello"), tmp_path, limit=10)
    inode = (tmp_path / sha256).stat().st_ino

    await files.receive_blob(stream_of(b"hello"), tmp_path, limit=10, expect_sha256=sha256.upper())

    assert (tmp_path / sha256).stat().st_ino == inode


async def test_a_blob_other_than_the_expected_one_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="instead of") as caught:
        await files.receive_blob(stream_of(b"hello"), tmp_path, limit=10, expect_sha256="0" * 64)

    assert caught.value.value == hashlib.sha256(b"hello").hexdigest()
    assert names(tmp_path) == []
