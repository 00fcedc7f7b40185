"""A tiny test machine with a real kernel: Debian's for clouds, busybox, and a first boot of forty lines.

It boots in about two seconds in software, does with its seed what the real image does, and answers on port 8080:

    /cgi-bin/context             the document that it was given
    /cgi-bin/get?HOST PORT       what answers there, or the reason why nothing does
    /cgi-bin/disks               serial numbers of its disks
    /cgi-bin/write?SERIAL TEXT   writes to the disk; /cgi-bin/read?SERIAL reads it back

It is made once, from packages of the system that the tests run on, and kept in the user's cache; any kernel will do.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

KERNEL = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "isofs")
BUSYBOX = Path("/bin/busybox")

INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
find_seed() {
    for disk in /dev/vd?; do
        case "$(dd if=$disk bs=1 skip=32808 count=7 2>/dev/null)" in cidata*|CONTEXT*) seed=$disk; return;; esac
    done
    false
}
find_seed || echo "conpaas-boot: waiting"
until find_seed; do usleep 50000; done
mount -o ro -t iso9660 $seed /seed
echo "conpaas-boot: CONTEXT $seed"
cd /seed
if [ -e context.sh ]; then
    grep '^CONPAAS_CONTEXT_BASE64=' context.sh | cut -d"'" -f2 | base64 -d > /context
    via=$(grep '^CONPAAS_LOOPBACK_VIA=' context.sh | cut -d"'" -f2)
    hostname $(grep '^SET_HOSTNAME=' context.sh | cut -d"'" -f2)
else
    cp user-data /context
    via=$(sed 's/.*"loopback_via": "\([0-9.]*\)".*/\1/' network-config)
    hostname $(sed 's/.*"local-hostname": "\([^"]*\)".*/\1/' meta-data)
fi
ip link set lo up; ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
ip address del 127.0.0.1/8 dev lo; ip address add 127.0.0.1/32 dev lo
ip route add 127.0.0.0/8 via $via src 10.0.2.15
hostname > /www/index.html
httpd -p 10.0.2.15:8080 -h /www
echo "conpaas-boot: STARTING $(hostname)"
while :; do sleep 1000; done
"""

PAGES = {
    "context": "cat /context",
    "get": 'printf "GET / HTTP/1.0\\r\\n\\r\\n" | nc -w 3 ${QUERY_STRING%%+*} ${QUERY_STRING##*+} 2>&1',
    "disks": "for disk in /sys/block/vd*; do cat $disk/serial; echo; done",
    "write": "echo ${QUERY_STRING##*+} | dd of=$(disk ${QUERY_STRING%%+*}) conv=fsync 2>&1",
    "read": "dd if=$(disk $QUERY_STRING) bs=64 count=1 2>/dev/null | head -n 1",
}
PAGE = """#!/bin/busybox sh
disk() { echo /dev/$(basename $(dirname $(grep -lx "$1" /sys/block/vd*/serial))); }
echo "Content-Type: text/plain"
echo
%s
"""


@functools.cache
def tiny_image() -> Path:
    """Return the folder of the image; make it if it has not been made of the same things before."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "conpaas"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "tiny-image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        digest = hashlib.sha256(Path(__file__).read_bytes() + BUSYBOX.read_bytes()).hexdigest()
        image = cache / f"tiny-image-{digest[:16]}"
        if not image.exists():
            with tempfile.TemporaryDirectory(dir=cache) as work:
                _make(Path(work), digest)
                (Path(work) / "image").rename(image)
        return image


def _output(*argv: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(argv, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def _kernel_package() -> str:
    """Return the name of Debian's present kernel for clouds."""
    depends = re.search(r"Depends: (linux-image-\S+)", _output("apt-cache", "depends", KERNEL))
    assert depends, f"apt knows no {KERNEL}: 'apt-get update'"
    return depends[1]


def _make(work: Path, digest: str) -> None:
    _output("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", _kernel_package(), cwd=work)
    (deb,) = work.glob("*.deb")
    _output("dpkg-deb", "-x", deb, work / "tree")
    image = work / "image"
    image.mkdir()
    (kernel,) = (work / "tree/boot").glob("vmlinuz-*")
    shutil.copy(kernel, image / "vmlinuz")
    (image / "initrd").write_bytes(_archive(_files(work / "tree")))
    _output("qemu-img", "create", "-q", "-f", "qcow2", image / "base.qcow2", "64M")
    words = {
        "name": "tiny-linux",
        "hash": digest,
        "cmdline": "console=ttyS0 mitigations=off nokaslr cryptomgr.notests panic=1 quiet",
        "warm": True,
    }
    (image / "image.json").write_text(json.dumps(words))


def _files(tree: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield what is in the machine's memory: name, mode, content."""
    for folder in ("bin", "dev", "modules", "proc", "seed", "sys", "tmp", "www", "www/cgi-bin"):
        yield folder, 0o040755, b""
    yield "init", 0o100755, INIT.encode()
    yield "bin/busybox", 0o100755, BUSYBOX.read_bytes()
    for name, script in PAGES.items():
        yield f"www/cgi-bin/{name}", 0o100755, (PAGE % script).encode()
    order: dict[str, bytes] = {}
    known = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    for module in MODULES:
        _with_dependencies(module, known, order)
    for name, content in order.items():
        yield f"modules/{name}.ko", 0o100644, content
    yield "modules/order", 0o100644, "".join(f"{name}.ko\n" for name in order).encode()


def _with_dependencies(module: str, known: dict[str, Path], order: dict[str, bytes]) -> None:
    """Put a module into the order of loading, behind those that it needs."""
    content = known[module].read_bytes()
    depends = re.search(rb"\0depends=([^\0]*)\0", content)
    for needed in depends[1].decode().split(",") if depends else []:
        if needed and needed not in order:
            _with_dependencies(needed.replace("-", "_"), known, order)
    order[module] = content


def _archive(entries: Iterator[tuple[str, int, bytes]]) -> bytes:
    """Return a cpio archive in the form that the kernel unpacks (newc)."""
    parts = []
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        parts += [head, b"\0" * (-len(head) % 4), content, b"\0" * (-len(content) % 4)]
    return b"".join(parts)
