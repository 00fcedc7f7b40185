"""Archives that strangers send: looked through without writing, then unpacked whole or not at all.

What an archive is, is told by its content. Everything here blocks: call it in a thread.
"""

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from conpaas.core import files, units
from conpaas.core.errors import BadArchiveError, TooLargeError

Kind = Literal["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"]

RATIO_FREE_BYTES = 16 * 1024 * 1024  # below this a high ratio is a log file, not a bomb
HEADER_BYTES = 1024 * 1024  # of one tar member: long names and attributes; an honest one has a few KiB
DIRECTORY_ENTRY_BYTES = 300  # of one zip member, on average, in the table of contents
MAX_PART_BYTES = 255  # of one name, by the file system
MAX_PATH_BYTES = 2048  # of a whole name: Linux takes 4096 with the directory we unpack into
CHUNK_BYTES = 1024 * 1024
_TAR_BUFFER_BYTES = 64 * 1024

_TEMPORARY_PREFIX = ".unpack-"
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
)
_DAMAGE_HINT = "pack it again, check it with 'tar -tf' or 'unzip -t', and send it again"
_SPECIAL = "is a device, a pipe or a socket"
_PLAIN_HINT = "pack plain files and directories only"
_TOP_HINT = "pack with names relative to the top of your application"
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


def unpack(
    archive: Path, target: Path, limits: Limits = DEFAULT_LIMITS, *, strip_single_root: bool = False
) -> Summary:
    """Unpack the archive to the new directory `target`, which appears whole at the end or not at all.

    Idempotent: a `target` that exists is taken as done and left alone. Files get mode 0644, or 0755 if their
    owner may run them, directories 0755; users and groups are ignored. With `strip_single_root`, an archive
    that holds nothing but one directory is unpacked without it. Raises as `check`, and DiskFullError; nothing
    is left after an error. A crash of the machine in the next seconds may still cost contents: unpack again
    if it was not shut down properly.
    """
    if target.exists():
        return _summary_of(target, recognise(archive))
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
    with files.disk_full_reported(target), files.temporary_beside(target) as packed:
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path, name in members:
                _add(tar, path, name)
        packed.flush()
        os.fsync(packed.fileno())
        Path(packed.name).replace(target)


def recognise(archive: Path) -> Kind:
    """Tell by its first bytes what kind of archive this is; raise BadArchiveError if it is none."""
    with archive.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if not start:
        raise BadArchiveError("the archive is empty: 0 bytes", value=archive.name)
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        return "tar"
    raise BadArchiveError("this is not an archive", value=archive.name)


_MAGIC: dict[bytes, Kind] = {
    b"\x1f\x8b": "tar.gz",
    b"BZh": "tar.bz2",
    b"\xfd7zXZ\x00": "tar.xz",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",  # without members
}


# Looking through, the same for every kind


@dataclass(frozen=True)
class _Member:
    """One file or directory of an archive, its name not yet checked."""

    name: str
    size: int
    is_directory: bool = False
    is_program: bool = False


_Entry = tuple[_Member, Callable[[], IO[bytes]]]  # and how to open its content
_OnDirectory = Callable[[_Parts], None]
_OnFile = Callable[[_Parts, _Member, Iterator[bytes]], None]


class _Meter:
    """Counts the unpacked bytes and stops at the first one too many."""

    def __init__(self, packed: int, limits: Limits) -> None:
        self._packed, self._limits = packed, limits
        self.unpacked = 0

    def foresee(self, count: int, name: str) -> None:
        """Refuse `count` more bytes if they would be too many."""
        total = self.unpacked + count
        if total > self._limits.bytes:
            raise _too_large(f"more than {units.show_size(self._limits.bytes)} unpacked", name)
        if total > RATIO_FREE_BYTES and total > self._limits.ratio * self._packed:
            raise _too_large(f"more than {self._limits.ratio} times its packed size", name)

    def count(self, count: int, name: str) -> None:
        self.foresee(count, name)
        self.unpacked += count


class _Names:
    """The tree of names so far: refuses two members that want one place."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._directories: set[_Parts] = set()
        self._files: set[_Parts] = set()

    def add(self, parts: _Parts, member: _Member) -> None:
        for depth in range(1, len(parts) + member.is_directory):
            self._directories.add(parts[:depth])
            if parts[:depth] in self._files:
                raise _bad_member(member.name, f"lies below {'/'.join(parts[:depth])}, which is a file")
        if not member.is_directory:
            if parts in self._directories or parts in self._files:
                raise _bad_member(member.name, "is in the archive twice")
            self._files.add(parts)
        if len(self._directories) + len(self._files) > self._limit:
            raise _too_large(f"more than {self._limit} files and directories", member.name)

    @property
    def files(self) -> int:
        return len(self._files)


def _walk(archive: Path, limits: Limits, *, on_directory: _OnDirectory, on_file: _OnFile) -> Summary:
    """Check every member, and hand it on in the order of the archive."""
    kind = recognise(archive)
    meter, names = _Meter(archive.stat().st_size, limits), _Names(limits.files)
    with _damage_reported(archive.name):
        entries = _zip_entries(archive, limits) if kind == "zip" else _tar_entries(archive, kind, limits)
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


def _chunks(member: _Member, content: Callable[[], IO[bytes]], meter: _Meter) -> Iterator[bytes]:
    """Read the content of one member, to its very end, which is where damage shows."""
    size = 0
    with _damage_reported(member.name), content() as file:
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
            meter.count(len(chunk), member.name)
            yield chunk
    if size != member.size:
        raise _bad_member(member.name, f"has {size} bytes and not {member.size}", hint=_DAMAGE_HINT)


def _safe_parts(name: str) -> _Parts:
    """Split a member's name at its slashes, without `.`; raise BadArchiveError if it could lead out of the tree."""
    if "\0" in name:
        raise _bad_member(name, "has a zero byte in its name")
    if name.startswith("/") or _DRIVE.match(name):
        raise _bad_member(name, "has an absolute path")
    if "\\" in name:
        raise _bad_member(name, "has a backslash in its name", hint="pack with '/' between directories")
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if ".." in parts:
        raise _bad_member(name, "leads out of the archive")
    if len(os.fsencode(name)) > MAX_PATH_BYTES or any(
        len(os.fsencode(part)) > MAX_PART_BYTES for part in parts
    ):
        raise _bad_member(
            name, "has a name that is too long", hint=f"at most {MAX_PART_BYTES} bytes per directory or file"
        )
    return parts


@contextlib.contextmanager
def _damage_reported(name: str) -> Iterator[None]:
    """Turn what the standard library raises over bad input into BadArchiveError about `name`."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in {
            None,
            errno.EINVAL,
        }:  # gzip and bz2 give no number, zip seeks to places that cannot be
            raise
        raise _damaged(name) from exc
    except _DAMAGE as exc:
        raise _damaged(name) from exc


# tar


_EndOfTar: type[tarfile.HeaderError] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_HeaderError, _ReadError = tarfile.HeaderError, tarfile.ReadError  # below, `tarfile` is a parameter


class _StrictTarInfo(tarfile.TarInfo):
    """A tar header that may not be damaged: the standard library takes any bad one but the first as the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_StrictTarInfo":
        """Read one header; raise ReadError for a bad one, and a HeaderError for the end mark alone."""
        try:
            return super().fromtarfile(tarfile)
        except _EndOfTar:
            raise
        except _HeaderError as exc:
            raise _ReadError(str(exc)) from exc


class _TarStream(io.RawIOBase):
    """The unpacked bytes of a tar, handed out against a budget, so that no header fills the memory."""

    def __init__(self, source: io.BufferedIOBase, packed: int, limits: Limits) -> None:
        super().__init__()
        self._source, self._packed, self._ratio = source, packed, limits.ratio
        self._total = 0
        self._budget = 0
        self.member = ""

    def allow(self, count: int) -> None:
        """Set how many bytes may be read from now on."""
        self._budget = count

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self._total += len(data)
        self._budget -= len(data)
        if self._budget < 0:
            raise _too_large("a header that is too large", self.member)
        if self._total > RATIO_FREE_BYTES and self._total > self._ratio * self._packed:
            raise _too_large(f"more than {self._ratio} times its packed size", self.member)
        return data


def _tar_entries(archive: Path, kind: Kind, limits: Limits) -> Iterator[_Entry]:
    """Give the members of a tar one by one; the content of each is to be read before the next."""
    with _open_packed(archive, kind) as source:
        stream = _TarStream(source, archive.stat().st_size, limits)
        stream.allow(HEADER_BYTES)
        with tarfile.open(
            fileobj=stream, mode="r|", tarinfo=_StrictTarInfo, bufsize=_TAR_BUFFER_BYTES
        ) as tar:
            while info := tar.next():
                stream.member = info.name
                member = _tar_member(info)
                stream.allow(member.size + _TAR_BUFFER_BYTES)
                yield member, partial(_tar_content, tar, info)
                stream.allow(HEADER_BYTES)
                tar.members.clear()  # else it remembers all
        stream.allow(_TAR_BUFFER_BYTES)
        while stream.read(_TAR_BUFFER_BYTES):  # padding; the checksum of the compression comes after it
            stream.allow(_TAR_BUFFER_BYTES)


def _open_packed(archive: Path, kind: Kind) -> io.BufferedIOBase:
    match kind:
        case "tar.gz":
            return gzip.open(archive)
        case "tar.bz2":
            return bz2.open(archive)
        case "tar.xz":
            return lzma.open(archive)
        case _:
            return archive.open("rb")


def _tar_member(info: tarfile.TarInfo) -> _Member:
    """Describe a member of a tar; raise BadArchiveError if it is no plain file or directory."""
    if info.issym() or info.islnk():
        raise _link(info.name)
    if info.issparse():
        raise _bad_member(info.name, "is a sparse file", hint="pack without --sparse")
    if not (info.isreg() or info.isdir()):
        raise _bad_member(info.name, _SPECIAL, hint=_PLAIN_HINT)
    size = info.size if info.isreg() else 0
    return _Member(info.name, size, is_directory=info.isdir(), is_program=bool(info.mode & stat.S_IXUSR))


def _tar_content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(info)
    if content is None:
        raise _damaged(info.name)
    return content


# zip


class _BoundedFile(io.FileIO):
    """A file that is never read in pieces of more than `limit` bytes: `zipfile` wants the whole table at once."""

    limit = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes; raise TooLargeError if that is more than `limit`."""
        if size is not None and size > self.limit:
            raise _too_large("a table of contents that is too large", str(self.name))
        return super().read(size) or b""


def _zip_entries(archive: Path, limits: Limits) -> Iterator[_Entry]:
    """Give the members of a zip one by one, by its table of contents."""
    with _BoundedFile(archive) as file:
        file.limit = limits.files * DIRECTORY_ENTRY_BYTES + CHUNK_BYTES
        with zipfile.ZipFile(file) as packed:
            for info in packed.infolist():
                yield _zip_member(info), partial(packed.open, info)


def _zip_member(info: zipfile.ZipInfo) -> _Member:
    """Describe a member of a zip; raise BadArchiveError if it is no plain file or directory that we can read."""
    name = info.orig_filename  # `filename` ends at a zero byte
    mode = info.external_attr >> 16  # 0 from systems without modes
    if info.flag_bits & _ZIP_ENCRYPTED:
        raise _bad_member(name, "is encrypted", hint="pack without a password")
    if stat.S_ISLNK(mode):
        raise _link(name)
    if stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise _bad_member(name, _SPECIAL, hint=_PLAIN_HINT)
    if info.compress_type not in {
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    }:  # the others unpack without bounds
        raise _bad_member(name, "is compressed in a rare way", hint="pack with 'deflate', the default of zip")
    if name.endswith("/"):
        return _Member(name, 0, is_directory=True)
    return _Member(name, info.file_size, is_program=bool(mode & stat.S_IXUSR))


_ZIP_ENCRYPTED = 0x1 | 0x40


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

    def write_file(self, parts: _Parts, member: _Member, chunks: Iterator[bytes]) -> None:
        self.make_directory(parts[:-1])
        with self._root.joinpath(*parts).open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            os.fchmod(file.fileno(), _mode(is_program=member.is_program))


def _ignore(parts: _Parts) -> None:
    """Do nothing with a directory."""


def _read_to_end(parts: _Parts, member: _Member, chunks: Iterator[bytes]) -> None:  # noqa: ARG001 - an _OnFile
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
        if exc.errno not in {
            errno.ENOTEMPTY,
            errno.EEXIST,
        }:  # else somebody unpacked the same a moment earlier
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
    """Add one file or directory to a tar that we write, with nothing in its header that differs between machines."""
    status = path.lstat()
    info = tarfile.TarInfo(name)
    if stat.S_ISLNK(status.st_mode):
        raise _link(name)
    if stat.S_ISDIR(status.st_mode):
        info.type, info.mode = tarfile.DIRTYPE, _DIRECTORY_MODE
        tar.addfile(info)
    elif stat.S_ISREG(status.st_mode):
        info.size, info.mode = status.st_size, _mode(is_program=bool(status.st_mode & stat.S_IXUSR))
        with path.open("rb") as file:
            tar.addfile(info, file)
    else:
        raise _bad_member(name, _SPECIAL, hint=_PLAIN_HINT)


def _mode(*, is_program: bool) -> int:
    return _PROGRAM_MODE if is_program else _FILE_MODE


# Errors


def _bad_member(name: str, what: str, *, hint: str | None = None) -> BadArchiveError:
    shown = _printable(name)
    return BadArchiveError(
        f"{shown!r} {what}",
        value=shown,
        hint=hint or _TOP_HINT,
    )


def _link(name: str) -> BadArchiveError:
    return _bad_member(
        name,
        "is a symbolic or hard link",
        hint="pack the files themselves: 'tar --dereference --hard-dereference'",
    )


def _damaged(name: str) -> BadArchiveError:
    shown = _printable(name)
    return BadArchiveError(f"{shown!r} is damaged or cut off", value=shown, hint=_DAMAGE_HINT)


def _too_large(what: str, name: str) -> TooLargeError:
    return TooLargeError(
        f"the archive holds {what}",
        value=_printable(name),
        hint="send less: leave out build results and dependencies, or ask the administrator to raise the limit",
    )


def _printable(name: str) -> str:
    """Make a name fit for JSON: bytes that are not UTF-8 become `?`."""
    return name.encode("utf-8", "replace").decode()
