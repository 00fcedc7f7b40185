"""What a message is, and how a call is declared: once, for both ends, the documentation and the OpenAPI page."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, SecretStr, SerializationInfo, ValidationError

from conpaas.core import footprint
from conpaas.core.errors import PeerError


class Message(BaseModel):
    """One typed message. Strict with people: an unknown field is an error; see `from_peer` for peers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=footprint.descriptions,
        ser_json_timedelta="float",
        defer_build=True,
    )


def _reveal(secret: SecretStr, info: SerializationInfo) -> str:
    revealed = isinstance(info.context, dict) and info.context.get("reveal")
    return secret.get_secret_value() if revealed else str(secret)


Secret = Annotated[SecretStr, PlainSerializer(_reveal, when_used="json")]
"""A secret: written as it is only on the wire (`context={"reveal": True}`), as asterisks everywhere else."""

M = TypeVar("M", bound=Message)


def from_peer(kind: type[M], body: bytes | str) -> M:
    """Read a peer's message. A newer peer may send fields we do not know: drop them."""
    try:
        return kind.model_validate_json(body, extra="ignore")
    except ValidationError as exc:
        raise PeerError(f"the peer's {kind.__name__} is malformed: {exc.error_count()} errors: {exc}") from exc


class Who(StrEnum):
    """Kinds of callers that a command may allow. Nothing is allowed that is not named."""

    ANYONE = "anyone"
    USER = "user"  # any user who is logged in
    OWNER = "owner"  # the user who owns the target
    ADMIN = "admin"  # an administrator
    DIRECTOR = "director"
    MANAGER = "manager"  # the manager of the target service, at its current epoch
    AGENT = "agent"  # an agent of the target service


Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One command: what it takes, what it gives, who may call it.

    `upload`: the request body is a raw stream. `download`: the response body is one. `events`: the response is a
    stream of server-sent events, each a `response`. `query`: a Message read from the query string.
    """

    method: Method
    path: str
    summary: str
    allow: frozenset[Who]
    request: type[Message] | None = None
    response: type[Message] | None = None
    query: type[Message] | None = None
    upload: bool = False
    download: bool = False
    events: bool = False
    timeout_s: float = 10.0
    status: int = 200
    tags: tuple[str, ...] = field(default=())

    @property
    def scope(self) -> Literal["read", "write", "admin"]:
        """The token scope that a user needs for this command."""
        if self.allow <= {Who.ADMIN, Who.DIRECTOR}:
            return "admin"
        return "read" if self.method == "GET" else "write"

    def url(self, **params: str) -> str:
        """Return the path with its parameters filled in; they are ids, never user text."""
        return self.path.format(**params)


def who(*callers: Who) -> frozenset[Who]:
    """Return the set of callers that an endpoint allows."""
    return frozenset(callers)


Json = dict[str, Any]
