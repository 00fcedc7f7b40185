"""Deploy a source tree as a PHP service, let it serve on four nodes, and say where it is.

    CONPAAS_URL=http://127.0.0.1:9999 CONPAAS_TOKEN=… python examples/sdk/deploy.py NAME SOURCE

Run it again to deploy what has changed: the service is found by its name and goes on serving meanwhile.
"""

import asyncio
import os
import sys

from conpaas.core.states import ServiceState
from conpaas.sdk import Conpaas, connect


async def deploy(conpaas: Conpaas, name: str, source: str) -> str:
    """Return the address of the site."""
    found = [service for service in await conpaas.services() if service.name == name]
    service = found[0] if found else await conpaas.create(type="php", name=name)
    version = await conpaas.upload(service.id, source, description="deployed by a script")
    await conpaas.activate(service.id, version.id, wait=service.state is ServiceState.RUNNING)
    if service.state is not ServiceState.RUNNING:
        await conpaas.start(service.id, wait=True)
    missing = {role: 1 for role in ("web", "php") if service.wanted.roles.get(role, 0) == 0}
    if missing:
        await conpaas.scale(service.id, missing, wait=True)
    return (await conpaas.service(service.id)).urls["application"]


async def main(name: str, source: str) -> None:
    """Connect as the environment says, and deploy."""
    async with connect(os.environ["CONPAAS_URL"], os.environ["CONPAAS_TOKEN"]) as conpaas:
        print(await deploy(conpaas, name, source))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
