"""What users can set, and what the planner tells the four roles."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr

from conpaas.core import units
from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Message, Secret
from conpaas.core.messages.model import Sha256

HTTP_PORT = 8080
"""Where users come in: the proxy."""
WEB_PORT = 8081
PHP_PORT = 8082
LOG_PORT = 8084
"""UDP, on the proxy's node: a sample of its log, from which the response times are taken."""
SESSIONS_PORT = 6379

_MEMORY_MIN, _MEMORY_MAX = 16 << 20, 8 << 30
_UPLOAD_MIN, _UPLOAD_MAX = 1 << 10, 1 << 30
_FPM = re.compile(r"php-fpm(\d+\.\d+)")


def installed_versions() -> tuple[str, ...]:
    """Return the PHP versions whose `php-fpmX.Y` is installed here, oldest first; 8.2 if none is."""
    folders = {*os.get_exec_path(), "/usr/local/sbin", "/usr/sbin"}
    found = {match[1] for folder in folders for name in _names(folder) if (match := _FPM.fullmatch(name))}
    return tuple(sorted(found, key=lambda version: [int(part) for part in version.split(".")])) or ("8.2",)


def _names(folder: str) -> list[str]:
    try:
        return [path.name for path in Path(folder).iterdir()]
    except OSError:  # the search path may name folders that are not there, or not for us
        return []


VERSIONS = installed_versions()
DEFAULT_VERSION = "8.2" if "8.2" in VERSIONS else VERSIONS[-1]


def _version(value: str) -> str:
    if value not in VERSIONS:
        raise ValueError(f"PHP {value} is not installed; there is {', '.join(VERSIONS)}")
    return value


def _size(value: str, smallest: int, largest: int) -> str:
    try:
        size = units.parse_size(value)
    except BadInputError as exc:
        raise ValueError(f"{exc.message}: {exc.hint}") from exc
    if not smallest <= size <= largest:
        raise ValueError(f"must be from {units.show_size(smallest)} to {units.show_size(largest)}")
    return f"{size >> 20}M" if size % (1 << 20) == 0 else str(size)


def _memory(value: str) -> str:
    return _size(value, _MEMORY_MIN, _MEMORY_MAX)


def _upload(value: str) -> str:
    return _size(value, _UPLOAD_MIN, _UPLOAD_MAX)


def _folder(value: str) -> str:
    path = PurePosixPath(value.strip().strip("/"))
    if ".." in path.parts:
        raise ValueError("must be a folder inside the code")
    return "" if str(path) == "." else str(path)


class PhpSettings(Message):
    """What the owner of a PHP service can set. Changes are made without losing a request."""

    php_version: Annotated[str, AfterValidator(_version)] = Field(
        default=DEFAULT_VERSION, title="Software version", json_schema_extra={"enum": list(VERSIONS)}
    )
    """The version of PHP; those are offered that are installed."""
    max_execution_time: int = Field(
        default=30,
        ge=1,
        le=3600,
        title="Maximum script execution time",
        json_schema_extra={"examples": [10, 30, 60, 120, 300], "unit": "seconds"},
    )
    """How long a script may compute, in seconds."""
    memory_limit: Annotated[str, AfterValidator(_memory)] = Field(
        default="128M",
        title="Memory limit",
        json_schema_extra={"examples": ["64M", "128M", "256M", "512M", "1024M"]},
    )
    """How much memory a script may use, from 16M to 8G."""
    upload_max_filesize: Annotated[str, AfterValidator(_upload)] = Field(
        default="16M",
        title="Maximum upload size",
        json_schema_extra={"examples": ["2M", "16M", "64M", "256M", "1024M"]},
    )
    """How large a file may be that a visitor uploads, up to 1G; the whole request may have 1M more."""
    display_errors: bool = Field(default=False, title="Show errors")
    """Show errors of the application in its pages. They are always in the log `php.log`."""
    document_root: Annotated[str, AfterValidator(_folder)] = Field(
        default="", max_length=200, pattern=r"^[A-Za-z0-9._/ -]*$", title="Document root"
    )
    """The folder of the code that visitors see, such as `public`; empty: all of it."""
    front_controller: Literal["auto", "always", "never"] = Field(default="auto", title="Front controller")
    """Whether `index.php` answers paths that are no file, as WordPress, Laravel and Symfony want it.

    `auto`: if an `.htaccess` in the document root rewrites to it.
    """


class CodeConfig(Message):
    """What every role that knows the code is told of it."""

    code: Sha256 | None = None
    """The active code version; None: an empty site."""
    previous: Sha256 | None = None
    """The one before, kept for a roll-back."""
    document_root: str = ""
    prepare: bool = False
    """Only unpack the code, and go on serving as before: all nodes have it before the first one switches."""


class WebConfig(CodeConfig):
    """An nginx that serves the files of the code."""


class PhpConfig(CodeConfig):
    """An nginx and a PHP-FPM that run the code."""

    php_version: str = DEFAULT_VERSION
    max_execution_time: int = 30
    """Seconds."""
    memory_limit: str = "128M"
    upload_max_filesize: str = "16M"
    display_errors: bool = False
    front_controller: Literal["auto", "always", "never"] = "auto"
    sessions: str = ""
    """Address of the session store; empty: sessions stay on the node."""
    sessions_password: Secret = SecretStr("")


class ProxyConfig(CodeConfig):
    """A HAProxy and those it shares requests out among."""

    web: dict[str, str] = Field(default_factory=dict)
    """Addresses of the web servers by node."""
    php: dict[str, str] = Field(default_factory=dict)
    """Addresses of the PHP back-ends by node."""
    max_body_bytes: int = 17 << 20
    timeout_s: int = 60
    """How long a back-end may be silent."""
    drain_s: float = 30.0
    """How long back-ends that leave may go on with what they have begun."""


class SessionsConfig(Message):
    """A key-value store for sessions."""

    password: Secret
    memory_mib: int = 128
    """Beyond this, the sessions that were not used for longest are forgotten."""
    source: str = ""
    """Address of a store whose sessions are to be taken over: what comes in there comes here, until this is empty."""
