"""The provider's side of the simulated cloud: all instances and volumes, ours and others', and the knobs."""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from ipaddress import IPv4Network
from typing import Literal, TypeVar, get_args

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from conpaas.core import tasks
from conpaas.core.clock import Clock
from conpaas.core.cloud import Room, Size, Vm, VmRequest, VmState, Volume, VolumeRequest, VolumeState
from conpaas.core.errors import (
    BadInputError,
    CloudRefusedError,
    ConpaasError,
    NoCapacityError,
    QuotaExceededError,
    ThrottledError,
)
from conpaas.core.messages.base import Message

Verb = Literal[
    "create",
    "describe",
    "list",
    "delete",
    "console",
    "create_volume",
    "describe_volume",
    "list_volumes",
    "attach",
    "detach",
    "delete_volume",
    "sizes",
    "zones",
    "quota",
    "examine",
]

GIB = 1 << 30
SIZES = (
    Size(name="small", cores=1, memory=GIB, disk=10 * GIB, price=Decimal("0.01"), default=True),
    Size(name="medium", cores=2, memory=4 * GIB, disk=20 * GIB, price=Decimal("0.04")),
    Size(name="large", cores=8, memory=16 * GIB, disk=40 * GIB, price=Decimal("0.16")),
)
ZONES = ("zone-a", "zone-b")


class SimSettings(Message):
    """A simulated cloud."""

    boot_s: NonNegativeFloat = 0.0
    """From the request to a running instance, in seconds."""
    address_s: NonNegativeFloat = 0.0
    """From the request to its address, in seconds."""
    call_s: NonNegativeFloat = 0.0
    """How long each call takes, in seconds: half of it before the call takes effect."""
    list_s: NonNegativeFloat = 0.0
    """How old an instance must be to be listed, in seconds."""
    lag_s: NonNegativeFloat = 0.0
    """How long the provider may not know what it has just made, in seconds: so long a driver believes itself."""
    volume_s: NonNegativeFloat = 0.0
    """How long it takes to make, attach or detach a volume, in seconds."""
    quota: PositiveInt = 10_000
    """How many instances there may be at once, everybody's together."""
    max_volumes: PositiveInt = 10_000
    """How many volumes there may be at once, everybody's together."""
    creates_per_s: PositiveFloat | None = None
    """How often instances may be asked for, everybody's calls together; None: as often as one likes."""
    creates_burst: PositiveInt = 1
    """How many instances may be asked for at once, after a pause."""
    block: IPv4Network = IPv4Network("10.77.0.0/16")
    """Where instances get their addresses from, one after the other."""


# -- outcomes of calls ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lost:
    """The call takes effect, and then raises `error`."""

    error: ConpaasError


@dataclass(frozen=True)
class Late:
    """The call takes effect; its answer takes so much longer."""

    seconds: float


@dataclass(frozen=True)
class Hang:
    """The call neither takes effect nor is answered."""


Outcome = ConpaasError | Lost | Late | Hang | None
"""An error: the call fails with it, without effect. None: it succeeds."""


# -- what there is --------------------------------------------------------------------------------------------------


@dataclass
class SimVm:
    """An instance at the provider. Times are the clock's monotonic ones."""

    id: str
    token: str
    deployment: str
    address: str
    context: str
    request: VmRequest
    made: float
    boot_s: float | None
    """None: it never boots."""
    size: str = ""
    zone: str = ""
    dies: float | None = None
    reason: str = "it died"
    printed: str = ""
    """What its console shows."""
    unknown_to: set[Verb] = field(default_factory=set)
    """Calls whose next answer does not know it yet."""


@dataclass
class SimVolume:
    """A volume at the provider."""

    id: str
    token: str
    deployment: str
    size: int
    zone: str
    settled: float
    """When what was asked for last is done, in the clock's monotonic time."""
    vm: str | None = None
    unknown_to: set[Verb] = field(default_factory=set)


Thing = TypeVar("Thing", SimVm, SimVolume)


class Bucket:
    """How often the provider may be called: so many times a second, and so many at once after a pause."""

    def __init__(self, per_s: float, burst: int, clock: Clock) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._tokens, self._filled = float(burst), clock.monotonic()

    def take(self) -> None:
        """Count a call; ThrottledError if it is one too many, with the time until the next one is not."""
        now = self._clock.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._per_s)
        self._filled = now
        if self._tokens < 1 - 1e-6:  # whoever waited exactly long enough is not sent away by rounding
            raise ThrottledError(
                f"more than {self._per_s:g} requests per second", retry_after_s=(1 - self._tokens) / self._per_s
            )
        self._tokens -= 1


@dataclass
class Account:
    """Every instance and volume, and the knobs."""

    settings: SimSettings
    clock: Clock
    outcomes: dict[Verb, deque[Outcome]] = field(default_factory=lambda: {verb: deque() for verb in get_args(Verb)})
    """Of the next calls, by verb; when empty, `weather`."""
    weather: Outcome = None
    """Of all calls for which `outcomes` has nothing: an error, as if the credentials had expired; Hang(); …"""
    boot_times_s: deque[float | None] = field(default_factory=deque)
    """Of the next instances; when empty, `settings.boot_s`. None: it never boots."""
    lifetimes_s: deque[float | None] = field(default_factory=deque)
    """Of the next instances; when empty, for ever."""
    addresses: deque[str] = field(default_factory=deque)
    """Of the next instances, whoever has them already; when empty, the next one of `settings.block`."""
    unknown_to: deque[set[Verb]] = field(default_factory=deque)
    """Of the next instances and volumes: calls whose next answer does not know it yet; when empty, none."""
    full: str = ""
    """Why there is no machine free, in the provider's words; empty: there are."""
    queued: str = ""
    """Why instances wait that do not run yet, in the provider's words."""
    sizes: tuple[Size, ...] = SIZES
    zones: tuple[str, ...] = ZONES
    on_boot: Callable[[SimVm], Awaitable[None]] | None = None
    """Awaited when an instance has booted: start its daemon here."""
    on_end: Callable[[SimVm], Awaitable[None]] | None = None
    """Awaited when an instance has been deleted or killed."""
    calls: list[Verb] = field(default_factory=list)
    """Every call that was made, in order."""
    vms: dict[str, SimVm] = field(default_factory=dict)
    volumes: dict[str, SimVolume] = field(default_factory=dict)
    _made: int = 0
    _creates: Bucket | None = None
    _background: tasks.Background = field(default_factory=tasks.Background)

    def __post_init__(self) -> None:
        if self.settings.creates_per_s is not None:
            self._creates = Bucket(self.settings.creates_per_s, self.settings.creates_burst, self.clock)

    # -- knobs ------------------------------------------------------------------------------------------------------

    def fail(self, verb: Verb, *outcomes: Outcome) -> None:
        """Give the next calls of `verb` these outcomes."""
        self.outcomes[verb].extend(outcomes)

    def add_foreign(self, deployment: str = "somebody-else") -> str:
        """Put an instance of another deployment into the account; return its id."""
        request = VmRequest(token=f"foreign-{self._made}", name="foreign", context=lambda _: "")
        return self._add(request, deployment).id

    async def kill(self, vm: str, reason: str = "it was killed") -> None:
        """End an instance, as a crash of its host would."""
        victim = self.vms[vm]
        victim.dies, victim.reason = self.clock.monotonic(), reason
        await self._ended(victim)

    async def vanish(self, vm: str) -> None:
        """Take an instance away without a trace."""
        await self._ended(self._remove(vm))

    async def close(self) -> None:
        """End what `on_boot` is still waiting for."""
        await self._background.close()

    def begin(self, verb: Verb) -> Outcome:
        """Note a call; return its outcome."""
        self.calls.append(verb)
        queue = self.outcomes[verb]
        return queue.popleft() if queue else self.weather

    # -- instances --------------------------------------------------------------------------------------------------

    def make(self, request: VmRequest, deployment: str) -> SimVm:
        """Make an instance, or return the one that the deployment's token has made before."""
        if self._creates is not None:
            self._creates.take()
        for vm in self.vms.values():
            if vm.token == request.token and vm.deployment == deployment:
                return vm
        if self.full:
            raise NoCapacityError(self.full)
        if len(self.vms) >= self.settings.quota:
            raise QuotaExceededError(
                f"{len(self.vms)} of {self.settings.quota} instances are in use", value=self.settings.quota
            )
        vm = self._add(request, deployment)
        if self.on_boot is not None and vm.boot_s is not None:
            self._background.start(f"boot {vm.id}", self._boot(vm, vm.boot_s))
        return vm

    def _add(self, request: VmRequest, deployment: str) -> SimVm:
        size, zone = self._size(request.size), self._zone(request.zone)
        self._made += 1
        address = self.addresses.popleft() if self.addresses else self._next_address()
        lifetime_s = self.lifetimes_s.popleft() if self.lifetimes_s else None
        now = self.clock.monotonic()
        vm = SimVm(
            id=f"sim-{self._made}",
            token=request.token,
            deployment=deployment,
            address=address,
            context=request.context(address),
            request=request,
            made=now,
            boot_s=self.boot_times_s.popleft() if self.boot_times_s else self.settings.boot_s,
            size=size,
            zone=zone,
            dies=None if lifetime_s is None else now + lifetime_s,
            unknown_to=self.unknown_to.popleft() if self.unknown_to else set(),
        )
        self.vms[vm.id] = vm
        return vm

    def _next_address(self) -> str:
        return str(self.settings.block[self._made % self.settings.block.num_addresses])

    def _size(self, name: str) -> str:
        for size in self.sizes:
            if size.name == name or (size.default and not name):
                return size.name
        raise BadInputError(f"there is no size '{name}'", value=name)

    def _zone(self, name: str) -> str:
        if name and name not in self.zones:
            raise BadInputError(f"there is no zone '{name}'", value=name)
        return name or self.zones[0]

    async def end(self, vm: str, deployment: str) -> None:
        """Delete an instance of the deployment; gone, and everybody else's, is left as it is."""
        if vm in self.vms and self.vms[vm].deployment == deployment:
            await self._ended(self._remove(vm))

    def _remove(self, vm: str) -> SimVm:
        for volume in self.volumes.values():
            if volume.vm == vm:
                self._settle(volume, None)
        return self.vms.pop(vm)

    def find(self, vm: str, deployment: str, verb: Verb) -> SimVm | None:
        """Return an instance of the deployment, None if `verb` cannot see it."""
        return _seen(self.vms.get(vm), deployment, verb)

    def all(self, deployment: str) -> list[SimVm]:
        """Return the deployment's instances that are old enough to be listed."""
        oldest = self.clock.monotonic() - self.settings.list_s
        return [vm for vm in _all(self.vms.values(), deployment, "list") if vm.made <= oldest]

    def look(self, vm: SimVm) -> Vm:
        """Return the instance as the provider shows it now."""
        age = self.clock.monotonic() - vm.made
        dead = vm.dies is not None and self.clock.monotonic() >= vm.dies
        booted = vm.boot_s is not None and age >= vm.boot_s
        return Vm(
            id=vm.id,
            token=vm.token,
            state=VmState.FAILED if dead else VmState.RUNNING if booted else VmState.PENDING,
            address=vm.address if age >= self.settings.address_s else None,
            reason=vm.reason if dead else "" if booted else self.queued,
            size=vm.size,
            zone=vm.zone,
        )

    async def _boot(self, vm: SimVm, boot_s: float) -> None:
        await self.clock.sleep(boot_s)
        if self.on_boot is not None and vm.id in self.vms and self.look(vm).state is VmState.RUNNING:
            await self.on_boot(vm)

    async def _ended(self, vm: SimVm) -> None:
        if self.on_end is not None:
            await self.on_end(vm)

    # -- volumes ----------------------------------------------------------------------------------------------------

    def make_volume(self, request: VolumeRequest, deployment: str) -> SimVolume:
        """Make a volume, or return the one that the deployment's token has made before."""
        for volume in self.volumes.values():
            if volume.token == request.token and volume.deployment == deployment:
                return volume
        if len(self.volumes) >= self.settings.max_volumes:
            raise QuotaExceededError(
                f"{len(self.volumes)} of {self.settings.max_volumes} volumes are in use",
                value=self.settings.max_volumes,
            )
        zone = self._zone(request.zone)
        self._made += 1
        volume = SimVolume(
            id=f"vol-{self._made}",
            token=request.token,
            deployment=deployment,
            size=-(-request.size // GIB) * GIB,
            zone=zone,
            settled=self.clock.monotonic() + self.settings.volume_s,
            unknown_to=self.unknown_to.popleft() if self.unknown_to else set(),
        )
        self.volumes[volume.id] = volume
        return volume

    def find_volume(self, volume: str, deployment: str, verb: Verb) -> SimVolume | None:
        """Return a volume of the deployment, None if `verb` cannot see it."""
        return _seen(self.volumes.get(volume), deployment, verb)

    def all_volumes(self, deployment: str) -> list[SimVolume]:
        """Return the deployment's volumes."""
        return _all(self.volumes.values(), deployment, "list_volumes")

    def attach(self, volume: str, vm: str, deployment: str) -> SimVolume:
        """Attach a volume; it and the instance must be in one zone."""
        found = self.find_volume(volume, deployment, "attach")
        target = self.find(vm, deployment, "attach")
        if found is None or target is None:
            raise CloudRefusedError(f"there is no {volume if found is None else vm}")
        if found.vm not in {None, vm}:
            raise CloudRefusedError(f"{volume} is attached to {found.vm}", value=found.vm)
        if found.zone != target.zone:
            raise CloudRefusedError(f"{volume} is in {found.zone}, {vm} in {target.zone}", value=target.zone)
        if found.vm is None:
            self._settle(found, vm)
        return found

    def detach(self, volume: str, deployment: str) -> SimVolume | None:
        """Detach a volume from whatever it is attached to; None if there is no such volume."""
        found = self.find_volume(volume, deployment, "detach")
        if found is not None and found.vm is not None:
            self._settle(found, None)
        return found

    def end_volume(self, volume: str, deployment: str) -> None:
        """Delete a volume that is attached to nothing."""
        found = self.find_volume(volume, deployment, "delete_volume")
        if found is None:
            return
        if found.vm is not None:
            raise CloudRefusedError(f"{volume} is attached to {found.vm}", value=found.vm)
        del self.volumes[volume]

    def look_volume(self, volume: SimVolume) -> Volume:
        """Return the volume as the provider shows it now."""
        settled = self.clock.monotonic() >= volume.settled
        state = VolumeState.AVAILABLE if volume.vm is None else VolumeState.ATTACHED
        return Volume(
            id=volume.id,
            token=volume.token,
            state=state if settled else VolumeState.PENDING,
            size=volume.size,
            zone=volume.zone,
            vm=volume.vm,
            devices=() if volume.vm is None else (f"/dev/disk/by-id/{volume.id}",),
        )

    def _settle(self, volume: SimVolume, vm: str | None) -> None:
        volume.vm, volume.settled = vm, self.clock.monotonic() + self.settings.volume_s

    # -- the account itself -----------------------------------------------------------------------------------------

    def rooms(self) -> tuple[Room, ...]:
        """Return how much of what is allowed is in use."""
        return (
            Room(name="instances", used=len(self.vms), limit=self.settings.quota),
            Room(name="volumes", used=len(self.volumes), limit=self.settings.max_volumes),
        )


def _seen(thing: Thing | None, deployment: str, verb: Verb) -> Thing | None:
    if thing is None or thing.deployment != deployment:
        return None
    if verb in thing.unknown_to:
        thing.unknown_to.discard(verb)
        return None
    return thing


def _all(things: Iterable[Thing], deployment: str, verb: Verb) -> list[Thing]:
    return [thing for thing in things if _seen(thing, deployment, verb) is not None]
