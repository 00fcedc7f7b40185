"""Archives that strangers send: looked through without writing, then unpacked whole or not at all.

What an archive is, is told by its content. Everything here blocks: call it in a thread.
"""

import contextlib
import errno
import gzip
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from conpaas.core import archive_formats as formats
from conpaas.core import files, units
from conpaas.core.archive_formats import Kind, Member
from conpaas.core.errors import BadArchiveError

MAX_PART_BYTES = 255  # of one name, by the file system
MAX_PATH_BYTES = 2048  # of a whole name: Linux takes 4096 with the directory we unpack into
CHUNK_BYTES = 1024 * 1024

_TEMPORARY_PREFIX = ".unpack-"
_DRIVE = re.compile(r"[A-Za-z]:")
_FILE_MODE, _PROGRAM_MODE, _DIRECTORY_MODE = 0o644, 0o755, 0o755

_Parts = tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold. A zip or tar that grows more than `ratio` times is a bomb."""

    bytes: int = 1024**3
    """Sum of the sizes of the unpacked files."""
    files: int = 50_000
    """Files and directories."""
    ratio: int = 200
    """Unpacked over packed size, once more than 16 MiB are unpacked."""


@dataclass(frozen=True)
class Summary:
    """What an archive holds: regular files, and the sum of their sizes in bytes."""

    kind: Kind
    files: int
    bytes: int


DEFAULT_LIMITS = Limits()


def check(archive: Path, limits: Limits = DEFAULT_LIMITS) -> Summary:
    """Read the whole archive without writing anything.

    Raises BadArchiveError for what is no archive, is damaged, or has a member that is not a plain file or
    directory inside the archive; TooLargeError beyond `limits`. The error's `value` is the name of the
    member.
    """
    return _walk(archive, limits, on_directory=_ignore, on_file=_read_to_end)


def unpack(archive: Path, target: Path, limits: Limits = DEFAULT_LIMITS, *, strip_single_root: bool = False) -> Summary:
    """Unpack the archive to the new directory `target`, which appears whole at the end or not at all.

    Idempotent: a `target` that exists is taken as done and left alone. Files get mode 0644, or 0755 if their
    owner may run them, directories 0755; users and groups are ignored. With `strip_single_root`, an archive
    that holds nothing but one directory is unpacked without it. Raises as `check`, and DiskFullError; nothing
    is left after an error. A crash of the machine in the next seconds may still cost contents: unpack again
    if it was not shut down properly.
    """
    if target.exists():
        return _summary_of(target, formats.recognise(archive))
    with files.disk_full_reported(target), _scratch_beside(target) as scratch:
        tree = _Writer(scratch)
        summary = _walk(archive, limits, on_directory=tree.make_directory, on_file=tree.write_file)
        _rename_to_new(_single_root(scratch) if strip_single_root else scratch, target)
    return summary


def pack(directory: Path, target: Path) -> None:
    """Write a tar.gz of `directory` to `target`, atomically; equal trees give equal bytes.

    `.git` is left out, as are times, owners and all of the mode but whether a file is a program. Raises
    BadArchiveError for a link or a device (nobody would unpack it) and DiskFullError.
    """
    members = [(path, path.relative_to(directory).as_posix()) for path in _tree(directory) if path != target]
    with files.disk_full_reported(target), files.temporary_beside(target) as (temporary, packed):
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path, name in members:
                _add(tar, path, name)
        packed.flush()
        os.fsync(packed.fileno())
        temporary.replace(target)


# Looking through, the same for every kind


_OnDirectory = Callable[[_Parts], None]
_OnFile = Callable[[_Parts, Member, Iterator[bytes]], None]


class _Meter:
    """Counts the unpacked bytes and stops at the first one too many."""

    def __init__(self, packed: int, limits: Limits) -> None:
        self._packed, self._limits = packed, limits
        self.unpacked = 0

    def foresee(self, count: int, name: str) -> None:
        """Refuse `count` more bytes if they would be too many."""
        total = self.unpacked + count
        if total > self._limits.bytes:
            raise formats.too_large(f"more than {units.show_size(self._limits.bytes)} unpacked", name)
        if total > formats.RATIO_FREE_BYTES and total > self._limits.ratio * self._packed:
            raise formats.too_large(f"more than {self._limits.ratio} times its packed size", name)

    def count(self, count: int, name: str) -> None:
        self.foresee(count, name)
        self.unpacked += count


class _Names:
    """The tree of names so far: refuses two members that want one place."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._directories: set[_Parts] = set()
        self._files: set[_Parts] = set()

    def add(self, parts: _Parts, member: Member) -> None:
        for depth in range(1, len(parts) + member.is_directory):
            self._directories.add(parts[:depth])
            if parts[:depth] in self._files:
                raise formats.bad_member(member.name, "lies below a file")
        if not member.is_directory:
            if not parts:
                raise formats.bad_member(member.name, "is a file without a name")
            if parts in self._directories or parts in self._files:
                raise formats.bad_member(member.name, "is in the archive twice")
            self._files.add(parts)
        if len(self._directories) + len(self._files) > self._limit:
            raise formats.too_large(f"more than {self._limit} files and directories", member.name)

    @property
    def files(self) -> int:
        return len(self._files)


def _walk(archive: Path, limits: Limits, *, on_directory: _OnDirectory, on_file: _OnFile) -> Summary:
    """Check every member, and hand it on in the order of the archive."""
    kind = formats.recognise(archive)
    meter, names = _Meter(archive.stat().st_size, limits), _Names(limits.files)
    with formats.damage_reported(archive.name):
        entries = formats.entries(archive, kind, max_files=limits.files, max_ratio=limits.ratio)
        for member, content in entries:
            parts = _safe_parts(member.name)
            names.add(parts, member)
            if member.is_directory:
                on_directory(parts)
            else:
                meter.foresee(member.size, member.name)
                on_file(parts, member, _chunks(member, content, meter))
    if not names.files:
        raise BadArchiveError(
            "the archive holds no files", value=archive.name, hint="pack the files of your application"
        )
    return Summary(kind, names.files, meter.unpacked)


def _chunks(member: Member, content: Callable[[], IO[bytes]], meter: _Meter) -> Iterator[bytes]:
    """Read the content of one member, to its very end, which is where damage shows."""
    size = 0
    with formats.damage_reported(member.name), content() as file:
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
            meter.count(len(chunk), member.name)
            yield chunk
    if size != member.size:
        raise formats.bad_member(member.name, f"has {size} bytes and not {member.size}", hint=formats.DAMAGE_HINT)


def _safe_parts(name: str) -> _Parts:
    """Split a member's name at its slashes; raise BadArchiveError if it could lead out of the tree."""
    if "\0" in name:
        raise formats.bad_member(name, "has a zero byte in its name")
    if name.startswith("/") or _DRIVE.match(name):
        raise formats.bad_member(name, "has an absolute path")
    if "\\" in name:
        raise formats.bad_member(name, "has a backslash in its name", hint="pack with '/' between directories")
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if ".." in parts:
        raise formats.bad_member(name, "leads out of the archive")
    if len(os.fsencode(name)) > MAX_PATH_BYTES or any(len(os.fsencode(part)) > MAX_PART_BYTES for part in parts):
        raise formats.bad_member(
            name, "has a name that is too long", hint=f"at most {MAX_PART_BYTES} bytes per directory or file"
        )
    return parts


# Writing


class _Writer:
    """Writes checked members into an empty directory that is ours alone."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: set[_Parts] = set()

    def make_directory(self, parts: _Parts) -> None:
        for depth in range(1, len(parts) + 1):
            if parts[:depth] not in self._made:
                directory = self._root.joinpath(*parts[:depth])
                directory.mkdir()
                directory.chmod(_DIRECTORY_MODE)
                self._made.add(parts[:depth])

    def write_file(self, parts: _Parts, member: Member, chunks: Iterator[bytes]) -> None:
        self.make_directory(parts[:-1])
        with self._root.joinpath(*parts).open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            os.fchmod(file.fileno(), _mode(is_program=member.is_program))


def _ignore(parts: _Parts) -> None:
    """Do nothing with a directory."""


def _read_to_end(parts: _Parts, member: Member, chunks: Iterator[bytes]) -> None:  # noqa: ARG001
    """Read, for the checks in reading alone."""
    for _ in chunks:
        pass


@contextlib.contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """Make an empty directory beside `target`; at the end it is gone with all in it, unless renamed."""
    scratch = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=target.parent))
    try:
        scratch.chmod(_DIRECTORY_MODE)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _single_root(directory: Path) -> Path:
    """Return the one directory that is all that `directory` holds, else `directory` itself."""
    children = list(directory.iterdir())
    return children[0] if len(children) == 1 and children[0].is_dir() else directory


def _rename_to_new(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as exc:
        if exc.errno not in {errno.ENOTEMPTY, errno.EEXIST}:  # else somebody was first, with the same
            raise


def _summary_of(directory: Path, kind: Kind) -> Summary:
    sizes = [path.lstat().st_size for path in directory.rglob("*") if path.is_file()]
    return Summary(kind, len(sizes), sum(sizes))


def _tree(directory: Path) -> Iterator[Path]:
    """Give all that is in `directory`, sorted, parents first, without `.git`."""
    for path in sorted(directory.iterdir()):
        if path.name == ".git":
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _tree(path)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    """Add one file or directory to a tar, with nothing in its header that differs between machines."""
    status = path.lstat()
    info = tarfile.TarInfo(name)
    if stat.S_ISLNK(status.st_mode):
        raise formats.link(name)
    if stat.S_ISDIR(status.st_mode):
        info.type, info.mode = tarfile.DIRTYPE, _DIRECTORY_MODE
        tar.addfile(info)
    elif stat.S_ISREG(status.st_mode):
        info.size, info.mode = status.st_size, _mode(is_program=bool(status.st_mode & stat.S_IXUSR))
        with path.open("rb") as file:
            tar.addfile(info, file)
    else:
        raise formats.bad_member(name, formats.SPECIAL, hint=formats.PLAIN_HINT)


def _mode(*, is_program: bool) -> int:
    return _PROGRAM_MODE if is_program else _FILE_MODE
