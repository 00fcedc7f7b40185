"""Files that are whole or absent: atomic writes, and uploads streamed to disk.

Every file is written under a temporary name beside its target and renamed; an error leaves nothing behind.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from conpaas.core import units
from conpaas.core.errors import BadInputError, DiskFullError, TooLargeError

CHUNK_BYTES = 1024 * 1024  # one thread hop per MiB costs nothing beside the write itself
TEMPORARY_PREFIX = ".new-"


@contextlib.contextmanager
def disk_full_reported(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" inside the block into DiskFullError about `path`."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise DiskFullError(
            f"no space left to write {path.name}",
            value=path.name,
            hint="free space on the disk that holds it, then try again",
        ) from exc


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open a new file, mode 0600, beside `target`; at the end it is closed and, unless renamed, gone."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield Path(name), file
    finally:
        Path(name).unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write `data` (text as UTF-8) to `path`: readers see the old file or the new one, also after a crash.

    The file has exactly `mode`, whatever the umask, and never a wider one on the way. What can be made again need
    not be `durable`: nobody waits for the disk then, and after a power cut it may be the old one, damaged or missing.
    Raises DiskFullError; no temporary file is left after any error.
    """
    content = data.encode() if isinstance(data, str) else data
    with disk_full_reported(path), temporary_beside(path) as (temporary, file):
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        if durable:
            os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Tell how many bytes an unprivileged process can still write to the file system of `path`."""
    return shutil.disk_usage(path).free


async def receive(stream: AsyncIterator[bytes], target: Path, *, limit: int) -> tuple[str, int]:
    """Write `stream` to `target`, replacing it; return the content's SHA-256 in hex and its size in bytes.

    At most about 1 MiB is held in memory. Raises TooLargeError beyond `limit` bytes, DiskFullError, and
    whatever the stream raises. After an error or a cancel there is no new file: `target` is as it was before.
    """
    async with _spooled(stream, target, limit=limit) as spool:
        spool.path.replace(target)
        await asyncio.to_thread(sync_directory, target.parent)
        return spool.sha256, spool.size


async def receive_blob(
    stream: AsyncIterator[bytes], directory: Path, *, limit: int, expect_sha256: str | None = None
) -> tuple[str, int]:
    """Write `stream` to `directory` under the SHA-256 of its content; return that name and the size in bytes.

    Idempotent: a blob that is there already is left alone. Raises as `receive`, and BadInputError when the
    content is not the one of `expect_sha256`; the directory then is as it was before.
    """
    async with _spooled(stream, directory / "blob", limit=limit) as spool:
        if expect_sha256 is not None and spool.sha256 != expect_sha256.lower():
            raise BadInputError(
                f"received content {spool.sha256} instead of {expect_sha256}",
                value=spool.sha256,
                hint="the upload was damaged on its way: send it again",
            )
        target = directory / spool.sha256
        if not target.exists():
            spool.path.replace(target)
            await asyncio.to_thread(sync_directory, directory)
        return spool.sha256, spool.size


@dataclass(frozen=True)
class _Spool:
    """A stream, received and safe on disk under a temporary name."""

    path: Path
    sha256: str
    size: int


@contextlib.asynccontextmanager
async def _spooled(stream: AsyncIterator[bytes], target: Path, *, limit: int) -> AsyncIterator[_Spool]:
    """Receive `stream` into a file beside `target`, which is gone at the end unless the block renames it.

    A cancel may leave a thread writing; closing waits for it, for a buffered file has a lock.
    """
    digest, size = hashlib.sha256(), 0
    with disk_full_reported(target), temporary_beside(target) as (temporary, file):

        def append(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        async for data in _in_large_chunks(stream):
            size += len(data)
            if size > limit:
                raise TooLargeError(
                    f"the upload is larger than {units.show_size(limit)}",
                    value=limit,
                    hint="send less, or ask the administrator to raise the limit",
                )
            await asyncio.to_thread(append, data)
        await asyncio.to_thread(_flush_to_disk, file)
        yield _Spool(temporary, digest.hexdigest(), size)


async def _in_large_chunks(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join the small pieces a network gives into pieces of at least CHUNK_BYTES, the last one excepted."""
    buffer = bytearray()
    async for piece in stream:
        buffer += piece
        if len(buffer) >= CHUNK_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
