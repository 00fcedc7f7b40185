"""Every expected error: a class with a code, an HTTP status and a hint.

Anything else that escapes is a bug. On the wire an error is an RFC 9457 problem document, with `code`, `value`
and `hint` as extension members; `from_problem` turns one back into the class that was raised.

    ConpaasError
    ├── BadInputError              422  the caller's words are off
    │   ├── BadArchiveError             the uploaded archive is not safe, or not one
    │   └── TooLargeError          413
    ├── NotAuthenticatedError      401
    ├── ForbiddenError             403
    ├── NotFoundError              404
    │   └── BlobMissingError            send it, then repeat
    ├── ConflictError              409  not in this state
    │   ├── IllegalMoveError
    │   ├── StaleGenerationError   412  somebody else changed it first
    │   └── NoCreditError          402
    ├── TooManyRequestsError       429
    ├── CommandFailedError         500  an engine or a tool said no
    ├── EngineMissingError         424
    ├── DiskFullError              507
    ├── PeerError                  502  a peer cannot be reached, or answered rubbish
    │   └── DeadlineError          504
    └── CloudError
        ├── CloudBusyError         503  not now: the same call may succeed later
        │   ├── ThrottledError          too many calls
        │   └── NoCapacityError         no machine free
        └── CloudRefusedError      409  no, for good
            ├── QuotaExceededError
            ├── CloudCredentialsError   wrong, or expired
            └── UnknownImageError       not there, or broken
"""

from typing import Any, ClassVar

PROBLEM_TYPE = "application/problem+json"


DETAIL_CHARACTERS = 1000


def _in_part(text: str) -> str:
    """Return as much of a text as people read: it may quote what was sent to us."""
    return text if len(text) <= DETAIL_CHARACTERS else f"{text[:DETAIL_CHARACTERS]}…"


class ConpaasError(Exception):
    """An expected error. `message` says what failed, with the value; `hint` says what to do next."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        self.value = value

    def problem(self) -> dict[str, Any]:
        """Return the RFC 9457 problem document of this error."""
        value = self.value if self.value is None or isinstance(self.value, int | float | bool) else str(self.value)
        return {
            "type": f"urn:conpaas:error:{self.code}",
            "title": self.code.replace("-", " "),
            "status": self.status,
            "detail": _in_part(self.message),
            "code": self.code,
            "value": value[:200] if isinstance(value, str) else value,
            "hint": _in_part(self.hint),
        }


class BadInputError(ConpaasError):
    """The caller's words are off."""

    code, status = "bad-input", 422


class BadArchiveError(BadInputError):
    """The uploaded archive is not safe to unpack, or not an archive."""

    code = "bad-archive"
    default_hint = "upload a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip of your source tree"


class TooLargeError(BadInputError):
    """More than the limit."""

    code, status = "too-large", 413


class NotAuthenticatedError(ConpaasError):
    """Nobody, or somebody with bad credentials."""

    code, status = "not-authenticated", 401
    default_hint = "log in first: 'conpaas login'"


class ForbiddenError(ConpaasError):
    """Known, but not allowed."""

    code, status = "forbidden", 403


class NotFoundError(ConpaasError):
    """No such thing, or not yours: the two are not told apart."""

    code, status = "not-found", 404


class BlobMissingError(NotFoundError):
    """A node has not been sent the code version, named by its SHA-256 in `value`, that it is to serve."""

    code = "blob-missing"


class ConflictError(ConpaasError):
    """Not in the present state."""

    code, status = "conflict", 409


class IllegalMoveError(ConflictError):
    """A state cannot follow another."""

    code = "illegal-move"


class StaleGenerationError(ConflictError):
    """Somebody else changed the service first."""

    code, status = "stale-generation", 412
    default_hint = "read the service again and repeat the change on what it is now"


class NoCreditError(ConflictError):
    """The user's credits do not pay for this."""

    code, status = "no-credit", 402
    default_hint = "remove instances, or ask your administrator for credits"


class TooManyRequestsError(ConpaasError):
    """The rate limit of this call."""

    code, status = "too-many-requests", 429
    default_hint = "wait a moment and try again"


class CommandFailedError(ConpaasError):
    """A program exited with an error."""

    code = "command-failed"


class EngineMissingError(ConpaasError):
    """An engine (nginx, haproxy, …) is not installed on the instance."""

    code, status = "engine-missing", 424
    default_hint = "install it with 'conpaas engines install SERVICE_TYPE'"


class DiskFullError(ConpaasError):
    """No room left on the disk of this machine."""

    code, status = "disk-full", 507
    default_hint = "free some space, or delete code versions that are no longer needed"


class PeerError(ConpaasError):
    """A peer cannot be reached, or answered something that is not of the protocol."""

    code, status = "peer-unreachable", 502
    default_hint = "it may be starting or being replaced: try again in a few seconds"


class DeadlineError(PeerError):
    """No answer in time."""

    code, status = "deadline", 504


class CloudError(ConpaasError):
    """Something about a cloud."""

    code, status = "cloud", 502


class CloudBusyError(CloudError):
    """Not now: the same call may succeed later."""

    code, status = "cloud-busy", 503


class ThrottledError(CloudBusyError):
    """The cloud was called too often. `retry_after_s` is the pause that it asks for; None if it names none."""

    code = "cloud-throttled"

    def __init__(
        self, message: str, *, hint: str | None = None, value: object = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, hint=hint, value=value)
        self.retry_after_s = retry_after_s


class NoCapacityError(CloudBusyError):
    """The cloud has no machine free for another instance just now."""

    code = "cloud-no-capacity"
    default_hint = "try again later, or use another size, zone or cloud"


class CloudRefusedError(CloudError):
    """No, for good: trying again will not help."""

    code, status = "cloud-refused", 409


class QuotaExceededError(CloudRefusedError):
    """The cloud account has no room for another instance."""

    code = "quota-exceeded"
    default_hint = "remove a node, or raise the quota of this cloud"


class CloudCredentialsError(CloudRefusedError):
    """The cloud does not accept the account's credentials, or not for this."""

    code = "cloud-credentials"
    default_hint = "an administrator must renew the credentials of this cloud: 'conpaas cloud edit'"


class UnknownImageError(CloudRefusedError):
    """The image that instances are made of is not there, not ready, or broken."""

    code = "cloud-image"
    default_hint = "an administrator must name an image that is there: 'conpaas cloud edit'"


def all_errors() -> dict[str, type[ConpaasError]]:
    """Return every error class by its code."""
    found: dict[str, type[ConpaasError]] = {}
    queue: list[type[ConpaasError]] = [ConpaasError]
    while queue:
        kind = queue.pop()
        found.setdefault(kind.code, kind)
        queue.extend(kind.__subclasses__())
    return found


def from_problem(document: dict[str, Any], status: int) -> ConpaasError:
    """Return the error that a problem document stands for; an unknown code gives a plain `ConpaasError`."""
    kind = all_errors().get(str(document.get("code")), ConpaasError)
    detail = str(document.get("detail") or f"the peer answered {status}")
    return kind(detail, hint=str(document.get("hint") or ""), value=document.get("value"))
