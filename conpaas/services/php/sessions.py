"""The role `sessions`, in the manager's instance: a key-value store that keeps PHP sessions, also over its restarts."""

import asyncio
import signal

import structlog

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import PeerError
from conpaas.core.service import EngineSpec, Health, RoleAgent
from conpaas.services.php import node
from conpaas.services.php.messages import SESSIONS_PORT, SessionsConfig

log = structlog.get_logger()

ENGINE = "sessions"
_ANSWER_S = 3.0
_COPY_S = 20.0
"""How long the copy of another store may take: a full one is 128 MiB."""


class SessionsAgent(RoleAgent[SessionsConfig]):
    """Runs Valkey, or Redis where there is none."""

    config = SessionsConfig

    async def apply(self, config: SessionsConfig) -> None:
        """Make the store run, and return when it answers."""
        program = node.program("valkey-server|redis-server", "redis-server")
        text = node.render(
            "sessions.conf",
            address=self.host.address,
            port=SESSIONS_PORT,
            directory=self.host.directory,
            password=config.password.get_secret_value(),
            memory=config.memory_mib,
        )
        if node.write_if_changed(self.host.directory / "sessions.conf", text, mode=0o600):
            await self.stop(5)
        node.remember(self.host, config)
        argv = (program, str(self.host.directory / "sessions.conf"))
        await self.host.engines.ensure(EngineSpec(ENGINE, argv, self.host.directory))
        await node.until_ready(self.host, ENGINE, lambda: self._ask("PING"))
        await self._take_over(config)

    async def _take_over(self, config: SessionsConfig) -> None:
        """Copy the store at `config.source`, and whatever comes in there; end that when there is no source any more.

        It is replication into a store that takes writes of its own (https://valkey.io/topics/replication), once in the
        life of this one: a second copy would wipe out what came in here. What cannot be reached is left behind.
        """
        ended = self.host.directory / "taken-over"
        if ended.exists():
            return
        if config.source:
            try:
                await self._replicate(config.source, config.password.get_secret_value())
            except PeerError as exc:
                log.warning("sessions-left-behind", source=config.source, error=exc.message)
            else:
                return
        elif "role:master" in await self._ask("INFO replication"):
            return
        await self._ask("REPLICAOF NO ONE")
        ended.touch()

    async def _replicate(self, source: str, password: str) -> None:
        """Return when all that `source` holds is here; raise PeerError if that does not come about."""
        await self._ask("CONFIG SET repl-diskless-sync-delay 0", source)
        await self._ask(f"CONFIG SET masterauth {password}")
        await self._ask("CONFIG SET replica-read-only no")
        await self._ask(f"REPLICAOF {source} {SESSIONS_PORT}")

        async def copied() -> bool | None:
            return True if "master_link_status:up" in await self._ask("INFO replication") else None

        await tasks.wait_for(copied, timeout_s=_COPY_S, what=f"the sessions of {source}", clock=SYSTEM_CLOCK)

    async def health(self) -> Health:
        """Ask the store."""
        try:
            await self._ask("PING")
        except PeerError as exc:
            return Health(ok=False, detail=self.host.engines.trouble(ENGINE) or exc.message)
        return Health(ok=True)

    async def metrics(self) -> dict[str, float]:
        """Return how many sessions are kept, and the bytes they take."""
        memory = await self._ask("INFO memory")
        used = next(line for line in memory.splitlines() if line.startswith("used_memory:"))
        return {
            "sessions": float((await self._ask("DBSIZE")).removeprefix(":")),
            "sessions_memory": float(used.partition(":")[2]),
        }

    async def stop(self, drain_s: float) -> None:
        """Write the sessions to disk and end."""
        await self.host.engines.stop(ENGINE, number=signal.SIGTERM, timeout_s=max(drain_s, 5))

    async def _ask(self, command: str, address: str = "") -> str:
        """Give our store, or the one at `address`, a command in the protocol's inline form.

        Raises PeerError if it answers with an error, or not at all.
        """
        config = node.recall(self.host, SessionsConfig)
        if config is None:
            raise PeerError("the session store was not set up yet")
        try:
            async with asyncio.timeout(_ANSWER_S):
                reader, writer = await asyncio.open_connection(address or self.host.address, SESSIONS_PORT)
                try:
                    writer.write(f"AUTH {config.password.get_secret_value()}\r\n{command}\r\n".encode())
                    await _reply(reader)
                    return await _reply(reader)
                finally:
                    writer.close()
        except (OSError, EOFError, ValueError) as exc:
            raise PeerError(f"the session store: {str(exc) or type(exc).__name__}") from exc


async def _reply(reader: asyncio.StreamReader) -> str:
    line = (await reader.readline()).decode().rstrip()
    if not line or line.startswith("-"):
        raise PeerError(f"the session store: {line or 'the connection was closed'}")
    if line.startswith("$"):
        return (await reader.readexactly(int(line[1:]) + 2)).decode().rstrip()
    return line
