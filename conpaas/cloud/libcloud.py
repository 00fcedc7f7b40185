"""Other people's clouds by apache-libcloud: OpenStack first, and those of its providers that can be contextualized.

Only the settings are here: the driver, in `_libcloud_driver`, is imported when an account is opened.
"""

import importlib.util
from typing import Literal

from pydantic import Field, SecretStr

from conpaas.core.cloud import CloudType, Rate
from conpaas.core.messages.base import Message, Secret


class LibcloudSettings(Message):
    """An account at a provider that apache-libcloud knows."""

    provider: str = Field(default="openstack", pattern=r"^[a-z][a-z0-9_]{0,62}$")
    """Name of the provider in libcloud: `openstack`, `ec2`, `digitalocean`, …"""
    url: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Where the provider is asked: for OpenStack its identity service (Keystone); empty: where libcloud knows it."""
    key: str = ""
    """User name or id of the access key; empty for a provider that knows a token only."""
    secret: Secret = SecretStr("")
    """Password, access key or token."""
    project: str = ""
    """OpenStack's project, in older words the tenant."""
    domain: str = "Default"
    """OpenStack's domain, by name, of the user."""
    region: str = ""
    """Region of the provider; empty: libcloud's default one."""
    zone: str = ""
    """Where in the region to make what may be anywhere: availability zone, data centre or location, by id."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """More parameters of libcloud's driver for this provider, by their names there. They are shown: no secrets here."""
    image: str = Field(min_length=1)
    """Id of the image that instances start from."""
    size: str = ""
    """Size of those who do not choose one; empty: the cheapest."""
    networks: tuple[str, ...] = ()
    """Ids of the networks (at EC2: of one subnet) that instances are attached to; empty: the provider's default."""
    security_groups: tuple[str, ...] = ()
    """What lets traffic in: names of security groups, ids with EC2's subnet. They must open the instances' ports."""
    key_name: str = ""
    """Name (at DigitalOcean and Vultr: id) of the key whose owner may log in to instances; empty: nobody may."""
    address: Literal["auto", "public", "private"] = "auto"
    """By which of its addresses an instance is reached; `auto`: the public one where it has one."""
    volume_type: str = ""
    """Kind of disk that volumes are made of, as the provider calls it; empty: its default one."""
    ca_file: str = ""
    """Path of a PEM file that the provider's certificate is checked with; empty: what this computer trusts."""
    threads: int = Field(default=32, ge=4, le=256)
    """How many calls to the provider can be under way; libcloud blocks a thread for each."""


def _check(_settings: LibcloudSettings) -> str:
    return "" if importlib.util.find_spec("libcloud") else "the Python package apache-libcloud is not installed"


CLOUD = CloudType(
    name="libcloud",
    title="OpenStack and others",
    description="OpenStack, and other providers that apache-libcloud knows: DigitalOcean, Linode, Vultr, CloudStack, …",
    settings=LibcloudSettings,
    driver="conpaas.cloud._libcloud_driver:driver",
    check=_check,
    rates={  # careful ones: providers differ, and each create and delete reads before it changes
        "create": Rate(2, 5),
        "delete": Rate(4, 10),
        "describe": Rate(8, 20),
        "list": Rate(1, 5),
        "volumes": Rate(4, 10),
        "look": Rate(1, 10),
    },
)
