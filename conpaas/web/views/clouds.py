"""The administrator's pages about clouds: which there are, adding one, changing it, trying it, removing it."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from conpaas.core.errors import CloudRefusedError, ForbiddenError, NotFoundError
from conpaas.core.messages.base import Json
from conpaas.core.messages.public import (
    CloudAccountView,
    CloudForm,
    CloudOptions,
    CloudTypeView,
    Examination,
    UserView,
)
from conpaas.sdk import Conpaas
from conpaas.web import forms, pages, visits

routes = web.RouteTableDef()
ALL = "/admin/clouds"
ONE = ALL + "/{cloud:[a-z0-9][a-z0-9_-]*}"
_SETTING, _OPTION, _FORGET = "setting.", "option.", "forget."
_SHOWN = 6
"""So many settings are shown at least; the rest, if nobody needs to say anything there, on demand."""
_LABELS = {
    "instances": "Limit",
    "user_instances": "Limit per user",
    "prices": "Prices per hour",
    "currency": "Currency of the prices",
    "rates": "Calls per second",
    "director_url": "URL of the director",
}


@dataclass(frozen=True)
class Form:
    """The form of one account."""

    kind: CloudTypeView
    shown: Sequence[forms.Field]
    more: Sequence[forms.Field]
    options: Sequence[forms.Field]
    kept: frozenset[str]
    """Names of the secrets that are known: they stay unless others are written."""


@routes.get(ALL)
async def clouds(request: web.Request) -> web.Response:
    """Show all cloud accounts."""
    api = await visits.api(request)
    me, accounts, version = await asyncio.gather(_administrator(api), api.cloud_accounts(), api.version())
    return pages.page(request, "clouds.html", me=me, accounts=accounts, deployment=version.deployment)


@routes.get("/admin/add-cloud")
async def new(request: web.Request) -> web.Response:
    """Show the kinds of clouds, or the form of the chosen one."""
    api = await visits.api(request)
    me, kinds = await asyncio.gather(_administrator(api), api.cloud_types())
    driver = request.query.get("driver")
    if driver is None:
        return pages.page(request, "cloud_kinds.html", me=me, kinds=kinds)
    return pages.page(request, "cloud.html", me=me, account=None, form=_form(_kind(kinds, driver)))


@routes.get(ONE)
async def edit(request: web.Request) -> web.Response:
    """Show the form of an account as it is."""
    api = await visits.api(request)
    me, kinds = await asyncio.gather(_administrator(api), api.cloud_types())
    account = await api.cloud_account(request.match_info["cloud"])
    form = _form(_kind(kinds, account.driver), account)
    return pages.page(request, "cloud.html", me=me, account=account, form=form)


@routes.post(ALL)
async def add(request: web.Request) -> web.Response:
    """Add an account, if trying it finds nothing wrong or that is not asked for."""
    api = await visits.api(request)
    sent = await request.post()
    form = await _read(api, sent)
    await _check(api, form, sent)
    made = await api.add_cloud(form)
    return pages.done(request, ALL, f"{made.name} is added")


@routes.post(ONE)
async def change(request: web.Request) -> web.Response:
    """Change an account; new settings are tried first, unless that is not asked for."""
    api = await visits.api(request)
    sent = await request.post()
    account = await api.cloud_account(request.match_info["cloud"])
    form = await _read(api, sent, account)
    if form.settings != account.settings:
        await _check(api, form, sent)
    await api.change_cloud(form)
    return pages.done(request, ALL, f"{account.name} is changed")


@routes.post("/admin/try-cloud")
async def try_out(request: web.Request) -> web.Response:
    """Try an account as it is written in the form."""
    api = await visits.api(request)
    sent = await request.post()
    account = await api.cloud_account(str(sent["name"])) if "known" in sent else None
    return await _found(request, await api.try_cloud(await _read(api, sent, account)))


@routes.post(f"{ONE}/examine")
async def examine(request: web.Request) -> web.Response:
    """Try an account as it is."""
    api = await visits.api(request)
    return await _found(request, await api.examine_cloud(request.match_info["cloud"]))


@routes.post(f"{ONE}/switch")
async def switch(request: web.Request) -> web.Response:
    """Let new instances be made there, or not."""
    api = await visits.api(request)
    account = await api.cloud_account(request.match_info["cloud"])
    enabled = (await request.post()).get("enabled") == "true"
    options = account.options.model_copy(update={"enabled": enabled})
    form = CloudForm(name=account.name, driver=account.driver, settings=account.settings, options=options)
    await api.change_cloud(form)
    return pages.done(request, ALL, f"{account.name} takes {'new' if enabled else 'no new'} instances")


@routes.post(f"{ONE}/remove")
async def remove(request: web.Request) -> web.Response:
    """Remove an account."""
    api = await visits.api(request)
    name = request.match_info["cloud"]
    await api.remove_cloud(name)
    return pages.done(request, ALL, f"{name} is removed")


async def _administrator(api: Conpaas) -> UserView:
    me = await api.me()
    if not me.admin:
        raise ForbiddenError("this page is for administrators", hint="ask one of them")
    return me


async def _found(request: web.Request, found: Examination) -> web.Response:
    """Answer what was found when an account was tried: as a tick list for our script, or as a page."""
    if pages.wants_json(request):
        html = request.config_dict[pages.SITE].render("blocks/findings.html", found=found)
        return web.json_response({"message": "", "location": "", "html": html})
    return pages.page(request, "findings.html", me=await (await visits.api(request)).me(), found=found)


async def _check(api: Conpaas, form: CloudForm, sent: Mapping[str, Any]) -> None:
    if "untried" in sent:
        return
    for finding in (await api.try_cloud(form)).findings:
        if not finding.ok:
            raise CloudRefusedError(
                f"{finding.name}: {finding.detail}",
                value=finding.name,
                hint=f"{finding.hint or 'correct it'}; or save it without a test",
            )


# -- the form ----------------------------------------------------------------------------------------------------------


def _kind(kinds: Sequence[CloudTypeView], driver: str) -> CloudTypeView:
    for kind in kinds:
        if kind.name == driver:
            return kind
    known = ", ".join(kind.name for kind in kinds)
    raise NotFoundError(f"there is no driver '{driver}'", value=driver, hint=f"there are: {known}")


def _form(kind: CloudTypeView, account: CloudAccountView | None = None) -> Form:
    given = {} if account is None else account.settings
    lines = forms.fields(kind.settings, given)
    kept = frozenset(line.name for line in lines if line.secret and given.get(line.name))
    lines = [replace(line, required=False) if line.name in kept else line for line in lines]
    needed = [number for number, line in enumerate(lines) if line.required or line.secret or line.name in given]
    count = max(_SHOWN, *(number + 1 for number in needed), 0)
    options = CloudOptions() if account is None else account.options
    schema = CloudOptions.model_json_schema()
    return Form(
        kind=kind,
        shown=lines[:count],
        more=lines[count:],
        options=[
            replace(line, label=_LABELS.get(line.name, line.label))
            for line in forms.fields(schema, options.model_dump(mode="json"))
        ],
        kept=kept,
    )


async def _read(api: Conpaas, sent: Mapping[str, Any], account: CloudAccountView | None = None) -> CloudForm:
    """Read the form of an account; a secret that is not written stays as it is."""
    driver = str(sent.get("driver", "")) if account is None else account.driver
    schema = _kind(await api.cloud_types(), driver).settings
    settings = forms.differing(schema, forms.read(schema, _part(sent, _SETTING)))
    if account is not None:
        settings |= {name: schema["properties"][name].get("default") for name in _part(sent, _FORGET)}
        secrets = [line.name for line in forms.fields(schema) if line.secret]
        settings = {**{name: account.settings[name] for name in secrets if name in account.settings}, **settings}
    return CloudForm(
        name=str(sent.get("name", "")).strip() if account is None else account.name,
        driver=driver,
        settings=settings,
        options=CloudOptions.model_validate(_options(sent)),
    )


def _options(sent: Mapping[str, Any]) -> Json:
    return forms.read(CloudOptions.model_json_schema(), _part(sent, _OPTION))


def _part(sent: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the fields whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in sent.items() if name.startswith(prefix)}
