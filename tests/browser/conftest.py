"""The web UI in front of a fake API, and browsers that look at it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from playwright.async_api import Browser, Page, expect

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.process import Process, Site
from conpaas.web import app as ui
from tests.browser import demo
from tests.browser.fake_api import FakeApi

expect.set_options(timeout=30_000)


class FakeDirector(Process):
    """The UI mounted as the director mounts it, over the fake's API."""

    name = "fake director"

    def __init__(self, api: FakeApi) -> None:
        super().__init__()
        self.api = api

    async def open(self, _: AsyncExitStack) -> list[Site]:
        return [Site("127.0.0.1", 0, self.api.routes(), subapps={"/": ui.create(lambda: self.url)})]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"


@dataclass
class Stage:
    """A fake API, the UI in front of it, and what went wrong in the browsers that looked."""

    api: FakeApi
    url: str
    browser: Browser
    troubles: list[str]

    async def visit(self, path: str = "/", *, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        """Log in, in a browser of its own, and go to `path`."""
        context = await self.browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            base_url=self.url,
        )
        page = await context.new_page()
        watch(page, self.troubles)
        await page.goto(f"/login?next={path}")
        await page.fill("#login-name", "ada")
        await page.fill("#login-password", "right password")
        await page.click("#login button.primary")
        await page.wait_for_url(f"{self.url}{path}")
        return page

    async def silence(self) -> None:
        """Wait until no page listens any more: whoever does so next is the one that is meant."""

        async def nobody() -> bool | None:
            return None if self.api.listeners else True

        await tasks.wait_for(nobody, timeout_s=30, what="the end of all pages", clock=SYSTEM_CLOCK)

    async def listening(self) -> None:
        """Wait until a page listens to the API's events."""

        async def listener() -> bool | None:
            return True if self.api.listeners else None

        await tasks.wait_for(listener, timeout_s=30, what="a page that listens", clock=SYSTEM_CLOCK)


def watch(page: Page, troubles: list[str]) -> None:
    """Gather what a browser complains of: errors of scripts, things that the policy refuses, what does not load."""
    page.on("console", lambda line: troubles.append(line.text) if line.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(f"a dialog of the browser: {dialog.message}"))


@pytest.fixture
async def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
async def url(api: FakeApi) -> AsyncIterator[str]:
    director = FakeDirector(api)
    task = asyncio.create_task(director.run(signals=False))
    ready = asyncio.create_task(director.ready.wait())
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    yield director.url
    director.stop.set()
    await task


@pytest.fixture
async def stage(api: FakeApi, url: str) -> AsyncIterator[Stage]:
    async with demo.chromium() as browser:
        yield Stage(api, url, browser, [])
