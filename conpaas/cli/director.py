"""`conpaas run director`: the director with the web UI in front of it."""

import asyncio
from pathlib import Path
from typing import Any

import click

from conpaas.core import footprint, logs
from conpaas.director.app import Director
from conpaas.director.settings import DirectorSettings
from conpaas.web import app as ui


@click.command()
@click.option("--settings", type=click.Path(path_type=Path), help="A TOML file; else director.toml in the data folder.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of everything the director keeps.")
@click.option("--host", help="Address of the API and the web UI.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the API and the web UI; 0: any free one.")
@click.option("--log-level", default="INFO", show_default=True, help="DEBUG, INFO, WARNING or ERROR.")
def director(settings: Path | None, log_level: str, **given: Any) -> None:
    """Run the director: API, web UI, and what keeps services and instances as they should be.

    The environment (CONPAAS_PORT, CONPAAS_DATABASE, …) sets what the settings file does not; options win.
    """
    logs.set_up(level=log_level)
    chosen = DirectorSettings.load(settings, **{name: value for name, value in given.items() if value is not None})
    process = Director(chosen, ui.create)
    footprint.loaded()
    asyncio.run(process.run())
