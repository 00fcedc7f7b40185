"""A code store on a database of its own, with a user, a service type that takes code, and repositories to fetch."""

import io
import os
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from conpaas.core import plugins, run
from conpaas.core.messages.base import Message
from conpaas.core.messages.model import Wanted
from conpaas.core.service import Role, ServiceType
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import Application, Service, SshKey, User
from conpaas.director.settings import DirectorSettings, Limits

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GIT_ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


class NoSettings(Message):
    """Nothing to set."""


SHOP = ServiceType(
    name="shop",
    title="Shop",
    description="Takes code.",
    roles=(Role(name="web", title="Web"),),
    settings=NoSettings,
    planner="shop_plugin.planner:Planner",
    agents={},
    takes_code=True,
    default_code="hello",
)
BARE = ServiceType(
    name="bare",
    title="Bare",
    description="Takes none.",
    roles=(),
    settings=NoSettings,
    planner="shop_plugin.planner:Planner",
    agents={},
)


@dataclass
class Rig:
    """What the tests hold."""

    db: Database
    settings: DirectorSettings
    store: CodeStore
    activated: list[tuple[str, str, str]] = field(default_factory=list)

    async def add_user(self, user: str) -> None:
        async with self.db.write() as session:
            session.add(User(id=user, username=user, password_hash="", created=WHEN))
            await session.flush()
            session.add(Application(id=f"app-{user}", user_id=user, name="Mine", created=WHEN))

    async def add_key(self, user: str, line: str, fingerprint: str) -> None:
        async with self.db.write() as session:
            row = SshKey(id=f"key-{user}", user_id=user, name="k", key=line, fingerprint=fingerprint, created=WHEN)
            session.add(row)

    async def add_service(self, service: str, *, user: str = "usr-a", name: str = "blog", kind: str = "shop") -> None:
        async with self.db.write() as session:
            row = Service(
                id=service,
                user_id=user,
                application_id=f"app-{user}",
                type=kind,
                name=name,
                wanted=Wanted(code="code-default", cloud="local").model_dump(mode="json"),
                since=WHEN,
                created=WHEN,
                seed="",
            )
            session.add(row)
            await session.flush()
            await self.store.add_default(row, session)

    async def activate(self, service: str, version: str, actor: str) -> None:
        self.activated.append((service, version, actor))

    def blobs(self) -> list[str]:
        return sorted(path.name for path in (self.settings.data_dir / "blobs").glob("??/*"))

    def leftovers(self) -> list[Path]:
        return list((self.settings.data_dir / "blobs" / "incoming").iterdir())


@asynccontextmanager
async def open_rig(tmp_path: Path, patch: pytest.MonkeyPatch, limits: Limits | None = None) -> AsyncIterator[Rig]:
    plugin = tmp_path / "plugins" / "shop_plugin"
    (plugin / "hello").mkdir(parents=True)
    (plugin / "__init__.py").touch()
    (plugin / "planner.py").touch()
    (plugin / "hello" / "index.php").write_text("<?php echo 'hello';")
    patch.syspath_prepend(str(plugin.parent))
    patch.setattr(plugins, "discover", lambda package, constant, kind: {"shop": SHOP, "bare": BARE})
    data = tmp_path / "data"
    data.mkdir()
    settings = DirectorSettings(data_dir=data, limits=limits or Limits(), git_allow_file=True)
    db = await Database.open(settings.database_url)
    try:
        rig = Rig(db, settings, CodeStore(db, data, settings))
        await rig.add_user("usr-a")
        await rig.add_service("svc-a")
        yield rig
    finally:
        await db.close()


def tar_gz(contents: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def stream(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def git(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, check: bool = True) -> run.Completed:
    argv = ["git", *arguments]
    return await run.run(argv, timeout_s=50, cwd=cwd, env={**GIT_ENVIRONMENT, **(env or {})}, check=check)


async def make_repository(path: Path, contents: Mapping[str, str], *, branch: str = "main") -> str:
    """Make a repository with one commit, and return its hash."""
    path.mkdir(parents=True)
    await git("init", "--quiet", f"--initial-branch={branch}", cwd=path)
    return await commit(path, contents)


async def commit(path: Path, contents: Mapping[str, str], message: str = "First light") -> str:
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    await git("add", "--all", cwd=path)
    await git("commit", "--quiet", "-m", message, cwd=path)
    return (await git("rev-parse", "HEAD", cwd=path)).stdout.decode().strip()
