"""The page of a service, and what can be done on it.

A service type that names a `page` gives the template and what it shows besides; every other type gets the generic
page, made from its declared roles, settings and commands.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from conpaas.core import plugins
from conpaas.core.errors import BadInputError, NotFoundError
from conpaas.core.messages.model import NodeView, OperationView, ServiceView
from conpaas.core.messages.public import RoleView, ServiceTypeView
from conpaas.core.service import PACKAGE, ServiceType
from conpaas.core.states import NodeState, OperationState
from conpaas.sdk import Conpaas
from conpaas.web import forms, pages, picture, places, visits

routes = web.RouteTableDef()
SERVICE = "/services/{service:[A-Za-z0-9-]+}"
_OPERATIONS_SHOWN = 5
_HISTORY_SHOWN = 100
_ON = "on_cloud"
"""The field that names the cloud of a change: no role can be called that."""


class Page(Protocol):
    """What a service type's `page` names: constructed without arguments."""

    template: Path
    """A template that extends `service.html` and fills its blocks."""

    def context(self, service: ServiceView) -> dict[str, Any]:
        """Return what the template shows besides what every service page has."""
        ...


@dataclass(frozen=True)
class Group:
    """Instances with the same roles."""

    roles: tuple[str, ...]
    nodes: tuple[NodeView, ...]


@routes.get(SERVICE)
async def show(request: web.Request) -> web.Response:
    """Show a service."""
    api = await visits.api(request)
    service_id = request.match_info["service"]
    me, service, types, clouds, version = await asyncio.gather(
        api.me(), api.service(service_id), api.types(), api.clouds(), api.version()
    )
    kind = _type(types, service)
    code, operations = await asyncio.gather(
        _code(api, kind, service_id), api.operations(service=service_id, limit=_OPERATIONS_SHOWN)
    )
    template, extra = _page(service)
    return pages.page(
        request,
        template,
        **extra,
        me=me,
        service=service,
        kind=kind,
        hues=_hues(kind),
        places=places.places(service, clouds),
        groups=groups(kind.roles, service.nodes),
        counts=_counts(service.nodes),
        picture=picture.draw(kind.roles, service.nodes),
        upright=picture.draw(kind.roles, service.nodes, upright=True),
        code=code,
        push=_push_address(request, version.ssh_port, service_id),
        settings=forms.fields(kind.settings, service.wanted.settings),
        commands=[(command, forms.fields(command.arguments)) for command in kind.commands],
        operations=operations.items,
        running=[item for item in operations.items if item.state is OperationState.RUNNING],
    )


def _type(types: Sequence[ServiceTypeView], service: ServiceView) -> ServiceTypeView:
    for kind in types:
        if kind.name == service.type:
            return kind
    raise NotFoundError(
        f"the service type '{service.type}' is not installed here any more",
        value=service.type,
        hint="install it again, or terminate the service with 'conpaas terminate'",
    )


async def _code(api: Conpaas, kind: ServiceTypeView, service: str) -> Sequence[Any]:
    return await api.code(service) if kind.takes_code else ()


def _page(service: ServiceView) -> tuple[str | Path, dict[str, Any]]:
    known = plugins.discover(PACKAGE, "SERVICE", ServiceType)
    reference = known[service.type].page if service.type in known else ""
    if not reference:
        return "service.html", {}
    own: Page = plugins.load(reference)()
    return own.template, own.context(service)


def _hues(kind: ServiceTypeView) -> dict[str, int]:
    """Give each role a colour of its own."""
    return {role.name: index % 8 for index, role in enumerate(kind.roles)}


def groups(roles: Sequence[RoleView], nodes: Sequence[NodeView]) -> list[Group]:
    """Return the instances by what they do: the manager first, then in the order of the roles, then the idle ones."""
    order = {role.name: index for index, role in enumerate(roles)}
    found: dict[tuple[str, ...], list[NodeView]] = {}
    for node in nodes:
        if node.state is NodeState.GONE:
            continue
        names = sorted(node.roles, key=lambda name: order.get(name, len(order)))
        mark = ("manager",) if node.kind == "manager" else ()
        found.setdefault((*mark, *(name for name in names if name not in mark)), []).append(node)

    def place(held: tuple[str, ...]) -> tuple[int, ...]:
        if held[:1] == ("manager",):
            return (-1,)
        return tuple(order.get(name, len(order)) for name in held) or (len(order) + 1,)

    return [Group(held, tuple(found[held])) for held in sorted(found, key=place)]


def _counts(nodes: Sequence[NodeView]) -> dict[str, int]:
    """Return how many instances hold each role."""
    counts: dict[str, int] = {}
    for node in nodes:
        if node.kind == "agent" and node.state is not NodeState.GONE:
            for role in node.roles:
                counts[role] = counts.get(role, 0) + 1
    return counts


def _push_address(request: web.Request, port: int, service: str) -> str:
    """Return where `git push` sends code; empty if the director has no SSH port."""
    if not port:
        return ""
    host = request.url.host or "localhost"
    return f"ssh://git@{f'[{host}]' if ':' in host else host}:{port}/{service}.git"


@routes.get(f"{SERVICE}/activity")
async def activity(request: web.Request) -> web.Response:
    """Show all that happened to a service."""
    api = await visits.api(request)
    service_id = request.match_info["service"]
    cursor = request.query.get("cursor")
    me, service, states, history, operations = await asyncio.gather(
        api.me(),
        api.service(service_id),
        api.states(service_id),
        api.history(service=service_id, cursor=cursor, limit=_HISTORY_SHOWN),
        api.operations(service=service_id),
    )
    return pages.page(
        request,
        "activity.html",
        me=me,
        service=service,
        states=tuple(reversed(states)),
        history=history,
        operations=operations.items,
    )


@routes.post(f"{SERVICE}/start")
async def start(request: web.Request) -> web.Response:
    """Start a service."""
    api = await visits.api(request)
    return _begun(request, await api.start(request.match_info["service"]))


@routes.post(f"{SERVICE}/stop")
async def stop(request: web.Request) -> web.Response:
    """Stop a service."""
    api = await visits.api(request)
    return _begun(request, await api.stop(request.match_info["service"]))


@routes.post(f"{SERVICE}/terminate")
async def terminate(request: web.Request) -> web.Response:
    """Destroy a service, if its name was typed."""
    api = await visits.api(request)
    service = await api.service(request.match_info["service"])
    typed = str((await request.post()).get("confirm", "")).strip()
    if typed != service.name:
        raise BadInputError(f"'{typed[:80]}' is not the name of the service", value=typed, hint=f"type: {service.name}")
    await api.terminate(service.id)
    return pages.done(request, "/", f"{service.name} is being terminated")


@routes.post(f"{SERVICE}/rename")
async def rename(request: web.Request) -> web.Response:
    """Rename a service."""
    api = await visits.api(request)
    name = str((await request.post()).get("name", ""))
    service = await api.rename(request.match_info["service"], name)
    return pages.done(request, f"/services/{service.id}", f"now called {service.name}")


@routes.post(f"{SERVICE}/scale")
async def scale(request: web.Request) -> web.Response:
    """Add and remove instances by role, on the service's own cloud or on another one."""
    api = await visits.api(request)
    form = await request.post()
    changes = forms.read_changes(form, [name for name in form if name not in {"csrf", _ON}])
    cloud = str(form.get(_ON, "")) or None
    return _begun(request, await api.scale(request.match_info["service"], changes, cloud=cloud))


@routes.post(f"{SERVICE}/move")
async def move(request: web.Request) -> web.Response:
    """Move a service to another cloud, or to machines of another size."""
    api = await visits.api(request)
    service = await api.service(request.match_info["service"])
    form = await request.post()
    cloud = str(form.get("cloud", "")) or service.cloud
    size = str(form.get(f"size-{cloud}", ""))
    chosen = [str(name) for name in form.getall("fallback", ())]
    fallback = places.read_fallback(chosen, cloud) if "with_fallback" in form else None
    operation = await api.move(
        service.id,
        cloud=cloud,
        fallback=fallback,
        sizes={**service.wanted.sizes, cloud: size} if size else None,
        generation=service.generation,
    )
    return _begun(request, operation)


@routes.post(f"{SERVICE}/settings")
async def change_settings(request: web.Request) -> web.Response:
    """Change the settings that differ from what they are."""
    api = await visits.api(request)
    service, types = await asyncio.gather(api.service(request.match_info["service"]), api.types())
    given = forms.read(_type(types, service).settings, await request.post())
    wanted = service.wanted.settings
    changed = {name: value for name, value in given.items() if wanted.get(name) != value}
    if not changed:
        return pages.done(request, f"/services/{service.id}#settings", "nothing was changed")
    return _begun(request, await api.change_settings(service.id, changed))


@routes.post(f"{SERVICE}/scripts")
async def change_scripts(request: web.Request) -> web.Response:
    """Change the scripts that run when an instance starts and before it stops."""
    api = await visits.api(request)
    form = {name: str(value).replace("\r\n", "\n") for name, value in (await request.post()).items()}
    operation = await api.change_scripts(
        request.match_info["service"], start=form.get("start", ""), stop=form.get("stop", "")
    )
    return _begun(request, operation)


@routes.post(SERVICE + "/commands/{command:[A-Za-z0-9_-]+}")
async def command(request: web.Request) -> web.Response:
    """Run a command of the service's type and show its answer."""
    api = await visits.api(request)
    service, types = await asyncio.gather(api.service(request.match_info["service"]), api.types())
    name = request.match_info["command"]
    declared = next((item for item in _type(types, service).commands if item.name == name), None)
    if declared is None:
        raise NotFoundError(f"{service.type} has no command '{name}'", value=name)
    result = await api.command(service.id, name, forms.read(declared.arguments, await request.post()))
    if pages.wants_json(request):
        return web.json_response({"message": f"{declared.title}: done", "location": "", "result": result})
    return pages.page(request, "answer.html", me=await api.me(), service=service, command=declared, result=result)


@routes.post("/operations/{operation:[A-Za-z0-9-]+}/cancel")
async def cancel(request: web.Request) -> web.Response:
    """Undo an operation that is under way."""
    api = await visits.api(request)
    operation = await api.cancel(request.match_info["operation"])
    return pages.done(request, f"/services/{operation.service}", f"{operation.kind} is being cancelled")


def _begun(request: web.Request, operation: OperationView) -> web.Response:
    return pages.done(request, f"/services/{operation.service}", f"{operation.kind}: begun")
