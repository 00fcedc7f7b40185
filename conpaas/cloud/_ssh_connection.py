"""Connections to hosts, and calls of the host's half of the driver (`_ssh_host`) over them.

A host is known by its key, a call has a deadline, and what SSH and hosts say becomes the errors of the contract.
"""

import asyncio
import base64
import contextlib
import json
import logging
import shlex
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import asyncssh

from conpaas.cloud import _ssh_host
from conpaas.cloud.ssh import SshHost, SshSettings
from conpaas.core import files
from conpaas.core.errors import (
    CloudBusyError,
    CloudCredentialsError,
    CloudError,
    CloudRefusedError,
    ConpaasError,
    DeadlineError,
    DiskFullError,
    PeerError,
)
from conpaas.core.messages.base import Json

KEEPALIVE_S, KEEPALIVES = 15, 3
CALLS_PER_HOST = 4  # sshd's MaxSessions is 10 by default
HANDSHAKES = 8  # at once: each costs some milliseconds of the director's time
CHUNK_BYTES = 256 * 1024
SLOWEST_BYTES_PER_S = 64 * 1024  # of a line that is worth waiting for

_PROGRAM = Path(_ssh_host.__file__).read_bytes()
_TOO_OLD = _ssh_host.ANSWER + json.dumps({"error": "unfit", "message": "its Python is older than 3.11"})
_LOADER = (
    f"import sys; sys.version_info < (3, 9) and (print({_TOO_OLD!r}), sys.exit());"
    "SOURCE = sys.stdin.buffer.read(int(sys.argv[1])); exec(compile(SOURCE, 'conpaas', 'exec'))"
)
_KEY_TYPES = ("ssh-", "ecdsa-", "sk-")

_Process: TypeAlias = asyncssh.SSHClientProcess[bytes]


@dataclass
class _Link:
    """A connection, and how many calls are under way on it."""

    connection: asyncssh.SSHClientConnection
    users: int = 0


class Connections:
    """The hosts of one cloud, connected when they are needed."""

    def __init__(self, name: str, settings: SshSettings, directory: Path, deadline_s: float) -> None:
        logging.getLogger("asyncssh").setLevel(logging.WARNING)
        self._what, self._settings, self._deadline_s = f"cloud {name}", settings, deadline_s
        self._known = directory / "known_hosts.json"
        self._keys = {host.name: self._private_key(host) for host in settings.hosts}
        self._trusted = {host.name: self._host_key(host) for host in settings.hosts}
        self._open: dict[str, _Link] = {}
        """The last one used comes last."""
        self._calling = {host.name: asyncio.Semaphore(CALLS_PER_HOST) for host in settings.hosts}
        self._connecting = {host.name: asyncio.Lock() for host in settings.hosts}
        self._handshakes = asyncio.Semaphore(HANDSHAKES)

    async def close(self) -> None:
        """Close every connection."""
        links, self._open = [*self._open.values()], {}
        for link in links:
            link.connection.abort()
        for link in links:
            await link.connection.wait_closed()

    # -- keys -------------------------------------------------------------------------------------------------------

    def _private_key(self, host: SshHost) -> asyncssh.SSHKey:
        secret = host.key or self._settings.key
        try:
            if secret is not None:
                return asyncssh.import_private_key(secret.get_secret_value())
            return asyncssh.read_private_key(self._settings.key_file or "")
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError, OSError) as exc:
            raise CloudCredentialsError(f"{self._what}: the private key for {host.name}: {exc}") from exc

    def _host_key(self, host: SshHost) -> asyncssh.SSHKey | None:
        if not host.host_key:
            return None
        words = host.host_key.split()
        start = next((index for index, word in enumerate(words) if word.startswith(_KEY_TYPES)), 0)
        try:
            return asyncssh.import_public_key(" ".join(words[start : start + 2]))
        except asyncssh.KeyImportError as exc:
            raise CloudCredentialsError(f"{self._what}: the host key of {host.name}: {exc}") from exc

    def _check_first_use(self, host: SshHost, connection: asyncssh.SSHClientConnection) -> None:
        """Remember the key of a host that is trusted at its first use; refuse another one ever after."""
        key = connection.get_server_host_key()
        shown = base64.b64encode(b"" if key is None else key.public_data).decode()
        known = json.loads(self._known.read_text(encoding="utf-8")) if self._known.exists() else {}
        if known.setdefault(host.name, shown) != shown:
            raise self._wrong_host(host, "its key is not the one that it had at first")
        files.write_atomically(self._known, json.dumps(known), mode=0o600)

    def _wrong_host(self, host: SshHost, why: str) -> ConpaasError:
        hint = f"somebody may be in between; if the host was installed anew, set its 'host_key' ({self._known.name})"
        return CloudCredentialsError(f"{self._what}: {host.name} is not the host that is known: {why}", hint=hint)

    # -- connections ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _command(self, host: SshHost, argv: Sequence[str], deadline_s: float) -> AsyncIterator[_Process]:
        """Begin a command on a host. A connection that has failed, or is one too many, is closed once nobody uses it.

        One that has died in silence is noticed before anything has begun: then there is a second one.
        """
        async with self._calling[host.name]:
            command = shlex.join(argv)
            link, process = await self._begin_on_open(host, command, deadline_s) or await self._begin(
                host, command, deadline_s
            )
            try:
                yield process
            except PeerError:
                self._forget(host, link)
                raise
            finally:
                process.close()  # and no waiting: a host may keep a channel open for as long as its command hangs
                link.users -= 1
                self._close_unused(host, link)

    async def _begin_on_open(self, host: SshHost, command: str, deadline_s: float) -> tuple[_Link, _Process] | None:
        link = self._open.get(host.name)
        if link is None:
            return None
        try:
            return link, await self._begin_on(link, command, deadline_s)
        except (asyncssh.Error, OSError, TimeoutError):
            self._forget(host, link)
            self._close_unused(host, link)
            return None

    async def _begin(self, host: SshHost, command: str, deadline_s: float) -> tuple[_Link, _Process]:
        async with self._connecting[host.name]:
            link = self._open.pop(host.name, None) or _Link(await self._login(host))
            self._open[host.name] = link
        try:
            with self._failures_named(host, "beginning", deadline_s):
                return link, await self._begin_on(link, command, deadline_s)
        except PeerError:
            self._forget(host, link)
            self._close_unused(host, link)
            raise

    async def _begin_on(self, link: _Link, command: str, deadline_s: float) -> _Process:
        """Begin a command; from now on the connection is used, until the caller says otherwise."""
        link.users += 1  # before it begins: nobody may take it for unused meanwhile
        try:
            async with asyncio.timeout(deadline_s):
                return await link.connection.create_process(command, encoding=None)
        except BaseException:
            link.users -= 1
            raise

    def _forget(self, host: SshHost, link: _Link) -> None:
        if self._open.get(host.name) is link:
            del self._open[host.name]

    def _close_unused(self, host: SshHost, link: _Link) -> None:
        if link.users == 0 and self._open.get(host.name) is not link:
            link.connection.abort()
        surplus = len(self._open) - self._settings.max_connections
        for name in [name for name, link in self._open.items() if link.users == 0][: max(0, surplus)]:
            self._open.pop(name).connection.abort()

    async def _login(self, host: SshHost) -> asyncssh.SSHClientConnection:
        trusted = self._trusted[host.name]
        with self._failures_named(host, "connecting", self._settings.connect_s):
            async with self._handshakes, asyncio.timeout(self._settings.connect_s):
                connection = await asyncssh.connect(
                    str(host.address),
                    host.port,
                    username=host.user,
                    client_keys=[self._keys[host.name]],
                    known_hosts=None if trusted is None else ([trusted], [], []),
                    config=None,
                    agent_path=None,
                    preferred_auth="publickey",
                    keepalive_interval=KEEPALIVE_S,
                    keepalive_count_max=KEEPALIVES,
                )
        if trusted is None:
            try:
                self._check_first_use(host, connection)
            except BaseException:
                connection.abort()
                raise
        return connection

    # -- calls ------------------------------------------------------------------------------------------------------

    async def call(self, host: SshHost, verb: str, *, payload: Path | None = None, **asked: Any) -> Json:
        """Let the host do `verb` of `_ssh_host`, with the file `payload`; return its answer.

        Raises CloudBusyError, DeadlineError, PeerError, CloudCredentialsError, DiskFullError, and CloudRefusedError
        for what else the host cannot do.
        """
        line = json.dumps({"directory": host.directory, **asked}).encode() + b"\n"
        deadline_s = self._deadline_s
        if payload is not None:
            deadline_s += payload.stat().st_size / SLOWEST_BYTES_PER_S
        async with self._command(host, self._argv(host, verb), deadline_s) as process:
            with self._failures_named(host, verb, deadline_s):
                async with asyncio.timeout(deadline_s):
                    said, complaint = await self._talk(process, line, payload)
        return self._answer(host, said, complaint, process.exit_status)

    def _argv(self, host: SshHost, verb: str) -> list[str]:
        argv = [host.python, "-I", "-c", _LOADER, str(len(_PROGRAM)), verb]
        return ["sudo", "-n", "--", *argv] if self._settings.as_root and host.user != "root" else argv

    async def _talk(self, process: _Process, line: bytes, payload: Path | None) -> tuple[bytes, bytes]:
        """Write our program, `line` and the payload to a command; return what it prints, and what it complains of."""
        with contextlib.suppress(BrokenPipeError):  # it ended before it read all: what it has printed says why
            process.stdin.write(_PROGRAM + line)
            if payload is not None:
                with payload.open("rb") as file:
                    while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                        process.stdin.write(chunk)
                        await process.stdin.drain()
            process.stdin.write_eof()
        said, complaint = await process.stdout.read(), await process.stderr.read()
        await process.wait_closed()
        return said, complaint

    def _answer(self, host: SshHost, said: bytes, complaint: bytes, code: int | None) -> Json:
        """Read the answer among what the host has printed, or raise the error that it stands for."""
        lines = said.decode("utf-8", "replace").splitlines()
        mine = next((line for line in reversed(lines) if line.startswith(_ssh_host.ANSWER)), None)
        words = complaint.decode("utf-8", "replace").strip() or said.decode("utf-8", "replace").strip()
        what = f"{self._what}: {host.name}"
        if mine is None:
            raise self._no_answer(what, words[-500:], code)
        try:
            answer: Json = json.loads(mine.removeprefix(_ssh_host.ANSWER))
        except ValueError as exc:
            raise PeerError(f"{what} answered rubbish: {mine[:200]}") from exc
        if "error" in answer:
            message = f"{what}: {answer.get('message')}"
            raise _ERRORS.get(answer["error"], CloudRefusedError)(
                message, hint="'conpaas cloud test' looks at each host"
            )
        return answer

    def _no_answer(self, what: str, words: str, code: int | None) -> ConpaasError:
        if code == 127:
            return CloudRefusedError(
                f"{what} has no Python: {words}", hint="install python3, or name the host's 'python'"
            )
        if words.startswith("sudo:"):
            hint = "allow that user sudo without a password, log in as root, or set 'as_root' to false"
            return CloudCredentialsError(f"{what}: {words}", hint=hint)
        return PeerError(f"{what} gave no answer (exit code {code}): {words}")

    @contextlib.contextmanager
    def _failures_named(self, host: SshHost, verb: str, deadline_s: float) -> Iterator[None]:
        """Turn what SSH says into the errors of the contract."""
        what = f"{self._what}: {host.name}"
        try:
            yield
        except TimeoutError as exc:
            raise DeadlineError(f"{what}: {verb} took longer than {deadline_s:g} s") from exc
        except asyncssh.PermissionDenied as exc:
            raise CloudCredentialsError(f"{what} refuses {host.user}'s key: {exc}") from exc
        except asyncssh.HostKeyNotVerifiable as exc:
            raise self._wrong_host(host, str(exc)) from exc
        except (asyncssh.Error, OSError) as exc:
            raise PeerError(f"{what} cannot be reached: {str(exc) or type(exc).__name__}") from exc


_ERRORS: dict[str, type[CloudError] | type[DiskFullError] | type[PeerError]] = {
    "busy": CloudBusyError,
    "damaged": PeerError,
    "disk-full": DiskFullError,
}
