"""The cloud accounts: which there are, which can be used, and the one way to call them."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog
from pydantic import ValidationError

from conpaas.core.clock import Clock
from conpaas.core.cloud import PACKAGE, VERBS, Cloud, CloudContext, CloudType, HasSizes, Size
from conpaas.core.errors import (
    BadInputError,
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    DeadlineError,
    NotFoundError,
    PeerError,
    ThrottledError,
)
from conpaas.core.messages.base import Message
from conpaas.core.messages.public import CloudOptions
from conpaas.core.plugins import discover
from conpaas.core.rpc import bad_input
from conpaas.core.throttle import TokenBucket
from conpaas.director.settings import DirectorSettings

log = structlog.get_logger()

T = TypeVar("T")

THROTTLED_S = 1.0
"""How long to leave a provider alone that says "too much" and not for how long."""
TROUBLE_S = 60.0
"""How long a cloud that did not answer is avoided where there is another one."""
_PATIENCE = 5
"""A driver's call may be so many calls to its provider, each with the deadline."""
ANY_SIZE = "*"


@dataclass(frozen=True)
class Plan:
    """One cloud account as it is configured."""

    name: str
    driver: str
    settings: Mapping[str, Any]
    """Of the driver, not yet checked."""
    options: CloudOptions
    fixed: bool = False
    """It is part of the director's own settings: their file, or the one that is there unless they say otherwise."""


@dataclass
class Account:
    """One cloud account. `cloud` is None while it cannot be used; `reason` says why."""

    plan: Plan
    kind: CloudType | None
    cloud: Cloud | None
    reason: str
    clock: Clock
    deadline_s: float
    calls: asyncio.Semaphore
    """Bounds the calls under way."""
    trouble: str = ""
    """What went wrong with the last call, if it did."""
    sizes: Sequence[Size] = ()
    """As last asked for."""
    _silent_since: float | None = None
    _buckets: dict[str, TokenBucket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {} if self.kind is None else self.kind.rates
        for verb in VERBS:
            rate, wished = known.get(verb), self.plan.options.rates.get(verb)  # type: ignore[call-overload]
            if wished is not None:
                self._buckets[verb] = TokenBucket(wished, 1, self.clock)
            elif rate is not None:
                self._buckets[verb] = TokenBucket(rate.per_s, rate.burst, self.clock)

    @property
    def name(self) -> str:
        """The name of the account."""
        return self.plan.name

    @property
    def title(self) -> str:
        """What people see."""
        return self.plan.options.title or (self.kind.title if self.kind else self.name)

    @property
    def silent(self) -> bool:
        """Whether it has not answered of late: another cloud, where there is one, is the better choice."""
        return self._silent_since is not None and self.clock.monotonic() - self._silent_since < TROUBLE_S

    async def ask(self, verb: str, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call when it is its turn, bounded in time.

        What a driver does not foresee is a PeerError too: it is a plug-in, and its bugs must not end the director.
        """
        bucket = self._buckets.get(verb)
        if bucket is not None:
            await bucket.take()
        async with self.calls:
            try:
                async with asyncio.timeout(self.deadline_s * _PATIENCE):
                    answer = await self._in_turn(bucket, call)
            except ConpaasError as exc:
                self._note(exc, verb)
                raise
            except TimeoutError as exc:
                error = DeadlineError(f"cloud {self.name}: no answer within {self.deadline_s * _PATIENCE:g} s")
                self._note(error, verb)
                raise error from exc
            except Exception as exc:
                log.exception("driver-broke", cloud=self.name)
                broken = PeerError(f"cloud {self.name}: its driver broke: {type(exc).__name__}: {exc}")
                self._note(broken, verb)
                raise broken from exc
        self._silent_since, self.trouble = None, ""
        return answer

    async def _in_turn(self, bucket: TokenBucket | None, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call whose turn it is; one that comes a little too early for the provider waits that little.

        So do all after it: the provider's count is what counts.
        """
        while True:
            try:
                return await call()
            except ThrottledError as exc:
                pause_s = exc.retry_after_s or 0
                if bucket is None or not 0 < pause_s <= bucket.gap_s:
                    raise
                bucket.pause(pause_s + bucket.gap_s)
                await self.clock.sleep(pause_s)

    def _note(self, error: ConpaasError, verb: str) -> None:
        """Remember what concerns the account as a whole."""
        match error:
            case PeerError():
                self._silent_since, self.trouble = self.clock.monotonic(), error.message
            case CloudCredentialsError():
                self.trouble = error.message
            case ThrottledError():
                pause_s = error.retry_after_s or THROTTLED_S
                if verb not in self._buckets:  # nobody has told us how often we may call: this does
                    self._buckets[verb] = TokenBucket(max(1 / pause_s, 1 / THROTTLED_S), 1, self.clock)
                self._buckets[verb].pause(pause_s)
            case _:
                pass

    def price(self, size: str) -> tuple[Decimal | None, str]:
        """Return what an instance of `size` (empty: the default one) costs per hour, and in which currency."""
        offered = next((one for one in self.sizes if (one.name == size if size else one.default)), None)
        ours = self.plan.options
        for name in (offered.name if offered else size, ANY_SIZE):
            if name in ours.prices:
                return ours.prices[name], ours.currency
        return (None, "") if offered is None or offered.price is None else (offered.price, offered.currency)

    def director_url(self, url: str) -> str:
        """Return where instances of this cloud find the director that others find at `url`."""
        if self.plan.options.director_url:
            return self.plan.options.director_url
        parts = urlsplit(url)
        if self.kind is None or not self.kind.host_alias or not _is_loopback(parts.hostname or ""):
            return url
        return parts._replace(netloc=f"{self.kind.host_alias}:{parts.port}").geturl()

    async def learn_sizes(self) -> None:
        """Ask which sizes there are, and what they cost."""
        cloud = self.cloud
        if isinstance(cloud, HasSizes):
            self.sizes = await self.ask("look", cloud.sizes)


class Clouds:
    """All cloud accounts by name."""

    def __init__(self, settings: DirectorSettings, deployment: str, clock: Clock) -> None:
        self._settings, self._deployment, self._clock = settings, deployment, clock
        self._kinds = discover(PACKAGE, "CLOUD", CloudType)
        self.accounts: dict[str, Account] = {}
        self.default = settings.default_cloud

    def open(self, plans: Iterable[Plan]) -> None:
        """Make the drivers of all accounts. One that cannot be used is kept, with its reason."""
        for plan in (*plans, *map(_from_settings, self._settings.clouds.items())):
            self.accounts[plan.name] = self.account_of(plan)
        if self.default not in self.accounts:
            raise BadInputError(
                f"the default cloud '{self.default}' is not configured",
                value=self.default,
                hint=f"configured are: {', '.join(self.accounts) or 'none'}",
            )

    @property
    def kinds(self) -> Mapping[str, CloudType]:
        """The kinds of clouds by name."""
        return self._kinds

    @contextlib.asynccontextmanager
    async def on_trial(self, plan: Plan) -> AsyncIterator[Account]:
        """Give an account to be tried. Of one that is not kept, nothing is left at the end of the block."""
        directory = self._settings.data_dir / "clouds" / plan.name
        with contextlib.ExitStack() as stack:
            if plan.name not in self.accounts:
                directory.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
                folder = tempfile.TemporaryDirectory(prefix=".trial-", dir=directory.parent)
                directory = Path(stack.enter_context(folder))
                directory.chmod(0o711)
            account = self.account_of(plan, directory)
            try:
                yield account
            finally:
                if account.cloud is not None:
                    await account.cloud.close()

    def account_of(self, plan: Plan, directory: Path | None = None) -> Account:
        """Return an account with a driver of its own, that no name leads to yet; `directory`: not its own one."""
        kind = self._kinds.get(plan.driver)
        cloud, reason = None, f"there is no driver '{plan.driver}'"
        if kind is not None:
            try:
                cloud, reason = self._driver(plan, kind, self.checked(plan), directory)
            except ConpaasError as exc:
                reason = exc.message
        settings = self._settings
        calls = asyncio.Semaphore(settings.cloud_calls)
        return Account(plan, kind, cloud, reason, self._clock, settings.cloud_deadline_s, calls)

    def checked(self, plan: Plan) -> Message:
        """Return the driver's settings; raise BadInputError for those that are off, or an unknown driver."""
        kind = self._kinds.get(plan.driver)
        if kind is None:
            raise BadInputError(
                f"there is no driver '{plan.driver}'", value=plan.driver, hint=f"there are: {', '.join(self._kinds)}"
            )
        try:
            return kind.settings.model_validate(dict(plan.settings))
        except ValidationError as exc:
            raise bad_input(exc) from exc

    def _driver(
        self, plan: Plan, kind: CloudType, settings: Message, directory: Path | None
    ) -> tuple[Cloud | None, str]:
        reason = kind.check(settings)
        if reason:
            return None, reason
        directory = directory or self._settings.data_dir / "clouds" / plan.name
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        context = CloudContext(
            name=plan.name,
            deployment=self._deployment,
            directory=directory,
            clock=self._clock,
            deadline_s=self._settings.cloud_deadline_s,
        )
        return kind.open(settings, context), ""

    async def put(self, plan: Plan) -> Account:
        """Take an account in, in the place of the one of its name."""
        before = self.accounts.get(plan.name)
        self.accounts[plan.name] = account = self.account_of(plan)
        if before is not None and before.cloud is not None:
            await before.cloud.close()
        return account

    async def drop(self, name: str) -> None:
        """Forget an account."""
        account = self.accounts.pop(name, None)
        if account is not None and account.cloud is not None:
            await account.cloud.close()

    def account(self, name: str) -> Account:
        """Return the account called `name`; raise NotFoundError for an unknown one."""
        account = self.accounts.get(name)
        if account is None:
            raise NotFoundError(
                f"there is no cloud '{name}'",
                value=name,
                hint=f"there are: {', '.join(self.accounts)}",
            )
        return account

    def usable(self, name: str) -> Cloud:
        """Return the driver of a cloud; raise CloudRefusedError, with the reason, if it cannot be used."""
        account = self.account(name)
        if account.cloud is None:
            raise CloudRefusedError(
                f"cloud '{name}' cannot be used: {account.reason}", value=name, hint="choose another cloud"
            )
        return account.cloud

    def offered(self, name: str) -> Account:
        """Return an account that takes new instances; raise CloudRefusedError, with the reason, if it does not."""
        self.usable(name)
        account = self.account(name)
        if not account.plan.options.enabled:
            raise CloudRefusedError(
                f"cloud '{name}' takes no new instances", value=name, hint="choose another cloud, or ask why"
            )
        return account

    async def learn_sizes(self) -> None:
        """Ask all clouds which sizes there are; one that does not answer keeps those it had."""
        async with asyncio.TaskGroup() as group:
            for account in list(self.accounts.values()):
                group.create_task(self.learn_sizes_of(account), name=f"sizes of {account.name}")

    async def learn_sizes_of(self, account: Account) -> None:
        """Ask one cloud which sizes there are."""
        try:
            await account.learn_sizes()
        except ConpaasError as exc:
            log.warning("sizes-unknown", cloud=account.name, error=exc.message)

    async def close(self) -> None:
        """Release the drivers' connections; instances stay."""
        for account in self.accounts.values():
            if account.cloud is not None:
                await account.cloud.close()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _from_settings(named: tuple[str, Mapping[str, Any]]) -> Plan:
    """Read an account of the settings file: `driver`, `title`, and the other options, beside the driver's settings."""
    name, words = named
    options = {key: value for key, value in words.items() if key in CloudOptions.model_fields}
    rest = {key: value for key, value in words.items() if key not in options and key != "driver"}
    try:
        return Plan(name, str(words.get("driver", name)), rest, CloudOptions.model_validate(options), fixed=True)
    except ValidationError as exc:
        raise bad_input(exc) from exc
