"""Every example of the SDK runs: those in docstrings, and the programs in examples/sdk."""

import ast
import importlib.util
import os
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest

from conpaas import sdk
from conpaas.core.errors import StaleGenerationError
from conpaas.core.messages import manager
from conpaas.core.messages.public import Live
from conpaas.core.rpc import Call
from conpaas.core.states import ServiceState
from conpaas.sdk import Conpaas, connect, login
from tests.fakes.api import TOKEN, FakeApi, serving

EXAMPLES = Path(__file__).parents[2] / "examples" / "sdk"


class Api(FakeApi):
    request_rate = 0.0

    async def get_monitoring(self, call: Call[None]) -> manager.Monitoring:
        return manager.Monitoring(request_rate=self.request_rate)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with serving(Api()) as running:
        assert isinstance(running, Api)
        yield running


@pytest.fixture
async def conpaas(api: Api) -> AsyncIterator[Conpaas]:
    async with connect(api.url, TOKEN) as client:
        yield client


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_of(docstring: str | None) -> str:
    """Return the indented part of a docstring, from its first line of code on."""
    lines = textwrap.dedent((docstring or "").partition("\n")[2]).splitlines()
    block = [line for line in lines if not line or line.startswith("    ")]
    return textwrap.dedent("\n".join(block))


@pytest.mark.parametrize("documented", [sdk, connect, login], ids=["sdk", "connect", "login"])
async def test_the_examples_in_docstrings_run(
    api: Api, documented: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONPAAS_TOKEN", TOKEN)
    (tmp_path / "site.tar.gz").write_bytes(b"archive")
    api.add("shop")
    code = code_of(documented.__doc__)
    assert "await" in code
    for url in ("http://127.0.0.1:9999", "https://paas.example.org"):
        code = code.replace(url, api.url)
    names = {"os": os, "connect": connect, "login": login, "token": TOKEN, "password": "right", "url": api.url}

    running = eval(compile(code, "docstring", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)

    await running


async def test_deploy_makes_a_service_and_later_finds_it(api: Api, conpaas: Conpaas, tmp_path: Path) -> None:
    (tmp_path / "index.php").write_text("<?php")
    deploy = example("deploy").deploy

    assert await deploy(conpaas, "blog", str(tmp_path)) == "http://127.9.0.2:8080/"
    api.services["svc-1"] = api.services["svc-1"].model_copy(update={"state": ServiceState.RUNNING})
    assert await deploy(conpaas, "blog", str(tmp_path)) == "http://127.9.0.2:8080/"

    assert len(api.services) == 1
    kinds = [path.rpartition("/")[2] for path, _, _ in api.calls]
    assert kinds == ["services", "activate", "start", "scale", "activate", "scale"]


async def test_watch_says_each_change_once(api: Api, conpaas: Conpaas) -> None:
    service = api.add("blog")
    stopped = service.model_copy(update={"state": ServiceState.STOPPED})
    api.live = [
        Live(kind="service", service=service),
        Live(kind="service", service=service),
        Live(kind="service", service=stopped),
        Live(kind="credits", credits=9998),
    ]
    lines: list[str] = []

    async for line in example("watch").changes(conpaas):
        lines.append(line)
        if len(lines) == 3:
            break

    assert lines == ["blog is RUNNING", "blog is STOPPED", "you have 9998 credits"]


@pytest.mark.parametrize(("rate", "change"), [(0.0, 1), (350.0, 4), (100_000.0, 8)])
async def test_autoscale_follows_the_requests(api: Api, conpaas: Conpaas, rate: float, change: int) -> None:
    api.add("blog")  # no php node of its own
    api.request_rate = rate

    assert await example("autoscale").adapt(conpaas, "blog") == change
    assert api.calls[0][2].roles == {"php": change}
    assert api.calls[0][1]["If-Match"] == '"7"'


async def test_a_change_of_somebody_else_is_a_conflict_that_autoscale_survives() -> None:
    assert issubclass(StaleGenerationError, example("autoscale").ConflictError)
