"""Opening the database, reading it and writing to it.

The director is the only writer and writes one transaction at a time: what a transaction has read is still so when it
commits, on SQLite and on PostgreSQL alike.
"""

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, UOWTransaction

from conpaas.core.errors import BadInputError, ConflictError, DiskFullError
from conpaas.director.db.models import Base, EventRow, Instance, Operation, Service, User

_IMMEDIATE = "conpaas_immediate"
_ONE_DIRECTOR = 0x636F6E70616173  # "conpaas": the advisory lock of the one director on a PostgreSQL database


@dataclass
class Changes:
    """What one transaction has changed; told to whoever shows it, after the commit."""

    tables: set[str] = field(default_factory=set)
    services: set[str] = field(default_factory=set)
    operations: set[str] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    events: list[EventRow] = field(default_factory=list)

    def note(self, row: Base) -> None:
        """Take down that `row` was made, changed or deleted."""
        self.tables.add(row.__tablename__)
        match row:
            case Service():
                self.services.add(row.id)
            case Instance():
                self.services.add(row.service_id)
            case Operation():
                self.operations.add(row.id)
                self.services.add(row.service_id)
            case User():
                self.users.add(row.id)
            case EventRow():
                self.events.append(row)
            case _:
                pass


class _TrackedSession(Session):
    """A session that keeps account of what it flushes."""


@event.listens_for(_TrackedSession, "after_flush")
def _note_changes(session: Session, _context: UOWTransaction) -> None:
    changes: Changes = session.info["changes"]
    for row in (*session.new, *session.dirty, *session.deleted):
        if row in session.new or row in session.deleted or session.is_modified(row):
            changes.note(row)


class Database:
    """The engine, with sessions that read and sessions that write.

    `stamp` tells caches whether a table may have changed since they looked.
    """

    def __init__(self, engine: AsyncEngine, lock_connection: AsyncConnection | None = None) -> None:
        self.engine = engine
        self.on_commit: list[Callable[[Changes], None]] = []
        self._writing = asyncio.Lock()
        self._writer = engine.execution_options(**{_IMMEDIATE: True})
        self._stamps: Counter[str] = Counter()
        self._lock_connection = lock_connection

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect and bring the tables up to date.

        Raises BadInputError for a URL that cannot be used, ConflictError when another director holds the database.
        """
        try:
            sqlite = make_url(url).get_backend_name() == "sqlite"
            words = {"factory": _SqliteConnection} if sqlite else {}
            engine = create_async_engine(url, pool_size=8, max_overflow=8, connect_args=words)
        except (ArgumentError, ImportError) as exc:
            raise BadInputError(f"the database URL cannot be used: {exc}", hint=_URL_HINT) from exc
        if sqlite:
            _prepare_sqlite(engine.sync_engine)
        try:
            held = await _hold(engine)
            async with engine.connect() as connection:
                await connection.run_sync(migrate)
                await connection.commit()
        except (OSError, SQLAlchemyError) as exc:
            await engine.dispose()
            shown = make_url(url).render_as_string(hide_password=True)
            raise BadInputError(f"cannot open the database {shown}: {exc}", value=shown, hint=_URL_HINT) from exc
        except ConflictError:
            await engine.dispose()
            raise
        return cls(engine, held)

    async def close(self) -> None:
        """Close all connections."""
        if self._lock_connection is not None:
            await self._lock_connection.close()
        await self.engine.dispose()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """Open a session that sees one consistent state and changes nothing."""
        async with AsyncSession(self.engine, expire_on_commit=False) as session:
            yield session

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """Open the session that may change things; commits at the end of the block, rolls back on any error."""
        changes = Changes()
        async with (
            self._writing,
            AsyncSession(
                self._writer,
                expire_on_commit=False,
                sync_session_class=_TrackedSession,
                info={"changes": changes},
            ) as session,
        ):
            try:
                yield session
                await session.commit()
            except OperationalError as exc:
                if "disk is full" in str(exc) or "No space left" in str(exc):
                    raise DiskFullError("no space left to write to the database") from exc
                raise
        self._stamps.update(changes.tables)
        for tell in self.on_commit:
            tell(changes)

    def stamp(self, *tables: str) -> tuple[int, ...]:
        """Return a value that differs from the one before if any of `tables` was written to in between."""
        return tuple(self._stamps[table] for table in tables)


_URL_HINT = "for example sqlite+aiosqlite:////var/lib/conpaas/director.sqlite or postgresql+asyncpg://user@host/name"


class _SqliteConnection(sqlite3.Connection):
    """Closed while statements of it are alive, as when a task is cancelled, SQLite's own would keep its locks."""

    def close(self) -> None:
        if self.in_transaction:
            self.rollback()
        super().close()


def _prepare_sqlite(engine: Engine) -> None:
    """Let SQLAlchemy, not the driver, begin transactions; a writing one takes its lock at once."""

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=10000", "synchronous=NORMAL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(_IMMEDIATE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


async def _hold(engine: AsyncEngine) -> AsyncConnection | None:
    """Claim a PostgreSQL database for this director for as long as the connection lives."""
    if engine.dialect.name != "postgresql":
        return None  # an SQLite file lies in the data directory, which is locked
    connection = await engine.connect()
    connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
    got = await connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _ONE_DIRECTOR})
    if not got:
        await connection.close()
        raise ConflictError("another director uses this database", hint="stop it first, or use another database")
    return connection


def migrate(connection: Connection) -> None:
    """Bring the tables up to date."""
    command.upgrade(migration_config(connection), "head")


def migration_config(connection: Connection) -> Config:
    """Return what Alembic must know."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config
