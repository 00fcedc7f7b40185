"""What can be created, applications, and the commands of service types."""

import click

from conpaas.cli import views, words
from conpaas.cli.session import Session, complete_applications, service_argument, with_client, yes_option
from conpaas.core.errors import NotFoundError


@click.command()
@with_client
async def types(session: Session) -> None:
    """List the service types that can be created."""
    session.out.show(await session.conpaas.types(), views.TYPES)


@click.group()
def app() -> None:
    """Applications: named sets of services."""


@app.command("ls")
@with_client
async def list_applications(session: Session) -> None:
    """List applications."""
    session.out.show(await session.conpaas.applications(), views.APPLICATIONS, empty="You have no applications.")


@app.command("create")
@click.argument("name")
@with_client
async def create_application(session: Session, name: str) -> None:
    """Make an empty application."""
    made = await session.conpaas.create_application(name)
    session.out.done(made, f"created {made.name} ({made.id})")


@app.command("rename")
@click.argument("application", shell_complete=complete_applications)
@click.argument("new_name")
@with_client
async def rename_application(session: Session, application: str, new_name: str) -> None:
    """Rename an application."""
    found = await session.conpaas.find_application(application)
    renamed = await session.conpaas.rename_application(found.id, new_name)
    session.out.done(renamed, f"{found.name} is now {renamed.name}")


@app.command("rm")
@click.argument("application", shell_complete=complete_applications)
@yes_option
@with_client
async def remove_application(session: Session, application: str, *, yes: bool) -> None:
    """Delete an application that has no services."""
    found = await session.conpaas.find_application(application)
    session.confirm(f"Delete the application {found.name}?", yes=yes)
    await session.conpaas.delete_application(found.id)
    session.out.say(f"deleted {found.name}")


@click.command()
@service_argument
@click.argument("command_name", required=False, metavar="[COMMAND]")
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...")
@with_client
async def command(session: Session, service: str, command_name: str | None, values: tuple[str, ...]) -> None:
    """Run a command of the service's own type, or list those there are."""
    found = await session.conpaas.find(service)
    commands = next(kind.commands for kind in await session.conpaas.types() if kind.name == found.type)
    if command_name is None:
        session.out.show(commands, (("Command", lambda c: c.name), ("", lambda c: c.title)), empty="It has none.")
        return
    chosen = next((one for one in commands if one.name == command_name), None)
    if chosen is None:
        known = ", ".join(one.name for one in commands) or "none"
        raise NotFoundError(
            f"{found.type} has no command '{command_name}'", value=command_name, hint=f"it has: {known}"
        )
    arguments = words.typed(words.pairs(values), chosen.arguments)
    session.out.document(await session.conpaas.command(found.id, command_name, arguments))
