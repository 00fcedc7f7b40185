"""What libcloud raises, as the errors that drivers raise: by the provider's words where they say more than a code."""

import json
import re
from collections.abc import Iterator
from typing import Any

import requests
from libcloud.common.exceptions import BaseHTTPError, RateLimitReachedError
from libcloud.common.types import InvalidCredsError, LibcloudError, MalformedResponseError, ProviderError

from conpaas.core.errors import (
    CloudBusyError,
    CloudCredentialsError,
    CloudRefusedError,
    ConpaasError,
    DeadlineError,
    NoCapacityError,
    PeerError,
    QuotaExceededError,
    ThrottledError,
    UnknownImageError,
)

WORDS_CHARACTERS = 400

# Tried in this order, before the code of the answer: OpenStack says 403 and 413 for quotas, EC2 says 400 and 503 for
# all of these, others say 422.
_BY_WORDS: tuple[tuple[type[ConpaasError], re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (ThrottledError, r"RequestLimitExceeded|Throttling|too many requests|(rate|request) limit"),
        (NoCapacityError, r"Insufficient\w*Capacity|no valid host|not enough (hosts|capacity|resources)|out of stock"),
        (
            QuotaExceededError,
            r"quota|LimitExceeded|exceeds? (your|the) .*limit|limit (has been )?reached|maximum number",
        ),
        (
            CloudCredentialsError,
            r"AuthFailure|UnauthorizedOperation|ExpiredToken|InvalidClientTokenId|SignatureDoesNotMatch|OptInRequired",
        ),
        (
            UnknownImageError,
            r"InvalidAMIID|can not find requested image|image\b.* (not found|could not be found|is not active)",
        ),
    )
)
_BY_CODE: dict[int, type[ConpaasError]] = {
    401: CloudCredentialsError,
    403: CloudCredentialsError,
    408: CloudBusyError,
    409: CloudBusyError,  # in a state that passes: being made, attached, …
    413: QuotaExceededError,
    425: CloudBusyError,
    429: ThrottledError,
}


class OverdueError(Exception):
    """The call has used up its time, or nobody waits for it any more: nothing more is sent."""


class GarbageError(Exception):
    """What answers is not the provider's interface."""


def translate(error: Exception, *, cloud: str, words: str) -> ConpaasError:
    """Return the error that one of libcloud, of `requests` or of reading an answer stands for.

    `words` is the body of the provider's last answer, if that was an error.
    """
    said = readable(words) or _own_words(error)
    message = f"cloud {cloud}: {said}"
    if isinstance(error, OverdueError | requests.Timeout):
        return DeadlineError(f"cloud {cloud}: no answer in time")
    if isinstance(error, requests.RequestException | OSError):
        return PeerError(f"cloud {cloud}: {_connection_words(error)}")
    if isinstance(error, InvalidCredsError):
        return CloudCredentialsError(message)
    if isinstance(error, NotImplementedError):
        return CloudRefusedError(f"cloud {cloud}: libcloud cannot do this with the provider: {said}")
    code = _code(error)
    if code is None and isinstance(error, LibcloudError) and not isinstance(error, MalformedResponseError):
        return CloudRefusedError(message)  # its own no: there is no such endpoint, no such key, …
    if code is None:
        return PeerError(f"cloud {cloud}: its answer cannot be read: {said}")
    return _by_code(code, message, said, _pause_s(error))


def is_code(error: BaseException, *codes: int) -> bool:
    """Tell whether the provider has answered with one of these HTTP codes."""
    return isinstance(error, Exception) and _code(error) in codes


def is_gone(error: BaseException) -> bool:
    """Tell whether the provider says that there is no such thing (any more)."""
    if isinstance(error, BaseHTTPError) and re.match(r"Invalid(InstanceID|Volume)\.NotFound", str(error.message)):
        return True  # Amazon's
    return is_code(error, 404)


def readable(body: str) -> str:
    """Return what people read of the body of an error: the messages in it, or its text without tags."""
    try:
        found = list(dict.fromkeys(_messages(json.loads(body))))
    except ValueError:
        found = [
            f"{code}: {text}" if code else text
            for code, text in re.findall(r"(?:<Code>([^<]*)</Code>\s*)?<Message>([^<]*)</Message>", body)
        ]
    text = "; ".join(found) or re.sub(r"<[^>]*>", " ", body)
    return " ".join(text.split())[:WORDS_CHARACTERS]


def _messages(value: Any) -> Iterator[str]:
    """Yield the texts under the names that providers give to their words, wherever they are."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, str):
                if name.lower() in {"message", "errortext", "reason", "detail", "error", "description"}:
                    yield inner
            else:
                yield from _messages(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _messages(inner)


def _own_words(error: Exception) -> str:
    """Return an error's own words; those of libcloud name the driver object in their text, or have no text at all."""
    if isinstance(error, MalformedResponseError):
        body = error.body if isinstance(error.body, str) else ""
        return f"{error.value}: {body[:100]}" if body and not body.startswith("{") else str(error.value)
    texts = [getattr(error, name, None) for name in ("value", "message")]
    text = next((str(text) for text in texts if text), "") or f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:WORDS_CHARACTERS] or f"error {_code(error)}"


def _connection_words(error: Exception) -> str:
    """Return why there is no connection. The text of `requests` quotes the URL: EC2's holds the user data."""
    queue: list[object] = [error]
    seen: list[BaseException] = []
    while queue:
        found = queue.pop(0)
        if isinstance(found, BaseException) and found not in seen:
            seen.append(found)
            if isinstance(found, OSError) and not isinstance(found, requests.RequestException):
                return f"no connection: {found.strerror or found}"
            queue += [getattr(found, "reason", None), *found.args, found.__cause__, found.__context__]
    return f"no connection: {type(seen[-1]).__name__}"


def _code(error: Exception) -> int | None:
    """Return the HTTP code that the provider has answered with, None if the error is another one."""
    code: Any = None
    if isinstance(error, BaseHTTPError):
        code = error.code
    elif isinstance(error, ProviderError):
        code = error.http_code
    return int(code) if isinstance(code, int | str) and str(code).isdigit() else None


def _pause_s(error: Exception) -> float | None:
    """Return the pause that the provider asks for, in seconds."""
    if isinstance(error, RateLimitReachedError):
        return float(error.retry_after) or None
    headers = getattr(error, "headers", None) or {}
    text = str(headers.get("retry-after", ""))
    return float(text) if text.isdigit() and int(text) else None


def _by_code(code: int, message: str, said: str, pause_s: float | None) -> ConpaasError:
    kind = next((kind for kind, pattern in _BY_WORDS if pattern.search(said)), None)
    if code >= 500:
        if pause_s is not None:
            kind = ThrottledError
        elif kind not in {ThrottledError, NoCapacityError}:
            kind = PeerError  # it may have happened, whatever it says
    kind = kind or _BY_CODE.get(code, CloudRefusedError)
    if issubclass(kind, ThrottledError) or (code == 413 and pause_s is not None):
        return ThrottledError(message, retry_after_s=pause_s)
    return kind(message)
