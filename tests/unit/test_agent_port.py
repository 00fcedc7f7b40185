"""Bad days on the listening ports of a real agent and a real manager: none blocks them, none ends them.

What strangers do is done to both daemons of one deployment; meanwhile the right caller is served within a deadline.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from conpaas.core import process, tls
from conpaas.core.errors import ConpaasError, ForbiddenError, PeerError
from conpaas.core.identity import Identity, client_context
from conpaas.core.messages.agent import GET_STATUS, AgentStatus
from conpaas.core.messages.base import Endpoint
from conpaas.core.messages.manager import GET_STATE, ManagerState
from conpaas.core.rpc import Client
from conpaas.core.states import ServiceState
from tests.fakes.deployment import FakeDirector, deployment

pytestmark = pytest.mark.timeout(180)

DEADLINE_S = 45.0
"""Far more than a call takes on a busy machine, far less than what those who hold a port up could do together."""


class Ports:
    """The listening ports of one deployment, and how their right callers reach them."""

    def __init__(self, director: FakeDirector, folder: Path) -> None:
        self.director, self.folder = director, folder
        self.authority = director.authority
        assert director.manager is not None
        self.manager = director.manager[0]
        self.agent = director.agents["i-1"][0]
        self.addresses = [(one.context.address, one.ports[0]) for one in (self.agent, self.manager)]
        self.clients: list[Client] = []

    def client(
        self,
        identity: Identity,
        *,
        to: int = 0,
        authority: tls.Authority | None = None,
        lifetime_s: float = 3600,
        now: datetime | None = None,
    ) -> Client:
        """Return a client of the agent (0) or the manager (1) that bears a fresh certificate."""
        key, csr = tls.make_key_and_csr()
        certificate = (authority or self.authority).sign(csr, identity, lifetime_s=lifetime_s, now=now)
        pair = self.folder / f"client-{len(self.clients)}.pem"
        pair.write_bytes(key + certificate)
        return self._client(client_context(pair, pair, self.folder / "ca.crt"), to)

    def anonymous(self, to: int = 0) -> Client:
        return self._client(client_context(None, None, self.folder / "ca.crt"), to)

    def _client(self, context: ssl.SSLContext, to: int) -> Client:
        host, port = self.addresses[to]
        name = [Identity.agent("dep-test", "svc-1", "i-1"), Identity.manager("dep-test", "svc-1", 1, "m-1")][to].host
        client = Client(f"https://{host}:{port}", tls=context, server_hostname=name)
        self.clients.append(client)
        return client

    async def assert_served(self) -> None:
        """The manager reaches its agent and the director its manager, on new connections."""
        manager = self.client(Identity.manager("dep-test", "svc-1", 1, "m-1"))
        director = self.client(Identity.director("dep-test"), to=1)
        status: AgentStatus = await manager.call(GET_STATUS, timeout_s=DEADLINE_S)
        assert status.instance == "i-1"
        live: ManagerState = await director.call(GET_STATE, timeout_s=DEADLINE_S)
        assert live.state is ServiceState.RUNNING
        assert self.director.manager is not None
        assert not any(task.done() for _, task in (self.director.manager, self.director.agents["i-1"]))


@pytest.fixture
async def ports(tmp_path: Path, new_address: Callable[[], str]) -> AsyncIterator[Ports]:
    async with deployment(tmp_path, new_address) as director:
        director.want(running=True)
        await director.until_state(ServiceState.RUNNING)
        ports = Ports(director, tmp_path)
        yield ports
        for client in ports.clients:
            await client.close()


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No stack trace and no warning of asyncio or aiohttp: strangers do not fill our logs."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call"), *caplog.records]
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []


async def connect(address: tuple[str, int]) -> asyncio.StreamWriter:
    async with asyncio.timeout(DEADLINE_S):
        _, writer = await asyncio.open_connection(*address)
    return writer


async def close(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def test_a_port_scan(ports: Ports) -> None:
    for address in ports.addresses:
        for _ in range(200):
            await close(await connect(address))
    await ports.assert_served()


async def test_a_port_scan_that_resets_its_connections(ports: Ports) -> None:
    for address in ports.addresses:
        for _ in range(50):
            writer = await connect(address)
            writer.transport.abort()
    await ports.assert_served()


async def test_silent_connections(ports: Ports) -> None:
    silent = await asyncio.gather(*(connect(address) for address in ports.addresses for _ in range(50)))
    await ports.assert_served()
    await close(*silent)
    await ports.assert_served()


@pytest.mark.parametrize(
    "words",
    [
        b"\x00" * 100_000,
        b"\xff" * 5,
        b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000,
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x17\x03\x03\x00\x10" + b"\x00" * 16,
    ],
    ids=["zeros", "ones", "plain-http", "http2", "ssh", "long-hello", "bad-hello", "alert", "early-data"],
)
async def test_garbage(ports: Ports, words: bytes) -> None:
    talking = []
    for address in ports.addresses:
        for _ in range(5):
            writer = await connect(address)
            writer.write(words)
            talking.append(writer)
    await ports.assert_served()
    await close(*talking)


def hello(host: str) -> bytes:
    """Return the first packet of a good client."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    handshake = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=host)
    with suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
async def test_half_a_handshake(ports: Ports, share: float) -> None:
    packet = hello("i-1.svc-1.dep-test.conpaas.internal")
    halves = []
    for address in ports.addresses:
        for _ in range(20):
            writer = await connect(address)
            writer.write(packet[: int(len(packet) * share)])
            halves.append(writer)
    await ports.assert_served()
    await close(*halves)
    await ports.assert_served()


async def test_who_does_not_shake_hands_is_shown_the_door(
    tmp_path: Path, new_address: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HANDSHAKE_S", 0.3)
    async with deployment(tmp_path, new_address) as director:
        assert director.manager is not None
        manager = director.manager[0]
        await manager.ready.wait()
        for first in (b"", hello("x")[:20]):
            reader, writer = await asyncio.open_connection(manager.context.address, manager.ports[0])
            writer.write(first)
            async with asyncio.timeout(DEADLINE_S):
                with suppress(ConnectionError):
                    assert await reader.read() == b""
            await close(writer)


async def test_nobody(ports: Ports) -> None:
    for to, endpoint in enumerate((GET_STATUS, GET_STATE)):
        with pytest.raises(PeerError):
            await ports.anonymous(to).call(endpoint, timeout_s=DEADLINE_S)
    await ports.assert_served()


YESTERDAY = datetime.now(UTC) - timedelta(days=1)
MANAGER = Identity.manager("dep-test", "svc-1", 1, "m-1")
DIRECTOR = Identity.director("dep-test")


@pytest.mark.parametrize(("to", "endpoint", "identity"), [(0, GET_STATUS, MANAGER), (1, GET_STATE, DIRECTOR)])
async def test_certificates_that_are_no_good(ports: Ports, to: int, endpoint: Endpoint, identity: Identity) -> None:
    other = tls.Authority.create("dep-test")  # of the same name, but not the same
    bad = {
        "expired": ports.client(identity, to=to, lifetime_s=60, now=YESTERDAY),
        "not yet valid": ports.client(identity, to=to, now=datetime.now(UTC) + timedelta(days=1)),
        "of another CA": ports.client(identity, to=to, authority=other),
    }
    answers = {
        why: await asyncio.gather(client.call(endpoint, timeout_s=DEADLINE_S), return_exceptions=True)
        for why, client in bad.items()
    }
    assert {why: type(answer) for why, (answer,) in answers.items()} == dict.fromkeys(bad, PeerError)
    await ports.assert_served()


@pytest.mark.parametrize(
    ("to", "endpoint", "identity"),
    [
        (0, GET_STATUS, Identity.manager("dep-test", "svc-2", 9, "m-9")),
        (0, GET_STATUS, Identity.agent("dep-test", "svc-1", "i-1")),
        (0, GET_STATUS, Identity.director("dep-test")),
        (0, GET_STATUS, Identity.for_user("dep-test", "u")),
        (1, GET_STATE, Identity.manager("dep-test", "svc-2", 9, "m-9")),
        (1, GET_STATE, Identity.agent("dep-test", "svc-1", "i-1")),
        (1, GET_STATE, Identity.agent("dep-test", "svc-2", "i-1")),
        (1, GET_STATE, Identity.for_user("dep-test", "stranger")),
    ],
    ids=lambda value: value.uri if isinstance(value, Identity) else "",
)
async def test_good_certificates_of_the_wrong_ones(
    ports: Ports, to: int, endpoint: Endpoint, identity: Identity
) -> None:
    with pytest.raises(ConpaasError) as caught:
        await ports.client(identity, to=to).call(endpoint, timeout_s=DEADLINE_S)
    assert caught.value.status in {403, 404}
    await ports.assert_served()


async def test_a_manager_of_a_previous_epoch(ports: Ports) -> None:
    replaced = Identity.manager("dep-test", "svc-1", 2, "m-2")
    assert (await ports.client(replaced).call(GET_STATUS, timeout_s=DEADLINE_S)).instance == "i-1"
    with pytest.raises(ForbiddenError):
        await ports.client(MANAGER).call(GET_STATUS, timeout_s=DEADLINE_S)
    kept_alive = ports.manager.nodes.handles["i-1"].client
    assert kept_alive is not None
    with pytest.raises(ForbiddenError):  # also on a connection that was made before
        await kept_alive.call(GET_STATUS, timeout_s=DEADLINE_S)
    folder = ports.agent.roles.directory
    assert (folder / "epoch").read_text() == "2"


async def test_a_manager_does_not_take_another_instance_for_its_node(ports: Ports) -> None:
    """An address that was given to another instance meanwhile: the name in the certificate tells."""
    good = ports.client(MANAGER)
    good.server_hostname = Identity.agent("dep-test", "svc-1", "i-2").host
    with pytest.raises(PeerError):
        await good.call(GET_STATUS, timeout_s=DEADLINE_S)
    await ports.assert_served()


async def test_an_old_tls_version(ports: Ports) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    for host, port in ports.addresses:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, port, ssl=context)
    await ports.assert_served()


async def test_all_of_it_at_once(ports: Ports) -> None:
    crowd = await asyncio.gather(*(connect(address) for address in ports.addresses for _ in range(60)))
    for number, writer in enumerate(crowd):
        writer.write([b"", b"\x00" * 1000, hello("x")][number % 3])
    strangers = [ports.anonymous(to) for to in (0, 1)]
    answers = await asyncio.gather(
        *(client.call(GET_STATUS, timeout_s=DEADLINE_S) for client in strangers),
        ports.assert_served(),
        return_exceptions=True,
    )
    assert isinstance(answers[0], PeerError)
    assert answers[2] is None, answers[2]
    await close(*crowd)
