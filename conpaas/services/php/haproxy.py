"""Talking to a running HAProxy by its administration socket: members, maps, counters."""

import asyncio
import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import CommandFailedError, DeadlineError, PeerError

SERVER_OPTIONS = (
    "check inter 500ms fall 2 rise 1 observe layer4 error-limit 3 on-error mark-down maxconn 512"
    " pool-max-conn 512 pool-purge-delay 5s"  # else one added at run time keeps no connection
)
"""Out of rotation 1 s after it dies, at once when requests find it dead."""
SOCKET = "admin.sock"
_ANSWER_S = 5.0
_PIECE_BYTES = 8192  # of a map: a command must fit into HAProxy's buffer of 16 KiB
_DELETE_S = 3.0
_DRAINING, _MAINTENANCE = 0x08 | 0x10, 0x01 | 0x02 | 0x04 | 0x20

Members = Mapping[str, Mapping[str, str]]
"""`address:port` by server, by backend."""


@dataclass(frozen=True)
class Server:
    """A server as HAProxy has it now."""

    address: str
    open: bool
    """It gets requests, as far as administration goes."""


async def command(directory: Path, text: str) -> str:
    """Give one command line and return the answer; raise PeerError if nobody listens."""
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY)  # paths of sockets must be short: by way of /proc
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/{SOCKET}")
            try:
                writer.write(text.encode() + b"\n")
                return (await reader.read()).decode("utf-8", "replace").strip()
            finally:
                writer.close()
    except OSError as exc:  # TimeoutError is one
        raise PeerError(f"haproxy: {str(exc) or type(exc).__name__}") from exc
    finally:
        os.close(folder)


async def _must(directory: Path, text: str, *, expect: str = "") -> None:
    answer = await command(directory, text)
    if expect not in answer or (answer and not expect):
        raise CommandFailedError(f"haproxy: '{text.splitlines()[0][:100]}': {answer[:200]}")


async def mark(directory: Path) -> str:
    """Return the mark of the configuration that runs."""
    return (await command(directory, "show env CONPAAS_CONFIG")).partition("=")[2].strip()


async def servers(directory: Path) -> dict[tuple[str, str], Server]:
    """Return the servers by backend and name."""
    lines = (await command(directory, "show servers state")).splitlines()
    names = lines[1].removeprefix("# ").split()
    rows = [dict(zip(names, line.split(), strict=False)) for line in lines[2:]]
    return {
        (row["be_name"], row["srv_name"]): Server(
            address=f"{row['srv_addr']}:{row['srv_port']}",
            open=not int(row["srv_admin_state"]) & (_DRAINING | _MAINTENANCE),
        )
        for row in rows
    }


async def counters(directory: Path) -> list[dict[str, str]]:
    """Return `show stat`: a row for each frontend, server and backend."""
    text = await command(directory, "show stat")
    return list(csv.DictReader(text.removeprefix("# ").splitlines()))


async def set_members(directory: Path, members: Members, *, drain_s: float) -> None:
    """Make the servers those of `members`: new ones first, then the others drain, at most `drain_s` seconds, and go.

    One that still works on requests then is left to finish them, without new ones, and goes at a later call.
    """
    have = await servers(directory)
    want = {(backend, name): address for backend, some in members.items() for name, address in some.items()}
    for (backend, name), address in want.items():
        await _admit(directory, f"{backend}/{name}", address, have.get((backend, name)))
    leaving = [f"{backend}/{name}" for backend, name in have if (backend, name) not in want]
    for server in leaving:
        await _must(directory, f"set server {server} state drain")
    if leaving:
        await _drained(directory, leaving, drain_s)
    for server in leaving:
        await _dismiss(directory, server)


async def _admit(directory: Path, server: str, address: str, now: Server | None) -> None:
    if now is None:
        add = f"experimental-mode on; add server {server} {address} {SERVER_OPTIONS}"
        await _must(directory, f"{add}; enable health {server}", expect="New server registered")
    elif now.address != address:
        host, _, port = address.rpartition(":")
        await command(directory, f"set server {server} addr {host} port {port}")
    if now is None or not now.open:
        await _must(directory, f"set server {server} state ready")


async def _busy(directory: Path, some: Iterable[str]) -> dict[str, int]:
    rows = await counters(directory)
    sessions = {f"{row['pxname']}/{row['svname']}": int(row["scur"] or 0) + int(row["qcur"] or 0) for row in rows}
    return {server: count for server in some if (count := sessions.get(server, 0))}


async def _drained(directory: Path, leaving: Iterable[str], drain_s: float) -> None:
    async def idle() -> bool | None:
        return None if await _busy(directory, leaving) else True

    try:
        await tasks.wait_for(idle, timeout_s=drain_s, what="requests under way", clock=SYSTEM_CLOCK)
    except DeadlineError:
        return


async def _dismiss(directory: Path, server: str) -> None:
    """Delete an idle server; its idle connections take a moment to close."""
    if await _busy(directory, [server]):
        return
    await _must(directory, f"set server {server} state maint")

    async def deleted() -> bool | None:
        answer = await command(directory, f"experimental-mode on; del server {server}")
        return True if "Server deleted" in answer else None

    try:
        await tasks.wait_for(deleted, timeout_s=_DELETE_S, what=f"deleting {server}", clock=SYSTEM_CLOCK)
    except DeadlineError:
        return


async def set_map(directory: Path, name: str, entries: Mapping[str, str]) -> None:
    """Make a map's entries these, in one step."""
    lines = (await command(directory, f"show map {name}")).splitlines()
    have = dict(line.split(" ", 2)[1:] for line in lines if line)  # "0x55d5 key value"
    if have == dict(entries):
        return
    answer = await command(directory, f"prepare map {name}")
    version = answer.rpartition(" ")[2]
    if not version.isdigit():
        raise CommandFailedError(f"haproxy: 'prepare map {name}': {answer[:200]}")
    for piece in _pieces([f"{key} {value}\n" for key, value in entries.items()]):
        await _must(directory, f"add map @{version} {name} <<\n{piece}")
    await _must(directory, f"commit map @{version} {name}")


def _pieces(lines: Iterable[str]) -> Iterable[str]:
    piece = ""
    for line in lines:
        if piece and len(piece) + len(line) > _PIECE_BYTES:
            yield piece
            piece = ""
        piece += line
    if piece:
        yield piece
