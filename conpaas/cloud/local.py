"""The local cloud: an instance is a process tree with its own loopback address, directory and lifetime.

It needs no account and no privileges. Started by root, each instance runs under an unprivileged user id of its own;
where namespaces are allowed it has its own processes and sees no other instance's files; where they are not, it is a
plain process tree. All that is known of an instance is in its files, so that it outlives any driver:

    <directory>/.records/<id>.json   token, deployment, name, address
    <directory>/.records/<id>.pid    its first process, written when that begins
    <directory>/<id>/                its own files: context.json, <kind>.log, what its engines write
    <directory>/.volumes/            volumes that no instance has: see `_local_volumes`

An address belongs to whoever holds the abstract socket of its name: the driver while it creates, the first process for
as long as it lives. The kernel makes that exclusive on the whole machine, whichever director asks.
"""

import sys
from decimal import Decimal
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from conpaas.cloud import _local_machine as machine
from conpaas.core.cloud import CloudType
from conpaas.core.messages.base import Message


class LocalSettings(Message):
    """A local cloud."""

    block: IPv4Network = IPv4Network("127.42.0.0/16")
    """Where instances get their addresses from, within 127.0.0.0/8."""
    max_instances: PositiveInt = 64
    """How many instances there may be at once."""
    isolation: Literal["auto", "namespaces", "processes"] = "auto"
    """`namespaces`: own processes and mounts, or no instance; `processes`: a plain process tree; `auto`: what works."""
    uid_base: int = Field(default=0x7000_0000, ge=1000, le=0x7F00_0000)
    """Started by root, an instance's user id is this plus the lower 24 bits of its address.

    The default begins a range that no distribution uses.
    """
    hide: tuple[Path, ...] = ()
    """More directories that instances must not see; the folder of all instances is hidden in any case."""
    zygote: bool = True
    """Fork instances from a helper process that has loaded their code: they start in a tenth of the time."""
    preload: tuple[str, ...] = (
        "conpaas.core.daemon",
        "conpaas.core.keymaker",
        "conpaas.manager.app",
        "conpaas.agent.app",
    )
    """Modules that the helper process loads, besides those of the service types."""
    command: tuple[str, ...] = ()
    """Run this instead of a ConPaaS daemon; `{kind}`, `{context}` and `{address}` stand for the instance's own."""
    log_bytes: PositiveInt = 4 * 1024 * 1024
    """Size at which the daemon's log is replaced; one older log is kept."""
    stop_s: PositiveFloat = 10.0
    """How long a daemon may take to end when its instance is told to, in seconds. Deleting does not ask."""
    price: Decimal = Field(default=Decimal(0), ge=0)
    """Of one instance for an hour, for whoever wants to account for this machine."""

    @field_validator("block")
    @classmethod
    def _is_loopback(cls, block: IPv4Network) -> IPv4Network:
        if not block.subnet_of(IPv4Network("127.0.0.0/8")) or block.prefixlen > 30:
            raise ValueError("must be a network of at least 4 addresses within 127.0.0.0/8")
        return block


def _check(_settings: LocalSettings) -> str:
    if sys.platform != "linux":
        return "it needs Linux"
    reason = machine.inaccessible()
    return f"{reason}: {machine.INACCESSIBLE_HINT}" if reason else ""


CLOUD = CloudType(
    name="local",
    title="This machine",
    settings=LocalSettings,
    driver="conpaas.cloud._local_driver:LocalCloud",
    check=_check,
    description="Process trees on the computer that the director runs on: no account, no privileges, ready at once.",
    shares_code=True,
)
