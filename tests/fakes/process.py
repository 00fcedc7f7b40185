"""A process of the one skeleton, to be run on its own: it writes what happens to it, line by line.

Arguments: seconds until calls are cut off; `break` or `end` for a loop that does so. Prints its port when ready.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any

from aiohttp import web

from conpaas.core import logs
from conpaas.core.process import Process, Site


def say(word: str) -> None:
    print(word, flush=True)


class Talkative(Process):
    name = "talkative"

    def __init__(self, stop_timeout_s: float, fate: str = "") -> None:
        super().__init__()
        self.stop_timeout_s = stop_timeout_s
        self.fate = fate
        self.release = asyncio.Event()

    async def open(self, stack: AsyncExitStack) -> list[Site]:
        say("opening")
        stack.callback(say, "first closed")
        stack.callback(say, "second closed")
        if self.fate == "slow":
            await asyncio.Event().wait()
        routes = [web.get("/slow", self.slow), web.get("/release", self.let_go), web.get("/stream", self.stream)]
        routes.append(web.put("/upload", self.upload))
        return [Site("127.0.0.1", 0, routes), Site("127.0.0.1", 0, routes)]

    def loops(self) -> Mapping[str, Callable[[], Coroutine[Any, Any, None]]]:
        return {"turn": self.turn, "tell": self.tell}

    async def tell(self) -> None:
        await self.ready.wait()
        say(f"ready {self.ports[0]} {self.ports[1]}")
        try:
            await asyncio.Event().wait()
        finally:
            say("stopping")

    async def turn(self) -> None:
        await self.ready.wait()
        if self.fate == "break":
            raise ValueError("this loop is broken")
        if self.fate != "end":
            await asyncio.Event().wait()

    async def slow(self, _: web.Request) -> web.Response:
        say("call begun")
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            say("call cut off")
            raise
        say("call completed")
        return web.Response(text="done")

    async def upload(self, request: web.Request) -> web.Response:
        size = len(await request.content.readany())
        say("upload begun")
        async for piece in request.content.iter_any():
            size += len(piece)
        return web.Response(text=str(size))

    async def let_go(self, _: web.Request) -> web.Response:
        self.release.set()
        return web.Response()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        say("stream begun")
        try:
            await asyncio.Event().wait()
        finally:
            say("stream ended")
        return response


if __name__ == "__main__":
    logs.set_up()
    asyncio.run(Talkative(float(sys.argv[1]), *sys.argv[2:]).run())
