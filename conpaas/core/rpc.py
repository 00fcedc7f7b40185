"""Calling and serving `Endpoint`s over HTTP, with and without mutual TLS.

One declaration, both ends: `route` makes an aiohttp route of an endpoint and a handler, `Client.call` calls it. Errors
travel as RFC 9457 problem documents. Knows nothing of what the commands do.
"""

import asyncio
import contextlib
import io
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar

import aiohttp
import structlog
from aiohttp import web
from pydantic import ValidationError

from conpaas.core.errors import (
    PROBLEM_TYPE,
    BadInputError,
    ConpaasError,
    DeadlineError,
    NotFoundError,
    PeerError,
    TooLargeError,
    from_problem,
)
from conpaas.core.messages.base import Endpoint, Message, from_peer

log = structlog.get_logger()

CallerT = TypeVar("CallerT")
CallerT_co = TypeVar("CallerT_co", covariant=True)
Q = TypeVar("Q", bound=Message)
MAX_BODY = 1 << 20
"""Bytes of a JSON body; uploads are streams with limits of their own."""
SILENCE_S = 30.0
"""How long a JSON body, or the next piece of an upload, may take to come."""
BUFFER_BYTES = 64 * 1024
EVENT_BYTES = 4 * 1024 * 1024
"""Bytes of one server-sent event: a line that must fit the buffer."""
SILENT_S = 45.0
"""Seconds after which a stream of events without as much as a heartbeat is taken for dead."""


@dataclass(frozen=True)
class Call(Generic[CallerT]):
    """One call being served: who, on what, with which words."""

    caller: CallerT
    endpoint: Endpoint
    params: Mapping[str, str]
    http: web.Request
    query_message: Message | None = None

    def query(self, kind: type[Q]) -> Q:
        """Return the query string, as the endpoint declares it."""
        if not isinstance(self.query_message, kind):
            raise TypeError(f"{self.endpoint.path} has no query of type {kind.__name__}")
        return self.query_message

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body of an upload as it comes; a connection cut half way is a BadInputError."""
        try:
            while chunk := await _heard(self.http.content.read(1 << 18)):
                yield chunk
        except (aiohttp.ClientError, ConnectionError, aiohttp.http_exceptions.HttpProcessingError) as exc:
            raise BadInputError("the upload was cut off", hint="send it again") from exc


Handler: TypeAlias = Callable[..., Awaitable[Message | web.StreamResponse]]


class Authenticate(Protocol[CallerT_co]):
    """Says who calls, and whether they may: raises NotAuthenticatedError, ForbiddenError or NotFoundError."""

    async def __call__(self, request: web.Request, endpoint: Endpoint) -> CallerT_co: ...


def route(endpoint: Endpoint, handler: Handler, authenticate: Authenticate[Any]) -> web.RouteDef:
    """Return the aiohttp route that serves `endpoint` by `handler(call)` or, if it takes a body, `handler(call, body)`.

    `authenticate` runs first, on every call: there is no way to serve an endpoint without it.
    """

    async def serve(request: web.Request) -> web.StreamResponse:
        caller = await authenticate(request, endpoint)
        query = None if endpoint.query is None else _read_query(endpoint.query, request)
        call = Call(caller, endpoint, request.match_info, request, query)
        if endpoint.request is None:
            answer = await handler(call)
        else:
            answer = await handler(call, await _read_body(endpoint.request, request))
        if isinstance(answer, web.StreamResponse):
            return answer
        return reply(answer, status=endpoint.status)

    return web.RouteDef(endpoint.method, endpoint.path, serve, {"name": None})


def reply(message: Message, *, status: int = 200) -> web.Response:
    """Return a message as a JSON response."""
    body = message.model_dump_json(context={"reveal": True}).encode()
    return web.Response(body=body, status=status, content_type="application/json")


async def _read_body(kind: type[Message], request: web.Request) -> Message:
    _check_size(request.content_length or 0)
    raw = await _heard(request.read())
    try:
        return kind.model_validate_json(raw or b"{}")
    except ValidationError as exc:
        raise bad_input(exc) from exc


def _check_size(size: int) -> None:
    if size > MAX_BODY:
        raise TooLargeError(f"the request has {size} bytes, at most {MAX_BODY} are taken", value=size)


async def _heard(reading: Awaitable[bytes]) -> bytes:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await reading
    except TimeoutError as exc:
        raise BadInputError(f"the rest did not come within {SILENCE_S:g} s", hint="send it again") from exc


def _read_query(kind: type[Message], request: web.Request) -> Message:
    try:
        return kind.model_validate(dict(request.query))
    except ValidationError as exc:
        raise bad_input(exc) from exc


def bad_input(exc: ValidationError) -> BadInputError:
    """Say in one sentence what a validation found: the first field, its value, and how many more."""
    errors = exc.errors(include_url=False, include_context=False)
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"])[:100]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    value = first.get("input")
    secret = any(word in place.lower() for word in ("password", "secret", "token", "old", "new"))
    whole = not place or isinstance(value, dict | list | tuple)  # there may be a secret somewhere in it
    place = place or "the request"
    return BadInputError(
        f"{place}: {first['msg']}{more}",
        value=None if secret or whole else value,
        hint=f"correct '{place}' and send it again",
    )


@web.middleware
async def errors_to_replies(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn expected errors into problem documents; a bug becomes a plain 500 and a line in the log."""
    try:
        return await handler(request)
    except ConpaasError as exc:
        return problem(exc)
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        return problem(_of_http(exc, request))
    except (ConnectionResetError, asyncio.CancelledError):
        raise
    except Exception as exc:  # the last resort: nothing of a bug is shown to the caller, all of it to us
        log.exception("bug", method=request.method, path=request.path, error=type(exc).__name__)
        return problem(ConpaasError("an internal error", hint="the log of the process says more"))


def _of_http(exc: web.HTTPException, request: web.Request) -> ConpaasError:
    if exc.status == 404:
        return NotFoundError(f"nothing at {request.path}", value=request.path)
    if exc.status == 413:
        return TooLargeError("the request is too large")
    error = BadInputError(f"{request.method} {request.path}: {exc.reason}")
    error.status = exc.status  # type: ignore[misc]  # this one instance answers as aiohttp meant it
    return error


def problem(exc: ConpaasError) -> web.Response:
    """Return an error as a problem document."""
    return web.Response(status=exc.status, body=json.dumps(exc.problem()).encode(), content_type=PROBLEM_TYPE)


class EventStream:
    """Server-sent events to one client, with a comment as heartbeat so that dead clients are noticed."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )

    async def __aenter__(self) -> Self:
        await self._response.prepare(self._request)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with contextlib.suppress(ConnectionError):
            await self._response.write_eof()

    async def send(self, message: Message) -> None:
        await self._response.write(b"data: " + message.model_dump_json(exclude_defaults=True).encode() + b"\n\n")

    async def heartbeat(self) -> None:
        await self._response.write(b": still here\n\n")

    @property
    def response(self) -> web.StreamResponse:
        return self._response


R = TypeVar("R", bound=Message)


@dataclass
class Client:
    """Calls the endpoints of one peer over kept-alive connections.

    `server_hostname` pins the peer's identity: its certificate must bear that name (see `core.identity`). Raises what
    the peer raised, `PeerError` when it cannot be reached and `DeadlineError` when it does not answer in time.
    """

    base: str
    tls: ssl.SSLContext | None = None
    server_hostname: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    connections: int = 20
    _session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=self.connections, ssl=self.tls if self.tls is not None else True)
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=dict(self.headers),
                auto_decompress=True,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def close(self) -> None:
        """Close the connections; the client may be used again afterwards."""
        if self._session is not None:
            await self._session.close()

    async def call(
        self,
        endpoint: Endpoint,
        body: Message | None = None,
        *,
        query: Message | None = None,
        data: AsyncIterator[bytes] | bytes | None = None,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        **params: str,
    ) -> Any:
        """Call `endpoint` and return its response message."""
        async with self._open(endpoint, body, query, data, timeout_s, headers, params) as response:
            kind = endpoint.response
            if kind is None:
                raise TypeError(f"{endpoint.path} has no message for an answer: use stream()")
            return from_peer(kind, await response.read())

    @contextlib.asynccontextmanager
    async def stream(
        self,
        endpoint: Endpoint,
        *,
        query: Message | None = None,
        timeout_s: float | None = None,
        **params: str,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open a download; the caller reads `response.content` as it comes."""
        async with self._open(endpoint, None, query, None, timeout_s, None, params) as response:
            yield response

    async def events(self, endpoint: Endpoint, *, query: Message | None = None, **params: str) -> AsyncIterator[Any]:
        """Yield the server-sent events of `endpoint` as messages until the peer ends the stream."""
        if endpoint.response is None:
            raise TypeError(f"{endpoint.path} declares no event")
        async with self._open(endpoint, None, query, None, 0, None, params) as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    yield from_peer(endpoint.response, line[6:])

    @contextlib.asynccontextmanager
    async def _open(
        self,
        endpoint: Endpoint,
        body: Message | None,
        query: Message | None,
        data: AsyncIterator[bytes] | bytes | None,
        timeout_s: float | None,
        headers: Mapping[str, str] | None,
        params: Mapping[str, str],
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        payload: Any = io.BytesIO(data) if isinstance(data, bytes) else data
        all_headers = dict(headers or {})
        if body is not None:
            payload = body.model_dump_json(context={"reveal": True}, exclude_unset=True).encode()
            _check_size(len(payload))
            all_headers["Content-Type"] = "application/json"
        total = endpoint.timeout_s if timeout_s is None else timeout_s
        words = (
            None if query is None else {k: str(v) for k, v in query.model_dump(mode="json", exclude_none=True).items()}
        )
        url = self.base.rstrip("/") + endpoint.url(**params)
        try:
            async with self.session.request(
                endpoint.method,
                url,
                params=words,
                data=payload,
                headers=all_headers,
                server_hostname=self.server_hostname,
                timeout=aiohttp.ClientTimeout(
                    total=total or None, sock_connect=min(5.0, total or 5.0), sock_read=None if total else SILENT_S
                ),
                read_bufsize=BUFFER_BYTES if total else EVENT_BYTES,
                allow_redirects=False,
            ) as response:
                if response.status >= 400:
                    raise await _error_of(response)
                yield response
        except TimeoutError as exc:
            raise DeadlineError(
                f"{endpoint.method} {url}: no answer within {total or SILENT_S:g} s", value=url
            ) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise PeerError(f"{endpoint.method} {url}: {str(exc) or type(exc).__name__}", value=url) from exc


async def _error_of(response: aiohttp.ClientResponse) -> ConpaasError:
    raw = await response.content.read(65536)
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return PeerError(f"{response.url} answered {response.status} and no problem document")
    error = from_problem(document, response.status)
    if type(error).status != response.status:
        error.status = response.status  # type: ignore[misc]  # an error of a newer peer keeps its status
    return error
