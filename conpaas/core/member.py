"""What managers and agents have in common: a context, an identity of their own, and a director.

A member makes its own key, enrols with its one-use token, renews its certificate at two thirds of its life, and knows
its peers by name (`core.identity`). Its folder holds `context.json`, `ca.crt`, `member.pem` (key and certificate,
replaced together once the new pair has proved good) and, while a certificate is asked for, `next.*`.
"""

import asyncio
import contextlib
import ssl
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from aiohttp import web

from conpaas.core import files, run, tasks
from conpaas.core.clock import Clock
from conpaas.core.errors import ConpaasError, PeerError
from conpaas.core.identity import Identity, client_context, peer_identity, server_context
from conpaas.core.messages.base import Endpoint
from conpaas.core.messages.internal import ENROL, RENEW, Certificate, Context, Enrol, Renew
from conpaas.core.rpc import Authenticate, Client
from conpaas.core.trust import Caller, Target, authorize, caller_of

log = structlog.get_logger()

ENROL_DELAYS_S = (0.1, 0.2, 0.5, *[1.0] * 5, *[5.0] * 400)
"""A director that is away comes back: keep asking for half an hour, the life of a token."""
RENEW_RETRY_S = 60.0


class Member:
    """One manager or agent of a service, as its director and its peers know it."""

    def __init__(self, context: Context, directory: Path, *, clock: Clock) -> None:
        self.context = context
        self.directory = directory
        self.clock = clock
        self.server_tls: ssl.SSLContext
        self.client_tls: ssl.SSLContext
        self.director: Client
        self.enrolled = asyncio.Event()
        """Set when there is a certificate, of now or of before."""
        self._renew_at = clock.now()

    async def open(self, stack: AsyncExitStack) -> None:
        """Enrol, unless a certificate is there already, and open the connection to the director."""
        ca = self.directory / "ca.crt"
        files.write_atomically(ca, self.context.ca)
        if not self._pair.exists():
            await self._enrol(ca)
        self.enrolled.set()
        self.server_tls = server_context(self._pair, self._pair, ca, require_client=True)
        self.client_tls = client_context(self._pair, self._pair, ca)
        self.director = self.client(self.context.director, Identity.director(self.context.deployment))
        stack.push_async_callback(self.director.close)
        self._plan_renewal()

    @property
    def _pair(self) -> Path:
        return self.directory / "member.pem"

    @property
    def _identity(self) -> Identity:
        context = self.context
        if context.kind == "agent":
            return Identity.agent(context.deployment, context.service, context.instance)
        return Identity.manager(context.deployment, context.service, context.epoch, context.instance)

    def client(self, base: str, peer: Identity) -> Client:
        """Return a client of `peer` at `base`, who must prove to be that peer."""
        return Client(base, tls=self.client_tls, server_hostname=peer.host)

    async def _enrol(self, ca: Path) -> None:
        request = Enrol(token=self.context.token, csr=await self._request())
        peer = Identity.director(self.context.deployment)
        client = Client(self.context.director, tls=client_context(None, None, ca), server_hostname=peer.host)
        try:
            answer: Certificate = await tasks.retry(
                lambda: client.call(ENROL, request), on=PeerError, delays_s=ENROL_DELAYS_S, clock=self.clock
            )
        finally:
            await client.close()
        self._keep(answer)
        log.info("enrolled", instance=self.context.instance)

    async def _request(self) -> str:
        """Return a signing request for a new key; the same one again if its answer never came."""
        key, csr = self.directory / "next.key", self.directory / "next.csr"
        if not (csr.exists() and key.exists()):
            await _make_key(key, csr)
        return csr.read_text()

    def _keep(self, answer: Certificate) -> None:
        key, csr, pair = (self.directory / name for name in ("next.key", "next.csr", "next.pem"))
        files.write_atomically(pair, key.read_text() + answer.certificate, mode=0o600)
        try:
            _check_pair(pair, self.directory / "ca.crt", self._identity)
        except OSError as exc:
            pair.unlink()
            raise PeerError(f"the director sent a certificate that does not fit: {exc}") from exc
        pair.replace(self._pair)
        files.sync_directory(self.directory)
        csr.unlink()
        key.unlink()
        self._renew_at = self.clock.now() + timedelta(seconds=answer.renew_in_s)
        files.write_atomically(self.directory / "renew-at", self._renew_at.isoformat())

    async def renew_loop(self) -> None:
        """Renew the certificate whenever two thirds of its life are over."""
        while True:
            await self.clock.sleep(max(1.0, (self._renew_at - self.clock.now()).total_seconds()))
            try:
                await self.renew()
            except ConpaasError as exc:
                log.warning("certificate-not-renewed", error=exc.message)
                self._renew_at = self.clock.now() + timedelta(seconds=RENEW_RETRY_S)

    async def renew(self) -> None:
        """Get the next certificate, for a new key; connections made from now on use it."""
        answer: Certificate = await self.director.call(RENEW, Renew(csr=await self._request()))
        self._keep(answer)
        for context in (self.server_tls, self.client_tls):
            context.load_cert_chain(self._pair)
        log.info("certificate-renewed", instance=self.context.instance)

    def _plan_renewal(self) -> None:
        path = self.directory / "renew-at"
        if path.exists():
            self._renew_at = datetime.fromisoformat(path.read_text()).astimezone(UTC)


def authenticator(deployment: str, target: Callable[[Caller], Target]) -> Authenticate[Caller]:
    """Return the check of a server of ours: the peer's certificate, held against `target(caller)`."""

    async def authenticate(request: web.Request, endpoint: Endpoint) -> Caller:
        transport = request.transport
        tls = None if transport is None else transport.get_extra_info("ssl_object")
        caller = caller_of(peer_identity(tls, deployment))
        authorize(caller, endpoint, target(caller))
        return caller

    return authenticate


def _check_pair(pair: Path, ca: Path, identity: Identity) -> None:
    """Shake hands with ourselves, as a server with `pair`; raise ssl.SSLError if a client would refuse us."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(None, None, ca).wrap_bio(to_client, to_server, server_hostname=identity.host)
    server = server_context(pair, pair, ca, require_client=False).wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server):  # hello, then certificate and end: the third act is the client's verdict
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    client.do_handshake()


async def _make_key(key: Path, csr: Path) -> None:
    """Make a key in a short-lived process of its own: `cryptography` would cost a daemon 10 MB for good.

    Unless it is loaded anyhow: an instance that was forked from a zygote shares it, and need not wait for a Python.
    """
    loaded = sys.modules.get("conpaas.core.keymaker")
    if loaded is not None:
        loaded.make(key, csr)
        return
    await run.run([sys.executable, "-m", "conpaas.core.keymaker", str(key), str(csr)], timeout_s=60)
