"""What a machine without ConPaaS needs to run a manager or an agent: one archive of our code and its libraries.

A bundle is a `.tar.gz` named by its SHA-256: `manifest.json`, `__main__.py`, the package's daemons' half, and the
distributions that it imports, as they are installed here. Equal installations give equal bytes. It is started by
`python3 -I FOLDER run agent --context FILE`; which of several is to run is told by `core.upgrade`.
"""

import asyncio
import gzip
import hashlib
import importlib.metadata
import io
import os
import platform
import re
import stat
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import ValidationError

import conpaas
from conpaas.core import archive, files
from conpaas.core.errors import BadArchiveError, CommandFailedError, ConflictError
from conpaas.core.messages.base import Message, from_peer

LIBRARIES = ("aiohttp", "cryptography", "jinja2", "pydantic", "structlog")
"""Distributions that the daemons import; what these require comes along."""
PARTS = ("__init__.py", "__main__.py", "py.typed", "agent", "core", "manager", "services")
"""Of our package: directors, clouds, command line and pages stay here."""
MANIFEST = "manifest.json"
LIMITS = archive.Limits(bytes=512 * 1024**2, files=20_000)

_LEFT_OUT = {".pyc", ".pyi", ".pyx", ".pxd"}
_ABOUT_THIS_MACHINE = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
_LEVEL = 6  # of 9: twice as fast, and a twentieth larger
_SHA256 = re.compile("[0-9a-f]{64}")
_GLIBC = re.compile(r"manylinux_(\d+)_(\d+)_|(manylinux2014)_")
_MAIN = '''"""Starts the daemon of this very version, unless another one is to run: see conpaas.core._upgrade_start."""

import os
import sys
from pathlib import Path

home = os.path.dirname(os.path.realpath(__file__))
sys.path[0] = home  # not the link that led here: that will lead elsewhere one day
os.environ["PYTHONPATH"] = home  # for Pythons that the daemon starts

from conpaas.core import _upgrade_start

_upgrade_start.begin(Path(home).parent, Path(home).name)

from conpaas.__main__ import main

main()
'''


class Manifest(Message):
    """What a bundle is, and what it runs on."""

    version: str
    """Of ConPaaS."""
    python: str
    """`sys.implementation.cache_tag` of the Python that its compiled parts are for: `cpython-311`."""
    machine: str
    """`platform.machine()`: `x86_64`."""
    glibc: str = "0.0"
    """The oldest GNU C library that its compiled parts run on."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on this machine's disk."""

    path: Path
    sha256: str
    size: int
    manifest: Manifest


class Bundler:
    """Makes the bundle of this installation when it is first asked for, and keeps it in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._making = asyncio.Lock()
        self._made: Bundle | None = None

    async def get(self) -> Bundle:
        """Return the bundle; the first call takes some seconds, in a thread.

        Raises CommandFailedError if a library is missing or does not tell its files, and DiskFullError.
        """
        async with self._making:
            if self._made is None:
                self._made = await asyncio.to_thread(make, self._directory)
            return self._made


# -- making ---------------------------------------------------------------------------------------------------------


def make(directory: Path) -> Bundle:
    """Write the bundle of this installation into `directory`; older ones there are removed. Blocks."""
    directory.mkdir(parents=True, exist_ok=True)
    libraries = _closure(LIBRARIES)
    manifest = Manifest(
        version=conpaas.__version__,
        python=str(sys.implementation.cache_tag),
        machine=platform.machine(),
        glibc=".".join(map(str, max((_glibc(library) for library in libraries), default=(0, 0)))),
    )
    target = directory / "bundle"
    with files.disk_full_reported(target), files.temporary_beside(target) as (temporary, file):
        digest = _Digest(file)
        with (
            gzip.GzipFile("", "wb", _LEVEL, digest, mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            _add_text(tar, MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            _add_text(tar, "__main__.py", _MAIN)
            for name, path in sorted([*_own_files(), *(pair for one in libraries for pair in _files_of(one))]):
                _add_file(tar, name, path)
        file.flush()
        named = directory / f"{digest.hexdigest()}.tar.gz"
        temporary.chmod(0o644)
        temporary.replace(named)
    for other in directory.glob("*.tar.gz"):
        if other != named:
            other.unlink(missing_ok=True)
    return Bundle(named, digest.hexdigest(), named.stat().st_size, manifest)


class _Digest:
    """A file that is written and hashed at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _closure(names: tuple[str, ...]) -> list[importlib.metadata.Distribution]:
    """Return the distributions called `names` and all that they require here.

    What a requirement's marker asks is not evaluated: what it excludes here is not installed, or does no harm.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = [(name, True) for name in names]
    while queue:
        name, needed = queue.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as exc:
            if needed:
                raise CommandFailedError(
                    f"the library {name} is not installed here", value=name, hint="install ConPaaS anew"
                ) from exc
            continue
        queue += [_requirement(text) for text in found[key].requires or () if "extra ==" not in text]
    return [found[key] for key in sorted(found)]


def _requirement(text: str) -> tuple[str, bool]:
    """Return the name of a requirement, and whether it is one under all circumstances."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", text)
    return ("" if match is None else match[0]), ";" not in text


def _glibc(library: importlib.metadata.Distribution) -> tuple[int, int]:
    """Return the oldest C library that a distribution promises to run on; this machine's if it was built here."""
    tags = [line for line in (library.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")]
    promised = [(2, 17) if match[3] else (int(match[1]), int(match[2])) for match in map(_GLIBC.search, tags) if match]
    if promised:
        return min(promised)
    if any(tag.endswith("-any") for tag in tags):
        return (0, 0)
    return _version(platform.libc_ver()[1])


def _version(text: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.findall(r"\d+", text)[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _own_files() -> Iterator[tuple[str, Path]]:
    package = Path(conpaas.__file__).parent
    for part in PARTS:
        top = package / part
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.is_file() and _is_wanted(path):
                yield f"conpaas/{path.relative_to(package).as_posix()}", path


def _files_of(library: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    if library.files is None:
        name = library.metadata["Name"]
        raise CommandFailedError(
            f"the library {name} does not tell which files are its own", value=name, hint="install it with pip"
        )
    for file in library.files:
        path = Path(str(library.locate_file(file)))
        if ".." not in file.parts and _is_wanted(path) and path.name not in _ABOUT_THIS_MACHINE:
            yield PurePosixPath(file).as_posix(), path


def _is_wanted(path: Path) -> bool:
    return path.suffix not in _LEFT_OUT and "__pycache__" not in path.parts


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


def _add_file(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Add a file with nothing in its header that differs between machines."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        info = tarfile.TarInfo(name)
        info.size, info.mode = status.st_size, 0o755 if status.st_mode & stat.S_IXUSR else 0o644
        tar.addfile(info, file)


# -- unpacking ------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    """Return what the bundle at `path` says of itself; raise BadArchiveError if it is none."""
    try:
        with tarfile.open(path, "r|gz") as tar:
            first = tar.next()
            content = tar.extractfile(first) if first is not None and first.name == MANIFEST else None
            if content is None:
                raise BadArchiveError(f"{path.name} is no bundle: it has no manifest", value=path.name, hint="")
            return Manifest.model_validate_json(content.read(64 * 1024), extra="ignore")
    except (tarfile.TarError, OSError, EOFError, ValidationError) as exc:
        raise BadArchiveError(f"{path.name} is no bundle: {exc}", value=path.name, hint="") from exc


def misfit(manifest: Manifest) -> str:
    """Say why a bundle does not run on this Python and machine; empty if it does."""
    have = (str(sys.implementation.cache_tag), platform.machine())
    if have != (manifest.python, manifest.machine):
        return f"it is made for {manifest.python} on {manifest.machine}, here is {have[0]} on {have[1]}"
    libc, version = platform.libc_ver()
    if manifest.glibc != "0.0" and (libc != "glibc" or _version(version) < _version(manifest.glibc)):
        return f"it needs glibc {manifest.glibc}, here is {libc or 'none'} {version}".rstrip()
    return ""


def unpack(path: Path, versions: Path, sha256: str) -> Path:
    """Unpack the bundle at `path` to `versions`/`sha256`, whole or not at all, and return that. Blocks.

    Idempotent. Raises BadArchiveError if it is damaged or not the one of that hash, ConflictError if it does not run
    here, DiskFullError. What runs is not changed by it: see `core.upgrade`.
    """
    target = versions / checked(sha256)
    if target.is_dir():
        return target
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise BadArchiveError(f"{path.name} is not the bundle {sha256}", value=path.name, hint="fetch it again")
    manifest = read_manifest(path)
    reason = misfit(manifest)
    if reason:
        raise ConflictError(
            f"ConPaaS {manifest.version} cannot run here: {reason}",
            value=sha256,
            hint="use the same release of the operating system on all machines",
        )
    archive.unpack(path, target, LIMITS)
    return target


def manifest_of(version: Path) -> Manifest:
    """Return the manifest of an unpacked version."""
    return from_peer(Manifest, (version / MANIFEST).read_bytes())


def checked(sha256: str) -> str:
    """Return `sha256` if it is one; raise BadArchiveError for what could name another path."""
    if not _SHA256.fullmatch(sha256):
        raise BadArchiveError(f"{sha256!r} is no SHA-256", value=sha256, hint="")
    return sha256
