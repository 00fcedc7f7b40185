"""The image: booted by the `qemu` cloud, told who it is in several ways, enrolled, and serving pages.

Emulated machines are slow: one of these tests is run with all others, the rest by `bootstrap/test --image`.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import boto3  # type: ignore[import-untyped]
import pytest

from conpaas.cloud._qemu_driver import QemuCloud
from conpaas.cloud.qemu import QemuSettings
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import CloudContext, Vm, VmRequest, VmState, VolumeRequest
from conpaas.core.errors import ConpaasError, PeerError
from conpaas.core.messages.agent import GET_STATUS, LIST_LOGS, MOUNT, AgentStatus, Mount
from conpaas.core.messages.internal import MEMBER_PORT
from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.tasks import wait_for
from tests.fakes import ec2_moto
from tests.fakes.built_image import BUILD, built_image
from tests.fakes.registrar import Registrar, registrar
from tests.fakes.stand import Stand, agents, is_running, manager, stand

BOOT_S = 300.0
"""On a busy computer: an idle one takes 15 s."""
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
slow = pytest.mark.image
STAGES = ["CONTEXT", "NETWORK", "ENROLLING", "STARTING"]


class Cloud:
    """A `qemu` cloud and the part of a director that its machines need."""

    def __init__(self, office: Registrar, driver: QemuCloud) -> None:
        self.office, self.driver = office, driver

    async def create(self, token: str, **context: object) -> Vm:
        text = self.office.context(token, host="10.0.2.2", **context)  # type: ignore[arg-type]
        return await self.driver.create(
            VmRequest(token=token, name=token, context=lambda _: text, inner_ports=(MEMBER_PORT,))
        )

    async def status(self, vm: Vm) -> AgentStatus:
        """Wait until an instance's agent answers its manager."""
        client = self.office.manager_of(vm.token, f"https://{vm.address}:{MEMBER_PORT}")

        async def ask() -> AgentStatus | None:
            try:
                status: AgentStatus = await client.call(GET_STATUS, timeout_s=1.0)
            except PeerError:
                return None
            return status

        try:
            return await wait_for(ask, timeout_s=BOOT_S, what="the agent", clock=SYSTEM_CLOCK, period_s=0.3)
        except ConpaasError:
            raise AssertionError(await self.driver.console(vm.id)) from None
        finally:
            await client.close()

    async def said(self, vm: Vm, words: str) -> str:
        """Wait until an instance has said so on its console; return all that it has."""

        async def look() -> str | None:
            console = await self.driver.console(vm.id)
            return console if words in console else None

        try:
            return await wait_for(look, timeout_s=BOOT_S, what=words, clock=SYSTEM_CLOCK, period_s=0.3)
        except ConpaasError:
            raise AssertionError(await self.driver.console(vm.id)) from None

    def stages(self, instance: str) -> list[str]:
        return [stage for one, stage in self.office.reports if one == instance]


@asynccontextmanager
async def cloud(folder: Path, **settings: object) -> AsyncIterator[Cloud]:
    """Open a cloud of the image; at the end nothing of it is left."""
    given = {"image": built_image(), "warm": False, "memory_mib": 4096, "reserve_mib": 256, **settings}
    account = QemuSettings.model_validate(given)
    context = CloudContext(name="vms", deployment="dep-boot", directory=folder / "vms", clock=SYSTEM_CLOCK)
    async with registrar(folder / "office") as office:
        driver = QemuCloud(account, context)
        try:
            yield Cloud(office, driver)
        finally:
            for vm in await driver.list():
                await driver.delete(vm.id)
            await driver.close()


# -- one machine ----------------------------------------------------------------------------------------------------


async def test_a_machine_boots_finds_out_who_it_is_and_enrols(tmp_path: Path) -> None:
    async with cloud(tmp_path) as here:
        vm = await here.create("i-1")
        status = await here.status(vm)
        console = await here.driver.console(vm.id)

    assert (status.instance, status.roles) == ("i-1", {})
    assert here.office.enrolled == ["i-1"]
    assert here.stages("i-1")[:3] == STAGES[:3]
    assert "conpaas-boot: CONTEXT NoCloud disk /dev/vd" in console
    assert "conpaas-boot: NETWORK 10.0.2.15/24, towards the director 10.0.2.15" in console
    assert "conpaas-boot: STARTING the agent on 10.0.2.15" in console
    assert "token-i-1" not in console


@slow
async def test_a_context_disk_and_a_larger_disk_will_do_as_well(tmp_path: Path) -> None:
    size = {"name": "large", "disk_gib": 12}
    async with cloud(tmp_path, seed="context", sizes=(size,)) as here:
        vm = await here.create("i-1")
        status = await here.status(vm)
        console = await here.driver.console(vm.id)
        client = here.office.manager_of("i-1", f"https://{vm.address}:{MEMBER_PORT}")
        try:
            logs = await client.call(LIST_LOGS, timeout_s=60)
        finally:
            await client.close()

    assert "conpaas-boot: CONTEXT OpenNebula disk /dev/vd" in console
    assert status.metrics["disk_free"] > 10 << 30
    assert set(logs.logs) == {"daemon.agent.log"}


@slow
async def test_the_disk_alone_boots_too_and_the_power_button_ends_it(tmp_path: Path) -> None:
    """As on a cloud, which knows nothing of kernels: BIOS, boot loader, kernel."""
    image = tmp_path / "image"
    image.mkdir()
    for name in ("base.qcow2", "image.json"):
        (image / name).symlink_to(built_image() / name)
    async with cloud(tmp_path, image=image) as here:
        vm = await here.create("i-1")
        assert (await here.status(vm)).instance == "i-1"

        async def ended() -> bool | None:
            if (await here.driver.describe(vm.id)).state is VmState.FAILED:
                return True
            with suppress(ConpaasError), here.driver._monitor(here.driver._records.ours()[0]) as talk:
                talk.execute("system_powerdown")  # heard as soon as somebody listens
            return None

        await wait_for(ended, timeout_s=BOOT_S, what="the end", clock=SYSTEM_CLOCK, period_s=1)


@slow
async def test_machines_that_go_on_from_one_saved_state_are_each_their_own(tmp_path: Path) -> None:
    async with cloud(tmp_path, warm=True, boots=4) as here:
        first = await here.create("i-cold")
        await here.status(first)

        async def saved() -> bool | None:
            return bool(list((tmp_path / "vms/.warm").glob("[!.]*/memory"))) or None

        await wait_for(saved, timeout_s=BOOT_S, what="a saved machine", clock=SYSTEM_CLOCK, period_s=0.3)
        began = SYSTEM_CLOCK.monotonic()
        others = [await here.create(f"i-{number}") for number in range(2)]
        statuses = [await here.status(vm) for vm in others]
        took_s = SYSTEM_CLOCK.monotonic() - began
        consoles = [await here.driver.console(vm.id) for vm in others]

    assert [status.instance for status in statuses] == ["i-0", "i-1"]
    assert sorted(here.office.enrolled) == ["i-0", "i-1", "i-cold"]
    assert len(set(here.office.keys)) == 3
    assert [console for console in consoles if "SeaBIOS" in console] == []
    print(f"two machines from a saved state: {took_s:.1f} s")


@slow
async def test_a_volume_is_mounted_and_back_after_a_reboot(tmp_path: Path) -> None:
    async with cloud(tmp_path) as here:
        vm = await here.create("i-1")
        await here.status(vm)
        volume = await here.driver.create_volume(VolumeRequest(token="v-1", name="v-1", size=64 << 20))
        attached = await here.driver.attach(volume.id, vm.id)
        client = here.office.manager_of("i-1", f"https://{vm.address}:{MEMBER_PORT}")
        wish = Mount(volume=volume.id, devices=attached.devices, timeout_s=BOOT_S)
        mounted = await client.call(MOUNT, wish, role="web", timeout_s=BOOT_S)
        with here.driver._monitor(here.driver._records.ours()[0]) as talk:
            talk.execute("system_reset")

        async def rebooted() -> bool | None:
            console = await here.driver.console(vm.id)
            return console.count("conpaas-boot: STARTING") == 2 or None

        async def mounted_again() -> bool | None:
            return (await here.status(vm)).volumes == ("web",) or None

        await wait_for(rebooted, timeout_s=BOOT_S, what="a reboot", clock=SYSTEM_CLOCK, period_s=0.3)
        await wait_for(mounted_again, timeout_s=BOOT_S, what="its volume", clock=SYSTEM_CLOCK, period_s=0.3)
        await client.close()

    assert mounted.volumes == ("web",)
    assert here.office.enrolled == ["i-1"]


@slow
async def test_a_machine_that_may_not_enrol_says_so_and_tries_again(tmp_path: Path) -> None:
    async with cloud(tmp_path) as here:
        here.office.refuse = "this token was used"
        vm = await here.create("i-1")
        await here.said(vm, "conpaas-boot: FAILED after ENROLLING: this token was used")
        here.office.refuse = ""
        assert (await here.status(vm)).instance == "i-1"

    assert "FAILED" in here.stages("i-1")


# -- services -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def deployment(**settings: str) -> AsyncIterator[Stand]:
    clouds = {
        "local": {"driver": "local"},
        "vms": {"driver": "qemu", "image": str(built_image()), "reserve_mib": 256, "boot_s": BOOT_S},
    }
    async with stand(CONPAAS_CLOUDS=json.dumps(clouds), **settings) as one:
        yield one


def site(tmp_path: Path, text: str) -> Path:
    target = tmp_path / "site.tar.gz"
    with tarfile.open(target, "w:gz") as tar:
        info = tarfile.TarInfo("index.php")
        info.size = len(text.encode())
        tar.addfile(info, io.BytesIO(text.encode()))
    return target


async def running(here: Stand, service: ServiceView, nodes: int) -> ServiceView:
    """Wait, longer than on the local cloud, until a service runs with so many nodes."""
    what = f"{nodes} nodes running"
    return await here.until(service.id, lambda view: is_running(view, nodes), what=what, timeout_s=2 * BOOT_S)


async def page(view: ServiceView, visitor: aiohttp.ClientSession) -> str:
    async with visitor.get(view.urls["application"]) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.text()


def machines(here: Stand, node: NodeView) -> int:
    """Return the process id of a node's QEMU."""
    record = json.loads((here.data / "clouds/vms/.records" / f"{node.cloud_id}.pid").read_text())
    pid: int = record["pid"]
    return pid


@slow
async def test_a_php_service_in_two_machines_serves_a_page_and_loses_one(tmp_path: Path) -> None:
    async with deployment() as here:
        service = await here.client.create(type="php", name="blog", cloud="vms")
        await here.until(service.id, lambda view: view.manager, what="a manager", timeout_s=BOOT_S)
        await here.client.start(service.id)
        view = await running(here, service, 1)
        version = await here.client.upload(service.id, site(tmp_path, "<?php echo gethostname(), ' ', PHP_SAPI;"))
        await here.client.activate(service.id, version.id, wait=True)
        node = agents(view)[0]
        async with aiohttp.ClientSession() as visitor:
            assert await page(view, visitor) == f"{node.cloud_id} fpm-fcgi"
        assert {node.cloud, manager(view).cloud} == {"vms"}

        os.kill(machines(here, node), 9)
        view = await here.until(
            service.id,
            lambda view: [one.id for one in agents(view)] not in ([], [node.id]) and view.operation is None,
            what="another node",
            timeout_s=2 * BOOT_S,
        )
        view = await running(here, service, 1)
        async with aiohttp.ClientSession() as visitor:
            assert await page(view, visitor) == f"{agents(view)[0].cloud_id} fpm-fcgi"


@slow
async def test_a_service_on_this_computer_and_in_a_machine_at_once(tmp_path: Path) -> None:
    async with deployment() as here:
        service = await here.client.create(type="php", name="blog", cloud="local")
        await here.client.start(service.id, wait=True)
        text = "<?php session_start(); $_SESSION['n'] = ($_SESSION['n'] ?? 0) + 1; echo gethostname(), $_SESSION['n'];"
        version = await here.client.upload(service.id, site(tmp_path, text))
        await here.client.activate(service.id, version.id, wait=True)
        await here.client.scale(service.id, {"php": 1}, cloud="vms")
        view = await running(here, service, 2)

        clouds = {node.cloud: node for node in agents(view)}
        assert {cloud: node.roles for cloud, node in clouds.items()} == {"local": ("proxy", "web"), "vms": ("php",)}
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as visitor:
            pages = [await page(view, visitor) for _ in range(2)]
        assert pages == [f"{clouds['vms'].cloud_id}1", f"{clouds['vms'].cloud_id}2"]  # its sessions are kept here


# -- registering ----------------------------------------------------------------------------------------------------


def blocks_at_amazon(url: str) -> dict[int, bytes]:
    """Return the first and the last block of the only snapshot of ours, by number."""
    words = {"region_name": "eu-west-1", "aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    ec2, ebs = (boto3.client(service, endpoint_url=url, **words) for service in ("ec2", "ebs"))
    ours = [{"Name": "description", "Values": ["conpaas-*"]}]
    (snapshot,) = [one["SnapshotId"] for one in ec2.describe_snapshots(Filters=ours)["Snapshots"]]
    listed = sorted(ebs.list_snapshot_blocks(SnapshotId=snapshot)["Blocks"], key=lambda block: block["BlockIndex"])
    found = {}
    for block in (listed[0], listed[-1]):
        which = {"SnapshotId": snapshot, "BlockIndex": block["BlockIndex"], "BlockToken": block["BlockToken"]}
        found[block["BlockIndex"]] = ebs.get_snapshot_block(**which)["BlockData"].read()
    return found


@slow
def test_the_image_becomes_one_of_amazon() -> None:
    argv: list[str | Path] = [sys.executable, BUILD.with_name("register.py"), "ec2", "--region", "eu-west-1"]
    env = {**os.environ, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}

    def register(url: str) -> subprocess.CompletedProcess[str]:
        words = [*argv, "--endpoint", url, built_image()]
        return subprocess.run(words, check=False, capture_output=True, text=True, env=env, timeout=120)

    done, failed = register(ec2_moto.url()), register("http://127.0.0.1:1")

    assert (done.returncode, done.stdout[:4]) == (0, "ami-"), done.stderr
    (first, head), (last, tail) = sorted(blocks_at_amazon(ec2_moto.url()).items())
    assert (first, last) == (0, (8 << 30) // len(head) - 1)  # both tables of partitions
    assert head[510:520] == b"\x55\xaaEFI PART"
    assert tail[-512:-504] == b"EFI PART"
    assert failed.returncode == 1
    assert "127.0.0.1:1" in failed.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--format", "iso"], "There is no format 'iso'; there are qcow2, raw, vmdk and tar."),
        (["--engines", "cobol"], "There is no service type 'cobol'; there are: "),
        (["--fast"], "unknown option --fast"),
        (["--size"], "--size needs a value"),
    ],
)
def test_what_cannot_be_built_is_said(words: list[str], complaint: str) -> None:
    argv: list[str | Path] = [BUILD, "--python", sys.executable, *words]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)

    assert done.returncode == 1
    assert complaint in done.stderr
