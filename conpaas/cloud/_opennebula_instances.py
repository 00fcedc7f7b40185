"""Instances at an OpenNebula: VMs that bear our tags.

`one.template.instantiate` is not idempotent and names are not unique, so the token is a tag, and every create looks
for it twice: before, and after. A request whose answer was lost may still wait in the server's queue when it is
repeated; whatever is doubled so, the VM with the lowest id is the instance, and the others are terminated.
"""

import asyncio
import base64
import re
from collections.abc import Sequence
from decimal import Decimal
from weakref import WeakValueDictionary
from xml.etree.ElementTree import Element

from conpaas.cloud._opennebula_examination import examine
from conpaas.cloud._opennebula_groups import group_of
from conpaas.cloud._opennebula_model import (
    DEPLOYMENT,
    MIB,
    SIZE,
    TOKEN,
    Machine,
    Template,
    Vector,
    id_of,
    machine,
    machines,
    number_of,
    proper_name,
    render,
    text_of,
)
from conpaas.cloud._opennebula_quota import rooms
from conpaas.cloud._opennebula_rpc import NoMethodError, NoSuchError, Server, WrongStateError
from conpaas.cloud.opennebula import OpenNebulaSettings, OpenNebulaSize
from conpaas.core.cloud import CloudContext, Finding, Image, Room, Size, Vm, VmRequest, VmState
from conpaas.core.errors import BadInputError, CloudError, ConpaasError, PeerError, UnknownImageError

MINE, MINE_AND_GROUP = -3, -1
ALL_IDS = (-1, -1)
ANY_BUT_DONE = -1
OS_IMAGE = 0
TEMPLATE_SIZE = "template"
"""Name of the only size where the settings name none."""

_TURNS: WeakValueDictionary[tuple[str, ...], asyncio.Lock] = WeakValueDictionary()
"""Held while an instance is created, by account, deployment and token: there may be several drivers."""


def turn_of(*key: str) -> asyncio.Lock:
    """Return the lock of `key`, the same to all who ask while it is in use."""
    lock = _TURNS.get(key)
    if lock is None:
        lock = _TURNS[key] = asyncio.Lock()
    return lock


def _name_of(size: OpenNebulaSize | None) -> str:
    return TEMPLATE_SIZE if size is None else size.name


class Listing:
    """The VMs of the account. Those who ask at the same time share an answer that was asked for after they came."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._lock = asyncio.Lock()
        self._begun = self._answered = 0
        self._last: list[Machine] | ConpaasError = []

    async def fresh(self) -> list[Machine]:
        """Return all VMs of the user that are not DONE, as they are now."""
        came = self._begun
        async with self._lock:
            if self._answered <= came:
                self._begun += 1
                self._last, self._answered = await self._ask(), self._begun
            last = self._last
        if isinstance(last, ConpaasError):
            raise last
        return last

    async def _ask(self) -> list[Machine] | ConpaasError:
        try:
            return await self._machines()
        except ConpaasError as exc:
            return exc

    async def _machines(self) -> list[Machine]:
        asked = (MINE, *ALL_IDS, ANY_BUT_DONE)
        try:
            return await self._server.read_as(machines, "one.vmpool.infoextended", *asked)
        except NoMethodError:  # before 5.8.5; and before 5.8 the short form was the long one
            pool = await self._server.read("one.vmpool.info", *asked)
            found = await asyncio.gather(*(self._long(vm) for vm in pool.iterfind("VM")))
            return [vm for vm in found if vm is not None]

    async def _long(self, vm: Element) -> Machine | None:
        if vm.find("PERMISSIONS") is not None:
            return machine(vm)
        try:
            return await self._server.read_as(machine, "one.vm.info", number_of(vm, "ID"))
        except NoSuchError:
            return None


class OpenNebula:
    """A user of an OpenNebula, without volumes: see `conpaas.core.cloud.Cloud`."""

    def __init__(self, settings: OpenNebulaSettings, context: CloudContext) -> None:
        self._settings, self._name, self._deployment = settings, context.name, context.deployment
        self._server = Server(settings, context)
        self._listing = Listing(self._server)

    # -- instances --------------------------------------------------------------------------------------------------

    async def create(self, request: VmRequest) -> Vm:
        """Ask for one instance. One that waits for room is PENDING, with the scheduler's words as reason."""
        size = self._size(request.size)
        async with turn_of(self._settings.endpoint, self._settings.user, self._deployment, request.token):
            found = await self._with_token(request.token)
            if found is not None:
                return found.vm
            number = await self._instantiate(request, size)
            try:
                found = await self._with_token(request.token)
            except CloudError as exc:  # which would say that nothing was made
                raise PeerError(f"the VM {number} was made, but then: {exc.message}") from exc
        unseen = Vm(id=str(number), token=request.token, state=VmState.PENDING, size=_name_of(size))
        return unseen if found is None else found.vm

    async def describe(self, vm: str) -> Vm:
        """Return an instance as `one.vm.info` shows it."""
        found = await self._ours(vm)
        return Vm(id=vm, token="", state=VmState.GONE) if found is None else found.vm

    async def list(self) -> list[Vm]:
        """Return the instances of this deployment."""
        return [found.vm for found in await self._listing.fresh() if self._is_ours(found) and not found.gone]

    async def delete(self, vm: str) -> None:
        """Terminate an instance at once; OpenNebula detaches its volumes. CloudBusyError while it is being deployed."""
        found = await self._ours(vm)
        if found is not None and not found.gone:
            await self._terminate(found.number)

    async def close(self) -> None:
        """Close the connections."""
        await self._server.close()

    # -- what the account has ---------------------------------------------------------------------------------------

    async def sizes(self) -> Sequence[Size]:
        """Return the configured sizes, or the template's."""
        if not self._settings.sizes:
            return [await self._template_size()]
        default = self._size("")
        sizes = [
            Size(
                name=size.name,
                cores=size.cpu,
                memory=size.memory_mib * MIB,
                price=size.price,
                currency=self._settings.currency,
                default=size is default,
            )
            for size in self._settings.sizes
        ]
        return sorted(sizes, key=lambda size: (size.price or Decimal(0), size.memory, size.cores))

    async def images(self) -> Sequence[Image]:
        """Return the images with an operating system of the user and the user's group."""
        pool = await self._server.read("one.imagepool.info", MINE_AND_GROUP, *ALL_IDS)
        images = [
            Image(
                id=text_of(image, "ID"),
                name=text_of(image, "NAME"),
                detail=f"{number_of(image, 'SIZE')} MiB, of {text_of(image, 'UNAME')}",
            )
            for image in pool.iterfind("IMAGE")
            if number_of(image, "TYPE") == OS_IMAGE
        ]
        return sorted(images, key=lambda image: image.name)

    async def quota(self) -> Sequence[Room]:
        """Return the user's quotas that have a limit."""
        return rooms(await self._server.read("one.user.info", -1), self._settings.datastore)

    async def examine(self) -> Sequence[Finding]:
        """Look at all that an instance needs."""
        return await examine(self._server, self._settings)

    # -- how it is done ---------------------------------------------------------------------------------------------

    def _is_ours(self, found: Machine) -> bool:
        return found.deployment == self._deployment

    async def _ours(self, vm: str) -> Machine | None:
        found = await self._machine(vm)
        return found if found is not None and self._is_ours(found) else None

    async def _machine(self, vm: str) -> Machine | None:
        """Return a VM, anybody's; None if there is none."""
        number = id_of(vm)
        if number is None:
            return None
        try:
            return await self._server.read_as(machine, "one.vm.info", number)
        except NoSuchError:
            return None

    async def _with_token(self, token: str) -> Machine | None:
        """Return our VM that bears a token; where there are several, the first one, and end the others."""
        everything = await self._listing.fresh()
        bearers = [found for found in everything if self._is_ours(found) and found.vm.token == token and not found.gone]
        if not bearers:
            return None
        first, *others = sorted(bearers, key=lambda found: found.number)
        for other in others:
            try:
                await self._terminate(other.number)
            except CloudError as exc:  # which would say that nothing is there
                doubled = f"the VM {other.number} doubles the VM {first.number}, and cannot be ended yet"
                raise PeerError(f"{doubled}: {exc.message}") from exc
        return first

    async def _terminate(self, number: int) -> None:
        try:
            await self._server.ask("one.vm.action", "terminate-hard", number)
        except NoSuchError:
            return
        except WrongStateError:
            found = await self._machine(str(number))  # somebody else was faster, or it is being deployed
            if found is not None and not found.gone:
                raise

    async def _instantiate(self, request: VmRequest, size: OpenNebulaSize | None) -> int:
        name = proper_name(request.name)
        template = await self._template(request, size)
        try:
            if self._settings.template is None:
                whole = render({"NAME": name, **template})
                number = await self._server.ask("one.vm.allocate", whole, False)  # noqa: FBT003 - not on hold
            else:
                extra = render(template)
                number = await self._server.ask(
                    "one.template.instantiate",
                    self._settings.template,
                    name,
                    False,  # noqa: FBT003 - not on hold
                    extra,
                    False,  # noqa: FBT003 - no copy of the template
                )
        except NoSuchError as exc:
            raise UnknownImageError(exc.message, value=exc.value) from exc
        if not isinstance(number, int):
            raise PeerError(f"cloud {self._name}: the answer names {number!r} as the VM that was made")
        return number

    async def _template(self, request: VmRequest, size: OpenNebulaSize | None) -> Template:
        """Return what an instance is made of; attributes of the account's template are replaced whole by these."""
        template: dict[str, str | int | Vector | Sequence[Vector]] = {}
        if size is not None:
            template |= {"CPU": f"{size.cpu:g}", "VCPU": size.vcpu, "MEMORY": size.memory_mib}
        if self._settings.image is not None:
            template["DISK"] = {"IMAGE_ID": self._settings.image}
        if self._settings.networks:
            template["NIC"] = await self._nics(request)
        tags = self._tags(request) | {SIZE: _name_of(size)}
        return template | {"CONTEXT": self._context(request), **tags}

    async def _nics(self, request: VmRequest) -> Sequence[Vector]:
        nics: list[dict[str, str | int]] = [{"NETWORK_ID": network} for network in self._settings.networks]
        if self._settings.security_groups:
            group = await group_of(self._server, self._deployment, {*request.ports, *request.inner_ports})
            nics = [nic | {"SECURITY_GROUPS": group} for nic in nics]
        return nics

    def _context(self, request: VmRequest) -> Vector:
        """Return the CONTEXT: in base64, for `$` would be expanded. Its address is among what OpenNebula adds."""
        document = base64.b64encode(request.context("").encode()).decode()
        key = {"SSH_PUBLIC_KEY": self._settings.ssh_key} if self._settings.ssh_key else {}
        return {"NETWORK": "YES", **key, "CONPAAS_CONTEXT_BASE64": document}

    def _tags(self, request: VmRequest) -> dict[str, str]:
        tags = {f"CONPAAS_TAG_{re.sub('[^A-Za-z0-9_]', '_', name).upper()}": tag for name, tag in request.tags.items()}
        return tags | {TOKEN: request.token, DEPLOYMENT: self._deployment}

    def _size(self, name: str) -> OpenNebulaSize | None:
        """Return the size of that name, by default the account's; None if the template says how large VMs are."""
        sizes = {size.name: size for size in self._settings.sizes}
        wanted = name or self._settings.size or next(iter(sizes), "")
        if wanted in sizes:
            return sizes[wanted]
        if not sizes and wanted in {"", TEMPLATE_SIZE}:
            return None
        offered = ", ".join(sizes) or TEMPLATE_SIZE
        raise BadInputError(f"cloud {self._name} has no size {name!r}", value=name, hint=f"choose from {offered}")

    async def _template_size(self) -> Size:
        found = await self._server.read("one.template.info", self._settings.template or 0)
        return Size(
            name=TEMPLATE_SIZE,
            cores=float(text_of(found, "TEMPLATE/CPU") or 1),
            memory=number_of(found, "TEMPLATE/MEMORY") * MIB,
            currency=self._settings.currency,
            default=True,
        )
