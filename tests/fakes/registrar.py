"""The part of a director that booting machines talk to: it certifies them, and keeps what they report."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from conpaas.core import rpc, tls
from conpaas.core.errors import ForbiddenError
from conpaas.core.identity import Identity, client_context, server_context
from conpaas.core.member import authenticator
from conpaas.core.messages.internal import ENROL, REPORT_BOOT, BootReport, Certificate, Context, Enrol
from conpaas.core.messages.model import Ack
from conpaas.core.process import Process, Site
from conpaas.core.rpc import Call, Client
from conpaas.core.trust import Caller, Target

DEPLOYMENT = "dep-boot"
LIFETIME_S = 3600.0


class Registrar(Process):
    """Certifies agents of the service `svc-1`: instance `i-1` with the token `token-i-1`, and so on."""

    name = "registrar"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.authority = tls.Authority.create(DEPLOYMENT)
        self.reports: list[tuple[str, str]] = []
        """What was reported: instance and stage."""
        self.details: list[str] = []
        self.enrolled: list[str] = []
        self.keys: list[str] = []
        """What was asked to be certified."""
        self.refuse = ""
        """Why nobody is certified."""

    async def open(self, stack: AsyncExitStack) -> list[Site]:
        pair = self._pair(Identity.director(DEPLOYMENT))
        serve = partial(rpc.route, authenticate=authenticator(DEPLOYMENT, lambda _: Target(owner="u", service="svc-1")))
        routes = [serve(ENROL, self._enrol), serve(REPORT_BOOT, self._report)]
        return [Site("127.0.0.1", 0, routes, server_context(pair, pair, self._ca, require_client=False))]

    @property
    def _ca(self) -> Path:
        path = self.folder / "ca.crt"
        path.write_bytes(self.authority.certificate_pem)
        return path

    def _pair(self, identity: Identity) -> Path:
        key, csr = tls.make_key_and_csr()
        path = self.folder / f"{identity.kind}.pem"
        path.write_bytes(key + self.authority.sign(csr, identity, lifetime_s=LIFETIME_S))
        return path

    async def _enrol(self, _: Call[Caller], body: Enrol) -> Certificate:
        if self.refuse:
            raise ForbiddenError(self.refuse)
        instance = body.token.get_secret_value().removeprefix("token-")
        identity = Identity.agent(DEPLOYMENT, "svc-1", instance)
        certificate = self.authority.sign(body.csr.encode(), identity, lifetime_s=LIFETIME_S)
        self.enrolled.append(instance)
        self.keys.append(body.csr)
        return Certificate(certificate=certificate.decode(), renew_in_s=LIFETIME_S * 2 / 3)

    async def _report(self, _: Call[Caller], body: BootReport) -> Ack:
        self.reports.append((body.token.get_secret_value().removeprefix("token-"), body.stage))
        self.details.append(body.detail)
        return Ack()

    def context(self, instance: str, *, host: str = "127.0.0.1", service_type: str = "php", port: int = 5555) -> str:
        """Return the context document of an agent that reaches us at `host`."""
        context = Context(
            deployment=DEPLOYMENT,
            kind="agent",
            instance=instance,
            service="svc-1",
            service_type=service_type,
            owner="u",
            epoch=0,
            address="",
            port=port,
            director=f"https://{host}:{self.ports[0]}",
            ca=self.authority.certificate_pem.decode(),
            token=SecretStr(f"token-{instance}"),
        )
        return context.model_dump_json(context={"reveal": True})

    def manager_of(self, instance: str, base: str) -> Client:
        """Return a connection to the agent of an instance, as its manager has it."""
        pair = self._pair(Identity.manager(DEPLOYMENT, "svc-1", 1, "i-manager"))
        name = Identity.agent(DEPLOYMENT, "svc-1", instance).host
        return Client(base, tls=client_context(pair, pair, self._ca), server_hostname=name)


@asynccontextmanager
async def registrar(folder: Path) -> AsyncIterator[Registrar]:
    """Run one for as long as the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    one = Registrar(folder)
    async with asyncio.TaskGroup() as group:
        group.create_task(one.run(signals=False))
        await one.ready.wait()
        try:
            yield one
        finally:
            one.stop.set()
