"""What the contract suite needs beside a driver: a provider to play with. Each driver has its own, `cloud_<driver>.py`.

A module of that name exports `harness(directory) -> AbstractAsyncContextManager[Harness]`.
"""

import json
from typing import Protocol

from conpaas.core.cloud import Cloud, VmRequest


class Harness(Protocol):
    """One account at a provider, for one test. Nothing of it is left after the test."""

    quota: int
    """How many instances the account has room for; at least 3, at most 10."""

    def open(self, deployment: str = "dep-ours") -> Cloud:
        """Make another driver for the same account."""

    async def kill(self, vm: str) -> None:
        """End an instance behind the driver's back; it is there to be deleted still."""

    async def make_foreign(self) -> str:
        """Put an instance of somebody else into the account; return its id at the cloud."""

    async def lives(self, vm: str) -> bool:
        """Tell whether an instance, anybody's, runs."""

    async def leftovers(self) -> list[str]:
        """Describe all that is at the provider but for its foreign instances: files, records, and the like."""


def request(token: str) -> VmRequest:
    """Return a request for an agent's instance."""
    return VmRequest(
        token=token,
        name=f"test {token}",
        context=lambda address: json.dumps({"kind": "agent", "instance": token, "address": address}),
    )
