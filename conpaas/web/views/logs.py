"""The log viewer."""

import asyncio

from aiohttp import web

from conpaas.core.errors import ConpaasError, PeerError
from conpaas.core.messages.model import LogName
from conpaas.web import live, pages, visits

routes = web.RouteTableDef()
LOGS = "/services/{service:[A-Za-z0-9-]+}/logs"


@routes.get(LOGS)
async def show(request: web.Request) -> web.Response:
    """Show one log of a service, the manager's unless another is chosen."""
    api = await visits.api(request)
    service_id = request.match_info["service"]
    me, service = await asyncio.gather(api.me(), api.service(service_id))
    trouble: ConpaasError | None = None
    logs: tuple[LogName, ...] = ()
    try:
        logs = await api.logs(service_id)
    except PeerError as exc:  # the manager is starting or being replaced: say so on the page
        trouble = exc
    chosen = _chosen(logs, request.query.get("node", "manager"), request.query.get("name", ""))
    return pages.page(request, "logs.html", me=me, service=service, logs=logs, chosen=chosen, trouble=trouble)


def _chosen(logs: tuple[LogName, ...], node: str, name: str) -> LogName | None:
    """Return the wanted log, or else the first of the node, or else the first of all."""
    exact = (log for log in logs if (log.node, log.name) == (node, name))
    of_node = (log for log in logs if log.node == node)
    return next(exact, None) or next(of_node, None) or next(iter(logs), None)


@routes.get(LOGS + "/{node:[A-Za-z0-9-]+}/{name:[A-Za-z0-9._-]+}")
async def follow(request: web.Request) -> web.StreamResponse:
    """Send a log as it grows."""
    api = await visits.api(request)
    of = request.match_info

    async def listen(queue: live.Queue) -> None:
        async for chunk in api.follow_log(of["service"], of["node"], of["name"]):
            await queue.put(("log", chunk.text))

    return await live.stream(request, listen)
