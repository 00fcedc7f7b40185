"""Clouds: what users see of them, and how administrators add, try, change and remove them."""

from typing import Any

import click

from conpaas.cli import cloud_views, cloud_words, output
from conpaas.cli.session import (
    Session,
    complete_account_settings,
    complete_accounts,
    complete_clouds,
    complete_drivers,
    with_client,
    yes_option,
)
from conpaas.core.cloud import VERBS
from conpaas.core.errors import BadInputError, CloudRefusedError, ConflictError, NotFoundError
from conpaas.core.messages.public import CloudForm, CloudOptions, CloudTypeView, Examination

Words = tuple[str, ...]


class Limit(click.ParamType[int | str]):
    """A number of instances, or `none`."""

    name = "limit"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        return "N|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if text != "none" and not text.isdecimal():
            self.fail(f"'{text}' is neither a number of instances nor 'none'", param, ctx)
        return text if text == "none" else int(text)


def account_options(handler: Any) -> Any:
    """Give a command all that can be said of a cloud account."""
    for option in reversed(_OPTIONS):
        handler = option(handler)
    return handler


_OPTIONS = (
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=complete_account_settings,
        help="A setting of the driver; lists with commas or as JSON, all else that is not text as JSON, "
        "which KEY=@FILE reads from a file.",
    ),
    click.option(
        "--secret",
        "secrets",
        multiple=True,
        metavar="KEY[=@FILE|=-]",
        shell_complete=complete_account_settings,
        help="A secret setting: asked for, or read from a file, or (-) from standard input.",
    ),
    click.option("--title", help="What people see."),
    click.option(
        "--price",
        "prices",
        multiple=True,
        metavar="SIZE=AMOUNT",
        help="Of an instance per hour, by size, * for all others; it replaces the provider's. SIZE= takes it back.",
    ),
    click.option("--currency", metavar="CODE", help="Of these prices: EUR, USD, …"),
    click.option(
        "--rate",
        "rates",
        multiple=True,
        metavar="VERB=N",
        help=f"Most calls per second, by verb: {', '.join(VERBS)}; it replaces what is known of the provider. "
        "VERB= takes it back.",
    ),
    click.option("--user-limit", type=Limit(), help="Most instances there at once of one user."),
    click.option("--limit", type=Limit(), help="Most instances there at once, everybody's together."),
    click.option("--director-url", metavar="URL", help="Where its instances find the director."),
    click.option("--no-check", is_flag=True, help="Do not try it first."),
)
driver_argument = click.argument("driver", shell_complete=complete_drivers)
name_argument = click.argument("name", shell_complete=complete_accounts)


@click.group()
def cloud() -> None:
    """The clouds that services can run on.

    Everybody may look at them with 'ls' and 'sizes'; all else is for administrators.
    """


@cloud.command("ls")
@with_client
async def list_clouds(session: Session) -> None:
    """List clouds, with what an hour on their default size costs; one that cannot be used says why."""
    session.out.show(await session.conpaas.clouds(), cloud_views.CLOUDS)


@cloud.command()
@click.argument("name", shell_complete=complete_clouds)
@with_client
async def sizes(session: Session, name: str) -> None:
    """List the sizes of machines that a cloud has, with their prices."""
    clouds = await session.conpaas.clouds()
    found = next((one for one in clouds if one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in clouds)
        raise NotFoundError(f"there is no cloud '{name}'", value=name, hint=f"there are: {known}")
    session.out.show(found.sizes, cloud_views.SIZES, empty=f"{name} has no sizes to choose from.")


@cloud.command("types")
@with_client
async def list_types(session: Session) -> None:
    """List the kinds of clouds (drivers) that can be added."""
    session.out.show(await session.conpaas.cloud_types(), cloud_views.CLOUD_TYPES)


@cloud.command()
@name_argument
@with_client
async def show(session: Session, name: str) -> None:
    """Show settings, limits, prices and state of a cloud; its secrets as asterisks.

    'deployment' is what all that we make there is tagged with: policies at the provider may name it.
    """
    account = await session.conpaas.cloud_account(name)
    deployment = (await session.conpaas.version()).deployment
    if session.out.as_json:
        session.out.document({**output.document(account), "deployment": deployment})
        return
    kinds = {kind.name: kind for kind in await session.conpaas.cloud_types()}
    schema = kinds[account.driver].settings if account.driver in kinds else {}
    session.out.say("\n".join(cloud_views.cloud_lines(account, schema, deployment)))
    session.out.show(account.sizes, cloud_views.SIZES)


@cloud.command()
@driver_argument
@click.argument("name")
@account_options
@with_client
async def add(
    session: Session,
    /,
    driver: str,
    name: str,
    settings: Words,
    secrets: Words,
    prices: Words,
    rates: Words,
    *,
    no_check: bool,
    **options: Any,
) -> None:
    """Add a cloud of kind DRIVER, to be called NAME. It is tried first, without making anything there.

    'conpaas cloud types' lists the drivers, 'conpaas cloud add DRIVER NAME' without settings says which are missing.
    """
    kind = await _kind(session, driver)
    if any(account.name == name for account in await session.conpaas.cloud_accounts()):
        raise ConflictError(f"there is a cloud '{name}'", value=name, hint="choose another name")
    given = {**cloud_words.plain(settings, kind), **cloud_words.secret(secrets, kind)}
    given |= cloud_words.ask_for([key for key in kind.settings.get("required", ()) if key not in given], kind)
    form = CloudForm(
        name=name, driver=driver, settings=given, options=cloud_words.changed(CloudOptions(), prices, rates, options)
    )
    if not no_check:
        await _try(session, form, "added")
    made = await session.conpaas.add_cloud(form)
    trouble = made.reason or made.trouble
    session.out.done(made, f"added {name} ({made.options.title or kind.title}){f': {trouble}' if trouble else ''}")


@cloud.command()
@name_argument
@account_options
@click.option(
    "--unset",
    multiple=True,
    metavar="KEY",
    help="A setting that goes back to its default.",
    shell_complete=complete_account_settings,
)
@with_client
async def edit(
    session: Session,
    /,
    name: str,
    settings: Words,
    secrets: Words,
    prices: Words,
    rates: Words,
    unset: Words,
    *,
    no_check: bool,
    **options: Any,
) -> None:
    """Change what is given of a cloud, and nothing else. If settings change, they are tried first."""
    account = await session.conpaas.cloud_account(name)
    kind = await _kind(session, account.driver)
    given = {**cloud_words.plain(settings, kind), **cloud_words.secret(secrets, kind)}
    kept = {key: value for key, value in account.settings.items() if key not in unset}
    form = CloudForm(
        name=name,
        driver=account.driver,
        settings={**kept, **cloud_words.defaults(unset, kind), **given},
        options=cloud_words.changed(account.options, prices, rates, options),
    )
    if (form.settings, form.options) == (account.settings, account.options):
        raise BadInputError("there is nothing to change", value=name, hint="see 'conpaas cloud edit --help'")
    if form.settings != account.settings and not no_check:
        await _try(session, form, "changed")
    session.out.done(await session.conpaas.change_cloud(form), f"changed {name}")


@cloud.command()
@name_argument
@with_client
async def test(session: Session, name: str) -> None:
    """Try a cloud without making anything there, and say exactly what is wrong."""
    found = await session.conpaas.examine_cloud(name)
    if session.out.as_json:
        session.out.document(output.document(found))
    session.out.say("\n".join(cloud_views.finding_lines(found)))
    _insist(found, f"{name} cannot be used")


@cloud.command("rm")
@name_argument
@yes_option
@with_client
async def remove(session: Session, name: str, *, yes: bool) -> None:
    """Remove a cloud on which no instance and no volume is."""
    session.confirm(f"Remove the cloud {name}, with its settings and credentials?", yes=yes)
    await session.conpaas.remove_cloud(name)
    session.out.say(f"removed {name}")


@cloud.command()
@name_argument
@with_client
async def enable(session: Session, name: str) -> None:
    """Let new instances be made on a cloud."""
    await _switch(session, name, enabled=True)


@cloud.command()
@name_argument
@with_client
async def disable(session: Session, name: str) -> None:
    """Let no new instances be made on a cloud; those that run go on."""
    await _switch(session, name, enabled=False)


async def _switch(session: Session, name: str, *, enabled: bool) -> None:
    account = await session.conpaas.cloud_account(name)
    options = account.options.model_copy(update={"enabled": enabled})
    form = CloudForm(name=name, driver=account.driver, settings=account.settings, options=options)
    changed = await session.conpaas.change_cloud(form)
    session.out.done(changed, f"{name} takes {'new' if enabled else 'no new'} instances")


async def _kind(session: Session, driver: str) -> CloudTypeView:
    kinds = await session.conpaas.cloud_types()
    for kind in kinds:
        if kind.name == driver:
            return kind
    known = ", ".join(kind.name for kind in kinds)
    raise NotFoundError(f"there is no driver '{driver}'", value=driver, hint=f"there are: {known}")


async def _try(session: Session, form: CloudForm, verb: str) -> None:
    """Try an account that is not kept yet; raise CloudRefusedError, with the first finding, if it cannot be used."""
    found = await session.conpaas.try_cloud(form)
    session.out.say("\n".join(cloud_views.finding_lines(found)))
    _insist(found, f"{form.name} is not {verb}", "correct it, or go on all the same with --no-check")


def _insist(found: Examination, what: str, otherwise: str = "") -> None:
    for finding in found.findings:
        if not finding.ok:
            hint = finding.hint or otherwise or "'conpaas cloud edit' changes it"
            raise CloudRefusedError(f"{what}: {finding.name}: {finding.detail}", value=finding.name, hint=hint)
