"""A PostgreSQL server of this test process: Debian's own, on a Unix socket, gone with the process."""

import atexit
import ctypes
import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

_PR_SET_PDEATHSIG = 1
_numbers = itertools.count(1)


def programs() -> Path | None:
    """Return the folder of the newest PostgreSQL that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


async def new_database() -> str:
    """Return the SQLAlchemy URL of an empty database; the test is skipped where PostgreSQL is not installed."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed")
    socket = _server()
    name = f"test_{next(_numbers)}"
    connection = await asyncpg.connect(host=str(socket), user="postgres", database="postgres")
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return f"postgresql+asyncpg://postgres@/{name}?host={quote(str(socket), safe='')}"


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
    server = subprocess.Popen(
        [binaries / "postgres", "-D", data, "-k", directory, "-h", "", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=(directory / "log").open("wb"),
        cwd="/",
        preexec_fn=_die_with_parent,
        **_as(account),
    )
    atexit.register(_end, server, directory)
    socket = directory / ".s.PGSQL.5432"
    deadline = time.monotonic() + 30
    while not socket.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((directory / "log").read_text())
        time.sleep(0.02)
    return directory


def _end(server: subprocess.Popen[bytes], directory: Path) -> None:
    server.send_signal(signal.SIGINT)
    server.wait(20)
    shutil.rmtree(directory, ignore_errors=True)


def _account() -> pwd.struct_passwd | None:
    """Return whom root runs the server as, for it refuses to be root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _as(account: pwd.struct_passwd | None) -> dict[str, int]:
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid}


def _run(argv: list[Path | str], account: pwd.struct_passwd | None) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", check=False, **_as(account))
    if done.returncode:
        raise RuntimeError(done.stderr)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
