"""What the contract suite needs beside a driver: a provider to play with. Each driver has its own, `cloud_<driver>.py`.

A module of that name exports

    harness(directory) -> AbstractAsyncContextManager[Harness]
    FAULTS: Mapping[str, frozenset[Fault]]     what can go wrong with this provider, by verb
    WORDS: Mapping[Fault, str]                 optional: what the provider says, to be found in the error's message
    SECRETS: tuple[str, ...]                   optional: of the account, to be found in no error and no log

A verb is a method of Cloud, of HasVolumes, or of what else the driver can do: `examine`, `sizes`, `console`, …
"""

import json
from enum import StrEnum
from typing import Protocol

from conpaas.core.cloud import Cloud, VmRequest, VolumeRequest


class Fault(StrEnum):
    """What a provider does on a bad day, and what its driver must make of it."""

    LOST_ANSWER = "lost answer"
    """The call takes effect, the connection breaks before the answer: PeerError."""
    LATE = "late answer"
    """The call takes effect, the answer comes after the deadline: DeadlineError."""
    HANG = "hang"
    """No effect, no answer: DeadlineError."""
    GARBAGE = "garbage"
    """No effect, and an answer that is not of the protocol: PeerError."""
    UNREACHABLE = "unreachable"
    """Nobody listens: PeerError."""
    THROTTLED = "throttled"
    """ThrottledError."""
    NO_CAPACITY = "no capacity"
    """NoCapacityError, or an instance that stays PENDING with a reason."""
    CREDENTIALS = "credentials"
    """The credentials are refused as if they had expired, and renewed after so many calls: CloudCredentialsError."""
    UNKNOWN_IMAGE = "unknown image"
    """UnknownImageError."""
    STALE = "stale"
    """Lists and descriptions do not know yet what was just made (for one answer each): no error.

    Asked for before a `create`, or before a `describe` or `list` that follows one.
    """
    NEVER_BOOTS = "never boots"
    """The next instance never runs, or nothing in it does: PENDING or RUNNING, no error."""
    NO_DISK = "no disk"
    """No room for another instance's disk: DiskFullError, or CloudRefusedError where a provider says so."""


class Harness(Protocol):
    """One account at a provider, for one test. Nothing of it is left after the test."""

    quota: int
    """How many instances the account has room for; at least 3, at most 10."""

    def open(self, deployment: str = "dep-ours") -> Cloud:
        """Make another driver for the same account.

        The deadline of a call that meets what only a deadline ends is a second or less, that of others long enough for
        a busy computer.
        """

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        """Let the next `times` calls of `verb` meet `fault`; calls of other verbs meet it or not, as is easier."""

    async def kill(self, vm: str) -> None:
        """End an instance behind the driver's back; it is there to be deleted still."""

    async def make_foreign(self) -> str:
        """Put an instance of somebody else into the account; return its id at the cloud."""

    async def lives(self, vm: str) -> bool:
        """Tell whether an instance, anybody's, runs."""

    async def leftovers(self) -> list[str]:
        """Describe all that is at the provider but for its foreign instances: volumes, files, records, and the like.

        What the driver makes once for a service or an account, and not for an instance, is none.
        """


def request(token: str) -> VmRequest:
    """Return a request for an agent's instance."""
    return VmRequest(
        token=token,
        name=f"test {token}",
        context=lambda address: json.dumps({"kind": "agent", "instance": token, "address": address}),
        ports=(8080,),
        inner_ports=(5555,),
        tags={"service": "svc-test", "kind": "agent"},
    )


def volume_request(token: str) -> VolumeRequest:
    """Return a request for a small volume."""
    return VolumeRequest(token=token, name=f"test {token}", size=1 << 30, tags={"service": "svc-test"})
