"""What instances cost at their providers: prices per hour, and sums so far, each in its currency."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal

from conpaas.core.messages.model import Cost
from conpaas.director.db.models import Instance

_SMALLEST = Decimal("0.000001")


def of(instance: Instance, now: datetime) -> Cost:
    """Return what an instance costs, and has cost until `now`. Nothing if its price is unknown, or it never was."""
    if instance.price is None or instance.launched is None:
        return Cost()
    price, currency = Decimal(instance.price), instance.currency
    hours = Decimal(((instance.ended or now) - instance.launched).total_seconds()) / 3600
    total = (price * max(hours, Decimal(0))).quantize(_SMALLEST)
    return Cost(hourly={} if instance.ended else {currency: price}, total={currency: total})


def of_all(instances: Iterable[Instance], spent: Iterable[Mapping[str, str]], now: datetime) -> Cost:
    """Return what living instances cost, together with what those that have ended cost."""
    hourly: defaultdict[str, Decimal] = defaultdict(Decimal)
    total: defaultdict[str, Decimal] = defaultdict(Decimal)
    for before in spent:
        for currency, words in before.items():
            total[currency] += Decimal(words)
    for instance in instances:
        if instance.ended is None:
            one = of(instance, now)
            for currency, price in one.hourly.items():
                hourly[currency] += price
            for currency, amount in one.total.items():
                total[currency] += amount
    return Cost(hourly=dict(hourly), total=dict(total))


def add(spent: Mapping[str, str], cost: Cost) -> dict[str, str]:
    """Return sums as they are kept, with what one more instance has cost."""
    sums = defaultdict(Decimal, {currency: Decimal(words) for currency, words in spent.items()})
    for currency, amount in cost.total.items():
        sums[currency] += amount
    return {currency: str(amount) for currency, amount in sums.items()}
