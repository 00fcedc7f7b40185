"""A constant load on the sample application: visitors with sessions, who notice everything that goes wrong."""

import asyncio
import re
from collections import Counter
from types import TracebackType
from typing import Self

import aiohttp

from conpaas.core.clock import SYSTEM_CLOCK

_VISITS = re.compile(r'id="visits">(\d+)<')
_BACKEND = re.compile(r'id="backend">([^<]+)<')
TIMEOUT_S = 10.0
FAILURES_KEPT = 20


class Load:
    """Visitors of a site, from `async with` to its end. A request fails if its answer is not what it should be."""

    def __init__(self, url: str, *, visitors: int = 4, pause_s: float = 0.02) -> None:
        self.requests = 0
        self.failed = 0
        self.failures: list[str] = []
        """What the first of them looked like."""
        self.backends: Counter[str] = Counter()
        self._url = url.rstrip("/")
        self._visitors = visitors
        self._pause_s = pause_s
        self._over = asyncio.Event()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        for number in range(self._visitors):
            self._group.create_task(self._visit(keep_alive=number % 2 == 0), name=f"visitor {number}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        await self._group.__aexit__(None, None, None)  # an error of the block is no visitor's, and stays as it is

    async def _visit(self, *, keep_alive: bool) -> None:
        """Visit until it is over.

        Over a kept-alive connection that has died aiohttp asks again, as browsers do, and tells nobody: every other
        visitor therefore takes a connection for each request.
        """
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(force_close=not keep_alive)
        jar = aiohttp.CookieJar(unsafe=True)  # sites of the local cloud have an address, no name
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar, connector=connector) as session:
            visits = 0
            while not self._over.is_set():
                text = await self._get(session, "/")
                if text is not None:
                    visits = self._check(text, visits)
                await self._get(session, "/style.css")
                await SYSTEM_CLOCK.sleep(self._pause_s)

    async def _get(self, session: aiohttp.ClientSession, path: str) -> str | None:
        self.requests += 1
        try:
            async with session.get(self._url + path) as response:
                text = await response.text()
                if response.status == 200:
                    return text
                self._fail(f"GET {path}: {response.status}: {text[:100]}")
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            self._fail(f"GET {path}: {type(exc).__name__} {exc}")
        return None

    def _check(self, text: str, visits: int) -> int:
        """Return the visits that the page counts in the session; fewer than before means that the session was lost."""
        counted, backend = _VISITS.search(text), _BACKEND.search(text)
        if counted is None or backend is None:
            self._fail(f"GET /: not the page: {text[:100]}")
            return visits
        self.backends[backend[1]] += 1
        if int(counted[1]) <= visits:
            self._fail(f"GET /: visit {counted[1]} after visit {visits}: the session was lost")
        return int(counted[1])

    def _fail(self, what: str) -> None:
        self.failed += 1
        if len(self.failures) < FAILURES_KEPT:
            self.failures.append(what)
