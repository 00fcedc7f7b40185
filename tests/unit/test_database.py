"""The database of the director: whatever is cut off, nothing of it stays in the way of the next transaction."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path

from sqlalchemy import text

from conpaas.director.db.database import Database, _SqliteConnection


def test_a_connection_that_is_closed_while_a_statement_is_alive_leaves_no_lock(tmp_path: Path) -> None:
    one = sqlite3.connect(tmp_path / "db", factory=_SqliteConnection, isolation_level=None)
    one.execute("PRAGMA journal_mode=WAL")
    one.execute("CREATE TABLE numbers (number)")
    one.execute("INSERT INTO numbers VALUES (1), (2)")
    one.execute("BEGIN IMMEDIATE")
    alive = one.execute("DELETE FROM numbers RETURNING number")
    alive.fetchone()
    one.close()

    with contextlib.closing(sqlite3.connect(tmp_path / "db", timeout=0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM numbers").fetchone() == (2,)
    del alive


async def test_transactions_that_are_cut_off_anywhere_do_not_hold_up_the_next_one(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path}/director.sqlite")

    async def write() -> None:
        async with database.write() as session:
            await session.execute(text("SELECT count(*) FROM users"))

    for turns in range(40):
        cut = asyncio.create_task(write())
        for _ in range(turns):
            await asyncio.sleep(0)
        cut.cancel()
        await asyncio.gather(cut, return_exceptions=True)
    async with asyncio.timeout(45):
        await write()
    await database.close()
