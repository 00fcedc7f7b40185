"""What all parts of the driver share: the connection, the tags that say what is ours, and where things are made."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from conpaas.cloud._ec2_client import Answer, Client
from conpaas.cloud.ec2 import Ec2Settings
from conpaas.core.clock import Clock
from conpaas.core.cloud import CloudContext
from conpaas.core.errors import CloudRefusedError, UnknownImageError

T = TypeVar("T")

DEPLOYMENT, TOKEN = "conpaas:deployment", "conpaas:token"
LAG_S = 30.0  # Amazon's lists know of a change within seconds; it promises no figure

GIB = 1 << 30


@dataclass(frozen=True)
class Subnet:
    """Where instances can be made."""

    id: str
    zone: str
    vpc: str
    free: int
    """Addresses."""


@dataclass(frozen=True)
class Ami:
    """The image that instances start from."""

    id: str
    state: str
    architecture: str
    root: str
    """Name of the device that its own disk is."""
    disk_gib: int


class Fresh(Generic[T]):
    """What was made or changed so recently that Amazon's lists may not know it yet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._things: dict[str, tuple[float, T]] = {}

    def put(self, key: str, thing: T) -> None:
        """Remember it for a while."""
        self._things[key] = (self._clock.monotonic() + LAG_S, thing)

    def drop(self, key: str) -> None:
        """Forget it."""
        self._things.pop(key, None)

    def all(self) -> Mapping[str, T]:
        """Return all that is remembered."""
        now = self._clock.monotonic()
        self._things = {key: (until, thing) for key, (until, thing) in self._things.items() if until > now}
        return {key: thing for key, (_, thing) in self._things.items()}


class Account:
    """One account in one region, as one deployment sees it."""

    def __init__(self, settings: Ec2Settings, context: CloudContext) -> None:
        self._settings, self._context = settings, context
        self._ec2 = Client("ec2", settings, context, endpoint=settings.endpoint)
        self._subnets_known: tuple[Subnet, ...] = ()
        self._ami_known: Ami | None = None

    # What is ours

    def _client_token(self, token: str, generation: int) -> str:
        """Return what makes a request idempotent at Amazon, which never lets a token make a second thing."""
        return hashlib.sha256(f"{self._context.deployment}/{token}/{generation}".encode()).hexdigest()

    def _specification(self, kind: str, name: str, token: str, tags: Mapping[str, str]) -> dict[str, Any]:
        """Return the tags that a thing of ours is made with; without a token it is a part of another."""
        own = {f"conpaas:{key}": value for key, value in tags.items()} | {
            "Name": name,
            DEPLOYMENT: self._context.deployment,
        }
        if token:
            own[TOKEN] = token
        return {"ResourceType": kind, "Tags": [{"Key": key, "Value": value[:256]} for key, value in own.items()]}

    def _ours(self, **more: str | Sequence[str]) -> list[dict[str, Any]]:
        """Return filters for things of this deployment; `_` in a filter's name stands for its `-`."""
        return filters({f"tag:{DEPLOYMENT}": self._context.deployment, "tag-key": TOKEN} | dashed(more))

    # Where things are made; neither a subnet's zone nor an image's content ever changes

    def _look_anew(self) -> None:
        """Forget subnets and image: they can be deleted, and subnets fill up."""
        self._subnets_known, self._ami_known = (), None

    async def _subnets(self) -> tuple[Subnet, ...]:
        """Return the subnets that instances may be in: the settings' in their order, else the region's default ones."""
        if not self._subnets_known:
            wanted = self._settings.subnets
            which: dict[str, Any] = (
                {"SubnetIds": list(wanted)} if wanted else {"Filters": filters({"default-for-az": "true"})}
            )
            found = await self._ec2.call("describe_subnets", _read_subnets, **which)
            order = {subnet: place for place, subnet in enumerate(wanted)}
            self._subnets_known = tuple(sorted(found, key=lambda subnet: (order.get(subnet.id, 0), subnet.zone)))
        if not self._subnets_known:
            raise CloudRefusedError(
                f"cloud {self._context.name}: region {self._settings.region} has no default subnet",
                value=self._settings.region,
                hint="name the 'subnets' of this cloud: 'conpaas cloud edit'",
            )
        return self._subnets_known

    async def _subnet(self, zone: str) -> Subnet:
        """Return the subnet for what must be in `zone`; if that is empty, where the settings say."""
        subnets = await self._subnets()
        wanted = zone or self._settings.zone
        for subnet in subnets:
            if wanted in ("", subnet.zone):
                return subnet
        raise CloudRefusedError(
            f"cloud {self._context.name}: there is no subnet in zone {wanted}",
            value=wanted,
            hint=f"there are subnets in: {', '.join(sorted({subnet.zone for subnet in subnets}))}",
        )

    async def _ami(self) -> Ami:
        """Return the image; raise UnknownImageError if it is not there, or not available."""
        if self._ami_known is None:
            ami = await self._look_at_ami()
            if ami.state != "available":
                raise UnknownImageError(f"cloud {self._context.name}: {ami.id} is '{ami.state}'", value=ami.state)
            self._ami_known = ami
        return self._ami_known

    async def _look_at_ami(self) -> Ami:
        amis = await self._ec2.call("describe_images", _read_amis, ImageIds=[self._settings.image])
        if not amis:
            raise UnknownImageError(
                f"cloud {self._context.name}: there is no image {self._settings.image} that this account may use",
                value=self._settings.image,
            )
        return amis[0]


def dashed(more: Mapping[str, str | Sequence[str]]) -> dict[str, str | Sequence[str]]:
    """Return filters by the names that Amazon has for them."""
    return {name.replace("_", "-"): values for name, values in more.items()}


def filters(wanted: Mapping[str, str | Sequence[str]]) -> list[dict[str, Any]]:
    """Return the parameter `Filters`: what is asked for has one of the values of each."""
    return [
        {"Name": name, "Values": [values] if isinstance(values, str) else list(values)}
        for name, values in wanted.items()
    ]


def tags_of(item: Answer) -> dict[str, str]:
    """Return the tags of a thing as Amazon describes it."""
    return {tag["Key"]: tag["Value"] for tag in item.get("Tags", [])}


def chunks(things: Iterable[T], size: int) -> list[list[T]]:
    """Return the things in lists of at most `size`."""
    every = list(things)
    return [every[start : start + size] for start in range(0, len(every), size)]


def _read_subnets(answer: Answer) -> list[Subnet]:
    return [
        Subnet(
            id=item["SubnetId"],
            zone=item["AvailabilityZone"],
            vpc=item["VpcId"],
            free=int(item.get("AvailableIpAddressCount", 0)),
        )
        for item in answer["Subnets"]
    ]


def _read_amis(answer: Answer) -> list[Ami]:
    return [_read_ami(item) for item in answer["Images"]]


def _read_ami(item: Answer) -> Ami:
    root = item.get("RootDeviceName", "")
    sizes = [
        mapping["Ebs"].get("VolumeSize", 0)
        for mapping in item.get("BlockDeviceMappings", [])
        if mapping.get("DeviceName") == root and "Ebs" in mapping
    ]
    return Ami(
        id=item["ImageId"],
        state=item["State"],
        architecture=item.get("Architecture", ""),
        root=root,
        disk_gib=int(sizes[0]) if sizes else 0,
    )
