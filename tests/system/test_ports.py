"""Every listening port of a live deployment: scanned, held in silence, fed with garbage. No daemon ends or blocks."""

import asyncio
import os
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from pydantic import SecretStr

from conpaas.core import run, tls
from conpaas.core.errors import NotAuthenticatedError
from conpaas.core.identity import Identity, client_context
from conpaas.core.messages.internal import ENROL, Enrol
from conpaas.core.messages.manager import GET_STATE, ManagerState
from conpaas.core.messages.model import ServiceView
from conpaas.core.rpc import Client
from conpaas.core.states import ServiceState
from conpaas.services.php.messages import HTTP_PORT, PHP_PORT, SESSIONS_PORT, WEB_PORT
from tests.fakes.load import Load, fetch
from tests.fakes.stand import PATIENT, Stand, agents, manager, stand
from tests.system.test_life import archive

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(run.find("haproxy") is None, reason="the engines of php are not installed"),
]

Place: TypeAlias = tuple[str, int]
CONTROL_PORT = 5555
DEADLINE_S = 45.0
"""Far more than an answer takes on a busy machine, far less than what all strangers could hold up together."""
GARBAGE = {
    "zeros": b"\x00" * 100_000,
    "a line without end": b"A" * 70_000,
    "http that is none": b"GET / HTTP/9.9\r\nContent-Length: -1\r\n: \r\n\r\n",
    "http without end": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a hello that lies": b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000,
    "half a hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "ssh": b"SSH-2.0-x\r\n" + b"\xff" * 2000,
    "redis": b"*1000000\r\n$1000000000\r\n",
}


@dataclass
class Live:
    """A deployment with one service, its listening ports, and who talks to them by right."""

    here: Stand
    view: ServiceView
    ports: Mapping[str, Place]
    owner: Client
    stranger: Client

    async def assert_served(self) -> None:
        """Each port answers a normal request, on a new connection, in time."""
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(served() for served in self._normal().values()))

    def _normal(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {
            "api": self._api,
            "instances": self._enrol,
            "ssh": self._ssh,
            "manager": self._manager,
            "agents": self._agents,
            "sites": self._sites,
            "sessions": self._sessions,
        }

    async def _api(self) -> None:
        assert (await self.here.client.me()).admin
        assert (await fetch(*self.ports["public"], "/login")).status == 200

    async def _enrol(self) -> None:
        with pytest.raises(NotAuthenticatedError, match="token"):
            await self.stranger.call(ENROL, Enrol(token=SecretStr("x"), csr=""))

    async def _ssh(self) -> None:
        reader, writer = await asyncio.open_connection(*self.ports["ssh"])
        assert await reader.readline() == b"SSH-2.0-ConPaaS\r\n"
        writer.close()

    async def _manager(self) -> None:
        state: ManagerState = await self.owner.call(GET_STATE)
        assert state.state is ServiceState.RUNNING

    async def _agents(self) -> None:
        logs = await self.here.client.logs(self.view.id)  # the manager asks each agent
        assert {log.node for log in logs} == {"manager", *(node.id for node in agents(self.view))}

    async def _sites(self) -> None:
        for name, path in (("proxy", "/"), ("php", "/"), ("web", "/a.css")):
            assert (await fetch(*self.ports[name], path)).status == 200, name

    async def _sessions(self) -> None:
        assert (await fetch(*self.ports["proxy"], "/session.php")).body == b"1"

    def pids(self) -> list[object]:
        nodes = [node for node in self.view.nodes if node.address]
        engines = {
            name: [self.here.engines(node, name)[:1] for node in nodes] for name in ("nginx", "haproxy", "redis")
        }
        return [self.here.director, [self.here.daemon(node) for node in nodes], engines]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    async with stand(**PATIENT) as here:
        service = await here.client.create(type="php", name="site")
        await here.client.start(service.id, wait=True)
        session = "<?php session_start(); echo $_SESSION['n'] = ($_SESSION['n'] ?? 0) + 1;"
        files = {"index.php": "<?php echo 'hello';", "a.css": "body{}", "session.php": session}
        version = await here.client.upload(service.id, archive(folder / "site.tar.gz", files))
        await here.client.activate(service.id, version.id, wait=True)
        await here.client.scale(service.id, {"web": 1, "php": 1}, wait=True)
        view = await here.running(service.id, 3)
        address = {role: node.address for node in view.nodes for role in node.roles}
        ports = {
            "public": ("127.0.0.1", here.port),
            "instances": ("127.0.0.1", int(here._env["CONPAAS_INSTANCES_PORT"])),
            "ssh": ("127.0.0.1", (await here.client.version()).ssh_port),
            "manager": (manager(view).address, CONTROL_PORT),
            **{f"agent of {node.roles[0]}": (node.address, CONTROL_PORT) for node in agents(view)},
            "proxy": (address["proxy"], HTTP_PORT),
            "web": (address["web"], WEB_PORT),
            "php": (address["php"], PHP_PORT),
            "sessions": (manager(view).address, SESSIONS_PORT),
        }
        owner, stranger = await clients(here, view, ports, folder)
        yield Live(here, view, ports, owner, stranger)
        await asyncio.gather(owner.close(), stranger.close())


async def clients(here: Stand, view: ServiceView, ports: Mapping[str, Place], folder: Path) -> tuple[Client, Client]:
    """Return the owner's connection to the manager, and nobody's to the port for instances."""
    key, csr = tls.make_key_and_csr()
    given = await here.client.certificate(csr.decode())
    pair, ca = folder / "owner.pem", folder / "ca.crt"
    pair.write_bytes(key + given.certificate.encode())
    ca.write_text(given.ca)
    name = Identity.manager(given.deployment, view.id, 1, "x").host
    owner = Client(view.manager, tls=client_context(pair, pair, ca), server_hostname=name)
    url = f"https://127.0.0.1:{ports['instances'][1]}"
    anonymous = client_context(None, None, ca)
    return owner, Client(url, tls=anonymous, server_hostname=Identity.director(given.deployment).host)


async def connect(place: Place) -> asyncio.StreamWriter:
    async with asyncio.timeout(DEADLINE_S):
        _, writer = await asyncio.open_connection(*place)
    return writer


async def close(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()
    for writer in writers:
        with suppress(OSError):
            await writer.wait_closed()


async def test_nothing_listens_but_what_is_meant_to(live: Live) -> None:
    addresses = {node.address for node in live.view.nodes}
    found = {place for place in listening() if place[0] in addresses}
    assert found == {place for place in live.ports.values() if place[0] in addresses}
    assert not {"0.0.0.0", "::"} & {host for host, port in listening() if (("127.0.0.1", port) in live.ports.values())}


def listening() -> set[Place]:
    """Return what listens on this machine."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        host, port = words[1].split(":")
        if words[3] == "0A":
            found.add((str(IPv4Address(int.from_bytes(bytes.fromhex(host), "little"))), int(port, 16)))
    return found


async def test_port_scans_silence_and_garbage_end_and_block_nobody(live: Live) -> None:
    before = live.pids()
    url = urlsplit(live.view.urls["application"])
    await live.assert_served()
    async with Load(url.hostname or "", url.port or 0, paths=("/", "/a.css"), clients=2) as load:
        for place in live.ports.values():  # a scan, and one that does not take its leave
            await close([await connect(place) for _ in range(50)])
            for _ in range(20):
                (await connect(place)).transport.abort()
        await live.assert_served()

        silent = [await connect(place) for place in live.ports.values() for _ in range(30)]
        await live.assert_served()

        noisy = []
        for words in GARBAGE.values():
            for place in live.ports.values():
                writer = await connect(place)
                writer.write(words)
                noisy.append(writer)
        await live.assert_served()
        await close([*silent, *noisy])
    assert load.failures == []
    await live.assert_served()
    assert live.pids() == before
    for log in (live.here.directory / "director.log", *live.here.cloud.glob("*/*.log")):
        assert "Traceback" not in log.read_text(errors="replace"), log


async def test_daemons_show_silent_connections_the_door(live: Live) -> None:
    """The ports of our own that speak TLS; engines have time-outs in their configurations."""
    names = [name for name in live.ports if name.startswith(("instances", "manager", "agent"))]
    readers = []
    for name in names:
        reader, writer = await asyncio.open_connection(*live.ports[name])
        readers.append((reader, writer))
    async with asyncio.timeout(DEADLINE_S):
        for reader, writer in readers:
            with suppress(ConnectionError):
                assert await reader.read() == b""
            await close([writer])


async def redis(place: Place, *lines: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*place)
    writer.write(b"".join(line + b"\r\n" for line in lines))
    writer.write_eof()
    async with asyncio.timeout(DEADLINE_S):
        answer = await reader.read()
    await close([writer])
    return answer


@pytest.mark.parametrize("command", [b"PING", b"KEYS *", b"CONFIG GET *", b"FLUSHALL", b"SHUTDOWN NOSAVE", b"INFO"])
async def test_the_session_store_obeys_nobody_without_its_password(live: Live, command: bytes) -> None:
    place = live.ports["sessions"]
    assert (await redis(place, command)).startswith(b"-NOAUTH")
    wrong = await redis(place, b"AUTH default", b"AUTH secret", command)
    assert wrong.count(b"\r\n-") == 2
    assert b"-NOAUTH" in wrong
    await live.assert_served()


async def test_what_instances_are_asked_needs_a_certificate(live: Live) -> None:
    for name, place in live.ports.items():
        if not name.startswith(("manager", "agent")):
            continue
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with suppress(ssl.SSLError, ConnectionError):  # refused at once, or with the first word
            reader, writer = await asyncio.open_connection(*place, ssl=context)
            writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.read() == b"", name
            await close([writer])


async def test_nobody_else_reaches_the_sockets_and_secrets_of_a_deployment(live: Live) -> None:
    """Sockets of administration, keys, passwords: behind a folder that is closed to others, or closed themselves."""
    paths = [Path(folder, name) for folder, _, files in os.walk(live.here.data) for name in files]
    sockets = [path for path in paths if path.is_socket()]
    assert {"admin.sock"} <= {path.name for path in sockets}
    secrets = [path for path in paths if path.suffix in {".key", ".pem", ".sqlite", ".conf"}]
    secrets += [path for path in paths if path.name == "context.json"]
    assert len(secrets) > 8
    for path in (*sockets, *secrets):
        assert not open_to_others(path, live.here.data), path


def open_to_others(path: Path, top: Path) -> bool:
    """Tell whether other users of the machine can write to (a socket) or read (a file) this path."""
    folders = [folder for folder in path.parents if folder == top or folder.is_relative_to(top)]
    bit = stat.S_IWOTH if path.is_socket() else stat.S_IROTH
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in folders) and bool(path.stat().st_mode & bit)


async def test_a_site_does_not_tell_what_is_behind_it(live: Live) -> None:
    for path in ("/__conpaas/status", "/__conpaas/nginx", "/x/../__conpaas/status", "/%5f%5fconpaas/status"):
        assert (await fetch(*live.ports["proxy"], path)).status == 404, path
    for host in ("", "a" * 5000, "x\ty", "127.0.0.1:99999999"):
        assert (await fetch(*live.ports["proxy"], "/", headers={"Host": host})).status in {200, 400}, host
    head = await fetch(*live.ports["proxy"], "/")
    assert not {"x-powered-by", "x-conpaas-client"} & set(head.headers)
    assert "/" not in head.headers.get("server", "")
