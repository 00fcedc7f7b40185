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

import yarl
from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from aiohttp import web
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from pydantic import ValidationError

from conpaas.cloud._opennebula_model import image_trouble, number_of, render, text_of
from conpaas.cloud._opennebula_rpc import NameTakenError, Server
from conpaas.cloud.opennebula import OpenNebulaSettings, OpenNebulaSize
from conpaas.core import run, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CloudContext
from conpaas.core.errors import BadInputError, CloudRefusedError, ConpaasError, PeerError

BLOCK_BYTES = 512 * 1024
"""Of a snapshot, as the EBS direct APIs have it."""
UPLOADS = 32
"""Blocks that are under way at once."""
GIB = 1 << 30
CONVERT_S = 600.0
READY_S = 3600.0
ALLOCATE_S = 120.0
"""OpenNebula looks for the disk before it answers: 60 s, if nobody serves it."""
AWAY_S = 60.0
"""How long a server that copies an image may be away."""
IMAGE_READY, IMAGE_UNDER_WAY = {1, 2}, {0, 4, 9}
"""READY and USED; INIT, LOCKED and LOCKED_USED, which VMs wait for."""
MINE, ALL_IDS = -3, (-1, -1)


def main() -> None:
    """Run the program; leave with exit code 1 and one line on stderr for whatever a cloud refuses."""
    options = _parser().parse_args()
    try:
        print(asyncio.run(options.register(options, _manifest(options.image / "image.json"))))
    except KeyboardInterrupt:
        sys.exit("interrupted")
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


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict) or not {"name", "hash"} <= manifest.keys():
        raise BadInputError(f"{path} is not of an image: it has no name and hash")
    return manifest


def _name(options: argparse.Namespace, manifest: dict[str, Any]) -> str:
    return str(options.name or f"{manifest['name']}-{manifest['hash']}")


def _description(manifest: dict[str, Any]) -> str:
    """Return by what an image is known again: it names all that the image is made of."""
    return f"ConPaaS: managers, agents and engines ({manifest['hash']})"


# -- Amazon EC2 -----------------------------------------------------------------------------------------------------


async def register_ec2(options: argparse.Namespace, manifest: dict[str, Any]) -> str:
    """Make an AMI; what was made of it is removed if it fails. One of this very image is taken as it is."""
    name, description = _name(options, manifest), _description(manifest)
    session = AioSession()
    known = {"region_name": options.region, "endpoint_url": options.endpoint}
    config = AioConfig(max_pool_connections=UPLOADS, retries={"mode": "standard", "max_attempts": 8})
    async with (
        session.create_client("ebs", config=config, **known) as ebs,
        session.create_client("ec2", config=config, **known) as ec2,
    ):
        if before := await _ami_made_before(ec2, name, description):
            return before
        async with _raw(options.image) as disk:
            size_gib = -(-disk.stat().st_size // GIB)
            started = await ebs.start_snapshot(VolumeSize=size_gib, Description=name)
            snapshot = started["SnapshotId"]
            try:
                count = await _upload(ebs, snapshot, disk)
                await ebs.complete_snapshot(SnapshotId=snapshot, ChangedBlocksCount=count)
                await ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot])
                made = await ec2.register_image(**_ami(name, description, snapshot))
            except BaseException:
                try:
                    await ec2.delete_snapshot(SnapshotId=snapshot)
                except (ClientError, BotoCoreError) as exc:
                    print(f"The snapshot {snapshot} is left: {exc}. Remove it.", file=sys.stderr)
                raise
        return str(made["ImageId"])


async def _ami_made_before(ec2: Any, name: str, description: str) -> str:
    """Return the id of the AMI that was made of this very image; CloudRefusedError if it is of another one."""
    ours = {"Owners": ["self"], "Filters": [{"Name": "name", "Values": [name]}]}
    for found in (await ec2.describe_images(**ours))["Images"]:
        if found.get("Description") != description:
            raise CloudRefusedError(f"{found['ImageId']} has the name {name!r}", hint="choose another --name")
        return str(found["ImageId"])
    return ""


def _ami(name: str, description: str, snapshot: str) -> dict[str, Any]:
    """Return what Amazon is told of the image: it starts by BIOS or UEFI, and knows the second metadata protocol."""
    return {
        "Name": name,
        "Description": description,
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

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(UPLOADS):
                group.create_task(work(), name=f"upload {number}")
    except ExceptionGroup as exc:
        raise exc.exceptions[0] from None
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
    """Make an image of an OpenNebula's datastore, and wait until it is ready; if it does not become so, remove it.

    One that was made of this very image before is taken as it is.
    """
    server = Server(_opennebula(options.endpoint), _context(options.image))
    try:
        async with _path(options) as path:
            template = {
                "NAME": _name(options, manifest),
                "DESCRIPTION": _description(manifest),
                "TYPE": "OS",
                "PATH": path,
                "FORMAT": "qcow2",
                "DRIVER": "qcow2",  # before 6.0 the format is not looked for, but believed
                "DEV_PREFIX": "vd",
                "PERSISTENT": "NO",
            }
            try:
                number = int(await server.ask("one.image.allocate", render(template), options.datastore))
            except NameTakenError as exc:
                number = await _made_before(server, template, exc)
                await _ready(server, number)
            else:
                await _ready_or_removed(server, number)
        return str(number)
    finally:
        await server.close()


async def _made_before(server: Server, template: dict[str, str], taken: NameTakenError) -> int:
    """Return the id of the image that has the name; raise `taken` if it is not of this very image."""
    pool = await server.read("one.imagepool.info", MINE, *ALL_IDS)
    for image in pool.iterfind("IMAGE"):
        known = {"NAME": text_of(image, "NAME"), "DESCRIPTION": text_of(image, "TEMPLATE/DESCRIPTION")}
        if known.items() <= template.items():
            return number_of(image, "ID")
    raise CloudRefusedError(taken.message, hint="remove that image, or choose another --name", value=taken.value)


async def _ready_or_removed(server: Server, number: int) -> None:
    try:
        await _ready(server, number)
    except BaseException:
        try:
            await server.ask("one.image.delete", number)
        except ConpaasError as exc:
            print(f"Image {number} is left: {exc}. Remove it with 'oneimage delete {number}'.", file=sys.stderr)
        raise


async def _ready(server: Server, number: int) -> None:
    """Wait until an image can be used. A server that is away for a while may come back."""
    answered = SYSTEM_CLOCK.monotonic()

    async def look() -> bool | None:
        nonlocal answered
        try:
            image = await server.read("one.image.info", number)
        except PeerError:
            if SYSTEM_CLOCK.monotonic() - answered > AWAY_S:
                raise
            return None
        answered = SYSTEM_CLOCK.monotonic()
        state = number_of(image, "STATE")
        if state not in IMAGE_READY | IMAGE_UNDER_WAY:
            hint = f"if it is there still, remove it: 'oneimage delete {number}'"
            raise CloudRefusedError(f"image {number} is {image_trouble(image)}", hint=hint, value=number)
        return state in IMAGE_READY or None

    await tasks.wait_for(look, timeout_s=READY_S, what=f"image {number}", clock=SYSTEM_CLOCK, period_s=1)


def _opennebula(endpoint: str) -> OpenNebulaSettings:
    """Return an account as the driver has it, of which only endpoint, user and password are used here."""
    auth = Path(os.environ.get("ONE_AUTH", "~/.one/one_auth")).expanduser()
    user, _, password = auth.read_text(encoding="utf-8").strip().partition(":")
    if not (user and password):
        raise BadInputError(f"{auth} has no USER:PASSWORD")
    size = OpenNebulaSize(name="any", cpu=1, memory_mib=512)
    account = {"endpoint": endpoint, "user": user, "password": password}
    try:
        return OpenNebulaSettings.model_validate(account | {"image": 0, "networks": (0,), "sizes": (size,)})
    except ValidationError as exc:
        wrong = "; ".join(f"{one['loc'][0]}: {one['msg']}" for one in exc.errors(include_input=False))
        raise BadInputError(wrong, hint="an endpoint is such as https://one.example.org:2633/RPC2") from None


def _context(folder: Path) -> CloudContext:
    return CloudContext(
        name="opennebula", deployment="image", directory=folder, clock=SYSTEM_CLOCK, deadline_s=ALLOCATE_S
    )


@contextlib.asynccontextmanager
async def _path(options: argparse.Namespace) -> AsyncIterator[str]:
    """Give what the front-end finds the disk by; with `--serve`, a URL of our own as long as it is needed."""
    if options.path:
        yield options.path
        return

    file = options.image / "base.qcow2"
    file.stat()  # raises if it is not there

    async def disk(_: web.Request) -> web.FileResponse:
        return web.FileResponse(file)

    app = web.Application()
    app.router.add_get("/base.qcow2", disk)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, options.serve, 0).start()
        port = runner.addresses[0][1]
        yield str(yarl.URL.build(scheme="http", host=options.serve, port=port, path="/base.qcow2"))
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    main()
