"""Bad input and bad days, by way of the public API of a live deployment: a clear error, and nothing is lost.

What is not here is tested where it happens: archives byte by byte in `unit/test_archive`, every command by every kind
of caller in `contract/test_authorization`, certificates at the ports of managers and agents in `unit/test_agent_port`.
"""

import asyncio
import contextlib
import json
import os
import random
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import pytest_asyncio
from click.testing import CliRunner, Result
from pydantic import SecretStr

from conpaas.cli.root import root
from conpaas.core import run, tasks, tls
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import (
    BadArchiveError,
    BadInputError,
    ConflictError,
    ConpaasError,
    DiskFullError,
    ForbiddenError,
    NoCreditError,
    NotAuthenticatedError,
    NotFoundError,
    PeerError,
    StaleGenerationError,
    TooLargeError,
)
from conpaas.core.identity import Identity, client_context
from conpaas.core.messages.internal import READ_RECORD
from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.messages.public import Registration
from conpaas.core.rpc import Client
from conpaas.core.states import NodeState, OperationState, ServiceState
from conpaas.sdk import Conpaas, OperationFailedError
from conpaas.sdk.captcha import solve
from tests.fakes.load import Load, Reply, fetch
from tests.fakes.stand import PASSWORD, PATIENT, Stand, agents, client_at, stand
from tests.system.test_kills import credits_are_exact
from tests.system.test_life import archive
from tests.unit.test_archive import member, tar_of, zip_of

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(run.find("haproxy") is None, reason="the engines of php are not installed"),
]

root_only = pytest.mark.skipif(
    os.geteuid() != 0,
    reason="only root can mount a small disk; unit tests of code, files and agents have the error raised",
)
CLOUDS = {
    "local": {"driver": "local"},
    "bare": {"driver": "local", "block": "127.43.0.0/16", "hide": ["/usr/sbin"]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here() -> AsyncIterator[Stand]:
    """A deployment whose second cloud has no engines, where registration is quick and pays for four instances."""
    async with stand(
        CONPAAS_CLOUDS=json.dumps(CLOUDS),
        CONPAAS_CAPTCHA_WORK="4",
        CONPAAS_REGISTRATION_CREDITS="4",
        CONPAAS_TIMINGS__RETRY_DELAYS_S="[1.0, 2.0]",
        CONPAAS_LIMITS__UPLOAD_BYTES="3000000",
        **PATIENT,
    ) as one:
        yield one
        credits_are_exact(one.data / "director.sqlite")


@dataclass
class Site:
    """A service that runs on one node, before each test and after it."""

    here: Stand
    id: str
    place: tuple[str, int]

    async def page(self, path: str = "/") -> Reply:
        return await fetch(*self.place, path)

    async def on_one_node(self) -> ServiceView:
        """Put it back on one node, whatever the test has left."""
        client = self.here.client
        wanted = (await client.service(self.id)).wanted
        surplus = {role: -count for role, count in wanted.roles.items() if role != "proxy" and count}
        if surplus:
            await client.scale(self.id, surplus, wait=True)
        return await self.here.running(self.id, 1)

    def load(self) -> Load:
        return Load(*self.place, clients=2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_site(here: Stand) -> Site:
    service = await here.client.create(type="php", name="site")
    await here.client.start(service.id, wait=True)
    url = urlsplit((await here.running(service.id, 1)).urls["application"])
    return Site(here, service.id, (url.hostname or "", url.port or 0))


@pytest_asyncio.fixture(loop_scope="module")
async def site(running_site: Site) -> AsyncIterator[Site]:
    yield running_site
    await running_site.on_one_node()


@contextlib.asynccontextmanager
async def registered(here: Stand, name: str) -> AsyncIterator[Conpaas]:
    """Make an account, as anybody can, and log in."""
    async with client_at(here.url) as anonymous:
        captcha = await solve((await anonymous.captcha()).challenge)
        form = Registration(username=name, email=f"{name}@example.org", password=SecretStr(PASSWORD), captcha=captcha)
        await anonymous.register(form)
        token = (await anonymous.login(name, PASSWORD)).token.get_secret_value()
    async with client_at(here.url, token) as client:
        yield client


# -- uploads --------------------------------------------------------------------------------------------------------

ROOT = b"<?php echo 1;"
UPLOADS: dict[str, tuple[bytes, type[ConpaasError], str]] = {
    "empty": (b"", BadArchiveError, "empty"),
    "not an archive": (b"<?php echo 1;" * 100, BadArchiveError, "."),
    "an empty archive": (tar_of(), BadArchiveError, "."),
    "cut off archive": (zip_of({"index.php": ROOT * 100})[:-30], BadArchiveError, "."),
    "dot dot in tar": (tar_of(member("../evil.php", content=ROOT)), BadArchiveError, "evil.php"),
    "dot dot in zip": (zip_of({"a/../../evil.php": ROOT}), BadArchiveError, "evil.php"),
    "absolute": (tar_of(member("/etc/cron.d/evil", content=ROOT)), BadArchiveError, "evil"),
    "symbolic link": (tar_of(member("a", tarfile.SYMTYPE, link="/etc/passwd")), BadArchiveError, "link"),
    "hard link": (tar_of(member("a", tarfile.LNKTYPE, link="b")), BadArchiveError, "link"),
    "device": (tar_of(member("a", tarfile.CHRTYPE)), BadArchiveError, "."),
    "pipe": (tar_of(member("a", tarfile.FIFOTYPE)), BadArchiveError, "."),
    "bomb": (zip_of({"zeros": b"\0" * 200_000_000}), TooLargeError, "packed size"),
    "too large": (random.Random(1).randbytes(3_000_001), TooLargeError, "3000000|2.9|limit"),
}


@pytest.mark.parametrize("kind", UPLOADS)
async def test_an_upload_that_is_no_code_is_refused_and_leaves_nothing(site: Site, kind: str) -> None:
    data, error, says = UPLOADS[kind]
    client, store = site.here.client, site.here.data / "blobs"
    before = (await client.code(site.id), tree(store))

    with pytest.raises(error, match=says) as caught:
        await client.upload(site.id, pieces(data), "site.tar")

    assert caught.value.hint
    assert (await client.code(site.id), tree(store)) == before
    assert (await site.page()).status == 200


def tree(folder: Path) -> list[str]:
    """Return the paths of all that is in a folder, also while some of it is being removed."""
    return sorted(f"{path}/{name}" for path, folders, files in os.walk(folder) for name in (*folders, *files))


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1 << 16):
        yield data[start : start + (1 << 16)]


async def test_an_upload_that_is_cut_off_half_way_leaves_nothing(site: Site) -> None:
    client, store = site.here.client, site.here.data / "blobs"
    before = (await client.code(site.id), tree(store))
    half = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield zip_of({"index.php": ROOT * 10_000})[:500]
        half.set()
        await asyncio.Event().wait()

    sending = asyncio.create_task(client.upload(site.id, endless(), "site.zip"))
    await half.wait()
    await until(lambda: len(tree(store)) > len(before[1]))
    sending.cancel()
    await asyncio.wait([sending])

    await until(lambda: tree(store) == before[1])
    assert await client.code(site.id) == before[0]


async def until(holds: Callable[[], bool]) -> None:
    async def so() -> bool | None:
        return True if holds() else None

    await tasks.wait_for(so, timeout_s=60, what="the files", clock=SYSTEM_CLOCK)


# -- names ----------------------------------------------------------------------------------------------------------

NAMES = (
    "'; drop table users; --",
    '<script>alert("1")</script>',
    "🎉 été 漢字 \u202etxt",
    "{{7*7}} %s $(id) `id` ../..",
    "\\",
)


@pytest.mark.parametrize("name", NAMES)
async def test_any_name_is_only_a_name(site: Site, name: str, tmp_path: Path) -> None:
    client = site.here.client
    application = await client.create_application(name)
    service = await client.create(type="php", name=name, application=application.id)
    assert (service.name, (await client.find(name)).id) == (name, service.id)
    renamed = await client.rename(service.id, f"{name} 2")
    assert renamed.name == f"{name} 2"
    assert (await client.rename_application(application.id, f"{name} 2")).name == f"{name} 2"

    version = await client.upload(service.id, pieces(zip_of({"index.php": ROOT})), f"{name}.zip", description=name)
    assert version.description == name
    assert version.filename.endswith(".zip")
    assert "/" not in version.filename
    await client.download(service.id, version.id, tmp_path / "back.zip")
    assert zipfile.ZipFile(tmp_path / "back.zip").read("index.php") == ROOT

    shown = await cli(site.here, "ls")
    assert shown.exit_code == 0, shown.output
    history = (await client.history(service=service.id)).items
    assert f"{name} 2" in {event.after for event in history}
    await client.terminate(service.id, wait=True)
    await client.delete_application(application.id)


async def cli(here: Stand, *words: str) -> Result:
    """Run the command line, logged in as the stand's administrator."""
    env = {"XDG_CONFIG_HOME": str(here.directory), "CONPAAS_URL": here.url, "CONPAAS_TOKEN": await a_token(here)}
    return await asyncio.to_thread(CliRunner().invoke, root, list(words), env=env, prog_name="conpaas")


async def a_token(here: Stand) -> str:
    secret = (await here.client.create_token("another way")).secret
    assert secret is not None
    return secret.get_secret_value()


async def test_ten_thousand_characters_are_refused_with_the_fields_name(site: Site) -> None:
    long, service = "x" * 10_000, f"services/{site.id}"
    for method, path, words, field in (
        ("POST", "services", {"type": "php", "name": long}, "name"),
        ("POST", "services", {"type": long}, "type"),
        ("PATCH", service, {"name": long}, "name"),
        ("POST", "applications", {"name": long}, "name"),
        ("POST", "me/tokens", {"name": long}, "name"),
        ("POST", f"{service}/start", {"key": long}, "key"),
        ("POST", f"{service}/checkout", {"url": f"https://example.org/{long}"}, "url"),
        ("PUT", f"{service}/settings", {"settings": {"memory_limit": long}}, "memory_limit"),
        ("PUT", f"{service}/settings", {"settings": {long: 1}}, "xxx"),
        ("POST", f"{service}/scale", {"roles": {long: 1}}, "roles"),
        ("POST", f"{service}/code?description={long[:5000]}", {}, "description"),
        ("POST", f"{service}/code?filename={long[:5000]}.zip", {}, "filename"),
    ):
        status, problem = await asked(site.here, method, path, words)
        assert (status, problem["code"]) == (422, "bad-input"), path[:80]
        assert field in problem["detail"]
        assert len(json.dumps(problem)) < 2000
    assert [service.name for service in await site.here.client.services()] == ["site"]


async def asked(here: Stand, method: str, path: str, words: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Ask by hand what the SDK would not send; return the status and the document."""
    headers = {"Authorization": f"Bearer {await a_token(here)}"}
    url = f"{here.url}/api/v1/{path}"
    async with aiohttp.ClientSession() as session, session.request(method, url, json=words, headers=headers) as answer:
        return answer.status, await answer.json(content_type=None)


# -- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ({"nonesuch": 1}, "no role 'nonesuch'"),
        ({"php": -1}, "cannot remove 1 'php'"),
        ({"web": 1, "php": -2}, "cannot remove 2 'php'"),
        ({"proxy": -1}, "proxy"),
        ({"php": 0}, "how many"),
        ({"php": 10**9}, "too many"),
        ({"php": -(10**9)}, "cannot remove"),
    ],
)
async def test_nodes_that_cannot_be_are_refused(site: Site, roles: dict[str, int], says: str) -> None:
    before = await site.here.client.service(site.id)
    with pytest.raises(BadInputError, match=says) as caught:
        await site.here.client.scale(site.id, roles)
    assert caught.value.hint
    after = await site.here.client.service(site.id)
    assert (after.generation, after.wanted, after.state) == (before.generation, before.wanted, before.state)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("php=+0",), "changes nothing"),
        (("php=-0",), "changes nothing"),
        (("php=abc",), "is not a change of roles"),
        (("php=1000000000",), "is not a change of roles"),
        (("php=+999999999",), "too many"),
        (("php=-1",), "cannot remove"),
        (("proxy=-1",), "proxy"),
        (("nonesuch=+1",), "no role"),
        (("php",), "is not a change of roles"),
        (("php=0", "web=0"), "as many nodes as that already"),
    ],
    ids=" ".join,
)
async def test_the_command_line_refuses_them_too(site: Site, words: tuple[str, ...], says: str) -> None:
    before = await site.here.client.service(site.id)
    done = await cli(site.here, "scale", "site", *words)
    assert done.exit_code == 1, done.output
    assert says in done.stderr
    assert (await site.here.client.service(site.id)).generation == before.generation


# -- two at once ----------------------------------------------------------------------------------------------------


async def test_of_two_changes_of_what_was_seen_one_is_made(site: Site) -> None:
    client = site.here.client
    seen = (await client.service(site.id)).generation
    done = await asyncio.gather(
        *[client.scale(site.id, {"php": 1}, generation=seen, key=f"at once {number}") for number in range(4)],
        return_exceptions=True,
    )
    refused = [one for one in done if isinstance(one, StaleGenerationError)]
    assert len(refused) == 3, done
    assert refused[0].hint
    view = await site.here.running(site.id, 2)
    assert view.generation == seen + 1


async def test_two_scalings_at_once_both_count_and_a_key_counts_once(site: Site) -> None:
    client = site.here.client
    one, other = await asyncio.gather(client.scale(site.id, {"php": 1}), client.scale(site.id, {"web": 1}))
    assert one.id != other.id
    await site.here.running(site.id, 3)
    same = await asyncio.gather(*[client.scale(site.id, {"php": 1}, key="just once") for _ in range(5)])
    assert len({operation.id for operation in same}) == 1
    again = await client.scale(site.id, {"web": -1}, key="just once")  # the key says which one it is
    assert again.id == same[0].id
    view = await site.here.running(site.id, 4)
    assert view.wanted.roles == {"proxy": 1, "web": 1, "php": 2}


async def test_a_cancelled_scale_up_returns_to_what_was(site: Site) -> None:
    client = site.here.client
    before = await client.service(site.id)
    async with site.load() as load:
        operation = await client.scale(site.id, {"php": 2, "web": 1})
        await site.here.until(
            site.id, lambda view: any(node.state is not NodeState.REQUESTED for node in new(view, before)), what="boot"
        )
        cancelled = await client.cancel(operation.id)
        assert cancelled.state is OperationState.CANCELLED
        view = await site.here.running(site.id, 1)
    assert load.failures == []
    assert view.wanted == before.wanted
    assert {node.id for node in agents(view)} == {node.id for node in agents(before)}
    with pytest.raises(ConflictError, match="over"):
        await client.cancel(operation.id)
    with pytest.raises(OperationFailedError, match="cancelled"):
        await client.wait(operation)


def new(view: ServiceView, before: ServiceView) -> list[NodeView]:
    return [node for node in agents(view) if node.id not in {known.id for known in before.nodes}]


async def test_a_stop_in_the_middle_of_a_scale_up_wins_and_start_goes_on(site: Site) -> None:
    client = site.here.client
    scale = await client.scale(site.id, {"php": 1, "web": 1})
    stop = await client.stop(site.id)
    assert (await client.wait(stop)).state is OperationState.DONE
    view = await client.service(site.id)
    assert (view.state, agents(view)) == (ServiceState.STOPPED, [])
    assert (await client.operation(scale.id)).state in {OperationState.CANCELLED, OperationState.DONE}
    with pytest.raises(ConflictError, match="running"):
        await client.scale(site.id, {"php": 1})
    await client.start(site.id, wait=True)
    view = await site.here.running(site.id, 3)  # what was wanted is wanted still
    url = urlsplit(view.urls["application"])
    site.place = (url.hostname or "", url.port or 0)
    with pytest.raises(ConflictError, match="started already"):
        await client.start(site.id)


# -- the application is broken --------------------------------------------------------------------------------------


async def test_a_page_with_a_syntax_error_is_an_error_of_that_page_only(site: Site, tmp_path: Path) -> None:
    client = site.here.client
    before = (await client.service(site.id)).nodes
    broken = archive(tmp_path / "1.tar.gz", {"index.php": "<?php this is no php", "good.php": "<?php echo 'good';"})
    await client.upload(site.id, broken, activate=True)
    async with Load(*site.place, paths=("/good.php",), clients=2) as load:
        for _ in range(30):
            assert (await site.page()).status == 500
        await load.more(200)
        view = await site.here.running(site.id, 1)
    assert load.failures == []
    assert [node.id for node in agents(view)] == [node.id for node in before if node.kind == "agent"]
    assert b"this is no php" not in (await site.page()).body

    mended = archive(tmp_path / "2.tar.gz", {"index.php": "<?php echo 'mended';"})
    await client.upload(site.id, mended, activate=True)
    assert (await site.page()).body == b"mended"


# -- engines and disks ----------------------------------------------------------------------------------------------


async def test_an_engine_that_is_not_installed_is_named_with_what_to_do(here: Stand, site: Site) -> None:
    service = await here.client.create(type="php", name="bare", cloud="bare")
    await here.client.start(service.id)
    view = await here.until(
        service.id, lambda view: view.state in {ServiceState.ERROR, ServiceState.RUNNING}, what="the missing engine"
    )
    if view.state is ServiceState.RUNNING:
        pytest.skip("this machine allows no namespaces: nothing can be hidden from an instance")
    for word in ("php-fpm", "is not installed", "conpaas engines install php"):
        assert word in view.reason, view.reason
    operation = (await here.client.operations(service=service.id)).items[0]
    assert operation.kind == "start"
    assert "is not installed" in operation.error
    await here.client.stop(service.id, wait=True)
    assert agents(await here.client.service(service.id)) == []
    await here.client.terminate(service.id, wait=True)
    assert (await site.page()).status == 200


@contextlib.contextmanager
def small_disk(folder: Path, size: str, pid: int | None = None) -> Iterator[None]:
    """Put a small disk in the place of `folder`, as the process `pid` sees it."""
    enter = [] if pid is None else ["nsenter", f"--target={pid}", "--mount", "--pid", "--"]
    status = folder.stat()
    options = f"size={size},mode={status.st_mode & 0o777:o},uid={status.st_uid},gid={status.st_gid}"
    command([*enter, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
    try:
        yield
    finally:
        command([*enter, "umount", "--lazy", str(folder)])


def command(argv: list[str]) -> None:
    pid = os.posix_spawnp(argv[0], argv, os.environ)
    assert os.waitpid(pid, 0)[1] == 0, argv


@root_only
async def test_a_full_disk_on_the_director_refuses_uploads_and_loses_nothing(site: Site) -> None:
    client = site.here.client
    before = await client.code(site.id)
    random_bytes = random.Random(2).randbytes(400_000)
    data = zip_of({"index.php": b"<?php echo 'large';", "large.bin": random_bytes})
    with small_disk(site.here.data / "blobs" / "incoming", "200k"):
        with pytest.raises(DiskFullError, match="no space left") as caught:
            await client.upload(site.id, pieces(data), "large.zip")
        assert caught.value.hint
        assert await client.code(site.id) == before
        assert (await site.page()).status == 200
    version = await client.upload(site.id, pieces(data), "large.zip")
    await client.delete_code(site.id, version.id)


@root_only
async def test_a_full_disk_on_a_node_is_told_and_the_version_before_serves_until_there_is_room(site: Site) -> None:
    client = site.here.client
    await client.upload(site.id, pieces(zip_of({"index.php": b"<?php echo 'small';"})), "a.zip", activate=True)
    node = agents(await client.service(site.id))[0]
    home = site.here.cloud / node.cloud_id
    blobs = next(Path(path, "blobs") for path, folders, _ in os.walk(home) if "blobs" in folders)
    data = zip_of({"index.php": b"<?php echo 'large';", "large.bin": random.Random(3).randbytes(400_000)})
    version = await client.upload(site.id, pieces(data), "large.zip")
    async with site.load() as load:
        with small_disk(blobs, "100k", site.here.init(node)):
            operation = await client.activate(site.id, version.id)
            view = await site.here.until(site.id, lambda view: "space" in view.reason, what="the full disk told")
            assert view.state is ServiceState.ADAPTING
            assert (await client.operation(operation.id)).state is OperationState.RUNNING
            assert node.id in view.reason
            assert (await site.page()).body == b"small"
        await client.wait(operation, timeout_s=120)
    assert load.failures == []
    assert (await site.page()).body == b"large"


# -- credits --------------------------------------------------------------------------------------------------------


SHORT = "the credits pay for 0 of 2 instances"


async def test_credits_that_run_out_in_the_middle_of_a_scale_up_give_what_they_pay_for(here: Stand) -> None:
    async with registered(here, "poor") as client:
        user = await client.me()
        assert user.credits == 4
        service = await client.create(type="php", name="small")
        await client.start(service.id, wait=True)
        assert (await client.me()).credits == 2
        operation = await client.scale(service.id, {"php": 3, "web": 1})  # four more nodes, and credits for two

        view = await here.until(service.id, lambda view: serving(view) == 3 and SHORT in view.reason, what="3 nodes")
        assert view.state is ServiceState.ADAPTING
        assert (await client.me()).credits == 0
        told = (await client.history(service=service.id)).items
        assert [event.message for event in told if event.kind == "credits-short"] == [
            SHORT,
            "the credits pay for 2 of 4 instances",
        ]
        url = urlsplit(view.urls["application"])
        assert (await fetch(url.hostname or "", url.port or 0, "/")).status == 200
        with pytest.raises(NoCreditError):
            await client.create(type="php", name="another")

        await here.client.grant(user.id, 3)
        await client.wait(operation, timeout_s=120)  # what is paid for later comes by itself
        await here.running(service.id, 5)
        assert (await client.me()).credits == 1
        rows = [row for row in await here.client.instances() if row.service == service.id]
        assert len(rows) == 6
        assert {row.charged for row in rows} == {1}
        credits_are_exact(here.data / "director.sqlite")
        await client.terminate(service.id, wait=True)
        assert (await client.me()).credits == 1


def serving(view: ServiceView) -> int:
    return sum(1 for node in agents(view) if node.state is NodeState.SERVING)


# -- who are you ----------------------------------------------------------------------------------------------------


async def test_others_things_are_not_there_by_whatever_path(site: Site) -> None:
    """Ids of others in the paths of one's own things, and in queries."""
    theirs = site.here.client
    token, version = await theirs.create_token("theirs"), (await theirs.code(site.id))[0]
    operation = (await theirs.operations(service=site.id)).items[0]
    application = (await theirs.applications())[0]
    async with registered(site.here, "mallory") as client:
        mine = await client.create(type="php", name="mine")
        for refused in (
            client.service(site.id),
            client.code(site.id),
            client.terminate(site.id),
            client.operation(operation.id),
            client.cancel(operation.id),
            client.delete_token(token.id),
            client.create(type="php", name="in theirs", application=application.id),
            client.rename_application(application.id, "mine now"),
            client.delete_code(mine.id, version.id),
            client.download(mine.id, version.id, site.here.directory / "stolen"),
            client.command(site.id, "x", {}),
        ):
            with pytest.raises((NotFoundError, BadInputError)):
                await refused
        with pytest.raises((NotFoundError, BadInputError)):
            await client.activate(mine.id, version.id if version.id != "code-default" else "code-theirs")
        for forbidden in (client.users(), client.instances(), client.grant((await client.me()).id, 1)):
            with pytest.raises(ForbiddenError):
                await forbidden
        assert [service.id for service in await client.services()] == [mine.id]
        assert (await client.operations(service=site.id)).items == ()
        assert (await client.history(service=site.id)).items == ()
        await client.terminate(mine.id, wait=True)
    async with client_at(site.here.url, "not a token") as nobody:
        with pytest.raises(NotAuthenticatedError):
            await nobody.services()
    assert not (site.here.directory / "stolen").exists()
    await theirs.delete_token(token.id)


async def test_the_port_for_instances_obeys_the_present_manager_alone(site: Site, tmp_path: Path) -> None:
    """Certificates that are expired, forged, of another service, of a previous epoch, of an agent, and none."""
    here, other = site.here, await site.here.client.create(type="php", name="other")
    authority = tls.Authority.load(here.data / "ca")
    deployment, view = authority.deployment, await here.client.service(site.id)
    known = {node.kind: node.id for node in view.nodes}
    others = (await here.client.service(other.id)).nodes[0].id
    right = Identity.manager(deployment, site.id, 1, known["manager"])
    yesterday = datetime.now(UTC) - timedelta(days=1)
    forged = tls.Authority.create(deployment)

    async def record(who: Identity | None, by: tls.Authority = authority, now: datetime | None = None) -> object:
        pair = None
        if who is not None:
            key, csr = tls.make_key_and_csr()
            pair = tmp_path / "pair.pem"
            pair.write_bytes(key + by.sign(csr, who, lifetime_s=3600, now=now))
        context = client_context(pair, pair, here.data / "ca" / tls.CERTIFICATE_FILE)
        url = f"https://127.0.0.1:{here._env['CONPAAS_INSTANCES_PORT']}"
        client = Client(url, tls=context, server_hostname=Identity.director(deployment).host)
        try:
            return await client.call(READ_RECORD, id=site.id)
        finally:
            await client.close()

    assert await record(right)
    with pytest.raises(NotAuthenticatedError):
        await record(None)
    for who in (
        Identity.manager(deployment, site.id, 0, known["manager"]),
        Identity.manager(deployment, other.id, 1, others),
        Identity.manager(deployment, site.id, 1, "vm-unknown"),
        Identity.agent(deployment, site.id, known["agent"]),
        Identity.for_user(deployment, "mallory"),
    ):
        with pytest.raises((ForbiddenError, NotFoundError)):
            await record(who)
    for by, now in ((authority, yesterday), (forged, None)):
        with pytest.raises(PeerError):
            await record(right, by, now)
    await here.client.terminate(other.id, wait=True)
