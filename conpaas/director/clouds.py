"""The configured clouds: which there are, which can be used, and why not."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from conpaas.core.clock import Clock
from conpaas.core.cloud import PACKAGE, Cloud, CloudContext, CloudType
from conpaas.core.errors import BadInputError, CloudRefusedError, ConpaasError, NotFoundError
from conpaas.core.plugins import discover
from conpaas.core.rpc import bad_input
from conpaas.director.settings import DirectorSettings


@dataclass(frozen=True)
class Account:
    """One configured cloud. `cloud` is None while it cannot be used; `reason` says why."""

    name: str
    title: str
    driver: str
    cloud: Cloud | None
    reason: str
    calls: asyncio.Semaphore
    """Bounds the calls under way."""


class Clouds:
    """All configured clouds by name."""

    def __init__(self, accounts: Mapping[str, Account], default: str) -> None:
        self.accounts = accounts
        self.default = default

    @classmethod
    def open(cls, settings: DirectorSettings, deployment: str, clock: Clock) -> "Clouds":
        """Make the drivers that the settings name. One that cannot be used is kept, with its reason."""
        kinds = discover(PACKAGE, "CLOUD", CloudType)
        accounts = {
            name: _open(name, dict(words), kinds, settings, deployment, clock)
            for name, words in settings.clouds.items()
        }
        if settings.default_cloud not in accounts:
            raise BadInputError(
                f"the default cloud '{settings.default_cloud}' is not configured",
                value=settings.default_cloud,
                hint=f"configured are: {', '.join(accounts) or 'none'}",
            )
        return cls(accounts, settings.default_cloud)

    def account(self, name: str) -> Account:
        """Return the cloud called `name`; raise NotFoundError for an unknown one."""
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

    async def close(self) -> None:
        """Release the drivers' connections; instances stay."""
        for account in self.accounts.values():
            if account.cloud is not None:
                await account.cloud.close()


def _open(
    name: str,
    words: dict[str, Any],
    kinds: Mapping[str, CloudType],
    settings: DirectorSettings,
    deployment: str,
    clock: Clock,
) -> Account:
    driver = str(words.pop("driver", name))
    title = words.pop("title", None)
    calls = asyncio.Semaphore(settings.cloud_calls)
    kind = kinds.get(driver)
    if kind is None:
        return Account(name, title or name, driver, None, f"there is no driver '{driver}'", calls)
    title = title or kind.title
    directory = settings.data_dir / "clouds" / name
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    try:
        own = kind.settings.model_validate(words)
        reason = kind.check(own)
        if reason:
            return Account(name, title, driver, None, reason, calls)
        context = CloudContext(name=name, deployment=deployment, directory=directory, clock=clock)
        return Account(name, title, driver, kind.driver(own, context), "", calls)
    except ValidationError as exc:
        return Account(name, title, driver, None, bad_input(exc).message, calls)
    except ConpaasError as exc:
        return Account(name, title, driver, None, exc.message, calls)
