"""What a first boot changes on its machine besides the network: names, clock, randomness, disk, user."""

import contextlib
import fcntl
import hashlib
import os
import pwd
import random
import re
import socket
import ssl
import struct
import time
from pathlib import Path

from conpaas.core import files, run
from conpaas.core._boot_network import write_etc
from conpaas.core.errors import BadInputError

USER = "conpaas"
"""Who runs the daemon, and so the engines."""
MOUNTS = "/opt/conpaas/mounts"
"""Where USER finds programs that do what only root can do: see `_boot_mounts`."""
CLOCK_OFF_S = 2.0
GROW_BYTES = 64 << 20
"""Less than this is not worth the time."""
GROW_S = 120.0
DRIVERS_S = 60.0
_ADD_ENTROPY, _RESEED = 0x40085203, 0x5207  # RNDADDENTROPY, RNDRESEEDCRNG of linux/random.h


def host_name(wanted: str) -> str:
    """Return `wanted` as a host name may be: letters, digits and hyphens, at most 63."""
    return re.sub(r"[^a-z0-9-]+", "-", wanted.lower())[:63].strip("-") or "conpaas"


def name_machine(wanted: str, instance: str) -> None:
    """Set the host name, and the machine id, which machines that were cloned while they ran would share."""
    name = host_name(wanted)
    socket.sethostname(name)
    write_etc("hostname", f"{name}\n")
    write_etc("hosts", f"127.0.0.1 localhost {name}\n::1 localhost ip6-localhost\n")
    write_etc("machine-id", hashlib.sha256(instance.encode()).hexdigest()[:32] + "\n")


def set_clock(rtc: Path = Path("/sys/class/rtc/rtc0/since_epoch")) -> None:
    """Set the clock by the hardware's: a machine that goes on from a saved state still has the time of its saving."""
    try:
        hardware = int(rtc.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such clock: the hypervisor's is the kernel's own
        return
    if abs(hardware - time.time()) > CLOCK_OFF_S:
        time.clock_settime(time.CLOCK_REALTIME, hardware)


def stir(secret: bytes, device: Path = Path("/dev/urandom")) -> None:
    """Make randomness our own: a machine that goes on from a saved state would draw what its clones draw.

    `secret` is known to this machine and its director alone. Kernel, OpenSSL and `random` are seeded anew.
    """
    drop = hashlib.sha512(secret + str(time.time_ns()).encode()).digest()
    with device.open("wb") as kernel:
        fcntl.ioctl(kernel, _ADD_ENTROPY, struct.pack("ii", 256, len(drop)) + drop)
        fcntl.ioctl(kernel, _RESEED)
    ssl.RAND_add(os.urandom(64) + drop, 64.0)
    random.seed(os.urandom(32))


async def load_drivers(devices: Path = Path("/sys/devices")) -> None:
    """Load the drivers of all that is here: the initial RAM disk was content with less.

    Those of SCSI disks and CDs, too: what their controllers find appears later.
    """
    names = {path.read_text(encoding="ascii", errors="replace").strip() for path in devices.rglob("modalias")}
    names |= {"sd_mod", "sr_mod"}
    argv = ["modprobe", "--all", "--use-blacklist", "--quiet", *sorted(names - {""})]
    await run.run(argv, timeout_s=DRIVERS_S, check=False)


async def name_disks() -> None:
    """Have udev name the disks that are here, and give volumes to USER, before somebody asks for them."""
    await run.run(["systemctl", "start", "systemd-udevd.service"], timeout_s=DRIVERS_S)
    await run.run(["udevadm", "trigger", "--subsystem-match=block", "--settle"], timeout_s=DRIVERS_S)


async def grow_root(sys: Path = Path("/sys/dev/block")) -> str:
    """Grow the last partition, which is the root file system's, to the end of its disk; return what was done.

    Raises CommandFailedError.
    """
    status = Path("/").stat()
    partition = (sys / f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}").resolve()
    disk = partition.parent
    if not (partition / "partition").exists():
        return ""
    end = _sectors(partition, "start") + _sectors(partition, "size")
    if (_sectors(disk, "size") - end) * 512 < GROW_BYTES:
        return ""
    number = (partition / "partition").read_text(encoding="ascii").strip()
    device, whole = f"/dev/{partition.name}", f"/dev/{disk.name}"
    await run.run(["sfdisk", "--no-reread", "--force", "-N", number, whole], stdin=b",+\n", timeout_s=GROW_S)
    await run.run(["partx", "--update", "--nr", number, whole], timeout_s=GROW_S)
    await run.run(["resize2fs", device], timeout_s=GROW_S)
    return f"{device} has {_sectors(partition, 'size') >> 21} GiB"


def _sectors(device: Path, what: str) -> int:
    return int((device / what).read_text(encoding="ascii"))


def folder_for(instance: str, home: Path) -> Path:
    """Make the daemon's own folder, which belongs to USER, and return it.

    After a reboot it is there already, with what USER has put in it: no link is followed.
    Raises BadInputError, OSError.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", instance):
        raise BadInputError(f"{instance[:80]!r} is no name of an instance", value=instance[:200])
    user = pwd.getpwnam(USER)
    current = os.open(home, os.O_PATH | os.O_DIRECTORY)
    try:
        for name in (instance, "logs", "daemon"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o750, dir_fd=current)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            os.close(current)
            current = inner
            os.fchown(current, user.pw_uid, user.pw_gid)
    finally:
        os.close(current)
    return home / instance


def give(path: Path, text: str) -> None:
    """Write a file that only USER can read."""
    files.write_atomically(path, text, mode=0o600)
    user = pwd.getpwnam(USER)
    os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def become_user() -> None:
    """Give up root's rights for good; nothing happens if they were given up before."""
    if os.geteuid() != 0:
        return
    user = pwd.getpwnam(USER)
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    path = f"{MOUNTS}:{os.environ.get('PATH', os.defpath)}"
    os.environ.update(HOME=user.pw_dir, USER=USER, LOGNAME=USER, PATH=path)
