"""Logging set-up: one event a line, JSON into files, colour on terminals, no secrets."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

_SECRET = ("password", "secret", "token", "private", "authorization", "cookie")


def hide_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the value of every field, however deep, that by its name holds a secret."""
    for key, value in event.items():
        event[key] = "********" if _is_secret(key) else _hidden(value)
    return event


def _is_secret(key: object) -> bool:
    return any(word in str(key).lower() for word in _SECRET)


def _hidden(value: Any) -> Any:
    match value:
        case dict():
            return {key: "********" if _is_secret(key) else _hidden(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_hidden(inner) for inner in value]
        case _:
            return value


def set_up(*, level: str = "INFO", stream: TextIO = sys.stderr) -> None:
    """Configure structlog for this process; standard-library loggers below WARNING are left out."""
    number = logging.getLevelNamesMapping()[level.upper()]
    pretty = stream.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            hide_secrets,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if pretty else structlog.processors.format_exc_info,
            *([] if pretty else [structlog.processors.JSONRenderer()]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
