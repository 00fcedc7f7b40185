"""Makes an image that `bootstrap/image/build` built known to a cloud, and prints its id there.

Amazon: the data of the disk goes block by block into a snapshot (EBS direct APIs: no bucket, no import role), of which
an AMI is made. OpenNebula: its datastore fetches the disk from a path of the front-end, or from us by HTTP.
Libcloud's clouds (OpenStack, …) take base.qcow2 by their own tools: docs/image.md.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from aiohttp import web
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

from conpaas.cloud._opennebula_model import render
from conpaas.cloud._opennebula_rpc import Server
from conpaas.cloud.opennebula import OpenNebulaSettings, OpenNebulaSize
from conpaas.core import run, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CloudContext
from conpaas.core.errors import CloudRefusedError, ConpaasError

BLOCK_BYTES = 512 * 1024
"""Of a snapshot, as the EBS direct APIs have it."""
UPLOADS = 32
"""Blocks that are under way at once."""
GIB = 1 << 30
CONVERT_S = 600.0
READY_S = 3600.0
IMAGE_READY, IMAGE_ERROR = "1", "5"


def main() -> None:
    """Run the program; leave with exit code 1 and one line on stderr for whatever a cloud refuses."""
    options = _parser().parse_args()
    try:
        manifest = json.loads((options.image / "image.json").read_bytes())
        print(asyncio.run(options.register(options, manifest)))
    except (BotoCoreError, ClientError, ConpaasError, OSError, ValueError) as exc:
        hint = getattr(exc, "hint", "")
        sys.exit(f"{exc}{f'. {hint}' if hint else ''}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bootstrap/image/register", description=__doc__)
    clouds = parser.add_subparsers(required=True)
    ec2 = clouds.add_parser("ec2", help="Amazon EC2; credentials as the AWS tools find them (AWS_PROFILE, …)")
    ec2.set_defaults(register=register_ec2)
    ec2.add_argument("--region", required=True)
    ec2.add_argument("--endpoint", help="URL of another cloud's interface")
    one = clouds.add_parser("opennebula", help="OpenNebula; USER:PASSWORD in the file that ONE_AUTH names")
    one.set_defaults(register=register_opennebula)
    one.add_argument("--endpoint", required=True, help="such as https://one.example.org:2633/RPC2")
    one.add_argument("--datastore", type=int, default=1, help="id of the image datastore (default: 1)")
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument("--path", help="where the front-end finds base.qcow2: a path there, or a URL")
    where.add_argument("--serve", metavar="ADDRESS", help="of this computer: it is fetched from here, by HTTP")
    for cloud in (ec2, one):
        cloud.add_argument("image", type=Path, help="the folder that bootstrap/image/build printed")
        cloud.add_argument("--name", help="of the image (default: from its version and hash)")
    return parser


def _name(options: argparse.Namespace, manifest: dict[str, Any]) -> str:
    return str(options.name or f"{manifest['name']}-{manifest['hash']}")


# -- Amazon EC2 -----------------------------------------------------------------------------------------------------


async def register_ec2(options: argparse.Namespace, manifest: dict[str, Any]) -> str:
    """Make an AMI; what was made of it is removed if it fails."""
    session = AioSession()
    known = {"region_name": options.region, "endpoint_url": options.endpoint}
    config = AioConfig(max_pool_connections=UPLOADS, retries={"mode": "standard", "max_attempts": 8})
    async with (
        session.create_client("ebs", config=config, **known) as ebs,
        session.create_client("ec2", config=config, **known) as ec2,
        _raw(options.image) as disk,
    ):
        size_gib = -(-disk.stat().st_size // GIB)
        started = await ebs.start_snapshot(VolumeSize=size_gib, Description=_name(options, manifest))
        snapshot = started["SnapshotId"]
        try:
            count = await _upload(ebs, snapshot, disk)
            await ebs.complete_snapshot(SnapshotId=snapshot, ChangedBlocksCount=count)
            await ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot])
            made = await ec2.register_image(**_ami(_name(options, manifest), snapshot))
        except BaseException:
            with contextlib.suppress(ClientError, BotoCoreError):
                await ec2.delete_snapshot(SnapshotId=snapshot)
            raise
        return str(made["ImageId"])


def _ami(name: str, snapshot: str) -> dict[str, Any]:
    """Return what Amazon is told of the image: it starts by BIOS or UEFI, and knows the second metadata protocol."""
    return {
        "Name": name,
        "Description": "ConPaaS: managers, agents and the engines of all services",
        "Architecture": "x86_64",
        "VirtualizationType": "hvm",
        "BootMode": "uefi-preferred",
        "EnaSupport": True,
        "ImdsSupport": "v2.0",
        "RootDeviceName": "/dev/xvda",
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/xvda",
                "Ebs": {"SnapshotId": snapshot, "VolumeType": "gp3", "DeleteOnTermination": True},
            }
        ],
    }


async def _upload(ebs: Any, snapshot: str, disk: Path) -> int:
    """Send every block that holds data; return how many that are."""
    blocks, count = _blocks(disk), 0

    async def work() -> None:
        nonlocal count
        for index, data in blocks:
            await ebs.put_snapshot_block(
                SnapshotId=snapshot,
                BlockIndex=index,
                BlockData=data,
                DataLength=len(data),
                Checksum=base64.b64encode(hashlib.sha256(data).digest()).decode(),
                ChecksumAlgorithm="SHA256",
            )
            count += 1

    async with asyncio.TaskGroup() as group:
        for number in range(UPLOADS):
            group.create_task(work(), name=f"upload {number}")
    return count


def _blocks(disk: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the blocks of a sparse file that are not all zeros, with their numbers."""
    with disk.open("rb") as file:
        end, position = file.seek(0, os.SEEK_END), 0
        while position < end:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA) // BLOCK_BYTES * BLOCK_BYTES
            except OSError:  # nothing but a hole is left
                return
            data = os.pread(file.fileno(), BLOCK_BYTES, position).ljust(BLOCK_BYTES, b"\0")
            if data.count(0) < BLOCK_BYTES:
                yield position // BLOCK_BYTES, data
            position += BLOCK_BYTES


@contextlib.asynccontextmanager
async def _raw(image: Path) -> AsyncIterator[Path]:
    """Give the disk as it is, sparse."""
    with tempfile.TemporaryDirectory(dir=image) as folder:
        disk = Path(folder, "disk.raw")
        await run.run(["qemu-img", "convert", "-O", "raw", str(image / "base.qcow2"), str(disk)], timeout_s=CONVERT_S)
        yield disk


# -- OpenNebula -----------------------------------------------------------------------------------------------------


async def register_opennebula(options: argparse.Namespace, manifest: dict[str, Any]) -> str:
    """Make an image of an OpenNebula's datastore, and wait until it is ready."""
    name = _name(options, manifest)
    server = Server(_opennebula(options.endpoint), _context(options.image))
    try:
        async with _path(options) as path:
            template = {
                "NAME": name,
                "TYPE": "OS",
                "PATH": path,
                "FORMAT": "qcow2",
                "DEV_PREFIX": "vd",
                "PERSISTENT": "NO",
                "DESCRIPTION": "ConPaaS: managers, agents and the engines of all services",
            }
            number = await server.ask("one.image.allocate", render(template), options.datastore)

            async def ready() -> int | None:
                found = await server.read("one.image.info", number)
                if found.findtext("STATE") == IMAGE_ERROR:
                    why = found.findtext("TEMPLATE/ERROR") or "its datastore does not say why"
                    raise CloudRefusedError(f"image {number}: {why}", value=number)
                return number if found.findtext("STATE") == IMAGE_READY else None

            await tasks.wait_for(ready, timeout_s=READY_S, what=f"image {number}", clock=SYSTEM_CLOCK, period_s=1)
        return str(number)
    finally:
        await server.close()


def _opennebula(endpoint: str) -> OpenNebulaSettings:
    """Return an account as the driver has it, of which only endpoint, user and password are used here."""
    auth = Path(os.environ.get("ONE_AUTH", "~/.one/one_auth")).expanduser()
    user, _, password = auth.read_text(encoding="utf-8").strip().partition(":")
    size = OpenNebulaSize(name="any", cpu=1, memory_mib=512)
    return OpenNebulaSettings.model_validate(
        {"endpoint": endpoint, "user": user, "password": password, "image": 0, "networks": (0,), "sizes": (size,)}
    )


def _context(folder: Path) -> CloudContext:
    return CloudContext(name="opennebula", deployment="image", directory=folder, clock=SYSTEM_CLOCK)


@contextlib.asynccontextmanager
async def _path(options: argparse.Namespace) -> AsyncIterator[str]:
    """Give what the front-end finds the disk by; with `--serve`, a URL of our own as long as it is needed."""
    if options.path:
        yield options.path
        return

    async def disk(_: web.Request) -> web.FileResponse:
        return web.FileResponse(options.image / "base.qcow2")

    app = web.Application()
    app.router.add_get("/base.qcow2", disk)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, options.serve, 0).start()
        yield f"http://{options.serve}:{runner.addresses[0][1]}/base.qcow2"
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    main()
