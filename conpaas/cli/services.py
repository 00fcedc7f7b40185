"""Creating, changing and ending services."""

import json
from typing import IO

import click

from conpaas.cli import views, words
from conpaas.cli.session import (
    Session,
    complete_applications,
    complete_cloud_sizes,
    complete_clouds,
    complete_roles,
    complete_settings,
    complete_sizes,
    complete_types,
    service_argument,
    wait_option,
    with_client,
    yes_option,
)
from conpaas.core.messages.model import ServiceView

fallback_option = click.option(
    "--fallback",
    multiple=True,
    metavar="CLOUD",
    help="A cloud that takes what the one before refuses.",
    shell_complete=complete_clouds,
)


@click.command()
@click.argument("type_", metavar="TYPE", shell_complete=complete_types)
@click.option("--name", help="What to call it; a name is chosen if none is given.")
@click.option("--cloud", help="Where it shall run.", shell_complete=complete_clouds)
@click.option(
    "--size", help="Of its instances there; the cloud's default one if none is given.", shell_complete=complete_sizes
)
@fallback_option
@click.option("--application", help="Name or id of its application.", shell_complete=complete_applications)
@with_client
async def create(
    session: Session,
    type_: str,
    name: str | None,
    cloud: str | None,
    size: str | None,
    fallback: tuple[str, ...],
    application: str | None,
) -> None:
    """Create a service of TYPE; it runs nothing but its manager until it is started.

    'conpaas types' lists what can be created, 'conpaas cloud ls' where, and 'conpaas cloud sizes' on what machines.
    """
    if application is not None:
        application = (await session.conpaas.find_application(application)).id
    made = await session.conpaas.create(
        type=type_, name=name, cloud=cloud, size=size, fallback=fallback, application=application
    )
    session.out.done(made, f"created {made.name} ({made.id}); start it with 'conpaas start {_word(made)}'")


@click.command()
@click.option("--application", help="Of this application only.", shell_complete=complete_applications)
@with_client
async def ls(session: Session, application: str | None) -> None:
    """List services."""
    names = {found.id: found.name for found in await session.conpaas.applications()}
    if application is not None:
        application = (await session.conpaas.find_application(application)).id
    found = await session.conpaas.services(application=application)
    session.out.show(found, views.services(names), empty="You have no services: 'conpaas create' makes one.")


@click.command()
@service_argument
@click.argument("new_name")
@with_client
async def rename(session: Session, service: str, new_name: str) -> None:
    """Rename a service."""
    found = await session.conpaas.find(service)
    renamed = await session.conpaas.rename(found.id, new_name)
    session.out.done(renamed, f"{found.name} is now {renamed.name}")


@click.command()
@service_argument
@wait_option
@with_client
async def start(session: Session, service: str, *, wait: bool) -> None:
    """Start a service."""
    found = await session.conpaas.find(service)
    await session.finish(await session.conpaas.start(found.id), f"start {found.name}", wait=wait)


@click.command()
@service_argument
@yes_option
@wait_option
@with_client
async def stop(session: Session, service: str, *, yes: bool, wait: bool) -> None:
    """Give back all instances of a service but its manager; code and settings stay."""
    found = await session.conpaas.find(service)
    session.confirm(f"Stop {found.name}, which is {found.state}?", yes=yes)
    await session.finish(await session.conpaas.stop(found.id), f"stop {found.name}", wait=wait)


@click.command()
@service_argument
@yes_option
@wait_option
@with_client
async def terminate(session: Session, service: str, *, yes: bool, wait: bool) -> None:
    """Destroy a service with all its code and data, and give back everything."""
    found = await session.conpaas.find(service)
    session.confirm(f"Destroy {found.name}, which is {found.state}, with its code and data?", yes=yes)
    await session.finish(await session.conpaas.terminate(found.id), f"terminate {found.name}", wait=wait)


@click.command()
@service_argument
@click.argument("roles", nargs=-1, required=True, metavar="ROLE=[+-]N...", shell_complete=complete_roles)
@click.option("--cloud", help="Where; the service's own cloud if none is given.", shell_complete=complete_clouds)
@wait_option
@with_client
async def scale(session: Session, service: str, roles: tuple[str, ...], cloud: str | None, *, wait: bool) -> None:
    """Add nodes (web=+2), remove some (php=-1), or say how many there shall be (web=3).

    With --cloud they are added, removed and counted there.
    """
    found = await session.conpaas.find(service)
    changes = words.role_changes(roles, words.nodes_on(found.wanted, cloud))
    operation = await session.conpaas.scale(found.id, changes, cloud=cloud, generation=found.generation)
    await session.finish(operation, f"scale {found.name}", wait=wait)


@click.command()
@service_argument
@click.option("--to", "cloud", metavar="CLOUD", help="Where all of it goes.", shell_complete=complete_clouds)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="CLOUD=SIZE",
    help="Of its instances on a cloud; CLOUD= lets the cloud choose.",
    shell_complete=complete_cloud_sizes,
)
@fallback_option
@click.option("--no-fallback", is_flag=True, help="No other cloud takes what its cloud refuses.")
@wait_option
@with_client
async def move(
    session: Session,
    service: str,
    cloud: str | None,
    sizes: tuple[str, ...],
    fallback: tuple[str, ...],
    *,
    no_fallback: bool,
    wait: bool,
) -> None:
    """Move a service to another cloud, or to machines of another size, while it runs.

    New instances are made and take over when all of them answer; then the old ones are given back.
    """
    if fallback and no_fallback:
        raise click.UsageError("--fallback and --no-fallback contradict each other")
    found = await session.conpaas.find(service)
    wished = {**found.wanted.sizes, **words.pairs(sizes)} if sizes else None
    operation = await session.conpaas.move(
        found.id,
        cloud=cloud,
        sizes=None if wished is None else {name: size for name, size in wished.items() if size},
        fallback=fallback if fallback or no_fallback else None,
        generation=found.generation,
    )
    await session.finish(operation, f"move {found.name}", wait=wait)


@click.command()
@service_argument
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_settings)
@wait_option
@with_client
async def settings(session: Session, service: str, values: tuple[str, ...], *, wait: bool) -> None:
    """Show the settings of a service, or change some."""
    found = await session.conpaas.find(service)
    if not values:
        _show_settings(session, found)
        return
    schema = next(kind.settings for kind in await session.conpaas.types() if kind.name == found.type)
    changes = words.typed(words.pairs(values), schema)
    operation = await session.conpaas.change_settings(found.id, changes)
    await session.finish(operation, f"configure {found.name}", wait=wait)


@click.command()
@service_argument
@click.option("--start", type=click.File(), help="Script to run when an instance starts; - for standard input.")
@click.option("--stop", type=click.File(), help="Script to run before an instance stops.")
@wait_option
@with_client
async def scripts(session: Session, service: str, start: IO[str] | None, stop: IO[str] | None, *, wait: bool) -> None:
    """Show the start and stop scripts of a service, or replace them; an empty file takes one away."""
    found = await session.conpaas.find(service)
    begin, end = found.wanted.start_script, found.wanted.stop_script
    if start is None and stop is None:
        _show_scripts(session, begin, end)
        return
    begin = begin if start is None else start.read()
    end = end if stop is None else stop.read()
    operation = await session.conpaas.change_scripts(found.id, start=begin, stop=end)
    await session.finish(operation, f"change scripts of {found.name}", wait=wait)


def _show_settings(session: Session, service: ServiceView) -> None:
    if session.out.as_json:
        session.out.document(service.wanted.settings)
    for key, value in service.wanted.settings.items():
        session.out.say(f"{key}={value if isinstance(value, str) else json.dumps(value)}")


def _show_scripts(session: Session, start: str, stop: str) -> None:
    if session.out.as_json:
        session.out.document({"start": start, "stop": stop})
    session.out.say(f"# start script\n{start or '(none)'}\n\n# stop script\n{stop or '(none)'}")


def _word(service: ServiceView) -> str:
    """Return the service's name as one word of a shell, else its id."""
    return service.name if service.name.isascii() and service.name.replace("-", "a").isalnum() else service.id
