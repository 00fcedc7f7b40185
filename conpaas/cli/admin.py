"""What administrators do."""

import click

from conpaas.cli import views
from conpaas.cli.session import Session, with_client, yes_option
from conpaas.core.errors import NotFoundError
from conpaas.core.messages.public import UserView

user_argument = click.argument("user")


@click.group()
def admin() -> None:
    """Users, credits and all instances; for administrators."""


@admin.command()
@with_client
async def users(session: Session) -> None:
    """List all accounts."""
    session.out.show(await session.conpaas.users(), views.USERS)


@admin.command()
@with_client
async def instances(session: Session) -> None:
    """List all instances of all users."""
    session.out.show(await session.conpaas.instances(), views.INSTANCES, empty="There are no instances.")


@admin.command(context_settings={"ignore_unknown_options": True})
@user_argument
@click.argument("amount", type=int)
@click.option("--reason", default="", help="What the history shall say.")
@with_client
async def grant(session: Session, user: str, amount: int, reason: str) -> None:
    """Give credits to a user, or take some: a negative AMOUNT."""
    found = await _find(session, user)
    granted = await session.conpaas.grant(found.id, amount, reason=reason)
    session.out.done(granted, f"{granted.username} has {granted.credits} credits")


@admin.command()
@user_argument
@with_client
async def promote(session: Session, user: str) -> None:
    """Make a user an administrator."""
    changed = await session.conpaas.change_user((await _find(session, user)).id, admin=True)
    session.out.done(changed, f"{changed.username} is an administrator")


@admin.command()
@user_argument
@yes_option
@with_client
async def demote(session: Session, user: str, *, yes: bool) -> None:
    """Make an administrator an ordinary user."""
    found = await _find(session, user)
    session.confirm(f"Take the administrator's rights from {found.username}?", yes=yes)
    changed = await session.conpaas.change_user(found.id, admin=False)
    session.out.done(changed, f"{changed.username} is an ordinary user")


@admin.command()
@user_argument
@with_client
async def enable(session: Session, user: str) -> None:
    """Let a disabled user in again."""
    changed = await session.conpaas.change_user((await _find(session, user)).id, disabled=False)
    session.out.done(changed, f"{changed.username} may log in")


@admin.command()
@user_argument
@yes_option
@with_client
async def disable(session: Session, user: str, *, yes: bool) -> None:
    """Keep a user out."""
    found = await _find(session, user)
    session.confirm(f"Keep {found.username} out?", yes=yes)
    changed = await session.conpaas.change_user(found.id, disabled=True)
    session.out.done(changed, f"{changed.username} is kept out")


async def _find(session: Session, name_or_id: str) -> UserView:
    for user in await session.conpaas.users():
        if name_or_id in {user.id, user.username}:
            return user
    raise NotFoundError(f"there is no user '{name_or_id}'", value=name_or_id, hint="'conpaas admin users' lists them")
