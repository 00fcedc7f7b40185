"""The providers that a few words each are enough for: what they call what we want."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from libcloud.compute.base import NodeLocation

from conpaas.cloud._libcloud_provider import GIB, MIB, Provider
from conpaas.cloud._libcloud_threads import Call
from conpaas.cloud.libcloud import LibcloudSettings
from conpaas.core.cloud import VmRequest

_HOURS_PER_MONTH = 730


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a provider's `create_node` calls what we want. It is found again by its name."""

    userdata: Callable[[str], dict[str, Any]]
    """Parameters for the contextualization document."""
    key: Callable[[str], dict[str, Any]] | None = None
    networks: Callable[[Sequence[str]], dict[str, Any]] | None = None
    security_groups: Callable[[Sequence[str]], dict[str, Any]] | None = None
    more: Callable[[], dict[str, Any]] = dict
    constructor: Mapping[str, Any] = field(default_factory=dict)
    needs_zone: bool = False
    changes_by_get: bool = False
    """Requests that change something look like those that do not."""
    price_hours: int = 1
    """How many hours libcloud's price is for."""
    disk_unit: int = GIB


class Named(Provider):
    """A provider that is known by its dialect."""

    def __init__(self, dialect: Dialect, settings: LibcloudSettings, deployment: str) -> None:
        super().__init__(settings, deployment)
        self._dialect = dialect

    def constructor(self) -> dict[str, Any]:
        words = {**self._dialect.constructor, **({"url": self.settings.url} if self.settings.url else {})}
        return {name: word for name, word in words.items() if name not in self.settings.options}

    def problem(self) -> str:
        settings, dialect = self.settings, self._dialect
        given: dict[str, tuple[object, object]] = {
            "key_name": (settings.key_name, dialect.key),
            "networks": (settings.networks, dialect.networks),
            "security_groups": (settings.security_groups, dialect.security_groups),
        }
        refused = [name for name, (value, taken) in given.items() if value and taken is None]
        if refused:
            return f"libcloud's {settings.provider} takes no {', '.join(refused)}"
        if dialect.needs_zone and not settings.zone:
            return "no zone is set, and the provider wants to know where instances are to be"
        return super().problem()

    def create(self, driver: Any, request: VmRequest, size: Any, zone: str) -> Any:
        settings, dialect = self.settings, self._dialect
        words: dict[str, Any] = {**dialect.more(), **dialect.userdata(request.context(""))}
        if settings.key_name and dialect.key:
            _merge(words, dialect.key(settings.key_name))
        if settings.networks and dialect.networks:
            _merge(words, dialect.networks(settings.networks))
        if settings.security_groups and dialect.security_groups:
            _merge(words, dialect.security_groups(settings.security_groups))
        if zone:
            words["location"] = NodeLocation(id=zone, name=zone, country="", driver=driver)
        return driver.create_node(name=self.prefix + request.token, size=size, image=self.image(driver), **words)

    def made(self, call: Call) -> str | None:
        return "" if call.changes or (self._dialect.changes_by_get and call.reads) else None

    def price(self, size: Any) -> Decimal | None:
        price = super().price(size)
        return None if price is None else price / self._dialect.price_hours

    def disk(self, size: Any) -> int:
        return int(float(size.disk or 0) * self._dialect.disk_unit)


def _merge(words: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add parameters; those that are themselves a set of parameters are joined."""
    for name, value in more.items():
        words[name] = {**words[name], **value} if isinstance(words.get(name), dict) else value


class _Network:
    """As much of a network as libcloud's drivers look at."""

    def __init__(self, network: str) -> None:
        self.id = network


def _ex_userdata(text: str) -> dict[str, Any]:
    return {"ex_userdata": text}


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "brightbox": Dialect(userdata=_ex_userdata),
        "cloudscale": Dialect(
            userdata=lambda text: {"ex_create_attr": {"user_data": text}},
        ),
        "cloudstack": Dialect(
            userdata=_ex_userdata,
            key=lambda name: {"ex_keyname": name},
            networks=lambda networks: {"networks": [_Network(network) for network in networks]},
            security_groups=lambda groups: {"ex_security_groups": list(groups)},
            more=lambda: {"ex_start_vm": True},
            needs_zone=True,  # else libcloud takes any
            changes_by_get=True,
        ),
        "digitalocean": Dialect(
            userdata=lambda text: {"ex_user_data": text},
            key=lambda name: {"ex_create_attr": {"ssh_keys": [name]}},
            needs_zone=True,
        ),
        "linode": Dialect(
            userdata=_ex_userdata,
            more=lambda: {"root_pass": secrets.token_urlsafe(32)},  # it wants one; nobody gets to know it
            key=lambda name: {"ex_authorized_users": [name]},
            needs_zone=True,
            disk_unit=MIB,
        ),
        "vultr": Dialect(
            userdata=_ex_userdata,
            constructor={"api_version": "2"},
            key=lambda name: {"ex_ssh_key_ids": [name]},
            networks=lambda networks: {"ex_private_network_ids": list(networks)},
            needs_zone=True,
            price_hours=_HOURS_PER_MONTH,
        ),
    }
)
