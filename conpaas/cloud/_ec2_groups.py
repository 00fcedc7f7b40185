"""Security groups: one per service, with the ports that its roles declare, for as long as it has instances."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from conpaas.cloud._ec2_account import DEPLOYMENT, Fresh, filters
from conpaas.cloud._ec2_client import Answer, Client
from conpaas.core import tasks
from conpaas.core.cloud import CloudContext
from conpaas.core.errors import CloudBusyError, CloudRefusedError, PeerError

log = structlog.get_logger()

THEMSELVES = "themselves"
"""As the source of a rule: instances of the same group."""
EVERYBODY = ("0.0.0.0/0", "::/0")
ENDING_S = (5, 10, 15, *[30] * 20)  # an instance takes up to ten minutes to end, and holds its group till then

Rule = tuple[int, str]
"""A TCP port, and who may reach it: a network, or `THEMSELVES`."""


@dataclass(frozen=True)
class Group:
    """A security group, as Amazon describes it."""

    id: str
    name: str
    rules: frozenset[Rule]


@dataclass(frozen=True)
class Wanted:
    """The group that an instance needs."""

    service: str
    vpc: str
    ports: tuple[int, ...]
    inner_ports: tuple[int, ...]
    inner_networks: tuple[str, ...]

    def rules(self) -> frozenset[Rule]:
        """Return what must be let in."""
        outer = {(port, source) for port in self.ports for source in EVERYBODY}
        inner = {(port, source) for port in self.inner_ports for source in (THEMSELVES, *self.inner_networks)}
        return frozenset(outer | inner)


class Groups:
    """The security groups of a deployment. Others are never touched."""

    def __init__(self, client: Client, context: CloudContext) -> None:
        self._ec2, self._context = client, context
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._in_use: Counter[str] = Counter()
        self._fresh: Fresh[Group] = Fresh(context.clock)
        self._background = tasks.Background()
        self._asked = False

    @asynccontextmanager
    async def at_hand(self, wanted: Wanted) -> AsyncIterator[str]:
        """Give the id of the service's group, with all rules that are wanted, and keep it while it is used."""
        name = self.name(wanted.service)
        self._in_use[name] += 1
        try:
            async with self._locks[name]:
                group = await self._make_sure(name, wanted)
            yield group
        finally:
            self._in_use[name] -= 1
            if not self._in_use[name]:
                del self._in_use[name], self._locks[name]

    def name(self, service: str) -> str:
        """Return the name of a service's group."""
        return f"conpaas-{self._context.deployment}-{service or 'all'}"

    def sweep_soon(self) -> None:
        """Delete, in the background, the groups that no instance needs any more."""
        self._asked = True
        self._background.start(f"security groups of cloud {self._context.name}", self._sweep())

    async def close(self) -> None:
        """Stop sweeping: what is left goes with the next sweep."""
        await self._background.close()

    # Making

    async def _make_sure(self, name: str, wanted: Wanted) -> str:
        group = await self._find(name, wanted.vpc) or await self._make(name, wanted)
        if missing := wanted.rules() - group.rules:
            if not await self._let_in(group, missing):
                for rule in sorted(missing):  # a call with one that is there adds none of the others
                    await self._let_in(group, {rule})
            self._fresh.put(name, Group(group.id, name, group.rules | missing))
        return group.id

    async def _let_in(self, group: Group, rules: Iterable[Rule]) -> bool:
        """Add rules to a group; tell whether that was done, for one of them may have been there."""
        try:
            await self._ec2.call(
                "authorize_security_group_ingress",
                _nothing,
                GroupId=group.id,
                IpPermissions=permissions(rules, group.id),
            )
        except CloudRefusedError as exc:
            if exc.value != "InvalidPermission.Duplicate":
                raise
            return False
        return True

    async def _find(self, name: str, vpc: str) -> Group | None:
        groups = await self._all(**{"group-name": name, "vpc-id": vpc})
        return groups[0] if groups else self._fresh.all().get(name)

    async def _make(self, name: str, wanted: Wanted) -> Group:
        tags = {"Name": name, DEPLOYMENT: self._context.deployment, "conpaas:service": wanted.service}
        try:
            made = await self._ec2.call(
                "create_security_group",
                lambda answer: str(answer["GroupId"]),
                GroupName=name,
                Description=f"ConPaaS service {wanted.service or 'of any kind'}",
                VpcId=wanted.vpc,
                TagSpecifications=[
                    {
                        "ResourceType": "security-group",
                        "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
                    }
                ],
            )
        except CloudRefusedError as exc:
            if exc.value != "InvalidGroup.Duplicate":
                raise
            if found := await self._find(name, wanted.vpc):
                return found
            if await self._is_somebody_elses(name, wanted.vpc):
                raise
            raise CloudBusyError(exc.message, value=exc.value) from exc  # the lists do not know it yet
        group = Group(made, name, frozenset())
        self._fresh.put(name, group)
        return group

    async def _is_somebody_elses(self, name: str, vpc: str) -> bool:
        """Tell whether a group of that name is there without our tag."""
        wanted = filters({"group-name": name, "vpc-id": vpc})
        return bool(await self._ec2.pages("describe_security_groups", _read_groups, Filters=wanted))

    # Deleting

    async def _sweep(self) -> None:
        while self._asked:
            self._asked = False
            for pause_s in ENDING_S:
                try:
                    if not await self._sweep_once():
                        break
                except (CloudBusyError, PeerError) as exc:
                    log.info("sweep-delayed", cloud=self._context.name, error=exc.message)
                await self._context.clock.sleep(pause_s)

    async def _sweep_once(self) -> bool:
        """Delete the groups without instances; tell whether instances that are ending hold more of them."""
        states = ("pending", "running", "stopping", "stopped", "shutting-down")
        held = await self._ec2.pages(
            "describe_instances", _read_members, Filters=self._ours(**{"instance-state-name": states})
        )
        living = {group for group, ending in held if not ending}
        more = False
        for group in await self._all():
            if group.id not in living and group.name not in self._in_use:
                more |= not await self._delete(group)
        return more

    async def _delete(self, group: Group) -> bool:
        """Delete a group; tell whether it is gone."""
        try:
            await self._ec2.call("delete_security_group", _nothing, GroupId=group.id)
        except CloudBusyError as exc:
            if exc.value != "InvalidGroup.NotFound":
                return False
        self._fresh.drop(group.name)
        return True

    async def _all(self, **more: str) -> list[Group]:
        return await self._ec2.pages("describe_security_groups", _read_groups, Filters=self._ours(**more))

    def _ours(self, **more: Any) -> list[dict[str, Any]]:
        return filters({f"tag:{DEPLOYMENT}": self._context.deployment} | more)


def permissions(rules: Iterable[Rule], group: str) -> list[dict[str, Any]]:
    """Return rules as Amazon wants them: one entry per port."""
    by_port: defaultdict[int, list[str]] = defaultdict(list)
    for port, source in sorted(rules):
        by_port[port].append(source)
    return [_permission(port, sources, group) for port, sources in by_port.items()]


def _permission(port: int, sources: list[str], group: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"IpProtocol": "tcp", "FromPort": port, "ToPort": port}
    networks = [source for source in sources if source != THEMSELVES]
    if four := [{"CidrIp": network} for network in networks if ":" not in network]:
        entry["IpRanges"] = four
    if six := [{"CidrIpv6": network} for network in networks if ":" in network]:
        entry["Ipv6Ranges"] = six
    if THEMSELVES in sources:
        entry["UserIdGroupPairs"] = [{"GroupId": group}]
    return entry


def read_rules(group: str, entries: list[Answer]) -> frozenset[Rule]:
    """Return those of a group's rules that can be ours: each for one port."""
    rules: set[Rule] = set()
    for entry in entries:
        port = entry.get("FromPort")
        if entry["IpProtocol"] != "tcp" or port is None or port != entry.get("ToPort"):
            continue
        rules |= {(port, source["CidrIp"]) for source in entry.get("IpRanges", [])}
        rules |= {(port, source["CidrIpv6"]) for source in entry.get("Ipv6Ranges", [])}
        rules |= {(port, THEMSELVES) for pair in entry.get("UserIdGroupPairs", []) if pair.get("GroupId") == group}
    return frozenset(rules)


def _read_groups(answer: Answer) -> list[Group]:
    return [
        Group(item["GroupId"], item["GroupName"], read_rules(item["GroupId"], item.get("IpPermissions", [])))
        for item in answer["SecurityGroups"]
    ]


def _read_members(answer: Answer) -> list[tuple[str, bool]]:
    return [
        (group["GroupId"], instance["State"]["Name"] == "shutting-down")
        for reservation in answer["Reservations"]
        for instance in reservation["Instances"]
        for holder in (instance, *instance.get("NetworkInterfaces", []))
        for group in (*holder.get("SecurityGroups", []), *holder.get("Groups", []))
    ]


def _nothing(_answer: Answer) -> None:
    return None
