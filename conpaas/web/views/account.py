"""Accounts: login, registration, password, API tokens, SSH keys."""

import asyncio
from collections.abc import Sequence
from typing import Literal

from aiohttp import web
from pydantic import SecretStr

from conpaas.core.errors import BadInputError, NotAuthenticatedError
from conpaas.core.messages.public import Registration
from conpaas.web import pages, visits

routes = web.RouteTableDef()
SCOPES: Sequence[Literal["read", "write", "admin"]] = ("read", "write", "admin")


@routes.get("/login")
@routes.get("/register")
async def enter(request: web.Request) -> web.Response:
    """Show login and registration, one of them open."""
    api = await visits.nobodys_api(request)
    return pages.page(
        request,
        "enter.html",
        register=request.path == "/register",
        version=await api.version(),
        next=_safe(request.query.get("next", "/")),
    )


@routes.post("/login")
async def login(request: web.Request) -> web.Response:
    """Begin a session."""
    form = await request.post()
    return await _begin(request, str(form.get("username", "")).strip(), str(form.get("password", "")))


async def _begin(request: web.Request, username: str, password: str) -> web.Response:
    api = await visits.nobodys_api(request)
    try:
        session = await api.login(username, password, address=_address(request))
    except NotAuthenticatedError as exc:  # `hint` is about the command line
        raise NotAuthenticatedError(exc.message, hint="check user name and password") from exc
    where = _safe(str((await request.post()).get("next", "/")))
    response = pages.done(request, where)
    visits.remember(request, response, session.token.get_secret_value(), session.expires)
    return response


def _address(request: web.Request) -> str | None:
    """Return where the visitor is; what a proxy on this machine says counts."""
    remote = request.remote or ""
    known = request.headers.get("X-Forwarded-For") if remote.startswith("127.") else None
    return known or remote or None


@routes.post("/register")
async def register(request: web.Request) -> web.Response:
    """Make an account and begin a session."""
    form = {name: str(value) for name, value in (await request.post()).items()}
    password = form.get("password", "")
    if password != form.get("retype", ""):
        raise BadInputError("the two passwords are not the same", hint="type the password again")
    names = ("username", "email", "first_name", "last_name", "affiliation")
    words = {name: form.get(name, "") for name in names}
    api = await visits.nobodys_api(request)
    user = await api.register(
        Registration.model_validate({**words, "password": SecretStr(password), "captcha": form.get("altcha", "")})
    )
    return await _begin(request, user.username, password)


@routes.get("/captcha")
async def captcha(request: web.Request) -> web.Response:
    """Pass on a proof-of-work challenge to the widget."""
    return web.json_response((await (await visits.nobodys_api(request)).captcha()).challenge)


@routes.post("/logout")
async def logout(request: web.Request) -> web.Response:
    """End the session."""
    response = pages.done(request, "/login")
    token = visits.of(request).token
    if token:
        clients = request.config_dict[visits.CLIENTS]
        visits.forget(request, response)
        try:
            await (await clients.of(token)).logout()
        except NotAuthenticatedError:
            pass  # it had ended by itself
        finally:
            await clients.forget(token)
    return response


@routes.get("/account")
async def account(request: web.Request) -> web.Response:
    """Show the visitor's account."""
    api = await visits.api(request)
    me, tokens, keys, version = await asyncio.gather(api.me(), api.tokens(), api.keys(), api.version())
    return pages.page(request, "account.html", me=me, tokens=tokens, keys=keys, version=version)


@routes.post("/account/password")
async def change_password(request: web.Request) -> web.Response:
    """Change the password."""
    api = await visits.api(request)
    form = await request.post()
    if form.get("new") != form.get("retype"):
        raise BadInputError("the two new passwords are not the same", hint="type the new password again")
    try:
        await api.change_password(str(form.get("old", "")), str(form.get("new", "")))
    except NotAuthenticatedError as exc:  # the session goes on: it is the old password that is wrong
        raise BadInputError(exc.message, hint="type your present password") from exc
    return pages.done(request, "/account", "your password is changed")


@routes.post("/account/tokens")
async def create_token(request: web.Request) -> web.Response:
    """Make an API token, and show its secret once."""
    api = await visits.api(request)
    form = await request.post()
    days = str(form.get("days", "90"))
    if not days.isdecimal():
        raise BadInputError(f"'{days[:20]}' is not a number of days", value=days)
    token = await api.create_token(
        str(form.get("name", "")),
        scopes=[scope for scope in SCOPES if f"scope-{scope}" in form],
        expires_in_days=int(days),
    )
    secret = token.secret.get_secret_value() if token.secret else ""
    if pages.wants_json(request):
        return web.json_response({"message": f"{token.name} is created", "location": "", "secret": secret})
    return pages.page(request, "token.html", me=await api.me(), token=token, secret=secret)


@routes.post("/account/tokens/{token:[A-Za-z0-9-]+}/revoke")
async def revoke(request: web.Request) -> web.Response:
    """Revoke an API token."""
    await (await visits.api(request)).delete_token(request.match_info["token"])
    return pages.done(request, "/account", "the token is revoked")


@routes.post("/account/keys")
async def add_key(request: web.Request) -> web.Response:
    """Add an SSH key."""
    form = await request.post()
    key = await (await visits.api(request)).add_key(str(form.get("name", "")), str(form.get("key", "")).strip())
    return pages.done(request, "/account", f"{key.name} is added")


@routes.post("/account/keys/{key:[A-Za-z0-9-]+}/delete")
async def delete_key(request: web.Request) -> web.Response:
    """Remove an SSH key."""
    await (await visits.api(request)).delete_key(request.match_info["key"])
    return pages.done(request, "/account", "the key is removed")


def _safe(where: str) -> str:
    """Return a place to go on to that is surely on this site."""
    return where if where.startswith("/") and not where.startswith(("//", "/\\")) else "/"
