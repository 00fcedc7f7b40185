"""What the parts of the client share: one connection to one director."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from conpaas.core import ids, rpc, tasks
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.errors import PeerError
from conpaas.core.messages.base import Endpoint, Message

RESEND_DELAYS_S = (0.3,)
"""A command with an idempotency key is sent again when its answer was lost on the way."""
RECONNECT_DELAYS_S = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Pauses before a stream is opened again; the last one repeats."""


class Caller:
    """Calls endpoints of a director; the mix-ins of `Conpaas` give each of them a name and types."""

    def __init__(self, client: rpc.Client, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._rpc = client
        self._clock = clock

    async def close(self) -> None:
        """Close the connections."""
        await self._rpc.close()

    async def _call(
        self, endpoint: Endpoint, body: Message | None = None, *, query: Message | None = None, **params: str
    ) -> Any:
        return await self._rpc.call(endpoint, body, query=query, data=None, timeout_s=None, headers=None, **params)

    async def _change(self, endpoint: Endpoint, body: Message, *, generation: int | None = None, **params: str) -> Any:
        """Call a command whose body has an idempotency key, only if the service still is at `generation`."""

        async def send() -> Any:
            headers = if_match(generation)
            return await self._rpc.call(
                endpoint, body, query=None, data=None, timeout_s=None, headers=headers, **params
            )

        return await tasks.retry(send, on=PeerError, delays_s=RESEND_DELAYS_S, clock=self._clock)

    async def _pages(self, endpoint: Endpoint, query: Message) -> AsyncIterator[Any]:
        """Yield the items of all pages."""
        while True:
            page = await self._rpc.call(endpoint, query=query)
            for item in page.items:
                yield item
            if page.next is None:
                return
            query = query.model_copy(update={"cursor": page.next})


def if_match(generation: int | None) -> Mapping[str, str]:
    """Return the header that makes a change depend on what was seen."""
    return {} if generation is None else {"If-Match": f'"{generation}"'}


def new_key(key: str | None) -> str:
    """Return the caller's idempotency key, or a fresh one."""
    return key or ids.new("key")
