"""What an hour costs: Amazon's price list, asked once a day, and the market of spare capacity."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import structlog

from conpaas.cloud._ec2_account import chunks
from conpaas.cloud._ec2_client import Answer, Client
from conpaas.core import files
from conpaas.core.clock import Clock
from conpaas.core.errors import ConpaasError, DiskFullError

log = structlog.get_logger()

AGE, AGE_OF_FAILURE = timedelta(days=1), timedelta(hours=1)
TYPES_AT_ONCE = 40  # a filter's value has at most 1024 characters


class Price(NamedTuple):
    """Of an hour."""

    amount: Decimal
    currency: str


def list_region(region: str) -> str:
    """Return where the price list of a region can be asked for."""
    return "cn-northwest-1" if region.startswith("cn-") else "us-east-1"


class PriceList:
    """Amazon's price list of one region, kept in a file for a day; an old one is better than none."""

    def __init__(self, client: Client | None, region: str, directory: Path, clock: Clock) -> None:
        self._client, self._region, self._clock = client, region, clock
        self._file = directory / f"prices-{region}.json"
        self._failed: datetime | None = None

    async def of(self, types: Iterable[str]) -> dict[str, Price]:
        """Return the prices of Linux instances on demand, of those types whose price is known."""
        wanted = sorted(types)
        known, asked = self._read()
        now = self._clock.now()
        missing = [kind for kind in wanted if kind not in known or now - asked > AGE]
        recently_failed = self._failed is not None and now - self._failed < AGE_OF_FAILURE
        if missing and self._client is not None and not recently_failed:
            known = await self._ask(self._client, wanted, known)
        return {kind: price for kind, price in known.items() if price is not None and kind in wanted}

    async def _ask(self, client: Client, wanted: list[str], known: dict[str, Price | None]) -> dict[str, Price | None]:
        try:
            found = {}
            for some in chunks(wanted, TYPES_AT_ONCE):
                found.update(await self._ask_for(client, some))
        except ConpaasError as exc:
            self._failed = self._clock.now()
            log.warning("no-price-list", region=self._region, error=exc.message)
            return known
        prices = {kind: found.get(kind) for kind in wanted}
        self._write(prices)
        return prices

    async def _ask_for(self, client: Client, types: list[str]) -> dict[str, Price]:
        wanted = {
            "regionCode": self._region,
            "operatingSystem": "Linux",
            "preInstalledSw": "NA",
            "tenancy": "Shared",
            "capacitystatus": "Used",
        }
        answers = await client.pages(
            "get_products",
            lambda answer: [_price(json.loads(text)) for text in answer["PriceList"]],
            ServiceCode="AmazonEC2",
            Filters=[{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
            + [{"Type": "ANY_OF", "Field": "instanceType", "Value": ",".join(types)}],
        )
        return {kind: price for kind, price in answers if price is not None}

    def _read(self) -> tuple[dict[str, Price | None], datetime]:
        """Return what the file says, and when it was asked for."""
        try:
            document = json.loads(self._file.read_bytes())
            prices = {
                kind: None if entry is None else Price(Decimal(entry[0]), entry[1])
                for kind, entry in document["prices"].items()
            }
            return prices, datetime.fromisoformat(document["asked"])
        except FileNotFoundError:
            return {}, datetime.min.replace(tzinfo=UTC)
        except (ArithmeticError, KeyError, OSError, TypeError, ValueError) as exc:
            log.warning("price-file-unreadable", file=str(self._file), error=repr(exc))
            return {}, datetime.min.replace(tzinfo=UTC)

    def _write(self, prices: dict[str, Price | None]) -> None:
        entries = {
            kind: None if price is None else [str(price.amount), price.currency] for kind, price in prices.items()
        }
        document = {"asked": self._clock.now().isoformat(), "prices": entries}
        try:
            files.write_atomically(self._file, json.dumps(document), mode=0o600)
        except (DiskFullError, OSError) as exc:  # then it is asked for again
            log.warning("price-file-not-written", file=str(self._file), error=str(exc))


def _price(product: Answer) -> tuple[str, Price | None]:
    """Return the type and the price per hour of an entry of the price list."""
    kind = product["product"]["attributes"]["instanceType"]
    for term in product["terms"].get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            if dimension["unit"] == "Hrs":
                ((currency, amount),) = dimension["pricePerUnit"].items()
                if Decimal(amount):
                    return kind, Price(Decimal(amount), currency)
    return kind, None


async def spot_prices(client: Client, types: Iterable[str], zone: str, clock: Clock) -> dict[str, Price]:
    """Return what spare Linux instances cost in a zone just now."""
    entries = await client.pages(
        "describe_spot_price_history",
        lambda answer: [(item["InstanceType"], Decimal(item["SpotPrice"])) for item in answer["SpotPriceHistory"]],
        InstanceTypes=sorted(types),
        ProductDescriptions=["Linux/UNIX"],
        StartTime=clock.now(),  # gives the one entry that holds now
        AvailabilityZone=zone,
    )
    return {kind: Price(amount, "USD") for kind, amount in entries}
