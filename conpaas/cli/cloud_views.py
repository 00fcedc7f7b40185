"""What the command line says about clouds."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from conpaas.cli.output import Column
from conpaas.core import units
from conpaas.core.messages.public import CloudAccountView, CloudView, Examination, SizeView
from conpaas.sdk import prices

_SIZES_SHOWN = 4
_IMAGES_SHOWN = 10


def _of(count: int, limit: int | None) -> str:
    return str(count) if limit is None else f"{count} of {limit}"


def _size_names(cloud: CloudView) -> str:
    names = [size.name for size in cloud.sizes]
    return " ".join(names[:_SIZES_SHOWN]) + (" …" if len(names) > _SIZES_SHOWN else "")


def _default_price(cloud: CloudView | CloudAccountView) -> str:
    return next((size_price(size) for size in cloud.sizes if size.default), "")


def size_price(size: SizeView) -> str:
    """Say what an hour on a machine of this size costs."""
    return prices.price(size.price, size.currency)


def _usable(cloud: CloudView) -> str:
    reason = f": {cloud.reason}" if cloud.reason else ""
    return f"{'yes' if cloud.enabled else 'no'}{reason}"


def _account_state(account: CloudAccountView) -> str:
    if not account.usable:
        return f"unusable: {account.reason}"
    state = "enabled" if account.options.enabled else "disabled"
    return f"{state}: {account.trouble}" if account.trouble else state


CLOUDS: Sequence[Column] = (
    ("Name", lambda c: c.name),
    ("Title", lambda c: c.title),
    ("Driver", lambda c: c.driver),
    ("", lambda c: "default" if c.default else ""),
    ("Instances", lambda c: _of(c.instances, c.limit)),
    ("Per hour", _default_price),
    ("Sizes", _size_names),
    ("Usable", _usable),
)
SIZES: Sequence[Column] = (
    ("Size", lambda s: s.name),
    ("", lambda s: "default" if s.default else ""),
    ("Cores", lambda s: f"{s.cores:g}"),
    ("Memory", lambda s: units.show_size(s.memory)),
    ("Disk", lambda s: units.show_size(s.disk) if s.disk else ""),
    ("Per hour", size_price),
)
CLOUD_TYPES: Sequence[Column] = (
    ("Driver", lambda t: t.name),
    ("Title", lambda t: t.title),
    ("Description", lambda t: t.description),
)


def cloud_lines(account: CloudAccountView, schema: Mapping[str, Any], deployment: str) -> list[str]:
    """Return what `cloud show` says of an account; `schema` is that of its driver's settings, `deployment` the tag."""
    options = account.options
    facts: dict[str, Any] = {
        "driver": account.driver,
        "state": _account_state(account),
        "default": "yes" if account.default else "",
        "where": "in the director's own settings" if account.fixed else "",
        "instances": _of(account.instances, options.instances),
        "limit per user": options.user_instances,
        "deployment": deployment,
        "director's URL": options.director_url,
        "prices": ", ".join(
            f"{size}={prices.price(price, options.currency)}" for size, price in options.prices.items()
        ),
        "calls per second": ", ".join(f"{verb}={rate:g}" for verb, rate in options.rates.items()),
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in account.settings.items()},
    }
    width = max(len(name) for name in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts.items() if value not in {"", None}]
    unset = [name for name in schema.get("properties", {}) if name not in account.settings]
    more = [f"not set: {', '.join(unset)}"] if unset else []
    return [f"{account.name} ({options.title or account.driver})", *(f"  {line}" for line in (*lines, *more))]


def finding_lines(examination: Examination) -> list[str]:
    """Return the tick list of an examination, and what it tells of the account."""
    lines = []
    for finding in examination.findings:
        lines.append(f"{'✓' if finding.ok else '✗'} {finding.name}{f': {finding.detail}' if finding.detail else ''}")
        if finding.hint and not finding.ok:
            lines.append(f"    {finding.hint}")
    lines += [f"  {units.show_room(room.name, room.used, room.limit)} used" for room in examination.quota]
    lines += [f"  zones: {', '.join(examination.zones)}"] if examination.zones else []
    lines += [f"  images: {', '.join(examination.images[:_IMAGES_SHOWN])}"] if examination.images else []
    return lines
