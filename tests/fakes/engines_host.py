"""Nodes for role agents under test: real engines, each node with a folder and a loopback address of its own.

Run by root, everything happens as an unprivileged user, as on an instance: no engine runs as root.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from conpaas.core.engines import Supervisor
from conpaas.core.errors import BlobMissingError
from conpaas.core.service import Host, RoleAgent

UNPRIVILEGED = 61_234

AgentT = TypeVar("AgentT", bound=RoleAgent[Any])


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be somebody else than root for a while; nothing changes for others."""
    if os.geteuid() != 0:
        yield
        return
    user, groups = os.getresuid(), os.getgroups()
    os.setgroups([])
    os.setresgid(UNPRIVILEGED, UNPRIVILEGED, 0)
    os.setresuid(UNPRIVILEGED, UNPRIVILEGED, 0)
    try:
        yield
    finally:
        os.setresuid(*user)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


class Machines:
    """Makes role agents on nodes, and code versions for them; at the end no process and no file is left."""

    def __init__(self, new_address: Callable[[], str]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="conpaas-"))
        self.forgotten: list[frozenset[str]] = []
        self._new_address = new_address
        self._supervisors: list[tuple[Path, Supervisor]] = []

    def code(self, files: Mapping[str, str]) -> str:
        """Make a code version of these files (read-only, as unpacked ones may be); return its SHA-256."""
        sha256 = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
        folder = self.directory / "unpacked" / sha256
        for name, text in ({} if folder.exists() else files).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o444)
        return sha256

    def tree(self, folder: str) -> str:
        """Make a code version of a folder of this machine, in English; return its SHA-256."""
        sha256 = hashlib.sha256(folder.encode()).hexdigest()
        target = self.directory / "unpacked" / sha256
        if target.exists():
            return sha256
        shutil.copytree(folder, target, ignore=_left_out, ignore_dangling_symlinks=True)
        return sha256

    async def _unpacked(self, sha256: str) -> Path:
        path = self.directory / "unpacked" / sha256
        if not path.exists():
            raise BlobMissingError("this node has not been sent the code version", value=sha256)
        return path

    async def _forget(self, keep: frozenset[str]) -> None:
        self.forgotten.append(keep)

    def host(self, name: str, address: str | None = None) -> Host:
        """Make a role's place on a node; the same name gives the same place, as after a restart of the agent."""
        folder = self.directory / name
        for path in (folder / "role", folder / "logs"):
            path.mkdir(parents=True, exist_ok=True)
        supervisor = Supervisor(folder / "engines", folder / "logs")
        self._supervisors.append((folder / "engines", supervisor))
        return Host(
            instance=name,
            address=address or self._new_address(),
            directory=folder / "role",
            data=folder / "role" / "data",
            logs=folder / "logs",
            engines=supervisor,
            unpacked=self._unpacked,
            forget_unpacked=self._forget,
        )

    def agent(self, kind: Callable[[Host], AgentT], name: str, address: str | None = None) -> AgentT:
        """Make a role agent on a node."""
        return kind(self.host(name, address))

    @staticmethod
    def end_agent(agent: RoleAgent[Any]) -> None:
        """End an agent as its daemon would end: engines go on, nobody watches them."""
        _supervisor(agent).close()

    async def close(self) -> None:
        """Kill all engines, delete all files."""
        for _, supervisor in self._supervisors:
            supervisor.close()  # all of them first: one would start again what another one kills
        for folder, supervisor in self._supervisors:
            for record in folder.glob("*.json"):
                await supervisor.stop(record.stem, number=signal.SIGKILL, timeout_s=5)
        for path, _, _ in os.walk(self.directory):
            Path(path).chmod(0o700)
        shutil.rmtree(self.directory)


def _supervisor(agent: RoleAgent[Any]) -> Supervisor:
    engines = agent.host.engines
    assert isinstance(engines, Supervisor)
    return engines


def engine_pids(agent: RoleAgent[Any]) -> dict[str, int]:
    """Return the engines of an agent that run."""
    engines = _supervisor(agent)
    pids = {name: engines.pid(name) for name in engines._engines}
    return {name: pid for name, pid in pids.items() if pid is not None}


def kill_engine(agent: RoleAgent[Any], name: str) -> None:
    """Kill an engine with all its processes."""
    os.killpg(engine_pids(agent)[name], signal.SIGKILL)


def kill_machine(agent: RoleAgent[Any]) -> None:
    """Kill all engines, and nobody starts them again."""
    pids = engine_pids(agent)
    _supervisor(agent).close()
    for pid in pids.values():
        os.killpg(pid, signal.SIGKILL)


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Leave out what we may not read, and translations: they are thousands of files."""
    foreign = Path(folder).name == "lang"
    return [name for name in names if (foreign and name != "en") or not os.access(Path(folder, name), os.R_OK)]
