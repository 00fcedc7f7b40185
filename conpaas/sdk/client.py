"""The client: everything that people, the web UI and the command line can ask of a director."""

import contextlib
import ssl
from collections.abc import AsyncIterator

from pydantic import SecretStr

from conpaas.core import rpc
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.messages import public
from conpaas.core.messages.public import Credentials, Session
from conpaas.sdk.account import AccountCalls, AdminCalls
from conpaas.sdk.clouds import CloudCalls
from conpaas.sdk.code import CodeCalls
from conpaas.sdk.services import ApplicationCalls, ServiceCalls
from conpaas.sdk.watching import WatchCalls


class Conpaas(ApplicationCalls, ServiceCalls, CodeCalls, WatchCalls, AccountCalls, AdminCalls, CloudCalls):
    """One user's view of one director, over kept-alive connections.

    Made by `connect`; or made directly by those that close it themselves.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        super().__init__(rpc.Client(url, tls=tls, headers=headers, connections=100), clock=clock)
        self.url = url.rstrip("/")

    async def login(self, username: str, password: str, *, address: str | None = None) -> Session:
        """Return a session; its token is what `connect` takes. Raises NotAuthenticatedError.

        A page that logs its visitor in says at which `address` the visitor is: failures are counted by it.
        """
        body = Credentials(username=username, password=SecretStr(password))
        headers = {} if address is None else {"X-Forwarded-For": address}
        answer: Session = await self._rpc.call(public.LOGIN, body, headers=headers)
        return answer


@contextlib.asynccontextmanager
async def connect(
    url: str, token: str | None = None, *, tls: ssl.SSLContext | None = None, clock: Clock = SYSTEM_CLOCK
) -> AsyncIterator[Conpaas]:
    """Open a client of the director at `url`, with a session's or an API token; it closes with the block.

    `tls` replaces the system's trusted authorities for an `https` URL.

        async with connect("https://paas.example.org", os.environ["CONPAAS_TOKEN"]) as conpaas:
            for service in await conpaas.services():
                print(service.name, service.state)
    """
    conpaas = Conpaas(url, token, tls=tls, clock=clock)
    try:
        yield conpaas
    finally:
        await conpaas.close()


async def login(url: str, username: str, password: str, *, tls: ssl.SSLContext | None = None) -> Session:
    """Return a session of the director at `url`.

    Raises NotAuthenticatedError for a wrong user name or password.

        session = await login(url, "ada", password)
        async with connect(url, session.token.get_secret_value()) as conpaas:
            print((await conpaas.me()).credits)
    """
    async with connect(url, tls=tls) as conpaas:
        return await conpaas.login(username, password)
