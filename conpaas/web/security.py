"""What stands between the pages and the rest of the web: headers, the forgery check, errors without secrets."""

import contextlib
from collections.abc import Awaitable, Callable
from urllib.parse import quote, urlsplit

import structlog
from aiohttp import web
from pydantic import ValidationError

from conpaas.core import rpc
from conpaas.core.errors import ConpaasError, ForbiddenError, NotAuthenticatedError, NotFoundError
from conpaas.web import pages, visits

log = structlog.get_logger()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_HARMLESS = frozenset({"GET", "HEAD"})
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data"})


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:  # noqa: ARG001
    """Put the security headers on every answer; pages are not kept by anybody."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", "no-store")


@web.middleware
async def refuse_forgeries(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a change through only if it comes from a page of ours, in this visitor's browser."""
    if request.method not in _HARMLESS:
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise ForbiddenError(f"a page of {origin} may not act here", value=origin, hint="use the form on our page")
        token = request.headers.get("X-CSRF-Token")
        if token is None and request.content_type in _FORMS:
            token = str((await request.post()).get("csrf", ""))
        if not visits.of(request).proves(token or ""):
            raise ForbiddenError("this form is out of date", hint="reload the page and try again")
    return await handler(request)


@web.middleware
async def errors_to_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Show expected errors as a page, or to our scripts as a problem document; a bug is logged and not shown."""
    try:
        return await handler(request)
    except NotAuthenticatedError as exc:
        return await _to_login(request, exc)
    except ConpaasError as exc:
        return await _error(request, exc)
    except ValidationError as exc:  # the visitor's words, refused by the message they were put in
        return await _error(request, rpc.bad_input(exc))
    except web.HTTPException as exc:
        return await _http_error(request, exc)
    except ConnectionError:
        raise
    except Exception as exc:  # the last resort: nothing of a bug is shown to the visitor, all of it to us
        log.exception("bug", method=request.method, path=request.path, error=type(exc).__name__)
        return await _error(request, ConpaasError("something went wrong here", hint="the director's log says more"))


async def _http_error(request: web.Request, exc: web.HTTPException) -> web.StreamResponse:
    if exc.status < 400:
        raise exc
    if exc.status == 404:
        return await _error(
            request, NotFoundError("there is no such page", value=request.path, hint="go to the dashboard")
        )
    return await _error(request, ConpaasError(exc.reason), exc.status)


async def _to_login(request: web.Request, exc: NotAuthenticatedError) -> web.StreamResponse:
    """Send a visitor whose session has ended to the login form, and back afterwards."""
    if request.path == "/login" or pages.wants_json(request) or request.headers.get("X-Part"):
        response: web.StreamResponse = await _error(request, exc)
    else:
        back = request.path_qs if request.method in _HARMLESS else "/"
        response = web.Response(status=303, headers={"Location": f"/login?next={quote(back, safe='')}"})
    if visits.of(request).token:
        visits.forget(request, response)
    return response


async def _error(request: web.Request, exc: ConpaasError, status: int | None = None) -> web.Response:
    if pages.wants_json(request):
        return rpc.problem(exc)
    me = None
    if visits.of(request).token and not isinstance(exc, NotAuthenticatedError):
        with contextlib.suppress(ConpaasError):  # the page is about another error
            me = await (await visits.api(request)).me()
    return pages.page(request, "error.html", me=me, error=exc, status=status or exc.status)
