"""Calls of an OpenNebula server: each has a deadline, and fails with an error of the contract.

XML-RPC with the standard library's encoding. Both XML documents of an answer, the call's and the one in it that
describes the things asked for, are read by expat, which loads nothing from elsewhere and itself bounds what entities
may grow to; their size is bounded here.
"""

import asyncio
import re
import ssl
import xmlrpc.client
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from xml.etree.ElementTree import Element, ParseError, XMLParser
from xml.parsers.expat import ExpatError

import aiohttp

from conpaas.cloud.opennebula import OpenNebulaSettings
from conpaas.core.cloud import CloudContext
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

T = TypeVar("T")
Parameter = str | int | bool

CALLS = 15
"""Under way at once: the server serves as many, and refuses connections when many more wait."""
MAX_BYTES = 128 * 1024 * 1024
"""Of an answer: a VM takes 9 KB in a list."""
_LARGE_BYTES = 256 * 1024
"""An answer of this size is read in a thread: it takes 10 ms."""
_SLICE = 64 * 1024


class NoSuchError(CloudRefusedError):
    """The server has no object of this id, or shows it to others only."""


class NameTakenError(CloudRefusedError):
    """The user has an object of this name already."""


class NoMethodError(CloudRefusedError):
    """The server's version does not have this call."""


class WrongStateError(CloudBusyError):
    """The object is not in a state for this call just now."""


# Values of `Request::ErrorCode`, the third element of a failure.
AUTHENTICATION, AUTHORIZATION, NO_EXISTS, ACTION = 0x100, 0x200, 0x400, 0x800
LOCKED, REPLICATION = 0x8000, 0x10000
_NO_METHOD = -506

_BY_CODE: dict[int, type[ConpaasError]] = {
    AUTHENTICATION: CloudCredentialsError,
    AUTHORIZATION: CloudCredentialsError,
    NO_EXISTS: NoSuchError,
    ACTION: WrongStateError,
    REPLICATION: PeerError,
}
_UNLOCK = "an administrator of the OpenNebula has locked it, and must unlock it"
_BY_WORDS: tuple[tuple[re.Pattern[str], type[ConpaasError], str | None], ...] = tuple(
    (re.compile(pattern), kind, hint)
    for pattern, kind, hint in (
        (r"\blimit of \S+ reached for \S+ quota\b", QuotaExceededError, None),
        (r"Cannot get IP/MAC lease", NoCapacityError, "no address is free: try later, or enlarge the network"),
        (r"Cannot acquire image \d+, it is locked", WrongStateError, None),
        (r"persistent and already in use", CloudRefusedError, None),
        (r"Cannot acquire image|Image with ID: \d+ does not exist|own an image|used as DISK", UnknownImageError, None),
        (r"\bis locked\b", CloudRefusedError, _UNLOCK),
        (r"Cannot process request", CloudBusyError, None),  # a cluster of servers that elects its leader
        (r"NAME is already taken", NameTakenError, None),
        (r"Not enough space in datastore", CloudRefusedError, "the datastore is full: enlarge it, or choose another"),
        (r"restricted attribute", CloudRefusedError, "only administrators of the OpenNebula may set it"),
        (r"etwork \d+ does not exist|network with ID: \d+", CloudRefusedError, "correct the networks of this cloud"),
    )
)
"""What the words say goes before what the code says: one code stands for many troubles."""

_UNREADABLE: tuple[type[Exception], ...] = (ExpatError, ParseError, xmlrpc.client.Error)
_UNREADABLE += (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What the parsers make of an answer that is not of the protocol."""


def error_for(cloud: str, code: int, text: str) -> ConpaasError:
    """Return the error that a failure stands for. Its `value` is OpenNebula's code, its message OpenNebula's words."""
    message = f"cloud {cloud}: {text}"
    for pattern, kind, hint in _BY_WORDS:
        if pattern.search(text):
            return kind(message, hint=hint, value=code)
    if code == LOCKED:
        return CloudRefusedError(message, hint=_UNLOCK, value=code)
    return _BY_CODE.get(code, CloudRefusedError)(message, value=code)


class _FailureError(Exception):
    """What the server refuses: its code, and its words."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


def understood(cloud: str, method: str, body: bytes, use: Callable[[Any], T]) -> T:
    """Return what `use` makes of an answer; PeerError if it is not one.

    Documents are read in slices, so that a thread which reads a large one lets others run.
    """
    try:
        return use(_value(body))
    except xmlrpc.client.Fault as exc:
        kind = NoMethodError if exc.faultCode == _NO_METHOD else CloudRefusedError
        text = f"cloud {cloud}: [{method}] {exc.faultString}"
        raise kind(text, value=exc.faultCode, hint="this version of OpenNebula is not supported") from exc
    except _FailureError as exc:
        raise error_for(cloud, exc.code, exc.text) from exc
    except _UNREADABLE as exc:
        raise PeerError(f"cloud {cloud}: [{method}] the answer makes no sense: {exc}") from exc


def _value(body: bytes) -> Any:
    """Return what an XML-RPC answer holds; raises xmlrpc.client.Fault if that is a fault."""
    parser, found = xmlrpc.client.getparser()
    for start in range(0, len(body), _SLICE):
        parser.feed(body[start : start + _SLICE])
    parser.close()
    (value,) = found.close()
    return value


def _result(value: Any) -> Any:
    """Return the second element of an answer: of a success its value, of a failure its text, which is raised."""
    done, result = value[0], value[1]
    if not isinstance(done, bool):
        raise TypeError(f"{done!r} is neither true nor false")
    if not done:
        raise _FailureError(int(value[2]), str(result))
    return result


def _document(value: Any) -> Element:
    """Return the document that a success holds."""
    text = _result(value)
    parser = XMLParser()  # noqa: S314 - see the top of this file
    for start in range(0, len(text), _SLICE):
        parser.feed(text[start : start + _SLICE])
    root: Element = parser.close()
    return root


class Server:
    """One OpenNebula, as one user of it. Connects when it is first called."""

    def __init__(self, settings: OpenNebulaSettings, context: CloudContext) -> None:
        self._endpoint, self._cloud, self._deadline_s = settings.endpoint, context.name, context.deadline_s
        self._key = f"{settings.user}:{settings.password.get_secret_value()}"
        self._tls = _tls(settings)
        self._slots = asyncio.Semaphore(CALLS)
        self._client: aiohttp.ClientSession | None = None

    async def ask(self, method: str, *parameters: Parameter) -> Any:
        """Make a call that may change something, once; return its value, an id or a text."""
        return await self._call(method, parameters, _result, repeat=False)

    async def read(self, method: str, *parameters: Parameter) -> Element:
        """Make a call that only reads; return the document that it answers.

        It is repeated once if the connection breaks: a busy server drops some.
        """
        return await self.read_as(_same, method, *parameters)

    async def read_as(self, use: Callable[[Element], T], method: str, *parameters: Parameter) -> T:
        """Read what `use` makes of the document; of a large one it does so in a thread."""
        return await self._call(method, parameters, lambda value: use(_document(value)), repeat=True)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _call(
        self, method: str, parameters: tuple[Parameter, ...], use: Callable[[Any], T], *, repeat: bool
    ) -> T:
        request = xmlrpc.client.dumps((self._key, *parameters), method).encode()
        body = await self._exchange(method, request, repeat=repeat)
        understand = partial(understood, self._cloud, method, body, use)
        return understand() if len(body) < _LARGE_BYTES else await asyncio.to_thread(understand)

    async def _exchange(self, method: str, request: bytes, *, repeat: bool) -> bytes:
        """Post a request when it is its turn; CloudBusyError if that does not come before its deadline."""
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._slots.acquire()
        except TimeoutError as exc:
            waited = f"{CALLS} calls before it have no answer within {self._deadline_s:g} s"
            raise CloudBusyError(f"cloud {self._cloud}: [{method}] {waited}") from exc
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._post(request)
        except TimeoutError as exc:
            waited = f"no answer within {self._deadline_s:g} s"
            raise DeadlineError(f"cloud {self._cloud}: [{method}] {waited}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            if not (repeat and _broke(exc)):
                raise self._unreachable(method, exc) from exc
        finally:
            self._slots.release()
        return await self._exchange(method, request, repeat=False)

    def _unreachable(self, method: str, exc: Exception) -> PeerError:
        hint = "name the server's certificate authority in ca_file" if isinstance(exc, aiohttp.ClientSSLError) else None
        return PeerError(f"cloud {self._cloud}: [{method}] {str(exc) or type(exc).__name__}", hint=hint)

    async def _post(self, request: bytes) -> bytes:
        if self._client is None:
            connector = aiohttp.TCPConnector(force_close=True, limit=0)  # the server closes every connection
            self._client = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout())
        posting = self._client.post(
            self._endpoint,
            data=request,
            headers={"Content-Type": "text/xml"},
            ssl=self._tls,
            allow_redirects=False,
        )
        async with posting as response:
            self._check(response)
            parts, size = [], 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > MAX_BYTES:
                    raise PeerError(f"cloud {self._cloud}: the answer has more than {MAX_BYTES} bytes")
                parts.append(part)
        return b"".join(parts)

    def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise unless the server itself has answered; it says 200 to all, a proxy before it may say more."""
        said = f"cloud {self._cloud}: the answer is {response.status} {response.reason}"
        if response.status in {429, 503}:
            pause = response.headers.get("Retry-After", "")
            raise ThrottledError(said, value=response.status, retry_after_s=float(pause) if pause.isdigit() else None)
        if response.status != 200:
            raise PeerError(said, value=response.status, hint="is the endpoint right? It often ends in :2633/RPC2")


def _same(document: Element) -> Element:
    return document


def _broke(exc: Exception) -> bool:
    """Tell whether a connection that was there has broken, as against one that could not be made."""
    return not isinstance(exc, aiohttp.ClientConnectorError | aiohttp.InvalidURL)


def _tls(settings: OpenNebulaSettings) -> ssl.SSLContext | bool:
    if not settings.verify:
        return False
    if settings.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as exc:
        raise CloudRefusedError(
            f"cannot read the certificate authority {settings.ca_file}: {exc}",
            value=str(settings.ca_file),
            hint="name a file in PEM that the director can read",
        ) from exc
