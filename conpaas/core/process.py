"""The one skeleton of the three daemons: open, serve, repeat, stop in three grades.

The first signal asks to *finish* (no new connections, calls under way complete), `stop_timeout_s` later what still
runs is *cut off*, a second signal *aborts* at once. Resources close in reverse order in every case.
"""

import asyncio
import contextlib
import logging
import signal
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_urldispatcher import AbstractRuleMatching, MatchedSubAppResource

from conpaas import __version__
from conpaas.core import rpc, tasks
from conpaas.core.clock import SYSTEM_CLOCK

log = structlog.get_logger()

HANDSHAKE_S = 10.0
"""How long a client may take to shake hands; a silent connection is gone after that."""
ABORT_S = 1.0
"""How long what is cut off may take to end."""


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
        self.successor: list[str] | None = None
        """What this process is to become once it has stopped, by `exec`: an argument list. None: it just ends."""

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
                sites = await self.open(stack)
                front = _Front(self.stop_timeout_s)
                stack.push_async_callback(front.close)  # calls under way end before resources close
                self.ports += [await front.listen(site) for site in sites]
                await self.serving()
                self.ready.set()  # only now: tests and supervisors wait for this
                log.info("ready", process=self.name, version=__version__, ports=self.ports)
                await tasks.run_until(self.stop, self.loops())
                log.info("stopping", process=self.name)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        aborted = False

        def stop() -> None:
            nonlocal aborted
            if main is not None and (self.stop.is_set() or not self.ready.is_set()):  # nothing is served yet
                log.warning("aborted", process=self.name)
                aborted = True
                main.cancel()
            self.stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            yield
        except asyncio.CancelledError:
            if not aborted or main is None:
                raise
            main.uncancel()  # our own cancel: it ends here
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


class _Front:
    """The ports of one process, and the calls under way on all of them."""

    def __init__(self, stop_timeout_s: float) -> None:
        logging.getLogger("aiohttp.server").addFilter(_hide_garbage)
        self._stop_timeout_s = stop_timeout_s
        self._runners: list[web.AppRunner] = []
        self._listeners: list[asyncio.Server] = []
        self._calls: dict[asyncio.Task[Any], web.RequestHandler] = {}
        self._streams: set[asyncio.Task[Any]] = set()
        """Those of the calls that have no end of their own."""
        self._stopping = False

    async def listen(self, site: Site) -> int:
        """Serve `site`; return its port."""
        app = web.Application(middlewares=[self._track, rpc.errors_to_replies], client_max_size=rpc.MAX_BODY)
        app.on_response_prepare.append(self._note_stream)
        app.add_routes(site.routes)
        for prefix, sub in (site.subapps or {}).items():
            if prefix == "/":
                _leave_the_rest_to(sub, app, site.routes)
            else:
                app.add_subapp(prefix, sub)
        runner = web.AppRunner(
            app, shutdown_timeout=ABORT_S, access_log=None, handler_cancellation=True, keepalive_timeout=75
        )
        await runner.setup()
        self._runners.append(runner)
        listener = await asyncio.get_running_loop().create_server(
            _server(runner),
            site.host,
            site.port,
            ssl=site.tls,
            ssl_handshake_timeout=HANDSHAKE_S if site.tls else None,
            ssl_shutdown_timeout=ABORT_S if site.tls else None,
            backlog=512,
            reuse_address=True,
        )
        self._listeners.append(listener)
        return int(listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Take no more connections, let calls complete, cut off those that take too long; at once if cancelled."""
        try:
            await self._finish()
        finally:
            for task in self._calls:
                log.warning("call-cut-off", call=task.get_name())
                task.cancel()
            await self._ended(ABORT_S)
            for runner in self._runners:
                await runner.cleanup()

    async def _finish(self) -> None:
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        for _ in range(3):  # what has come by now becomes a call under way
            await SYSTEM_CLOCK.sleep(0)
        busy = set(self._calls.values())
        for runner in self._runners:
            for connection in _server(runner).connections:
                if connection not in busy:  # not `pre_shutdown`: it would drop the rest of an upload, too
                    connection.force_close()
        for stream in self._streams:
            stream.cancel()
        main = asyncio.current_task()
        if main is None or not main.cancelling():  # the second signal may have come before this
            await self._ended(self._stop_timeout_s)

    async def _ended(self, timeout_s: float) -> None:
        """Wait until no call is under way, or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._calls:
                    await asyncio.wait(set(self._calls))

    @web.middleware
    async def _track(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        task = asyncio.current_task()
        if task is not None:
            task.set_name(f"{request.method} {request.path}")
            self._calls[task] = request.protocol  # until its answer is written, which is after the handler
            task.add_done_callback(self._calls.pop)
        response = await handler(request)
        if self._stopping:
            response.force_close()  # a connection made in the last moment takes no second call
        return response

    async def _note_stream(self, _: web.Request, response: web.StreamResponse) -> None:
        task = asyncio.current_task()
        if task is not None and response.content_type == "text/event-stream":
            self._streams.add(task)
            task.add_done_callback(self._streams.discard)


def _hide_garbage(record: logging.LogRecord) -> bool:
    """Keep a client that speaks no HTTP from filling the log with stack traces; it has got its 400."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        log.debug("garbage", error=str(error.message)[:100])
        return False
    return True


def _server(runner: web.AppRunner) -> web.Server:
    server = runner.server
    if server is None:
        raise RuntimeError("the runner is not set up")
    return server


def _leave_the_rest_to(sub: web.Application, app: web.Application, routes: Sequence[web.AbstractRouteDef]) -> None:
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
