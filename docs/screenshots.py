"""Makes docs/images/*.png: the web UI of a real director, with a service that has visitors.

    python docs/screenshots.py [--seconds 90]

Needs what the tests need (Chromium, the engines of PHP). Takes as long as the charts shall have something to show.
"""

import argparse
import asyncio
import tempfile
from decimal import Decimal
from pathlib import Path

from playwright.async_api import Browser, Page

from conpaas import sdk
from conpaas.cli.load import Load
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages.public import CloudForm, CloudOptions
from conpaas.sdk import Conpaas
from tests.browser import demo

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
SPARE = CloudForm(
    name="spare",
    driver="local",
    settings={"block": "127.144.0.0/24"},
    options=CloudOptions(title="Spare room", user_instances=8, currency="EUR", prices={"*": Decimal("0.02")}),
)
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
PAGES = ("dashboard", "service", "create", "clouds", "cloud")


async def main(seconds: float) -> None:
    """Make all pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        async with demo.running(Path(folder) / "data") as running, demo.chromium() as browser:
            session = await sdk.login(running.url, demo.ADMIN, demo.PASSWORD)
            async with sdk.connect(running.url, session.token.get_secret_value()) as client:
                await client.add_cloud(SPARE)
                service, site = await furnish(client)
                async with Load(site, visitors=3, pause_s=0.05):
                    await SYSTEM_CLOCK.sleep(seconds / 2)
                    await client.scale(service, {"web": 2, "php": 1}, wait=True)
                    await client.scale(service, {"web": 1}, cloud=SPARE.name, wait=True)
                    await SYSTEM_CLOCK.sleep(seconds / 2)
                    await take(browser, running.url, service)


async def furnish(client: Conpaas) -> tuple[str, str]:
    """Deploy the guestbook, and a second service beside it; return the first one's id and address."""
    service = await client.create(type="php", name="Guestbook")
    await client.start(service.id, wait=True)
    version = await client.upload(service.id, ROOT / "examples" / "guestbook")
    await client.activate(service.id, version.id, wait=True)
    await client.create(type="php", name="Wiki")
    return service.id, (await client.service(service.id)).urls["application"]


async def take(browser: Browser, url: str, service: str) -> None:
    """Take every page in light and dark, wide; and the service page as on a phone."""
    paths = {
        "dashboard": "/",
        "service": f"/services/{service}",
        "create": "/create",
        "clouds": "/admin/clouds",
        "cloud": "/admin/add-cloud?driver=ec2",
    }
    for scheme in ("light", "dark"):
        context = await browser.new_context(viewport=WIDE, color_scheme=scheme, base_url=url)  # type: ignore[arg-type]
        page = await context.new_page()
        await log_in(page)
        for name in PAGES:
            await show(page, paths[name])
            await page.screenshot(path=IMAGES / f"{name}-{scheme}.png", full_page=name in {"service", "cloud"})
        await context.close()
    context = await browser.new_context(viewport=PHONE, color_scheme="light", base_url=url)  # type: ignore[arg-type]
    page = await context.new_page()
    await log_in(page)
    await show(page, paths["service"])
    await page.screenshot(path=IMAGES / "service-phone.png")


async def log_in(page: Page) -> None:
    """Log in as the administrator."""
    await page.goto("/")
    form = page.locator("#login")
    await form.get_by_label("username").fill(demo.ADMIN)
    await form.get_by_label("password").fill(demo.PASSWORD)
    await form.get_by_role("button", name="login").click()
    await page.locator("#credits").wait_for()


async def show(page: Page, path: str) -> None:
    """Open a page and wait until it stands still; live pages never stop talking, so no network idleness is awaited."""
    await page.goto(path)
    await page.locator("main").wait_for()
    await page.wait_for_timeout(1500)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make docs/images/*.png.")
    parser.add_argument("--seconds", type=float, default=90, help="how long the charts shall be")
    asyncio.run(main(parser.parse_args().seconds))
