"""An account at Amazon EC2, played by moto with what it lacks in front of it. Nothing ever runs there.

A test that wants instances to run gives `on_boot`, and starts the daemon of each as a local process: with `loopback`,
instances have addresses of that network, on which such a process can listen.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast
from xml.etree import ElementTree as ET

from conpaas.cloud import _ec2_client, ec2
from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.cloud import CloudContext
from tests.fakes import ec2_errors
from tests.fakes.clouds import Fault
from tests.fakes.ec2_proxy import Proxy

REGION = "us-east-1"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
TOKEN = "IQoJb3JpZ2luX2VjEXAMPLETOKEN"
PATIENT_S, SHORT_S = 30.0, 0.6
"""Deadlines: only the call that waits for one has a short one, however busy this computer is."""

SECRETS = (SECRET, TOKEN)
WORDS: Mapping[Fault, str] = MappingProxyType({fault: error.message for fault, error in ec2_errors.BY_FAULT.items()})

_EVERYWHERE = frozenset(
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
FAULTS: Mapping[str, frozenset[Fault]] = MappingProxyType(
    dict.fromkeys(("delete", "attach", "detach", "delete_volume", "console", "sizes", "images", "quota"), _EVERYWHERE)
    | dict.fromkeys(("describe", "list", "describe_volume", "list_volumes"), _EVERYWHERE | {Fault.STALE})
    | {
        "create": frozenset(Fault),
        "create_volume": _EVERYWHERE | {Fault.STALE, Fault.NO_DISK},
        "examine": _EVERYWHERE | {Fault.UNKNOWN_IMAGE},
    }
)


_ACTION: ContextVar[str] = ContextVar("action", default="")
"""What the driver is calling."""


class Context:
    """A `CloudContext` whose deadline depends on what a call is going to meet."""

    def __init__(self, directory: Path, deployment: str, clock: Clock, proxy: Proxy) -> None:
        self.name, self.directory, self.deployment, self.clock = "ec2", directory, deployment, clock
        self._proxy = proxy

    @property
    def deadline_s(self) -> float:
        return SHORT_S if self._proxy.is_slow(_ACTION.get()) else PATIENT_S


async def _named(call: Callable[..., Awaitable[Any]], operation: str, *words: Any, **parameters: Any) -> Any:
    """Make a call of the driver's client, and let its deadline know which one."""
    before = _ACTION.set(operation.title().replace("_", ""))
    try:
        return await call(operation, *words, **parameters)
    finally:
        _ACTION.reset(before)


@dataclass(frozen=True)
class Booting:
    """An instance that Amazon has just started."""

    id: str
    address: str
    """As the driver reports it once it runs."""
    user_data: str


class Ec2Harness:
    """An account with an image, the default subnets, and room for `quota` instances: `proxy.quota` gives it more."""

    quota = 4

    def __init__(self, directory: Path, proxy: Proxy, **settings: Any) -> None:
        self._directory = directory / "ec2"
        self._directory.mkdir()
        self.proxy = proxy
        self.words: dict[str, Any] = {
            "region": REGION,
            "access_key": "AKIAIOSFODNN7EXAMPLE",
            "secret_key": SECRET,
            "session_token": TOKEN,
            "image": "ami-00000000",
            "size": "t2.small",
            "sizes": ["t2.nano", "t2.medium"],
            "inner_networks": ["192.0.2.0/24"],
            "endpoint": proxy.url,
            "services_endpoint": proxy.url,
        } | settings
        self.on_boot: Callable[[Booting], Awaitable[None]] | None = None
        """Awaited, in the background, for each instance that is made: start its daemon here."""
        self.on_end: Callable[[str], Awaitable[None]] | None = None
        """Awaited, in the background, with the id of each instance that is given back."""
        self._background = tasks.Background()
        self._foreign: set[str] = set()
        proxy.on_run, proxy.on_end = self._run, self._end

    def settings(self, **words: Any) -> ec2.Ec2Settings:
        return ec2.Ec2Settings.model_validate(self.words | words)

    def open(self, deployment: str = "dep-ours", *, clock: Clock = SYSTEM_CLOCK, **words: Any) -> Any:
        context = Context(self._directory, deployment, clock, self.proxy)
        cloud: Any = ec2.CLOUD.open(self.settings(**words), cast("CloudContext", context))
        for client in filter(None, (cloud._ec2, cloud._pricing, cloud._quotas)):
            client.call = partial(_named, client.call)
        return cloud

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        self.proxy.fail(verb, fault, times)

    async def kill(self, vm: str) -> None:
        await self.proxy.ask("StopInstances", **{"InstanceId.1": vm})

    async def make_foreign(self) -> str:
        """Run an instance that bears no tag, as another user of the account would."""
        answer = await self.proxy.ask(
            "RunInstances", ImageId=self.words["image"], InstanceType="t2.small", MinCount="1", MaxCount="1"
        )
        vm = _text(answer, "instanceId")
        self._foreign.add(vm)
        return vm

    async def lives(self, vm: str) -> bool:
        return _text((await self._instance(vm)).find("instanceState"), "name") == "running"

    async def leftovers(self) -> list[str]:
        """Return instances that are not terminated and volumes, but for others'."""
        instances = (await self.proxy.ask("DescribeInstances")).iter("instancesSet")
        living = {
            _text(item, "instanceId")
            for group in instances
            for item in group
            if _text(item.find("instanceState"), "name") != "terminated"
        }
        volumes = (await self.proxy.ask("DescribeVolumes")).find("volumeSet")
        left = {_text(item, "volumeId") for item in volumes or () if not self._holds(item)}
        return sorted((living - self._foreign) | left)

    async def groups(self) -> dict[str, ET.Element]:
        """Return the security groups that are there beside the default ones, by name."""
        answer = await self.proxy.ask("DescribeSecurityGroups")
        found = {_text(item, "groupName"): item for item in answer.find("securityGroupInfo") or ()}
        return {name: item for name, item in found.items() if name != "default"}

    async def boot(self, vm: str) -> str:
        """Return the user data of an instance: what its first boot would read from the metadata service.

        For tests that play the boot: they give it to the daemon of that instance, started as a local process.
        """
        answer = await self.proxy.ask("DescribeInstanceAttribute", InstanceId=vm, Attribute="userData")
        return base64.b64decode(_text(answer.find("userData"), "value")).decode()

    async def use_loopback(self, network: str) -> None:
        """Give instances private addresses of a loopback network, such as `127.91.0.0/24`, from now on."""
        vpc = _text(await self.proxy.ask("CreateVpc", CidrBlock=network), "vpcId")
        subnet = await self.proxy.ask("CreateSubnet", CidrBlock=network, VpcId=vpc, AvailabilityZone=f"{REGION}a")
        self.words |= {"subnets": [_text(subnet, "subnetId")], "address": "private"}

    async def close(self) -> None:
        await self._background.close()

    async def _instance(self, vm: str) -> ET.Element:
        answer = await self.proxy.ask("DescribeInstances", **{"InstanceId.1": vm})
        found = answer.find("reservationSet/item/instancesSet/item")
        assert found is not None
        return found

    def _holds(self, volume: ET.Element) -> bool:
        """Tell whether a volume is the disk of somebody else's instance."""
        return bool({element.text for element in volume.iter("instanceId")} & self._foreign)

    def _run(self, vm: str) -> None:
        if self.on_boot is not None:
            self._background.start(f"boot {vm}", self._boot(vm, self.on_boot))

    async def _boot(self, vm: str, act: Callable[[Booting], Awaitable[None]]) -> None:
        public = self.words.get("address", "name") != "private"
        address = _text(await self._instance(vm), "ipAddress" if public else "privateIpAddress")
        await act(Booting(vm, address, await self.boot(vm)))

    def _end(self, vm: str) -> None:
        if self.on_end is not None:
            self._background.start(f"end {vm}", self._told(vm, self.on_end))

    async def _told(self, vm: str, act: Callable[[str], Awaitable[None]]) -> None:
        await act(vm)


def _text(element: ET.Element | None, path: str) -> str:
    """Return the text of the first element of that name."""
    assert element is not None
    found = next(element.iter(path), None)
    assert found is not None, f"no {path}"
    return found.text or ""


@cache
def _warm_up() -> None:
    """Read the descriptions of Amazon's services now, and not in the middle of a test that measures time."""
    for service in ("ec2", "pricing", "service-quotas"):
        _ec2_client.session().warm_up_loader_caches(service)


@asynccontextmanager
async def harness(directory: Path, **settings: Any) -> AsyncIterator[Ec2Harness]:
    await asyncio.to_thread(_warm_up)
    proxy = Proxy(Ec2Harness.quota)
    await proxy.open()
    account = Ec2Harness(directory, proxy, **settings)
    try:
        image = await proxy.ask(
            "RegisterImage",
            Name="conpaas-1",
            Architecture="x86_64",
            RootDeviceName="/dev/sda1",
            VirtualizationType="hvm",
            **{
                "BlockDeviceMapping.1.DeviceName": "/dev/sda1",
                "BlockDeviceMapping.1.Ebs.VolumeSize": "2",
                "BlockDeviceMapping.1.Ebs.SnapshotId": "snap-0123456789abcdef0",
            },
        )
        account.words["image"] = _text(image, "imageId")
        yield account
    finally:
        await account.close()
        await proxy.close()
