"""Plays the boot of a fake provider's instances: the daemon of each runs on this computer, in processes of its own.

What the local cloud does for an instance is what a virtual machine would do: its own folder, its own first process that
starts the daemon again when it ends, and the end of them all with it. Here somebody else gives the address, and a new
Python runs the daemon, as in the image.
"""

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from conpaas.cloud import _local_machine as machine
from conpaas.cloud._local_driver import LocalCloud
from conpaas.cloud.local import LocalSettings
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CloudContext, VmRequest
from conpaas.core.messages.internal import Context


class _Computer(LocalCloud):
    """The local cloud, whose next instance gets an address that somebody has chosen."""

    next_address = ""

    def _claim_any(self, taken: set[str]) -> tuple[str, socket.socket]:
        claim = machine.claim(self.next_address)
        assert claim is not None, f"{self.next_address} is in use, as are {taken}"
        return self.next_address, claim


class Booter:
    """Instances of one fake provider, by the ids that it gives them."""

    def __init__(self, directory: Path) -> None:
        context = CloudContext(name="played", deployment="played", directory=directory, clock=SYSTEM_CLOCK)
        self._computer = _Computer(LocalSettings(zygote=False), context)
        self._turn = asyncio.Lock()
        self._ended: set[str] = set()
        self._closed = False
        self.booted: list[str] = []
        """Ids of all instances that were started, in that order."""

    async def boot(self, vm: str, address: str, document: str) -> None:
        """Start the daemon that the contextualization document asks for; its address is found out, not told."""
        context = Context.model_validate_json(document)
        assert context.address == ""
        assert "PRIVATE KEY" not in document
        whole = json.dumps(json.loads(document) | {"address": address})
        async with self._turn:
            if vm in self._ended or self._closed:
                return
            self._computer.next_address = address
            await self._computer.create(VmRequest(token=vm, name=vm, context=lambda _: whole))
            self.booted.append(vm)

    async def end(self, vm: str) -> None:
        """End an instance with all its processes and files, also one whose boot has not begun."""
        async with self._turn:
            self._ended.add(vm)
            await self._computer.delete(vm)

    async def close(self) -> None:
        """End what still runs, and boot nothing from now on."""
        async with self._turn:
            self._closed = True
        for vm in await self._computer.list():
            await self.end(vm.id)
        await self._computer.close()


@asynccontextmanager
async def network() -> AsyncIterator[str]:
    """Give a loopback network that nobody else on this computer uses, such as `127.91.17.0/24`."""
    free = (f"127.91.{number}.0" for number in random.sample(range(256), 256))
    taken = next((address, claim) for address in free if (claim := machine.claim(address)) is not None)
    with taken[1]:
        yield f"{taken[0]}/24"


@asynccontextmanager
async def booter(directory: Path) -> AsyncIterator[Booter]:
    """Run instances in `directory`, until the end of the block."""
    one = Booter(directory)
    try:
        yield one
    finally:
        await one.close()
