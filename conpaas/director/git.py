"""The `git` program as we use it: fetching what a user points at, and keeping what users push.

Every call runs with an environment and a configuration of ours alone: no prompt, no credentials, no hooks, no
protocol but those that are named. Nothing a user writes is ever taken for an option.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit, urlunsplit

from conpaas.core import archive, run, units
from conpaas.core.errors import (
    BadArchiveError,
    BadInputError,
    CommandFailedError,
    DiskFullError,
    ForbiddenError,
    TooLargeError,
)

SCHEMES = ("https", "http", "git", "ssh")
CLONE_TIMEOUT_S = 240.0
STEP_TIMEOUT_S = 60.0  # of a command that only reads and writes the disk
_DEFAULT_PORTS = {"https": 443, "http": 80, "git": 9418, "ssh": 22}
_INHERITED = ("PATH", "http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "TMPDIR")
_BRANCH = re.compile(r"(?!-)[^\x00-\x20\x7f~^:?*\[\\]{1,200}")
_SYMLINK, _SUBMODULE = "120000", "160000"
_URL_HINT = "give the address of a repository, such as https://example.org/you/site.git"
_CLONE_HINT = (
    "check the address and the branch; a private repository needs a token in its address "
    "(https://user:token@host/…), or push to ConPaaS with 'git push' instead"
)


@dataclass(frozen=True)
class Commit:
    """One commit: its full hash, and the first line of its message."""

    hash: str
    subject: str


@dataclass(frozen=True)
class Source:
    """Where to fetch from, as a user gave it."""

    url: SplitResult
    branch: str

    @property
    def shown(self) -> str:
        """The address without the password that it may hold."""
        host = self.url.netloc.rpartition("@")[2]
        return urlunsplit((self.url.scheme, host, self.url.path, "", ""))


@dataclass(frozen=True)
class Allowed:
    """Where code may be fetched from, beyond public addresses."""

    private: bool = False
    """Private and loopback addresses."""
    file: bool = False
    """The director's own disk."""


def parse(url: str, branch: str, allowed: Allowed) -> Source:
    """Read what a user gave; raise BadInputError for everything but a plain address and a plain branch."""
    text = url.strip()
    if branch and not _BRANCH.fullmatch(branch):
        raise BadInputError(f"{branch[:100]!r} is not the name of a branch", value=branch)
    try:
        parts = urlsplit(text)
        port_is_fine = parts.port is None or 0 < parts.port < 65536
    except ValueError as exc:
        raise BadInputError("this is not an address", value=_without_password(text), hint=_URL_HINT) from exc
    schemes = (*SCHEMES, "file") if allowed.file else SCHEMES
    if parts.scheme not in schemes or not text.startswith(f"{parts.scheme}://"):
        raise BadInputError(
            f"code can be fetched by {', '.join(schemes)} only",
            value=_without_password(text),
            hint=_URL_HINT,
        )
    host_is_fine = parts.scheme == "file" or (parts.hostname is not None and not parts.hostname.startswith("-"))
    user_is_fine = not (parts.username or "").startswith("-")
    if not (host_is_fine and port_is_fine and user_is_fine and parts.path.strip("/")) or re.search(
        r"[\x00-\x20]", text
    ):
        raise BadInputError("this is not the address of a repository", value=_without_password(text), hint=_URL_HINT)
    return Source(parts, branch)


async def clone(source: Source, target: Path, *, allowed: Allowed, limit_bytes: int) -> Commit:
    """Fetch one commit into the new bare repository `target` and return it.

    Raises BadInputError when git cannot (with what it said), ForbiddenError for an address that is not public, and
    TooLargeError beyond `limit_bytes`.
    """
    url, options, ssh_options = await _pinned(source, allowed)
    environment = {**_environment(), "GIT_ALLOW_PROTOCOL": ":".join((*SCHEMES, "file") if allowed.file else SCHEMES)}
    environment["GIT_SSH_COMMAND"] = " ".join(["ssh", *_SSH_WITHOUT_KEYS, *ssh_options])
    branch = [f"--branch={source.branch}"] if source.branch else []
    argv = [
        *("prlimit", f"--fsize={limit_bytes}", "--", "env", "--ignore-signal=XFSZ", "git"),
        *options,
        *("clone", "--quiet", "--bare", "--depth=1", "--single-branch", "--no-tags", "--template=", *branch),
        *("--", url, str(target)),
    ]
    done = await run.run(argv, timeout_s=CLONE_TIMEOUT_S, cwd=target.parent, env=environment, check=False)
    if done.returncode != 0:
        raise _clone_error(source, done.stderr.decode("utf-8", "replace"), limit_bytes)
    commit = await head(target)
    if commit is None:
        raise BadInputError(f"{source.shown} has no commits", value=source.shown, hint="push something to it first")
    return commit


async def head(repository: Path) -> Commit | None:
    """Return the newest commit of the repository's default branch; None if there is none yet."""
    argv = [*_git(repository), "log", "-1", "--format=%H%n%s", "HEAD", "--"]
    done = await run.run(argv, timeout_s=STEP_TIMEOUT_S, cwd=repository, env=_environment(), check=False)
    if done.returncode != 0:
        return None
    name, _, subject = done.stdout.decode("utf-8", "replace").strip().partition("\n")
    return Commit(name, subject[:200])


async def export(repository: Path, commit: Commit, target: Path, limits: archive.Limits) -> None:
    """Write the files of `commit` to the new directory `target`.

    Raises TooLargeError beyond `limits`, before anything is written, and BadArchiveError for links and submodules.
    """
    await _check_tree(repository, commit, limits)
    target.mkdir()
    index = target.parent / f"{target.name}.index"
    environment = {**_environment(), "GIT_INDEX_FILE": str(index)}
    try:
        for arguments in (("read-tree", commit.hash), ("checkout-index", "--all")):
            argv = [*_git(repository), f"--work-tree={target}", *arguments]
            await run.run(argv, timeout_s=STEP_TIMEOUT_S, cwd=target, env=environment)
    except CommandFailedError as exc:
        if "No space left" in exc.message:
            raise DiskFullError(f"no space left to unpack {commit.hash[:7]}") from exc
        raise
    finally:
        index.unlink(missing_ok=True)


async def _check_tree(repository: Path, commit: Commit, limits: archive.Limits) -> None:
    """Look through the names, kinds and sizes of a commit's files."""
    files = size = 0
    argv = [*_git(repository), "ls-tree", "-r", "-l", "-z", "--full-tree", commit.hash]
    async with run.pipe(argv, cwd=repository, env=_environment()) as process, asyncio.timeout(STEP_TIMEOUT_S):
        if process.stdout is None:
            raise TypeError("a pipe without streams")
        async for entry in _records(process.stdout):
            words, _, name = entry.decode("utf-8", "replace").partition("\t")
            mode, _, _, length = words.split()
            _check_kind(mode, name)
            files, size = files + 1, size + int(length)
            if files > limits.files:
                raise _too_large(f"has more than {limits.files} files")
            if size > limits.bytes:
                raise _too_large(f"is larger than {units.show_size(limits.bytes)}")


def _check_kind(mode: str, name: str) -> None:
    if mode == _SYMLINK:
        raise BadArchiveError(f"{name!r} is a symbolic link", value=name, hint="commit the file itself in its place")
    if mode == _SUBMODULE:
        raise BadArchiveError(f"{name!r} is a submodule", value=name, hint="commit the files themselves in its place")


async def _records(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield what stands before each zero byte; names are short beside the stream's buffer."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            yield (await stream.readuntil(b"\0"))[:-1]


# Users' own repositories


@dataclass(frozen=True)
class Repositories:
    """The bare repositories that users push to, one per service, made when they are first asked for."""

    directory: Path
    limit_bytes: int

    def path(self, service: str) -> Path:
        """Return where the repository of a service is, or would be."""
        return self.directory / f"{service}.git"

    async def open(self, service: str) -> Path:
        """Return the service's repository, made if need be."""
        path = self.path(service)
        if not (path / "HEAD").exists():
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            argv = ["git", "init", "--quiet", "--bare", "--template=", "--initial-branch=main", str(path)]
            await run.run(argv, timeout_s=STEP_TIMEOUT_S, cwd=self.directory, env=_environment())
        return path

    async def make_room(self, repository: Path) -> None:
        """Throw away what no branch needs any more, if the repository is getting large.

        Raises TooLargeError if it stays too large for another push.
        """
        if await asyncio.to_thread(_size_of, repository) < self.limit_bytes:
            return
        argv = [*_git(repository), "gc", "--quiet", "--prune=now"]
        await run.run(argv, timeout_s=CLONE_TIMEOUT_S, cwd=repository, env=_environment())
        if await asyncio.to_thread(_size_of, repository) >= self.limit_bytes:
            raise TooLargeError(
                f"the repository is larger than {units.show_size(self.limit_bytes)}",
                value=self.limit_bytes,
                hint="push a branch without the large files in its history: 'git push --force'",
            )

    async def settle_default_branch(self, repository: Path) -> None:
        """If the default branch has no commit, take `main`, `master` or the first branch that has one."""
        if await head(repository) is not None:
            return
        argv = [*_git(repository), "for-each-ref", "--count=100", "--format=%(refname)", "refs/heads/"]
        done = await run.run(argv, timeout_s=STEP_TIMEOUT_S, cwd=repository, env=_environment())
        branches = done.stdout.decode("utf-8", "replace").split()
        wished = [name for name in ("refs/heads/main", "refs/heads/master") if name in branches]
        if branches:
            argv = [*_git(repository), "symbolic-ref", "HEAD", (wished or branches)[0]]
            await run.run(argv, timeout_s=STEP_TIMEOUT_S, cwd=repository, env=_environment())

    async def default_branch(self, repository: Path) -> str:
        """Return the name of the default branch."""
        argv = [*_git(repository), "symbolic-ref", "--short", "HEAD"]
        done = await run.run(argv, timeout_s=STEP_TIMEOUT_S, cwd=repository, env=_environment())
        return done.stdout.decode("utf-8", "replace").strip()

    def services(self) -> set[str]:
        """Return the services that have a repository."""
        return {path.stem for path in self.directory.glob("*.git")}

    def remove(self, service: str) -> None:
        """Delete a repository; blocks."""
        shutil.rmtree(self.path(service), ignore_errors=True)


def receive_argv(repository: Path, *, hooks: Path, limit_bytes: int) -> list[str]:
    """Return the command that takes a push: nothing in the background, no push larger than `limit_bytes`."""
    settings = (
        "receive.advertisePushOptions=true",
        f"receive.maxInputSize={limit_bytes}",
        "receive.autogc=false",
        "receive.fsckObjects=true",
        f"core.hooksPath={hooks}",
    )
    return ["git", *_options(settings), "receive-pack", str(repository)]


def upload_argv(repository: Path) -> list[str]:
    """Return the command that serves a fetch."""
    return ["git", *_options(()), "upload-pack", "--strict", str(repository)]


def serve_environment(protocol: str, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a git that serves a client; `protocol` is the client's wish for a version."""
    wish = {"GIT_PROTOCOL": protocol} if re.fullmatch(r"version=[0-9]", protocol) else {}
    return {**_environment(), **wish, **extra}


def sha256_of(path: Path) -> tuple[str, int]:
    """Return the SHA-256 in hex and the size in bytes of a file; blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


# How git is run

_SSH_WITHOUT_KEYS = (
    *("-F", "/dev/null", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "IdentityFile=none"),
    *("-o", "IdentityAgent=none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "ConnectTimeout=20"),
)


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {
        **inherited,
        "LC_ALL": "C",
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_ALLOW_PROTOCOL": "none",
    }


def _options(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("-c", setting)]


def _git(repository: Path) -> list[str]:
    return ["git", *_options(("core.hooksPath=/dev/null", "gc.auto=0")), f"--git-dir={repository}"]


async def _pinned(source: Source, allowed: Allowed) -> tuple[str, list[str], list[str]]:
    """Return address, options of git and options of ssh that reach just the address we looked at."""
    settings = ["core.hooksPath=/dev/null", "gc.auto=0", "http.lowSpeedLimit=1000", "http.lowSpeedTime=30"]
    url = urlunsplit(source.url)
    if source.url.scheme == "file" or allowed.private or _proxied(source.url.scheme):
        return url, _options(settings), []
    host = source.url.hostname or ""
    address = await _public_address(host, source.url.port or _DEFAULT_PORTS[source.url.scheme])
    settings.append("http.followRedirects=false")  # they could lead anywhere
    literal = f"[{address}]" if ":" in address else address
    match source.url.scheme:
        case "git":
            port = source.url.port or _DEFAULT_PORTS["git"]
            return urlunsplit(("git", f"{literal}:{port}", source.url.path, "", "")), _options(settings), []
        case "ssh":
            return url, _options(settings), ["-o", f"HostName={address}"]
        case _:
            port = source.url.port or _DEFAULT_PORTS[source.url.scheme]
            settings.append(f"http.curloptResolve={host}:{port}:{literal}")
            return url, _options(settings), []


def _proxied(scheme: str) -> bool:
    """Tell whether a proxy of the operator's makes the connection, and so decides where it may go."""
    return any(os.environ.get(name) for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY"))


async def _public_address(host: str, port: int) -> str:
    """Return an address of `host`; raise ForbiddenError unless all of them are public ones."""
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port)
    except (OSError, UnicodeError, TimeoutError) as exc:
        raise BadInputError(f"there is no host {host!r}", value=host, hint=_URL_HINT) from exc
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        mapped = getattr(address, "ipv4_mapped", None) or address
        if not mapped.is_global or mapped.is_multicast:
            raise ForbiddenError(
                f"{host} is not a public address",
                value=host,
                hint="push with 'git push', or ask the administrator for the setting 'git_allow_private'",
            )
    return str(addresses[0])


def _clone_error(source: Source, said: str, limit_bytes: int) -> BadInputError:
    if "File too large" in said:  # what the limit of `prlimit` makes git say
        return _too_large(f"is larger than {units.show_size(limit_bytes)}")
    if "No space left" in said:
        raise DiskFullError("no space left to fetch the repository")
    words = _without_password(said.strip().splitlines()[-1] if said.strip() else "git said nothing")
    return BadInputError(f"cannot fetch {source.shown}: {words[:300]}", value=source.shown, hint=_CLONE_HINT)


def _too_large(what: str) -> TooLargeError:
    return TooLargeError(f"the repository {what}", hint="leave out build results, dependencies and large files")


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _size_of(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
