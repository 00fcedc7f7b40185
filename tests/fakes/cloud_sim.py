"""An account at the simulated cloud."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from conpaas.cloud import sim
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, VmState
from conpaas.core.errors import (
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    NoCapacityError,
    PeerError,
    ThrottledError,
    UnknownImageError,
)
from tests.fakes.clouds import Fault

DEADLINE_S = 0.3

WORDS: Mapping[Fault, str] = MappingProxyType(
    {
        Fault.LOST_ANSWER: "connection reset",
        Fault.GARBAGE: "not of the protocol",
        Fault.UNREACHABLE: "connection refused",
        Fault.THROTTLED: "request limit exceeded",
        Fault.NO_CAPACITY: "no host free",
        Fault.CREDENTIALS: "the token has expired",
        Fault.UNKNOWN_IMAGE: "image is not ready",
        Fault.NO_DISK: "datastore is full",
    }
)
_ERRORS: Mapping[Fault, type[ConpaasError]] = MappingProxyType(
    {
        Fault.GARBAGE: PeerError,
        Fault.UNREACHABLE: PeerError,
        Fault.THROTTLED: ThrottledError,
        Fault.NO_CAPACITY: NoCapacityError,
        Fault.CREDENTIALS: CloudCredentialsError,
        Fault.UNKNOWN_IMAGE: UnknownImageError,
        Fault.NO_DISK: CloudRefusedError,
    }
)
_EVERYWHERE = frozenset(
    {
        Fault.LOST_ANSWER,
        Fault.LATE,
        Fault.HANG,
        Fault.GARBAGE,
        Fault.UNREACHABLE,
        Fault.THROTTLED,
        Fault.CREDENTIALS,
    }
)
_LOOKING: tuple[sim.Verb, ...] = ("describe", "list", "describe_volume", "list_volumes")
FAULTS: Mapping[str, frozenset[Fault]] = MappingProxyType(
    dict.fromkeys(get_args(sim.Verb), _EVERYWHERE)
    | {verb: _EVERYWHERE | {Fault.STALE} for verb in _LOOKING}
    | {
        "create": frozenset(Fault),
        "create_volume": _EVERYWHERE | {Fault.STALE, Fault.NO_DISK},
        "examine": _EVERYWHERE | {Fault.UNKNOWN_IMAGE},
    }
)


class SimHarness:
    """Instances that boot at once and calls that take a moment."""

    quota = 4

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._settings = sim.SimSettings(quota=self.quota, call_s=0.002, lag_s=100)
        self.account = sim.account(self._context("dep-ours"), self._settings)
        self._foreign: set[str] = set()

    def _context(self, deployment: str) -> CloudContext:
        return CloudContext(
            name="sim", deployment=deployment, directory=self._directory, clock=SYSTEM_CLOCK, deadline_s=DEADLINE_S
        )

    def open(self, deployment: str = "dep-ours") -> Cloud:
        return sim.CLOUD.open(self._settings, self._context(deployment))

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        for _ in range(times):
            if fault is Fault.NEVER_BOOTS:
                self.account.boot_times_s.append(None)
            elif fault is Fault.STALE:
                self._hide(verb)
            else:
                self.account.fail(verb, _outcome(fault))  # type: ignore[arg-type]

    def _hide(self, verb: str) -> None:
        if verb in {"create", "create_volume"}:
            self.account.unknown_to.append(set(_LOOKING))
            return
        things = self.account.volumes if "volume" in verb else self.account.vms
        list(things.values())[-1].unknown_to.add(verb)  # type: ignore[attr-defined]

    async def kill(self, vm: str) -> None:
        await self.account.kill(vm)

    async def make_foreign(self) -> str:
        vm = self.account.add_foreign()
        self._foreign.add(vm)
        return vm

    async def lives(self, vm: str) -> bool:
        found = self.account.vms.get(vm)
        return found is not None and self.account.look(found).state is VmState.RUNNING

    async def leftovers(self) -> list[str]:
        return sorted([*self.account.vms.keys() - self._foreign, *self.account.volumes])


def _outcome(fault: Fault) -> sim.Outcome:
    """Return what a call meets on such a day."""
    if fault is Fault.LOST_ANSWER:
        return sim.Lost(PeerError(WORDS[fault]))
    if fault is Fault.LATE:
        return sim.Late(DEADLINE_S)
    if fault is Fault.HANG:
        return sim.Hang()
    return _ERRORS[fault](WORDS[fault])


@asynccontextmanager
async def harness(directory: Path) -> AsyncIterator[SimHarness]:
    yield SimHarness(directory)
