"""An account at an OpenStack, by libcloud. The one at Amazon is `_libcloud_ec2.py`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from libcloud.pricing import get_pricing

from conpaas.cloud import libcloud
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext
from tests.fakes import openstack_server as server
from tests.fakes._libcloud_deadline import PATIENT_S, hurried
from tests.fakes.clouds import Fault

_ANY = frozenset(
    {
        Fault.LOST_ANSWER,
        Fault.LATE,
        Fault.HANG,
        Fault.GARBAGE,
        Fault.UNREACHABLE,
        Fault.THROTTLED,
        Fault.CREDENTIALS,
    }
)
_LOOK = _ANY - {Fault.LATE, Fault.LOST_ANSWER}
FAULTS: Mapping[str, frozenset[Fault]] = {
    "create": _ANY | {Fault.UNKNOWN_IMAGE, Fault.STALE, Fault.NEVER_BOOTS},
    "describe": _LOOK | {Fault.STALE},
    "list": _LOOK | {Fault.STALE},
    "delete": _ANY,
    "create_volume": _ANY | {Fault.NO_DISK, Fault.STALE},
    "describe_volume": _LOOK | {Fault.STALE},
    "list_volumes": _LOOK | {Fault.STALE},
    "attach": _ANY,
    "detach": _ANY,
    "delete_volume": _ANY,
    "console": frozenset({Fault.HANG, Fault.UNREACHABLE, Fault.THROTTLED, Fault.GARBAGE}),
    "sizes": frozenset({Fault.HANG, Fault.GARBAGE, Fault.CREDENTIALS}),
    "images": frozenset({Fault.UNREACHABLE, Fault.GARBAGE, Fault.CREDENTIALS}),
    "zones": frozenset({Fault.THROTTLED, Fault.GARBAGE}),
    "quota": frozenset({Fault.CREDENTIALS, Fault.GARBAGE}),
    "examine": _LOOK,
}
WORDS = {
    Fault.THROTTLED: server.RATE_WORDS,
    Fault.CREDENTIALS: server.LOGIN_WORDS,
    Fault.UNKNOWN_IMAGE: server.IMAGE_WORDS,
    Fault.NO_DISK: server.DISK_WORDS,
}
SECRETS = (server.PASSWORD, server.ADMIN_PASSWORD, server.TOKEN)


class OpenStackHarness:
    """A project whose instances boot in a moment."""

    quota = 4

    def __init__(self, directory: Path, openstack: server.OpenStack, **settings: Any) -> None:
        self._directory = directory
        self.openstack = openstack
        self.settings = libcloud.LibcloudSettings(
            **{
                "provider": "openstack",
                "url": f"{openstack.url}/identity/v3",
                "key": server.USER,
                "secret": server.PASSWORD,
                "project": server.PROJECT,
                "region": server.REGION,
                "image": server.IMAGE,
                "networks": (server.NETWORK,),
                "security_groups": ("conpaas",),
                "key_name": "ops",
            }
            | settings
        )
        self._foreign: set[str] = set()

    def open(self, deployment: str = "dep-ours", deadline_s: float = PATIENT_S) -> Cloud:
        context = CloudContext(
            name="stack",
            deployment=deployment,
            directory=self._directory,
            clock=SYSTEM_CLOCK,
            deadline_s=deadline_s,
        )
        cloud = libcloud.CLOUD.open(self.settings, context)
        for verb in FAULTS:
            setattr(cloud, verb, partial(self._call, verb, getattr(cloud, verb)))
        return cloud

    async def _call(self, verb: str, act: Callable[..., Awaitable[Any]], *words: Any) -> Any:
        """Let the credentials be expired during a call that is to meet this: it may take several logins."""
        faults = self.openstack.faults[verb]
        self.openstack.expired = bool(faults) and faults[0] is Fault.CREDENTIALS
        if self.openstack.expired:
            faults.popleft()
        try:
            return await act(*words)
        finally:
            self.openstack.expired = False

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        self.openstack.faults[verb].extend([fault] * times)

    async def kill(self, vm: str) -> None:
        self.openstack.servers[vm].status = "ERROR"
        self.openstack.servers[vm].fault = "Host 'compute-7' is down"

    async def make_foreign(self) -> str:
        metadata = {"conpaas-deployment": "dep-theirs", "conpaas-token": "i-one"}
        body = {"name": "theirs", "imageRef": server.IMAGE, "flavorRef": "1", "metadata": metadata}
        made = self.openstack.add(body)
        self.openstack.quota += 1
        self._foreign.add(made.id)
        return made.id

    async def lives(self, vm: str) -> bool:
        found = self.openstack.servers.get(vm)
        return found is not None and self.openstack.status(found) in {"ACTIVE", "BUILD"}

    async def leftovers(self) -> list[str]:
        return sorted((self.openstack.servers.keys() | self.openstack.disks.keys()) - self._foreign)


@asynccontextmanager
async def harness(directory: Path, **settings: Any) -> AsyncIterator[OpenStackHarness]:
    get_pricing("compute", "ec2_linux")  # libcloud reads its list of prices once: not while a deadline runs
    openstack = server.OpenStack(OpenStackHarness.quota)
    runner = await openstack.start()
    try:
        with hurried(openstack.url, openstack.is_slow):
            yield OpenStackHarness(directory, openstack, **settings)
    finally:
        openstack.close()
        await asyncio.wait_for(runner.cleanup(), 30)
