"""Instances, and what there is, of an account that apache-libcloud speaks to."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any

from libcloud.compute.base import Node
from libcloud.compute.types import NodeState

from conpaas.cloud._libcloud_errors import is_gone, readable
from conpaas.cloud._libcloud_ports import needed
from conpaas.cloud._libcloud_provider import MIB, Provider
from conpaas.cloud._libcloud_threads import Call, Threads
from conpaas.cloud.libcloud import LibcloudSettings
from conpaas.core.cloud import (
    CloudContext,
    Finding,
    Image,
    Size,
    Vm,
    VmRequest,
    VmState,
)
from conpaas.core.errors import (
    BadInputError,
    CloudBusyError,
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    PeerError,
)

CATALOGUE_S = 600.0
"""How long sizes and zones are remembered."""
GRACE_S = 60.0
"""How long the provider's lists may lag behind what it has confirmed."""
_REST = "networks, security groups and key"
_FIRST = ("the login", _REST)
"""What is tried after one of these says nothing if it fails."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")

_STATES: Mapping[Any, VmState] = MappingProxyType(
    {
        NodeState.PENDING: VmState.PENDING,
        NodeState.STARTING: VmState.PENDING,
        NodeState.UNKNOWN: VmState.PENDING,
        NodeState.STOPPING: VmState.FAILED,
        NodeState.STOPPED: VmState.FAILED,
        NodeState.SUSPENDED: VmState.FAILED,
        NodeState.PAUSED: VmState.FAILED,
        NodeState.ERROR: VmState.FAILED,
        NodeState.TERMINATED: VmState.GONE,
    }
)
"""All others run: rebooting, migrating, …"""


class Lately:
    """What the provider has confirmed a moment ago, and its lists and descriptions may not know yet."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[str, float]] = {}
        self._seen: set[str] = set()
        self._ended: dict[str, float] = {}

    def make(self, thing: str, token: str) -> None:
        """Remember a new one."""
        now = time.monotonic()
        self._made = {other: made for other, made in list(self._made.items()) if made[1] > now}
        self._made[thing] = (token, now + GRACE_S)
        self._seen &= self._made.keys()

    def see(self, thing: str) -> None:
        """It is described: when it is not any more, it is gone."""
        if thing in self._made:
            self._seen.add(thing)

    def end(self, thing: str) -> None:
        """It was deleted."""
        now = time.monotonic()
        self._made.pop(thing, None)
        self._ended = {other: until for other, until in list(self._ended.items()) if until > now}
        self._ended[thing] = now + GRACE_S

    def made(self, token: str) -> str | None:
        """Return the id of what was made for a token."""
        now = time.monotonic()
        made = list(self._made.items())
        return next((thing for thing, (owner, until) in made if owner == token and now < until), None)

    def unseen(self, thing: str) -> str:
        """Return the token of what was made, and has not been described yet; empty if that is not so."""
        token, until = self._made.get(thing, ("", 0.0))
        return token if thing not in self._seen and time.monotonic() < until else ""

    def ended(self, thing: str) -> bool:
        """Tell whether it was deleted, whatever the provider still says of it."""
        return time.monotonic() < self._ended.get(thing, 0.0)


class LibcloudCloud:
    """An account at a provider. Nothing is known of it but what it says, and what it has confirmed a moment ago."""

    def __init__(self, settings: LibcloudSettings, context: CloudContext, provider: Provider) -> None:
        self._settings, self._name = settings, context.name
        self._key = f"{context.directory}:{context.deployment}"
        self._provider = provider
        self._threads = Threads(
            provider.open,
            name=context.name,
            count=settings.threads,
            deadline_s=context.deadline_s,
            renews=provider.renews,
            ca_file=settings.ca_file,
        )
        self._vms = Lately()
        self._sizes: tuple[float, Sequence[Any]] = (0.0, ())
        self._zones: tuple[float, Sequence[str]] = (0.0, ())

    # Instances

    async def create(self, request: VmRequest) -> Vm:
        """Make an instance, unless the token has one.

        Calls of one process with one token follow each other; two directors with one deployment must not be.
        """
        problem = self._provider.problem()
        if problem:
            raise CloudRefusedError(f"cloud {self._name}: {problem}", hint="an administrator: 'conpaas cloud edit'")
        return await self._threads.run(
            lambda driver, call: self._create(driver, call, request), alone=f"{self._key}:{request.token}"
        )

    async def describe(self, vm: str) -> Vm:
        """Return the instance."""
        return await self._threads.run(lambda driver, _call: self._describe(driver, vm))

    async def list(self) -> list[Vm]:
        """Return all that bear our marks."""
        return [*await self._threads.run(lambda driver, _call: self._ours(driver))]

    async def delete(self, vm: str) -> None:
        """End the instance. The provider detaches its volumes, which it keeps."""
        await self._threads.run(lambda driver, _call: self._delete(driver, vm))

    async def close(self) -> None:
        """Wait for calls under way, for as long as one may take, and close connections."""
        await self._threads.close()

    def _create(self, driver: Any, call: Call, request: VmRequest) -> Vm:
        found = self._find(driver, request.token)
        if found is not None:
            return found
        size, zone = self._size(driver, request.size), self._zone(driver, request.zone)
        call.forget()
        try:
            node = self._provider.create(driver, request, size, zone)
        except Exception as exc:
            made = self._provider.made(call)
            if made is None:
                raise
            if not made:
                words = readable(call.words) or type(exc).__name__
                raise PeerError(f"cloud {self._name}: the instance may have been made, but: {words}") from exc
            vm = Vm(id=made, token=request.token, state=VmState.PENDING)
        else:
            vm = replace(self._vm(node, request.token), token=request.token)
        self._vms.make(vm.id, request.token)
        return replace(vm, size=vm.size or self._provider.size_name(size))

    def _find(self, driver: Any, token: str) -> Vm | None:
        nodes = self._provider.nodes(driver, token)
        found = [vm for vm in self._look(nodes) if vm.token == token]
        if found:
            return min(found, key=lambda vm: vm.id)
        made = self._vms.made(token)
        vm = self._describe(driver, made) if made is not None else None
        return None if vm is None or vm.state is VmState.GONE else vm

    def _ours(self, driver: Any) -> Sequence[Vm]:
        return self._look(self._provider.nodes(driver))

    def _look(self, nodes: Iterable[Any]) -> Sequence[Vm]:
        """Return those nodes that are ours and not gone."""
        found = [self._vm(node, token) for node in nodes if (token := self._provider.token(node))]
        return [vm for vm in found if vm.state is not VmState.GONE]

    def _describe(self, driver: Any, vm: str) -> Vm:
        node = self._node(driver, vm)
        token = self._provider.token(node) if node is not None else ""
        if token:
            self._vms.see(vm)
            return self._vm(node, token)
        made = self._vms.unseen(vm) if node is None else ""
        return Vm(id=vm, token=made, state=VmState.PENDING if made else VmState.GONE)

    def _delete(self, driver: Any, vm: str) -> None:
        node = self._node(driver, vm)
        lagging = node is None and bool(self._vms.unseen(vm))
        if lagging:
            node = Node(id=vm, name="", state=NodeState.UNKNOWN, public_ips=[], private_ips=[], driver=driver)
        elif node is None or not self._provider.token(node) or self._vm(node, "").state is VmState.GONE:
            return
        promised = True
        try:
            promised = driver.destroy_node(node) is not False
        except Exception as exc:
            if not is_gone(exc):
                raise
            if lagging and self._vms.unseen(vm):
                raise CloudBusyError(f"cloud {self._name}: it does not know instance {vm} yet", value=vm) from exc
        if not promised:
            raise PeerError(f"cloud {self._name}: it does not say that instance {vm} is being deleted", value=vm)
        self._vms.end(vm)

    def _node(self, driver: Any, vm: str) -> Any:
        return self._provider.node(driver, vm) if ID.fullmatch(vm) else None

    def _vm(self, node: Any, token: str) -> Vm:
        vm = str(node.id)
        known = _STATES.get(self._provider.state(node), VmState.RUNNING)
        state = VmState.GONE if self._vms.ended(vm) else known
        return Vm(
            id=vm,
            token=token,
            state=state,
            address=self._address(node),
            reason=self._provider.reason(node) if state is VmState.FAILED else "",
            size=self._provider.size_of(node, {str(size.id): size.name for size in self._sizes[1]}),
            zone=self._provider.zone_of(node),
        )

    def _address(self, node: Any) -> str | None:
        """Return the address that the settings want, of the older kind where there is one."""
        wanted = {
            "auto": [*node.public_ips, *node.private_ips],
            "public": node.public_ips,
            "private": node.private_ips,
        }[self._settings.address]
        addresses = [str(address) for address in wanted if address]
        return min(addresses, key=lambda address: ip_address(address).version, default=None)

    # What there is

    async def sizes(self) -> Sequence[Size]:
        """Return all sizes; libcloud knows no price of many."""
        found = await self._threads.run(lambda driver, _call: self._list_sizes(driver))
        default = self._settings.size or (self._provider.size_name(found[0]) if found else "")
        return [
            Size(
                name=self._provider.size_name(size),
                cores=self._provider.cores(size),
                memory=int(size.ram or 0) * MIB,
                disk=self._provider.disk(size),
                price=self._provider.price(size),
                default=default in {self._provider.size_name(size), str(size.id)},
            )
            for size in found
        ]

    async def images(self) -> Sequence[Image]:
        """Return the account's own images."""
        found = await self._threads.run(lambda driver, _call: self._provider.images(driver))
        return sorted((Image(id=str(image.id), name=str(image.name)) for image in found), key=lambda image: image.name)

    async def zones(self) -> Sequence[str]:
        """Return the ids of the provider's places."""
        return await self._threads.run(lambda driver, _call: self._list_zones(driver))

    def _list_sizes(self, driver: Any) -> Sequence[Any]:
        """Return libcloud's sizes, the cheapest first and those without a price last."""

        def cost(size: Any) -> tuple[bool, Decimal, float]:
            price = self._provider.price(size)
            return price is None, price or Decimal(0), float(size.ram or 0)

        sizes = sorted(driver.list_sizes(), key=cost)
        self._sizes = (time.monotonic() + CATALOGUE_S, sizes)
        return sizes

    def _list_zones(self, driver: Any) -> Sequence[str]:
        zones = sorted(set(self._provider.zones(driver)))
        self._zones = (time.monotonic() + CATALOGUE_S, zones)
        return zones

    def _size(self, driver: Any, name: str) -> Any:
        """Return libcloud's size of a name, or the default one."""
        until, sizes = self._sizes
        if time.monotonic() >= until:
            sizes = self._list_sizes(driver)
        wanted = name or self._settings.size
        found = [size for size in sizes if not wanted or wanted in {self._provider.size_name(size), str(size.id)}]
        if not found:
            names = ", ".join(self._provider.size_name(size) for size in sizes[:20])
            raise BadInputError(
                f"cloud {self._name} has no size '{wanted}'", value=wanted, hint=f"there are: {names or 'none'}"
            )
        return found[0]

    def _zone(self, driver: Any, name: str) -> str:
        """Return the zone to make something in; empty: anywhere."""
        if not name:
            return self._settings.zone
        until, zones = self._zones
        if time.monotonic() >= until:
            zones = self._list_zones(driver)
        if name not in zones:
            raise BadInputError(
                f"cloud {self._name} has no zone '{name}'", value=name, hint=f"there are: {', '.join(zones)}"
            )
        return name

    # Trying it

    async def examine(self) -> Sequence[Finding]:
        """Look at the settings, the login, the size, the zone, the image, and the rest that they name."""
        problem = self._provider.problem()
        if problem:
            return [Finding(name="the settings", ok=False, detail=problem, hint="correct them")]
        findings: list[Finding] = []
        checks: Sequence[tuple[str, Callable[[Any], str]]] = (
            ("the login", self._check_login),
            ("the size", self._check_size),
            ("the zone", self._check_zone),
            ("the image", self._check_image),
            (_REST, self._check_rest),
            ("the ports", self._check_ports),
        )
        for name, check in checks:
            finding = await self._finding(name, check)
            findings.append(finding)
            if not finding.ok and name in _FIRST:
                break
        return findings

    async def _finding(self, name: str, check: Callable[[Any], str]) -> Finding:
        try:
            detail = await self._threads.run(lambda driver, _call: check(driver))
        except PeerError as exc:
            return Finding(name="the provider's address", ok=False, detail=exc.message, hint="check url and region")
        except CloudCredentialsError as exc:
            return Finding(name="the credentials", ok=False, detail=exc.message, hint="check key, secret and project")
        except ConpaasError as exc:
            return Finding(name=name, ok=False, detail=exc.message, hint=exc.hint or "check the settings")
        return Finding(name=name, ok=True, detail=detail)

    def _check_login(self, driver: Any) -> str:
        count = len(self._ours(driver))
        return f"accepted; {count} instances of this deployment are there"

    def _check_size(self, driver: Any) -> str:
        self._sizes = (0.0, ())
        return self._provider.size_name(self._size(driver, ""))

    def _check_zone(self, driver: Any) -> str:
        self._zones = (0.0, ())
        return self._zone(driver, self._settings.zone) or "any"

    def _check_image(self, driver: Any) -> str:
        if not self._provider.has_image(driver):
            raise CloudRefusedError(
                f"there is no image '{self._settings.image}' that can be used",
                hint="name one that is there: see the list of the account's images",
            )
        return self._settings.image

    def _check_rest(self, driver: Any) -> str:
        missing = self._provider.missing(driver)
        if missing:
            raise CloudRefusedError(f"there is no {', no '.join(missing)}", hint="correct the settings")
        return ""

    def _check_ports(self, driver: Any) -> str:
        ports, ways = needed(), self._provider.ways(driver)
        if ways is None:
            return f"not looked at, and none is opened for you: let in {ports}"
        shut = ports.shut(ways)
        if shut.outer or shut.inner:
            raise CloudRefusedError(
                f"no rule lets in {', '.join(map(str, (*shut.outer, *shut.inner)))}",
                hint=f"have the 'security_groups' let in {ports}",
            )
        return f"let in: {ports}"
