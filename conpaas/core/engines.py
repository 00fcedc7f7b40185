"""Supervised engine processes: started in sessions of their own, restarted when they die, re-adopted after us.

An engine outlives the daemon that started it. What is known of it stands in one file, `NAME.json`, with its process
id and start time, so that the next daemon finds it by looking. Knows nothing of what engines do.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from conpaas.core import files, run
from conpaas.core.errors import CommandFailedError
from conpaas.core.service import EngineSpec

log = structlog.get_logger()

BACK_OFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pause before the n-th restart in a row; the last one repeats."""
STEADY_S = 30.0
"""An engine that ran this long counts as well again."""
LOG_LIMIT_BYTES = 16 * 1024 * 1024


@dataclass
class _Engine:
    spec: EngineSpec
    pid: int
    started: int
    since: float
    exits: deque[float] = field(default_factory=lambda: deque(maxlen=len(BACK_OFF_S)))
    wanted: bool = True
    restart: asyncio.TimerHandle | None = None
    last_exit: str = ""


class Supervisor:
    """The engines of one role on one node. See `core.service.Engines` for what it promises to role agents."""

    def __init__(self, directory: Path, logs: Path) -> None:
        self._directory = directory
        self._logs = logs
        self._engines: dict[str, _Engine] = {}

    async def ensure(self, spec: EngineSpec) -> bool:
        """Make `spec` run; return whether it was started now. Another argv or environment restarts it."""
        engine = self._engines.get(spec.name) or self._adopt(spec)
        if engine is not None and run.alive(engine.pid, engine.started):
            if _digest(engine.spec) == _digest(spec):
                return False
            await self.stop(spec.name, number=signal.SIGTERM, timeout_s=10)
            engine = None
        if engine is not None and engine.restart is not None:
            engine.restart.cancel()
        self._start(spec, engine)
        return True

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the engine's first process; raise CommandFailedError if it does not run."""
        pid = self.pid(name)
        if pid is None:
            raise CommandFailedError(f"{name} does not run: {self.trouble(name)}", value=name)
        os.kill(pid, number)

    async def stop(self, name: str, *, number: int, timeout_s: float) -> None:
        """Send `number`, wait for its end, kill after `timeout_s`. Fine if it does not run."""
        engine = self._engines.pop(name, None) or self._adopted(name)
        self._engines.pop(name, None)
        if engine is None:
            return
        engine.wanted = False
        if engine.restart is not None:
            engine.restart.cancel()
        if run.alive(engine.pid, engine.started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine.pid, number)
            if not await run.wait_gone(engine.pid, engine.started, timeout_s):
                log.warning("engine-killed", engine=name, after_s=timeout_s)
        _kill_group(engine)
        await run.wait_gone(engine.pid, engine.started, 5)
        self._file(name).unlink(missing_ok=True)

    def trouble(self, name: str) -> str:
        """Return why the engine does not run, with the end of its output; empty if it runs."""
        if self.pid(name) is not None:
            return ""
        engine = self._engines.get(name)
        if engine is None:
            return f"{name} was not started"
        return f"{name} ended {len(engine.exits)} times, last with {engine.last_exit}: {self._tail(name)}".strip(": ")

    def pid(self, name: str) -> int | None:
        """Return the process id of the engine, None if it does not run."""
        engine = self._engines.get(name)
        return engine.pid if engine is not None and run.alive(engine.pid, engine.started) else None

    def close(self) -> None:
        """Stop watching; the engines go on."""
        for engine in self._engines.values():
            engine.wanted = False
            if engine.restart is not None:
                engine.restart.cancel()

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _adopted(self, name: str) -> _Engine | None:
        """Find what an earlier daemon left running under `name`."""
        try:
            known = json.loads(self._file(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if not run.alive(known["pid"], known["started"]):
            return None
        spec = EngineSpec(name, tuple(known["argv"]), Path(known["directory"]), known["env"])
        return _Engine(spec, known["pid"], known["started"], asyncio.get_running_loop().time())

    def _adopt(self, spec: EngineSpec) -> _Engine | None:
        engine = self._adopted(spec.name)
        if engine is not None:
            log.info("engine-adopted", engine=spec.name, pid=engine.pid)
            self._engines[spec.name] = engine
            self._watch(engine)
        return engine

    def _start(self, spec: EngineSpec, before: _Engine | None) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        env = {"LANG": "C.UTF-8", **os.environ, **spec.env}  # ours is clean, and marks the instance
        pid = run.spawn(spec.argv, cwd=spec.directory, env=env, log=self._logs / f"{spec.name}.out")
        engine = _Engine(spec, pid, run.start_time(pid) or 0, asyncio.get_running_loop().time())
        if before is not None:
            engine.exits = before.exits
            engine.last_exit = before.last_exit
        self._engines[spec.name] = engine
        record = {"pid": pid, "started": engine.started, "argv": spec.argv, "directory": str(spec.directory)}
        text = json.dumps({**record, "env": dict(spec.env)})
        files.write_atomically(self._file(spec.name), text, mode=0o600, durable=False)  # no engine outlives a power cut
        log.info("engine-started", engine=spec.name, pid=pid)
        self._watch(engine)

    def _watch(self, engine: _Engine) -> None:
        """Call `_ended` when the process ends, without a thread and without asking again and again."""
        try:
            descriptor = os.pidfd_open(engine.pid)
        except ProcessLookupError:
            self._ended(engine)
            return
        loop = asyncio.get_running_loop()

        def readable() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._ended(engine)

        loop.add_reader(descriptor, readable)

    def _ended(self, engine: _Engine) -> None:
        code = run.reap(engine.pid)
        engine.last_exit = "an unknown code" if code is None else f"code {code}"
        if not engine.wanted or self._engines.get(engine.spec.name) is not engine:
            return
        _kill_group(engine)  # workers that outlived their master would hold its ports
        loop = asyncio.get_running_loop()
        if loop.time() - engine.since > STEADY_S:
            engine.exits.clear()
        engine.exits.append(loop.time())
        delay = BACK_OFF_S[min(len(engine.exits), len(BACK_OFF_S)) - 1]
        log.warning("engine-ended", engine=engine.spec.name, exit=engine.last_exit, restart_in_s=delay)
        engine.restart = loop.call_later(delay, self._restart, engine)

    def _restart(self, engine: _Engine) -> None:
        if engine.wanted and self._engines.get(engine.spec.name) is engine:
            try:
                self._start(engine.spec, engine)
            except (CommandFailedError, OSError) as exc:
                engine.last_exit = str(exc)
                engine.exits.append(asyncio.get_running_loop().time())
                engine.restart = asyncio.get_running_loop().call_later(BACK_OFF_S[-1], self._restart, engine)

    def _tail(self, name: str) -> str:
        try:
            raw = (self._logs / f"{name}.out").read_bytes()[-400:]
        except FileNotFoundError:
            return ""
        return " / ".join(raw.decode("utf-8", "replace").split("\n")[-4:]).strip(" /")


def _kill_group(engine: _Engine) -> None:
    with contextlib.suppress(PermissionError):
        run.signal_group(engine.pid, signal.SIGKILL)


def _digest(spec: EngineSpec) -> str:
    text = json.dumps([spec.argv, str(spec.directory), sorted(spec.env.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def bound_logs(folder: Path, *, limit: int = LOG_LIMIT_BYTES) -> None:
    """Keep every log below `folder` within `limit` bytes: a longer one goes on empty, its last quarter in `NAME.1`.

    Engines append to their logs, so that cutting them is safe at any time.
    """
    for path in [*folder.rglob("*.log"), *folder.rglob("*.out")]:
        if path.stat().st_size > limit:
            with path.open("rb+") as stream:
                stream.seek(-limit // 4, os.SEEK_END)
                path.with_name(path.name + ".1").write_bytes(stream.read())
                stream.truncate(0)
