"""Who is looking: the browser's session, its API client, and the proof that a form is ours.

The session cookie holds the API session token itself, out of reach for scripts. The CSRF token is derived from the
cookie, so nothing is kept here that a restart could lose.
"""

import hmac
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from aiohttp import web

from conpaas.core import ids
from conpaas.core.errors import NotAuthenticatedError
from conpaas.sdk import Conpaas

_CLIENTS_KEPT = 500


class Clients:
    """API clients by session token, kept so that their connections are."""

    def __init__(self, base_url: Callable[[], str]) -> None:
        self.base_url = base_url
        self._clients: OrderedDict[str, Conpaas] = OrderedDict()

    async def of(self, token: str) -> Conpaas:
        """Return the client of a session; an empty token is nobody's."""
        if token not in self._clients:
            self._clients[token] = Conpaas(self.base_url(), token or None)
        self._clients.move_to_end(token)
        if len(self._clients) > _CLIENTS_KEPT:
            await self.forget(next(iter(self._clients)))
        return self._clients[token]

    async def forget(self, token: str) -> None:
        """Close the connections of a session."""
        client = self._clients.pop(token, None)
        if client is not None:
            await client.close()

    async def close(self) -> None:
        """Close all connections."""
        for token in list(self._clients):
            await self.forget(token)


CLIENTS = web.AppKey("clients", Clients)


@dataclass(frozen=True)
class Visit:
    """The visitor of one request."""

    token: str
    """The API session token; empty for nobody."""
    stranger: str
    """Random, for those who have not logged in: binds the login form to this browser."""
    new: bool
    """The browser does not hold `stranger` yet."""

    @property
    def csrf(self) -> str:
        """What a form must bring to be taken as ours."""
        return hmac.digest((self.token or self.stranger).encode(), b"conpaas csrf", "sha256").hex()

    def proves(self, token: str) -> bool:
        """Tell whether a form that brings `token` is ours."""
        return hmac.compare_digest(self.csrf.encode(), token.encode())


_VISIT = web.RequestKey("visit", Visit)


def of(request: web.Request) -> Visit:
    """Return who sent the request."""
    visit = request.get(_VISIT)
    if visit is None:
        stranger = request.cookies.get(_cookie(request, "visitor"), "")
        visit = Visit(
            token=request.cookies.get(_cookie(request, "session"), ""),
            stranger=stranger or ids.new_secret(),
            new=not stranger,
        )
        request[_VISIT] = visit
    return visit


async def api(request: web.Request) -> Conpaas:
    """Return the API client of the visitor; raise NotAuthenticatedError for nobody."""
    visit = of(request)
    if not visit.token:
        raise NotAuthenticatedError("log in to see this page", hint="")
    return await request.config_dict[CLIENTS].of(visit.token)


async def nobodys_api(request: web.Request) -> Conpaas:
    """Return an API client that is logged in as nobody."""
    return await request.config_dict[CLIENTS].of("")


def remember(request: web.Request, response: web.StreamResponse, token: str, expires: datetime) -> None:
    """Log the browser in."""
    age_s = (expires - datetime.now(expires.tzinfo)).total_seconds()
    _set(request, response, "session", token, max_age_s=max(int(age_s), 0))


def forget(request: web.Request, response: web.StreamResponse) -> None:
    """Log the browser out."""
    response.del_cookie(_cookie(request, "session"), path="/", httponly=True, samesite="Strict")


def bind_stranger(request: web.Request, response: web.StreamResponse) -> None:
    """Give a first-time visitor the cookie that its login form is checked against."""
    visit = of(request)
    if visit.new and not visit.token and not response.prepared:
        _set(request, response, "visitor", visit.stranger)


def _cookie(request: web.Request, name: str) -> str:
    """Name a cookie: browsers share cookies between the ports of a host, two directors must not."""
    return f"conpaas-{name}-{request.url.port or 0}"


def _set(
    request: web.Request, response: web.StreamResponse, name: str, value: str, max_age_s: int | None = None
) -> None:
    response.set_cookie(
        _cookie(request, name),
        value,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=request.secure,
        max_age=max_age_s,
    )
