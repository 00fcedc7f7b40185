"""`conpaas run`: the daemons in the foreground."""

import click

from conpaas.cli.session import Lazy
from conpaas.core import daemon

context_option = click.option(
    "--context", required=True, type=click.Path(exists=True, dir_okay=False), help="Its contextualization document."
)


@click.group("run", cls=Lazy, lazy={"director": "conpaas.cli.director"})
def run_daemon() -> None:
    """Run a daemon in the foreground."""


@run_daemon.command()
@context_option
def manager(context: str) -> None:
    """Run the manager of one service, on an instance of its own."""
    daemon.main("manager", context)


@run_daemon.command()
@context_option
def agent(context: str) -> None:
    """Run the agent of a node."""
    daemon.main("agent", context)
