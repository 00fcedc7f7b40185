"""Accounts at every kind of cloud, for the contract suites of clouds."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from conpaas.core.cloud import Cloud
from tests.contract._clouds import DRIVERS, fake_of
from tests.fakes.clouds import Harness


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Return the name of a driver, of each in turn."""
    return str(request.param)


@pytest.fixture
async def account(driver: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Harness]:
    """Give an account at a driver's provider; nothing that is logged meanwhile may hold its secrets."""
    module = fake_of(driver)
    with caplog.at_level(logging.INFO), capture_logs() as events:
        async with module.harness(tmp_path) as account:
            yield account
    logged = "\n".join([caplog.text, *map(str, events)])
    print(logged)
    for secret in getattr(module, "SECRETS", ()):
        assert secret not in logged


@pytest.fixture
async def cloud(account: Harness) -> AsyncIterator[Cloud]:
    """Give a driver of the account."""
    opened = account.open()
    yield opened
    await opened.close()


@pytest.fixture
async def foreign(account: Harness) -> AsyncIterator[str]:
    """Put somebody else's instance into the account; whatever happens, it is neither seen nor touched."""
    theirs = await account.make_foreign()
    yield theirs
    assert await account.lives(theirs)
