"""Code versions: what users give their services to run, each an immutable archive.

The bytes are blobs named by their SHA-256, shared by all versions that hold the same. A blob is put into its place, and
taken away, only inside a writing transaction of the database, which is one at a time: a blob that a version needs is
always there, and one that none needs is found by looking.
"""

import asyncio
import contextlib
import importlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import archive, files, ids, plugins
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.errors import ConflictError, NotFoundError
from conpaas.core.messages.model import CodeVersionView, Wanted
from conpaas.core.service import PACKAGE, ServiceType
from conpaas.core.states import OperationState
from conpaas.director import events, git, views
from conpaas.director.db.database import Database
from conpaas.director.db.models import CodeVersion, Operation, Service
from conpaas.director.settings import DirectorSettings

DEFAULT_VERSION = "code-default"
CHECKOUTS_AT_ONCE = 4
_FILENAME_CHARACTERS = 200

log = structlog.get_logger()


@dataclass(frozen=True)
class _Blob:
    """A checked archive: its SHA-256 in hex, its size in bytes, its kind."""

    sha256: str
    size: int
    kind: str


class CodeStore:
    """The code versions of all services, and the repositories that users push to.

    `directory` (the director's data folder) gets `blobs/` and `git/`. What an upload of a director that died had
    written so far is gone after the next start.
    """

    def __init__(self, db: Database, directory: Path, settings: DirectorSettings, clock: Clock = SYSTEM_CLOCK) -> None:
        self._db = db
        self._settings = settings
        self._clock = clock
        self._blobs = directory / "blobs"
        self._incoming = self._blobs / "incoming"
        self._checkouts = asyncio.Semaphore(CHECKOUTS_AT_ONCE)
        self._defaults: dict[str, _Blob] = {}
        self.repositories = git.Repositories(directory / "git", settings.limits.upload_bytes)
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True, mode=0o700)

    # Reading

    async def list(self, service_id: str) -> list[CodeVersionView]:
        """Return the versions of a service, newest first."""
        async with self._db.read() as session:
            service = await _service(session, service_id)
            query = select(CodeVersion).where(CodeVersion.service_id == service_id).order_by(CodeVersion.seq.desc())
            wanted = Wanted.model_validate(service.wanted)
            return [views.code_view(row, wanted) for row in await session.scalars(query)]

    async def get(self, service_id: str, version: str) -> CodeVersionView:
        """Return one version; raise NotFoundError if the service has none of that id."""
        async with self._db.read() as session:
            service = await _service(session, service_id)
            return views.code_view(await _version(session, service_id, version), Wanted.model_validate(service.wanted))

    def path(self, sha256: str) -> Path:
        """Return the file of a blob; it is there as long as a version refers to it."""
        return self._blobs / sha256[:2] / sha256

    # Making versions

    async def upload(
        self, service_id: str, filename: str, description: str, chunks: AsyncIterator[bytes], actor: str
    ) -> CodeVersionView:
        """Make a version of an archive that comes as a stream.

        Raises BadArchiveError, TooLargeError, DiskFullError, ConflictError when the service has too many versions,
        and what the stream raises; then nothing is left of it.
        """
        await self._check_room(service_id)
        with self._scratch() as scratch:
            received = scratch / "archive"
            sha256, size = await files.receive(chunks, received, limit=self._settings.limits.upload_bytes)
            blob = _Blob(sha256, size, await _check(received))
            return await self._add(service_id, received, blob, filename, description, actor)

    async def checkout(self, service_id: str, url: str, branch: str, actor: str) -> CodeVersionView:
        """Make a version of the newest commit of a git repository (and branch; empty: its default one).

        Raises as `upload` and `git.clone`.
        """
        allowed = git.Allowed(private=self._settings.git_allow_private, file=self._settings.git_allow_file)
        source = git.parse(url, branch, allowed)
        await self._check_room(service_id)
        async with self._checkouts:
            with self._scratch() as scratch:
                repository = scratch / "repository.git"
                limit = self._settings.limits.upload_bytes
                commit = await git.clone(source, repository, allowed=allowed, limit_bytes=limit)
                origin = f"{source.shown} {branch}".strip()
                return await self._add_commit(service_id, repository, commit, origin, actor)

    async def push(self, service_id: str, repository: Path, commit: git.Commit, actor: str) -> CodeVersionView:
        """Make a version of a commit that was pushed to us; raise as `upload`."""
        await self._check_room(service_id)
        return await self._add_commit(service_id, repository, commit, "pushed", actor)

    async def add_default(self, service: Service, session: AsyncSession) -> CodeVersionView | None:
        """Make the first version of a new service, in the transaction that makes the service.

        None if its type has no default code. What the service wants is the caller's to set.
        """
        kind = _kind(service.type)
        if not kind.default_code:
            return None
        blob = self._defaults.get(kind.name)
        if blob is None or not self.path(blob.sha256).exists():
            with self._scratch() as scratch:
                packed = scratch / "archive"
                await asyncio.to_thread(archive.pack, _default_folder(kind), packed)
                blob = await _inspect(packed)
                self._place(packed, blob)
            self._defaults[kind.name] = blob
        row = CodeVersion(
            id=DEFAULT_VERSION,
            service_id=service.id,
            sha256=blob.sha256,
            filename=f"{DEFAULT_VERSION}.{blob.kind}",
            description=f"comes with every {kind.name} service",
            size=blob.size,
            kind=blob.kind,
            created=self._clock.now(),
        )
        session.add(row)
        return views.code_view(row, Wanted.model_validate(service.wanted))

    async def _add_commit(
        self, service_id: str, repository: Path, commit: git.Commit, origin: str, actor: str
    ) -> CodeVersionView:
        with self._scratch() as scratch:
            tree, packed = scratch / "tree", scratch / "archive"
            await git.export(repository, commit, tree, archive.DEFAULT_LIMITS)
            await asyncio.to_thread(archive.pack, tree, packed)
            short = commit.hash[:7]
            description = f"{origin} at {short}: {commit.subject}"[:500]
            blob = await _inspect(packed)
            return await self._add(service_id, packed, blob, f"git-{short}.tar.gz", description, actor)

    async def _add(
        self, service_id: str, path: Path, blob: _Blob, filename: str, description: str, actor: str
    ) -> CodeVersionView:
        """Make a version of the archive at `path`, which is moved away."""
        async with self._db.write() as session:
            service = await _service(session, service_id)
            await self._check_count(session, service)
            row = CodeVersion(
                id=await _fresh_id(session, service_id),
                service_id=service_id,
                sha256=blob.sha256,
                filename=_safe_filename(filename, blob.kind),
                description=description,
                size=blob.size,
                kind=blob.kind,
                created=self._clock.now(),
            )
            session.add(row)
            message = f"code version {row.id}: {row.filename}"
            events.record(session, "code-added", at=row.created, actor=actor, service=service, message=message)
            await session.flush()
            self._place(path, blob)
            view = views.code_view(row, Wanted.model_validate(service.wanted))
        log.info("code-added", service=service_id, version=view.id, size=view.size)
        return view

    def _place(self, path: Path, blob: _Blob) -> None:
        """Move a received file to where its content belongs, unless that is there already."""
        target = self.path(blob.sha256)
        if target.exists():
            return
        with files.disk_full_reported(target):
            target.parent.mkdir(exist_ok=True)
            path.chmod(0o600)
            path.replace(target)
            files.sync_directory(target.parent)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Make a folder on the blobs' own disk; at the end it is gone with all in it."""
        with files.disk_full_reported(self._incoming):
            scratch = Path(tempfile.mkdtemp(dir=self._incoming))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    # Limits

    async def _check_room(self, service_id: str) -> None:
        async with self._db.read() as session:
            await self._check_count(session, await _service(session, service_id))

    async def _check_count(self, session: AsyncSession, service: Service) -> None:
        if not _kind(service.type).takes_code:
            raise ConflictError(f"a {service.type} service takes no code", value=service.type)
        query = select(func.count()).select_from(CodeVersion).where(CodeVersion.service_id == service.id)
        count, limit = await session.scalar(query) or 0, self._settings.limits.code_versions
        if count >= limit:
            raise ConflictError(
                f"'{service.name}' has {count} code versions, and {limit} is the limit",
                value=count,
                hint="delete versions that are no longer needed",
            )

    # Deleting

    async def delete(self, service_id: str, version: str, actor: str = "") -> None:
        """Delete a version, and its bytes if no other has the same.

        Raises NotFoundError, and ConflictError for one that is active, or may become so by an operation under way.
        """
        async with self._db.write() as session:
            service = await _service(session, service_id)
            row = await _version(session, service_id, version)
            if Wanted.model_validate(service.wanted).code == version:
                raise ConflictError(f"{version} is active", value=version, hint="activate another version first")
            await _check_not_needed(session, service_id, version)
            await session.delete(row)
            message = f"code version {row.id}: {row.filename}"
            at = self._clock.now()
            events.record(session, "code-deleted", at=at, actor=actor, service=service, message=message)
        await self._sweep([self.path(row.sha256)])

    async def collect_garbage(self) -> None:
        """Delete the versions and repositories of services that are gone, and the blobs that no version needs."""
        gone = select(Service.id).where(Service.terminated.is_not(None))
        async with self._db.write() as session:
            await session.execute(delete(CodeVersion).where(CodeVersion.service_id.in_(gone)))
        await self._sweep(await asyncio.to_thread(lambda: [*self._blobs.glob("??/*")]))
        repositories = self.repositories.services()
        async with self._db.read() as session:
            live = set(await session.scalars(select(Service.id).where(Service.terminated.is_(None))))
        for service_id in repositories - live:
            await asyncio.to_thread(self.repositories.remove, service_id)

    async def _sweep(self, candidates: Sequence[Path]) -> None:
        """Delete those of the blobs that no version needs."""
        names = [path.name for path in candidates]
        if not names:
            return
        async with self._db.write() as session:
            needed = set(await session.scalars(select(CodeVersion.sha256).distinct()))
            for path in candidates:
                if path.name not in needed:
                    path.unlink(missing_ok=True)


async def _inspect(path: Path) -> _Blob:
    """Look through an archive that we packed ourselves."""
    sha256, size = await asyncio.to_thread(git.sha256_of, path)
    return _Blob(sha256, size, await _check(path))


async def _check(path: Path) -> str:
    """Return what kind of archive this is; raise BadArchiveError or TooLargeError."""
    return (await asyncio.to_thread(archive.check, path)).kind


async def _service(session: AsyncSession, service_id: str) -> Service:
    service = await session.scalar(select(Service).where(Service.id == service_id, Service.terminated.is_(None)))
    if service is None:
        raise NotFoundError("there is no such service", value=service_id)
    return service


async def _version(session: AsyncSession, service_id: str, version: str) -> CodeVersion:
    query = select(CodeVersion).where(CodeVersion.service_id == service_id, CodeVersion.id == version)
    row = await session.scalar(query)
    if row is None:
        raise NotFoundError(f"there is no code version {version}", value=version, hint="list the versions there are")
    return row


async def _check_not_needed(session: AsyncSession, service_id: str, version: str) -> None:
    """Refuse to delete what cancelling an operation, or finishing it, would bring back."""
    query = select(Operation).where(Operation.service_id == service_id, Operation.state == OperationState.RUNNING)
    for operation in await session.scalars(query):
        if version in {operation.before.get("code"), operation.after.get("code")}:
            raise ConflictError(
                f"{version} is needed while the operation '{operation.kind}' is under way",
                value=version,
                hint="wait for its end",
            )


async def _fresh_id(session: AsyncSession, service_id: str) -> str:
    taken = set(await session.scalars(select(CodeVersion.id).where(CodeVersion.service_id == service_id)))
    while (fresh := ids.new_code_version()) in taken:
        pass
    return fresh


def _kind(name: str) -> ServiceType:
    kind = plugins.discover(PACKAGE, "SERVICE", ServiceType).get(name)
    if kind is None:
        raise NotFoundError(f"there is no service type '{name}' here", value=name)
    return kind


def _default_folder(kind: ServiceType) -> Path:
    """Return the folder of the type's first code version, which lies beside its planner."""
    module = importlib.import_module(kind.planner.partition(":")[0])
    return Path(str(module.__file__)).parent / kind.default_code


def _safe_filename(name: str, kind: str) -> str:
    """Return the last part of a file's name, without control characters; what has none is named by its kind."""
    last = name.replace("\\", "/").rpartition("/")[2]
    clean = "".join(character for character in last if character.isprintable()).strip()[:_FILENAME_CHARACTERS]
    return clean if clean.strip(".") else f"code.{kind}"
