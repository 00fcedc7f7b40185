"""Network facts that a context source gives, and how to make them so with iproute2 or systemd-networkd.

Sources: a NoCloud seed's `network-config` (version 2, as JSON) and the `ETH<n>_*` variables of OpenNebula. Both may
bear what is our own: through which gateway the host's loopback addresses are reached (see the `qemu` driver).
"""

import contextlib
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conpaas.core import files, run
from conpaas.core.errors import BadInputError, CommandFailedError

COMMAND_S = 30.0
LEASE_S = 60.0
"""How long DHCP may take."""
NETWORKD = Path("/run/systemd/network")
METADATA = ("169.254.169.254/32", "fd00:ec2::254/128")
"""Where clouds answer the questions of their instances."""
METRIC = 100
"""Of routes through the second card; those through the first one, by whose address we are known, go before."""
DEFAULT_ROUTES = {"default", "0.0.0.0/0", "::/0"}


@dataclass(frozen=True, kw_only=True)
class Interface:
    """One network card. `name` may be empty if `mac` says which one it is."""

    name: str = ""
    mac: str = ""
    """Of the card as it is, lower case."""
    set_mac: str = ""
    """What it is to be: machines that were cloned while they ran all have the same."""
    addresses: tuple[str, ...] = ()
    """With their prefix: `10.0.2.15/24`."""
    routes: tuple[tuple[str, str], ...] = ()
    """Destination (`default` or a network) and gateway."""
    nameservers: tuple[str, ...] = ()
    mtu: int | None = None
    dhcp: bool = False


@dataclass(frozen=True, kw_only=True)
class Network:
    """All that is known; no interface at all means DHCP on the first card."""

    interfaces: tuple[Interface, ...] = ()
    loopback_via: str = ""
    """Loopback addresses except 127.0.0.1 lead to the host, through this gateway."""


# -- reading --------------------------------------------------------------------------------------------------------


def from_netplan(text: str) -> Network:
    """Read a `network-config` of version 2, in JSON. Raises BadInputError, which names what is wrong."""
    try:
        document = json.loads(text)
        document = document.get("network", document)
        if document.get("version") != 2:
            raise BadInputError("network-config: only version 2, as JSON, is understood", value=document.get("version"))
        found = tuple(_from_ethernet(name, one) for name, one in (document.get("ethernets") or {}).items())
        via = (document.get("conpaas") or {}).get("loopback_via")
        return Network(interfaces=found, loopback_via=_address(via) if via else "")
    except (ValueError, AttributeError, TypeError, KeyError) as exc:
        raise BadInputError(f"network-config: {exc!r}") from exc


def _from_ethernet(name: str, one: Mapping[str, Any]) -> Interface:
    match = one.get("match") or {}
    routes = [(str(route["to"]), _address(route["via"])) for route in one.get("routes") or ()]
    routes += [("default", _address(one[key])) for key in ("gateway4", "gateway6") if one.get(key)]
    return Interface(
        name=str(match.get("name") or ("" if match else name)),
        mac=str(match.get("macaddress") or "").lower(),
        set_mac=str(one.get("macaddress") or "").lower(),
        addresses=tuple(_with_prefix(str(address)) for address in one.get("addresses") or ()),
        routes=tuple(("default" if to in DEFAULT_ROUTES else str(ipaddress.ip_network(to)), via) for to, via in routes),
        nameservers=tuple(map(_address, (one.get("nameservers") or {}).get("addresses") or ())),
        mtu=None if one.get("mtu") is None else int(one["mtu"]),
        dhcp=bool(one.get("dhcp4") or one.get("dhcp6")),
    )


def from_opennebula(variables: Mapping[str, str]) -> Network:
    """Read the `ETH<n>_*` variables of an OpenNebula context, and CONPAAS_LOOPBACK_VIA. Raises BadInputError."""
    numbers = sorted({int(one[1]) for name in variables if (one := re.fullmatch(r"ETH(\d+)_(?:MAC|IP)", name))})
    via = variables.get("CONPAAS_LOOPBACK_VIA")
    try:
        found = tuple(_from_eth(number, variables) for number in numbers)
        return Network(interfaces=found, loopback_via=_address(via) if via else "")
    except ValueError as exc:
        raise BadInputError(f"context.sh: {exc}") from exc


def _from_eth(number: int, variables: Mapping[str, str]) -> Interface:
    def value(name: str) -> str:
        return variables.get(f"ETH{number}_{name}", "").strip()

    dhcp = value("METHOD").lower() == "dhcp" or not value("IP")
    gateway = value("GATEWAY")
    return Interface(
        name="" if value("MAC") else f"eth{number}",
        mac=value("MAC").lower(),
        addresses=() if dhcp else (_with_prefix(f"{value('IP')}/{value('MASK') or '24'}"),),
        routes=(("default", _address(gateway)),) if gateway and not dhcp else (),
        nameservers=tuple(map(_address, value("DNS").split())),
        mtu=int(value("MTU")) if value("MTU") else None,
        dhcp=dhcp,
    )


def _address(text: Any) -> str:
    return str(ipaddress.ip_address(str(text)))


def _with_prefix(text: str) -> str:
    return ipaddress.ip_interface(text).with_prefixlen


# -- making it so ---------------------------------------------------------------------------------------------------


def commands(interface: Interface, card: str, metric: int = 0) -> list[list[str]]:
    """Return what `ip` is told, in order, to give `card` what `interface` says. All may be repeated.

    Of several routes to one place that with the lowest `metric` is taken; with the same they would replace each other.
    """
    told = [["link", "set", "dev", card, "address", interface.set_mac]] if interface.set_mac else []
    told.append(["link", "set", "dev", card, *(["mtu", str(interface.mtu)] if interface.mtu else []), "up"])
    told += [["address", "replace", address, "dev", card] for address in interface.addresses]
    last = ["metric", str(metric)] if metric else []
    told += [["route", "replace", to, "via", via, "dev", card, *last] for to, via in interface.routes]
    return told


def loopback_commands(via: str, card: str) -> list[list[str]]:
    """Return what `ip` is told to give up all of 127.0.0.0/8 but 127.0.0.1, and to send the rest to `via`."""
    return [
        ["address", "replace", "127.0.0.1/32", "dev", "lo", "scope", "host"],
        ["address", "delete", "127.0.0.1/8", "dev", "lo"],
        ["route", "replace", "127.0.0.0/8", "via", via, "dev", card],
    ]


def networkd_file(interface: Interface, card: str) -> str:
    """Return the configuration with which systemd-networkd asks for a lease on `card`."""
    lines = ["[Match]", f"Name={card}", "[Network]", "DHCP=yes", *(f"DNS={one}" for one in interface.nameservers)]
    return "\n".join([*lines, *([f"[Link]\nMTUBytes={interface.mtu}"] if interface.mtu else []), ""])


def cards(folder: Path = Path("/sys/class/net")) -> dict[str, str]:
    """Return the network cards of this machine: MAC address, lower case, by name; `lo` and virtual ones left out."""
    found = sorted(path for path in folder.iterdir() if (path / "device").exists())
    return {path.name: (path / "address").read_text().strip().lower() for path in found}


def card_of(interface: Interface, present: Mapping[str, str]) -> str:
    """Return the name of the card that `interface` means. Raises BadInputError if it is not there."""
    wanted = {interface.mac, interface.set_mac} - {""}
    by_mac = [name for name, mac in present.items() if mac in wanted]
    if by_mac:
        return by_mac[0]
    if interface.name in present or (interface.set_mac and len(present) == 1):
        return interface.name if interface.name in present else next(iter(present))
    sought = interface.mac or interface.name
    there = ", ".join(f"{name} ({mac})" for name, mac in present.items()) or "none"
    raise BadInputError(f"there is no network card {sought}; there is: {there}", value=sought)


async def apply(network: Network, *, wait: bool = True) -> str:
    """Make the network of this machine so; return the addresses in words. Unless `wait`, a lease may come later.

    Raises BadInputError, CommandFailedError.
    """
    present = cards()
    interfaces = network.interfaces or (Interface(name=next(iter(present), "eth0"), dhcp=True),)
    found = [(card_of(interface, present), interface) for interface in interfaces]
    await _end_leases(card for card, interface in found if not interface.dhcp)
    for place, (card, interface) in enumerate(found):
        await _ip(commands(interface, card, METRIC * place))
    nameservers = [one for _, interface in found if not interface.dhcp for one in interface.nameservers]
    leased = [(card, interface) for card, interface in found if interface.dhcp]
    if leased:
        await _lease(leased, LEASE_S if wait else 0)
    elif nameservers:
        write_etc("resolv.conf", "".join(f"nameserver {one}\n" for one in nameservers))
    if network.loopback_via:
        await _give_up_loopback(network.loopback_via, found[0][0])
    return ", ".join(address for _, one in found for address in one.addresses) or "by DHCP"


async def _end_leases(cards: Iterable[str]) -> None:
    """Take these cards back from systemd-networkd: somebody was not sure which network he is in."""
    for card in cards:
        if _networkd_path(card).exists():
            _networkd_path(card).unlink()
            await _run("systemctl", "stop", "systemd-networkd.service", "systemd-networkd.socket")
            await _ip([["address", "flush", "dev", card]])


def _networkd_path(card: str) -> Path:
    return NETWORKD / f"10-{card}.network"


async def _lease(leased: Sequence[tuple[str, Interface]], wait_s: float) -> None:
    """Have systemd-networkd lease addresses for these cards; wait for one at most `wait_s`."""
    NETWORKD.mkdir(parents=True, exist_ok=True)
    NETWORKD.chmod(0o755)  # networkd is somebody else
    for card, interface in leased:
        files.write_atomically(_networkd_path(card), networkd_file(interface, card), durable=False)
    resolver = Path("/etc/resolv.conf")
    resolver.unlink(missing_ok=True)
    resolver.symlink_to("/run/systemd/resolve/resolv.conf")
    # networkd touches a card only when udev knows it
    await _run("systemctl", "start", "systemd-udevd.service")
    await _run("udevadm", "trigger", "--subsystem-match=net", "--action=add", "--settle")
    await _run("systemctl", "start", "systemd-networkd.service", "systemd-resolved.service")
    if wait_s:
        online = ["/usr/lib/systemd/systemd-networkd-wait-online", "--any", "--ipv4", f"--timeout={wait_s:.0f}"]
        await run.run(online, timeout_s=wait_s + 5)


async def _give_up_loopback(via: str, card: str) -> None:
    for name in ("all", card):
        Path(f"/proc/sys/net/ipv4/conf/{name}/route_localnet").write_text("1", encoding="ascii")
    replace, delete, route = loopback_commands(via, card)
    await _ip([replace])
    with contextlib.suppress(CommandFailedError):  # it was given up before
        await _ip([delete])
    await _ip([route])


async def shut_metadata() -> None:
    """Let nobody on this machine ask the metadata service any more: what it gives away is for us, not for what we run.

    That is our own context, credentials of a role at Amazon, and under the `qemu` driver those of the host.
    Raises CommandFailedError.
    """
    known = [one for one in METADATA if ":" not in one or Path("/proc/net/if_inet6").exists()]
    await _ip([["route", "replace", "unreachable", address] for address in known])


async def _ip(told: Sequence[Sequence[str]]) -> None:
    batch = "".join(" ".join(words) + "\n" for words in told)
    await run.run(["ip", "-batch", "-"], stdin=batch.encode(), timeout_s=COMMAND_S)


async def _run(*argv: str) -> None:
    await run.run(list(argv), timeout_s=COMMAND_S)


def write_etc(name: str, text: str) -> None:
    """Write a file of /etc, in place of a link, if one is there."""
    path = Path("/etc", name)
    if path.is_symlink():
        path.unlink()
    files.write_atomically(path, text, durable=False)
