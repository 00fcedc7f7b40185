"""The role `sessions`, in the manager's instance: a key-value store that keeps PHP sessions, also over its restarts."""

import asyncio
import signal

from conpaas.core.errors import PeerError
from conpaas.core.service import EngineSpec, Health, RoleAgent
from conpaas.services.php import node
from conpaas.services.php.messages import SESSIONS_PORT, SessionsConfig

ENGINE = "sessions"
_ANSWER_S = 3.0


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

    async def _ask(self, command: str) -> str:
        """Give one command in the protocol's inline form; raise PeerError for an error or none at all."""
        config = node.recall(self.host, SessionsConfig)
        if config is None:
            raise PeerError("the session store was not set up yet")
        try:
            async with asyncio.timeout(_ANSWER_S):
                reader, writer = await asyncio.open_connection(self.host.address, SESSIONS_PORT)
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
