"""A PostgreSQL server of this test process: Debian's own, on a Unix socket, gone with the process."""

import atexit
import functools
import itertools
import os
import pwd
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy import make_url

from conpaas.director.db.database import Database

_KEEPER = 'directory=$1; shift; "$@" -h "" & read -r _; kill -INT $!; wait $!; rm -rf "$directory"'
"""Runs the server until its standard input ends, as it does when the test process ends, however that ends."""
_numbers = itertools.count(1)
_migrated: list[str] = []


def programs() -> Path | None:
    """Return the folder of the newest PostgreSQL that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


async def new_database(template: str = "template1") -> str:
    """Return the SQLAlchemy URL of a new database; the test is skipped where PostgreSQL is not installed.

    It is a copy of `template`, a database that `new_database` has made, or empty.
    """
    if programs() is None:
        pytest.skip("PostgreSQL is not installed")
    socket = _server()
    name = f"test_{next(_numbers)}"
    connection = await asyncpg.connect(host=str(socket), user="postgres", database="postgres")
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    finally:
        await connection.close()
    return f"postgresql+asyncpg://postgres@/{name}?host={quote(str(socket), safe='')}"


async def new_migrated_database() -> str:
    """Return the URL of a new database with the director's tables; they are made once and copied."""
    if not _migrated:
        url = await new_database()
        await (await Database.open(url)).close()
        _migrated.append(str(make_url(url).database))
    return await new_database(_migrated[0])


@functools.cache
def _server() -> Path:
    """Start the server, once; return the folder of its socket."""
    binaries = programs()
    assert binaries is not None
    directory = Path(tempfile.mkdtemp(prefix="conpaas-pg-"))
    account = _account()
    if account is not None:
        os.chown(directory, account.pw_uid, account.pw_gid)
    data = directory / "data"
    _run([binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8"], account)
    options = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=16MB"]
    arguments = [word for option in [*options, "max_connections=60"] for word in ("-c", option)]
    with (directory / "log").open("wb") as output:
        keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER, "sh", directory, binaries / "postgres", "-D", data, "-k", directory, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=output,
            cwd="/",
            user=None if account is None else account.pw_uid,
            group=None if account is None else account.pw_gid,
        )
    atexit.register(_end, keeper)
    status = data / "postmaster.pid"  # its last line says when the server is ready
    deadline = time.monotonic() + 50
    while not (status.exists() and status.read_text().rstrip().endswith("ready")):
        if keeper.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((directory / "log").read_text())
        time.sleep(0.02)
    return directory


def _end(keeper: subprocess.Popen[bytes]) -> None:
    keeper.communicate(timeout=20)


def _account() -> pwd.struct_passwd | None:
    """Return whom root runs the server as, for it refuses to be root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _run(argv: list[Path | str], account: pwd.struct_passwd | None) -> None:
    user, group = (None, None) if account is None else (account.pw_uid, account.pw_gid)
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", check=False, user=user, group=group)
    if done.returncode:
        raise RuntimeError(done.stderr)
