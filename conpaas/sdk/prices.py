"""Money as people read it: amounts by currency, `free` for nothing, and nothing where no price is known."""

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal

from conpaas.core.messages.model import Cost

FREE = "free"
_LARGE = 10
"""From here on two decimals are enough."""
_SMALLEST = Decimal("0.0001")


def show(amounts: Mapping[str, Decimal], per: str = "") -> str:
    """Say amounts by currency: `0.0208 USD`, `0.02 EUR + 0.01 USD`; with `per="/h"`: `0.0208 USD/h`.

    A sum of nothing is `free`; without any amount the text is empty.
    """
    if not amounts:
        return ""
    some = [f"{_number(amount)} {currency}{per}" for currency, amount in sorted(amounts.items()) if amount]
    return " + ".join(some) or FREE


def price(amount: Decimal | None, currency: str) -> str:
    """Say what an hour of one instance costs: `0.0208 USD/h`, `free`, or nothing if that is not known."""
    return "" if amount is None else show({currency: amount}, "/h")


def hourly(cost: Cost) -> str:
    """Say what runs now costs per hour."""
    return show(cost.hourly, "/h")


def so_far(cost: Cost) -> str:
    """Say what it has cost so far."""
    return show(cost.total)


def both(cost: Cost) -> str:
    """Say both in few words: `0.04 USD/h, 1.20 USD so far`; just `free` if both are."""
    spent = so_far(cost)
    words = (hourly(cost), f"{spent} so far" if spent not in {"", FREE} else spent)
    return ", ".join(dict.fromkeys(word for word in words if word))


def _number(amount: Decimal) -> str:
    if amount < _SMALLEST:
        return f"<{_SMALLEST}"
    step = Decimal("0.01") if amount >= _LARGE else _SMALLEST
    whole, _, rest = f"{amount.quantize(step, ROUND_HALF_UP):f}".partition(".")
    return f"{whole}.{rest.rstrip('0').ljust(2, '0')}"
