"""Trying an account without making anything."""

from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from typing import Any

from conpaas.cloud._ec2_account import DEPLOYMENT, filters
from conpaas.cloud._ec2_client import Answer
from conpaas.cloud._ec2_launch import parameters
from conpaas.cloud._ec2_offers import Offers
from conpaas.core.cloud import Finding
from conpaas.core.errors import BadInputError, CloudCredentialsError, CloudRefusedError, ConpaasError, PeerError

NOT_ALLOWED = ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException")
"""Codes that say: the credentials are right, but not for this."""

Look = Callable[[], Awaitable[str]]

_POLICY = "give the account the permissions that are listed in the documentation of this cloud"


class Examination(Offers):
    """Looks at all that making an instance needs."""

    async def examine(self) -> Sequence[Finding]:
        """Return what was found, in the order in which an administrator would look."""
        self._look_anew()
        zones, findings = await self._reach()
        if not all(finding.ok for finding in findings):
            return findings
        findings.append(self._zone_finding(zones))
        looks: list[tuple[str, Look, str]] = [
            ("the image", self._try_image, "'image' is an AMI of this region: 'conpaas cloud edit'"),
            ("the subnets", self._try_subnets, "'subnets' are of this region and of one VPC: 'conpaas cloud edit'"),
            ("the size", self._try_size, "choose another 'size' or 'image': 'conpaas cloud edit'"),
            ("the key pair", self._try_key_pair, "'key_pair' is the name of one in this region, or empty"),
            ("the network", self._try_network, _NETWORK_HINTS[self._settings.address]),
        ]
        for look in looks:
            findings.append(await _find(*look))
        if all(finding.ok for finding in findings):
            findings.extend([await _find(*look) for look in self._permissions()])
        findings.append(await self._quota_finding())
        return findings

    async def _reach(self) -> tuple[list[str], list[Finding]]:
        """Return the zones, and what came of asking for them."""
        where = self._settings.endpoint or f"Amazon EC2 in {self._settings.region}"
        try:
            zones = await self._ec2.call(
                "describe_availability_zones",
                lambda answer: [
                    zone["ZoneName"] for zone in answer["AvailabilityZones"] if zone["State"] == "available"
                ],
            )
        except CloudCredentialsError as exc:
            known = exc.value in NOT_ALLOWED
            name, hint = ("the permissions", _POLICY) if known else ("the credentials", exc.hint)
            return [], [
                Finding(name="the endpoint", ok=True, detail=where),
                *([Finding(name="the credentials", ok=True)] if known else []),
                Finding(name=name, ok=False, detail=exc.message, hint=hint),
            ]
        except ConpaasError as exc:
            hint = "check 'region' and 'endpoint', and that this computer can reach it"
            return [], [Finding(name="the endpoint", ok=False, detail=exc.message, hint=hint)]
        return zones, [
            Finding(name="the endpoint", ok=True, detail=where),
            Finding(name="the credentials", ok=True, detail=self._settings.access_key or "this computer's own"),
        ]

    def _zone_finding(self, zones: list[str]) -> Finding:
        there = self._settings.zone in ("", *zones)
        return Finding(
            name="the zone",
            ok=there,
            detail=f"{self._settings.region} has {', '.join(zones)}",
            hint="" if there else f"'zone' is {self._settings.zone!r}: name one of these, or none",
        )

    async def _try_image(self) -> str:
        ami = await self._ami()
        return f"{ami.id}: {ami.architecture}, {ami.disk_gib} GiB"

    async def _try_size(self) -> str:
        """Look at the size, and at what it must fit as far as that was found to be there."""
        name, ami = self._settings.size, self._ami_known
        zones = [subnet.zone for subnet in self._subnets_known if self._settings.zone in ("", subnet.zone)]
        kinds = await self._ec2.pages(
            "describe_instance_types", _read_architectures, Filters=filters({"instance-type": name})
        )
        if not kinds:
            raise BadInputError(f"there is no instance type {name!r} in {self._settings.region}", value=name)
        if ami is not None and ami.architecture and ami.architecture not in kinds[0]:
            raise BadInputError(f"{name} is {' or '.join(kinds[0])}, the image is {ami.architecture}", value=name)
        if zones and zones[0] not in await self._zones_with(name):
            raise BadInputError(f"there is no {name} in zone {zones[0]}", value=zones[0])
        return f"{name}: {' or '.join(kinds[0])}"

    async def _zones_with(self, size: str) -> list[str]:
        return await self._ec2.pages(
            "describe_instance_type_offerings",
            lambda answer: [item["Location"] for item in answer["InstanceTypeOfferings"]],
            LocationType="availability-zone",
            Filters=filters({"instance-type": size}),
        )

    async def _try_subnets(self) -> str:
        subnets = await self._subnets()
        vpcs = sorted({subnet.vpc for subnet in subnets})
        if len(vpcs) > 1:
            raise BadInputError(f"the subnets are of several VPCs: {', '.join(vpcs)}")
        first = await self._subnet("")
        if not first.free:
            raise CloudRefusedError(f"{first.id} in {first.zone} has no free address", value=first.id)
        return ", ".join(f"{subnet.id} in {subnet.zone} with {subnet.free} free addresses" for subnet in subnets)

    async def _try_key_pair(self) -> str:
        if not self._settings.key_pair:
            return "none: nobody can log in"
        return await self._ec2.call(
            "describe_key_pairs",
            lambda answer: str(answer["KeyPairs"][0]["KeyName"]),
            KeyNames=[self._settings.key_pair],
        )

    async def _try_network(self) -> str:
        networks = self._settings.inner_networks
        named = ", ".join(map(str, networks))
        if self._settings.address == "public":
            if all(network.num_addresses == 1 for network in networks):
                who = f"only {named} is" if named else "nobody is"
                raise BadInputError(f"instances meet at their public addresses, where {who} let in, none of them")
            await self._try_addresses()
            return f"inner ports are open to {named}: the instances' own public addresses must be among these"
        names = await self._try_names() if self._settings.address == "name" else ""
        return f"inner ports are open to instances of the same service{named and f' and to {named}'}{names}"

    async def _try_addresses(self) -> None:
        """Raise BadInputError if an instance that is there is not let in by the others."""
        addresses = await self._ec2.pages("describe_instances", _read_addresses, Filters=self._ours())
        out = [
            address
            for address in addresses
            if not any(ip_address(address) in network for network in self._settings.inner_networks)
        ]
        if out:
            raise BadInputError(
                f"{len(out)} of {len(addresses)} instances are not let in by the others: {out[0]}"
                " is not in 'inner_networks'",
                value=out[0],
            )

    async def _try_names(self) -> str:
        """Raise BadInputError if instances get no names; return what to say if that cannot be known."""
        if not self._subnets_known:
            return ""
        vpc = self._subnets_known[0].vpc
        try:
            named = await self._ec2.call(
                "describe_vpc_attribute",
                lambda answer: bool(answer["EnableDnsHostnames"]["Value"]),
                VpcId=vpc,
                Attribute="enableDnsHostnames",
            )
        except CloudRefusedError as exc:
            return f"; whether they get names is unknown: {exc.message}"
        if not named:
            raise BadInputError(f"'DNS hostnames' are off in {vpc}: its instances get no public name", value=vpc)
        return ""

    def _permissions(self) -> list[tuple[str, Look, str]]:
        """Return attempts at what changes something, none of which Amazon carries out."""
        return [
            ("permission to make security groups", self._try_to_make_group, _POLICY),
            ("permission to make instances", self._try_to_run, _POLICY),
            ("permission to make volumes", self._try_to_make_volume, _POLICY),
        ]

    async def _try_to_run(self) -> str:
        subnet, ami = await self._subnet(""), await self._ami()
        return await self._dry(
            "run_instances",
            **parameters(self._settings, subnet, ami, "", []),
            TagSpecifications=[self._specification("instance", "conpaas", "examination", {})],
        )

    async def _try_to_make_group(self) -> str:
        subnet = await self._subnet("")
        return await self._dry(
            "create_security_group",
            GroupName=f"conpaas-{self._context.deployment}-examination",
            Description="ConPaaS",
            VpcId=subnet.vpc,
            TagSpecifications=[
                {"ResourceType": "security-group", "Tags": [{"Key": DEPLOYMENT, "Value": self._context.deployment}]}
            ],
        )

    async def _try_to_make_volume(self) -> str:
        subnet = await self._subnet("")
        return await self._dry(
            "create_volume",
            AvailabilityZone=subnet.zone,
            Size=1,
            VolumeType="gp3",
            Encrypted=self._settings.encrypted,
            TagSpecifications=[self._specification("volume", "conpaas", "examination", {})],
        )

    async def _dry(self, operation: str, **wanted: Any) -> str:
        """Make a call that Amazon only checks; it says by an error that it would have succeeded."""
        try:
            await self._ec2.call(operation, dict, DryRun=True, **wanted)
        except CloudRefusedError as exc:
            if exc.value == "DryRunOperation":
                return ""
            raise
        raise PeerError(f"cloud {self._context.name}: {operation}: the cloud does not know dry runs")

    async def _quota_finding(self) -> Finding:
        """Say how much room there is. Not to know it is no hindrance."""
        try:
            rooms = await self.quota()
        except ConpaasError as exc:
            return Finding(name="the quota", ok=True, detail=f"unknown: {exc.message}")
        full = any(room.used >= room.limit for room in rooms)
        return Finding(
            name="the quota",
            ok=not full,
            detail=", ".join(f"{room.used:g} of {room.limit:g} {room.name} in use" for room in rooms),
            hint="ask Amazon for more: https://console.aws.amazon.com/servicequotas" if full else "",
        )


_NETWORK_HINTS = {
    "public": "set 'address' to 'name', or to 'private' if the director is in the same network;"
    " else 'inner_networks' must hold the instances' own public addresses: 'conpaas cloud edit'",
    "name": "switch 'DNS hostnames' on there, or set 'address' to 'private' if the director is in the same network",
    "private": "",
}


async def _find(name: str, look: Look, hint: str) -> Finding:
    try:
        return Finding(name=name, ok=True, detail=await look())
    except ConpaasError as exc:
        return Finding(name=name, ok=False, detail=exc.message, hint=exc.hint or hint)


def _read_addresses(answer: Answer) -> list[str]:
    return [
        str(ip_address(instance["PublicIpAddress"]))
        for reservation in answer["Reservations"]
        for instance in reservation["Instances"]
        if instance.get("PublicIpAddress")
    ]


def _read_architectures(answer: Answer) -> list[list[str]]:
    return [item.get("ProcessorInfo", {}).get("SupportedArchitectures", []) for item in answer["InstanceTypes"]]
