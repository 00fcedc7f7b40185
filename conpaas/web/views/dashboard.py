"""The way in: the dashboard, the page that creates a service, and help."""

import asyncio
from collections import defaultdict

from aiohttp import web

from conpaas.core.messages.model import ServiceView
from conpaas.core.messages.public import ApplicationView
from conpaas.web import pages, places, visits

routes = web.RouteTableDef()


@routes.get("/")
async def dashboard(request: web.Request) -> web.Response:
    """Show all services as cards, by application."""
    api = await visits.api(request)
    me, types, applications, services = await asyncio.gather(api.me(), api.types(), api.applications(), api.services())
    return pages.page(
        request,
        "dashboard.html",
        me=me,
        types={kind.name: kind for kind in types},
        groups=_by_application(applications, services),
        services=services,
    )


def _by_application(
    applications: tuple[ApplicationView, ...], services: list[ServiceView]
) -> list[tuple[ApplicationView, list[ServiceView]]]:
    """Return the applications that have services, with them."""
    found: dict[str, list[ServiceView]] = defaultdict(list)
    for service in services:
        found[service.application].append(service)
    return [(application, found[application.id]) for application in applications if application.id in found]


@routes.get("/create")
async def choose(request: web.Request) -> web.Response:
    """Show what can be created, and where."""
    api = await visits.api(request)
    me, types, clouds, applications = await asyncio.gather(api.me(), api.types(), api.clouds(), api.applications())
    return pages.page(
        request,
        "create.html",
        me=me,
        types=types,
        type=next((kind.name for kind in types if kind.enabled), None),
        choices=places.choices(clouds),
        fallback_places=places.fallback(clouds),
        applications=applications,
        application=request.query.get("application"),
    )


@routes.post("/create")
async def create(request: web.Request) -> web.Response:
    """Create a service."""
    api = await visits.api(request)
    form = await request.post()
    application = str(form.get("application", "")) or None
    if new := str(form.get("new_application", "")).strip():
        application = (await api.create_application(new)).id
    cloud = str(form.get("cloud", ""))
    service = await api.create(
        type=str(form.get("type", "")),
        name=str(form.get("name", "")).strip() or None,
        cloud=cloud or None,
        size=str(form.get(f"size-{cloud}", "")) or None,
        fallback=places.read_fallback([str(name) for name in form.getall("fallback", ())], cloud),
        application=application,
        key=str(form.get("key", "")) or None,
    )
    return pages.done(request, f"/services/{service.id}", f"{service.name} is created")


@routes.get("/help")
async def show_help(request: web.Request) -> web.Response:
    """Show the short guide, to strangers too."""
    me = await (await visits.api(request)).me() if visits.of(request).token else None
    version = await (await visits.nobodys_api(request)).version()
    return pages.page(request, "help.html", me=me, version=version, origin=request.url.origin())
