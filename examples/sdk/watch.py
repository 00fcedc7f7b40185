"""Say what happens to all services, as it happens.

    CONPAAS_URL=http://127.0.0.1:9999 CONPAAS_TOKEN=… python examples/sdk/watch.py

Ends with Ctrl-C. A director that restarts is waited for.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from conpaas.sdk import Conpaas, connect


async def changes(conpaas: Conpaas) -> AsyncIterator[str]:
    """Yield a line for each change of a service's state and for each progress of an operation."""
    states: dict[str, str] = {}
    async for event in conpaas.events():
        service, operation = event.service, event.operation
        if service is not None and states.get(service.id) != service.state:
            states[service.id] = service.state
            yield f"{service.name} is {service.state} {service.reason}".rstrip()
        elif operation is not None:
            yield f"{operation.kind} of {operation.service}: {operation.state} {operation.message}".rstrip()
        elif event.credits is not None:
            yield f"you have {event.credits} credits"


async def main() -> None:
    """Connect as the environment says, and print."""
    async with connect(os.environ["CONPAAS_URL"], os.environ["CONPAAS_TOKEN"]) as conpaas:
        async for line in changes(conpaas):
            print(line, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
