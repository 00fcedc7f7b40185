"""Calls and their errors, over real connections, and against peers that answer rubbish."""

import asyncio
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import Field, SecretStr
from structlog.testing import capture_logs

from conpaas.core import rpc
from conpaas.core.errors import (
    BadInputError,
    ConpaasError,
    DeadlineError,
    ForbiddenError,
    NotAuthenticatedError,
    NotFoundError,
    PeerError,
    QuotaExceededError,
    TooLargeError,
    all_errors,
)
from conpaas.core.messages.base import Endpoint, Message, Secret, Who, who
from conpaas.core.rpc import Call, Client
from tests.fakes.waiting import until

ANYONE = who(Who.ANYONE)


class Word(Message):
    """A request."""

    word: str = Field(max_length=20)
    times: int = Field(default=1, ge=1, le=9)
    password: Secret = SecretStr("")
    new_password: str = Field(default="", max_length=8)


class Said(Message):
    """An answer."""

    text: str
    more: int = 0


class Page(Message):
    """A query."""

    limit: int = Field(default=10, le=100)
    after: str | None = None


SAY = Endpoint(
    method="POST", path="/say/{to}", summary="Say", allow=ANYONE, request=Word, response=Said, status=201, timeout_s=45
)
LIST = Endpoint(method="GET", path="/list", summary="List", allow=ANYONE, query=Page, response=Said)
EVENTS = Endpoint(method="GET", path="/events", summary="Events", allow=ANYONE, response=Said, events=True)
UPLOAD = Endpoint(
    method="PUT", path="/upload", summary="Upload", allow=ANYONE, upload=True, response=Said, timeout_s=45
)
DOWNLOAD = Endpoint(method="GET", path="/download", summary="Download", allow=ANYONE, download=True)


class Peer:
    """A server whose handlers a test sets."""

    def __init__(self) -> None:
        self.asked: list[Endpoint] = []
        self.refuse: ConpaasError | None = None
        self.failure: Exception | None = None
        self.words: list[Word] = []
        self.uploads: list[bytes | ConpaasError] = []
        self.heard = asyncio.Event()

    async def authenticate(self, request: web.Request, endpoint: Endpoint) -> str:
        self.asked.append(endpoint)
        if self.refuse is not None:
            raise self.refuse
        return "ann"

    async def say(self, call: Call[str], body: Word) -> Said:
        self.words.append(body)
        if self.failure is not None:
            raise self.failure
        return Said(text=f"{call.caller} to {call.params['to']}: {body.word * body.times}")

    async def pages(self, call: Call[str]) -> Said:
        return Said(text=call.query(Page).model_dump_json())

    async def events(self, call: Call[str]) -> web.StreamResponse:
        async with rpc.EventStream(call.http) as stream:
            for number in range(3):
                await stream.send(Said(text="a\nline", more=number))
                await stream.heartbeat()
        return stream.response

    async def upload(self, call: Call[str]) -> Said:
        try:
            parts = [chunk async for chunk in call.chunks()]
        except ConpaasError as exc:
            self.uploads.append(exc)
            raise
        finally:
            self.heard.set()
        self.uploads.append(b"".join(parts))
        return Said(text="thanks", more=sum(map(len, parts)))

    async def download(self, _: Call[str]) -> web.Response:
        return web.Response(body=b"x" * 1000)

    def routes(self) -> list[web.RouteDef]:
        handlers: dict[Any, Any] = {
            "say": (SAY, self.say),
            "list": (LIST, self.pages),
            "events": (EVENTS, self.events),
            "upload": (UPLOAD, self.upload),
            "download": (DOWNLOAD, self.download),
        }
        return [rpc.route(endpoint, handler, self.authenticate) for endpoint, handler in handlers.values()]


@asynccontextmanager
async def serving(*routes: web.RouteDef, client_max_size: int = rpc.MAX_BODY) -> AsyncIterator[str]:
    app = web.Application(middlewares=[rpc.errors_to_replies], client_max_size=client_max_size)
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
async def base(peer: Peer) -> AsyncIterator[str]:
    async with serving(*peer.routes()) as url:
        yield url


@pytest.fixture
async def client(base: str) -> AsyncIterator[Client]:
    one = Client(base)
    yield one
    await one.close()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def post(http: aiohttp.ClientSession, base: str, body: str | bytes) -> tuple[int, str, dict[str, Any]]:
    """Return status, text and problem document of an answer to `body`."""
    async with http.post(f"{base}/say/bob", data=body, headers={"Content-Type": "application/json"}) as response:
        return response.status, await response.text(), await response.json(content_type=None)


# -- round trips ------------------------------------------------------------------------------------------------------


async def test_a_call_and_its_answer(client: Client, peer: Peer, http: aiohttp.ClientSession, base: str) -> None:
    answer = await client.call(SAY, Word(word="ho", times=3), to="bob")
    assert answer == Said(text="ann to bob: hohoho")
    assert (await post(http, base, '{"word": "ho"}'))[0] == 201


async def test_a_secret_travels_as_it_is_and_shows_nowhere_else(client: Client, peer: Peer) -> None:
    word = Word(word="x", password=SecretStr("geheim"))
    await client.call(SAY, word, to="bob")
    assert peer.words[0].password.get_secret_value() == "geheim"
    assert "geheim" not in word.model_dump_json() + repr(word)


async def test_a_query_travels_too(client: Client) -> None:
    answer = await client.call(LIST, query=Page(limit=3, after="a&b=c"))
    assert answer.text == '{"limit":3,"after":"a&b=c"}'


async def test_a_wrong_query_is_refused_with_its_fields_name(http: aiohttp.ClientSession, base: str) -> None:
    for words, field in (({"limit": "1000"}, "limit"), ({"limt": "1"}, "limt")):
        async with http.get(f"{base}/list", params=words) as response:
            document = await response.json(content_type=None)
        assert response.status == 422
        assert field in document["detail"]


async def test_downloads_are_streams(client: Client) -> None:
    async with client.stream(DOWNLOAD) as response:
        assert await response.content.read() == b"x" * 1000


async def test_events_come_one_by_one_and_heartbeats_are_not_events(client: Client) -> None:
    assert [event async for event in client.events(EVENTS)] == [Said(text="a\nline", more=n) for n in range(3)]


async def test_a_client_that_was_closed_can_call_again(client: Client) -> None:
    await client.close()
    assert (await client.call(SAY, Word(word="a"), to="bob")).text == "ann to bob: a"


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", all_errors().values(), ids=lambda kind: kind.code)
async def test_an_error_is_the_same_at_the_other_end(client: Client, peer: Peer, kind: type[ConpaasError]) -> None:
    peer.failure = kind("it went <wrong>", hint="do this", value="x" * 300)
    with pytest.raises(kind) as caught:
        await client.call(SAY, Word(word="a"), to="bob")
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.status) == (kind.code, kind.status)
    assert (error.message, error.hint, error.value) == ("it went <wrong>", "do this", "x" * 200)


async def test_an_error_is_a_problem_document(http: aiohttp.ClientSession, base: str, peer: Peer) -> None:
    peer.failure = QuotaExceededError("4 of 4 instances in use", value=4)
    async with http.post(f"{base}/say/bob", json={"word": "a"}) as response:
        assert response.status == 409
        assert response.content_type == "application/problem+json"
        assert await response.json(content_type=None) == {
            "type": "urn:conpaas:error:quota-exceeded",
            "title": "quota exceeded",
            "status": 409,
            "detail": "4 of 4 instances in use",
            "code": "quota-exceeded",
            "value": 4,
            "hint": QuotaExceededError.default_hint,
        }


async def test_a_bug_is_a_plain_500_that_shows_nothing_and_a_log_line_that_shows_all(
    http: aiohttp.ClientSession, base: str, peer: Peer
) -> None:
    peer.failure = KeyError("the secret of the bug")
    with capture_logs() as lines:
        status, text, document = await post(http, base, '{"word": "a"}')
    assert status == 500
    assert "secret" not in text
    assert "KeyError" not in text
    assert document["code"] == "internal"
    assert [(line["event"], line["path"], line["error"]) for line in lines] == [("bug", "/say/bob", "KeyError")]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"word": "a", "wrod": 1}', "wrod"),
        ('{"word": 7}', "word"),
        ('{"word": "a", "times": 10}', "times"),
        ('{"times": 2}', "word"),
        ("{}", "word"),
        ("", "word"),
        ("[]", "the request"),
        ('"a"', "the request"),
        ("{", "the request"),
        ("not json at all", "the request"),
        (b"\xff\xfe\x00garbage", "the request"),
        ("[" * 100_000, "the request"),
        ('{"word": "\ud83d\\ud83d"}'.encode("utf-8", "surrogatepass"), "the request"),
    ],
    ids=str,
)
async def test_bad_input_is_refused_and_the_field_named(
    http: aiohttp.ClientSession, base: str, peer: Peer, body: str | bytes, words: str
) -> None:
    status, text, document = await post(http, base, body)
    assert status == 422, text
    assert document["code"] == "bad-input"
    assert words in document["detail"]
    assert words in document["hint"]
    assert len(text) < 2000
    assert peer.words == []


@pytest.mark.parametrize(
    "body",
    [
        '{"word": "a", "new_password": "geheim-geheim"}',
        '{"word": "a", "password": ["geheim"]}',
        '{"word": "a", "new_password": {"a": "geheim"}}',
        '{"word": "a", "password": 1234567890123}',
        '{"word": "a", "Password": "geheim"}',
        '{"password": "geheim"}',
        '"geheim"',
        '{"word": "a", "password": "geheim',
    ],
)
async def test_a_secret_is_never_echoed(http: aiohttp.ClientSession, base: str, body: str) -> None:
    with capture_logs() as lines:
        status, text, _ = await post(http, base, body)
    assert status == 422
    for secret in ("geheim", "1234567890123"):
        assert secret not in text
        assert secret not in str(lines)


async def test_a_body_that_is_too_large_is_refused(http: aiohttp.ClientSession, base: str, peer: Peer) -> None:
    body = b'{"word": "' + b"a" * rpc.MAX_BODY + b'"}'
    async with http.post(f"{base}/say/bob", data=io.BytesIO(body)) as response:
        assert response.status == 413

    async def without_length() -> AsyncIterator[bytes]:
        yield body

    async with http.post(f"{base}/say/bob", data=without_length()) as response:
        assert response.status == 413
        assert (await response.json(content_type=None))["code"] == "too-large"
    assert peer.words == []


async def test_a_body_that_is_too_large_is_the_same_error_at_the_other_end(client: Client) -> None:
    with pytest.raises(TooLargeError):
        await client.call(SAY, Word.model_construct(word="a" * rpc.MAX_BODY), to="bob")


async def test_what_is_not_there_is_not_found(http: aiohttp.ClientSession, base: str) -> None:
    async with http.get(f"{base}/nothing/<b>") as response:
        assert response.status == 404
        assert (await response.json(content_type=None))["code"] == "not-found"
    async with http.delete(f"{base}/list") as response:
        assert response.status == 405
        assert (await response.json(content_type=None))["code"] == "bad-input"


# -- authentication ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [NotAuthenticatedError, ForbiddenError, NotFoundError])
async def test_nothing_is_served_before_the_caller_is_known(
    client: Client, peer: Peer, refusal: type[ConpaasError]
) -> None:
    peer.refuse = refusal("not you")
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: client.call(SAY, Word(word="a"), to="bob"),
        lambda: client.call(
            SAY, Word.model_construct(word="a" * 99), to="bob"
        ),  # a stranger does not learn what is wrong
        lambda: client.call(LIST),
        lambda: client.call(UPLOAD, data=b"x"),
        lambda: anext(client.events(EVENTS)),
        lambda: client.stream(DOWNLOAD).__aenter__(),
    ]
    for call in calls:
        with pytest.raises(refusal):
            await call()
    assert peer.asked == [SAY, SAY, LIST, UPLOAD, EVENTS, DOWNLOAD]
    assert (peer.words, peer.uploads) == ([], [])


def test_there_is_no_route_without_authentication() -> None:
    async def handler(_: Call[None]) -> Said:
        return Said(text="")

    with pytest.raises(TypeError):
        rpc.route(LIST, handler)  # type: ignore[call-arg]


# -- peers that are away, old, new or mad -----------------------------------------------------------------------------


async def test_a_peer_that_is_not_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = Client(f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(PeerError) as caught:
            await client.call(LIST)
    await client.close()
    assert not isinstance(caught.value, DeadlineError)
    assert caught.value.hint == PeerError.default_hint


@asynccontextmanager
async def answering(answer: bytes, *, hold: bool = False) -> AsyncIterator[Client]:
    """Serve `answer` to every request, then close; with `hold` stay silent instead of closing."""
    release = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if hold:
            await release.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server:
        try:
            yield client
        finally:
            release.set()
            await client.close()


def http_answer(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        http_answer(b"<html>"),
        http_answer(b""),
        http_answer(b"[]"),
        http_answer(b'{"txt": "a"}'),
        http_answer(b'{"text": 7}'),
        http_answer(b"\xff\xff"),
        http_answer(b"<h1>Bad Gateway</h1>", "502 Bad Gateway", "text/html"),
        http_answer(b"[1]", "500 Oops"),
        http_answer(b'"a"', "404 Not Found"),
        http_answer(b"\xff\xff", "500 Oops"),
    ],
    ids=range(14),
)
async def test_rubbish_from_a_peer_is_a_peer_error(answer: bytes) -> None:
    async with answering(answer) as client:
        with pytest.raises(PeerError):
            await client.call(LIST)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"], ids=["silent", "half"])
async def test_a_peer_that_does_not_answer_in_time(answer: bytes) -> None:
    async with answering(answer, hold=True) as client:
        with pytest.raises(DeadlineError, match=r"no answer within 0\.05 s"):
            await client.call(LIST, timeout_s=0.05)


async def test_a_redirect_is_not_followed(peer: Peer) -> None:
    async with answering(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n") as client:
        with pytest.raises(PeerError):
            await client.call(LIST)


async def test_fields_of_a_newer_peer_are_dropped() -> None:
    async with answering(http_answer(b'{"text": "a", "newer": {"x": 1}}')) as client:
        assert await client.call(LIST) == Said(text="a")


async def test_an_error_of_a_newer_peer_keeps_its_words_and_its_status() -> None:
    document = b'{"code": "brand-new", "detail": "newly wrong", "hint": "update", "status": 418, "more": []}'
    async with answering(http_answer(document, "418 Teapot", "application/problem+json")) as client:
        with pytest.raises(ConpaasError) as caught:
            await client.call(LIST)
    assert type(caught.value) is ConpaasError
    assert (caught.value.message, caught.value.hint, caught.value.status) == ("newly wrong", "update", 418)
    assert ConpaasError.status == 500


@pytest.mark.parametrize("document", [b"{}", b'{"code": ["x"], "detail": 7}', b'{"detail": null, "hint": null}'])
async def test_a_problem_document_that_says_nothing_is_still_an_error(document: bytes) -> None:
    async with answering(http_answer(document, "503 Busy")) as client:
        with pytest.raises(ConpaasError) as caught:
            await client.call(LIST)
    assert caught.value.status == 503
    assert isinstance(caught.value.message, str)


async def test_an_event_that_is_none_is_a_peer_error() -> None:
    async with answering(http_answer(b'data: {"text": "a"}\n\ndata: {"tex\n\n', kind="text/event-stream")) as client:
        events = client.events(EVENTS)
        assert await anext(events) == Said(text="a")
        with pytest.raises(PeerError):
            await anext(events)


async def test_events_that_are_cut_off_are_a_peer_error() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with answering(head + b'15\r\ndata: {"text": "a"}\n\n\r\n') as client:
        events = client.events(EVENTS)
        assert await anext(events) == Said(text="a")
        with pytest.raises(PeerError):
            await anext(events)


# -- uploads ----------------------------------------------------------------------------------------------------------


async def test_an_upload_is_a_stream_without_limit_of_its_own(client: Client, peer: Peer) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * rpc.MAX_BODY

    assert (await client.call(UPLOAD, data=pieces())).more == 5 * rpc.MAX_BODY
    assert peer.uploads == [b"x" * 5 * rpc.MAX_BODY]


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 1000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n20000\r\n"],
    ids=["length", "chunks"],
)
async def test_an_upload_that_is_cut_off_is_an_error_to_its_handler(base: str, peer: Peer, head: bytes) -> None:
    port = int(base.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PUT /upload HTTP/1.1\r\nHost: x\r\n" + head + b"x" * 1000)
    await writer.drain()
    await until(lambda: UPLOAD in peer.asked)
    writer.transport.abort()
    async with asyncio.timeout(45):
        await peer.heard.wait()
    assert not any(isinstance(upload, bytes) for upload in peer.uploads)


@pytest.mark.parametrize("rest", [b"5\r\nhello\r\nnonsense\r\n", b"5\r\nhello\r\n", b""])
async def test_an_upload_that_goes_silent_or_mad_is_given_up(
    base: str, peer: Peer, monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    monkeypatch.setattr(rpc, "SILENCE_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(base.rpartition(":")[2]))
    writer.write(b"PUT /upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + rest)
    async with asyncio.timeout(45):
        assert (await reader.readline()).split()[1] in (b"422", b"400")  # 400 if it was mad from its first packet
    writer.close()
    await writer.wait_closed()
    assert all(isinstance(upload, BadInputError) for upload in peer.uploads)


async def test_a_body_that_never_comes_is_given_up(base: str, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SILENCE_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(base.rpartition(":")[2]))
    writer.write(b"POST /say/bob HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    async with asyncio.timeout(45):
        assert b" 422 " in await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert peer.words == []


async def test_a_field_name_of_any_length_is_shown_in_part(http: aiohttp.ClientSession, base: str) -> None:
    status, text, _ = await post(http, base, '{"word": "a", "' + "x" * 10_000 + '": 1}')
    assert status == 422
    assert len(text) < 2000


async def test_a_sender_that_breaks_half_way_gets_his_own_error_and_the_handler_learns_of_it(
    client: Client, peer: Peer
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise OSError("the disk went away")

    with pytest.raises(PeerError):
        await client.call(UPLOAD, data=pieces())
    async with asyncio.timeout(45):
        await peer.heard.wait()
    assert not any(isinstance(upload, bytes) for upload in peer.uploads)


async def test_an_empty_upload_is_empty(client: Client, peer: Peer) -> None:
    assert (await client.call(UPLOAD, data=b"")).more == 0
    assert peer.uploads == [b""]
