"""What happens, told to open pages as it happens.

A page is told *that* something changed and asks for itself again, so there is one way to draw it; only metrics
travel here themselves.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from aiohttp import web

from conpaas.core.errors import ConpaasError, NotAuthenticatedError
from conpaas.core.messages.public import Live
from conpaas.core.states import OperationState
from conpaas.web import visits

routes = web.RouteTableDef()
HEARTBEAT_S = 15.0
_WAITING = 200  # events; a page that is further behind reads itself anew
_HEADERS = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
Event = tuple[str, Any]
Queue: TypeAlias = asyncio.Queue[Event | None]
Listen: TypeAlias = Callable[[Queue], Awaitable[None]]


class Streams:
    """The event streams that are open, to be ended when the process stops."""

    def __init__(self) -> None:
        self._queues: set[Queue] = set()

    def end(self) -> None:
        """Let all streams come to their end."""
        for queue in self._queues:
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    def open(self) -> Queue:
        """Return the queue of a new stream; None in it is the end."""
        queue: Queue = asyncio.Queue(_WAITING)
        self._queues.add(queue)
        return queue

    def close(self, queue: Queue) -> None:
        """Forget a stream."""
        self._queues.discard(queue)


STREAMS = web.AppKey("streams", Streams)


@routes.get("/live")
async def live(request: web.Request) -> web.StreamResponse:
    """Tell a page what happens, to one service or to all that are the visitor's."""
    api = await visits.api(request)
    service = request.query.get("service") or None

    async def listen(queue: Queue) -> None:
        async for event in api.events():
            told = None if event.kind == "hello" else _event(event, service)
            if told is not None:
                await queue.put(told)

    return await stream(request, listen)


async def stream(request: web.Request, listen: Listen) -> web.StreamResponse:
    """Send what `listen(queue)` puts into its queue, until it ends, the browser goes away or we stop."""
    response = web.StreamResponse(headers=_HEADERS)
    await response.prepare(request)
    streams = request.config_dict[STREAMS]
    queue = streams.open()
    try:
        async with asyncio.TaskGroup() as group:
            listener = group.create_task(_until_end(listen, queue), name=f"listen for {request.path}")
            await _pass_on(queue, response)
            listener.cancel()
    except* ConnectionError:
        pass  # the browser went away
    finally:
        streams.close(queue)
    return response


async def _until_end(listen: Listen, queue: Queue) -> None:
    try:
        await listen(queue)
    except NotAuthenticatedError:
        await queue.put(("reload", None))
    except ConpaasError as exc:
        await queue.put(("problem", exc.problem()))
    await queue.put(None)


async def _pass_on(queue: Queue, response: web.StreamResponse) -> None:
    await response.write(b"retry: 2000\n\n")
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                event = await queue.get()
        except TimeoutError:
            await response.write(b": still here\n\n")
            continue
        if event is None:
            return
        kind, data = event
        await response.write(f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode())


def _event(event: Live, service: str | None) -> Event | None:
    """Return what a page is told of an event; None if it is of another service."""
    if event.kind == "credits":
        return "credits", event.credits
    if service is not None and _about(event) not in {None, service}:
        return None
    if event.kind == "metrics":
        return "metrics", [point.model_dump(mode="json") for point in event.points]
    operation = event.operation
    if operation is not None and operation.state is not OperationState.RUNNING:
        return "operation", {
            "id": operation.id,
            "state": operation.state,
            "kind": operation.kind,
            "message": operation.error or operation.message,
        }
    return "change", event.kind


def _about(event: Live) -> str | None:
    """Return the service that an event is about."""
    if event.operation is not None:
        return event.operation.service
    return event.event.service if event.event is not None else event.id
