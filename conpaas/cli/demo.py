"""A director of our own with the sample application: what `quickstart` starts, finds again and ends."""

import asyncio
import hashlib
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import aiohttp

import conpaas
from conpaas.core import archive, files, run, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import (
    BadInputError,
    CommandFailedError,
    ConflictError,
    NotAuthenticatedError,
    NotFoundError,
    PeerError,
)
from conpaas.core.messages.model import OperationView, ServiceView
from conpaas.core.states import ServiceState
from conpaas.sdk import Conpaas, connect

ADMIN = "admin"
SERVICE, TYPE, CLOUD = "guestbook", "php", "local"
HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
PAGE_TIMEOUT_S = 30.0
LOG_TAIL_BYTES = 2000
_IDLE = {ServiceState.INIT, ServiceState.STOPPED, ServiceState.ERROR}


@dataclass(frozen=True)
class Started:
    """What is kept, mode 0600, of the director that was started here."""

    url: str
    password: str
    pid: int = 0
    start: int = 0

    @property
    def alive(self) -> bool:
        """Whether that very process runs."""
        return self.pid > 0 and run.alive(self.pid, self.start)


class Demo:
    """The director of one data folder, as a process that outlives us."""

    def __init__(
        self, data_dir: Path, port: int, *, say: Callable[[str], None], env: Mapping[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir
        self.url = f"http://{HOST}:{port}"
        self._say = say
        self._env = os.environ if env is None else env

    @property
    def file(self) -> Path:
        """Where login and process of the director are kept."""
        return self.data_dir / "quickstart.json"

    @property
    def log(self) -> Path:
        """Where the director writes what it does."""
        return self.data_dir / "director.log"

    def known(self) -> Started | None:
        """Return what is kept of the director here; None if nothing was started in this folder."""
        try:
            return Started(**json.loads(self.file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as exc:
            raise BadInputError(f"{self.file} is damaged: {exc}", value=self.file) from exc

    async def ensure_director(self) -> Started:
        """Return the director of this folder, started if need be; it answers."""
        known = self.known()
        if known is not None and known.alive:
            self.url = known.url
            await self._answer(known)
            return known
        if await _answers(self.url):
            raise ConflictError(
                f"another director answers at {self.url}", value=self.url, hint="choose another --port, or log in there"
            )
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        started = Started(self.url, known.password if known is not None else secrets.token_urlsafe(12))
        self._keep(started)  # before the director has it: a crash in between loses nothing
        pid = run.spawn(
            [
                sys.executable,
                "-m",
                "conpaas",
                "run",
                "director",
                "--data-dir",
                str(self.data_dir),
                "--port",
                self.url.rpartition(":")[2],
            ],
            cwd=self.data_dir,
            env=_environment(self._env, started.password),
            log=self.log,
        )
        started = replace(started, pid=pid, start=run.start_time(pid) or 0)
        self._keep(started)
        await self._answer(started)
        self._say(f"director started, process {pid}")
        return started

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Conpaas]:
        """Give a client of the director, as its administrator."""
        known = self.known()
        if known is None:
            raise NotFoundError(f"no director was started in {self.data_dir}", value=self.data_dir)
        async with connect(known.url) as visitor:
            try:
                session = await visitor.login(ADMIN, known.password)
            except NotAuthenticatedError as exc:
                raise NotAuthenticatedError(
                    f"the password in {self.file} is not the administrator's",
                    hint=f"write the right one there, or choose another --data-dir than {self.data_dir}",
                ) from exc
        async with connect(known.url, session.token.get_secret_value()) as client:
            yield client

    async def deploy(self, client: Conpaas, example: Path) -> ServiceView:
        """Make the sample application run from `example`; what is so already stays. Its page answers on return."""
        found = [service for service in await client.services() if service.name == SERVICE]
        service = found[0] if found else await client.create(type=TYPE, name=SERVICE, cloud=CLOUD)
        operation = await self.activate(client, service, example)
        service = await client.service(service.id)
        if service.state in _IDLE:
            operation = await client.start(service.id)
        operation = operation or service.operation
        if operation is not None:
            await client.wait(operation, on_progress=self._progress())
        service = await client.service(service.id)
        await page(site(service))
        self._say(f"{SERVICE} runs")
        return service

    async def activate(self, client: Conpaas, service: ServiceView, source: Path) -> OperationView | None:
        """Upload the source tree, unless it is there, and begin to activate it, unless it is active."""
        with tempfile.TemporaryDirectory(prefix="conpaas-") as folder:
            packed = Path(folder) / f"{SERVICE}.tar.gz"
            await asyncio.to_thread(archive.pack, source, packed)
            digest = hashlib.sha256(packed.read_bytes()).hexdigest()
            version = next((one for one in await client.code(service.id) if one.sha256 == digest), None)
            if version is None:
                version = await client.upload(service.id, packed)
        return None if version.active else await client.activate(service.id, version.id)

    async def terminate_all(self, client: Conpaas) -> None:
        """Terminate every service of every user, and wait until their instances are given back."""
        services = {row.service for row in await client.instances()} | {one.id for one in await client.services()}
        operations = [await client.terminate(service) for service in sorted(services)]
        for operation in operations:
            await client.wait(operation, on_progress=self._progress())
        self._say(f"{len(services)} services terminated")

    async def stop_director(self) -> None:
        """End the director's process, and wait for its end."""
        known = self.known()
        if known is None or not known.alive:
            return
        os.kill(known.pid, signal.SIGTERM)
        if not await run.wait_gone(known.pid, known.start, STOP_TIMEOUT_S):
            run.signal_group(known.pid, signal.SIGKILL)
            raise CommandFailedError(
                f"the director did not end within {STOP_TIMEOUT_S:g} s and was killed", hint=f"see {self.log}"
            )
        self._say("director stopped")

    def _keep(self, started: Started) -> None:
        files.write_atomically(self.file, json.dumps(asdict(started)), mode=0o600)

    async def _answer(self, started: Started) -> None:
        async def ready() -> bool | None:
            if not started.alive:
                raise CommandFailedError(f"the director ended:\n{self._tail()}", hint=f"its log is {self.log}")
            return await _answers(started.url) or None

        await tasks.wait_for(ready, timeout_s=START_TIMEOUT_S, what="start of the director", clock=SYSTEM_CLOCK)

    def _tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")

    def _progress(self) -> Callable[[OperationView], None]:
        said = ""

        def show(operation: OperationView) -> None:
            nonlocal said
            text = f"{operation.kind}: {operation.message}"
            if operation.message and text != said:
                self._say(text)
            said = text

        return show


def site(service: ServiceView) -> str:
    """Return where the service's site is; raise NotFoundError while there is none."""
    url = service.urls.get("application")
    if url is None:
        raise NotFoundError(f"{service.name} has no site: it is {service.state} {service.reason}".rstrip())
    return url


async def page(url: str) -> str:
    """Return the page at `url` as soon as it is there; raise DeadlineError."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:

        async def get() -> str | None:
            try:
                async with session.get(url) as response:
                    return await response.text() if response.status == 200 else None
            except (aiohttp.ClientError, TimeoutError):
                return None

        return await tasks.wait_for(get, timeout_s=PAGE_TIMEOUT_S, what=f"page of {url}", clock=SYSTEM_CLOCK)


async def _answers(url: str) -> bool:
    async with connect(url) as visitor:
        try:
            await visitor.version()
        except PeerError:
            return False
        return True


def _environment(base: Mapping[str, str], password: str) -> dict[str, str]:
    """Return the director's environment; a checkout that is not installed stays importable."""
    env = {name: value for name, value in base.items() if name not in {"CONPAAS_TOKEN", "CONPAAS_URL"}}
    package = Path(conpaas.__file__).parent.parent
    if not package.is_relative_to(sys.prefix):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package), env.get("PYTHONPATH"))))
    return {**env, "CONPAAS_ADMIN_PASSWORD": password}
