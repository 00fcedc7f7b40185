"""The floor under a PHP service: the very same engines and configurations, launched by hand, without ConPaaS."""

import json
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bench
from benchmarks.bench import Bench, Deployment
from conpaas.core.messages.model import ServiceView
from conpaas.services.php.messages import HTTP_PORT, PHP_PORT, SESSIONS_PORT, WEB_PORT

_ORDER = ("sessions", "php", "web", "proxy")
"""Who is needed by others comes first."""
_PORTS = {"sessions": SESSIONS_PORT, "php": PHP_PORT, "web": WEB_PORT, "proxy": HTTP_PORT}


@dataclass(frozen=True)
class Engine:
    """One program with its configuration, and how one sees that it is ready."""

    argv: list[str]
    folder: Path
    env: dict[str, str]
    door: Path | tuple[str, int]
    """A socket file, or an address and a port."""

    def ready(self) -> bool:
        """Tell whether somebody listens."""
        if isinstance(self.door, Path):
            return self.door.exists()
        with socket.socket() as probe:
            return probe.connect_ex(self.door) == 0


class ByHand:
    """A copy of a running service's engines, at addresses of its own."""

    def __init__(self, b: Bench, deployment: Deployment, service: ServiceView) -> None:
        self._folder = b.new_folder("hand")
        self._running: list[subprocess.Popen[bytes]] = []
        nodes = service.nodes
        self._changes: list[tuple[re.Pattern[str], str]] = []
        proxy = ""
        for node in nodes:
            address, home = bench.free_address(), self._folder / node.id
            self._changes.append((re.compile(re.escape(str(deployment.home(node)))), str(home)))
            self._changes.append((re.compile(rf"\b{re.escape(node.address)}(?!\d)"), address))
            if "proxy" in node.roles:
                proxy = address
        self.url = f"http://{proxy}:{HTTP_PORT}/"
        self._engines: list[Engine] = []
        for node in nodes:
            self._copy(deployment.home(node), self._folder / node.id)
        for role in _ORDER:
            for node in nodes:
                records = (deployment.home(node) / "roles" / role / "engines").glob("*.json")
                self._engines += [self._engine(role, record, node.address) for record in sorted(records)]
        bench.own(self._folder)

    def _engine(self, role: str, record: Path, address: str) -> Engine:
        known = json.loads(self._changed(record.read_text(encoding="utf-8")))
        folder = Path(known["directory"])
        at_socket = record.stem.startswith("fpm-")
        door = folder / "run" / f"{record.stem}.sock" if at_socket else (self._changed(address), _PORTS[role])
        return Engine(known["argv"], folder, {**bench.ENV, **known["env"]}, door)

    def _changed(self, text: str) -> str:
        for pattern, new in self._changes:
            text = pattern.sub(new, text)
        return text

    def _copy(self, home: Path, target: Path) -> None:
        """Copy configurations and code, and write our folders and addresses into them."""
        for name in ("roles", "code"):
            if (home / name).exists():
                shutil.copytree(home / name, target / name, symlinks=True, ignore=_of_the_run)
        for folder in (home / "logs").glob("*"):
            (target / "logs" / folder.name).mkdir(parents=True)
        for path in target.rglob("*"):
            if path.is_symlink():
                goal = str(path.readlink())
                path.unlink()
                path.symlink_to(self._changed(goal))
            elif path.suffix in {".conf", ".cfg"}:
                path.write_text(self._changed(path.read_text(encoding="utf-8")), encoding="utf-8")

    def launch(self) -> None:
        """Start one engine after the other, each when the one before listens, as a script would."""
        deadline = time.monotonic() + bench.DEADLINE_S
        for engine in self._engines:
            process = bench.launch(engine.argv, engine.folder, engine.env, self._folder / "output")
            self._running.append(process)
            while not engine.ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{engine.argv} does not start: {(self._folder / 'output').read_text()[-500:]}")
                time.sleep(0.001)

    def end(self) -> None:
        """Kill the engines, and remove what they wrote, so that the next launch is a first one again."""
        for process in self._running:
            bench.kill(process)
        self._running.clear()
        for path in list(self._folder.rglob("*")):
            if _is_of_the_run(path):
                path.unlink()
            elif path.name == "appendonlydir":
                shutil.rmtree(path)


def _of_the_run(folder: str, names: list[str]) -> set[str]:
    ignored = {"appendonlydir", "engines", "applied.json"} & set(names)
    return ignored | {name for name in names if _is_of_the_run(Path(folder, name))}


def _is_of_the_run(path: Path) -> bool:
    return path.suffix == ".pid" or (path.is_socket() and not path.is_symlink())
