"""The contract of a cloud driver. A driver is one file of `conpaas.cloud` that exports `CLOUD`, a `CloudType`.

A driver does what it is asked and nothing else: it keeps no facts (the ledger does), repeats nothing (the director
does) and waits for nothing but the provider's answer. What every call may raise, and what follows from it:

    CloudBusyError        nothing has happened; the same call may succeed later       repeat it, with pauses
      ThrottledError        too many calls: `retry_after_s` if the provider says it     repeat it, and call less often
      NoCapacityError       the provider has no machine free just now                   or take another cloud
    PeerError             no answer, or not one that can be read: it may have           look for the token, then repeat
      DeadlineError         happened                                                    with the same one
    CloudRefusedError     nothing has happened, nor will it                             give up, or take another cloud
      QuotaExceededError    this account has no room
      CloudCredentialsError they are wrong, or have expired
      UnknownImageError     there is no such image, or it cannot be booted
    BadInputError         the request itself is off: the caller's bug

The message of each quotes the provider's own words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from conpaas.core import plugins
from conpaas.core.clock import Clock
from conpaas.core.messages.base import Message

PACKAGE = "conpaas.cloud"


# -- instances ------------------------------------------------------------------------------------------------------


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
    """To be reachable by everybody."""
    inner_ports: tuple[int, ...] = ()
    """To be reachable by the director and the other instances of the service, on whatever cloud they are."""
    size: str = ""
    """Name of a `Size`; empty: the account's default one."""
    zone: str = ""
    """Where it must be, because its volume is there; empty: anywhere."""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Vm:
    """An instance at a cloud."""

    id: str
    """As the cloud reports it."""
    token: str
    state: VmState
    address: str | None = None
    """Where the director and other instances reach it."""
    reason: str = ""
    """Of a failure, a wait that takes long, or what hinders one that runs: the provider's own words; else empty."""
    size: str = ""
    zone: str = ""


class Cloud(Protocol):
    """One configured account at a provider. Every call has a deadline of its own and may be cancelled."""

    async def create(self, request: VmRequest) -> Vm:
        """Ask for one instance and return at once; its address may still be None.

        Idempotent: a second call with the same `request.token` returns the first instance. If it raises anything but
        a PeerError, nothing of the request is left at the provider.
        """

    async def describe(self, vm: str) -> Vm:
        """Return the instance with cloud id `vm`; an unknown or deleted one, or somebody else's, has state GONE.

        One that was just created is never GONE, even if the provider's lists lag behind.
        """

    async def list(self) -> list[Vm]:
        """Return every instance that bears this deployment's tag, GONE ones left out. Others are never seen."""

    async def delete(self, vm: str) -> None:
        """Give the instance back. Gone is fine; somebody else's is left alone.

        On return it is gone, or the cloud has promised to end it. Its volumes are detached first, and stay.
        """

    async def close(self) -> None:
        """Release connections; instances stay."""


@runtime_checkable
class HasConsole(Protocol):
    """A cloud that keeps what an instance prints while it boots."""

    async def console(self, vm: str) -> str:
        """Return the end of what it has printed, at most 64 KiB; empty for an unknown one."""


# -- what a provider offers -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Size:
    """A kind of machine that the provider rents out."""

    name: str
    """As the provider calls it: `t3.small`."""
    cores: float
    memory: int
    """Bytes."""
    disk: int = 0
    """Bytes; 0: as large as the image, or unknown."""
    price: Decimal | None = None
    """Per hour, in the provider's currency; None: unknown, or none is asked."""
    currency: str = "USD"
    default: bool = False


@runtime_checkable
class HasSizes(Protocol):
    """A cloud with sizes to choose from."""

    async def sizes(self) -> Sequence[Size]:
        """Return those that this account may use, the cheapest first; one of them is the default."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A disk that an instance can start from."""

    id: str
    name: str
    detail: str = ""


@runtime_checkable
class HasImages(Protocol):
    """A cloud with images to choose from."""

    async def images(self) -> Sequence[Image]:
        """Return the account's own, by name; never the provider's whole catalogue."""


@runtime_checkable
class HasZones(Protocol):
    """A cloud in several places of one region, between which volumes cannot move."""

    async def zones(self) -> Sequence[str]: ...


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much of an allowance is used."""

    name: str
    """`instances`, `cores`, `volumes`; `memory`, `disk` and `volume space` in bytes."""
    used: float
    limit: float


@runtime_checkable
class HasQuota(Protocol):
    """A cloud that tells how much this account may use."""

    async def quota(self) -> Sequence[Room]: ...


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at when an account was tried."""

    name: str
    """`the endpoint`, `the credentials`, `the image`, …"""
    ok: bool
    detail: str = ""
    """What is there, or what exactly is wrong, in the provider's own words."""
    hint: str = ""
    """What to do about it."""


@runtime_checkable
class CanExamine(Protocol):
    """A cloud whose account can be tried without making anything."""

    async def examine(self) -> Sequence[Finding]:
        """Look at all that `create` will need, in order; stop at what makes the rest impossible. Never raises."""


# -- volumes --------------------------------------------------------------------------------------------------------


class VolumeState(StrEnum):
    """How a volume is, as its cloud sees it."""

    PENDING = "PENDING"
    """Being made, attached or detached."""
    AVAILABLE = "AVAILABLE"
    ATTACHED = "ATTACHED"
    FAILED = "FAILED"
    GONE = "GONE"


@dataclass(frozen=True, kw_only=True)
class VolumeRequest:
    """One volume to be made: empty, and attached to nothing."""

    token: str
    """As of a VmRequest: at most one volume per token."""
    name: str
    size: int
    """Bytes; providers round up."""
    zone: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume at a cloud."""

    id: str
    token: str
    state: VolumeState
    size: int = 0
    zone: str = ""
    vm: str | None = None
    """Cloud id of the instance that it is attached to."""
    devices: tuple[str, ...] = ()
    """Where that instance finds it: paths of a block device, the surest first; or of a folder that is the volume."""
    reason: str = ""


@runtime_checkable
class HasVolumes(Protocol):
    """A cloud with disks that outlive instances. Tokens, tags, errors and deadlines are as for instances."""

    async def create_volume(self, request: VolumeRequest) -> Volume:
        """Ask for one volume and return at once. Idempotent by token."""

    async def describe_volume(self, volume: str) -> Volume:
        """Return the volume; an unknown or deleted one, or somebody else's, has state GONE."""

    async def list_volumes(self) -> Sequence[Volume]:
        """Return every volume that bears this deployment's tag, GONE ones left out."""

    async def attach(self, volume: str, vm: str) -> Volume:
        """Ask for the volume to be attached; fine if it is already.

        CloudRefusedError if it is attached to another instance, or if either of the two is not there, or not ours.
        """

    async def detach(self, volume: str) -> Volume:
        """Ask for the volume to be detached; fine if it is attached to nothing, or its instance is gone.

        One that is not there, or not ours, is returned as GONE.
        """

    async def delete_volume(self, volume: str) -> None:
        """Delete the volume and all data on it. Gone is fine. CloudRefusedError while it is attached."""


# -- kinds of providers ---------------------------------------------------------------------------------------------


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
    deadline_s: float = 30.0
    """How long one call to the provider may take before it is a DeadlineError."""


@dataclass(frozen=True)
class Rate:
    """How often a provider may be called: `per_s` times a second, `burst` at once after a pause."""

    per_s: float
    burst: int = 1


VERBS = ("create", "delete", "describe", "list", "volumes", "look")
"""What is limited apart: `volumes` are all calls about volumes, `look` is console, sizes, images, zones, quota, and
examination."""


@dataclass(frozen=True, kw_only=True)
class CloudType:
    """A kind of provider."""

    name: str
    title: str
    settings: type[Message]
    """Of an account: docstrings say what each is; `Secret` fields are encrypted at rest and never shown."""
    driver: str
    """`module:name` of what makes a Cloud of (settings, context); imported when an account is opened, not before."""
    check: Callable[[Any], str] = lambda _settings: ""
    """Why it cannot be used on this computer; empty if it can. Asks no provider: see `CanExamine`."""
    description: str = ""
    """One sentence for administrators who look for the right kind."""
    rates: Mapping[str, Rate] = field(default_factory=dict)
    """By verb, what the provider is known to stand; a verb that is not named is not limited."""
    host_alias: str = ""
    """How instances reach the computer that the director runs on, where its loopback addresses do not lead there."""
    shares_code: bool = False
    """Instances run the director's own installation of ConPaaS: they need no copy, and no upgrade."""

    def open(self, settings: Any, context: CloudContext) -> Cloud:
        """Make the driver of an account; it speaks to nobody yet."""
        cloud: Cloud = plugins.load(self.driver)(settings, context)
        return cloud
