"""How the director reaches the managers: connections that are kept, and when each was last heard of."""

import ssl
from typing import Any

import structlog

from conpaas.core.clock import Clock
from conpaas.core.errors import ConpaasError, PeerError
from conpaas.core.identity import Identity
from conpaas.core.messages.base import Endpoint, Message
from conpaas.core.messages.manager import SPEC_CHANGED, SpecChanged
from conpaas.core.rpc import Client
from conpaas.core.tasks import Background
from conpaas.director import views
from conpaas.director.db.models import Instance, Service

log = structlog.get_logger()


class Managers:
    """All managers, each known by its certificate, whatever its address."""

    def __init__(self, tls: ssl.SSLContext, deployment: str, clock: Clock, background: Background) -> None:
        self._tls, self._deployment, self._clock, self._background = tls, deployment, clock, background
        self._clients: dict[str, Client] = {}
        self._heard: dict[str, float] = {}
        self._started = clock.monotonic()

    # -- calling ----------------------------------------------------------------------------------------------------

    async def call(
        self,
        service: Service,
        manager: Instance | None,
        endpoint: Endpoint,
        body: Message | None = None,
        *,
        query: Message | None = None,
        **params: str,
    ) -> Any:
        """Call a service's manager; raise PeerError if there is none, or it does not answer."""
        base = views.manager_url(manager)
        if not base:
            raise PeerError("the manager of this service is starting", value=service.id)
        return await self._client(service.id, base).call(
            endpoint, body, query=query, data=None, timeout_s=None, headers=None, **params
        )

    def _client(self, service_id: str, base: str) -> Client:
        client = self._clients.get(service_id)
        if client is None or client.base != base:
            if client is not None:
                self._background.start(f"close {client.base}", client.close())
            host = Identity.manager(self._deployment, service_id, 0, "any").host  # the same at every epoch
            client = self._clients[service_id] = Client(base, tls=self._tls, server_hostname=host)
        return client

    def poke(self, service: Service, manager: Instance | None) -> None:
        """Tell a manager, in the background, that what is wanted is new; it would find out by itself a little later."""
        if views.manager_url(manager):
            self._background.start(f"poke {service.id} {service.generation}", self._poke(service, manager))

    async def _poke(self, service: Service, manager: Instance | None) -> None:
        try:
            await self.call(service, manager, SPEC_CHANGED, SpecChanged(generation=service.generation))
        except ConpaasError as exc:
            log.debug("not-poked", service=service.id, error=exc.message)

    async def forget(self, service_id: str) -> None:
        """Close the connections to the manager of a service that is gone."""
        self._heard.pop(service_id, None)
        client = self._clients.pop(service_id, None)
        if client is not None:
            await client.close()

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.close()

    # -- hearing ----------------------------------------------------------------------------------------------------

    def heard(self, service_id: str) -> None:
        """Note that the manager of a service has called."""
        self._heard[service_id] = self._clock.monotonic()

    def silent_s(self, manager: Instance) -> float:
        """Tell for how many seconds a manager has not called.

        It is given its time anew after a restart of the director, and from its own enrolment on.
        """
        now = self._clock.monotonic()
        silent_s = now - self._heard.get(manager.service_id, self._started)
        if manager.booted is None:
            return silent_s
        return min(silent_s, (self._clock.now() - manager.booted).total_seconds())
