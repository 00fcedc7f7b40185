"""Disks as bytes, of which the `qemu` cloud makes instances: images, their overlays, seeds. No tool is needed."""

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from conpaas.core.errors import UnknownImageError
from conpaas.core.messages.base import Message

GUEST_ADDRESS, GUEST_PREFIX = "10.0.2.15", 24
GATEWAY, RESOLVER = "10.0.2.2", "10.0.2.3"
"""What QEMU's user network has by itself; the gateway is also this computer's 127.0.0.1."""
MAC = "52:54:00:10:02:15"
"""Of every instance: each is alone in its network."""

# -- images ---------------------------------------------------------------------------------------------------------


class Manifest(Message):
    """What `image.json` tells of an image. Unknown fields are for others."""

    name: str
    hash: str
    """Of all that the image was made of."""
    cmdline: str = "console=ttyS0 root=/dev/vda rw"
    """For its kernel, where that lies beside the disk."""
    warm: bool = False
    """Its first boot prints `waiting` if it finds no seed, and goes on as soon as a disk appears that is one."""
    waiting: str = "conpaas-boot: waiting"
    """What it then prints."""
    booted: str = "conpaas-boot: STARTING"
    """What it prints when its first boot is done, so that another instance may begin its own."""


class BaseImage(NamedTuple):
    """An image that instances can be made of."""

    manifest: Manifest
    disk: Path
    size: int
    """Of the disk, in bytes."""
    kernel: Path | None
    """None: it boots from the disk."""
    initrd: Path | None


def read_image(directory: Path) -> BaseImage:
    """Return the image in `directory`: `image.json`, `base.qcow2` and, if it has them, `vmlinuz` and `initrd`.

    Raises UnknownImageError that says what is missing or broken.
    """
    try:
        manifest = Manifest.model_validate_json((directory / "image.json").read_bytes(), extra="ignore")
        size = _read_size(directory / "base.qcow2")
        kernel, initrd = (_optional(directory / name) for name in ("vmlinuz", "initrd"))
    except OSError as exc:
        raise UnknownImageError(f"image {directory}: {exc.strerror}: {exc.filename}", value=str(directory)) from exc
    except ValidationError as exc:
        wrong = "; ".join(f"{'.'.join(map(str, error['loc'])) or 'it'}: {error['msg']}" for error in exc.errors())
        raise UnknownImageError(f"image {directory}: image.json is broken: {wrong}", value=str(directory)) from exc
    return BaseImage(manifest, directory.resolve() / "base.qcow2", size, kernel, initrd)


def _optional(path: Path) -> Path | None:
    if not path.exists():
        return None
    with path.open("rb"):  # or it says why not
        return path.resolve()


# -- qcow2: docs/interop/qcow2.txt of QEMU --------------------------------------------------------------------------

_QCOW2_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_HEADER_BYTES = 104
_REFCOUNT_ORDER = 4


def _read_size(disk: Path) -> int:
    """Return how large a disk the file is. UnknownImageError for one that is none, is cut off, or rests on another."""
    with disk.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        end = file.seek(0, 2)
    if len(head) < _HEADER_BYTES or not head.startswith(_QCOW2_MAGIC):
        raise UnknownImageError(f"image {disk} is no qcow2 disk", value=str(disk))
    _, _, backing, _, _, size, encryption, l1_entries, l1, *_ = _QCOW2_HEADER.unpack(head)
    if backing or encryption:
        raise UnknownImageError(f"image {disk} is {'part of another' if backing else 'encrypted'}", value=str(disk))
    if size == 0 or l1 + 8 * l1_entries > end:
        raise UnknownImageError(f"image {disk} is cut off", value=str(disk))
    return int(size)


def overlay(base: Path, size: int) -> bytes:
    """Return a qcow2 disk of `size` bytes that reads as `base`, a qcow2 disk too, until it is written to."""
    name = str(base).encode()
    l1_entries = -(-size // (_CLUSTER * (_CLUSTER // 8)))
    l1_clusters = -(-8 * l1_entries // _CLUSTER)
    extensions = _QCOW2_EXTENSION.pack(_BACKING_FORMAT, 5) + b"qcow2\0\0\0" + _QCOW2_EXTENSION.pack(0, 0)
    header = _QCOW2_HEADER.pack(
        _QCOW2_MAGIC,
        3,
        _HEADER_BYTES + len(extensions),  # the name of the base
        len(name),
        _CLUSTER_BITS,
        size,
        0,  # no encryption
        l1_entries,
        3 * _CLUSTER,  # the table of L2 tables: there are none yet
        _CLUSTER,  # the table of refcount blocks
        1,
        0,  # no snapshots
        0,
        0,  # no features: incompatible, compatible, clearing themselves
        0,
        0,
        _REFCOUNT_ORDER,
        _HEADER_BYTES,
    )
    blocks = struct.pack(">Q", 2 * _CLUSTER)
    refcounts = struct.pack(">H", 1) * (3 + l1_clusters)
    parts = (header + extensions + name, blocks, refcounts)
    return b"".join(part.ljust(_CLUSTER, b"\0") for part in parts) + bytes(l1_clusters * _CLUSTER)


# -- ISO 9660: ECMA-119 ---------------------------------------------------------------------------------------------

_SECTOR = 2048
_ROOT_SECTOR = 20
_ANY_TIME = b"0" * 16 + b"\0"


def _both(number: int, size: int) -> bytes:
    """Return a number in both byte orders."""
    return number.to_bytes(size, "little") + number.to_bytes(size, "big")


def _entry(name: bytes, sector: int, size: int, *, folder: bool = False) -> bytes:
    """Return a directory record."""
    head = b"\0" + _both(sector, 4) + _both(size, 4) + bytes(7) + bytes([2 if folder else 0, 0, 0]) + _both(1, 2)
    body = head + bytes([len(name)]) + name
    body += b"\0" * (len(body) % 2 == 0)  # with the byte before it, of even length
    return bytes([len(body) + 1]) + body


def iso9660(label: str, files: Mapping[str, bytes]) -> bytes:
    """Return a CD of these few files, with lower-case names as Linux shows them."""
    sector = _ROOT_SECTOR + 1
    root = [_entry(name, _ROOT_SECTOR, _SECTOR, folder=True) for name in (b"\0", b"\1")]
    data = b""
    for name, content in sorted(files.items()):
        identifier = name.upper() if "." in name else f"{name.upper()}."
        root.append(_entry(f"{identifier};1".encode("ascii"), sector + len(data) // _SECTOR, len(content)))
        data += content.ljust(-(-len(content) // _SECTOR) * _SECTOR, b"\0")
    paths = [
        b"\1\0" + _ROOT_SECTOR.to_bytes(4, order) + (1).to_bytes(2, order) + b"\0\0" for order in ("little", "big")
    ]
    volume = b"".join(
        [
            b"\1CD001\1\0" + b" " * 32 + label.encode("ascii").ljust(32) + bytes(8),
            _both(sector + len(data) // _SECTOR, 4) + bytes(32) + _both(1, 2) * 2 + _both(_SECTOR, 2),
            _both(len(paths[0]), 4) + (18).to_bytes(4, "little") + bytes(4) + (19).to_bytes(4, "big") + bytes(4),
            root[0] + b" " * (4 * 128 + 3 * 37) + _ANY_TIME * 4 + b"\1",
        ]
    )
    sectors = [volume, b"\xffCD001\1", *paths, b"".join(root)]
    return bytes(16 * _SECTOR) + b"".join(part.ljust(_SECTOR, b"\0") for part in sectors) + data


# -- seeds ----------------------------------------------------------------------------------------------------------


def _host_name(token: str) -> str:
    return token.replace("_", "-").strip("-").lower() or "instance"


def network_config() -> dict[str, Any]:
    """Return how an instance sets up its network: cloud-init's version 2, and what is our own."""
    interface = {
        "match": {"macaddress": MAC},
        "set-name": "eth0",
        "addresses": [f"{GUEST_ADDRESS}/{GUEST_PREFIX}"],
        "routes": [{"to": "default", "via": GATEWAY}],
        "nameservers": {"addresses": [RESOLVER]},
    }
    return {"version": 2, "ethernets": {"eth0": interface}, "conpaas": {"loopback_via": GATEWAY}}


def nocloud(token: str, context: str) -> bytes:
    """Return the seed disk of the kind that cloud-init calls NoCloud."""
    meta = {"instance-id": token, "local-hostname": _host_name(token)}
    return iso9660(
        "cidata",
        {
            "user-data": context.encode(),
            "meta-data": json.dumps(meta).encode(),
            "network-config": json.dumps(network_config()).encode(),
        },
    )


def opennebula(token: str, context: str) -> bytes:
    """Return the seed disk of the kind that OpenNebula gives its machines: shell assignments, nothing to escape."""
    variables = {
        "NETWORK": "YES",
        "ETH0_MAC": MAC,
        "ETH0_IP": GUEST_ADDRESS,
        "ETH0_MASK": "255.255.255.0",
        "ETH0_GATEWAY": GATEWAY,
        "ETH0_DNS": RESOLVER,
        "SET_HOSTNAME": _host_name(token),
        "CONPAAS_LOOPBACK_VIA": GATEWAY,
        "CONPAAS_CONTEXT_BASE64": base64.b64encode(context.encode()).decode(),
    }
    script = "".join(f"{name}='{value}'\n" for name, value in variables.items())
    return iso9660("CONTEXT", {"context.sh": script.encode()})
