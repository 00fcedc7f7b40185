"""Waiting for what nobody tells of: asked again and again, with a deadline."""

import asyncio
from collections.abc import Callable


async def until(check: Callable[[], object], timeout_s: float = 45.0) -> None:
    """Wait until `check` holds; TimeoutError if it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.01)
