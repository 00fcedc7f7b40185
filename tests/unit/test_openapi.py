"""The description of the public API is valid, complete, and shown by a page that loads nothing foreign."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from openapi_spec_validator import OpenAPIV31SpecValidator
from playwright.async_api import async_playwright

import conpaas
from conpaas.core.errors import all_errors
from conpaas.core.messages import public
from conpaas.core.messages.base import Endpoint, Who
from conpaas.director import openapi

DOCUMENT = openapi.document("3.0.0")
ENDPOINTS = openapi.endpoints()


def operation(endpoint: Endpoint) -> Any:
    return DOCUMENT["paths"][endpoint.path][endpoint.method.lower()]


def test_the_document_is_valid_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_every_endpoint_is_described_once() -> None:
    described = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]

    assert sorted(described) == sorted((e.path, e.method.lower()) for e in ENDPOINTS.values())
    assert len(ENDPOINTS) > 40


@pytest.mark.parametrize("name", ENDPOINTS)
def test_an_endpoint_says_who_may_call_it_and_that_it_may_fail(name: str) -> None:
    endpoint = ENDPOINTS[name]
    described = operation(endpoint)

    open_to_all = Who.ANYONE in endpoint.allow
    assert described["security"] == ([] if open_to_all else [{"bearer": [endpoint.scope]}])
    assert described["responses"]["default"] == {"$ref": "#/components/responses/Problem"}
    assert set(described["tags"]) <= {tag["name"] for tag in DOCUMENT["tags"]}
    declared = [p["name"] for p in described["parameters"] if p["in"] == "path"]
    assert declared == re.findall(r"{(\w+)}", endpoint.path)


def test_every_error_is_listed_with_its_status() -> None:
    text = DOCUMENT["components"]["responses"]["Problem"]["description"]

    assert all(f"| {kind.status} | `{kind.code}` |" in text for kind in all_errors().values())


def test_streams_are_described_as_streams() -> None:
    upload, download = operation(public.UPLOAD_CODE), operation(public.DOWNLOAD_CODE)

    assert list(upload["requestBody"]["content"]) == ["application/octet-stream"]
    assert [p["name"] for p in upload["parameters"]] == ["service", "filename", "description"]
    assert list(download["responses"]["200"]["content"]) == ["application/octet-stream"]
    assert list(operation(public.GET_EVENTS)["responses"]["200"]["content"]) == ["text/event-stream"]


def test_a_change_of_a_service_takes_the_generation_seen() -> None:
    assert "If-Match" in [p["name"] for p in operation(public.SCALE)["parameters"]]
    assert "If-Match" not in [p["name"] for p in operation(public.GET_SERVICE)["parameters"]]


def test_what_people_send_is_strict_and_what_they_get_may_grow() -> None:
    schemas = DOCUMENT["components"]["schemas"]

    assert schemas["Scale"]["additionalProperties"] is False
    assert "additionalProperties" not in schemas["ServiceView"]
    assert schemas["Credentials"]["properties"]["password"]["writeOnly"] is True
    assert "writeOnly" not in schemas["Session"]["properties"]["token"]


def _app() -> web.Application:
    app = web.Application()
    app.add_routes(openapi.routes("3.0.0"))
    return app


async def test_document_page_and_script_are_served_and_nothing_is_inline_or_foreign() -> None:
    async with TestClient(TestServer(_app())) as client:
        document = await client.get("/api/v1/openapi.json")
        page = await client.get("/api/v1/docs")
        script = await client.get("/api/v1/docs/start.js")
        text = await page.text()

        assert await document.json() == DOCUMENT
        assert "script-src 'self';" in page.headers["Content-Security-Policy"]
        assert script.content_type == "text/javascript"
        assert not re.search(r"<script>|<style|\son\w+=|https?:|//\w", text)


@pytest.mark.browser
async def test_the_page_shows_the_commands_within_its_policy() -> None:
    vendor = Path(conpaas.__file__).parent / "web/static/vendor/swagger-ui-dist"
    app = _app()
    app.router.add_static(openapi.SWAGGER, vendor)
    said: list[str] = []
    async with TestServer(app) as server, async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"],
        )
        page = await browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        await page.goto(str(server.make_url("/api/v1/docs")))
        await page.get_by_text("Create a service").first.wait_for(timeout=30_000)
        await browser.close()

    assert said == []
