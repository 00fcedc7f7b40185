"""The administrator's page: users and their credits, clouds, all instances."""

import asyncio

from aiohttp import web

from conpaas.core.errors import BadInputError, ForbiddenError
from conpaas.web import pages, visits

routes = web.RouteTableDef()
USER = "/admin/users/{user:[A-Za-z0-9-]+}"


@routes.get("/admin")
async def administration(request: web.Request) -> web.Response:
    """Show everything that only administrators see."""
    api = await visits.api(request)
    me = await api.me()
    if not me.admin:
        raise ForbiddenError("this page is for administrators", hint="ask one of them")
    users, accounts, instances = await asyncio.gather(api.users(), api.cloud_accounts(), api.instances())
    return pages.page(
        request,
        "admin.html",
        me=me,
        users=users,
        names={user.id: user.username for user in users},
        accounts=accounts,
        instances=instances,
    )


@routes.post(f"{USER}/grant")
async def grant(request: web.Request) -> web.Response:
    """Give credits, or take some."""
    api = await visits.api(request)
    form = await request.post()
    text = str(form.get("amount", "")).strip()
    if not text.removeprefix("-").removeprefix("+").isdecimal() or len(text) > 9:
        raise BadInputError(
            f"'{text[:40]}' is not a number of credits", value=text, hint="write 100 to give, -100 to take"
        )
    user = await api.grant(request.match_info["user"], int(text), reason=str(form.get("reason", "")))
    return pages.done(request, "/admin", f"{user.username} has {user.credits} credits now")


@routes.post(f"{USER}/change")
async def change(request: web.Request) -> web.Response:
    """Make a user an administrator or not, disabled or not."""
    api = await visits.api(request)
    form = await request.post()
    user = await api.change_user(
        request.match_info["user"], admin=_flag(form.get("admin")), disabled=_flag(form.get("disabled"))
    )
    return pages.done(request, "/admin", f"{user.username} is changed")


def _flag(value: object) -> bool | None:
    return None if value is None else value == "true"
