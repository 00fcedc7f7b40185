"""Settings, the data folder and the database: what is off is said, what is there is kept."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, select, text

from conpaas.core.errors import BadInputError, ConflictError, DiskFullError
from conpaas.core.messages.base import Message
from conpaas.director.app import locked
from conpaas.director.db.database import Changes, Database
from conpaas.director.db.models import Base, EventRow, User
from conpaas.director.ledger import user_of
from conpaas.director.settings import DirectorSettings, Limits
from tests.fakes import postgres
from tests.fakes.director import START, open_rig


@pytest.mark.parametrize("kind", [DirectorSettings, Limits])
def test_every_setting_is_documented(kind: type[DirectorSettings] | type[Message]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "director.toml"
    clouds = '[clouds.one]\ndriver = "local"'
    file.write_text(f"port = 1\ninstances_port = 2\nssh_port = 3\n{clouds}\n[limits]\nservices = 5")
    monkeypatch.setenv("CONPAAS_PORT", "10")
    monkeypatch.setenv("CONPAAS_INSTANCES_PORT", "20")

    read = DirectorSettings.load(data_dir=tmp_path, port=100)

    assert (read.port, read.instances_port, read.ssh_port) == (100, 20, 3)
    assert read.clouds == {"one": {"driver": "local"}}
    assert (read.limits.services, read.limits.code_versions) == (5, 100)


def test_the_data_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/a/share")
    assert DirectorSettings.load().data_dir == Path("/home/a/share/conpaas")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert DirectorSettings.load().data_dir == Path("/var/lib/conpaas")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port = 99999", "port"),
        ("port = ", "TOML"),
        ("[limits]\nservice = 5", "limits.service"),
        ("prot = 9999", "did you mean 'port'?"),
        ("nothing_like_it = 1", "settings.md"),
    ],
)
def test_a_setting_that_is_off_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)

    with pytest.raises(BadInputError) as caught:
        DirectorSettings.load(file)

    assert says in f"{caught.value.message} {caught.value.hint}"


def test_a_settings_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no settings file"):
        DirectorSettings.load(tmp_path / "none.toml")


def test_a_data_folder_has_one_director(tmp_path: Path) -> None:
    with locked(tmp_path / "data"):
        with pytest.raises(ConflictError, match=f"process {os.getpid()}"), locked(tmp_path / "data"):
            pass
        assert (tmp_path / "data" / "director.sqlite").stat().st_mode & 0o777 == 0o600
    with locked(tmp_path / "data"):
        pass


def test_a_data_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="cannot be used"), locked(tmp_path / "file" / "data"):
        pass


@pytest.mark.parametrize("url", ["rubbish", "mysql+nonesuch://x", "sqlite+aiosqlite:////nonexistent/dir/x.sqlite"])
async def test_a_database_that_cannot_be_opened_is_an_error(url: str) -> None:
    with pytest.raises(BadInputError, match="database"):
        await Database.open(url)

    async with asyncio.timeout(45):  # aiosqlite ends the thread of a connection that failed a moment later
        while any("_connection_worker_thread" in thread.name for thread in threading.enumerate()):
            await asyncio.sleep(0.01)


async def test_a_postgresql_database_has_one_director() -> None:
    url = await postgres.new_database()
    db = await Database.open(url)
    try:
        with pytest.raises(ConflictError, match="another director"):
            await Database.open(url)
    finally:
        await db.close()
    await (await Database.open(url)).close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_the_migrations_make_what_the_models_say(tmp_path: Path, kind: str) -> None:
    url = await postgres.new_database() if kind == "postgresql" else f"sqlite+aiosqlite:///{tmp_path / 'db'}"
    db = await Database.open(url)

    def differences(connection: Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    try:
        async with db.engine.connect() as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await db.close()


async def test_a_write_that_fails_leaves_nothing_and_tells_nobody(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        told: list[Changes] = []
        rig.db.on_commit.append(told.append)
        stamp = rig.db.stamp("events")

        async def fail() -> None:
            async with rig.db.write() as session:
                session.add(EventRow(at=START, kind="odd", actor="a"))
                await session.flush()
                raise RuntimeError("no")

        with pytest.raises(RuntimeError):
            await fail()

        assert await rig.events("odd") == []
        assert told == []
        assert rig.db.stamp("events") == stamp


async def test_a_write_tells_what_it_changed(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        user = await rig.add_user()
        told: list[Changes] = []
        rig.db.on_commit.append(told.append)
        stamp = rig.db.stamp("users")

        async with rig.db.write() as session:
            row = await session.scalar(select(User).where(User.id == user))
            assert row is not None
            row.credits = row.credits  # no change at all
        assert rig.db.stamp("users") == stamp

        async with rig.db.write() as session:
            row = await session.scalar(select(User).where(User.id == user))
            assert row is not None
            row.credits += 1
        assert rig.db.stamp("users") != stamp
        assert [changes.users for changes in told] == [set(), {user}]


async def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        user = await rig.add_user()
        async with rig.db.write() as session:
            pages = await session.scalar(text("PRAGMA page_count"))
            await session.execute(text(f"PRAGMA max_page_count = {pages}"))

        async def fill() -> None:
            async with rig.db.write() as session:
                (await user_of(session, user)).credits = 7
                session.add(EventRow(at=START, kind="long", actor="a", message="x" * 1_000_000))

        with pytest.raises(DiskFullError, match="no space left"):
            await fill()

        assert await rig.credits(user) == 100
        async with rig.db.write() as session:
            await session.execute(text("PRAGMA max_page_count = 100000000"))
        await fill()
        assert await rig.credits(user) == 7
