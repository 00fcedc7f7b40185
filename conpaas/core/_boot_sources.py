"""Where a booting machine may find its context: a file, a disk with a known label, or a cloud's metadata service.

A disk is told by the label of its ISO 9660 or FAT file system, read from its first bytes. What it holds is read, never
run.
"""

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from conpaas.core import run
from conpaas.core._boot_network import Interface, Network, from_netplan, from_opennebula
from conpaas.core.errors import BadInputError, PeerError

FILE = Path("/etc/conpaas/context.json")
SEED = Path("/run/conpaas/seed")
"""Where seed disks are mounted while they are read."""
METADATA = "http://169.254.169.254"
METADATA_S = 2.0
MOUNT_S = 20.0
LABEL_BYTES = 34 * 1024
"""Of a disk: its label is among them."""
OPENNEBULA_CONTEXT = "CONPAAS_CONTEXT_BASE64"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A context document, as a source gave it."""

    where: str
    """In words: `NoCloud disk /dev/vdb`."""
    text: str
    network: Network | None = None
    """None: it is up already, or up to others."""
    host_name: str = ""


def read_file(path: Path = FILE) -> Found | None:
    """Return the context that a file holds, if it is there. Raises BadInputError."""
    return Found(where=str(path), text=_text(path)) if path.exists() else None


# -- labels ---------------------------------------------------------------------------------------------------------


def label(head: bytes) -> str:
    """Return the label of a file system that begins with `head` (LABEL_BYTES); empty if it has none that we know."""
    if head[32769:32774] == b"CD001":
        return head[32808:32840].decode("ascii", "replace").strip()
    if head[510:512] == b"\x55\xaa":
        for kind, start in ((b"FAT32", 71), (b"FAT1", 43)):
            if kind in head[start + 11 : start + 19]:
                return head[start : start + 11].decode("ascii", "replace").strip()
    return ""


def block_devices(folder: Path = Path("/sys/block")) -> Iterator[str]:
    """Yield the names of all disks and CDs, each followed by its partitions."""
    for disk in sorted(folder.iterdir()):
        if not disk.name.startswith(("loop", "ram", "zram", "dm-", "fd", "nbd")):
            yield disk.name
            yield from sorted(part.name for part in disk.iterdir() if (part / "partition").exists())


def labelled(devices: Iterator[str], folder: Path = Path("/dev")) -> dict[Path, str]:
    """Return the labels of these devices, lower case; one that cannot be read (a CD drive without a CD) has none."""
    found = {}
    for name in devices:
        with contextlib.suppress(OSError), (folder / name).open("rb") as device:
            found[folder / name] = label(device.read(LABEL_BYTES)).lower()
    return found


# -- disks ----------------------------------------------------------------------------------------------------------


def read_nocloud(folder: Path) -> tuple[str, Network, str]:
    """Read a NoCloud seed: context, network, host name. Raises BadInputError."""
    config, meta = folder / "network-config", folder / "meta-data"
    network = from_netplan(_text(config)) if config.exists() else Network()
    name = _HOST_NAME.search(_text(meta)) if meta.exists() else None
    return _text(folder / "user-data"), network, name[1] if name else ""


_HOST_NAME = re.compile(r"""["']?local-hostname["']?\s*:\s*["']?([\w.-]+)""")  # JSON, or a line of YAML


def read_opennebula(folder: Path) -> tuple[str, Network, str]:
    """Read a CONTEXT disk of OpenNebula. Raises BadInputError."""
    variables = parse_assignments(_text(folder / "context.sh"))
    encoded = variables.get(OPENNEBULA_CONTEXT, "")
    try:
        text = base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, ValueError) as exc:
        raise BadInputError(f"context.sh: {OPENNEBULA_CONTEXT} is no base64 of a text: {exc}") from exc
    if not text:
        raise BadInputError(f"context.sh has no {OPENNEBULA_CONTEXT}", value=", ".join(sorted(variables)))
    name = variables.get("SET_HOSTNAME") or variables.get("HOSTNAME", "")
    return text, from_opennebula(variables), name


def read_config_drive(folder: Path) -> tuple[str, Network, str]:
    """Read a config drive of OpenStack; addresses come by DHCP. Raises BadInputError."""
    return _text(folder / "openstack/latest/user_data"), Network(), ""


DISKS: Mapping[str, tuple[str, Callable[[Path], tuple[str, Network, str]]]] = {
    "cidata": ("NoCloud disk", read_nocloud),
    "context": ("OpenNebula disk", read_opennebula),
    "config-2": ("OpenStack disk", read_config_drive),
}
"""By label, lower case."""


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as exc:
        raise BadInputError(f"it has no file {path.name}", value=path.name) from exc
    except UnicodeDecodeError as exc:
        raise BadInputError(f"{path.name} is no text: {exc}", value=path.name) from exc


_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=")
_WORD_PART = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^\s'"\\;&|<>()$`#]+)""", re.S)


def parse_assignments(text: str) -> dict[str, str]:
    """Return the variables of shell assignments, as a shell would assign them; nothing is expanded or run.

    Quotes of both kinds, backslashes and values of several lines are understood; other lines, and values that end in
    what only a shell could tell, are left out.
    """
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _ASSIGNMENT.match(text, position)
        if match:
            value, position = _word(text, match.end())
            if text[position : position + 1] in {"", "\n", " ", "\t", ";", "\r"}:
                found[match[1]] = value
        position = _next_line(text, position)
    return found


def _next_line(text: str, position: int) -> int:
    return text.find("\n", position) + 1 or len(text)


def _word(text: str, position: int) -> tuple[str, int]:
    """Return the value of the shell word at `position`, and where it ends."""
    parts: list[str] = []
    while match := _WORD_PART.match(text, position):
        single, double, escaped, plain = match.groups()
        if double is not None:
            parts.append(re.sub(r'\\(["\\$`\n])', lambda one: one[1].replace("\n", ""), double))
        else:
            parts.append(single if single is not None else plain or escaped.replace("\n", ""))
        position = match.end()
    return "".join(parts), position


@contextlib.asynccontextmanager
async def _mounted(device: Path) -> AsyncIterator[Path]:
    SEED.mkdir(mode=0o700, parents=True, exist_ok=True)
    await run.run(["mount", "-o", "ro,nodev,nosuid,noexec", str(device), str(SEED)], timeout_s=MOUNT_S)
    try:
        yield SEED
    finally:
        await run.run(["umount", str(SEED)], timeout_s=MOUNT_S)


async def read_disk(device: Path, name: str) -> Found:
    """Read the seed disk labelled `name`. Raises BadInputError, CommandFailedError if it cannot be mounted."""
    kind, read = DISKS[name]
    async with _mounted(device) as folder:
        text, network, host_name = await asyncio.to_thread(read, folder)
    return Found(where=f"{kind} {device}", text=text, network=network, host_name=host_name)


# -- metadata services ----------------------------------------------------------------------------------------------


def is_ec2(folder: Path = Path("/sys/class/dmi/id")) -> bool:
    """Tell whether this machine says that it is one of Amazon EC2, or of an OpenStack."""
    words = " ".join(_dmi(folder, name) for name in ("sys_vendor", "product_name", "bios_version", "bios_vendor"))
    uuid = _dmi(folder, "product_uuid")
    return "amazon" in words or "openstack" in words or uuid.startswith("ec2")


def _dmi(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8", errors="replace").strip().lower()
    except OSError:
        return ""


FIRST_CARD = Network(interfaces=(Interface(name="eth0", dhcp=True),))


async def read_metadata(base: str = METADATA) -> Found | None:
    """Ask the metadata service for the user data; None if there is none. Raises PeerError if nobody answers.

    Version 2 of Amazon's protocol: a token first. A service that knows of no tokens (OpenStack's) is asked without.
    """
    timeout = aiohttp.ClientTimeout(total=METADATA_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            asked = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            async with session.put(f"{base}/latest/api/token", headers=asked) as answer:
                given = {"X-aws-ec2-metadata-token": await answer.text()} if answer.status == 200 else {}
            async with session.get(f"{base}/latest/user-data", headers=given) as answer:
                if answer.status == 404:
                    return None
                answer.raise_for_status()
                text = await answer.text("utf-8")
    except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError, OSError) as exc:
        raise PeerError(f"the metadata service at {base} does not answer: {str(exc) or 'too late'}") from exc
    return Found(where="metadata service", text=text) if text.strip() else None
