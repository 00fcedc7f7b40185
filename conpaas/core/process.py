"""The one skeleton of the three daemons: open, serve, repeat, stop in three grades.

The first signal asks to *finish* (no new connections, calls under way complete), `stop_timeout_s` later what still
runs is *cut off*, a second signal *aborts* at once. Resources close in reverse order in every case.
"""

import asyncio
import contextlib
import signal
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import structlog
from aiohttp import web
from aiohttp.web_urldispatcher import AbstractRuleMatching, MatchedSubAppResource

from conpaas.core import rpc, tasks

log = structlog.get_logger()


@dataclass(frozen=True)
class Site:
    """One port and what is served on it."""

    host: str
    port: int
    routes: Sequence[web.AbstractRouteDef]
    tls: ssl.SSLContext | None = None
    subapps: Mapping[str, web.Application] | None = None
    """Whole applications by prefix; the prefix `/` takes what the routes leave."""


class Process(ABC):
    """One long-running ConPaaS process. A subclass says what it holds, what it serves and what it repeats."""

    name: ClassVar[str]
    stop_timeout_s: float = 5.0

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.stop = asyncio.Event()
        self.ports: list[int] = []
        """The ports listened on, in the order of the sites; settled when `ready` is set."""

    @abstractmethod
    async def open(self, stack: AsyncExitStack) -> Sequence[Site]:
        """Acquire everything the process holds, on `stack`; return what it serves."""

    def loops(self) -> Mapping[str, tasks.Loop]:
        """Return what is repeated while the process runs."""
        return {}

    async def serving(self) -> None:  # noqa: B027  (most processes have nothing to do here)
        """Act once, when the ports are open and before `ready`."""

    async def run(self, *, signals: bool = True) -> None:
        """Run until stopped. A loop that breaks ends the process with its error.

        Without `signals` only `stop` stops it: for a process that shares its event loop with others.
        """
        with self._signals() if signals else contextlib.nullcontext():
            async with AsyncExitStack() as stack:  # last opened, first closed; also on a crash
                for site in await self.open(stack):
                    await self._serve(site, stack)
                await self.serving()
                self.ready.set()  # only now: tests and supervisors wait for this
                log.info("ready", process=self.name, ports=self.ports)
                await tasks.run_until(self.stop, self.loops())
                log.info("stopping", process=self.name)

    async def _serve(self, site: Site, stack: AsyncExitStack) -> None:
        app = web.Application(middlewares=[rpc.errors_to_replies], client_max_size=rpc.MAX_BODY)
        app.add_routes(site.routes)
        for prefix, sub in (site.subapps or {}).items():
            if prefix == "/":
                _leave_the_rest_to(sub, app, site.routes)
            else:
                app.add_subapp(prefix, sub)
        runner = web.AppRunner(
            app,
            shutdown_timeout=self.stop_timeout_s,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=75,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)  # calls under way end before resources close
        tcp = web.TCPSite(runner, site.host, site.port, ssl_context=site.tls, backlog=512, reuse_address=True)
        await tcp.start()
        self.ports.append(runner.addresses[0][1])

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()

        def stop() -> None:
            if self.stop.is_set() and main is not None:
                log.warning("aborted", process=self.name)
                main.cancel()
            self.stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _leave_the_rest_to(
    sub: web.Application, app: web.Application, routes: Sequence[web.AbstractRouteDef]
) -> None:
    """Give `sub` every request that is not below the first path segment of one of `routes`."""
    taken = frozenset(_first_segment(route.path) for route in routes if isinstance(route, web.RouteDef))
    rest = partial(MatchedSubAppResource, _Rest(taken), sub)
    app._add_subapp(rest, sub)  # noqa: SLF001  (as `add_domain` does, whose only rules are host names)


def _first_segment(path: str) -> str:
    return path.removeprefix("/").partition("/")[0]


class _Rest(AbstractRuleMatching):
    """Requests below none of the given first path segments."""

    def __init__(self, taken: frozenset[str]) -> None:
        self._taken = taken

    async def match(self, request: web.Request) -> bool:
        return _first_segment(request.path) not in self._taken

    def get_info(self) -> Any:
        return {}

    @property
    def canonical(self) -> str:
        return "/"
