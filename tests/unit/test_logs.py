"""One event a line, JSON into files, and no secret in any of them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from conpaas.core import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_of_json_with_level_time_and_context() -> None:
    stream = io.StringIO()
    logs.set_up(stream=stream)
    structlog.contextvars.bind_contextvars(service="svc-1")
    structlog.get_logger().info("node-added", node="i-1\n{}")
    (line,) = written(stream)
    assert line.pop("timestamp").__str__().endswith("Z")
    assert line == {"event": "node-added", "level": "info", "service": "svc-1", "node": "i-1\n{}"}


@pytest.mark.parametrize(
    "name",
    ["password", "new_password", "Password", "secret", "client_secret", "token", "api_token", "private_key",
     "Authorization", "cookie", "set-cookie", "PASSWORD_HASH"],
)  # fmt: skip
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_field_that_holds_a_secret_is_hidden(name: str, stream: type[io.StringIO]) -> None:
    out = stream()
    logs.set_up(stream=out)
    structlog.get_logger().warning("login", user="ann", **{name: "geheim"})
    assert "geheim" not in out.getvalue()
    assert "********" in out.getvalue()
    assert "ann" in out.getvalue()


def test_a_secret_that_was_bound_is_hidden_too() -> None:
    stream = io.StringIO()
    logs.set_up(stream=stream)
    structlog.contextvars.bind_contextvars(token="geheim")
    structlog.get_logger().bind(password="geheim").info("x")
    assert "geheim" not in stream.getvalue()


def test_a_secret_inside_of_a_field_is_hidden_too() -> None:
    stream = io.StringIO()
    logs.set_up(stream=stream)
    structlog.get_logger().info("x", body={"user": "ann", "password": "geheim", "more": [{"token": "geheim"}]})
    assert "geheim" not in stream.getvalue()
    assert "ann" in stream.getvalue()


def test_an_exception_stays_on_its_line() -> None:
    stream = io.StringIO()
    logs.set_up(stream=stream)
    try:
        int("oh no")
    except ValueError:
        structlog.get_logger().exception("bug")
    (line,) = written(stream)
    assert "ValueError: invalid literal for int() with base 10: 'oh no'" in str(line["exception"])


@pytest.mark.parametrize(("level", "seen"), [("debug", 3), ("INFO", 2), ("warning", 1)])
def test_what_is_below_the_level_is_left_out(level: str, seen: int) -> None:
    stream = io.StringIO()
    logs.set_up(level=level, stream=stream)
    log = structlog.get_logger()
    log.debug("a")
    log.info("b")
    log.warning("c")
    assert len(written(stream)) == seen


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(KeyError):
        logs.set_up(level="loud")


def test_warnings_of_libraries_are_written_and_their_chatter_is_not() -> None:
    stream = io.StringIO()
    logging.getLogger().handlers = []  # pytest has its own, and basicConfig would not touch them
    logs.set_up(stream=stream)
    logging.getLogger("aiohttp.server").warning("odd")
    logging.getLogger("aiohttp.server").info("chatter")
    assert stream.getvalue() == "WARNING aiohttp.server odd\n"


def test_colours_are_for_terminals() -> None:
    terminal = Terminal()
    logs.set_up(stream=terminal)
    structlog.get_logger().info("hello", who="ann")
    assert "\x1b[" in terminal.getvalue()
