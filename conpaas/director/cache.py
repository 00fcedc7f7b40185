"""Answers kept in memory, ready to send, until the database may say otherwise."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from aiohttp import web

from conpaas.core.clock import Clock
from conpaas.core.messages.base import Message
from conpaas.director.db.database import Database
from conpaas.director.gate import Call

_Key: TypeAlias = tuple[str | None, str]
_LARGEST = 1000
"""Answers kept at most."""


class Cache:
    """Keeps the bytes of answers by caller and URL, until one of `tables` is written to, or a minute is over.

    What things have cost so far changes without a write.
    """

    def __init__(self, db: Database, clock: Clock, *tables: str) -> None:
        self._db, self._clock, self._tables = db, clock, tables
        self._stamp: tuple[int, ...] = ()
        self._kept: dict[_Key, tuple[bytes, str]] = {}
        self._making: dict[_Key, asyncio.Lock] = {}

    async def answer(self, call: Call, make: Callable[[], Awaitable[Message]]) -> web.Response:
        """Answer with what `make` gives, or gave; with no body if the caller has it already (`If-None-Match`)."""
        stamp = self._now()
        if stamp != self._stamp or len(self._kept) > _LARGEST:
            self._kept, self._making, self._stamp = {}, {}, stamp
        key = (call.caller.user, call.http.path_qs)
        body, tag = self._kept.get(key) or await self._make(key, make)
        if call.http.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag})
        return web.Response(body=body, content_type="application/json", headers={"ETag": tag})

    async def _make(self, key: _Key, make: Callable[[], Awaitable[Message]]) -> tuple[bytes, str]:
        """Make an answer; of many who ask for it at once, the first one does it."""
        kept = self._kept
        async with self._making.setdefault(key, asyncio.Lock()):
            if key in kept:
                return kept[key]
            stamp = self._now()
            body = (await make()).model_dump_json().encode()
            made = body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            if stamp == self._stamp == self._now():
                kept[key] = made
            return made

    def _now(self) -> tuple[int, ...]:
        return *self._db.stamp(*self._tables), int(self._clock.monotonic() // 60)
