"""What the contract suites of clouds share: which driver can meet which trouble, and how one waits for a cloud."""

import functools
import importlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import pytest

from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import PACKAGE, Cloud, CloudType, Vm, VmState
from conpaas.core.errors import (
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    DeadlineError,
    DiskFullError,
    NoCapacityError,
    PeerError,
    ThrottledError,
    UnknownImageError,
)
from conpaas.core.plugins import discover
from conpaas.core.tasks import wait_for
from tests.fakes.clouds import Fault, Harness, request

T = TypeVar("T")

DRIVERS = sorted(discover(PACKAGE, "CLOUD", CloudType))

INSTANCE_VERBS = ("create", "describe", "list", "delete")
VOLUME_VERBS = ("create_volume", "describe_volume", "list_volumes", "attach", "detach", "delete_volume")
LOOKING_VERBS = ("console", "sizes", "images", "zones", "quota", "examine")
VERBS = (*INSTANCE_VERBS, *VOLUME_VERBS, *LOOKING_VERBS)

ERRORS: Mapping[Fault, type[ConpaasError] | tuple[type[ConpaasError], ...]] = MappingProxyType(
    {
        Fault.LOST_ANSWER: PeerError,
        Fault.LATE: DeadlineError,
        Fault.HANG: DeadlineError,
        Fault.GARBAGE: PeerError,
        Fault.UNREACHABLE: PeerError,
        Fault.THROTTLED: ThrottledError,
        Fault.NO_CAPACITY: NoCapacityError,
        Fault.CREDENTIALS: CloudCredentialsError,
        Fault.UNKNOWN_IMAGE: UnknownImageError,
        Fault.NO_DISK: (DiskFullError, CloudRefusedError),
    }
)
"""What a driver raises when it meets a fault; the faults that are not here are no errors."""
EFFECTIVE = frozenset({Fault.LOST_ANSWER, Fault.LATE})
"""The call was obeyed, though it seems to have failed."""
FAILURES = frozenset(ERRORS)
PATIENCE_S = 40.0
"""How long a call may take to fail: a harness' deadline is a few seconds, but the computer may be busy."""


@functools.cache
def fake(driver: str) -> ModuleType | str:
    """Return the module that plays a driver's provider, or why there is none."""
    name = f"tests.fakes.cloud_{driver}"
    try:
        module = importlib.import_module(name)
    except Exception as exc:  # noqa: BLE001 - one broken fake must not hide the tests of the other drivers
        return f"the cloud {driver} needs tests/fakes/cloud_{driver}.py (see tests/fakes/clouds.py): {exc!r}"
    for constant in ("harness", "FAULTS"):
        if not hasattr(module, constant):
            return f"tests/fakes/cloud_{driver}.py exports no {constant}: see tests/fakes/clouds.py"
    unknown = sorted(set(module.FAULTS) - set(VERBS))
    return f"{unknown} in FAULTS of tests/fakes/cloud_{driver}.py: there are {', '.join(VERBS)}" if unknown else module


def fake_of(driver: str) -> ModuleType:
    """Return the module that plays a driver's provider; the test fails if there is none."""
    module = fake(driver)
    if isinstance(module, str):
        pytest.fail(module)
    return module


@dataclass(frozen=True)
class Trouble:
    """A fault that the next call of a verb meets."""

    driver: str
    verb: str
    fault: Fault

    @property
    def effective(self) -> bool:
        return self.fault in EFFECTIVE

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Expect the error that stands for the fault: with the provider's words, and without its account's secrets."""
        with pytest.raises(ERRORS[self.fault]) as caught:
            yield
        self.check_words(caught.value)

    def check_words(self, error: ConpaasError) -> None:
        module = fake_of(self.driver)
        assert error.message
        words = getattr(module, "WORDS", {}).get(self.fault)
        assert words is None or words in error.message
        for secret in getattr(module, "SECRETS", ()):
            assert secret not in f"{error.message} {error.hint} {error.value}"
        if isinstance(error, ThrottledError):
            assert error.retry_after_s is None or error.retry_after_s > 0


def troubles(verbs: Collection[str], faults: Collection[Fault]) -> pytest.MarkDecorator:
    """Parametrize a test of `driver` and `trouble` with all that the drivers say can happen of these."""
    found = [
        pytest.param(driver, Trouble(driver, verb, fault), id=f"{driver}-{verb}-{fault.name.lower()}")
        for driver in DRIVERS
        if isinstance(module := fake(driver), ModuleType)
        for verb in verbs
        for fault in sorted(module.FAULTS.get(verb, ()))
        if fault in faults
    ]
    return pytest.mark.parametrize(("driver", "trouble"), found, indirect=["driver"])


# -- waiting --------------------------------------------------------------------------------------------------------


async def eventually(look: Callable[[], Awaitable[T]], fits: Callable[[T], object], what: str) -> T:
    """Look until what is seen fits; return it."""

    async def check() -> T | None:
        seen = await look()
        return seen if fits(seen) else None

    return await wait_for(check, timeout_s=40, what=what, clock=SYSTEM_CLOCK)


async def running(cloud: Cloud, vm: Vm) -> Vm:
    """Wait until an instance runs and has an address."""
    return await eventually(
        lambda: cloud.describe(vm.id), lambda seen: seen.state is VmState.RUNNING and seen.address, f"{vm.id} runs"
    )


async def make(cloud: Cloud, token: str = "i-one", **words: Any) -> Vm:
    """Make an instance and wait until it runs; `words` are fields of its request."""
    return await running(cloud, await cloud.create(replace(request(token), **words)))


async def listed(cloud: Cloud, *ids: str) -> None:
    """Wait until exactly these instances are listed."""
    expected = sorted(ids)

    async def look() -> list[str]:
        return sorted(vm.id for vm in await cloud.list())

    await eventually(look, lambda seen: seen == expected, f"{expected} are listed")


async def nothing_left(account: Harness) -> None:
    """Wait until nothing of ours is at the provider: some only promise to end an instance."""
    await eventually(account.leftovers, lambda left: not left, "nothing is left at the provider")


async def past_the_hang(act: Callable[[], Awaitable[T]]) -> T:
    """Act; once more if the provider still had to hang, because a cancelled call had not come to it."""
    try:
        return await act()
    except DeadlineError:
        return await act()
