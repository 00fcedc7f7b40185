"""The web UI as an aiohttp application: pages rendered here, out of what the SDK says.

The director mounts it at `/` of its public port. It keeps nothing: sessions, users and services are the director's.
"""

from collections.abc import AsyncIterator, Callable

from aiohttp import web

from conpaas.web import live, security, visits
from conpaas.web.pages import SITE, Site
from conpaas.web.static_files import StaticFiles
from conpaas.web.views import account, admin, applications, clouds, code, dashboard, logs, metrics, service

_FORM_LIMIT = 1 << 20  # bytes; archives are streams with the director's own limit


def create(api_base_url: Callable[[], str]) -> web.Application:
    """Return the UI of the director at `api_base_url()`, such as `http://127.0.0.1:9999`, asked for when needed."""
    app = web.Application(
        middlewares=[security.errors_to_pages, security.refuse_forgeries], client_max_size=_FORM_LIMIT
    )
    files = StaticFiles()
    app[SITE] = Site(files)
    app[visits.CLIENTS] = visits.Clients(api_base_url)
    app[live.STREAMS] = live.Streams()
    app.on_response_prepare.append(security.add_headers)
    app.on_shutdown.append(_end_streams)
    app.cleanup_ctx.append(_clients)
    app.router.add_get("/static/{digest}/{name:.+}", files.serve)
    for views in (dashboard, service, code, logs, metrics, applications, account, admin, clouds, live):
        app.add_routes(views.routes)
    return app


async def _end_streams(app: web.Application) -> None:
    app[live.STREAMS].end()


async def _clients(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[visits.CLIENTS].close()
