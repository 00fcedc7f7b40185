"""A director with its web UI and the local cloud, on ports and in a folder of its own: for tests and for pictures."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, async_playwright
from pydantic import SecretStr

from conpaas import sdk
from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.director.app import Director
from conpaas.director.settings import DirectorSettings
from conpaas.web import app as ui

ADMIN, PASSWORD = "admin", "correct horse battery"
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
END_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Demo:
    """What is running, and where."""

    director: Director
    url: str


@asynccontextmanager
async def running(directory: Path, *, block: str = "127.143.0.0/24", **settings: Any) -> AsyncIterator[Demo]:
    """Run a director until the end of the block; every service it then has is terminated."""
    chosen = DirectorSettings(
        data_dir=directory,
        port=0,
        instances_port=0,
        ssh_port=0,
        admin_password=SecretStr(PASSWORD),
        clouds={"local": {"driver": "local", "title": "Local", "block": block}},
        **settings,
    )
    director = Director(chosen, ui.create)
    task = asyncio.create_task(director.run(signals=False))
    ready = asyncio.create_task(director.ready.wait())
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if not director.ready.is_set():
        ready.cancel()
        await task
    try:
        yield Demo(director, director.url)
    finally:
        await _end_services(director)
        director.stop.set()
        await task


async def _end_services(director: Director) -> None:
    """Terminate every service and wait until its instances are gone."""
    session = await sdk.login(director.url, ADMIN, PASSWORD)
    async with sdk.connect(director.url, session.token.get_secret_value()) as api:
        for service in await api.services():
            await api.terminate(service.id)

        async def none_left() -> bool | None:
            return None if await api.services() else True

        await tasks.wait_for(none_left, timeout_s=END_TIMEOUT_S, what="the end of all services", clock=SYSTEM_CLOCK)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Run a headless browser until the end of the block."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_ARGUMENTS))
        yield browser
        await browser.close()
