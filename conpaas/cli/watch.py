"""Looking at services: how they are, what they do, what they did."""

import sys

import click
from rich.console import Console, Group
from rich.live import Live as Screen
from rich.text import Text

from conpaas.cli import output, views
from conpaas.cli.session import (
    Session,
    complete_nodes,
    complete_services,
    service_argument,
    wait_option,
    with_client,
    yes_option,
)
from conpaas.core.errors import BadInputError, NotFoundError
from conpaas.core.messages.model import LogName, ServiceView

optional_service = click.argument("service", metavar="[NAME]", required=False, shell_complete=complete_services)


@click.command()
@optional_service
@click.option("--watch", "-w", is_flag=True, help="Keep showing it as it changes.")
@with_client
async def status(session: Session, service: str | None, *, watch: bool) -> None:
    """Show how a service is, with its nodes; or your account and all services."""
    if service is None and not watch:
        await _overview(session)
    elif watch:
        await _watch(session, None if service is None else (await session.conpaas.find(service)).id)
    else:
        _show_service(session, await session.conpaas.find(service or ""))


@click.command()
@service_argument
@with_client
async def nodes(session: Session, service: str) -> None:
    """List the instances of a service."""
    found = await session.conpaas.find(service)
    session.out.show(await session.conpaas.nodes(found.id), views.NODES, empty="It has no instances.")


@click.command()
@service_argument
@click.argument("node", default="manager", shell_complete=complete_nodes)
@click.argument("log", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on as the log grows.")
@click.option("--list", "list_them", is_flag=True, help="List the logs there are.")
@click.option("--bytes", "size", default=16384, show_default=True, help="How much of its end to show.")
@with_client
async def logs(
    session: Session, service: str, node: str, log: str | None, size: int, *, follow: bool, list_them: bool
) -> None:
    """Show the end of a LOG of a NODE: of the manager, unless another one is named."""
    found = await session.conpaas.find(service)
    there_are = await session.conpaas.logs(found.id)
    if list_them:
        session.out.show(there_are, views.LOGS, empty="There are no logs yet.")
        return
    entry = _log(there_are, found, node, log)
    if follow:
        await _follow(session, found, entry, size)
    else:
        chunk = await session.conpaas.read_log(found.id, entry.node, entry.name, offset=-size, limit=size)
        session.out.done(chunk, chunk.text.removesuffix("\n"))


@click.command()
@service_argument
@click.option("--minutes", default=5, show_default=True, type=click.IntRange(1, 1440), help="How far back.")
@click.option("--node", help="Of one node only; 'all' is the service as a whole.", default="all", show_default=True)
@with_client
async def metrics(session: Session, service: str, minutes: int, node: str) -> None:
    """Show requests per second, errors, throughput (bytes/s), response times (ms) and processor use."""
    found = await session.conpaas.find(service)
    points = await session.conpaas.metrics(found.id, minutes=minutes, node=None if node == "all" else node)
    wanted = [point for point in points if point.node == ("" if node == "all" else node)]
    session.out.show(wanted, views.METRICS, empty="Nothing was measured in that time.")


@click.command()
@optional_service
@click.option("--limit", default=30, show_default=True, type=click.IntRange(1, 500), help="How many lines.")
@with_client
async def history(session: Session, service: str | None, limit: int) -> None:
    """Show who did what, newest first."""
    one = None if service is None else (await session.conpaas.find(service)).id
    page = await session.conpaas.history(service=one, limit=limit)
    session.out.show(page.items, views.EVENTS, empty="Nothing has happened yet.")


@click.command()
@service_argument
@with_client
async def states(session: Session, service: str) -> None:
    """Show the states a service has been in, oldest first."""
    found = await session.conpaas.find(service)
    session.out.show(await session.conpaas.states(found.id), views.STATES, empty="It has no history yet.")


@click.command("open")
@service_argument
@with_client
async def open_site(session: Session, service: str) -> None:
    """Open the site of a service in a browser."""
    found = await session.conpaas.find(service)
    url = found.urls.get("application")
    if url is None:
        raise NotFoundError(
            f"{found.name} has no site now: it is {found.state}", hint=f"start it: 'conpaas start {found.id}'"
        )
    session.out.say(url)
    click.launch(url)


@click.group()
def ops() -> None:
    """Long operations."""


@ops.command("ls")
@optional_service
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 500), help="How many.")
@with_client
async def list_operations(session: Session, service: str | None, limit: int) -> None:
    """List operations, newest first."""
    one = None if service is None else (await session.conpaas.find(service)).id
    page = await session.conpaas.operations(service=one, limit=limit)
    session.out.show(page.items, views.OPERATIONS, empty="Nothing was begun yet.")


@ops.command()
@click.argument("operation")
@yes_option
@with_client
async def cancel(session: Session, operation: str, *, yes: bool) -> None:
    """Undo an operation that is under way."""
    session.confirm(f"Undo the operation {operation}?", yes=yes)
    cancelled = await session.conpaas.cancel(operation)
    session.out.done(cancelled, f"{cancelled.kind}: {cancelled.state}")


@ops.command("wait")
@click.argument("operation")
@wait_option
@with_client
async def wait_for(session: Session, operation: str, *, wait: bool) -> None:
    """Show an operation's progress until it is done."""
    view = await session.conpaas.operation(operation)
    await session.finish(view, view.kind, wait=wait)


async def _overview(session: Session) -> None:
    me, found = await session.conpaas.me(), await session.conpaas.services()
    if session.out.as_json:
        session.out.document({"user": output.document(me), "services": output.document(found)})
        return
    names = {application.id: application.name for application in await session.conpaas.applications()}
    session.out.say(f"{me.username} at {session.config.url}: {me.credits} credits, {len(found)} services")
    session.out.show(found, views.services(names))


def _show_service(session: Session, service: ServiceView) -> None:
    if not session.out.as_json:
        session.out.say("\n".join(views.service_lines(service)))
        session.out.show(service.nodes, views.NODES)
    else:
        session.out.document(output.document(service))


async def _watch(session: Session, service: str | None) -> None:
    """Redraw on a terminal; else print a line, or with --json a document a line, for each change."""
    known: dict[str, ServiceView] = {}
    console = Console(file=sys.stdout)
    with (
        Screen(console=console, auto_refresh=False)
        if console.is_terminal
        else Screen(console=Console(stderr=True, quiet=True), auto_refresh=False) as screen
    ):
        async for event in session.conpaas.events(service=service):
            if event.service is not None:
                known[event.service.id] = event.service
            elif event.kind == "removed" and event.id is not None:
                known.pop(event.id, None)
            if console.is_terminal:
                screen.update(_picture(known), refresh=True)
            elif session.out.as_json:
                click.echo(event.model_dump_json(exclude_defaults=True))
            elif event.service is not None:
                click.echo(f"{event.service.name}: {event.service.state} {event.service.reason}".rstrip())
            if event.kind == "removed" and service is not None:
                return


def _picture(services: dict[str, ServiceView]) -> Group:
    parts: list[Text] = []
    for service in services.values():
        parts.append(Text("\n".join(views.service_lines(service))))
        rows = [[cell(node) for _, cell in views.NODES] for node in service.nodes]
        parts.extend(Text(f"    {line}") for line in output.plain_table([h for h, _ in views.NODES], rows))
    return Group(*parts or [Text("You have no services.")])


def _log(logs_there: tuple[LogName, ...], service: ServiceView, node: str, name: str | None) -> LogName:
    """Return the log that is meant; a node may be named by its id or as its cloud calls it."""
    ids = {node} | {found.id for found in service.nodes if found.cloud_id == node}
    of_node = [entry for entry in logs_there if entry.node in ids]
    for entry in of_node:
        if name is None or entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in of_node) or ", ".join(sorted({entry.node for entry in logs_there}))
    if of_node:
        raise BadInputError(f"node {node} has no log '{name}'", value=name, hint=f"it has: {known}")
    raise BadInputError(f"there is no log of a node '{node}'", value=node, hint=f"there are: {known}")


async def _follow(session: Session, service: ServiceView, entry: LogName, size: int) -> None:
    async for chunk in session.conpaas.follow_log(service.id, entry.node, entry.name, offset=-size):
        if session.out.as_json:
            click.echo(chunk.model_dump_json())
        else:
            click.echo(chunk.text, nl=False)
