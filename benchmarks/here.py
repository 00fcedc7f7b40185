"""A director in the benchmark's own process, on a cloud whose instances are only numbers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from conpaas.core import footprint
from conpaas.director.app import Director
from conpaas.director.settings import DirectorSettings
from conpaas.sdk import Conpaas, connect

_PASSWORD = "benchmark"  # of a director that only we know


@asynccontextmanager
async def director_here(folder: Path, **cloud: Any) -> AsyncIterator[tuple[Director, Conpaas, str]]:
    """Run a director until the end of the block; give it with its administrator's client and token.

    `cloud` are settings of its simulated cloud.
    """
    settings = DirectorSettings(
        data_dir=folder / "data",
        port=0,
        instances_port=0,
        ssh_port=0,
        clouds={"local": {"driver": "sim", **cloud}},
        admin_password=SecretStr(_PASSWORD),
    )
    director = Director(settings)
    footprint.loaded()
    async with asyncio.TaskGroup() as group:
        group.create_task(director.run(signals=False), name="director")
        await director.ready.wait()
        try:
            async with connect(director.url) as visitor:
                token = (await visitor.login("admin", _PASSWORD)).token.get_secret_value()
            async with connect(director.url, token) as client:
                yield director, client, token
        finally:
            director.stop.set()
