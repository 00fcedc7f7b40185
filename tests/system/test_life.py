"""The whole life of a PHP service, under load, as its owner lives it: not one request fails, and nothing is left."""

import asyncio
import io
import re
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from conpaas.core.states import ServiceState
from tests.fakes.load import Load, Reply
from tests.fakes.stand import Stand, agents, stand

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

COUNTER = """<?php session_start(); $_SESSION['n'] = ($_SESSION['n'] ?? 0) + 1;
header('X-Version: VERSION'); echo $_SESSION['n'], ' ', $_SERVER['SERVER_ADDR'];"""


@pytest.fixture
async def here() -> AsyncIterator[Stand]:
    async with stand() as one:
        yield one


def archive(target: Path, files: dict[str, str]) -> Path:
    with tarfile.open(target, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return target


async def deploy(here: Stand, service: str, path: Path) -> None:
    version = await here.client.upload(service, path)
    await here.client.activate(service, version.id, wait=True)


def site(urls: dict[str, str]) -> tuple[str, int]:
    parts = urlsplit(urls["application"])
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


async def test_a_service_lives_through_everything_under_load(here: Stand, tmp_path: Path) -> None:
    client = here.client
    assert (await client.me()).credits == 9999
    service = await client.create(type="php", name="blog")
    await here.until(service.id, lambda view: view.manager and view.operation is None, what="a manager")
    assert (await client.me()).credits == 9998

    await client.start(service.id, wait=True)
    view = await here.running(service.id, 1)
    assert (await client.me()).credits == 9997
    assert agents(view)[0].roles == ("php", "proxy", "web")
    first = archive(tmp_path / "1.tar.gz", {"index.php": COUNTER.replace("VERSION", "1"), "a.css": "body{}"})
    await deploy(here, service.id, first)

    seen: set[str] = set()
    jar = aiohttp.CookieJar(unsafe=True)
    host, port = site(view.urls)

    def good(reply: Reply) -> bool:
        seen.add(reply.headers.get("x-version", "static"))
        return reply.status == 200

    async with (
        aiohttp.ClientSession(cookie_jar=jar) as visitor,
        Load(host, port, paths=("/", "/a.css", "/index.php"), clients=4, good=good) as load,
    ):
        visits = 0

        async def visit() -> str:
            nonlocal visits
            async with visitor.get(f"http://{host}:{port}/") as answer:
                count, address = (await answer.text()).split()
            visits += 1
            assert int(count) == visits, "the session was lost"
            return address

        assert await visit() == agents(view)[0].address
        await client.scale(service.id, {"web": 2, "php": 1}, wait=True)
        view = await here.running(service.id, 4)
        assert (await client.me()).credits == 9994
        assert sorted(node.roles for node in agents(view)) == [("php",), ("proxy",), ("web",), ("web",)]
        php = next(node for node in agents(view) if node.roles == ("php",))
        assert await visit() == php.address

        second = archive(tmp_path / "2.tar.gz", {"index.php": COUNTER.replace("VERSION", "2"), "a.css": "body{}"})
        await deploy(here, service.id, second)
        await visit()
        await client.change_settings(service.id, {"memory_limit": "256M", "max_execution_time": 60}, wait=True)
        await visit()
        versions = [version.id for version in await client.code(service.id)]
        await client.activate(service.id, versions[1], wait=True)
        await client.scale(service.id, {"php": 2}, wait=True)
        await asyncio.gather(*[visit_one(host, port) for _ in range(20)])
        await visit()
        await client.scale(service.id, {"web": -2, "php": -3}, wait=True)
        view = await here.running(service.id, 1)
        await visit()

    assert load.failures == []
    assert load.done > 100
    assert {"1", "2", "static"} <= seen
    await client.stop(service.id, wait=True)
    view = await client.service(service.id)
    assert view.state is ServiceState.STOPPED
    assert agents(view) == []
    await client.start(service.id, wait=True)
    await here.running(service.id, 1)
    await client.terminate(service.id, wait=True)
    assert await client.services() == []
    await here.nothing_is_left()


async def visit_one(host: str, port: int) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/") as answer:
        assert re.fullmatch(r"1 127\.[0-9.]+", await answer.text())
