"""Images are made known to clouds by the real command; what cannot be finished is not left there."""

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from conpaas.core.run import Completed, run
from tests.fakes.cloud_opennebula import PASSWORD, OpenNebulaHarness, harness
from tests.fakes.clouds import Fault
from tests.fakes.opennebula_server import ERROR, LOCKED, READY, FakeImage
from tests.fakes.waiting import until

REGISTER = Path(__file__).parents[2] / "bootstrap/image/register"
GIB = 1 << 30


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return the folder of an image: a disk of 8 GiB, of which there is only the head."""
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "image.json").write_text(json.dumps({"name": "conpaas-3.1.0", "hash": "0123456789abcdef"}))
    (folder / "base.qcow2").write_bytes(b"QFI\xfb" + bytes(20) + (8 * GIB).to_bytes(8, "big") + bytes(480))
    return folder


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[OpenNebulaHarness]:
    async with harness(tmp_path) as account:
        account.server.lock_s = 0.0
        yield account


ARGV = (str(REGISTER), "--python", sys.executable)


async def register(*words: str | Path, **env: str | Path) -> Completed:
    known = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return await run([*ARGV, *map(str, words)], timeout_s=60, env=known, check=False)


def at(one: OpenNebulaHarness, image: Path, *words: str | Path) -> list[str | Path]:
    """Return the words of the command, by default with a path that the front-end can read."""
    where = words or ("--path", image / "base.qcow2")
    return ["opennebula", "--endpoint", one.server.endpoint, "--datastore", "101", *where, image]


async def register_at(
    one: OpenNebulaHarness, image: Path, *words: str | Path, auth: str = f"conpaas:{PASSWORD}"
) -> Completed:
    file = image.parent / "one_auth"
    file.write_text(f"{auth}\n")
    return await register(*at(one, image, *words), ONE_AUTH=file)


def images(one: OpenNebulaHarness) -> list[FakeImage]:
    """Return the images that are there besides the fake's own."""
    return [found for number, found in one.server.images.items() if number]


def said(done: Completed) -> str:
    """Return the one line that a failure prints."""
    assert (done.returncode, done.stdout) == (1, b""), done
    (line,) = done.stderr.decode().splitlines()
    return line


@pytest.mark.parametrize("version", ["5.4.0", "6.10.0.1"])
async def test_an_image_becomes_one_of_opennebula(one: OpenNebulaHarness, image: Path, version: str) -> None:
    one.server.version = version

    done = await register_at(one, image)

    assert done.returncode == 0, done.stderr
    (made,) = images(one)
    assert done.stdout.decode() == f"{made.number}\n"
    assert (made.name, made.type, made.persistent) == ("conpaas-3.1.0-0123456789abcdef", 0, False)
    assert (made.state, made.size, made.format) == (READY, 8 * 1024, "qcow2")
    # What is not believed since 6.0 must be told before: a host would take the disk for a raw one.
    assert dict(made.template).get("DRIVER") == ("qcow2" if version < "6" else None)
    assert one.server.complaints == []


async def test_the_front_end_may_fetch_the_disk_from_us(one: OpenNebulaHarness, image: Path) -> None:
    done = await register_at(one, image, "--serve", "127.0.0.1", "--name", "ours")

    assert done.returncode == 0, done.stderr
    (made,) = images(one)
    assert made.path.startswith("http://127.0.0.1:")
    assert (made.name, made.state, made.size) == ("ours", READY, 8 * 1024)


async def test_what_was_registered_before_is_taken_as_it_is(one: OpenNebulaHarness, image: Path) -> None:
    first, second = await register_at(one, image), await register_at(one, image)

    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert first.stdout == second.stdout
    assert len(images(one)) == 1


async def test_another_image_of_the_same_name_is_not_taken(one: OpenNebulaHarness, image: Path) -> None:
    await register_at(one, image, "--path", image / "base.qcow2", "--name", "ours")
    (image / "image.json").write_text(json.dumps({"name": "conpaas-3.1.0", "hash": "fedcba9876543210"}))

    line = said(await register_at(one, image, "--path", image / "base.qcow2", "--name", "ours"))

    assert "NAME is already taken by IMAGE 2" in line
    assert "choose another --name" in line
    assert [made.state for made in images(one)] == [READY]


async def test_a_wrong_password_is_refused_in_the_servers_words(one: OpenNebulaHarness, image: Path) -> None:
    line = said(await register_at(one, image, auth="conpaas:hunter2"))

    assert "[one.image.allocate] User couldn't be authenticated" in line
    assert "hunter2" not in line
    assert images(one) == []


async def test_a_file_without_user_and_password_is_named(one: OpenNebulaHarness, image: Path) -> None:
    line = said(await register_at(one, image, auth="conpaas"))

    assert line.startswith(f"{image.parent / 'one_auth'} has no USER:PASSWORD")
    assert one.server.calls == []


async def test_a_server_that_is_away_is_named(one: OpenNebulaHarness, image: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        one.server.endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/RPC2"

        assert one.server.endpoint.split("/")[2] in said(await register_at(one, image))


async def test_an_endpoint_that_is_none_is_named(image: Path) -> None:
    file = image.parent / "one_auth"
    file.write_text("conpaas:secret")

    words = ("opennebula", "--endpoint", "one.example.org", "--path", "/x", image)
    line = said(await register(*words, ONE_AUTH=file))

    assert line.startswith("endpoint: ")
    assert "secret" not in line


async def test_a_disk_that_the_front_end_does_not_find_is_said(one: OpenNebulaHarness, image: Path) -> None:
    assert "Cannot parse image SIZE: File not found" in said(await register_at(one, image, "--path", "/no/such/file"))


async def test_a_disk_that_is_not_here_is_not_served(one: OpenNebulaHarness, image: Path) -> None:
    (image / "base.qcow2").unlink()

    assert str(image / "base.qcow2") in said(await register_at(one, image, "--serve", "127.0.0.1"))
    assert one.server.calls == []


async def test_an_image_that_cannot_be_copied_is_removed_with_its_reason_told(
    one: OpenNebulaHarness, image: Path
) -> None:
    one.server.copy_fails = 1

    line = said(await register_at(one, image))

    assert "image 2 is ERROR" in line
    assert f"Error copying {image / 'base.qcow2'}" in line
    assert images(one) == []
    again = await register_at(one, image)
    assert again.returncode == 0, again.stderr


async def test_an_image_of_an_earlier_run_that_failed_is_named_and_left(one: OpenNebulaHarness, image: Path) -> None:
    await register_at(one, image)
    (made,) = images(one)
    made.state = ERROR

    assert f"oneimage delete {made.number}" in said(await register_at(one, image))
    assert images(one) == [made]


async def test_a_wait_that_is_interrupted_leaves_no_image(one: OpenNebulaHarness, image: Path) -> None:
    one.server.lock_s = 3600
    file = image.parent / "one_auth"
    file.write_text(f"conpaas:{PASSWORD}")
    argv = ["env", "--default-signal=INT", *ARGV, *map(str, at(one, image))]
    env = {**os.environ, "ONE_AUTH": str(file)}
    waiting = await asyncio.create_subprocess_exec(*argv, env=env, stdout=PIPE, stderr=PIPE)
    try:
        await until(lambda: one.server.counts["one.image.info"], timeout_s=40)
        assert [made.state for made in images(one)] == [LOCKED]
        waiting.send_signal(signal.SIGINT)
        async with asyncio.timeout(40):
            assert await waiting.communicate() == (b"", b"interrupted\n")
    finally:
        if waiting.returncode is None:
            waiting.kill()
            await waiting.wait()

    assert waiting.returncode == 1
    assert images(one) == []


async def test_a_run_that_was_killed_is_gone_on_with(one: OpenNebulaHarness, image: Path) -> None:
    one.server.lock_s = 3600
    waiting = asyncio.create_task(register_at(one, image))
    await until(lambda: one.server.counts["one.image.info"], timeout_s=40)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    (made,) = images(one)
    assert made.state == LOCKED

    made.state = READY

    assert (await register_at(one, image)).stdout.decode() == f"{made.number}\n"


async def test_an_answer_that_is_lost_while_it_waits_is_asked_for_again(one: OpenNebulaHarness, image: Path) -> None:
    one.server.faults["one.image.info"].extend([Fault.LOST_ANSWER, Fault.LOST_ANSWER, Fault.GARBAGE])

    done = await register_at(one, image)

    assert done.returncode == 0, done.stderr
    assert one.server.counts["one.image.info"] >= 4


async def test_an_image_that_is_used_at_once_is_ready(one: OpenNebulaHarness, image: Path) -> None:
    """A VM may wait for it: it is USED when it is copied, and never READY."""
    one.server.lock_s = 3600
    work = asyncio.create_task(register_at(one, image))
    await until(lambda: one.server.counts["one.image.info"], timeout_s=40)
    (made,) = images(one)
    made.state, made.vms = 2, [7]

    done = await work

    assert done.stdout.decode() == f"{made.number}\n"


async def test_a_folder_that_is_no_image_is_named(one: OpenNebulaHarness, image: Path) -> None:
    (image / "image.json").write_text("{}")

    assert str(image / "image.json") in said(await register_at(one, image))


# -- Amazon EC2 -----------------------------------------------------------------------------------------------------


class Amazon:
    """What of EC2 and the EBS direct APIs is called here: the first blocks are kept, then there is no room."""

    def __init__(self, blocks: int) -> None:
        self.room, self.images = blocks, ""
        self.told: list[str] = []

    async def ec2(self, request: web.Request) -> web.Response:
        action = str((await request.post())["Action"])
        self.told.append(action)
        items = f"<imagesSet>{self.images}</imagesSet>" if action == "DescribeImages" else "<return>true</return>"
        space = "http://ec2.amazonaws.com/doc/2016-11-15/"
        return web.Response(text=f'<{action}Response xmlns="{space}">{items}</{action}Response>')

    async def start(self, _: web.Request) -> web.Response:
        self.told.append("StartSnapshot")
        return web.json_response({"SnapshotId": "snap-1", "BlockSize": 1 << 19, "VolumeSize": 1}, status=201)

    async def put(self, request: web.Request) -> web.Response:
        await request.read()
        if self.room:
            self.room -= 1
            return web.json_response({}, status=201)
        refusal = {"message": "You are not authorized", "Reason": "UNAUTHORIZED_ACCOUNT"}
        return web.json_response(refusal, status=403, headers={"x-amzn-ErrorType": "AccessDeniedException"})


@asynccontextmanager
async def amazon(blocks: int = 0) -> AsyncIterator[tuple[Amazon, str]]:
    fake, app = Amazon(blocks), web.Application()
    app.router.add_post("/", fake.ec2)
    app.router.add_post("/snapshots", fake.start)
    app.router.add_put("/snapshots/{snapshot}/blocks/{block}", fake.put)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield fake, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def register_at_amazon(url: str, image: Path) -> Completed:
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    return await register("ec2", "--region", "eu-west-1", "--endpoint", url, image, **keys)


async def test_a_snapshot_that_amazon_refuses_to_fill_is_removed(image: Path) -> None:
    raw = image / "disk.raw"
    raw.write_bytes(b"x" * (4 << 20))
    await run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(image / "base.qcow2")], timeout_s=60)

    async with amazon(blocks=3) as (fake, url):
        line = said(await register_at_amazon(url, image))

    assert "(AccessDeniedException)" in line
    assert "You are not authorized" in line
    assert fake.told == ["DescribeImages", "StartSnapshot", "DeleteSnapshot"]


async def test_an_image_that_amazon_has_is_not_sent_again(image: Path) -> None:
    async with amazon() as (fake, url):
        about = "ConPaaS: managers, agents and engines (0123456789abcdef)"
        fake.images = f"<item><imageId>ami-1</imageId><description>{about}</description></item>"
        same = await register_at_amazon(url, image)
        fake.images = "<item><imageId>ami-2</imageId><description>theirs</description></item>"
        other = said(await register_at_amazon(url, image))

    assert (same.returncode, same.stdout) == (0, b"ami-1\n"), same.stderr
    assert "ami-2 has the name 'conpaas-3.1.0-0123456789abcdef'. choose another --name" in other
    assert fake.told == ["DescribeImages", "DescribeImages"]
