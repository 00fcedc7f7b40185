"""What Amazon offers: sizes with prices, images, zones, quota."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from conpaas.cloud._ec2_account import GIB, Account, filters
from conpaas.cloud._ec2_client import Answer, Client
from conpaas.cloud._ec2_prices import Price, PriceList, list_region, spot_prices
from conpaas.cloud.ec2 import Ec2Settings
from conpaas.core.cloud import CloudContext, Image, Room, Size

_MIB, _GB = 1 << 20, 10**9

_STANDARD = re.compile(r"(a|c|d|h|i|im|is|m|r|t|z)[0-9]")
_QUOTA_ON_DEMAND, _QUOTA_SPOT = "L-1216C47A", "L-34B43A08"
"""Cores of running instances of the standard families, as Service Quotas calls them."""


class Offers(Account):
    """What the account may use."""

    def __init__(self, settings: Ec2Settings, context: CloudContext) -> None:
        super().__init__(settings, context)
        amazon = bool(settings.services_endpoint) or not settings.endpoint
        self._pricing = self._service("pricing", list_region(settings.region)) if amazon else None
        self._quotas = self._service("service-quotas", settings.region) if amazon else None
        self._prices = PriceList(self._pricing, settings.region, context.directory, context.clock)

    async def sizes(self) -> Sequence[Size]:
        """Return the settings' instance types that there are in a zone of ours, with their price if it is known."""
        patterns = sorted({*self._settings.sizes, self._settings.size})
        zones = {subnet.zone for subnet in await self._subnets()}
        offered = await self._ec2.pages(
            "describe_instance_type_offerings",
            lambda answer: [item["InstanceType"] for item in answer["InstanceTypeOfferings"]],
            LocationType="availability-zone",
            Filters=filters({"location": sorted(zones), "instance-type": patterns}),
        )
        there = {size.name: size for size in await self._shapes(patterns) if size.name in set(offered)}
        prices = await self._prices_of(there)
        found = [self._priced(size, prices.get(size.name)) for size in there.values()]
        return sorted(found, key=lambda size: (size.price is None, size.price, size.cores, size.memory, size.name))

    async def images(self) -> Sequence[Image]:
        """Return the account's own images."""
        found = await self._ec2.pages("describe_images", _read_images, Owners=["self"])
        return sorted(found, key=lambda image: (image.name, image.id))

    async def zones(self) -> Sequence[str]:
        """Return the zones in which instances can be made."""
        return sorted({subnet.zone for subnet in await self._subnets()})

    async def quota(self) -> Sequence[Room]:
        """Return how much the account has in use, everybody's together.

        Amazon limits the cores of the standard families: instances are as many of the default size as those allow.
        """
        everybodys = await self._everybodys()
        if self._quotas is None:
            limit = await self._ec2.call(
                "describe_account_attributes", _read_most_instances, AttributeNames=["max-instances"]
            )
            return [Room(name="instances", used=len(everybodys), limit=limit)]
        limit = await self._quotas.call(
            "get_service_quota",
            lambda answer: float(answer["Quota"]["Value"]),
            ServiceCode="ec2",
            QuotaCode=_QUOTA_SPOT if self._settings.spot else _QUOTA_ON_DEMAND,
        )
        counted = [cores for kind, cores, spot in everybodys if _STANDARD.match(kind) and spot == self._settings.spot]
        rooms = [Room(name="cores", used=sum(counted), limit=limit)]
        for size in await self._shapes([self._settings.size]):
            more = max((limit - sum(counted)) // size.cores, 0)
            rooms.insert(0, Room(name="instances", used=len(counted), limit=len(counted) + more))
        return rooms

    async def _close_offers(self) -> None:
        for client in (self._pricing, self._quotas):
            if client is not None:
                await client.close()

    async def _shapes(self, patterns: list[str]) -> list[Size]:
        """Return the instance types that the region has of these."""
        return await self._ec2.pages(
            "describe_instance_types",
            lambda answer: [_read_size(item) for item in answer["InstanceTypes"]],
            Filters=filters({"instance-type": patterns}),
        )

    async def _everybodys(self) -> list[tuple[str, int, bool]]:
        """Return type, cores, and whether spot, of every running instance of the account."""
        return await self._ec2.pages(
            "describe_instances",
            _read_use,
            Filters=filters({"instance-state-name": ["pending", "running"]}),
        )

    async def _prices_of(self, sizes: dict[str, Size]) -> dict[str, Price]:
        if self._settings.spot and sizes:
            zone = (await self._subnet("")).zone
            prices = await spot_prices(self._ec2, sizes, zone, self._context.clock)
        else:
            prices = await self._prices.of(sizes)
        currency = "CNY" if self._settings.region.startswith("cn-") else "USD"
        return prices | {kind: Price(amount, currency) for kind, amount in self._settings.prices.items()}

    def _priced(self, size: Size, price: Price | None) -> Size:
        return Size(
            name=size.name,
            cores=size.cores,
            memory=size.memory,
            disk=max(size.disk, self._settings.disk_gib * GIB),
            price=None if price is None else price.amount,
            currency="USD" if price is None else price.currency,
            default=size.name == self._settings.size,
        )

    def _service(self, name: str, region: str) -> Client:
        endpoint = self._settings.services_endpoint
        return Client(name, self._settings, self._context, endpoint=endpoint, region=region)


def _read_size(item: Answer) -> Size:
    return Size(
        name=item["InstanceType"],
        cores=float(item["VCpuInfo"]["DefaultVCpus"]),
        memory=int(item["MemoryInfo"]["SizeInMiB"]) * _MIB,
        disk=int(item.get("InstanceStorageInfo", {}).get("TotalSizeInGB", 0)) * _GB,
    )


def _read_images(answer: Answer) -> list[Image]:
    return [
        Image(
            id=item["ImageId"],
            name=item.get("Name") or item["ImageId"],
            detail=", ".join(
                filter(None, (item["State"], item.get("Architecture"), _date(item.get("CreationDate", ""))))
            ),
        )
        for item in answer["Images"]
    ]


def _date(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).date().isoformat() if text else ""


def _read_use(answer: Answer) -> list[tuple[str, int, bool]]:
    return [
        (instance["InstanceType"], _cores(instance.get("CpuOptions", {})), instance.get("InstanceLifecycle") == "spot")
        for reservation in answer["Reservations"]
        for instance in reservation["Instances"]
    ]


def _cores(options: Answer) -> int:
    return int(options.get("CoreCount", 1)) * int(options.get("ThreadsPerCore", 1))


def _read_most_instances(answer: Answer) -> float:
    attributes = {attribute["AttributeName"]: attribute["AttributeValues"] for attribute in answer["AccountAttributes"]}
    return float(attributes["max-instances"][0]["AttributeValue"])
