"""The role `proxy`: a HAProxy that shares requests out.

Who is behind it, and which files the web servers have, changes by its runtime API; everything else by a reload of
its worker, after its configuration was checked. Neither loses a request.
"""

import asyncio
import os
import resource
import signal
import socket
import time
import weakref

from conpaas.core import run
from conpaas.core.errors import PeerError
from conpaas.core.service import EngineSpec, Health, Host, RoleAgent
from conpaas.services.php import haproxy, node, site
from conpaas.services.php.messages import HTTP_PORT, LOG_PORT, PHP_PORT, WEB_PORT, ProxyConfig

ENGINE = "haproxy"
HEALTH = "/__conpaas/health"
STATIC = "static.map"
CONNECTIONS_MAX = 10_000
_FILES_SPARE = 400  # listeners, checks, logs
_THREADS_MAX = 4
_RECEIVE_BYTES = 1 << 20
_PERCENTILES = {"response_p50": 0.50, "response_p95": 0.95, "response_p99": 0.99}


class ProxyAgent(RoleAgent[ProxyConfig]):
    """Keeps HAProxy's files, and what runs, as they are wanted."""

    config = ProxyConfig

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._sample: socket.socket | None = None
        self._counted: tuple[dict[str, int], float] | None = None

    async def apply(self, config: ProxyConfig) -> None:
        """Make HAProxy run with these members, files and limits; return when it does."""
        if config.prepare:
            last = node.recall(self.host, ProxyConfig)
            await node.prepare(self.host, config, None if last is None else last.code)
            if last is None:
                return
            config = last
        files = dict.fromkeys(await self._static_files(config), "web")
        web, php = await node.in_numbers(config.web), await node.in_numbers(config.php)  # HAProxy adds no others
        members = {
            "web": {name: f"{address}:{WEB_PORT}" for name, address in web.items()},
            "php": {name: f"{address}:{PHP_PORT}" for name, address in php.items()},
        }
        mark, text = self._render(config, members)
        runs = await self._mark()
        if runs is not None:
            if runs != mark:
                await self._check(text)
            await haproxy.set_members(self.host.directory, members, drain_s=config.drain_s)
            await haproxy.set_map(self.host.directory, STATIC, files)
        node.write_if_changed(self.host.directory / STATIC, "".join(f"{path} {to}\n" for path, to in files.items()))
        node.write_if_changed(self.host.directory / "haproxy.cfg", text)
        await self._run(runs, mark)
        node.remember(self.host, config)

    async def _static_files(self, config: ProxyConfig) -> list[str]:
        if config.code is None:
            return []
        code = await self.host.unpacked(config.code)
        return await asyncio.to_thread(lambda: site.static_files(site.visible(code, config.document_root)))

    def _render(self, config: ProxyConfig, members: haproxy.Members) -> tuple[str, str]:
        """Return the configuration, and a mark of all of it but its members."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        values = {
            "address": self.host.address,
            "port": HTTP_PORT,
            "log_port": LOG_PORT,
            "connections": max(100, min(CONNECTIONS_MAX, (files - _FILES_SPARE) // 2)),
            "threads": min(os.cpu_count() or 1, _THREADS_MAX),
            "timeout": config.timeout_s,
            "most_bytes": config.max_body_bytes,
        }
        mark = site.digest(node.render("haproxy.cfg", mark="", web="", php="", **values))
        lists = {
            backend: "".join(
                f"    server {name} {address} {haproxy.SERVER_OPTIONS}\n" for name, address in some.items()
            )
            for backend, some in members.items()
        }
        return mark, node.render("haproxy.cfg", mark=mark, **values, **lists)

    async def _mark(self) -> str | None:
        """Return the mark of what runs, None if nothing does."""
        try:
            return await haproxy.mark(self.host.directory)
        except PeerError:
            return None

    async def _check(self, text: str) -> None:
        """Raise CommandFailedError if HAProxy would not take this configuration."""
        program, file = node.program("haproxy", "haproxy"), self.host.directory / "candidate.cfg"
        (self.host.directory / STATIC).touch()
        node.write_if_changed(file, text)
        await run.run([program, "-c", "-q", "-f", file.name], timeout_s=10, cwd=self.host.directory)

    async def _run(self, runs: str | None, mark: str) -> None:
        program = node.program("haproxy", "haproxy")
        argv = (program, "-W", "-f", "haproxy.cfg")
        started = await self.host.engines.ensure(EngineSpec(ENGINE, argv, self.host.directory))
        if not started and runs is not None and runs != mark:
            self.host.engines.signal(ENGINE, signal.SIGUSR2)

        async def serves() -> None:
            found = await haproxy.mark(self.host.directory)
            if found != mark:
                raise PeerError(f"haproxy still has configuration {found}")
            await node.get(self.host.address, HTTP_PORT, HEALTH)

        await node.until_ready(self.host, ENGINE, serves)

    async def health(self) -> Health:
        """Ask HAProxy itself; who is behind it is the health of others."""
        try:
            await node.get(self.host.address, HTTP_PORT, HEALTH)
        except PeerError as exc:
            return Health(ok=False, detail=self.host.engines.trouble(ENGINE) or exc.message)
        return Health(ok=True)

    async def stop(self, drain_s: float) -> None:
        """Take no more connections, finish the requests under way, end."""
        node.forget(self.host)
        await self.host.engines.stop(ENGINE, number=signal.SIGUSR1, timeout_s=drain_s)
        if self._sample is not None:
            self._sample.close()
            self._sample = None

    # -- metrics ----------------------------------------------------------------------------------------------------

    async def metrics(self) -> dict[str, float]:
        """Return rates since the last call, and response times of a sample of the requests."""
        rows = await haproxy.counters(self.host.directory)
        front = next(row for row in rows if row["svname"] == "FRONTEND")
        count = {name: int(front[name] or 0) for name in ("req_tot", "intercepted", "hrsp_5xx", "bout")}
        before, now = self._counted, time.monotonic()
        self._counted = (count, now)
        up = sum(1 for row in rows if row["pxname"] == "php" and row["status"].startswith("UP") and row["type"] == "2")
        values = {"backends_up": float(up)} | percentiles(self._times_ms())
        if before is None:
            return values
        passed_s = max(now - before[1], 0.001)
        fresh = {name: new - old if new >= (old := before[0][name]) else new for name, new in count.items()}
        return values | {
            "request_rate": max(0, fresh["req_tot"] - fresh["intercepted"]) / passed_s,  # our own health checks apart
            "error_rate": fresh["hrsp_5xx"] / passed_s,
            "throughput": fresh["bout"] / passed_s,
        }

    def _times_ms(self) -> list[int]:
        """Read what HAProxy logged since the last time; what did not fit into the socket was not sampled."""
        if self._sample is None:
            self._sample = _log_socket(self.host.address)
            weakref.finalize(self, self._sample.close)
        times: list[int] = []
        while True:
            try:
                line = self._sample.recv(256)
            except BlockingIOError:
                return times
            words = line.split()
            if len(words) == 2 and words[1].isdigit():
                times.append(int(words[1]))


def _log_socket(address: str) -> socket.socket:
    sample = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sample.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    sample.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sample.bind((address, LOG_PORT))
    return sample


def percentiles(times_ms: list[int]) -> dict[str, float]:
    """Return the response times that half, 95 % and 99 % of the requests do not exceed; nothing of nothing."""
    ordered = sorted(times_ms)
    return {
        name: float(ordered[min(int(len(ordered) * share), len(ordered) - 1)])
        for name, share in _PERCENTILES.items()
        if ordered
    }
