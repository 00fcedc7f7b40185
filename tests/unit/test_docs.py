"""The documentation is true: what is made of the code is fresh, and what is written by hand names what exists."""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from conpaas.cli.managerc import managerc
from conpaas.cli.root import root
from conpaas.core.errors import ConpaasError
from conpaas.core.messages.model import ServiceView
from conpaas.core.messages.public import Live
from conpaas.core.timings import Timings
from conpaas.director.settings import DirectorSettings, Limits
from tests.fakes.api import TOKEN, FakeApi, serving

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
IMAGES = DOCS / "images"
PAGES = [CHECKOUT / "README.md", *sorted(DOCS.rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.parent.name != "reference"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PATH = re.compile(r"(?:conpaas|tests|docs|bootstrap|examples|benchmarks|\.ci)/[a-z0-9_./-]+")


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("conpaas_docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def fences(page: Path, language: str) -> list[str]:
    return [body for kind, body in _FENCE.findall(read(page)) if kind == language]


# -- what is made of the code ---------------------------------------------------------------------------------------


def test_the_generated_pages_and_snippets_are_fresh() -> None:
    assert [name_of(path) for path in generate.stale()] == [], "run 'python docs/generate.py'"


def test_options_are_shown_with_their_own_words_for_a_value() -> None:
    page = read(generate.REFERENCE / "cli.md")
    assert "`--set KEY=VALUE`" in page
    assert "`--limit N|none`" in page.replace("\\|", "|")


def test_a_page_that_was_changed_by_hand_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(generate, "REFERENCE", tmp_path)
    for path, text in generate.pages().items():
        if path.parent == tmp_path:
            path.write_text(text, encoding="utf-8")
    assert generate.stale() == []
    (tmp_path / "errors.md").write_text("by hand", encoding="utf-8")
    assert generate.stale() == [tmp_path / "errors.md"]


def test_a_snippet_that_differs_from_its_source_is_replaced() -> None:
    page = "<!-- snippet: conpaas/core/errors.py ConpaasError.problem -->\n\n```python\nold\n```\n"
    fresh = generate.with_snippets(page)
    assert "def problem(self)" in fresh
    assert "old" not in fresh
    with pytest.raises(LookupError, match="no such_thing"):
        generate.with_snippets(page.replace("ConpaasError.problem", "such_thing"))


@pytest.mark.parametrize("kind", [DirectorSettings, Limits, Timings])
def test_every_setting_says_what_it_is(kind: type[DirectorSettings | Limits | Timings]) -> None:
    silent = [name for name, field in kind.model_fields.items() if not field.description]
    assert silent == []


@pytest.mark.parametrize("error", generate.error_classes(), ids=lambda error: error.code)
def test_every_error_has_a_code_of_its_own_and_is_explained(error: type[ConpaasError]) -> None:
    assert "code" in vars(error)
    assert inspect.getdoc(error)
    row = re.search(rf"^\| `{error.code}` \| (.+) \| (.+) \|$", read(DOCS / "operating.md"), re.MULTILINE)
    assert row is not None, f"docs/operating.md does not say what to do about '{error.code}'"


def test_operating_explains_no_error_that_is_gone() -> None:
    section = read(DOCS / "operating.md").partition("## Troubleshooting by error code")[2].partition("\n###")[0]
    explained = re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)
    assert sorted(explained) == sorted(error.code for error in generate.error_classes())


# -- links and paths ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(1 for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for groups in _LINK.findall(prose(page)):
        target, _, anchor = (groups[0] or groups[1]).partition("#")
        if target.startswith(("http://", "https://")):
            continue
        path = (page.parent / target).resolve() if target else page
        is_image = path.parent == IMAGES  # made by docs/screenshots.py
        if not path.exists() and (IMAGES.exists() or not is_image):
            broken.append(target)
        elif anchor and anchor not in anchors(path):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_path_of_the_checkout_that_is_named_exists(page: Path) -> None:
    named = [code for code in _CODE.findall(prose(page)) if _PATH.fullmatch(code)]
    assert [path for path in named if not (CHECKOUT / path).exists()] == []


def test_no_slide_is_forgotten() -> None:
    rows = re.findall(r"^\| S(\d+) \| (.+) \| (.+) \|$", read(DOCS / "checklist.md"), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 135))
    assert [
        number for number, _, where in rows if "`" not in where and "](" not in where and "later:" not in where
    ] == []


# -- commands -------------------------------------------------------------------------------------------------------


def resolved(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """Return the command that `words` name, its context, and the words that are left for it."""
    program, rest = words[0], words[1:]
    command: click.Command = managerc if program == "managerc" else root
    if program == "managerc":
        rest = rest[1:]  # the URL
    context = click.Context(command, info_name=program)
    while isinstance(command, click.Group):
        assert rest, f"'{shlex.join(words)}' names no command"
        found = command.get_command(context, rest[0])
        assert found is not None, f"there is no '{rest[0]}' in '{shlex.join(words)}'"
        command, context = found, click.Context(found, info_name=rest[0], parent=context)
        rest = rest[1:]
    return command, context, rest


def check_line(words: list[str]) -> None:
    """Fail unless these words are a whole command line that the program would take."""
    if words[0].startswith("bootstrap/"):
        script = read(CHECKOUT / words[0])
        known = script + read(CHECKOUT / "conpaas" / "cli" / "quickstart.py")
        assert [
            word for word in words[1:] if word.startswith("-") and f'"{word}"' not in known and word not in script
        ] == []
        return
    command, context, rest = resolved(words)
    values, left, _ = command.make_parser(context).parse_args(rest)
    assert left == [], f"too many words: {shlex.join(words)}"
    for parameter in command.params:
        if parameter.required and isinstance(parameter, click.Argument):
            given = values.get(parameter.name or "")  # versions of click differ in what stands for nothing
            assert isinstance(given, str | tuple | list), f"{parameter.name} is missing: {shlex.join(words)}"
            assert given, f"{parameter.name} is missing: {shlex.join(words)}"


def command_lines(page: Path) -> Iterator[list[str]]:
    for body in fences(page, "sh"):
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                words[0] = re.sub(r"^.*/bin/(?=conpaas$|managerc$)", "", words[0])
                if words[0] in {"conpaas", "managerc"} or words[0].startswith("bootstrap/"):
                    yield words


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_command_line_is_one_that_the_programs_take(page: Path) -> None:
    for words in command_lines(page):
        try:
            check_line(words)
        except click.UsageError as exc:
            pytest.fail(f"{shlex.join(words)}: {exc.format_message()}")


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_command_named_in_prose_exists(page: Path) -> None:
    for code in _CODE.findall(prose(page)):
        words = code.split()
        if words[0] in {"conpaas", "managerc"} and len(words) > 1 and not words[1].isupper():
            command, _, rest = resolved([words[0], "URL", *words[1:]] if words[0] == "managerc" else words)
            options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            assert [word for word in rest if word.startswith("-") and word not in options] == [], code


def test_a_command_line_with_a_wrong_option_is_noticed() -> None:
    with pytest.raises(click.NoSuchOption):
        check_line(["conpaas", "start", "blog", "--hurry"])
    with pytest.raises(AssertionError, match="no 'begin'"):
        check_line(["conpaas", "begin", "blog"])
    with pytest.raises(AssertionError, match="too many words"):
        check_line(["conpaas", "start", "blog", "now"])
    with pytest.raises(AssertionError, match="missing"):
        check_line(["conpaas", "start"])


# -- Python ---------------------------------------------------------------------------------------------------------


async def run_examples(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page, one after the other, as `python -m asyncio` would; return their names."""
    names: dict[str, Any] = {}
    for number, block in enumerate(fences(page, "python"), 1):
        code = compile(block, f"{page.name}, block {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.iscoroutine(result):
            await result
    return names


async def test_the_examples_of_the_sdk_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.php").write_text("<?php phpinfo();", encoding="utf-8")
    api = FakeApi()
    api.live = [Live(kind="hello"), Live(kind="service", service=api.add("shop"))]
    monkeypatch.chdir(tmp_path)
    async with serving(api):
        monkeypatch.setenv("CONPAAS_URL", api.url)
        monkeypatch.setenv("CONPAAS_TOKEN", TOKEN)
        monkeypatch.setenv("CONPAAS_PASSWORD", "right")
        names = await run_examples(DOCS / "sdk.md")
    said = capsys.readouterr().out
    assert isinstance(names["blog"], ServiceView)
    assert "1 of 2 nodes serving" in said
    assert "you have no service 'bolg'" in said
    changes = [path.rpartition("/")[2] for path, _, _ in api.calls]
    assert changes == ["services", "activate", "start", "scale", "settings", "scale", "scale", "scale"]


def test_every_python_block_is_python() -> None:
    for page in WRITTEN:
        for block in fences(page, "python"):
            compile(block, name_of(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_nothing_in_the_documentation_names_the_machine_it_was_written_on() -> None:
    home = os.environ.get("HOME", "/root")
    for page in PAGES:
        assert str(CHECKOUT) not in read(page), page
        assert f"{home}/" not in read(page), page
