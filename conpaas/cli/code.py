"""Code versions."""

from pathlib import Path

import click

from conpaas.cli import views
from conpaas.cli.session import (
    Session,
    complete_versions,
    service_argument,
    wait_option,
    with_client,
    yes_option,
)
from conpaas.core.errors import ConflictError
from conpaas.core.messages.model import CodeVersionView, ServiceView

activate_option = click.option("--activate", is_flag=True, help="Let it serve as soon as it has arrived.")
version_argument = click.argument("version", shell_complete=complete_versions)


@click.command()
@service_argument
@click.argument("source", type=click.Path(exists=True, path_type=Path), metavar="ARCHIVE_OR_DIRECTORY")
@click.option("--description", default="", help="What is new in it.")
@activate_option
@with_client
async def upload(session: Session, service: str, source: Path, description: str, *, activate: bool) -> None:
    """Send an archive (tar, tar.gz, tar.bz2, tar.xz, zip) or a source tree as a new code version."""
    found = await session.conpaas.find(service)
    with session.out.transfer(f"upload {source.name}") as show:
        version = await session.conpaas.upload(found.id, source, description=description, on_progress=show)
    await _made(session, found, version, activate=activate)


@click.command()
@service_argument
@click.argument("url")
@click.option("--branch", default="", help="Branch or tag; the repository's default if none is given.")
@activate_option
@with_client
async def checkout(session: Session, service: str, url: str, branch: str, *, activate: bool) -> None:
    """Make a code version of the git repository at URL."""
    found = await session.conpaas.find(service)
    version = await session.conpaas.checkout(found.id, url, branch=branch)
    await _made(session, found, version, activate=activate)


@click.command()
@service_argument
@wait_option
@with_client
async def rollback(session: Session, service: str, *, wait: bool) -> None:
    """Activate the code version that was made before the active one."""
    found = await session.conpaas.find(service)
    before = _before_active(await session.conpaas.code(found.id))
    operation = await session.conpaas.activate(found.id, before.id, generation=found.generation)
    await session.finish(operation, f"roll {found.name} back to {before.id}", wait=wait)


@click.group()
def code() -> None:
    """The code versions of a service."""


@code.command("ls")
@service_argument
@with_client
async def list_versions(session: Session, service: str) -> None:
    """List code versions, newest first."""
    found = await session.conpaas.find(service)
    session.out.show(await session.conpaas.code(found.id), views.CODE, empty="There is no code yet.")


@code.command()
@service_argument
@version_argument
@wait_option
@with_client
async def activate(session: Session, service: str, version: str, *, wait: bool) -> None:
    """Let a code version serve."""
    found = await session.conpaas.find(service)
    operation = await session.conpaas.activate(found.id, version)
    await session.finish(operation, f"activate {version}", wait=wait)


@code.command("rm")
@service_argument
@version_argument
@yes_option
@with_client
async def remove(session: Session, service: str, version: str, *, yes: bool) -> None:
    """Delete a code version that is not active."""
    found = await session.conpaas.find(service)
    session.confirm(f"Delete the code version {version} of {found.name}?", yes=yes)
    await session.conpaas.delete_code(found.id, version)
    session.out.say(f"deleted {version}")


@code.command()
@service_argument
@version_argument
@click.argument("target", required=False, type=click.Path(path_type=Path))
@with_client
async def download(session: Session, service: str, version: str, target: Path | None) -> None:
    """Fetch a code version into the file TARGET, or under its own name."""
    found = await session.conpaas.find(service)
    view = next((one for one in await session.conpaas.code(found.id) if one.id == version), None)
    if target is None:
        target = Path(f"{version}.tar.gz" if view is None else Path(view.filename).name)
    if target.exists():
        raise ConflictError(f"{target} exists", value=target, hint="name another file")
    await session.conpaas.download(found.id, version, target)
    session.out.say(f"wrote {target}")


async def _made(session: Session, service: ServiceView, version: CodeVersionView, *, activate: bool) -> None:
    hint = "" if activate else f"; 'conpaas code activate {service.id} {version.id}' lets it serve"
    session.out.done(version, f"{version.id}: {version.filename}{hint}")
    if activate:
        operation = await session.conpaas.activate(service.id, version.id)
        with session.out.progress(f"activate {version.id}") as show:
            await session.conpaas.wait(operation, on_progress=show)
        session.out.say(f"{version.id} is active")


def _before_active(versions: tuple[CodeVersionView, ...]) -> CodeVersionView:
    """Return the version that follows the active one in a list that begins with the newest."""
    active = next((place for place, version in enumerate(versions) if version.active), None)
    if active is None or active + 1 >= len(versions):
        raise ConflictError("there is no earlier code version", hint="'conpaas code ls' lists those there are")
    return versions[active + 1]
