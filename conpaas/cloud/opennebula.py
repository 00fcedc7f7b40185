"""OpenNebula, of versions 5.4 to 7.

Only the settings are here: the driver, in `_opennebula_driver`, is imported when an account is opened.
"""

from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from conpaas.core.cloud import CloudType, Rate
from conpaas.core.messages.base import Message, Secret


class OpenNebulaSize(Message):
    """A size of instances: OpenNebula itself has none."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")
    """What people choose it by: `small`."""
    cpu: PositiveFloat
    """Share of the host's processors that it is sure of: 0.5 is half of one."""
    vcpu: PositiveInt = 1
    """How many processors it sees."""
    memory_mib: PositiveInt
    """Its memory, in MiB."""
    price: Decimal | None = Field(default=None, ge=0)
    """Of an hour; none: nothing is asked."""


class OpenNebulaSettings(Message):
    """A user of an OpenNebula."""

    endpoint: str = Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")
    """URL of its XML-RPC interface, such as `https://one.example.org:2633/RPC2`."""
    user: str = Field(pattern=r"^[^\s:]+$")
    """Owns all that is made."""
    password: Secret = Field(min_length=1)
    """The user's password, or a login token."""
    template: NonNegativeInt | None = None
    """Id of the VM template that instances are made of; its CONTEXT is not used."""
    image: NonNegativeInt | None = None
    """Id of the image that instances start from, where there is no template for them."""
    networks: tuple[NonNegativeInt, ...] = ()
    """Ids of the virtual networks that instances are in; they are reached by their address in the first one.

    Empty: those of the template.
    """
    sizes: tuple[OpenNebulaSize, ...] = ()
    """Sizes to choose from; empty: the template's own processors and memory."""
    size: str = ""
    """Name of the size of those who do not choose one; empty: the first."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """Of the prices."""
    datastore: NonNegativeInt | None = None
    """Id of the image datastore that volumes are kept in; none: no volumes."""
    device_prefix: Literal["vd", "sd", "xvd"] = "vd"
    """What instances call the disks of volumes; `vd` is virtio."""
    security_groups: bool = False
    """Open the ports of each instance by a security group. The groups of its networks hold besides, and the default
    group opens all: take it off the networks first."""
    ssh_key: str = ""
    """Public key of who may log in to instances, if the image lets anybody."""
    verify: bool = True
    """Check the server's certificate."""
    ca_file: Path | None = None
    """Certificate authority of the server, in PEM, where it is not one that everybody knows."""

    @field_validator("ssh_key")
    @classmethod
    def _is_a_key(cls, key: str) -> str:
        if set(key) & set('$"\\\n'):
            raise ValueError('must be one line without `$`, `"` and `\\`')
        return key.strip()

    @model_validator(mode="after")
    def _makes_an_instance(self) -> "OpenNebulaSettings":
        if (self.template is None) == (self.image is None):
            raise ValueError("name either a template or an image")
        if self.image is not None and not (self.networks and self.sizes):
            raise ValueError("with an image, name networks and sizes too: there is no template that has them")
        if self.security_groups and not self.networks:
            raise ValueError("security_groups needs networks")
        return self

    @model_validator(mode="after")
    def _has_its_default_size(self) -> "OpenNebulaSettings":
        names = [size.name for size in self.sizes]
        if len(set(names)) < len(names):
            raise ValueError("two sizes have the same name")
        if self.size and self.size not in names:
            raise ValueError(f"there is no size {self.size!r} in sizes")
        return self


CLOUD = CloudType(
    name="opennebula",
    title="OpenNebula",
    description="Virtual machines at an OpenNebula, version 5.4 to 7, by a user of it.",
    settings=OpenNebulaSettings,
    driver="conpaas.cloud._opennebula_driver:open_account",
    rates={
        # A server on 2 cores made 84 VMs a second and described 480; each create and delete looks first.
        "create": Rate(40, 60),
        "delete": Rate(40, 60),
        "describe": Rate(100, 200),
        "list": Rate(2, 5),
        "volumes": Rate(20, 40),
        "look": Rate(5, 20),
    },
)
