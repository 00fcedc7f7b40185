"""Every page, with a fake API behind it: what it shows, what it refuses, how it behaves in the hands of people."""

import re

import pytest
from playwright.async_api import Page, expect

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import ConflictError, NotAuthenticatedError, QuotaExceededError
from conpaas.core.messages.public import Live
from conpaas.core.states import OperationState, ServiceState
from tests.browser.conftest import Stage

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

NASTY = """"><img src=x onerror=alert(1)><script>alert(2)</script>'&{{7*7}}"""
PATHS = (
    "/",
    "/create",
    "/services/svc-1",
    "/services/svc-2",
    "/services/svc-4",
    "/services/svc-2/logs",
    "/services/svc-2/activity",
    "/applications",
    "/account",
    "/admin",
    "/admin/clouds",
    "/admin/clouds/north",
    "/admin/add-cloud",
    "/admin/add-cloud?driver=north",
    "/help",
)


async def width_of(page: Page) -> int:
    width: int = await page.evaluate("document.documentElement.scrollWidth")
    return width


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1440, True)])
async def test_every_page_fits_its_screen_and_breaks_no_policy(stage: Stage, width: int, dark: bool) -> None:
    stage.api.spread()
    page = await stage.visit(width=width, dark=dark)
    for path in PATHS:
        await page.goto(path)
        await expect(page.locator("main")).to_be_visible()
        await expect(page.locator("#credits")).to_have_text("9994")
        assert await width_of(page) <= width, path
    assert stage.troubles == []


async def test_names_are_only_ever_text(stage: Stage) -> None:
    api = stage.api
    api.services = [
        item.model_copy(update={"name": NASTY, "reason": NASTY, "facts": {NASTY: NASTY}}) for item in api.services
    ]
    api.applications = [item.model_copy(update={"name": NASTY}) for item in api.applications]
    api.code = [item.model_copy(update={"filename": NASTY, "description": NASTY}) for item in api.code]
    api.operations = [item.model_copy(update={"message": NASTY, "error": NASTY}) for item in api.operations]
    api.name = NASTY
    api.clouds = [item.model_copy(update={"title": NASTY, "reason": NASTY}) for item in api.clouds]
    api.accounts = [item.model_copy(update={"trouble": NASTY, "settings": {"region": NASTY}}) for item in api.accounts]
    page = await stage.visit()
    for path in PATHS:
        await page.goto(path)
        await expect(page.locator("main")).to_be_visible()
        assert await page.locator("img, main script").count() == 0, path
    await page.goto("about:blank")
    await stage.silence()
    await page.goto("/services/svc-2")
    await expect(page.locator("#service-name")).to_have_value(NASTY)
    await stage.listening()
    api.publish(Live(kind="operation", operation=api.operations[2]))
    await expect(page.locator(".toast.bad")).to_contain_text("<script>")
    assert stage.troubles == []


async def test_the_empty_dashboard_says_what_to_do(stage: Stage) -> None:
    stage.api.services = []
    page = await stage.visit()
    board = page.locator(".empty-board")
    await expect(board).to_have_text("You have no services in the dashboard. Go ahead and create a service.")
    await board.get_by_role("link", name="create a service").click()
    await page.wait_for_url("**/create")


async def test_a_change_of_state_is_shown_without_a_reload_and_disturbs_nobody(stage: Stage) -> None:
    api = stage.api
    page = await stage.visit("/services/svc-2")
    await page.evaluate("window.unreloaded = true")
    await page.locator("#scripts summary").click()
    await page.fill("#start-script", "#!/bin/sh\nhalf written")
    await expect(page.locator("#service-state")).to_contain_text("adapting")

    await stage.listening()
    api.replace(api.one("svc-2").model_copy(update={"state": ServiceState.RUNNING, "operation": None}))
    api.credits = 9993
    api.publish(Live(kind="credits", credits=9993))

    await expect(page.locator("#service-state")).to_contain_text("running · started")
    await expect(page.locator("#credits")).to_have_text("9993")
    assert await page.input_value("#start-script") == "#!/bin/sh\nhalf written"
    assert await page.evaluate("window.unreloaded")
    assert stage.troubles == []


async def test_a_service_that_is_gone_leads_back_to_the_dashboard(stage: Stage) -> None:
    page = await stage.visit("/services/svc-1")
    await stage.listening()
    stage.api.services = []
    stage.api.publish(Live(kind="removed", id="svc-1"))
    await page.wait_for_url(f"{stage.url}/")


async def test_an_operation_that_failed_is_told_and_stays_until_it_is_put_away(stage: Stage) -> None:
    page = await stage.visit("/services/svc-2")
    await stage.listening()
    failed = stage.api.operations[0].model_copy(
        update={"state": OperationState.FAILED, "error": "2 of 3 nodes never booted"}
    )
    stage.api.publish(Live(kind="operation", operation=failed))
    toast = page.get_by_role("alert").locator(".toast")
    await expect(toast).to_contain_text("scale failed")
    await expect(toast).to_contain_text("2 of 3 nodes never booted")
    await toast.get_by_role("button", name="put away").click()
    await expect(toast).to_have_count(0)


async def test_a_refused_action_says_why_and_what_to_do(stage: Stage) -> None:
    stage.api.fail["START"] = QuotaExceededError("4 of 4 instances are in use")
    page = await stage.visit("/services/svc-1")
    await page.get_by_role("button", name="start").click()
    toast = page.locator(".toast.bad")
    await expect(toast).to_contain_text("4 of 4 instances are in use")
    await expect(toast).to_contain_text("raise the quota")


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("abc", "“abc” is not a number of instances: write +1"),
        ("+0", "“+0” changes nothing"),
        ("-0", "“-0” changes nothing"),
        ("", "write a number"),
        ("1.5", "is not a number of instances"),
        ("1000000000", "1000000000 are too many: at most 64"),
        ("-3", "only 2 web can be removed"),
    ],
)
async def test_a_bad_number_of_instances_is_answered_in_the_dialog(stage: Stage, word: str, answer: str) -> None:
    page = await stage.visit("/services/svc-2")
    await page.locator("[data-role=web]").click()
    await page.get_by_label("no. of instances (e.g. +1, -2)").fill(word)
    await page.keyboard.press("Enter")
    await expect(page.locator("#role-error")).to_contain_text(answer)
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    await expect(page.get_by_role("button", name="submit")).to_be_disabled()


async def test_changes_of_roles_are_gathered_and_sent_together(stage: Stage) -> None:
    page = await stage.visit("/services/svc-2")
    for role, word in (("web", "2"), ("php", "-1")):
        await page.locator(f"[data-role={role}]").click()
        await page.get_by_label("no. of instances").fill(word)
        await page.get_by_role("button", name="OK").click()
    await expect(page.locator("[data-role=web]")).to_contain_text("+2 web")
    await expect(page.locator("[data-role=php]")).to_contain_text("-1 php")
    await stage.listening()
    stage.api.publish(Live(kind="event"))  # the page is drawn anew: nothing is forgotten
    await page.get_by_role("button", name="submit").click()
    await expect(page.locator(".toast")).to_contain_text("scale: begun")
    assert [body.roles for name, _, body in stage.api.calls if name == "SCALE"] == [{"web": 2, "php": -1}]
    await expect(page.locator("[data-role=web] .delta")).to_have_text("")


async def test_termination_asks_for_the_name(stage: Stage) -> None:
    page = await stage.visit("/services/svc-1")
    await page.get_by_role("button", name="terminate").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("type New Php Service to go on").fill("new php service")
    await dialog.get_by_role("button", name="terminate").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("is not the name of the service")
    assert not [call for call in stage.api.calls if call[0] == "TERMINATE"]
    await dialog.get_by_label("type New Php Service").fill("New Php Service")
    await dialog.get_by_role("button", name="terminate").click()
    await page.wait_for_url(f"{stage.url}/")
    assert [call[1] for call in stage.api.calls if call[0] == "TERMINATE"] == [{"service": "svc-1"}]


async def test_the_keyboard_reaches_everything(stage: Stage) -> None:
    page = await stage.visit("/services/svc-2")
    await page.keyboard.press("Tab")
    await expect(page.get_by_text("Skip to the content")).to_be_focused()
    role = page.locator("[data-role=web]")
    await role.focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("no. of instances")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(role).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("no. of instances")).to_be_focused()
    await page.keyboard.type("+1")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="submit")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator(".toast")).to_contain_text("scale: begun")
    outline = await page.locator("[data-role=php]").evaluate("e => (e.focus(), getComputedStyle(e).outlineStyle)")
    assert outline == "solid"


async def test_a_name_is_changed_in_place(stage: Stage) -> None:
    page = await stage.visit("/services/svc-1")
    name = page.get_by_label("name of the service")
    await name.fill("Blog")
    await name.press("Enter")
    await expect(page.locator(".toast")).to_contain_text("now called Blog")
    await expect(page).to_have_title("Blog · ConPaaS")
    assert len([call for call in stage.api.calls if call[0] == "RENAME_SERVICE"]) == 1
    await name.fill("Nonsense")
    await name.press("Escape")
    await expect(name).to_have_value("Blog")


async def test_a_type_without_a_page_gets_settings_and_commands_as_forms(stage: Stage) -> None:
    page = await stage.visit("/services/svc-4")
    await page.get_by_label("Replicas").fill("3")
    await page.get_by_label("Persistent").uncheck()
    await page.get_by_role("button", name="save", exact=True).click()
    await expect(page.locator(".toast")).to_contain_text("configure: begun")
    sent = [body.settings for name, _, body in stage.api.calls if name == "CHANGE_SETTINGS"]
    assert sent == [{"replicas": 3, "persistent": False, "label": ""}]
    await page.locator("#commands summary").click()
    await page.get_by_role("button", name="run").click()
    await expect(page.locator(".answer")).to_contain_text("<b>here</b>")


async def test_an_archive_is_uploaded_with_progress_and_listed(stage: Stage) -> None:
    page = await stage.visit("/services/svc-2")
    body = b"x" * 3_000_000
    await page.set_input_files("#archive", {"name": "my site.tar.gz", "mimeType": "application/gzip", "buffer": body})
    await expect(page.locator("#chosen")).to_have_text("my site.tar.gz, 2.9 MB")
    await page.get_by_role("button", name="upload", exact=True).click()
    await expect(page.locator("#version-code-up2")).to_contain_text("my site.tar.gz · 2.9M")
    await expect(page.locator("#version-code-up2").get_by_role("button", name="activate")).to_be_visible()


async def test_a_refused_archive_is_told_at_the_form(stage: Stage) -> None:
    stage.api.fail["UPLOAD_CODE"] = ConflictError("there are 100 versions", hint="delete one")
    page = await stage.visit("/services/svc-2")
    await page.set_input_files("#archive", {"name": "a.zip", "mimeType": "application/zip", "buffer": b"PK"})
    await page.get_by_role("button", name="upload", exact=True).click()
    await expect(page.locator("#way-upload .form-error")).to_contain_text("there are 100 versions")


async def test_the_log_is_followed(stage: Stage) -> None:
    page = await stage.visit("/services/svc-2/logs")
    await expect(page.locator("#log-text")).to_contain_text("stage=59 nodes=3")
    await expect(page.locator("#log-text")).to_contain_text("08:02:11.959 info    enrolled")
    bottom = "e => e.scrollTop + e.clientHeight >= e.scrollHeight - 2"

    async def at_the_bottom() -> bool | None:
        return True if await page.locator("#log-text").evaluate(bottom) else None

    await tasks.wait_for(at_the_bottom, timeout_s=30, what="the end of the log", clock=SYSTEM_CLOCK)


async def test_the_charts_show_the_service_and_each_node(stage: Stage) -> None:
    page = await stage.visit("/services/svc-2")
    await expect(page.locator(".chart h3")).to_contain_text(["requests", "response time", "errors", "throughput"])
    await page.select_option("#chart-node", "ins-15762")
    await expect(page.locator(".chart h3")).to_contain_text(["processor", "memory"])


async def test_a_token_is_shown_once(stage: Stage) -> None:
    page = await stage.visit("/account")
    await page.get_by_label("new token", exact=True).fill("ci")
    await page.get_by_role("button", name="create token").click()
    await expect(page.get_by_role("dialog")).to_contain_text("conpaas-secret-once")
    await page.get_by_role("button", name="done").click()
    await expect(page.locator("#token-tok-2")).to_contain_text("ci")
    await page.reload()
    assert "conpaas-secret-once" not in await page.content()


async def test_colours_are_chosen_and_remembered(stage: Stage) -> None:
    page = await stage.visit()
    button = page.locator("[data-theme-button]")
    await button.click()
    await button.click()
    await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    await page.reload()
    await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    await expect(button).to_have_attribute("aria-label", "Colours: dark")


async def test_a_wrong_password_is_told_at_the_form_and_a_right_one_leads_on(stage: Stage) -> None:
    page = await stage.visit("/services/svc-1/logs")  # `visit` comes here by the login
    await page.get_by_role("button", name="logout").click()
    await page.wait_for_url("**/login")
    await page.fill("#login-name", "ada")
    await page.fill("#login-password", "wrong")
    await page.get_by_role("button", name="login").click()
    await expect(page.locator("#login .form-error")).to_contain_text("wrong user name or password")


async def test_a_session_that_has_ended_leads_to_the_login(stage: Stage) -> None:
    page = await stage.visit("/services/svc-1")
    stage.api.fail["GET_ME"] = NotAuthenticatedError("the session has ended")
    await page.reload()
    await page.wait_for_url(re.compile(r"/login\?next=%2Fservices%2Fsvc-1"))


async def test_login_and_registration_take_turns_on_one_page(stage: Stage) -> None:
    context = await stage.browser.new_context(base_url=stage.url)
    page = await context.new_page()
    await page.goto("/login")
    await page.get_by_role("link", name="register").click()
    labels = ("username", "email", "password", "retype password", "first name", "last name", "affiliation")
    for label in labels:
        await expect(page.locator("#register").get_by_label(label, exact=True)).to_be_visible()
    await page.locator("#register").get_by_role("link", name="login").click()
    await expect(page.locator("#login")).to_be_visible()
    await expect(page.locator("#register")).to_be_hidden()
