"""The layers hold, and the tools that prove it are shown to fail when they do not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its settings, to be broken."""
    folder = tmp_path_factory.mktemp("layers")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for source in (ROOT / "conpaas").rglob("*.py"):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return folder


def run(folder: Path, *argv: str) -> tuple[bool, str]:
    """Run a tool of this Python in `folder`; return whether it was content, and its words."""
    done = subprocess.run(  # noqa: PLW1510  (failing is what some of these tests are about)
        [sys.executable, *argv], cwd=folder, capture_output=True, text=True, timeout=50
    )
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


def lint_imports(folder: Path) -> tuple[bool, str]:
    return run(folder, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")


def ruff(folder: Path, *paths: Path) -> tuple[bool, str]:
    return run(folder, "-m", "ruff", "check", "--no-cache", "--output-format=concise", *map(str, paths))


def test_the_layers_hold(copy: Path) -> None:
    content, words = lint_imports(copy)
    assert content, words
    assert "0 broken" in words


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("conpaas/core/broken.py", "conpaas.director.app"),
        ("conpaas/core/broken.py", "conpaas.agent.app"),
        ("conpaas/manager/broken.py", "conpaas.director.ledger"),
        ("conpaas/agent/broken.py", "conpaas.manager.app"),
        ("conpaas/services/php/broken.py", "conpaas.agent.app"),
        ("conpaas/cloud/broken.py", "conpaas.director.clouds"),
        ("conpaas/director/broken.py", "conpaas.web.app"),
        ("conpaas/sdk/broken.py", "conpaas.director.app"),
        ("conpaas/web/broken.py", "conpaas.cli.root"),
    ],
)
def test_an_import_against_the_layers_is_found(copy: Path, module: str, forbidden: str) -> None:
    broken = copy / module
    broken.write_text(f'"""Against the layers."""\n\nimport {forbidden}\n')
    try:
        content, words = lint_imports(copy)
    finally:
        broken.unlink()
    assert not content, words
    assert f"{module.removesuffix('.py').replace('/', '.')} -> {forbidden}" in words


def test_an_import_inside_of_a_function_is_found_too(copy: Path) -> None:
    broken = copy / "conpaas" / "core" / "broken.py"
    broken.write_text('"""Hidden."""\n\n\ndef act():\n    import conpaas.agent.app\n')
    try:
        content, words = lint_imports(copy)
    finally:
        broken.unlink()
    assert not content, words


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import asyncio\n\nasyncio.create_task(None)\n", "TID251"),
        ("import asyncio\n\nasyncio.sleep(1)\n", "TID251"),
        ("import time\n\ntime.sleep(1)\n", "TID251"),
        ("import subprocess\n", "TID251"),
        ("import os\n\nos.system('x')\n", "TID251"),
        ("import pickle\n", "TID251"),
        ("from . import errors\n", "TID252"),
        ("def act() -> None:\n    import json  # inside\n\n    json.dumps(1)\n", "PLC0415"),
        ("try:\n    pass\nexcept Exception:\n    pass\n", "BLE001"),
        ("def act(word):\n    return word\n", "ANN001"),
    ],
)
def test_what_is_banned_is_found(copy: Path, code: str, rule: str) -> None:
    broken = copy / "conpaas" / "core" / "broken.py"
    broken.write_text(f'"""Banned."""\n\n{code}')
    try:
        content, words = ruff(copy, broken)
    finally:
        broken.unlink()
    assert not content
    assert rule in words, words


@pytest.mark.parametrize("module", ["run", "tasks", "clock"])
def test_the_one_place_for_each_banned_thing_is_allowed_it(copy: Path, module: str) -> None:
    content, words = ruff(copy, copy / "conpaas" / "core" / f"{module}.py")
    assert content, words


HEAVY = {
    "alembic", "altcha", "argon2", "asyncssh", "click", "cryptography", "jinja2", "pydantic_settings", "rich",
    "sqlalchemy",
}  # fmt: skip


@pytest.mark.parametrize("module", ["conpaas.agent.app", "conpaas.manager.app", "conpaas.core.daemon"])
def test_small_daemons_load_nothing_large(module: str) -> None:
    code = (
        f"import sys; sys.modules['rich'] = None; import {module}; print(*(m for m in sys.modules if sys.modules[m]))"
    )
    content, words = run(ROOT, "-c", code)
    assert content, words
    assert not HEAVY & set(words.split())
