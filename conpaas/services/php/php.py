"""The role `php`: an nginx and a PHP-FPM that run the code.

A change of settings starts a second PHP-FPM beside the first. When it answers, the symbolic link that nginx finds it
by is replaced, the first one finishes what it has begun, and ends: no request meets a server that is going away.
"""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import structlog

from conpaas.core import run, tasks, units
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import EngineMissingError, PeerError
from conpaas.core.service import EngineSpec, Health, RoleAgent
from conpaas.services.php import nginx, node, site
from conpaas.services.php.messages import PHP_PORT, SESSIONS_PORT, PhpConfig

log = structlog.get_logger()

CHILDREN = 16
FORM_BYTES = 1 << 20
"""What a request may have beside the file that it uploads."""
FINISH_S = 20.0
"""How long requests under way may take when their PHP-FPM is replaced, before it is told to end."""
STOP_S = 60
"""... and after it was told."""
QUIET_LOOKS = 3
LOCK_MIN_S, LOCK_MAX_S = 5, 60
"""Bounds of how long a session stays locked by a script that died."""
LOCK_WAIT_US = 10_000


class PhpAgent(RoleAgent[PhpConfig]):
    """Runs the code in a copy that it can write to."""

    config = PhpConfig
    _counted: tuple[float, float] | None = None

    async def apply(self, config: PhpConfig) -> None:
        """Unpack the code, bring up a PHP-FPM with these settings, switch to both, end the one before."""
        if config.prepare:
            last = node.recall(self.host, PhpConfig)
            await self._prepare(config, None if last is None else last.code)
            if last is None:
                return
            config = last
        root, closed = await self._code(config)
        front = config.front_controller == "always" or (
            config.front_controller == "auto" and site.rewrites_to_index(root)
        )
        site.publish(self.host.directory, root, front=front and (root / "index.php").is_file(), closed=closed)
        await self._fpm(config)
        node.remember(self.host, config)

    async def _prepare(self, config: PhpConfig, active: str | None) -> None:
        await node.prepare(self.host, config, active)
        await self._code(config)
        keep = {sha256[:16] for sha256 in (config.code, config.previous, active) if sha256}
        for copy in (self.host.directory / "code").glob("*"):
            if copy.name not in keep and not copy.name.startswith("."):
                await asyncio.to_thread(site.remove, copy)

    async def _code(self, config: PhpConfig) -> tuple[Path, list[str]]:
        """Return the folder that visitors see, in a copy of the code, and what of it is closed to them."""
        copy = self.host.directory / "code" / (config.code or "empty")[:16]
        if config.code is None:
            copy.mkdir(parents=True, exist_ok=True)
        else:
            original = await self.host.unpacked(config.code)
            await asyncio.to_thread(site.writable_copy, original, copy)
        root = site.visible(copy, config.document_root)
        return root, await asyncio.to_thread(site.closed_folders, root)

    # -- PHP-FPM ----------------------------------------------------------------------------------------------------

    async def _fpm(self, config: PhpConfig) -> None:
        host = self.host
        program = node.program(f"php-fpm{config.php_version}", f"php{config.php_version}-fpm")
        for name in ("run", "tmp", "fpm"):
            (host.directory / name).mkdir(exist_ok=True)
        generation = site.digest(program + self._render(config, ""))
        path = self._file(generation)
        if config.sessions and not path.exists():
            await _require_redis(program, config.php_version)
        node.write_if_changed(path, self._render(config, generation), mode=0o600)
        argv = (program, "--nodaemonize", "--fpm-config", str(path))
        await host.engines.ensure(EngineSpec(_engine(generation), argv, host.directory))
        if not (await self.health()).ok:  # nobody serves: nothing to be careful with
            self._switch(generation)
        node.write_if_changed(host.directory / "fastcgi.conf", node.render("fastcgi.conf", address=host.address))
        await nginx.ensure(host, "nginx-php.conf", port=PHP_PORT)
        self._point("other.sock", f"status-{generation}.sock")
        await node.until_ready(host, _engine(generation), lambda: self._ask("other/ping"))
        self._switch(generation)
        for other in self._generations() - {generation}:
            await self._finish(other)
            await self._end(other, STOP_S)

    def _render(self, config: PhpConfig, generation: str) -> str:
        most = units.parse_size(config.upload_max_filesize)
        return node.render(
            "fpm.conf",
            generation=generation,
            directory=self.host.directory,
            logs=self.host.logs,
            path=os.environ.get("PATH", os.defpath),
            patience=STOP_S,
            children=CHILDREN,
            max_execution_time=config.max_execution_time,
            memory_limit=units.parse_size(config.memory_limit),
            upload_max_filesize=most,
            post_max_size=most + FORM_BYTES,
            display_errors="on" if config.display_errors else "off",
            sessions=_sessions(config),
        )

    def _switch(self, generation: str) -> None:
        self._point("fpm.sock", f"fpm-{generation}.sock")
        self._point("status.sock", f"status-{generation}.sock")

    def _point(self, link: str, target: str) -> None:
        site.point(self.host.directory / "run" / link, target)

    def _file(self, generation: str) -> Path:
        return self.host.directory / "fpm" / f"{generation}.conf"

    def _generations(self) -> set[str]:
        return {path.stem for path in (self.host.directory / "fpm").glob("*.conf")}

    async def _finish(self, generation: str) -> None:
        """Wait until a PHP-FPM that gets no new requests has none under way, as long as is reasonable."""
        self._point("other.sock", f"status-{generation}.sock")
        quiet = 0

        async def idle() -> bool | None:
            nonlocal quiet
            status = json.loads(await self._ask("other/status?json"))
            busy = status["active processes"] + status["listen queue"]
            quiet = 0 if busy else quiet + 1
            return True if quiet >= QUIET_LOOKS else None

        try:
            await tasks.wait_for(idle, timeout_s=FINISH_S, what="requests under way", clock=SYSTEM_CLOCK)
        except PeerError as exc:  # it is gone, or somebody computes for very long
            log.info("not-idle", engine=_engine(generation), why=exc.message)

    async def _end(self, generation: str, timeout_s: float) -> None:
        await self.host.engines.stop(_engine(generation), number=signal.SIGQUIT, timeout_s=timeout_s)
        for name in (f"fpm-{generation}.sock", f"status-{generation}.sock"):
            (self.host.directory / "run" / name).unlink(missing_ok=True)
        self._file(generation).unlink(missing_ok=True)

    async def _ask(self, what: str) -> bytes:
        return await node.get(self.host.address, PHP_PORT, f"/__conpaas/{what}")

    # -- the rest of the contract -----------------------------------------------------------------------------------

    async def health(self) -> Health:
        """Ask PHP-FPM through nginx. Errors of the application are its own, and no illness of the node."""
        found = await nginx.health(self.host, port=PHP_PORT)
        if found.ok:
            return found
        troubles = [self.host.engines.trouble(_engine(generation)) for generation in self._generations()]
        return Health(ok=False, detail="; ".join(filter(None, troubles)) or found.detail)

    async def metrics(self) -> dict[str, float]:
        """Return how busy PHP is: processes, requests that wait, requests per second."""
        status = json.loads(await self._ask("status?json"))
        accepted, now = float(status["accepted conn"]), time.monotonic()
        before, self._counted = self._counted, (accepted, now)
        values = {
            "php_active": float(status["active processes"]),
            "php_idle": float(status["idle processes"]),
            "php_queue": float(status["listen queue"]),
            "php_slow": float(status["slow requests"]),
        }
        if before is not None and accepted >= before[0]:
            values["php_request_rate"] = (accepted - before[0]) / max(now - before[1], 0.001)
        return values

    async def stop(self, drain_s: float) -> None:
        """End nginx when its requests are done, then PHP-FPM."""
        node.forget(self.host)
        await nginx.stop(self.host, drain_s)
        for generation in self._generations():
            await self._end(generation, drain_s)


async def _require_redis(program: str, version: str) -> None:
    if any(Path(f"/etc/php/{version}/fpm/conf.d").glob("*-redis.ini")):
        return  # Debian's way to switch it on; PHP itself takes 50 ms to say so
    modules = await run.run([program, "-m"], timeout_s=10)
    if b"redis" not in modules.stdout.split():
        raise EngineMissingError(
            "PHP cannot share sessions: its extension redis is not installed (Debian package php-redis)",
            value="php-redis",
            hint="install it with 'conpaas engines install php'",
        )


def _engine(generation: str) -> str:
    return f"fpm-{generation}"


def _sessions(config: PhpConfig) -> str:
    """Return the directives that keep sessions in the shared store, one request of a session at a time.

    Applications with session handlers of their own may still set them.
    """
    if not config.sessions:
        return ""
    password = config.sessions_password.get_secret_value()
    path = f"tcp://{config.sessions}:{SESSIONS_PORT}?auth={password}&timeout=2&read_timeout=5"
    expire_s = min(max(config.max_execution_time, LOCK_MIN_S), LOCK_MAX_S)
    return "\n".join(
        (
            "php_value[session.save_handler] = redis",
            f'php_value[session.save_path] = "{path}"',
            "php_value[redis.session.locking_enabled] = 1",
            f"php_value[redis.session.lock_expire] = {expire_s}",
            f"php_value[redis.session.lock_wait_time] = {LOCK_WAIT_US}",
            f"php_value[redis.session.lock_retries] = {(expire_s + 5) * 1_000_000 // LOCK_WAIT_US}",
        )
    )
