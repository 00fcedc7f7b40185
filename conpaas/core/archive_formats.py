"""How tar and zip are read: their members one by one, with bounds on memory, and what damage looks like.

Names and totals are not judged here: see `core.archive`, the only module that uses this one.
"""

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from conpaas.core.errors import BadArchiveError, TooLargeError

Kind = Literal["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"]

RATIO_FREE_BYTES = 16 * 1024 * 1024  # below this a high ratio is a log file, not a bomb
HEADER_BYTES = 1024 * 1024  # of one tar member: long names and attributes; an honest one has a few KiB
TABLE_ENTRY_BYTES = 300  # of one zip member, on average, in the table of contents
MIN_TABLE_BYTES = 1024 * 1024
_TAR_BUFFER_BYTES = 64 * 1024

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
DAMAGE_HINT = "pack it again, check it with 'tar -tf' or 'unzip -t', and send it again"
SPECIAL = "is a device, a pipe or a socket"
PLAIN_HINT = "pack plain files and directories only"
_TOP_HINT = "pack with names relative to the top of your application"


@dataclass(frozen=True)
class Member:
    """One file or directory of an archive, its name not yet checked."""

    name: str
    size: int
    is_directory: bool = False
    is_program: bool = False


Entry = tuple[Member, Callable[[], IO[bytes]]]  # and how to open its content


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


def entries(archive: Path, kind: Kind, *, max_files: int, max_ratio: int) -> Iterator[Entry]:
    """Give the members of the archive; read the content of each before asking for the next.

    Raises BadArchiveError for links, devices and whatever else is no plain file or directory, and
    TooLargeError for headers that no archive of `max_files` needs and for a tar that grows more than
    `max_ratio` times. Damage shows as an error of the standard library: wrap it all in `damage_reported`.
    """
    if kind == "zip":
        return _zip_entries(archive, max_files)
    return _tar_entries(archive, kind, max_ratio)


@contextlib.contextmanager
def damage_reported(name: str) -> Iterator[None]:
    """Turn what the standard library raises over bad input into BadArchiveError about `name`."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in {None, errno.EINVAL}:  # gzip and bz2 give no number; zip seeks to nowhere
            raise
        raise damaged(name) from exc
    except _DAMAGE as exc:
        raise damaged(name) from exc


# tar


_EndOfTar: type[tarfile.HeaderError] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_HeaderError, _ReadError = tarfile.HeaderError, tarfile.ReadError  # below, `tarfile` is a parameter


class _StrictTarInfo(tarfile.TarInfo):
    """A tar header that may not be damaged: `tarfile` takes any bad one but the first for the end."""

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

    def __init__(self, source: io.BufferedIOBase, packed: int, max_ratio: int) -> None:
        super().__init__()
        self._source, self._packed, self._ratio = source, packed, max_ratio
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
            raise too_large("a header that is too large", self.member)
        if self._total > RATIO_FREE_BYTES and self._total > self._ratio * self._packed:
            raise too_large(f"more than {self._ratio} times its packed size", self.member)
        return data


def _tar_entries(archive: Path, kind: Kind, max_ratio: int) -> Iterator[Entry]:
    """Give the members of a tar one by one; the content of each is to be read before the next."""
    with _open_packed(archive, kind) as source:
        stream = _TarStream(source, archive.stat().st_size, max_ratio)
        stream.allow(HEADER_BYTES)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo, bufsize=_TAR_BUFFER_BYTES) as tar:
            while info := tar.next():
                stream.member = info.name
                member = _tar_member(info)
                stream.allow(member.size + _TAR_BUFFER_BYTES)
                yield member, partial(_tar_content, tar, info)
                stream.allow(HEADER_BYTES)
                tar.members.clear()  # type: ignore[attr-defined]  # else it remembers all
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


def _tar_member(info: tarfile.TarInfo) -> Member:
    """Describe a member of a tar; raise BadArchiveError if it is no plain file or directory."""
    if info.issym() or info.islnk():
        raise link(info.name)
    if info.issparse():
        raise bad_member(info.name, "is a sparse file", hint="pack without --sparse")
    if not (info.isreg() or info.isdir()):
        raise bad_member(info.name, SPECIAL, hint=PLAIN_HINT)
    size = info.size if info.isreg() else 0
    return Member(info.name, size, is_directory=info.isdir(), is_program=bool(info.mode & stat.S_IXUSR))


def _tar_content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(info)
    if content is None:
        raise damaged(info.name)
    return content


# zip


class _BoundedFile(io.FileIO):
    """A file never read in pieces of more than `limit` bytes: `zipfile` wants the whole table at once."""

    limit = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes; raise TooLargeError if that is more than `limit`."""
        if size is not None and size > self.limit:
            raise too_large("a table of contents that is too large", Path(str(self.name)).name)
        return super().read(size) or b""


def _zip_entries(archive: Path, max_files: int) -> Iterator[Entry]:
    """Give the members of a zip one by one, by its table of contents."""
    with _BoundedFile(archive) as file:
        file.limit = max_files * TABLE_ENTRY_BYTES + MIN_TABLE_BYTES
        with zipfile.ZipFile(file) as packed:
            for info in packed.infolist():
                yield _zip_member(info), partial(packed.open, info)


def _zip_member(info: zipfile.ZipInfo) -> Member:
    """Describe a member of a zip; raise BadArchiveError if it is no plain file or directory we can read."""
    name = info.orig_filename  # `filename` ends at a zero byte
    mode = info.external_attr >> 16  # 0 from systems without modes
    if info.flag_bits & _ZIP_ENCRYPTED:
        raise bad_member(name, "is encrypted", hint="pack without a password")
    if stat.S_ISLNK(mode):
        raise link(name)
    if stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise bad_member(name, SPECIAL, hint=PLAIN_HINT)
    if info.compress_type not in _ZIP_METHODS:
        raise bad_member(name, "is compressed in a rare way", hint="pack with 'deflate', the default of zip")
    if name.endswith("/"):
        return Member(name, 0, is_directory=True)
    return Member(name, info.file_size, is_program=bool(mode & stat.S_IXUSR))


_ZIP_ENCRYPTED = 0x1 | 0x40
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # the others unpack a whole piece, however large


# Errors


def bad_member(name: str, what: str, *, hint: str | None = None) -> BadArchiveError:
    """Make the error about the member `name`; `what` goes on from the name."""
    shown = _printable(name)
    return BadArchiveError(f"{shown!r} {what}", value=shown, hint=hint or _TOP_HINT)


def link(name: str) -> BadArchiveError:
    """Make the error about a link."""
    return bad_member(
        name,
        "is a symbolic or hard link",
        hint="pack the files themselves: 'tar --dereference --hard-dereference'",
    )


def damaged(name: str) -> BadArchiveError:
    """Make the error about an archive or member that cannot be read to its end."""
    shown = _printable(name)
    return BadArchiveError(f"{shown!r} is damaged or cut off", value=shown, hint=DAMAGE_HINT)


def too_large(what: str, name: str) -> TooLargeError:
    """Make the error about the member with which the archive holds `what`."""
    return TooLargeError(
        f"the archive holds {what}",
        value=_printable(name),
        hint="leave out build results and dependencies, or ask the administrator to raise the limit",
    )


def _printable(name: str) -> str:
    """Make a name fit for JSON: bytes that are not UTF-8 become `?`."""
    return name.encode("utf-8", "replace").decode()
