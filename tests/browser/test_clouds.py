"""Clouds in the hands of administrators, and of those who choose one: a fake API behind the pages."""

import re
from decimal import Decimal

import pytest
from playwright.async_api import Page, expect

from conpaas.core.errors import ConflictError
from conpaas.core.messages import public
from conpaas.core.messages.public import CloudView, FindingView, RoomView
from tests.browser.conftest import Stage

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def sent(stage: Stage, name: str) -> list[object]:
    """Return the bodies of the calls of this name."""
    return [body for called, _, body in stage.api.calls if called == name]


async def fill(page: Page) -> None:
    form = page.locator("#cloud-form")
    await form.get_by_label("name", exact=True).fill("north-2")
    await form.get_by_label("Region").fill("north-2")
    await form.get_by_label("Secret key").fill("hush")
    await form.get_by_label("Subnets").fill("net-1\n\nnet-2")
    await form.get_by_text("more settings, which have defaults").click()
    await form.get_by_label("Spot").check()
    await form.get_by_label("Limit per user").fill("2")
    await form.get_by_label("Prices per hour").fill("small = 0.02\n* = 0.5")
    await form.get_by_label("Currency of the prices").fill("EUR")


async def test_an_administrator_adds_a_cloud_after_testing_it(stage: Stage) -> None:
    page = await stage.visit("/admin/clouds")
    await page.get_by_role("link", name="add a cloud").click()
    await page.get_by_role("link", name="North").click()
    await fill(page)
    await expect(page.get_by_label("Secret key")).to_have_attribute("type", "password")
    await page.get_by_role("button", name="test").click()
    await expect(page.locator(".ticks .good")).to_contain_text(["the endpoint", "the credentials"])
    await expect(page.locator("#findings")).to_contain_text("instances: 4 of 20 in use")
    assert sent(stage, "ADD_CLOUD") == []
    await page.get_by_role("button", name="add cloud").click()
    await page.wait_for_url("**/admin/clouds")
    await expect(page.locator("#cloud-north-2")).to_contain_text("enabled")
    (form,) = sent(stage, "ADD_CLOUD")
    assert isinstance(form, public.CloudForm)
    assert form.name == "north-2"
    assert form.settings == {
        "region": "north-2",
        "secret_key": "hush",
        "subnets": ["net-1", "net-2"],
        "spot": True,
    }
    assert form.options == public.CloudOptions(
        user_instances=2, currency="EUR", prices={"small": Decimal("0.02"), "*": Decimal("0.5")}
    )
    assert stage.troubles == []


async def test_a_cloud_that_fails_its_test_is_only_added_on_demand(stage: Stage) -> None:
    wrong = FindingView(name="the credentials", ok=False, detail="key is revoked", hint="make a new one")
    stage.api.examination = public.Examination(findings=(wrong,))
    page = await stage.visit("/admin/add-cloud?driver=north")
    await fill(page)
    await page.get_by_role("button", name="test").click()
    await expect(page.locator(".ticks .bad")).to_contain_text("the credentials key is revoked")
    await page.get_by_role("button", name="add cloud").click()
    await expect(page.locator("#cloud-form .form-error")).to_contain_text("the credentials: key is revoked")
    await expect(page.locator("#cloud-form .form-error")).to_contain_text("make a new one; or save it without a test")
    await expect(page.get_by_label("Secret key")).to_have_value("hush")  # nothing that was written is lost
    assert sent(stage, "ADD_CLOUD") == []
    await page.get_by_label("save without a test").check()
    await page.get_by_role("button", name="add cloud").click()
    await page.wait_for_url("**/admin/clouds")
    assert len(sent(stage, "ADD_CLOUD")) == 1


async def test_administrators_read_the_deployments_id_and_how_much_room_there_is(stage: Stage) -> None:
    stage.api.examination = public.Examination(findings=(), quota=(RoomView(name="disk", used=3 << 30, limit=1 << 40),))
    page = await stage.visit("/admin/clouds")
    await expect(page.locator("#deployment")).to_have_text("dep-test")
    await page.locator("#cloud-north").get_by_role("button", name="test").click()
    await expect(page.locator("#findings-north")).to_contain_text("disk: 3G of 1T in use")


async def test_both_pages_of_administrators_tell_the_same_of_a_cloud(stage: Stage) -> None:
    stage.api.accounts[1] = stage.api.accounts[1].model_copy(update={"usable": False, "reason": "no image"})
    page = await stage.visit("/admin")
    await expect(page.get_by_text("unusable")).to_have_count(1)
    await page.goto("/admin/clouds")
    await expect(page.locator("#cloud-north .state")).to_have_text("unusable")


async def test_a_secret_is_never_shown_and_stays_unless_another_is_written(stage: Stage) -> None:
    page = await stage.visit("/admin/clouds/north")
    secret = page.get_by_label("Secret key")
    await expect(secret).to_have_value("")
    await expect(secret).to_have_attribute("placeholder", "unchanged")
    await expect(page.get_by_label("Region")).to_have_value("north-1")
    await page.get_by_label("Title").fill("Far North")
    await page.get_by_role("button", name="save").click()
    await page.wait_for_url("**/admin/clouds")
    (form,) = sent(stage, "CHANGE_CLOUD")
    assert isinstance(form, public.CloudForm)
    assert form.settings == {"region": "north-1", "secret_key": "**********"}
    assert form.options.title == "Far North"
    assert form.options.user_instances == 3
    assert sent(stage, "TRY_CLOUD") == []  # only words about it have changed


async def test_a_wrong_word_is_told_at_the_form(stage: Stage) -> None:
    page = await stage.visit("/admin/clouds/north")
    await page.get_by_label("Prices per hour").fill("cheap")
    await page.get_by_role("button", name="save").click()
    await expect(page.locator("#cloud-form .form-error")).to_contain_text("'cheap' is not 'name = value'")


async def test_a_cloud_is_tested_disabled_and_removed_where_it_is_listed(stage: Stage) -> None:
    page = await stage.visit("/admin/clouds")
    north = page.locator("#cloud-north")
    await expect(north).to_contain_text("in trouble")
    await expect(north).to_contain_text("no answer within 30 s")
    await expect(north).to_contain_text("0.0208 USD/h")
    await north.get_by_role("button", name="test").click()
    await expect(north.locator(".ticks")).to_contain_text("the credentials")
    await north.get_by_role("button", name="disable").click()
    await expect(north).to_contain_text("disabled")
    await expect(north.locator(".ticks")).to_be_visible()  # the page was drawn anew around it
    stage.api.fail["REMOVE_CLOUD"] = ConflictError("'north' is in use (instances: 4, volumes: 0)", hint="move them")
    await north.get_by_role("button", name="remove").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_role("button", name="remove").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("'north' is in use (instances: 4, volumes: 0)")
    await expect(dialog.get_by_role("alert")).to_contain_text("move them")
    del stage.api.fail["REMOVE_CLOUD"]
    await dialog.get_by_role("button", name="remove").click()
    await expect(north).to_have_count(0)


async def test_a_cloud_of_the_settings_file_is_not_changed_here(stage: Stage) -> None:
    page = await stage.visit("/admin/clouds")
    local = page.locator("#cloud-local")
    await expect(local).to_contain_text("part of the director's own settings")
    assert await local.get_by_role("button").all_inner_texts() == ["test"]


async def test_a_cloud_that_takes_no_instances_is_grey_and_says_why(stage: Stage) -> None:
    page = await stage.visit("/create")
    off = page.locator(".choice.off", has_text="Amazon EC2")
    await expect(off).to_contain_text("no credentials are configured")
    await expect(off.get_by_role("radio")).to_be_disabled()
    await expect(page.get_by_text("Only Local is enabled on this deployment")).to_be_visible()


async def test_a_service_is_created_with_size_and_fallback(stage: Stage) -> None:
    stage.api.spread()
    stage.api.clouds.append(CloudView(name="south", title="South", driver="south"))
    page = await stage.visit("/create")
    size = page.get_by_label("size of its instances")
    await expect(size).to_be_hidden()
    await page.get_by_role("radio", name="The North").check()
    await expect(size.locator("option")).to_have_text(
        ["small · 1 core · 1G · 0.0208 USD/h", "large · 8 cores · 16G · 0.1664 USD/h"]
    )
    await size.select_option("large")
    await page.get_by_text("if the cloud refuses an instance").click()
    await page.get_by_label("first").select_option("South")
    await page.get_by_label("second").select_option("Local")
    await page.get_by_role("button", name="create service").click()
    await page.wait_for_url("**/services/svc-9")
    (form,) = sent(stage, "CREATE_SERVICE")
    assert isinstance(form, public.CreateService)
    assert (form.cloud, form.size, form.fallback) == ("north", "large", ("south", "local"))  # in the order of choice


async def test_clouds_of_one_title_are_told_apart(stage: Stage) -> None:
    stage.api.clouds.append(CloudView(name="spare", title="Local", driver="local"))
    page = await stage.visit("/create")
    await expect(page.locator(".place strong")).to_have_text(["Local (local)", "Amazon EC2", "Local (spare)"])


async def test_the_rows_of_instances_say_where_how_far_and_what_it_costs(stage: Stage) -> None:
    stage.api.spread()
    page = await stage.visit("/services/svc-2")
    await expect(page.locator("#instances-title")).to_have_text("6 instances running on Local and The North")
    await expect(page.locator("#service-price")).to_have_text("0.0208 USD/h, 12.50 USD so far")
    away = page.locator("#node-ins-15763")
    await expect(away).to_contain_text(re.compile("The North · small · north-1a · 0.0208 USD/h, 0.1352 USD so far"))
    booting = page.locator("#node-ins-15764")
    await expect(booting.locator(".fell-over")).to_have_text("meant for The North")
    await expect(booting.locator(".stage")).to_have_text("unpacking the engines")
    await expect(booting).to_contain_text("Local · free")
    await page.goto("/")
    await expect(page.locator("#card-svc-2 .price")).to_have_text("0.0208 USD/h")
    await expect(page.locator("#app-app-1 .price")).to_have_text("0.0208 USD/h, 12.50 USD so far")
    await expect(page.locator("#card-svc-1 .price")).to_have_count(0)  # nothing is said where nothing is known


async def test_nodes_are_added_on_the_cloud_that_was_chosen(stage: Stage) -> None:
    stage.api.spread()
    page = await stage.visit("/services/svc-2")
    await page.locator("[data-role=web]").click()
    await page.get_by_label("no. of instances").fill("+1")
    await page.get_by_role("button", name="OK").click()
    total = page.locator("#scale-sum")
    await expect(total).to_have_text("about 1 instance more, 1 credit per hour more")  # its own cloud asks no price
    await page.locator("#scale-cloud").select_option("north")
    await expect(total).to_have_text("about 1 instance more, 1 credit and 0.0208 USD per hour more")
    await page.get_by_role("button", name="submit").click()
    await expect(page.locator(".toast")).to_contain_text("scale: begun")
    (form,) = sent(stage, "SCALE")
    assert isinstance(form, public.Scale)
    assert (form.roles, form.cloud) == ({"web": 1}, "north")


async def test_one_cloud_without_sizes_leaves_nothing_to_choose(stage: Stage) -> None:
    page = await stage.visit("/services/svc-2")
    await expect(page.locator("#scale-cloud")).to_have_count(0)
    await expect(page.get_by_role("button", name="move…")).to_have_count(0)


async def test_a_service_is_moved_after_being_told_what_will_happen(stage: Stage) -> None:
    stage.api.spread()
    page = await stage.visit("/services/svc-2")
    await page.get_by_role("button", name="move…").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog.get_by_role("radio", name="Local")).to_be_checked()
    await dialog.get_by_role("radio", name="Local").focus()
    await page.keyboard.press("ArrowDown")
    await expect(dialog.locator(".fate:visible")).to_contain_text("5 new instances are made on The North")
    await dialog.get_by_label("size of its instances").select_option("large")
    await dialog.get_by_role("button", name="move").click()
    await expect(page.locator(".toast")).to_contain_text("move: begun")
    (form,) = sent(stage, "MOVE")
    assert isinstance(form, public.Move)
    assert (form.cloud, form.sizes, form.fallback) == ("north", {"north": "large"}, ())  # it cannot stand in for itself


async def test_a_form_without_scripts_shows_what_was_found_on_a_page(stage: Stage) -> None:
    page = await stage.visit("/admin/add-cloud?driver=north")
    cookies = await page.context.cookies()
    context = await stage.browser.new_context(base_url=stage.url, java_script_enabled=False)
    await context.add_cookies(cookies)  # type: ignore[arg-type]
    plain = await context.new_page()
    await plain.goto("/admin/add-cloud?driver=north")
    await plain.get_by_label("Region").fill("north-2")
    await plain.get_by_label("Secret key").fill("hush")
    await plain.get_by_role("button", name="test").click()
    await expect(plain.locator(".ticks")).to_contain_text("the credentials")
    await plain.go_back()
    await plain.get_by_role("button", name="add cloud").click()
    await plain.wait_for_url("**/admin/clouds")
    assert len(sent(stage, "ADD_CLOUD")) == 1
