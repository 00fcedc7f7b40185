"""Logging in and out, and what belongs to one's account."""

from dataclasses import replace
from pathlib import Path

import click
from pydantic import SecretStr

from conpaas.cli import certificate, views
from conpaas.cli.config import Config
from conpaas.cli.output import Output
from conpaas.cli.session import Session, with_client, with_output, yes_option
from conpaas.core.messages.public import Registration
from conpaas.sdk import connect, solve

password_option = click.option(
    "--password", prompt=True, hide_input=True, envvar="CONPAAS_PASSWORD", help="Better left to the prompt."
)
url_argument = click.argument("url", required=False)


@click.command()
@url_argument
@click.option("--username", prompt=True, help="Your user name.")
@password_option
@with_output
async def login(out: Output, url: str | None, username: str, password: str) -> None:
    """Log in at the director at URL; later commands go there."""
    config = replace(Config.load(), url=(url or Config.load().url).rstrip("/"))
    async with connect(config.url) as conpaas:
        session = await conpaas.login(username, password)
    certificate.UserFiles(config.directory).forget()  # it was of whoever was logged in before
    replace(config, token=session.token.get_secret_value()).save()
    out.done(session.user, f"logged in at {config.url} as {session.user.username}")


@click.command()
@with_client
async def logout(session: Session) -> None:
    """End the session and forget it."""
    await session.conpaas.logout()
    certificate.UserFiles(session.config.directory).forget()
    replace(session.config, token=None).save()
    session.out.say(f"logged out of {session.config.url}")


@click.command()
@url_argument
@click.option("--username", prompt=True)
@click.option("--email", prompt=True)
@click.option("--password", prompt=True, hide_input=True, confirmation_prompt=True, envvar="CONPAAS_PASSWORD")
@click.option("--first-name", default="")
@click.option("--last-name", default="")
@click.option("--affiliation", default="")
@with_output
async def register(out: Output, /, url: str | None, password: str, **words: str) -> None:
    """Make an account; the proof of work that keeps robots away takes a moment."""
    config = replace(Config.load(), url=(url or Config.load().url).rstrip("/"))
    async with connect(config.url) as conpaas:
        challenge = await conpaas.captcha()
        registration = Registration.model_validate(
            {**words, "password": SecretStr(password), "captcha": await solve(challenge.challenge)}
        )
        made = await conpaas.register(registration)
    out.done(made, f"welcome, {made.username}; now log in: 'conpaas login {config.url}'")


@click.command()
@with_client
async def whoami(session: Session) -> None:
    """Show the account that is logged in, and its credits."""
    me = await session.conpaas.me()
    session.out.done(me, f"{me.username} at {session.config.url}, {me.credits} credits")


@click.command()
@click.option("--old", prompt="Old password", hide_input=True)
@click.option("--new", prompt="New password", hide_input=True, confirmation_prompt=True)
@with_client
async def passwd(session: Session, old: str, new: str) -> None:
    """Change the password."""
    await session.conpaas.change_password(old, new)
    session.out.say("the password is changed")


@click.command()
@with_client
async def cert(session: Session) -> None:
    """Get the certificate with which 'managerc' talks to managers; it is valid for a day."""
    found = await certificate.renew(session.config.directory, session.conpaas)
    session.out.say(f"wrote {found.certificate}")


@click.group()
def token() -> None:
    """API tokens."""


@token.command("ls")
@with_client
async def list_tokens(session: Session) -> None:
    """List API tokens."""
    session.out.show(await session.conpaas.tokens(), views.TOKENS, empty="You have no API tokens.")


@token.command("create")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["read", "write", "admin"]),
    default=("read", "write"),
    show_default=True,
    help="What it may do; may be given several times.",
)
@click.option("--days", default=90, show_default=True, type=click.IntRange(1, 3650), help="How long it lives.")
@with_client
async def create_token(session: Session, name: str, scopes: tuple[str, ...], days: int) -> None:
    """Make an API token and show its secret, once."""
    chosen = [scope for scope in ("read", "write", "admin") if scope in scopes]
    made = await session.conpaas.create_token(name, scopes=chosen, expires_in_days=days)
    session.out.done(made, "" if made.secret is None else made.secret.get_secret_value())


@token.command("rm")
@click.argument("token_id")
@yes_option
@with_client
async def remove_token(session: Session, token_id: str, *, yes: bool) -> None:
    """Revoke an API token."""
    session.confirm(f"Revoke the token {token_id}?", yes=yes)
    await session.conpaas.delete_token(token_id)
    session.out.say(f"revoked {token_id}")


@click.group()
def key() -> None:
    """SSH keys, for 'git push'."""


@key.command("ls")
@with_client
async def list_keys(session: Session) -> None:
    """List SSH keys."""
    session.out.show(await session.conpaas.keys(), views.KEYS, empty="You have no SSH keys here.")


@key.command("add")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="What to call it; the file's name if none is given.")
@with_client
async def add_key(session: Session, file: Path, name: str | None) -> None:
    """Add the SSH public key in FILE, such as ~/.ssh/id_ed25519.pub."""
    made = await session.conpaas.add_key(name or file.stem, file.read_text(encoding="utf-8").strip())
    session.out.done(made, f"added {made.fingerprint} ({made.id})")


@key.command("rm")
@click.argument("key_id")
@yes_option
@with_client
async def remove_key(session: Session, key_id: str, *, yes: bool) -> None:
    """Remove an SSH key."""
    session.confirm(f"Remove the key {key_id}?", yes=yes)
    await session.conpaas.delete_key(key_id)
    session.out.say(f"removed {key_id}")
