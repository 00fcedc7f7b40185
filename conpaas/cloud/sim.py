"""The simulated cloud: what real ones do on bad days, in memory and in the time of a `Clock`.

An `Account` is the provider's side. It outlives the drivers that speak to it, as a provider does, for as long as this
process; its knobs make calls fail, lose their answers, come late, and instances stay silent, die or belong to others.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Generic, TypeVar

from conpaas.cloud._sim_account import (
    Account,
    Hang,
    Late,
    Lost,
    Outcome,
    SimSettings,
    SimVm,
    SimVolume,
    Verb,
)
from conpaas.core.clock import Clock
from conpaas.core.cloud import (
    Cloud,
    CloudContext,
    CloudType,
    Finding,
    Room,
    Size,
    Vm,
    VmRequest,
    VmState,
    Volume,
    VolumeRequest,
    VolumeState,
)
from conpaas.core.errors import CloudCredentialsError, ConpaasError, DeadlineError, UnknownImageError

__all__ = [
    "CLOUD",
    "Account",
    "Hang",
    "Late",
    "Lost",
    "Outcome",
    "SimCloud",
    "SimSettings",
    "SimVm",
    "SimVolume",
    "Verb",
]

CONSOLE_BYTES = 64 * 1024

Thing = TypeVar("Thing", Vm, Volume)


class _Young(Generic[Thing]):
    """What a driver has made and not seen since, as long as the provider may not know it yet."""

    def __init__(self, clock: Clock, lag_s: float) -> None:
        self._clock, self._lag_s = clock, lag_s
        self._things: dict[str, tuple[float, Thing]] = {}

    def add(self, thing: Thing) -> Thing:
        self._things[thing.id] = (self._clock.monotonic(), thing)
        return thing

    def forget(self, thing: str) -> None:
        self._things.pop(thing, None)

    def find(self, thing: str) -> Thing | None:
        made, found = self._things.get(thing, (0.0, None))
        return found if self._clock.monotonic() - made < self._lag_s else None


class SimCloud:
    """A driver: what one deployment sees of an account."""

    def __init__(self, account: Account, deployment: str, deadline_s: float) -> None:
        self._account, self._deployment, self._deadline_s = account, deployment, deadline_s
        self._young_vms = _Young[Vm](account.clock, account.settings.lag_s)
        self._young_volumes = _Young[Volume](account.clock, account.settings.lag_s)

    # -- instances --------------------------------------------------------------------------------------------------

    async def create(self, request: VmRequest) -> Vm:
        """Make an instance."""
        async with self._call("create"):
            vm = self._account.look(self._account.make(request, self._deployment))
        return self._young_vms.add(vm)

    async def describe(self, vm: str) -> Vm:
        """Return an instance; one of another deployment is none."""
        async with self._call("describe"):
            found = self._account.find(vm, self._deployment, "describe")
            seen = None if found is None else self._account.look(found)
        if seen is None:
            return self._young_vms.find(vm) or Vm(id=vm, token="", state=VmState.GONE)
        self._young_vms.forget(vm)
        return seen

    async def list(self) -> list[Vm]:
        """Return the deployment's instances that are old enough to be listed."""
        async with self._call("list"):
            return [self._account.look(vm) for vm in self._account.all(self._deployment)]

    async def delete(self, vm: str) -> None:
        """End an instance."""
        async with self._call("delete"):
            self._young_vms.forget(vm)
            await self._account.end(vm, self._deployment)

    async def close(self) -> None:
        """Nothing is held."""

    async def console(self, vm: str) -> str:
        """Return the end of what the instance has printed."""
        async with self._call("console"):
            found = self._account.find(vm, self._deployment, "console")
        return "" if found is None else found.printed.encode()[-CONSOLE_BYTES:].decode(errors="ignore")

    # -- volumes ----------------------------------------------------------------------------------------------------

    async def create_volume(self, request: VolumeRequest) -> Volume:
        """Make a volume."""
        async with self._call("create_volume"):
            volume = self._account.look_volume(self._account.make_volume(request, self._deployment))
        return self._young_volumes.add(volume)

    async def describe_volume(self, volume: str) -> Volume:
        """Return a volume; one of another deployment is none."""
        async with self._call("describe_volume"):
            found = self._account.find_volume(volume, self._deployment, "describe_volume")
            seen = None if found is None else self._account.look_volume(found)
        if seen is None:
            return self._young_volumes.find(volume) or Volume(id=volume, token="", state=VolumeState.GONE)
        self._young_volumes.forget(volume)
        return seen

    async def list_volumes(self) -> Sequence[Volume]:
        """Return the deployment's volumes."""
        async with self._call("list_volumes"):
            return [self._account.look_volume(volume) for volume in self._account.all_volumes(self._deployment)]

    async def attach(self, volume: str, vm: str) -> Volume:
        """Attach a volume to an instance in its zone."""
        async with self._call("attach"):
            return self._account.look_volume(self._account.attach(volume, vm, self._deployment))

    async def detach(self, volume: str) -> Volume:
        """Detach a volume."""
        async with self._call("detach"):
            found = self._account.detach(volume, self._deployment)
            seen = None if found is None else self._account.look_volume(found)
        return seen or Volume(id=volume, token="", state=VolumeState.GONE)

    async def delete_volume(self, volume: str) -> None:
        """Delete a volume."""
        async with self._call("delete_volume"):
            self._account.end_volume(volume, self._deployment)
            self._young_volumes.forget(volume)

    # -- the account ------------------------------------------------------------------------------------------------

    async def sizes(self) -> Sequence[Size]:
        """Return the sizes that the provider rents out."""
        async with self._call("sizes"):
            return self._account.sizes

    async def zones(self) -> Sequence[str]:
        """Return the provider's zones."""
        async with self._call("zones"):
            return self._account.zones

    async def quota(self) -> Sequence[Room]:
        """Return how much of the account is in use, by whomever."""
        async with self._call("quota"):
            return self._account.rooms()

    async def examine(self) -> Sequence[Finding]:
        """Look at endpoint, credentials and image, in this order."""
        findings = [Finding(name=name, ok=True) for name in ("the endpoint", "the credentials", "the image")]
        try:
            async with self._call("examine"):
                return findings
        except ConpaasError as exc:
            wrong = 1 if isinstance(exc, CloudCredentialsError) else 2 if isinstance(exc, UnknownImageError) else 0
            return [*findings[:wrong], replace(findings[wrong], ok=False, detail=exc.message, hint=exc.hint)]

    # -- calls ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _call(self, verb: Verb) -> AsyncIterator[None]:
        """Spend a call's time around what it does at the provider, and meet the outcome that the account has for it."""
        outcome, half_s = self._account.begin(verb), self._account.settings.call_s / 2
        left_s = await self._pass(inf if isinstance(outcome, Hang) else half_s, self._deadline_s)
        if isinstance(outcome, ConpaasError):
            raise outcome
        yield
        await self._pass(half_s + outcome.seconds if isinstance(outcome, Late) else half_s, left_s)
        if isinstance(outcome, Lost):
            raise outcome.error

    async def _pass(self, seconds: float, left_s: float) -> float:
        """Let time pass, but not more than is left; return what is left then."""
        if seconds:
            await self._account.clock.sleep(min(seconds, left_s))
        if seconds > left_s:
            raise DeadlineError(f"the simulated cloud did not answer within {self._deadline_s:g} s")
        return left_s - seconds


_accounts: dict[Path, Account] = {}


def account(context: CloudContext, settings: SimSettings | None = None) -> Account:
    """Return the account of the context's directory; it is made, with `settings`, when it is first asked for."""
    if context.directory not in _accounts:
        _accounts[context.directory] = Account(settings or SimSettings(), context.clock)
    return _accounts[context.directory]


def driver(settings: SimSettings, context: CloudContext) -> Cloud:
    """Make the driver of a deployment on the account of its context's directory."""
    return SimCloud(account(context, settings), context.deployment, context.deadline_s)


CLOUD = CloudType(
    name="sim",
    title="Simulated cloud",
    settings=SimSettings,
    driver="conpaas.cloud.sim:driver",
    description="In memory, for tests: nothing runs anywhere.",
)
