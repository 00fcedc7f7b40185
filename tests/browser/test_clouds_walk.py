"""Clouds with a real director, as an administrator and a user meet them: added, chosen, moved to, removed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.browser import demo
from tests.browser.test_walk import SLOW_MS, log_in, page_says, site

pytestmark = [pytest.mark.browser, pytest.mark.system, pytest.mark.timeout(300)]


async def test_an_administrator_adds_clouds_and_a_service_moves_to_one(
    tmp_path: Path, new_address: Callable[[], str]
) -> None:
    block, spare = (re.sub(r"\d+$", "0/24", new_address()) for _ in range(2))
    spare = re.sub(r"(\d+)\.0/24$", lambda match: f"{(int(match[1]) + 125) % 250}.0/24", spare)  # not the other block
    troubles: list[str] = []
    async with demo.running(tmp_path, block=block) as running, demo.chromium() as browser:
        page = await log_in(browser, running.url, troubles)
        await add_simulated(page)
        await grey_when_disabled(page)
        await add_spare(page, spare)
        await create_and_start(page)
        await move(page)
        await refuse_removal(page)
        assert [line for line in troubles if not re.search("status of (409|422)", line)] == []


async def add_simulated(page: Page) -> None:
    await page.goto("/admin")
    await page.get_by_role("link", name="manage clouds").click()
    await expect(page.locator("#cloud-local")).to_contain_text("part of the director's own settings")
    await page.get_by_role("link", name="add a cloud").click()
    await page.get_by_role("link", name="Simulated cloud").click()
    form = page.locator("#cloud-form")
    await form.get_by_label("name", exact=True).fill("clouds-of-cuckoo")
    await form.get_by_text("more settings").click()
    await form.get_by_label("Quota").fill("0")
    await form.get_by_label("Title").fill("Cuckoo")
    await form.get_by_role("button", name="test").click()
    await expect(form.locator(".form-error")).to_be_visible()  # 0 is below what a quota can be
    await form.get_by_label("Quota").fill("5")
    await form.get_by_role("button", name="test").click()
    await expect(form.locator(".ticks .good")).to_have_count(3)
    await expect(form.locator("#findings")).to_contain_text("instances: 0 of 5")
    await form.get_by_role("button", name="add cloud").click()
    await page.wait_for_url("**/admin/clouds")
    await expect(page.locator("#cloud-clouds-of-cuckoo")).to_contain_text("0.01 USD/h")


async def grey_when_disabled(page: Page) -> None:
    cuckoo = page.locator("#cloud-clouds-of-cuckoo")
    await cuckoo.get_by_role("button", name="disable").click()
    await expect(cuckoo).to_contain_text("disabled")
    await page.goto("/create")
    off = page.locator(".choice.off", has_text="Cuckoo")
    await expect(off).to_contain_text("it takes no new instances")  # S57
    await expect(off.get_by_role("radio")).to_be_disabled()
    await page.goto("/admin/clouds")
    await cuckoo.get_by_role("button", name="enable").click()
    await expect(cuckoo).to_contain_text("enabled")


async def add_spare(page: Page, block: str) -> None:
    await page.goto("/admin/add-cloud?driver=local")
    form = page.locator("#cloud-form")
    await form.get_by_label("name", exact=True).fill("spare")
    await form.get_by_label("Block").fill(block)
    await form.get_by_label("Title").fill("Spare")
    await form.get_by_label("Prices per hour").fill("* = 0.25")
    await form.get_by_label("Currency of the prices").fill("EUR")
    await form.get_by_role("button", name="add cloud").click()
    await page.wait_for_url("**/admin/clouds")
    await page.locator("#cloud-spare").get_by_role("link", name="edit").click()
    await expect(form.get_by_label("Block")).to_have_value(block)
    await form.get_by_label("Limit per user").fill("4")
    await form.get_by_role("button", name="save").click()
    await page.wait_for_url("**/admin/clouds")
    await expect(page.locator("#cloud-spare")).to_contain_text("limit per user")


async def create_and_start(page: Page) -> None:
    await page.goto("/create")
    await page.get_by_role("radio", name="php").check()
    await expect(page.get_by_role("radio", name="Local")).to_be_checked()
    await expect(page.locator(".place", has_text="Spare")).to_contain_text("0 of your 4 instances in use")
    await page.get_by_label("name", exact=True).fill("Blog")
    await page.get_by_role("button", name="create service").click()
    await page.wait_for_url("**/services/svc-*")
    await page.get_by_role("button", name="start", exact=True).click(timeout=SLOW_MS)
    await expect(page.locator("#service-state")).to_contain_text("running · started", timeout=SLOW_MS)
    await expect(page.locator("#service-price")).to_have_text("free")


async def move(page: Page) -> None:
    before = await site(page)
    await page.get_by_role("button", name="move…").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_role("radio", name="Spare").check()
    await expect(dialog.locator(".fate:visible")).to_contain_text("2 new instances are made on Spare")
    await dialog.get_by_role("button", name="move").click()
    await expect(page.locator("#instances-title")).to_have_text("2 instances running on Spare", timeout=SLOW_MS)
    await expect(page.locator("#service-state")).to_contain_text("running · started", timeout=SLOW_MS)
    await expect(page.locator("#service-price")).to_contain_text("0.50 EUR/h")
    for row in await page.locator(".instance").all():
        await expect(row).to_contain_text("Spare")
    assert await site(page) != before
    await page_says(await site(page), "ConPaaS")


async def refuse_removal(page: Page) -> None:
    await page.goto("/admin/clouds")
    await page.locator("#cloud-spare").get_by_role("button", name="remove").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_role("button", name="remove").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("'spare' is in use (instances: 2, volumes: 0)")
    await dialog.get_by_role("button", name="Cancel").click()
    await page.locator("#cloud-clouds-of-cuckoo").get_by_role("button", name="remove").click()
    await page.get_by_role("dialog").get_by_role("button", name="remove").click()
    await expect(page.locator("#cloud-clouds-of-cuckoo")).to_have_count(0)
