"""What the UI lets through and what not: forged requests, cookies, headers, paths."""

import re

import aiohttp
import pytest
from yarl import URL

from conpaas.web import visits
from tests.browser.fake_api import TOKEN, FakeApi

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


async def log_in(client: aiohttp.ClientSession, url: str, **more: str) -> aiohttp.ClientResponse:
    async with client.get(f"{url}/login") as page:
        csrf = token_of(await page.text())
    form = {"csrf": csrf, "username": "ada", "password": "right password", **more}
    async with client.post(f"{url}/login", data=form, allow_redirects=False) as answer:
        return answer


def token_of(html: str) -> str:
    found = re.search(r'<meta name="csrf" content="([0-9a-f]{64})">', html)
    assert found is not None
    return found[1]


def new_client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))


async def test_the_session_cookie_is_out_of_reach_for_scripts_and_other_sites(url: str) -> None:
    async with new_client() as client:
        answer = await log_in(client, url)
        assert answer.status == 303
        cookie = next(value for name, value in answer.cookies.items() if "session" in name)
        assert cookie.value == TOKEN
        assert cookie["httponly"]
        assert cookie["samesite"] == "Strict"


@pytest.mark.parametrize("path", ["/", "/services/svc-1", "/nowhere", "/static/x/nothing.js", "/login"])
async def test_every_answer_bears_the_policy(url: str, path: str) -> None:
    async with new_client() as client, client.get(f"{url}{path}", allow_redirects=False) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_an_action_without_the_token_of_the_page_is_refused(url: str, api: FakeApi) -> None:
    async with new_client() as client:
        await log_in(client, url)
        for form in ({}, {"csrf": "0" * 64}, {"csrf": "ü"}):
            async with client.post(f"{url}/services/svc-1/start", data=form) as answer:
                assert answer.status == 403
                assert "this form is out of date" in await answer.text()
        assert not [call for call in api.calls if call[0] == "START"]


async def test_a_page_of_another_origin_may_not_act(url: str, api: FakeApi) -> None:
    async with new_client() as client:
        await log_in(client, url)
        async with client.get(f"{url}/") as page:
            csrf = token_of(await page.text())
        for origin in ("https://evil.example", "null", url.replace("127.0.0.1", "127.0.0.2")):
            async with client.post(
                f"{url}/services/svc-1/start", data={"csrf": csrf}, headers={"Origin": origin}
            ) as answer:
                assert answer.status == 403
        assert not [call for call in api.calls if call[0] == "START"]
        async with client.post(
            f"{url}/services/svc-1/start", data={"csrf": csrf}, headers={"Origin": url}, allow_redirects=False
        ) as answer:
            assert answer.status == 303
            assert answer.headers["Location"] == "/services/svc-1"


async def test_the_token_of_one_visitor_is_nothing_for_another(url: str) -> None:
    async with new_client() as one, new_client() as other:
        async with one.get(f"{url}/login") as page:
            csrf = token_of(await page.text())
        async with other.get(f"{url}/login"):
            pass
        form = {"csrf": csrf, "username": "ada", "password": "right password"}
        async with other.post(f"{url}/login", data=form) as answer:
            assert answer.status == 403


@pytest.mark.parametrize(
    "where", ["//evil.example/", "https://evil.example/", "/\\evil.example", "javascript:alert(1)"]
)
async def test_login_leads_to_no_other_site(url: str, where: str) -> None:
    async with new_client() as client:
        assert (await log_in(client, url, next=where)).headers["Location"] == "/"


@pytest.mark.parametrize(
    "path", ["/", "/create", "/services/svc-1", "/services/svc-1/logs", "/applications", "/account", "/admin"]
)
async def test_strangers_are_sent_to_the_login(url: str, path: str) -> None:
    async with new_client() as client, client.get(f"{url}{path}", allow_redirects=False) as answer:
        assert answer.status == 303
        assert answer.headers["Location"].startswith("/login?next=%2F")


@pytest.mark.parametrize("path", ["/live", "/services/svc-1/metrics", "/services/svc-1/logs/manager/manager.log"])
async def test_strangers_hear_nothing(url: str, path: str) -> None:
    async with new_client() as client, client.get(f"{url}{path}", headers={"Accept": "application/json"}) as answer:
        assert answer.status == 401
        assert (await answer.json())["code"] == "not-authenticated"


@pytest.mark.parametrize(
    "path",
    [
        "/services/..%2f..%2fme",
        "/services/svc-1%2fstart",
        "/services/svc-1/logs/..%2fx/y",
        "/static/x/..%2f..%2fapp.py",
    ],
)
async def test_a_path_cannot_reach_beside_its_resource(url: str, path: str, api: FakeApi) -> None:
    async with new_client() as client:
        await log_in(client, url)
        api.calls.clear()
        async with client.get(URL(f"{url}{path}", encoded=True)) as answer:
            assert answer.status == 404
        assert {name for name, _, _ in api.calls} <= {"GET_ME"}


async def test_an_unknown_page_is_answered_in_style_and_an_unknown_call_as_a_problem(url: str) -> None:
    async with new_client() as client:
        async with client.get(f"{url}/nowhere") as answer:
            assert answer.status == 404
            assert "there is no such page" in await answer.text()
        async with client.get(f"{url}/api/v1/nowhere") as answer:
            assert answer.status == 404
            assert answer.content_type == "application/problem+json"


async def test_static_files_are_kept_for_good_under_the_name_of_their_content(url: str) -> None:
    async with new_client() as client:
        async with client.get(f"{url}/login") as page:
            style = re.search(r'href="(/static/[0-9a-f]{16}/style.css)"', await page.text())
        assert style is not None
        async with client.get(f"{url}{style[1]}") as answer:
            assert "immutable" in answer.headers["Cache-Control"]
            assert answer.content_type == "text/css"
        async with client.get(f"{url}/static/vendor/swagger-ui-dist/swagger-ui.css") as answer:
            assert answer.status == 200
            assert answer.headers["Cache-Control"] == "no-cache"


async def test_logout_ends_the_session_here_and_at_the_director(url: str, api: FakeApi) -> None:
    async with new_client() as client:
        await log_in(client, url)
        async with client.get(f"{url}/") as page:
            csrf = token_of(await page.text())
        async with client.post(f"{url}/logout", data={"csrf": csrf}, allow_redirects=False) as answer:
            assert answer.status == 303
        assert "LOGOUT" in {name for name, _, _ in api.calls}
        async with client.get(f"{url}/", allow_redirects=False) as answer:
            assert answer.status == 303


async def test_clients_of_old_sessions_are_closed() -> None:
    clients = visits.Clients(lambda: "http://127.0.0.1:1")
    first = await clients.of("token-0")
    for number in range(visits._CLIENTS_KEPT):
        await clients.of(f"token-{number + 1}")
    assert await clients.of("token-0") is not first
    await clients.close()
