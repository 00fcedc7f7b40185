"""An account at the local cloud: real processes that do nothing."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conpaas.cloud import _local_machine as machine
from conpaas.cloud import local
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, HasVolumes, Vm
from tests.fakes.clouds import Fault, request

SLEEPER = ("/bin/sleep", "1000")

FAULTS: Mapping[str, frozenset[Fault]] = MappingProxyType({"create": frozenset({Fault.NEVER_BOOTS})})
"""No answer of one's own kernel is lost or late; a full disk takes a file system of its own: see test_local."""


class LocalHarness:
    """Instances whose daemon is `sleep`, or what the test says."""

    quota = 4

    def __init__(self, directory: Path, **settings: Any) -> None:
        self._directory = directory / "cloud"
        self._settings = local.LocalSettings(**{"max_instances": self.quota, "command": SLEEPER} | settings)
        self._deployments: set[str] = set()
        self._foreign: list[str] = []

    def open(self, deployment: str = "dep-ours") -> Cloud:
        context = CloudContext(name="local", deployment=deployment, directory=self._directory, clock=SYSTEM_CLOCK)
        self._deployments.add(deployment)
        return local.CLOUD.open(self._settings, context)

    def first_process(self, vm: str) -> machine.First:
        """Return an instance's first process."""
        return machine.First(**json.loads((self._directory / ".records" / f"{vm}.pid").read_bytes()))

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        """Do nothing: what sleeps never answers."""
        assert fault in FAULTS[verb]

    async def kill(self, vm: str) -> None:
        machine.kill(self.first_process(vm))

    async def make_foreign(self) -> str:
        driver = self.open("dep-theirs")
        vm = await driver.create(request("i-theirs"))
        await driver.close()
        self._foreign.append(vm.id)
        return vm.id

    async def lives(self, vm: str) -> bool:
        return self.first_process(vm).alive

    async def leftovers(self) -> list[str]:
        """Return files of our instances and volumes."""
        files = [path.name for path in self._directory.iterdir() if path.name not in {".records", ".volumes"}]
        files += [path.name for path in (self._directory / ".volumes").glob("*")]
        records = [path.name for path in (self._directory / ".records").iterdir() if path.suffix in {".json", ".pid"}]
        found = {name for name in (*files, *records) if Path(name).stem not in self._foreign}
        return sorted(found)

    def processes(self, vm: Vm) -> list[int]:
        """Return the living processes of an instance."""
        return machine.processes(f"{vm.token}@{vm.address}", None)

    async def close(self) -> None:
        for deployment in sorted(self._deployments):
            driver = self.open(deployment)
            assert isinstance(driver, HasVolumes)
            for vm in await driver.list():
                await driver.delete(vm.id)
            for volume in await driver.list_volumes():
                await driver.delete_volume(volume.id)
            await driver.close()


@asynccontextmanager
async def harness(directory: Path, **settings: Any) -> AsyncIterator[LocalHarness]:
    account = LocalHarness(directory, **settings)
    try:
        yield account
    finally:
        await account.close()
