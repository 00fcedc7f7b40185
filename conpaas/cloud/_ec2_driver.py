"""The driver of Amazon EC2: instances. Volumes, offers and examination are its other parts."""

from collections.abc import Sequence
from typing import Any

from conpaas.cloud._ec2_account import TOKEN, Fresh, tags_of
from conpaas.cloud._ec2_client import Answer
from conpaas.cloud._ec2_examination import Examination
from conpaas.cloud._ec2_groups import Groups, Wanted
from conpaas.cloud._ec2_launch import parameters
from conpaas.cloud._ec2_volumes import Volumes
from conpaas.cloud.ec2 import Ec2Settings
from conpaas.core.cloud import CloudContext, Vm, VmRequest, VmState
from conpaas.core.errors import CloudError, CloudRefusedError

CONSOLE_CHARACTERS = 16 * 1024  # at most four bytes each

_STATES = {
    "pending": VmState.PENDING,
    "running": VmState.RUNNING,
    "shutting-down": VmState.GONE,
    "terminated": VmState.GONE,  # Amazon shows it for an hour more
    "stopping": VmState.FAILED,
    "stopped": VmState.FAILED,
}
_ADDRESS = {"public": "PublicIpAddress", "private": "PrivateIpAddress", "name": "PublicDnsName"}


class Ec2Cloud(Volumes, Examination):
    """One account at Amazon EC2, in one region, as one deployment sees it."""

    def __init__(self, settings: Ec2Settings, context: CloudContext) -> None:
        super().__init__(settings, context)
        self._fresh: Fresh[Vm] = Fresh(context.clock)
        self._groups = Groups(self._ec2, context)

    async def create(self, request: VmRequest) -> Vm:
        """Look for the request's token; if no instance bears it, ask for one."""
        known = await self._instances(**{f"tag:{TOKEN}": request.token})
        for vm in known:
            if vm.state is not VmState.GONE:
                return vm
        try:
            vm = await self._run(request, len(known))
        except CloudError:
            self._groups.sweep_soon()
            raise
        self._fresh.put(vm.id, vm)
        return vm

    async def describe(self, vm: str) -> Vm:
        """Return the instance as Amazon shows it."""
        found = await self._instances(instance_id=vm)
        if found:
            return found[0]
        return self._fresh.all().get(vm) or Vm(id=vm, token="", state=VmState.GONE)

    async def list(self) -> list[Vm]:
        """Return the deployment's instances."""
        found = {vm.id: vm for vm in await self._instances()}  # with those that have ended: they are not fresh
        every = dict(self._fresh.all()) | found
        return [vm for vm in every.values() if vm.state is not VmState.GONE]

    async def delete(self, vm: str) -> None:
        """Terminate the instance; its security group goes when Amazon has ended it. Volumes that were attached stay."""
        if (await self.describe(vm)).state is not VmState.GONE:
            await self._ec2.call("terminate_instances", lambda answer: answer["TerminatingInstances"], InstanceIds=[vm])
            self._groups.sweep_soon()
        self._fresh.drop(vm)

    async def console(self, vm: str) -> str:
        """Return the end of what the instance has printed: the latest, or for old types what it was some time ago."""
        if not await self._instances(instance_id=vm):
            return ""
        try:
            output = await self._ec2.call("get_console_output", _read_output, InstanceId=vm, Latest=True)
        except CloudRefusedError as exc:
            if exc.value not in ("UnsupportedOperation", "InvalidParameterCombination"):
                raise
            output = await self._ec2.call("get_console_output", _read_output, InstanceId=vm)
        return output[-CONSOLE_CHARACTERS:]

    async def close(self) -> None:
        """Close connections; instances stay."""
        await self._groups.close()
        await self._close_offers()
        await self._ec2.close()

    async def _run(self, request: VmRequest, generation: int) -> Vm:
        subnet, ami = await self._subnet(request.zone), await self._ami()
        wanted = Wanted(
            service=request.tags.get("service", ""),
            vpc=subnet.vpc,
            ports=request.ports,
            inner_ports=request.inner_ports,
            inner_networks=tuple(map(str, self._settings.inner_networks)),
        )
        async with self._groups.at_hand(wanted) as group:
            return await self._ec2.call(
                "run_instances",
                lambda answer: self._read(answer["Instances"][0]),
                **parameters(self._settings, subnet, ami, request.size, [group]),
                UserData=request.context(""),
                ClientToken=self._client_token(request.token, generation),
                TagSpecifications=self._tags(request),
            )

    def _tags(self, request: VmRequest) -> Sequence[dict[str, Any]]:
        """Return the tags that an instance and its parts are made with; only the instance itself bears the token."""
        kinds = ["volume", *(["spot-instances-request"] if self._settings.spot else [])]
        return [
            self._specification("instance", request.name, request.token, request.tags),
            *(self._specification(kind, request.name, "", request.tags) for kind in kinds),
        ]

    async def _instances(self, **more: str | Sequence[str]) -> Sequence[Vm]:
        return await self._ec2.pages(
            "describe_instances",
            lambda answer: [self._read(item) for group in answer["Reservations"] for item in group["Instances"]],
            Filters=self._ours(**more),
        )

    def _read(self, item: Answer) -> Vm:
        state = _STATES[item["State"]["Name"]]
        there = state in (VmState.PENDING, VmState.RUNNING)
        return Vm(
            id=item["InstanceId"],
            token=tags_of(item).get(TOKEN, ""),
            state=state,
            address=item.get(_ADDRESS[self._settings.address]) or None if there else None,
            reason="" if there else _reason(item),
            size=item.get("InstanceType", ""),
            zone=item.get("Placement", {}).get("AvailabilityZone", ""),
        )


def _reason(item: Answer) -> str:
    """Return why an instance does not run, in Amazon's words."""
    told = item.get("StateReason", {}).get("Message") or item.get("StateTransitionReason")
    return told or f"it is {item['State']['Name']}"


def _read_output(answer: Answer) -> str:
    return str(answer.get("Output") or "")
