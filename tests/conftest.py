"""What every test gets: the outside plug-in of the tests, and addresses that no other test uses."""

import asyncio
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

PLUGINS = Path(__file__).parent / "fakes" / "plugins"
sys.path.insert(0, str(PLUGINS))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGINS), os.environ.get("PYTHONPATH")]))

# Python 3.11 would make a loop that nobody closes when pytest-asyncio asks for the current one.
asyncio.set_event_loop(None)

# How long an example takes says how busy this computer is.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

_counter = itertools.count(1)


@pytest.fixture
def new_address() -> Callable[[], str]:
    """Return a maker of loopback addresses that this test has for itself, also among parallel workers."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])

    def make() -> str:
        number = next(_counter)
        return f"127.{101 + worker}.{(os.getpid() + number // 250) % 250}.{number % 250 + 2}"

    return make


@pytest.fixture
def address(new_address: Callable[[], str]) -> str:
    """Return one such address."""
    return new_address()
