"""Whether an account at an OpenNebula has all that instances need."""

import re
from collections.abc import Awaitable, Callable
from xml.etree.ElementTree import Element

from conpaas.cloud._opennebula_model import id_of, image_trouble, number_of, text_of
from conpaas.cloud._opennebula_quota import rooms
from conpaas.cloud._opennebula_rpc import Server
from conpaas.cloud.opennebula import OpenNebulaSettings
from conpaas.core.cloud import Finding
from conpaas.core.errors import CloudCredentialsError, CloudRefusedError, ConpaasError, PeerError, UnknownImageError

OLDEST, NEWEST = (5, 4), (7, 99)
_USABLE_IMAGE = {1, 2, 4, 9}
"""READY, USED, and LOCKED ones, for which VMs wait."""
_NETWORK_READY = "1"
_IMAGE_DATASTORE = 0

Check = Callable[[Server, OpenNebulaSettings], Awaitable[str]]


async def examine(server: Server, settings: OpenNebulaSettings) -> list[Finding]:
    """Try all calls that creating an instance begins with; the rest is not tried when one cannot be made at all."""
    findings: list[Finding] = []
    for name, check in _checks(settings):
        try:
            findings.append(Finding(name=name, ok=True, detail=await check(server, settings)))
        except ConpaasError as exc:
            findings.append(Finding(name=name, ok=False, detail=exc.message, hint=exc.hint))
            if isinstance(exc, PeerError) or name in {"the endpoint", "the credentials"}:
                break
    return findings


def _checks(settings: OpenNebulaSettings) -> list[tuple[str, Check]]:
    checks: list[tuple[str, Check]] = [("the endpoint", _endpoint), ("the credentials", _credentials)]
    if settings.template is not None:
        checks.append(("the template", _template))
    checks.append(("the image", _image))
    checks += [(f"the network {network}", _network(network)) for network in settings.networks]
    if settings.datastore is not None:
        checks.append(("the datastore", _datastore))
    return [*checks, ("the quota", _quota)]


async def _endpoint(server: Server, _: OpenNebulaSettings) -> str:
    try:
        version = str(await server.ask("one.system.version"))
    except CloudCredentialsError:
        return "an OpenNebula"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not OLDEST <= numbers <= NEWEST:
        raise CloudRefusedError(
            f"OpenNebula {version} is not supported", hint="versions from 5.4 to 7 are", value=version
        )
    return f"OpenNebula {version}"


async def _credentials(server: Server, _: OpenNebulaSettings) -> str:
    user = await server.read("one.user.info", -1)
    return f"the user {text_of(user, 'NAME')}, of the group {text_of(user, 'GNAME')}"


async def _template(server: Server, settings: OpenNebulaSettings) -> str:
    template = await _read_template(server, settings)
    if template.find("TEMPLATE/NIC") is None and not settings.networks:
        raise CloudRefusedError(f"the template {settings.template} has no NIC", hint="add one, or set networks")
    return text_of(template, "NAME")


async def _read_template(server: Server, settings: OpenNebulaSettings) -> Element:
    return await server.read("one.template.info", settings.template or 0)


async def _image(server: Server, settings: OpenNebulaSettings) -> str:
    number = settings.image
    if number is None:
        template = await _read_template(server, settings)
        number = id_of(text_of(template, "TEMPLATE/DISK/IMAGE_ID"))
        if number is None and template.find("TEMPLATE/DISK") is None:
            raise UnknownImageError(f"the template {settings.template} has no DISK")
        if number is None:
            return text_of(template, "TEMPLATE/DISK/IMAGE")
    image = await server.read("one.image.info", number)
    if number_of(image, "STATE") not in _USABLE_IMAGE:
        raise UnknownImageError(f"the image {number} is {image_trouble(image)}", value=number)
    if number_of(image, "PERSISTENT"):
        raise UnknownImageError(
            f"the image {number} is persistent: only one VM can use it",
            hint=f"make it non-persistent: 'oneimage nonpersistent {number}'",
            value=number,
        )
    return text_of(image, "NAME")


def _network(number: int) -> Check:
    async def check(server: Server, _: OpenNebulaSettings) -> str:
        network = await server.read("one.vn.info", number)
        state = text_of(network, "STATE") or _NETWORK_READY  # old versions have none
        name = text_of(network, "NAME")
        if state != _NETWORK_READY:
            raise CloudRefusedError(f"the network {number}, {name}, is not ready: its state is {state}")
        free = _addresses(network) - number_of(network, "USED_LEASES")
        if free <= 0:
            raise CloudRefusedError(f"the network {number}, {name}, has no free address", hint="enlarge it")
        return f"{name}, {free} addresses free"

    return check


def _addresses(network: Element) -> int:
    return sum(number_of(block, "SIZE") for block in network.iterfind("AR_POOL/AR"))


async def _datastore(server: Server, settings: OpenNebulaSettings) -> str:
    datastore = await server.read("one.datastore.info", settings.datastore or 0)
    name = text_of(datastore, "NAME")
    if number_of(datastore, "TYPE") != _IMAGE_DATASTORE:
        raise CloudRefusedError(f"the datastore {settings.datastore}, {name}, is not for images")
    if number_of(datastore, "STATE"):
        raise CloudRefusedError(f"the datastore {settings.datastore}, {name}, is disabled")
    return f"{name}, {text_of(datastore, 'FREE_MB')} MB free"


async def _quota(server: Server, settings: OpenNebulaSettings) -> str:
    found = rooms(await server.read("one.user.info", -1), settings.datastore)
    full = [f"{room.name}: {room.used:g} of {room.limit:g}" for room in found if room.used >= room.limit]
    if full:
        raise CloudRefusedError(f"nothing is left of {', '.join(full)}", hint="remove something, or raise the quota")
    return ", ".join(f"{room.name}: {room.used:g} of {room.limit:g}" for room in found) or "none"
