"""An account at a fake OpenNebula."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from conpaas.cloud import opennebula
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext
from conpaas.core.tasks import wait_for
from tests.fakes import opennebula_records as records
from tests.fakes.clouds import Fault, request
from tests.fakes.opennebula_server import DONE, EPILOG, NO_HOST, RUNNING, SHUTDOWN, FakeOpenNebula

PATIENT_S, SHORT_S = 30.0, 0.8
"""Deadlines: only the call that waits for one has a short one, however busy this computer is."""

PASSWORD = "pw-of-conpaas"
SECRETS = (PASSWORD,)
WORDS = MappingProxyType(
    {
        Fault.CREDENTIALS: records.value("err_bad_auth").partition("] ")[2],
        Fault.UNKNOWN_IMAGE: "Error getting virtual machine template [0].",
        Fault.THROTTLED: "503",
        Fault.NO_DISK: "Not enough space in datastore",
        Fault.NO_CAPACITY: NO_HOST,
    }
)
_LOST = frozenset({Fault.HANG, Fault.LATE, Fault.LOST_ANSWER, Fault.GARBAGE, Fault.THROTTLED, Fault.CREDENTIALS})
_READ = _LOST - {Fault.LATE}
FAULTS: Mapping[str, frozenset[Fault]] = MappingProxyType(
    {
        "create": _LOST | {Fault.UNKNOWN_IMAGE, Fault.NO_CAPACITY, Fault.NEVER_BOOTS},
        "describe": _READ,
        "list": _READ,
        "delete": _LOST,
        "create_volume": _LOST | {Fault.NO_DISK},
        "describe_volume": _READ,
        "list_volumes": _READ,
        "attach": _LOST,
        "detach": _LOST,
        "delete_volume": _LOST,
        "sizes": _READ,
        "images": _READ,
        "quota": _READ,
        "examine": _READ,
    }
)
METHODS = MappingProxyType(
    {
        "create": "one.template.instantiate",
        "describe": "one.vm.info",
        "list": "one.vmpool.infoextended",
        "delete": "one.vm.action",
        "create_volume": "one.image.allocate",
        "describe_volume": "one.image.info",
        "list_volumes": "one.imagepool.info",
        "attach": "one.vm.attach",
        "detach": "one.vm.detach",
        "delete_volume": "one.image.delete",
        "sizes": "one.template.info",
        "images": "one.imagepool.info",
        "quota": "one.user.info",
        "examine": "one.user.info",
    }
)
"""The call that meets a fault of a verb: the one that matters in it."""
FIRST = METHODS | {
    "create": "one.vmpool.infoextended",
    "delete": "one.vm.info",
    "create_volume": "one.imagepool.info",
    **dict.fromkeys(("attach", "detach", "delete_volume"), "one.image.info"),
}
"""The first call of a verb, which meets it where it makes no difference: tests of what hangs do not wait long."""
QUOTAS = [("VM", {"VMS": 4, "CPU": -1, "MEMORY": -2}), ("DATASTORE", {"ID": 101, "IMAGES": 20, "SIZE": -2})]


class OpenNebulaHarness:
    """The user conpaas at a fake OpenNebula."""

    quota = 4
    deadline_s: float | None = None
    """Of all calls of the drivers that are opened from now on; None: each has the one that it needs."""

    def __init__(self, directory: Path, server: FakeOpenNebula) -> None:
        self._directory, self.server = directory, server
        self.user = server.users[1]
        self.user.quotas = list(QUOTAS)
        self._foreign: set[int] = set()
        self.settings: dict[str, Any] = {"template": 0, "datastore": 101}

    def open(self, deployment: str = "dep-ours", **settings: Any) -> Cloud:
        account = {"endpoint": self.server.endpoint, "user": self.user.name, "password": PASSWORD}
        context = CloudContext(
            name="one",
            deployment=deployment,
            directory=self._directory,
            clock=SYSTEM_CLOCK,
            deadline_s=self.deadline_s or PATIENT_S,
        )
        cloud: Any = opennebula.CLOUD.open(opennebula.OpenNebulaSettings(**account | self.settings | settings), context)
        if self.deadline_s is None:
            self._hurry(cloud._server)
        return cast("Cloud", cloud)

    def _hurry(self, connection: Any) -> None:
        """Give those calls a short deadline that only a deadline ends."""
        exchange = connection._exchange

        async def exchange_in_time(method: str, request: bytes, *, repeat: bool) -> bytes:
            connection._deadline_s = SHORT_S if self.server.is_slow(method) else PATIENT_S
            return cast("bytes", await exchange(method, request, repeat=repeat))

        connection._exchange = exchange_in_time

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        tries = 2 if fault is Fault.LOST_ANSWER and FAULTS[verb] == _READ else 1  # what only reads is tried again
        methods = FIRST if fault is Fault.HANG else METHODS
        self.server.faults[methods[verb]].extend([fault] * times * tries)

    async def kill(self, vm: str) -> None:
        await self.server.kill(int(vm))

    async def make_foreign(self) -> str:
        limits, self.user.quotas = self.user.quotas, []
        theirs = self.open("dep-theirs")
        vm = await theirs.create(request("i-theirs"))
        await theirs.close()
        self.user.quotas = [(kind, {**quota, "VMS": 5} if kind == "VM" else quota) for kind, quota in limits]
        self._foreign.add(int(vm.id))

        async def runs() -> bool | None:
            return await self.lives(vm.id) or None

        await wait_for(runs, timeout_s=30, what="the foreign VM runs", clock=SYSTEM_CLOCK, period_s=0.005)
        return vm.id

    async def lives(self, vm: str) -> bool:
        return self.server.vms[int(vm)].state == RUNNING

    async def leftovers(self) -> list[str]:
        ended = {DONE, EPILOG, SHUTDOWN}
        vms = [number for number, vm in self.server.vms.items() if vm.state not in ended]
        volumes = [number for number, image in self.server.images.items() if image.type == 2]
        return [f"VM {number}" for number in vms if number not in self._foreign] + [f"image {n}" for n in volumes]


@asynccontextmanager
async def harness(directory: Path, **words: Any) -> AsyncIterator[OpenNebulaHarness]:
    server = FakeOpenNebula(**words)
    await server.start()
    try:
        yield OpenNebulaHarness(directory, server)
    finally:
        await server.close()
    assert server.complaints == []
    assert server.most_at_once <= 15
