"""The roles of one node: configurations applied, kept in one file, made so again after a restart.

Held by every agent, and by a manager for the roles that live on its own instance. Knows role agents only through the
contract in `core.service`.
"""

import asyncio
import codecs
import hashlib
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from conpaas.core import archive, files, plugins, rpc
from conpaas.core.clock import Clock
from conpaas.core.engines import Supervisor
from conpaas.core.errors import BadInputError, BlobMissingError, ConflictError, ConpaasError, NotFoundError
from conpaas.core.messages.agent import RoleStatus
from conpaas.core.messages.model import LogChunk
from conpaas.core.service import Health, Host, RoleAgent

log = structlog.get_logger()

BLOB_LIMIT_BYTES = 1 << 30
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass
class _Held:
    """One role that this node holds."""

    agent: RoleAgent[Any]
    supervisor: Supervisor
    config: dict[str, Any] = field(default_factory=dict)
    """What is wanted of it, as it was sent and as its agent takes it."""
    wish: Any = None
    digest: str = ""
    """Of what is wanted."""
    made: dict[str, Any] | None = None
    """What it was last made, as it was sent: what a restart makes so again. None before the first time."""
    applied: str = ""
    """Digest of what it is made now; empty while that is not certain."""
    busy: str = ""
    trouble: str = ""
    """Why the last attempt to make it so failed."""
    metrics: dict[str, float] = field(default_factory=dict)


class Roles:
    """What a node does. `agents` says by role where its RoleAgent is found; `directory` outlives the daemon."""

    def __init__(
        self,
        directory: Path,
        *,
        instance: str,
        address: str,
        agents: Mapping[str, str],
        clock: Clock,
        volume_of: Callable[[str], Path | None] = lambda _: None,
    ) -> None:
        self.directory, self._volume_of = directory, volume_of
        self.logs = directory / "logs"
        self._instance, self._address, self._agents, self._clock = instance, address, agents, clock
        self._held: dict[str, _Held] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._unpacking = asyncio.Lock()

    # -- roles ------------------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Make so again what was so before this daemon started. What fails is left to the next `apply`.

        What was only being made so when the daemon ended is put back to what it was before: the manager alone knows
        in which order, over all nodes, to go on.
        """
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        for role, known in stored.items():
            config = known["made"] or known["wanted"]
            try:
                self._want(role, config, self._parse(role, config))
                self._held[role].made = known["made"]
            except ConpaasError as exc:
                log.warning("role-not-restored", role=role, error=exc.message)
        complete = [role for role, held in self._held.items() if held.made is not None]
        for role, outcome in (await self._make_so(complete)).items():
            if isinstance(outcome, ConpaasError):
                log.warning("role-not-restored", role=role, error=outcome.message)
            elif outcome is not None:
                raise outcome

    async def apply(self, configs: Mapping[str, dict[str, Any]]) -> None:
        """Make these roles so, all at once; return when each is healthy. Others are left alone.

        Raises NotFoundError for a role that the service type does not have, BlobMissingError for code that must be
        sent first, BadInputError for a configuration that is none, and what the role agents raise. What is wanted is
        on disk before the first act, so that no role is forgotten that was only begun.
        """
        parsed = {role: self._parse(role, config) for role, config in configs.items()}  # all of them, or nothing begins
        for role, config in configs.items():
            self._want(role, config, parsed[role])
        self._save()
        for outcome in (await self._make_so(configs)).values():
            if outcome is not None:
                raise outcome

    def _parse(self, role: str, config: dict[str, Any]) -> Any:
        reference = self._agents.get(role)
        if reference is None:
            raise NotFoundError(f"this node's service has no role '{role}'", value=role)
        kind: type[RoleAgent[Any]] = plugins.load(reference)
        try:
            return kind.config.model_validate(config, extra="ignore")
        except ValidationError as exc:
            error = rpc.bad_input(exc)
            raise BadInputError(f"configuration of {role}: {error.message}", value=error.value) from exc

    def _want(self, role: str, config: dict[str, Any], wish: Any) -> None:
        held = self._role(role)
        held.config, held.wish, held.digest = config, wish, _digest(config)

    async def _make_so(self, roles: Iterable[str]) -> dict[str, BaseException | None]:
        """Make these held roles as they are wanted, all at once; return what went wrong with each."""
        chosen = {role: self._held[role] for role in roles}
        outcomes = await asyncio.gather(
            *(self._apply_one(role, held) for role, held in chosen.items()), return_exceptions=True
        )
        return dict(zip(chosen, outcomes, strict=True))

    async def _apply_one(self, role: str, held: _Held) -> None:
        async with self._lock(role):
            if self._held.get(role) is not held:
                raise ConflictError(f"the role '{role}' was stopped meanwhile", value=role, hint="apply it again")
            wish, digest, config = held.wish, held.digest, held.config  # the newest, if others came meanwhile
            if held.applied == digest and (await self._health(held)).ok:
                return
            held.busy, held.applied = "applying", ""
            try:
                await held.agent.apply(wish)
                held.applied, held.made, held.trouble = digest, config, ""
                self._save()
            except ConpaasError as exc:
                held.trouble = exc.message
                raise
            finally:
                held.busy = ""

    @property
    def busy(self) -> bool:
        """Whether a role is being applied or ended."""
        return any(held.busy for held in self._held.values())

    async def stop(self, role: str, drain_s: float) -> None:
        """End a role: drain, stop its engines, forget it. A role that is not held is fine."""
        async with self._lock(role):
            held = self._held.get(role)
            if held is None:
                return
            held.busy = "draining"
            await held.agent.stop(drain_s)
            held.supervisor.close()
            del self._held[role]
            self._save()

    async def stop_all(self, drain_s: float) -> None:
        """End every role, all at once."""
        await asyncio.gather(*(self.stop(role, drain_s) for role in list(self._held)))

    async def status(self) -> dict[str, RoleStatus]:
        """Return how each role is, by asking its agent."""
        held = list(self._held.items())
        healths = await asyncio.gather(*(self._health(one) for _, one in held))
        return {
            role: RoleStatus(
                healthy=health.ok,
                detail=health.detail or one.busy,
                digest=one.applied,
                metrics=one.metrics,
            )
            for (role, one), health in zip(held, healths, strict=True)
        }

    async def _health(self, held: _Held) -> Health:
        if held.made is None or held.trouble:
            return Health(ok=False, detail=held.busy or held.trouble or "not applied yet")
        try:
            return await held.agent.health()
        except ConpaasError as exc:
            return Health(ok=False, detail=exc.message)

    async def measure(self) -> None:
        """Take the metrics of each role; `status` shows them until the next time."""
        for role, held in list(self._held.items()):
            if held.applied:
                try:
                    held.metrics = await held.agent.metrics()
                except ConpaasError as exc:
                    log.debug("no-metrics", role=role, error=exc.message)
                    held.metrics = {}

    def close(self) -> None:
        """Stop watching the engines; they go on."""
        for held in self._held.values():
            held.supervisor.close()

    def _role(self, role: str) -> _Held:
        held = self._held.get(role)
        if held is not None:
            return held
        folder, logs = self.directory / "roles" / role, self.logs / role
        data = self._volume_of(role) or folder / "data"
        for path in (folder, logs, data):
            path.mkdir(parents=True, exist_ok=True)
        supervisor = Supervisor(folder / "engines", logs)
        host = Host(
            instance=self._instance,
            address=self._address,
            directory=folder,
            data=data,
            logs=logs,
            engines=supervisor,
            unpacked=self.unpacked,
            forget_unpacked=self.forget_unpacked,
        )
        held = self._held[role] = _Held(plugins.load(self._agents[role])(host), supervisor)
        return held

    def _lock(self, role: str) -> asyncio.Lock:
        return self._locks.setdefault(role, asyncio.Lock())

    @property
    def _file(self) -> Path:
        return self.directory / "roles.json"

    def _save(self) -> None:
        wanted = {role: {"wanted": held.config, "made": held.made} for role, held in self._held.items()}
        files.write_atomically(self._file, json.dumps(wanted), mode=0o600)

    # -- code -------------------------------------------------------------------------------------------------------

    def has_blob(self, sha256: str) -> bool:
        """Say whether the blob is here."""
        return _SHA256.fullmatch(sha256) is not None and (self.directory / "blobs" / sha256).is_file()

    async def receive_blob(self, sha256: str, stream: AsyncIterator[bytes]) -> None:
        """Store a blob as it comes; BadInputError if it is not the one that was announced."""
        folder = self.directory / "blobs"
        folder.mkdir(parents=True, exist_ok=True)
        await files.receive_blob(stream, folder, limit=BLOB_LIMIT_BYTES, expect_sha256=sha256)

    async def unpacked(self, sha256: str) -> Path:
        """Return the folder of an unpacked code version; raise BlobMissingError if its blob was not sent."""
        target = self.directory / "code" / sha256[:16]
        async with self._unpacking:
            if not _SHA256.fullmatch(sha256) or not target.exists():
                if not self.has_blob(sha256):
                    raise BlobMissingError("this node has not been sent the code version", value=sha256)
                target.parent.mkdir(exist_ok=True)
                blob = self.directory / "blobs" / sha256
                await asyncio.to_thread(archive.unpack, blob, target)
        return target

    async def forget_unpacked(self, keep: frozenset[str]) -> None:
        """Delete code versions and blobs other than those in `keep`."""
        async with self._unpacking:
            await asyncio.to_thread(self._forget, keep)

    def _forget(self, keep: frozenset[str]) -> None:
        short = {sha256[:16] for sha256 in keep}
        for path in (self.directory / "code").glob("*"):
            if path.name not in short:
                shutil.rmtree(path, ignore_errors=True)
        for path in (self.directory / "blobs").glob("*"):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    # -- logs -------------------------------------------------------------------------------------------------------

    def log_names(self) -> dict[str, int]:
        """Return the sizes of all logs in bytes, by name: `ROLE.FILE`, and the daemon's own."""
        return {name: path.stat().st_size for name, path in self._log_files().items()}

    def read_log(self, name: str, offset: int, limit: int) -> LogChunk:
        """Return a piece of a log; a negative offset counts from the end. Raises NotFoundError."""
        path = self._log_files().get(name)
        if path is None:
            raise NotFoundError(f"there is no log '{name}'", value=name, hint="list the logs first")
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            start = max(0, size + offset) if offset < 0 else min(offset, size)
            stream.seek(start)
            raw = stream.read(limit)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(raw, final=start + len(raw) >= size or len(raw) < 4)
        rest, _ = decoder.getstate()  # a character cut by the limit is left for the next piece
        return LogChunk(text=text, next=start + len(raw) - len(rest), size=size)

    def _log_files(self) -> dict[str, Path]:
        found = {path.name: path for path in sorted(self.directory.glob("*.log"))}
        for path in sorted(self.logs.glob("*/*")):
            if path.suffix in {".log", ".out"}:
                found[f"{path.parent.name}.{path.name}"] = path
        return found


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
