"""`git push` to the director: an SSH server that takes nothing but git, from users' own keys, for users' own services.

A push of the default branch becomes a code version; with `-o activate` that version becomes the active one. Whether
there is something to do is told by looking, not by the push: what was pushed before a crash becomes a version with the
next push, even one of nothing.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import asyncssh
import structlog
from sqlalchemy import or_, select

from conpaas.core import files, run
from conpaas.core.errors import BadInputError, ConflictError, ConpaasError, NotFoundError
from conpaas.director import git
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import Service, SshKey, User
from conpaas.director.settings import DirectorSettings

USER = "git"
LOGIN_TIMEOUT_S = 20.0
SESSION_TIMEOUT_S = 900.0  # a push of the largest repository over a slow line
CONNECTIONS = 200  # at the same time, logged in or not
_CHUNK_BYTES = 64 * 1024
_MADE = "conpaas-version"  # in a repository: the commit last made a version, and that version's id
_HOOK = '#!/bin/sh\n# Tells the director the options of a push.\nexec env -0 >"$CONPAAS_PUSH_OPTIONS"\n'

Activate: TypeAlias = Callable[[str, str, str], Awaitable[object]]
"""Makes a version the active one: of (service id, version id, actor)."""

_Process: TypeAlias = asyncssh.SSHServerProcess[bytes]

log = structlog.get_logger()


@contextlib.asynccontextmanager
async def serve(
    settings: DirectorSettings, db: Database, code: CodeStore, activate: Activate, *, host: str, port: int
) -> AsyncIterator[int]:
    """Take pushes on `host`:`port` (0: any free one) as long as the block lasts; give the port.

    Raises ConflictError when the port is taken.
    """
    logging.getLogger("asyncssh").setLevel(logging.WARNING)
    server = GitServer(settings.data_dir, db, code, activate, settings.limits.upload_bytes)
    try:
        acceptor = await asyncssh.listen(
            host,
            port,
            server_factory=lambda: _Connection(server),
            process_factory=server.handle,
            server_host_keys=[_host_key(settings.data_dir / "ssh_host_key")],
            server_version="ConPaaS",
            encoding=None,
            password_auth=False,
            kbdint_auth=False,
            host_based_auth=False,
            gss_host=None,
            allow_pty=False,
            agent_forwarding=False,
            login_timeout=LOGIN_TIMEOUT_S,
            keepalive_interval=30,
        )
    except OSError as exc:
        raise ConflictError(f"cannot listen on {host}:{port}: {exc.strerror}", value=port, hint=_PORT_HINT) from exc
    try:
        yield acceptor.get_port()
    finally:
        acceptor.close()
        await server.close()
        await acceptor.wait_closed()


class GitServer:
    """Serves the commands of those who are logged in."""

    def __init__(self, directory: Path, db: Database, code: CodeStore, activate: Activate, limit_bytes: int) -> None:
        self._db = db
        self._code = code
        self._activate = activate
        self._limit_bytes = limit_bytes
        self._hooks = directory / "git" / "hooks"
        self._hooks.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._hooks / "post-receive", _HOOK, mode=0o755)
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections: set[asyncssh.SSHServerConnection] = set()

    async def close(self) -> None:
        """End all commands and connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        connections = list(self.connections)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.wait_closed() for connection in connections))

    async def user_of(self, key: asyncssh.SSHKey) -> tuple[str, str] | None:
        """Return id and name of the user whose key this is; None for a strange key and for a disabled account."""
        query = (
            select(User.id, User.username)
            .join(SshKey, SshKey.user_id == User.id)
            .where(SshKey.fingerprint == key.get_fingerprint(), User.disabled.is_(False))
        )
        async with self._db.read() as session:
            row = (await session.execute(query)).one_or_none()
        return None if row is None else (row.id, row.username)

    async def handle(self, process: _Process) -> None:
        """Do what one client asks; whatever goes wrong, it is told and the server lives on."""
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            async with asyncio.timeout(SESSION_TIMEOUT_S):
                status = await self._serve(process)
        except ConpaasError as exc:
            _say(process, f"error: {exc.message}", *([f"hint: {exc.hint}"] if exc.hint else []))
            status = 1
        except TimeoutError:
            _say(process, f"error: this took more than {SESSION_TIMEOUT_S:g} s")
            status = 1
        with contextlib.suppress(OSError):
            process.exit(status)

    async def _serve(self, process: _Process) -> int:
        user, username = process.get_extra_info("conpaas_user")
        verb, name = _parse(process.command)
        service = await self._find(user, name)
        repository = await self._code.repositories.open(service.id)
        protocol = str(process.env.get("GIT_PROTOCOL", ""))
        if verb == "git-upload-pack":
            return await _relay(process, git.upload_argv(repository), git.serve_environment(protocol, {}))
        async with self._busy[service.id]:
            return await self._receive(process, service, repository, protocol, f"user:{username}")

    async def _find(self, user: str, name: str) -> Service:
        """Return the user's service of that id or name."""
        query = select(Service).where(
            Service.user_id == user,
            Service.terminated.is_(None),
            Service.ending.is_(False),
            or_(Service.id == name, Service.name == name),
        )
        async with self._db.read() as session:
            found = (await session.scalars(query)).all()
        if not found:
            raise NotFoundError(f"you have no service {name!r}", value=name, hint="'conpaas ls' shows what is yours")
        by_id = [service for service in found if service.id == name]
        if len(found) > 1 and not by_id:
            raise ConflictError(
                f"you have {len(found)} services called {name!r}",
                value=name,
                hint=f"push to one of their ids: {', '.join(service.id for service in found)}",
            )
        return (by_id or list(found))[0]

    async def _receive(self, process: _Process, service: Service, repository: Path, protocol: str, actor: str) -> int:
        await self._code.repositories.make_room(repository)
        with _option_file(repository) as options:
            environment = git.serve_environment(protocol, {"CONPAAS_PUSH_OPTIONS": str(options)})
            argv = git.receive_argv(repository, hooks=self._hooks, limit_bytes=self._limit_bytes)
            status = await _relay(process, argv, environment)
            wishes = _read_options(options)
        if status == 0:
            await self._deploy(process, service, repository, activate="activate" in wishes, actor=actor)
        return status

    async def _deploy(
        self, process: _Process, service: Service, repository: Path, *, activate: bool, actor: str
    ) -> None:
        """Make the default branch's commit a version, unless it is one already; activate it if that is wished."""
        await self._code.repositories.settle_default_branch(repository)
        branch = await self._code.repositories.default_branch(repository)
        commit = await git.head(repository)
        if commit is None:
            _say(process, f"nothing to deploy yet: push to '{branch}'")
            return
        version = await self._made(service.id, repository, commit)
        if version is None:
            view = await self._code.push(service.id, repository, commit, actor)
            version = view.id
            files.write_atomically(repository / _MADE, f"{commit.hash} {version}")
            _say(process, f"{commit.hash[:7]} of '{branch}' is code version {version} of '{service.name}'")
        else:
            _say(process, f"{commit.hash[:7]} of '{branch}' was code version {version} already")
        if activate:
            await self._activate(service.id, version, actor)
            _say(process, f"{version} is being activated")
        else:
            _say(process, "it becomes active when you activate it, or at once with 'git push -o activate'")

    async def _made(self, service_id: str, repository: Path, commit: git.Commit) -> str | None:
        """Return the version that `commit` was made, if it was the last one made and is still there."""
        try:
            made, version = (repository / _MADE).read_text(encoding="ascii").split()
            await self._code.get(service_id, version)
        except (FileNotFoundError, ValueError, NotFoundError):
            return None
        return version if made == commit.hash else None


class _Connection(asyncssh.SSHServer):
    """One client: who it is, by its key alone."""

    def __init__(self, server: GitServer) -> None:
        self._server = server
        self._connection: asyncssh.SSHServerConnection | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """Take note of a client; too many are turned away."""
        self._connection = conn
        if len(self._server.connections) >= CONNECTIONS:
            conn.abort()
            return
        self._server.connections.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a client, whatever it was that ended it."""
        if self._connection is not None:
            self._server.connections.discard(self._connection)
        log.debug("ssh-client-gone", error=str(exc or ""))

    def begin_auth(self, username: str) -> bool:  # noqa: ARG002 - the contract of asyncssh
        """Let nobody in without a key."""
        return True

    def public_key_auth_supported(self) -> bool:
        """Say that keys are how one logs in."""
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Tell whether this key is a user's; asyncssh then checks that the client has its private half."""
        user = await self._server.user_of(key) if username == USER else None
        if user is None or self._connection is None:
            return False
        self._connection.set_extra_info(conpaas_user=user)
        return True


async def _relay(process: _Process, argv: list[str], environment: dict[str, str]) -> int:
    """Run git with the client at its three streams; return its exit code, or 1 if the client hangs up."""
    try:
        async with run.pipe(argv, env=environment) as command, asyncio.TaskGroup() as group:
            if command.stdin is None or command.stdout is None or command.stderr is None:
                raise TypeError("a pipe without streams")
            feeding = group.create_task(_feed(process.stdin, command.stdin), name="client to git")
            answers = [
                group.create_task(_answer(command.stdout, process.stdout), name="git to client"),
                group.create_task(_answer(command.stderr, process.stderr), name="git's words to client"),
            ]
            await asyncio.wait(answers)
            status = await command.wait()
            feeding.cancel()
            return status
    except* (OSError, asyncssh.Error) as gone:
        log.debug("push-client-gone", error=str(gone.exceptions[0]))
    return 1


async def _feed(client: asyncssh.SSHReader[bytes], command: asyncio.StreamWriter) -> None:
    try:
        while data := await client.read(_CHUNK_BYTES):
            command.write(data)
            await command.drain()
    except (BrokenPipeError, ConnectionResetError):
        return  # git has heard enough, and says why on its other streams
    except (asyncssh.BreakReceived, asyncssh.SignalReceived):
        log.debug("push-interrupted")
    finally:
        command.close()


async def _answer(command: asyncio.StreamReader, client: asyncssh.SSHWriter[bytes]) -> None:
    while data := await command.read(_CHUNK_BYTES):
        client.write(data)
        await client.drain()


def _say(process: _Process, *lines: str) -> None:
    """Tell the person who pushes; one who has hung up hears nothing."""
    with contextlib.suppress(OSError):
        for line in lines:
            process.stderr.write(f"ConPaaS: {line}\n".encode())


def _parse(command: str | None) -> tuple[str, str]:
    """Return verb and name of what a client asks for, such as `git-receive-pack 'blog.git'`."""
    if command is None:
        raise BadInputError("hello! There is no shell here, only git", hint=_USAGE)
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise BadInputError("this is not a command of git", value=command, hint=_USAGE) from exc
    if words[:1] == ["git"] and len(words) == 3:
        words = [f"git-{words[1]}", words[2]]
    if len(words) != 2 or words[0] not in {"git-receive-pack", "git-upload-pack"}:
        raise BadInputError("this is not a command that is served here", value=command, hint=_USAGE)
    return words[0], words[1].strip("/").removesuffix(".git")


@contextlib.contextmanager
def _option_file(repository: Path) -> Iterator[Path]:
    path = repository / "conpaas-push"
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _read_options(path: Path) -> set[str]:
    """Return the options of a push, out of the environment that git gave its hook."""
    if not path.exists():
        return set()
    pairs = (entry.partition(b"=") for entry in path.read_bytes().split(b"\0"))
    return {os.fsdecode(value) for name, _, value in pairs if _OPTION.fullmatch(name)}


_OPTION = re.compile(rb"GIT_PUSH_OPTION_[0-9]+")
_USAGE = "git push ssh://git@HOST:PORT/SERVICE.git main"
_PORT_HINT = "set another ssh_port, or git_push = false"


def _host_key(path: Path) -> asyncssh.SSHKey:
    """Return the server's key, made at the first start; raise BadInputError for a damaged file."""
    if not path.exists():
        files.write_atomically(path, asyncssh.generate_private_key("ssh-ed25519").export_private_key(), mode=0o600)
    try:
        return asyncssh.read_private_key(path)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
        raise BadInputError(
            f"{path} is not a private key: {exc}", value=str(path), hint="restore or delete it"
        ) from exc
