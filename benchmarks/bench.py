"""What all benchmarks use: a folder, directors, processes that end with us, load, progress."""

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import structlog

import conpaas
from conpaas.cli import processes
from conpaas.cli.demo import CLOUD, Demo
from conpaas.core.messages.model import NodeView
from conpaas.sdk import Conpaas
from conpaas.services.php import site

HOST = "127.0.0.1"
DEADLINE_S = 30.0
NOBODY = 65534
"""Engines and daemons that we start by hand run as this user, if we are root."""
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
"""What engines and daemons that we start by hand find in their environment."""
_BARE = Path(__file__).with_name("bare.py")


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    repetitions: int = 5
    load_s: int = 1
    """Of one run of wrk: short ones, in turn, have the same share of what else the machine does."""
    loads: int = 24
    idle_s: float = 25.0
    calls: int = 2000


QUICK = Effort(repetitions=2, loads=4, idle_s=5.0, calls=300)


class Bench:
    """One run of the benchmarks, in a folder of its own."""

    def __init__(self, folder: Path, effort: Effort) -> None:
        self.folder, self.effort = folder, effort
        self._begun = time.monotonic()
        self._numbers = iter(range(1_000_000))

    def say(self, text: str) -> None:
        """Tell people how far we are."""
        print(f"{time.monotonic() - self._begun:6.1f} s  {text}", file=sys.stderr, flush=True)

    def new_folder(self, name: str) -> Path:
        """Make a folder that the user of engines and daemons can write to."""
        folder = self.folder / f"{name}-{next(self._numbers)}"
        folder.mkdir()
        own(folder)
        return folder

    @contextlib.asynccontextmanager
    async def director(self, **cloud: Any) -> AsyncIterator["Deployment"]:
        """Run a director with one local cloud, until the end of the block; its services end with it."""
        temporary = self.new_folder("tmp")
        env = {name: value for name, value in os.environ.items() if not name.startswith("CONPAAS_")}
        env |= {"TMPDIR": str(temporary), "CONPAAS_INSTANCES_PORT": "0", "CONPAAS_SSH_PORT": "0"}
        env |= {"CONPAAS_CLOUDS": json.dumps({CLOUD: {"driver": "local", **cloud}})}
        demo = Demo(self.folder / f"director-{next(self._numbers)}", free_port(HOST), say=lambda _: None, env=env)
        await demo.ensure_director()
        try:
            async with demo.connected() as client:
                yield Deployment(demo, client)
                await demo.terminate_all(client)
        finally:
            await demo.stop_director()

    @contextlib.contextmanager
    def bare(
        self, body: bytes, tls: tuple[Path, Path] | None = None, address: str = HOST
    ) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
        """Run the bare server, give its URL and process. `tls`: key with certificate, and CA."""
        folder = self.new_folder("bare")
        (folder / "body").write_bytes(body)
        port = free_port(address)
        argv = [sys.executable, "-P", str(_BARE), address, str(port), str(folder / "body"), *map(str, tls or ())]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, cwd=folder)
        try:
            yield f"http{'s' if tls else ''}://{address}:{port}", process
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Deployment:
    """A running director and its administrator's client."""

    demo: Demo
    client: Conpaas

    def home(self, node: NodeView) -> Path:
        """Return the folder of an instance."""
        return self.demo.data_dir / "clouds" / CLOUD / node.cloud_id

    def daemon(self, node: NodeView) -> int:
        """Return the process id of an instance's manager or agent."""
        record = self.demo.data_dir / "clouds" / CLOUD / ".records" / f"{node.cloud_id}.pid"
        first = json.loads(record.read_bytes())["pid"]
        found = [one.pid for one in processes.descendants(first) if _is_daemon(one.pid, node.kind)]
        if len(found) != 1:
            raise RuntimeError(f"instance {node.id} has {len(found)} daemons")
        return found[0]


def _is_daemon(pid: int, kind: str) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"run" in words and kind.encode() in words


def be_quiet() -> None:
    """Keep the logs of what runs in this process out of the way of the progress."""
    logging.disable()
    structlog.configure(processors=[_drop])


def _drop(_logger: object, _method: str, _event: object) -> str:
    raise structlog.DropEvent


def own(folder: Path) -> None:
    """Give a folder, with all in it, to the user of engines and daemons."""
    if os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def launch(argv: Sequence[str], folder: Path, env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, as the user of engines and daemons."""
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **user,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program that `launch` started, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def source_path() -> dict[str, str]:
    """Return what lets a Python of ours import a checkout that is not installed."""
    package = Path(conpaas.__file__).parents[1]
    return {} if package.is_relative_to(sys.prefix) else {"PYTHONPATH": str(package)}


def free_port(address: str) -> int:
    """Return a port of `address` that is free now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return port


def free_address() -> str:
    """Return a loopback address outside the local cloud's block, at random."""
    return f"127.{random.randint(64, 95)}.{random.randint(0, 255)}.{random.randint(2, 250)}"


async def until_page(session: aiohttp.ClientSession, url: str) -> None:
    """Ask for a page until it is there."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as answer:
                    await answer.read()
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.005)


_RATE = re.compile(r"Requests/sec:\s+([\d.]+)")
_BAD = re.compile(r"Non-2xx|Socket errors")


async def wrk(url: str, seconds: int, *, connections: int = 16, headers: Sequence[str] = ()) -> float:
    """Return the requests per second that wrk reaches; an answer that is an error ends the benchmark."""
    options = [word for header in headers for word in ("-H", header)]
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *options, url]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = (await process.communicate())[0].decode()
    found = _RATE.search(text)
    if found is None or _BAD.search(text):
        raise RuntimeError(f"wrk {url}: {text}")
    return float(found[1])


@contextlib.contextmanager
def workspace(effort: Effort) -> Iterator[Bench]:
    """Give a bench; at the end nothing is left of what it started or wrote."""
    processes.adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="conpaas-bench-"))
    folder.chmod(0o711)
    try:
        yield Bench(folder, effort)
    finally:
        _end_descendants()
        site.remove(folder)


def _end_descendants() -> None:
    deadline = time.monotonic() + 10
    while (left := processes.descendants(os.getpid())) and time.monotonic() < deadline:
        processes.kill(left)
        time.sleep(0.02)
