"""Virtual machines on the computer that the director runs on, by QEMU: no account, and nothing that needs root.

An instance has an address of its own in a block of the loopback network. QEMU forwards the ports of its roles from
there into the machine, so that director, local instances and other machines reach it as they reach each other. The way
out leads through QEMU's user network, in which 10.0.2.2 is this computer's 127.0.0.1. So that an instance reaches the
*other* addresses of this computer's loopback network too, its first boot gives that network up for itself:

    ip address del 127.0.0.1/8 dev lo; ip address add 127.0.0.1/32 dev lo
    sysctl net.ipv4.conf.all.route_localnet=1
    ip route add 127.0.0.0/8 via 10.0.2.2 src 10.0.2.15

It is told to by the seed: `network-config` of a `nocloud` seed is JSON, `{"version": 2, "ethernets": {"eth0": {"match":
{"macaddress": …}, "set-name": "eth0", "addresses": ["10.0.2.15/24"], "routes": [{"to": "default", "via": …}],
"nameservers": {"addresses": […]}}}, "conpaas": {"loopback_via": "10.0.2.2"}}`; `context.sh` of a `context` seed has
`CONPAAS_LOOPBACK_VIA` beside `ETH0_IP`, `ETH0_MASK`, `ETH0_GATEWAY`, `ETH0_DNS`, `ETH0_MAC` and `SET_HOSTNAME`.

Only the settings are here: the driver, in `_qemu_driver`, is imported when an account is opened.
"""

import sys
from decimal import Decimal
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from conpaas.core import run
from conpaas.core.cloud import CloudType
from conpaas.core.messages.base import Message


class QemuSize(Message):
    """A kind of virtual machine."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,30}$")
    cores: int = Field(default=1, ge=1, le=64)
    memory_mib: int = Field(default=512, ge=32)
    """In MiB."""
    disk_gib: NonNegativeInt = 8
    """In GiB; it takes only the room that is written to. Never smaller than the image's own disk."""
    price: Decimal = Field(default=Decimal(0), ge=0)
    """Per hour."""


class QemuSettings(Message):
    """Virtual machines on this computer."""

    image: Path
    """Folder of the image that instances start from, as `bootstrap/image/build` makes it."""
    seed: Literal["nocloud", "context"] = "nocloud"
    """How an instance is told who it is: by a disk as cloud-init reads it, or as OpenNebula gives it."""
    sizes: tuple[QemuSize, ...] = Field(default=(QemuSize(name="small"),), min_length=1)
    """Kinds of machines to choose from; the first is the default."""
    currency: str = "USD"
    """Of the prices."""
    max_instances: PositiveInt = 16
    """How many instances there may be at once."""
    memory_mib: NonNegativeInt = 0
    """How much memory all instances may have together, in MiB; 0: three quarters of this computer's."""
    reserve_mib: NonNegativeInt = 1024
    """How much of the disk stays free, in MiB: with less, no instance and no volume is made."""
    block: IPv4Network = IPv4Network("127.43.0.0/16")
    """Where instances get their addresses from, within 127.0.0.0/8; not the local cloud's block."""
    boots: NonNegativeInt = 0
    """How many instances boot at once, the others wait; 0: as many as this computer has cores."""
    boot_s: PositiveFloat = 60.0
    """After how many seconds an instance that does not say that it has booted no longer keeps others from it."""
    acceleration: Literal["auto", "kvm", "tcg"] = "auto"
    """`kvm`: by the processor; `tcg`: in software, slow, everywhere; `auto`: KVM if a trial shows that it works."""
    warm: bool = True
    """Boot an image that allows it only once for each size: further instances continue from its saved memory."""
    uid_base: int = Field(default=0x7000_0000, ge=1000, le=0x7F00_0000)
    """Started by root, an instance's QEMU runs under this user id plus the lower 24 bits of its address."""

    @field_validator("block")
    @classmethod
    def _is_loopback(cls, block: IPv4Network) -> IPv4Network:
        if not block.subnet_of(IPv4Network("127.0.0.0/8")) or block.prefixlen > 30:
            raise ValueError("must be a network of at least 4 addresses within 127.0.0.0/8")
        return block

    @field_validator("sizes")
    @classmethod
    def _differ(cls, sizes: tuple[QemuSize, ...]) -> tuple[QemuSize, ...]:
        if len({size.name for size in sizes}) != len(sizes):
            raise ValueError("must have different names")
        return sizes

    @field_validator("image")
    @classmethod
    def _is_absolute(cls, image: Path) -> Path:
        if not image.expanduser().is_absolute():
            raise ValueError("must be an absolute path")
        return image.expanduser()


def _check(settings: QemuSettings) -> str:
    if sys.platform != "linux":
        return "it needs Linux"
    if run.find("qemu-system-x86_64") is None:
        return "QEMU is not installed: 'apt install qemu-system-x86'"
    if not (settings.image / "image.json").exists():
        return f"there is no image in {settings.image}: make one with 'bootstrap/image/build --out {settings.image}'"
    return ""


CLOUD = CloudType(
    name="qemu",
    title="Virtual machines on this computer",
    settings=QemuSettings,
    driver="conpaas.cloud._qemu_driver:QemuCloud",
    check=_check,
    description="Virtual machines by QEMU on the computer that the director runs on: no account, no privileges.",
    host_alias="10.0.2.2",
)
