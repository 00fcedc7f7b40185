"""What the role agents of this service type have in common: files, engines that answer, one tiny HTTP client."""

import asyncio
import socket
import string
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from conpaas.core import files, run, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import CommandFailedError, EngineMissingError, PeerError
from conpaas.core.messages.base import Message
from conpaas.core.service import Host
from conpaas.services.php import site
from conpaas.services.php.messages import CodeConfig

READY_S = 20.0
"""How long an engine may take until it answers; on an idle machine it is 0.3 s."""
LOOK_UP_S = 5.0
_REPLY_BYTES = 1 << 16

M = TypeVar("M", bound=Message)


class _Template(string.Template):
    delimiter = "@@"  # `$`, `%` and `@` mean something to the engines


def render(name: str, **values: object) -> str:
    """Fill in a file of `templates/`: `@@address`, `@@{port}`."""
    path = Path(__file__).parent / "templates" / name
    return _Template(path.read_text(encoding="utf-8")).substitute(values)


def program(names: str, package: str) -> str:
    """Return the first of `names` (separated by `|`) that is installed; raise EngineMissingError."""
    for name in names.split("|"):
        found = run.find(name)
        if found is not None:
            return str(found)
    raise EngineMissingError(
        f"{names.replace('|', ' or ')} is not installed (Debian package {package})",
        value=names,
        hint="install it with 'conpaas engines install php'",
    )


def write_if_changed(path: Path, text: str, *, mode: int = 0o640) -> bool:
    """Write `text` to `path`, atomically, unless it is there already; return whether it was written."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return False
    except FileNotFoundError:
        pass
    files.write_atomically(path, text, mode=mode, durable=False)  # it can be made again of what the agent keeps
    return True


def remember(host: Host, config: Message) -> None:
    """Keep what was applied last, for a later `recall`."""
    text = config.model_dump_json(context={"reveal": True})
    write_if_changed(host.directory / "applied.json", text, mode=0o600)


def recall(host: Host, kind: type[M]) -> M | None:
    """Return what was applied last, None if nothing was, or nothing that this version understands."""
    try:
        return kind.model_validate_json((host.directory / "applied.json").read_bytes(), extra="ignore")
    except (FileNotFoundError, ValidationError):
        return None


def forget(host: Host) -> None:
    """Forget what was applied last."""
    (host.directory / "applied.json").unlink(missing_ok=True)


async def prepare(host: Host, config: CodeConfig, active: str | None) -> None:
    """Unpack the code of `config`; forget all versions but it, the one before, and the `active` one."""
    if config.code is not None:
        site.visible(await host.unpacked(config.code), config.document_root)
    keep = {config.code, config.previous, active}
    await host.forget_unpacked(frozenset(sha256 for sha256 in keep if sha256 is not None))


async def get(address: str, port: int, path: str, *, timeout_s: float = 3.0) -> bytes:
    """Return what an engine answers to a GET; raise PeerError unless that is a 200."""
    request = f"GET {path} HTTP/1.0\r\nHost: {address}:{port}\r\n\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reply = await _exchange(address, port, request.encode())
    except OSError as exc:  # TimeoutError is one
        raise PeerError(f"{address}:{port}{path}: {str(exc) or type(exc).__name__}", value=path) from exc
    head, _, body = reply.partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        raise PeerError(f"{address}:{port}{path}: {head[:60].decode('latin-1').splitlines()[:1]}", value=path)
    return body


async def in_numbers(addresses: Mapping[str, str]) -> dict[str, str]:
    """Return the addresses by node with DNS names looked up, which only resolve well at the node that uses them.

    Raises PeerError if one of them cannot be.
    """
    return {name: await _in_numbers(address) for name, address in addresses.items()}


async def _in_numbers(address: str) -> str:
    if _is_number(address):
        return address
    try:
        async with asyncio.timeout(LOOK_UP_S):
            found = await asyncio.get_running_loop().getaddrinfo(address, None, family=socket.AF_INET)
    except OSError as exc:  # TimeoutError is one
        raise PeerError(f"no address is known of {address}: {str(exc) or 'no answer in time'}", value=address) from exc
    return str(found[0][4][0])


def _is_number(address: str) -> bool:
    try:
        ip_address(address)
    except ValueError:
        return False
    return True


async def _exchange(address: str, port: int, request: bytes) -> bytes:
    """Send `request` and return all that comes; without asyncio's streams, which take twice as long."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as peer:
        peer.setblocking(False)  # noqa: FBT003 - the function's own form
        await loop.sock_connect(peer, (address, port))
        await loop.sock_sendall(peer, request)
        reply = b""
        while chunk := await loop.sock_recv(peer, _REPLY_BYTES):
            reply += chunk
    return reply


async def until_ready(host: Host, engine: str, ask: Callable[[], Awaitable[object]]) -> None:
    """Ask an engine until it answers; raise CommandFailedError with its own words when it does not."""

    async def answers() -> bool | None:
        try:
            await ask()
        except PeerError:
            return None
        return True

    try:
        await tasks.wait_for(answers, timeout_s=READY_S, what=engine, clock=SYSTEM_CLOCK, period_s=0.02)
    except PeerError as exc:  # DeadlineError is one
        why = host.engines.trouble(engine) or exc.message
        raise CommandFailedError(f"{engine} does not answer: {why}", value=engine) from exc
