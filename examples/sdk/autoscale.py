"""Keep the number of php nodes of a service in proportion to its requests.

    CONPAAS_URL=http://127.0.0.1:9999 CONPAAS_TOKEN=… python examples/sdk/autoscale.py NAME

A sketch of what anybody can build on the SDK: the rule is one pure function, the change depends on what was seen.
"""

import asyncio
import math
import os
import sys

from conpaas.core.errors import ConflictError
from conpaas.sdk import Conpaas, connect

REQUESTS_PER_NODE = 100.0
MOST_NODES = 8
PERIOD_S = 15.0


def wanted_nodes(request_rate: float) -> int:
    """Return how many nodes serve `request_rate` requests per second."""
    return max(1, min(MOST_NODES, math.ceil(request_rate / REQUESTS_PER_NODE)))


async def adapt(conpaas: Conpaas, name: str) -> int:
    """Look once, and change the number of nodes if need be; return by how many it changes."""
    service = await conpaas.find(name)
    monitoring = await conpaas.monitoring(service.id)
    change = wanted_nodes(monitoring.request_rate) - service.wanted.roles.get("php", 0)
    if change:
        await conpaas.scale(service.id, {"php": change}, generation=service.generation)
    return change


async def main(name: str) -> None:
    """Look every quarter of a minute."""
    async with connect(os.environ["CONPAAS_URL"], os.environ["CONPAAS_TOKEN"]) as conpaas:
        while True:
            try:
                print(f"php nodes: {await adapt(conpaas, name):+d}", flush=True)
            except ConflictError as exc:  # somebody else has just changed it: look again
                print(exc.message, flush=True)
            await asyncio.sleep(PERIOD_S)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
