"""The contract of a cloud driver. A driver is one file of `conpaas.cloud` that exports `CLOUD`, a `CloudType`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from conpaas.core.clock import Clock
from conpaas.core.messages.base import Message

PACKAGE = "conpaas.cloud"


class VmState(StrEnum):
    """How an instance is, as its cloud sees it."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    """It will never run (again); it must still be deleted."""
    GONE = "GONE"


@dataclass(frozen=True, kw_only=True)
class VmRequest:
    """One instance to be made."""

    token: str
    """Names the request: at most one instance per token, however often it is asked for. Also the instance's id."""
    name: str
    """For people who look at the cloud's own console."""
    context: Callable[[str], str]
    """Gives the contextualization document once the address is known (empty if the instance finds out by itself)."""
    ports: tuple[int, ...] = ()
    """To be reachable from outside the service."""
    size: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Vm:
    """An instance at a cloud."""

    id: str
    """As the cloud reports it."""
    token: str
    state: VmState
    address: str | None = None
    reason: str = ""
    """The provider's own words about a failure."""


class Cloud(Protocol):
    """One configured account at a provider. Every call has a deadline of its own and may be cancelled."""

    async def create(self, request: VmRequest) -> Vm:
        """Ask for one instance and return at once; its address may still be None.

        Idempotent: a second call with the same `request.token` returns the first instance.
        Raises CloudBusyError (try later) or CloudRefusedError (give up).
        """

    async def describe(self, vm: str) -> Vm:
        """Return the instance with cloud id `vm`; an unknown or deleted one has state GONE."""

    async def list(self) -> list[Vm]:
        """Return every instance that bears this deployment's tag, GONE ones left out. Others are never seen."""

    async def delete(self, vm: str) -> None:
        """Give the instance back. Gone is fine. On return it is gone, or the cloud has promised to end it."""

    async def close(self) -> None:
        """Release connections; instances stay."""


@runtime_checkable
class HasConsole(Protocol):
    """A cloud that keeps what an instance prints while it boots."""

    async def console(self, vm: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class CloudContext:
    """What a driver gets of its director."""

    name: str
    """Of the configured cloud."""
    deployment: str
    """The tag: a driver sees and touches only instances that bear it."""
    directory: Path
    """Where the driver may keep files."""
    clock: Clock


@dataclass(frozen=True, kw_only=True)
class CloudType:
    """A kind of provider."""

    name: str
    title: str
    settings: type[Message]
    driver: Callable[[Any, CloudContext], Cloud]
    """Makes a Cloud of (settings, context)."""
    check: Callable[[Any], str] = lambda _settings: ""
    """Why it cannot be used here; empty if it can."""
