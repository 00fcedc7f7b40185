"""An account at the simulated cloud."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from conpaas.cloud import sim
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, VmState


class SimHarness:
    """Instances that boot at once and calls that take a moment."""

    quota = 4

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._settings = sim.SimSettings(quota=self.quota, call_s=0.002)
        self.account = sim.account(self._context("dep-ours"), self._settings)
        self._foreign: set[str] = set()

    def _context(self, deployment: str) -> CloudContext:
        return CloudContext(name="sim", deployment=deployment, directory=self._directory, clock=SYSTEM_CLOCK)

    def open(self, deployment: str = "dep-ours") -> Cloud:
        return sim.CLOUD.driver(self._settings, self._context(deployment))

    async def kill(self, vm: str) -> None:
        await self.account.kill(vm)

    async def make_foreign(self) -> str:
        vm = self.account.add_foreign()
        self._foreign.add(vm)
        return vm

    async def lives(self, vm: str) -> bool:
        found = self.account.vms.get(vm)
        return found is not None and self.account.look(found).state is VmState.RUNNING

    async def leftovers(self) -> list[str]:
        return sorted(self.account.vms.keys() - self._foreign)


@asynccontextmanager
async def harness(directory: Path) -> AsyncIterator[SimHarness]:
    yield SimHarness(directory)
