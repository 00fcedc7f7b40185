"""Amazon EC2, and clouds that speak its interface.

Only the settings are here: the driver, in `_ec2_driver`, is imported when an account is opened.
"""

from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from typing import Literal

from pydantic import Field, NonNegativeInt, SecretStr, field_validator, model_validator

from conpaas.core.cloud import CloudType, Rate
from conpaas.core.messages.base import Message, Secret

OFFERED = ("t3.micro", "t3.small", "t3.medium", "t3.large", "m7i.large", "m7i.xlarge", "c7i.large", "r7i.large")


class Ec2Settings(Message):
    """An account at Amazon EC2, in one region."""

    region: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Such as `eu-west-1`."""
    access_key: str = ""
    """Id of the access key; empty: the credentials that the director's own computer has, such as an instance role."""
    secret_key: Secret = SecretStr("")
    """The access key itself."""
    session_token: Secret = SecretStr("")
    """Of temporary credentials, beside the two keys."""
    image: str = Field(pattern=r"^ami-[A-Za-z0-9]+$")
    """Id of the image that instances start from, in this region: `ami-…`."""
    size: str = "t3.small"
    """Instance type of those who do not choose one."""
    sizes: tuple[str, ...] = OFFERED
    """Instance types to choose from, beside `size`; a `*` stands for anything: `t3.*`."""
    disk_gib: NonNegativeInt = 0
    """Size of an instance's own disk in GiB, where the image's is smaller; 0: as large as the image."""
    encrypted: bool = True
    """Encrypt disks and volumes with the account's default key for them."""
    key_pair: str = ""
    """Name of the key pair whose owner may log in to instances; empty: nobody may."""
    subnets: tuple[str, ...] = ()
    """Ids of the subnets to make instances in, all of one VPC; empty: the default subnets of the region."""
    zone: str = ""
    """Where to make what may be anywhere; empty: where the first subnet is."""
    address: Literal["public", "private", "name"] = "name"
    """By what instances are reached: `public` or `private` IP address, or public DNS `name`.

    The name leads to the private address from within the VPC, and to the public one from elsewhere.
    """
    inner_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """From where the inner ports can be reached, beside the private addresses of the same service's instances.

    The director's own address belongs here; with `address` = `public` those of the other instances do too.
    """
    spot: bool = False
    """Rent spare capacity: cheaper, and taken away at two minutes' notice."""
    spot_max_price: Decimal | None = Field(default=None, gt=0)
    """Most to pay for an hour of a spot instance, in US dollars; none: as much as on demand."""
    prices: dict[str, Decimal] = Field(default_factory=dict)
    """Price of an hour, by instance type; goes before what Amazon's price list says."""
    endpoint: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """URL of another cloud's EC2 interface; empty: Amazon's in that region."""
    services_endpoint: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """URL of price list and quotas; empty: Amazon's, or with an `endpoint` of another cloud none."""
    page: int = Field(default=50, ge=5, le=100)
    """How many things to ask for in one call when all are listed. Reading a longer answer holds up everything else."""

    @field_validator("inner_networks")
    @classmethod
    def _few(cls, networks: tuple[IPv4Network | IPv6Network, ...]) -> tuple[IPv4Network | IPv6Network, ...]:
        if len(networks) > 8:
            raise ValueError("must be at most 8: Amazon allows 60 rules in all")
        return networks

    @model_validator(mode="after")
    def _whole_credentials(self) -> "Ec2Settings":
        if bool(self.access_key) != bool(self.secret_key.get_secret_value()):
            raise ValueError("access_key and secret_key go together")
        if self.session_token.get_secret_value() and not self.access_key:
            raise ValueError("session_token needs access_key and secret_key")
        return self


CLOUD = CloudType(
    name="ec2",
    title="Amazon EC2",
    description="Virtual machines at Amazon, or at a cloud that speaks Amazon's EC2 interface.",
    settings=Ec2Settings,
    driver="conpaas.cloud._ec2_driver:Ec2Cloud",
    rates={
        # Amazon's own limits (EC2 developer guide, "Request throttling") are, per account, region and action:
        # RunInstances 2/s after 5, other changes 5/s after 50 to 100, reading 20/s after 100. Others may use the
        # account too, and each create and delete reads before it changes.
        "create": Rate(2, 5),
        "delete": Rate(4, 40),
        "describe": Rate(10, 40),
        "list": Rate(1, 5),
        "volumes": Rate(4, 20),
        "look": Rate(4, 20),
    },
)
