"""A load generator that forgives nothing: every request that does not get a good answer counts."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK

PAUSE_S = 0.002  # two cores are shared by engines, tests and us
PATIENCE_S = 45.0
"""How long an answer may take."""
KEPT_S = 5.0
"""How long a connection that is kept alive must be good: far longer than our own pause, far less than any time-out."""


@dataclass(frozen=True)
class Reply:
    """One answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    took_s: float


async def read_reply(reader: asyncio.StreamReader, started: float) -> Reply:
    """Read one answer; EOFError if the connection ends before it does."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split()[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:]) if name}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
    return Reply(status, headers, body, asyncio.get_running_loop().time() - started)


async def fetch(
    address: str,
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> Reply:
    """Make one request on a connection of its own."""
    lines = {"Host": f"{address}:{port}", "Connection": "close", **(headers or {})}
    if body or method == "POST":
        lines["Content-Length"] = str(len(body))
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    started = asyncio.get_running_loop().time()
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(address, port)
        try:
            writer.write(text.encode() + b"\r\n" + body)
            return await read_reply(reader, started)
        finally:
            writer.close()


@dataclass
class Load:
    """Clients that ask without end, half over kept-alive connections, half over new ones.

    async with Load(address, port) as load:
        ...
    assert not load.failures
    """

    address: str
    port: int
    paths: Sequence[str] = ("/",)
    clients: int = 6
    good: Callable[[Reply], bool] = lambda reply: reply.status == 200
    done: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._client(keep_alive=number % 2 == 0), name=f"client {number}")
            for number in range(self.clients)
        ]
        await self.more(self.clients * 3)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if kind is None:
            await self.more(self.clients * 3)
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def more(self, count: int) -> None:
        """Return when `count` more requests have been made."""
        target = self.done + len(self.failures) + count

        async def made() -> bool | None:
            return True if self.done + len(self.failures) >= target else None

        await tasks.wait_for(made, timeout_s=60, what=f"{count} requests", clock=SYSTEM_CLOCK)

    async def _client(self, *, keep_alive: bool) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        number, answered = 0, 0.0
        while not self._stop.is_set():
            path = self.paths[number % len(self.paths)]
            number += 1
            if connection is not None and connection[0].at_eof() and _now() - answered > KEPT_S:
                _close(connection)  # this process was held up, and for so long nobody must keep a connection
                connection = None
            try:
                async with asyncio.timeout(PATIENCE_S):
                    if connection is None:
                        connection = await asyncio.open_connection(self.address, self.port)
                    reply = await self._ask(*connection, path, keep_alive=keep_alive)
            except (OSError, EOFError, ValueError, TimeoutError) as exc:
                self.failures.append(f"{path}: {exc!r} (kept alive: {keep_alive})")
                _close(connection)
                connection = None
                continue
            answered = _now()
            self.slowest_s = max(self.slowest_s, reply.took_s)
            if self.good(reply):
                self.done += 1
            else:
                self.failures.append(f"{path}: {reply.status} {reply.body[:200]!r}")
            if not keep_alive or reply.headers.get("connection", "").lower() == "close":
                _close(connection)
                connection = None
            await asyncio.sleep(PAUSE_S)
        _close(connection)

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, *, keep_alive: bool
    ) -> Reply:
        how = "keep-alive" if keep_alive else "close"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {self.address}:{self.port}\r\nConnection: {how}\r\n\r\n".encode())
        return await read_reply(reader, asyncio.get_running_loop().time())


def _now() -> float:
    return asyncio.get_running_loop().time()


def _close(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None) -> None:
    if connection is not None:
        connection[1].close()
