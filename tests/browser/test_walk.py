"""The slides, screen by screen (S28-S83), as a user walks: a real director, the local cloud, real engines."""

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from playwright.async_api import Browser, Page, expect

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from tests.browser import demo
from tests.browser.conftest import watch

pytestmark = [pytest.mark.browser, pytest.mark.system, pytest.mark.timeout(300)]

SLOW_MS = 120_000  # what waits for instances, on a machine that is busy with other tests
CREDITS = "#credits"


def site_archive() -> bytes:
    """Return an application that says who it is."""
    files = {
        "index.php": b"<?php echo 'second ', PHP_MAJOR_VERSION, ' ', ini_get('memory_limit');",
        "style.css": b"b{}",
    }
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


async def fetch(url: str) -> str:
    async with aiohttp.ClientSession() as client, client.get(url) as answer:
        assert answer.status == 200
        return await answer.text()


async def page_says(url: str, words: str) -> None:
    async def said() -> bool | None:
        return True if words in await fetch(url) else None

    await tasks.wait_for(said, timeout_s=60, what=f"a page that says {words!r}", clock=SYSTEM_CLOCK)


async def log_in(browser: Browser, url: str, troubles: list[str]) -> Page:
    context = await browser.new_context(viewport={"width": 1440, "height": 900}, base_url=url, accept_downloads=True)
    page = await context.new_page()
    watch(page, troubles)
    await page.goto("/")
    form = page.locator("#login")
    await form.get_by_label("username").fill(demo.ADMIN)
    await form.get_by_label("password").fill(demo.PASSWORD)
    await form.get_by_role("button", name="login").click()
    await page.wait_for_url(f"{url}/")
    return page


async def test_a_user_walks_through_the_slides(tmp_path: Path, new_address: Callable[[], str]) -> None:
    block = re.sub(r"\d+$", "0/24", new_address())
    troubles: list[str] = []
    async with demo.running(tmp_path, block=block) as running, demo.chromium() as browser:
        page = await log_in(browser, running.url, troubles)  # S28, S40, S41
        await create(page)
        await start(page)
        await scale(page)
        await manage_code(page)
        await change_settings(page)
        await look_at_logs_and_history(page)
        await dashboard_card(page)
        await stop_and_terminate(page)
        assert [line for line in troubles if "status of 422" not in line] == []  # the refused archive's


async def create(page: Page) -> None:
    await expect(page.locator(CREDITS)).to_have_text("9999")  # S44, S45
    await expect(page.locator(".empty-board")).to_have_text(
        "You have no services in the dashboard. Go ahead and create a service."  # S47
    )
    await page.get_by_role("link", name="create new service").click()  # S46
    await expect(page.get_by_text("please select one of the services below")).to_be_visible()  # S49
    await page.get_by_role("radio", name="php").check()  # S50
    await expect(page.get_by_role("radio", name="Local")).to_be_checked()  # S57
    await page.get_by_label("name", exact=True).fill("Blog")
    await page.get_by_role("button", name="create service").click()  # S58
    await page.wait_for_url("**/services/svc-*")
    await expect(page.get_by_role("link", name="back to Dashboard")).to_be_visible()  # S64
    await expect(page.locator(CREDITS)).to_have_text("9998", timeout=SLOW_MS)
    await expect(page.locator("#instances-title")).to_have_text("1 instance running on Local")  # S67
    await expect(page.locator("#service-state")).to_contain_text(
        re.compile(r"Initialized\s+–\s+init\s+(a few moments|\d minutes?)\s+ago")
    )  # S65
    await expect(page.get_by_role("button", name="start", exact=True)).to_be_visible()  # S33
    await expect(page.get_by_role("button", name="terminate", exact=True)).to_be_visible()
    await expect(page.get_by_role("button", name="stop", exact=True)).to_have_count(0)
    default = page.locator("#version-code-default")
    await expect(default).to_contain_text("active")  # S76, S77


async def start(page: Page) -> None:
    await page.get_by_role("button", name="start", exact=True).click()
    await expect(page.locator("#service-state")).to_contain_text("running · started", timeout=SLOW_MS)
    await expect(page.locator(CREDITS)).to_have_text("9997")
    await expect(page.locator("#instances-title")).to_have_text("2 instances running on Local")
    shared = page.locator(".instance", has_not=page.locator("[data-roles^=manager]")).last
    assert (await shared.get_attribute("data-roles") or "").split() == ["proxy", "web", "php"]  # S69, S103
    await expect(shared).to_contain_text(re.compile(r"Instance \S+\s+running .* 127\.", re.S))  # S68
    await expect(page.get_by_role("button", name="stop", exact=True)).to_be_visible()  # S33
    await expect(page.get_by_role("button", name="terminate", exact=True)).to_have_count(0)
    await expect(page.get_by_role("link", name="access application")).to_have_count(2)  # S66, S75
    await page_says(await site(page), "ConPaaS")


async def site(page: Page) -> str:
    return await page.get_by_role("link", name="access application").first.get_attribute("href") or ""


async def scale(page: Page) -> None:
    await expect(page.get_by_text("add or remove instances to your deployment")).to_be_visible()  # S71
    for role, word in (("web", "+2"), ("php", "+1")):
        await page.locator(f"[data-role={role}]").click()
        await page.get_by_label("no. of instances (e.g. +1, -2)").fill(word)  # S72
        await page.get_by_role("button", name="OK").click()
        await expect(page.locator(f"[data-role={role}]")).to_contain_text(f"{word} {role}")
    await page.get_by_role("button", name="submit").click()
    await expect(page.locator(CREDITS)).to_have_text("9994", timeout=SLOW_MS)  # S45
    await expect(page.locator("#instances-title")).to_have_text("5 instances running on Local", timeout=SLOW_MS)
    await expect(page.locator("#service-state")).to_contain_text("running · started", timeout=SLOW_MS)  # S83
    for roles, count in (("manager", 1), ("proxy", 1), ("web", 2), ("php", 1)):  # S70
        await expect(page.locator(f".instance[data-roles^='{roles}']")).to_have_count(count)
    await expect(page.locator(".plan.lying .box")).to_have_count(4)
    await page_says(await site(page), "ConPaaS")


async def manage_code(page: Page) -> None:
    await expect(page.get_by_text("you may update the stage by")).to_be_visible()  # S73, S74
    bad = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not an archive"}
    await page.set_input_files("#archive", bad)  # type: ignore[arg-type]
    await page.get_by_role("button", name="upload", exact=True).click()
    await expect(page.locator("#way-upload .form-error")).to_contain_text("archive")
    good = {"name": "second.tar.gz", "mimeType": "application/gzip", "buffer": site_archive()}
    await page.set_input_files("#archive", good)  # type: ignore[arg-type]
    await page.get_by_role("button", name="upload", exact=True).click()
    uploaded = page.locator(".version", has_text="second.tar.gz")  # S78
    await expect(uploaded).to_have_attribute("id", re.compile(r"^version-code-[A-Za-z0-9]{6}$"))
    await expect(page.locator("#version-code-default")).to_contain_text("active")
    await uploaded.get_by_role("button", name="activate").click()
    await expect(uploaded).to_contain_text(re.compile("active\\s+download"), timeout=SLOW_MS)
    await expect(page.locator("#version-code-default").get_by_role("button", name="activate")).to_be_visible()
    await page_says(await site(page), "second 8")
    async with page.expect_download() as download:
        await uploaded.get_by_role("link", name="download").click()
    path = await (await download.value).path()
    assert path.read_bytes() == site_archive() or tarfile.is_tarfile(path)


async def change_settings(page: Page) -> None:
    settings = page.locator("#settings-form")
    await expect(settings.get_by_label("Software version")).to_have_value(re.compile(r"^\d\.\d$"))  # S79
    await expect(settings.get_by_label("Maximum script execution time")).to_have_value("30")  # S80
    await settings.get_by_label("Memory limit").select_option("256M")  # S81
    await settings.get_by_role("button", name="save").click()  # S82
    await expect(page.locator(".toast", has_text="configure: done")).to_be_visible(timeout=SLOW_MS)
    await page_says(await site(page), str(256 << 20))
    await expect(settings.get_by_label("Memory limit")).to_have_value("256M")


async def look_at_logs_and_history(page: Page) -> None:
    await expect(page.locator(".chart").first).to_be_visible(timeout=SLOW_MS)  # S38
    await page.get_by_role("link", name="manager log").click()  # S66
    await expect(page.locator("#log-text")).to_contain_text("nodes-requested")
    await page.go_back()
    await page.get_by_role("link", name="history", exact=True).click()
    await expect(page.locator("main")).to_contain_text("Initialized")
    await expect(page.get_by_role("cell", name="scale")).to_be_visible()


async def dashboard_card(page: Page) -> None:
    await page.get_by_role("link", name="Dashboard").first.click()
    card = page.locator(".service-card")
    await expect(card.get_by_role("link", name="Blog")).to_be_visible()  # S59
    await expect(card).to_contain_text("running")  # S60
    await expect(card).to_contain_text(re.compile("created .* ago"))
    await expect(card.locator(".instances")).to_have_text("5")  # S63
    await card.get_by_role("link", name="Blog").click()
    await page.wait_for_url("**/services/svc-*")


async def stop_and_terminate(page: Page) -> None:
    await page.get_by_role("button", name="stop", exact=True).click()  # S31
    await page.get_by_role("dialog").get_by_role("button", name="stop").click()
    await expect(page.locator("#service-state")).to_contain_text("stopped", timeout=SLOW_MS)
    await expect(page.locator("#instances-title")).to_have_text("1 instance running on Local")
    await expect(page.get_by_role("button", name="start", exact=True)).to_be_visible()  # S33
    await page.get_by_role("button", name="terminate", exact=True).click()  # S32
    dialog = page.get_by_role("dialog")
    await dialog.get_by_role("textbox").fill("Blog")
    await dialog.get_by_role("button", name="terminate").click()
    await page.wait_for_url(re.compile(r"/$"))
    await expect(page.locator(".empty-board")).to_be_visible(timeout=SLOW_MS)


async def test_a_visitor_registers_with_a_proof_of_work(tmp_path: Path, new_address: Callable[[], str]) -> None:
    block = re.sub(r"\d+$", "0/24", new_address())
    async with demo.running(tmp_path, block=block, captcha_work=10) as running, demo.chromium() as browser:
        page = await browser.new_page()
        troubles: list[str] = []
        watch(page, troubles)
        await page.goto(f"{running.url}/login")
        await page.get_by_role("link", name="register").click()
        form = page.locator("#register")
        await form.get_by_label("username").fill("grace")
        await form.get_by_label("email").fill("grace@example.org")
        await form.get_by_label("password", exact=True).fill("a long password")
        await form.get_by_label("retype password").fill("a long password")
        # the widget has begun to work when the form got the focus
        await expect(form.locator("[data-state=verified]")).to_be_visible(timeout=SLOW_MS)
        await form.get_by_role("button", name="register").click()
        await expect(page.locator(".who")).to_have_text("grace")
        await expect(page.locator(CREDITS)).to_have_text("50")
        assert troubles == []
