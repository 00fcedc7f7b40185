"""The simulated cloud: what real ones do on bad days, in memory and in the time of a `Clock`.

An `Account` is the provider's side. It outlives the drivers that speak to it, as a provider does, for as long as this
process; its knobs make calls fail, lose their answers, come late, and instances stay silent, die or belong to others.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from conpaas.core import tasks
from conpaas.core.clock import Clock
from conpaas.core.cloud import Cloud, CloudContext, CloudType, Vm, VmRequest, VmState
from conpaas.core.errors import ConpaasError, QuotaExceededError
from conpaas.core.messages.base import Message

Verb = Literal["create", "describe", "list", "delete"]


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
    quota: PositiveInt = 10_000
    """How many instances there may be at once, everybody's together."""
    block: IPv4Network = IPv4Network("10.77.0.0/16")
    """Where instances get their addresses from, one after the other."""


@dataclass(frozen=True)
class Lost:
    """As an outcome of a call: it takes effect, and then raises `error`."""

    error: ConpaasError


Outcome = ConpaasError | Lost | None
"""Of one call: fails, succeeds with its answer lost, succeeds."""


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
    dies: float | None = None
    reason: str = "it died"


@dataclass
class Account:
    """The provider's side: every instance, ours and others', and the knobs."""

    settings: SimSettings
    clock: Clock
    outcomes: dict[Verb, deque[Outcome]] = field(
        default_factory=lambda: {verb: deque() for verb in ("create", "describe", "list", "delete")}
    )
    """Of the next calls, by verb; when empty, they succeed."""
    boot_times_s: deque[float | None] = field(default_factory=deque)
    """Of the next instances; when empty, `settings.boot_s`. None: it never boots."""
    lifetimes_s: deque[float | None] = field(default_factory=deque)
    """Of the next instances; when empty, for ever."""
    on_boot: Callable[[SimVm], Awaitable[None]] | None = None
    """Awaited when an instance has booted: start its daemon here."""
    on_end: Callable[[SimVm], Awaitable[None]] | None = None
    """Awaited when an instance has been deleted or killed."""
    calls: list[Verb] = field(default_factory=list)
    """Every call that was made, in order."""
    vms: dict[str, SimVm] = field(default_factory=dict)
    _made: int = 0
    _background: tasks.Background = field(default_factory=tasks.Background)

    def fail(self, verb: Verb, *outcomes: Outcome) -> None:
        """Give the next calls of `verb` these outcomes."""
        self.outcomes[verb].extend(outcomes)

    def add_foreign(self, deployment: str = "somebody-else") -> str:
        """Put an instance of another deployment into the account; return its id."""
        request = VmRequest(token=f"foreign-{self._made}", name="foreign", context=lambda _: "")
        return self.make(request, deployment).id

    async def kill(self, vm: str, reason: str = "it was killed") -> None:
        """End an instance, as a crash of its host would."""
        victim = self.vms[vm]
        victim.dies, victim.reason = self.clock.monotonic(), reason
        await self._ended(victim)

    async def vanish(self, vm: str) -> None:
        """Take an instance away without a trace."""
        await self._ended(self.vms.pop(vm))

    async def close(self) -> None:
        """End what `on_boot` is still waiting for."""
        await self._background.close()

    def make(self, request: VmRequest, deployment: str) -> SimVm:
        """Make an instance, or return the one that the deployment's token has made before."""
        for vm in self.vms.values():
            if vm.token == request.token and vm.deployment == deployment:
                return vm
        if len(self.vms) >= self.settings.quota:
            raise QuotaExceededError(
                f"{len(self.vms)} of {self.settings.quota} instances are in use", value=self.settings.quota
            )
        self._made += 1
        address = str(self.settings.block[self._made % self.settings.block.num_addresses])
        boot_s = self.boot_times_s.popleft() if self.boot_times_s else self.settings.boot_s
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
            boot_s=boot_s,
            dies=None if lifetime_s is None else now + lifetime_s,
        )
        self.vms[vm.id] = vm
        if self.on_boot is not None and vm.boot_s is not None:
            self._background.start(f"boot {vm.id}", self._boot(vm, vm.boot_s))
        return vm

    async def end(self, vm: str, deployment: str) -> None:
        """Delete an instance of the deployment; gone, and everybody else's, is left as it is."""
        if vm in self.vms and self.vms[vm].deployment == deployment:
            await self._ended(self.vms.pop(vm))

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
            reason=vm.reason if dead else "",
        )

    async def _boot(self, vm: SimVm, boot_s: float) -> None:
        await self.clock.sleep(boot_s)
        if self.on_boot is not None and vm.id in self.vms and self.look(vm).state is VmState.RUNNING:
            await self.on_boot(vm)

    async def _ended(self, vm: SimVm) -> None:
        if self.on_end is not None:
            await self.on_end(vm)


class SimCloud:
    """A driver: what one deployment sees of an account."""

    def __init__(self, account: Account, deployment: str) -> None:
        self._account, self._deployment = account, deployment

    async def create(self, request: VmRequest) -> Vm:
        """Make an instance."""
        lost = await self._begin("create")
        vm = self._account.look(self._account.make(request, self._deployment))
        await self._end(lost)
        return vm

    async def describe(self, vm: str) -> Vm:
        """Return an instance; one of another deployment is none."""
        lost = await self._begin("describe")
        found = self._account.vms.get(vm)
        await self._end(lost)
        if found is None or found.deployment != self._deployment:
            return Vm(id=vm, token="", state=VmState.GONE)
        return self._account.look(found)

    async def list(self) -> list[Vm]:
        """Return the deployment's instances that are old enough to be listed."""
        lost = await self._begin("list")
        oldest = self._account.clock.monotonic() - self._account.settings.list_s
        mine = [vm for vm in self._account.vms.values() if vm.deployment == self._deployment and vm.made <= oldest]
        await self._end(lost)
        return [self._account.look(vm) for vm in mine]

    async def delete(self, vm: str) -> None:
        """End an instance."""
        lost = await self._begin("delete")
        await self._account.end(vm, self._deployment)
        await self._end(lost)

    async def close(self) -> None:
        """Nothing is held."""

    async def _begin(self, verb: Verb) -> ConpaasError | None:
        """Spend the first half of the call's time, fail if told to; return the error that its answer is lost by."""
        self._account.calls.append(verb)
        queue = self._account.outcomes[verb]
        outcome = queue.popleft() if queue else None
        await self._spend()
        if isinstance(outcome, ConpaasError):
            raise outcome
        return None if outcome is None else outcome.error

    async def _end(self, lost: ConpaasError | None) -> None:
        await self._spend()
        if lost is not None:
            raise lost

    async def _spend(self) -> None:
        if self._account.settings.call_s:
            await self._account.clock.sleep(self._account.settings.call_s / 2)


_accounts: dict[Path, Account] = {}


def account(context: CloudContext, settings: SimSettings | None = None) -> Account:
    """Return the account of the context's directory; it is made, with `settings`, when it is first asked for."""
    if context.directory not in _accounts:
        _accounts[context.directory] = Account(settings or SimSettings(), context.clock)
    return _accounts[context.directory]


def _driver(settings: SimSettings, context: CloudContext) -> Cloud:
    return SimCloud(account(context, settings), context.deployment)


CLOUD = CloudType(name="sim", title="Simulated cloud", settings=SimSettings, driver=_driver)
