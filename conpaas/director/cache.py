"""Answers kept in memory, ready to send, until the database may say otherwise."""

import hashlib
from collections.abc import Awaitable, Callable

from aiohttp import web

from conpaas.core.messages.base import Message
from conpaas.director.db.database import Database
from conpaas.director.gate import Call

_LARGEST = 1000
"""Answers kept at most."""


class Cache:
    """Keeps the bytes of answers by caller and URL, until one of `tables` is written to."""

    def __init__(self, db: Database, *tables: str) -> None:
        self._db, self._tables = db, tables
        self._stamp: tuple[int, ...] = ()
        self._kept: dict[tuple[str | None, str], tuple[bytes, str]] = {}

    async def answer(self, call: Call, make: Callable[[], Awaitable[Message]]) -> web.Response:
        """Answer with what `make` gives, or gave; with no body if the caller has it already (`If-None-Match`)."""
        stamp = self._db.stamp(*self._tables)
        if stamp != self._stamp or len(self._kept) > _LARGEST:
            self._kept, self._stamp = {}, stamp
        key = (call.caller.user, call.http.path_qs)
        kept = self._kept.get(key)
        if kept is None:
            body = (await make()).model_dump_json().encode()
            kept = body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            if stamp == self._db.stamp(*self._tables):
                self._kept[key] = kept
        body, tag = kept
        if call.http.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag})
        return web.Response(body=body, content_type="application/json", headers={"ETag": tag})
