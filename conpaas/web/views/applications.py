"""Applications: named sets of services."""

import asyncio
from collections import Counter

from aiohttp import web

from conpaas.web import pages, visits

routes = web.RouteTableDef()
ONE = "/applications/{application:[A-Za-z0-9-]+}"


@routes.get("/applications")
async def applications(request: web.Request) -> web.Response:
    """Show all applications."""
    api = await visits.api(request)
    me, found, services = await asyncio.gather(api.me(), api.applications(), api.services())
    counts = Counter(service.application for service in services)
    return pages.page(request, "applications.html", me=me, applications=found, counts=counts)


@routes.post("/applications")
async def create(request: web.Request) -> web.Response:
    """Make an application."""
    api = await visits.api(request)
    made = await api.create_application(str((await request.post()).get("name", "")))
    return pages.done(request, "/applications", f"{made.name} is created")


@routes.post(f"{ONE}/rename")
async def rename(request: web.Request) -> web.Response:
    """Rename an application."""
    api = await visits.api(request)
    name = str((await request.post()).get("name", ""))
    made = await api.rename_application(request.match_info["application"], name)
    return pages.done(request, "/applications", f"now called {made.name}")


@routes.post(f"{ONE}/delete")
async def delete(request: web.Request) -> web.Response:
    """Delete an empty application."""
    api = await visits.api(request)
    await api.delete_application(request.match_info["application"])
    return pages.done(request, "/applications", "the application is deleted")
