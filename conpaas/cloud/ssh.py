"""The ssh cloud: machines that the user already has, reached by SSH, each of them for one instance at a time."""

from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints, model_validator

from conpaas.core.cloud import CloudType
from conpaas.core.messages.base import Message, Secret

SafePath = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/-]{1,200}$")]
"""An absolute path without a character that means something to a shell or to systemd."""
Program = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]{1,200}$")]


class SshHost(Message):
    """One machine."""

    address: IPv4Address | IPv6Address
    """Where the director and other instances reach it; not a name, for every node must know it."""
    port: int = Field(default=22, ge=1, le=65535)
    """Of its SSH server."""
    user: str = Field(default="root", min_length=1)
    """To log in as: root, or one with passwordless sudo."""
    key: Secret | None = Field(default=None, json_schema_extra={"contentMediaType": "application/x-pem-file"})
    """Private key of this host alone; none: the cloud's."""
    host_key: str = ""
    """Its public host key: a line of `known_hosts` or of `/etc/ssh/ssh_host_*_key.pub`."""
    listen: str = ""
    """Where the daemon listens, if the machine itself does not have `address`: `0.0.0.0` behind a router."""
    python: Program = "python3"
    """Its Python, 3.11 or newer and of the same release as the director's."""
    directory: SafePath = "/opt/conpaas"
    """Where everything of ours is kept on it, and removed from when it is given back."""
    unit_directory: SafePath = "/etc/systemd/system"
    """Where its systemd units are."""
    policy_file: SafePath = "/usr/sbin/policy-rc.d"
    """What its Debian asks before it starts a server that it has just installed."""
    os_release: SafePath = "/etc/os-release"
    """Which tells what system it has."""
    price: Decimal | None = Field(default=None, ge=0)
    """What an hour of it costs; none: nothing is said about it."""

    @property
    def name(self) -> str:
        """What it is called in ids and messages."""
        return f"{self.address}:{self.port}" if self.address.version == 4 else f"[{self.address}]:{self.port}"


class SshSettings(Message):
    """Machines that you already have."""

    hosts: tuple[SshHost, ...] = Field(min_length=1)
    """The machines; each carries at most one instance."""
    key: Secret | None = Field(default=None, json_schema_extra={"contentMediaType": "application/x-pem-file"})
    """Private key to log in with, as OpenSSH writes it, without a passphrase."""
    key_file: Path | None = None
    """Or the path of one on the director's computer."""
    trust_unknown_hosts: bool = False
    """Accept a host without `host_key` as whoever answers first, and only that one from then on."""
    as_root: bool = True
    """Use root's rights: to install engines, and to run each daemon as a user of its own.

    Without, the engines must be installed already, and the daemon is the login user's.
    """
    install_engines: bool = True
    """Install the missing engines of the instance's service type, by apt-get."""
    remove_packages: bool = False
    """Remove the Debian packages again that an instance has brought, when the host is given back."""
    systemd: Literal["auto", "yes", "no"] = "auto"
    """Let systemd start the daemon, also after a restart of the machine; `auto`: where it runs."""
    disk_mib: NonNegativeInt = 1024
    """How much of its disk must be free, in MiB."""
    memory_mib: NonNegativeInt = 256
    """How much of its memory must be free, in MiB."""
    connect_s: PositiveFloat = 15.0
    """How long connecting and logging in may take, in seconds."""
    stop_s: PositiveFloat = 20.0
    """How long a deletion waits until the host is clean, in seconds; that goes on by itself if it takes longer."""
    max_connections: PositiveInt = 64
    """How many hosts are kept connected."""
    currency: str = "USD"
    """Of the prices."""
    command: tuple[str, ...] = ()
    """Run this instead of a ConPaaS daemon, which is not copied then."""

    @model_validator(mode="after")
    def _complete(self) -> "SshSettings":
        names = [host.name for host in self.hosts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is named twice")
        if self.key is None and self.key_file is None and any(host.key is None for host in self.hosts):
            raise ValueError("a private key is needed: set 'key' or 'key_file'")
        unknown = [host.name for host in self.hosts if not host.host_key]
        if unknown and not self.trust_unknown_hosts:
            raise ValueError(f"the host key of {unknown[0]} is needed: 'ssh-keyscan' shows it; compare it on the host")
        return self


CLOUD = CloudType(
    name="ssh",
    title="Your own machines",
    settings=SshSettings,
    driver="conpaas.cloud._ssh_driver:SshCloud",
    description="Machines with Debian or Ubuntu that you already have, prepared over SSH and given back clean.",
)
