"""What every command gets: configuration, output and a connected client; and how errors become exit codes."""

import asyncio
import functools
import importlib
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Concatenate, ParamSpec

import click
from click.shell_completion import CompletionItem
from pydantic import ValidationError

from conpaas.cli import words
from conpaas.cli.config import Config
from conpaas.cli.output import Output
from conpaas.core import rpc
from conpaas.core.errors import ConpaasError, NotAuthenticatedError, PeerError
from conpaas.core.messages.model import OperationView, ServiceView
from conpaas.sdk import Conpaas, OperationFailedError, connect

EXIT_ERROR, EXIT_FAILED, EXIT_LOGIN, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 3, 4, 5, 130
COMPLETION_TIMEOUT_S = 2.0

P = ParamSpec("P")


def exit_code(exc: ConpaasError) -> int:
    """Return the exit code of an error: the number is for scripts what the class is for us."""
    match exc:
        case OperationFailedError():
            return EXIT_FAILED
        case NotAuthenticatedError():
            return EXIT_LOGIN
        case PeerError():
            return EXIT_UNREACHABLE
        case _:
            return EXIT_ERROR


class Lazy(click.Group):
    """A group whose commands are imported when they are used: `conpaas ls` need not load the director."""

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy or {})
        """Module by the name of a command that is defined in it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        members = vars(importlib.import_module(self._lazy[cmd_name])).values()
        return next(it for it in members if isinstance(it, click.Command) and it.name == cmd_name)


class Root(Lazy):
    """The outermost group: expected errors are shown, with their hint, and become exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        out = ctx.ensure_object(Output)
        try:
            return super().invoke(ctx)
        except ConpaasError as exc:
            error = exc
        except ValidationError as exc:  # of a message that we made out of the user's words
            error = rpc.bad_input(exc)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        out.error(error)
        return ctx.exit(exit_code(error))


def _wants_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Output).as_json = True


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_wants_json, is_eager=True, help="Show JSON documents."
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
wait_option = click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Return when it is done, or at once."
)


class Session:
    """One run of a command: who we are, where answers go, and the director."""

    def __init__(self, config: Config, out: Output, conpaas: Conpaas) -> None:
        self.config = config
        self.out = out
        self.conpaas = conpaas

    async def finish(self, operation: OperationView, title: str, *, wait: bool) -> None:
        """Wait for an operation with a progress bar, if so wanted, and show how it stands."""
        if wait:
            with self.out.progress(title) as show:
                operation = await self.conpaas.wait(operation, on_progress=show)
            self.out.done(operation, f"{title}: done")
        else:
            self.out.done(operation, f"{title}: begun, as operation {operation.id}")

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something is lost; raise Abort for a no."""
        if not yes:
            click.confirm(question, abort=True, err=True)


def with_output(handler: Callable[Concatenate[Output, P], Awaitable[None]]) -> Callable[P, None]:
    """Make a command's function of an async one that takes the output."""

    @json_option
    @click.pass_context
    @functools.wraps(handler)
    def run(ctx: click.Context, /, *args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(_finish(handler(ctx.ensure_object(Output), *args, **kwargs)))

    return run


def with_client(handler: Callable[Concatenate[Session, P], Awaitable[None]]) -> Callable[P, None]:
    """Make a command's function of an async one that takes a session, logged in."""

    @with_output
    @functools.wraps(handler)
    async def run(out: Output, /, *args: P.args, **kwargs: P.kwargs) -> None:
        config = Config.load()
        async with connect(config.url, config.need_token()) as conpaas:
            await handler(Session(config, out, conpaas), *args, **kwargs)

    return run


async def _finish(work: Awaitable[None]) -> None:
    await work


def _complete(names: Callable[[Conpaas], Awaitable[list[str]]]) -> Callable[..., list[CompletionItem]]:
    """Return a completion out of what the director knows; a director that is away completes nothing."""

    async def ask() -> list[str]:
        config = Config.load()
        async with asyncio.timeout(COMPLETION_TIMEOUT_S), connect(config.url, config.need_token()) as conpaas:
            return await names(conpaas)

    def complete(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            found = asyncio.run(ask())
        except (ConpaasError, TimeoutError):
            return []
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


async def _service_names(conpaas: Conpaas) -> list[str]:
    return [service.name for service in await conpaas.services()]


async def _type_names(conpaas: Conpaas) -> list[str]:
    return [kind.name for kind in await conpaas.types()]


async def _cloud_names(conpaas: Conpaas) -> list[str]:
    return [cloud.name for cloud in await conpaas.clouds() if cloud.enabled]


async def _account_names(conpaas: Conpaas) -> list[str]:
    return [account.name for account in await conpaas.cloud_accounts()]


async def _driver_names(conpaas: Conpaas) -> list[str]:
    return [kind.name for kind in await conpaas.cloud_types()]


async def _cloud_sizes(conpaas: Conpaas) -> list[str]:
    clouds = await conpaas.clouds()
    return [f"{cloud.name}={size.name}" for cloud in clouds if cloud.enabled for size in cloud.sizes]


def _sizes_of(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the sizes of the cloud already named on the line, else of the default one."""

    async def ask(conpaas: Conpaas) -> list[str]:
        named = ctx.params.get("cloud")
        clouds = await conpaas.clouds()
        return [
            size.name for cloud in clouds if (cloud.name == named if named else cloud.default) for size in cloud.sizes
        ]

    return _complete(ask)(ctx, parameter, incomplete)


def _account_settings(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the settings of the driver, or account, that the line names: secret ones for `--secret`, else others.

    While an option's value is completed, click has not read the arguments: they are looked for in the whole line.
    """
    secret = parameter.name == "secrets"
    line = os.environ.get("COMP_WORDS", "").split()

    async def ask(conpaas: Conpaas) -> list[str]:
        drivers = {*line, *(account.driver for account in await conpaas.cloud_accounts() if account.name in line)}
        schemas = [kind.settings for kind in await conpaas.cloud_types() if kind.name in drivers]
        names = {name: schema for schema in schemas for name in schema.get("properties", {})}
        found = [name for name, schema in names.items() if words.is_secret(schema, name) == secret]
        return found if parameter.name != "settings" else [f"{name}=" for name in found]

    return _complete(ask)(ctx, parameter, incomplete)


async def _application_names(conpaas: Conpaas) -> list[str]:
    return [application.name for application in await conpaas.applications()]


def _of_service(
    names: Callable[[Conpaas, ServiceView], Awaitable[list[str]]],
) -> Callable[..., list[CompletionItem]]:
    """Return a completion that looks at the service already named on the line."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        async def ask(conpaas: Conpaas) -> list[str]:
            return await names(conpaas, await conpaas.find(ctx.params["service"]))

        return _complete(ask)(ctx, parameter, incomplete)

    return complete


async def _roles_of(conpaas: Conpaas, service: ServiceView) -> list[str]:
    roles = [kind.roles for kind in await conpaas.types() if kind.name == service.type]
    return [f"{role.name}={sign}" for role in roles[0] if role.scalable for sign in ("+", "-", "")]


async def _settings_of(conpaas: Conpaas, service: ServiceView) -> list[str]:
    schemas = [kind.settings for kind in await conpaas.types() if kind.name == service.type]
    return [f"{name}=" for name in schemas[0].get("properties", {})]


async def _versions_of(conpaas: Conpaas, service: ServiceView) -> list[str]:
    return [version.id for version in await conpaas.code(service.id)]


async def _nodes_of(conpaas: Conpaas, service: ServiceView) -> list[str]:
    return sorted({entry.node for entry in await conpaas.logs(service.id)})


complete_services = _complete(_service_names)
complete_types = _complete(_type_names)
complete_clouds = _complete(_cloud_names)
complete_accounts = _complete(_account_names)
complete_drivers = _complete(_driver_names)
complete_cloud_sizes = _complete(_cloud_sizes)
complete_sizes = _sizes_of
complete_account_settings = _account_settings
complete_applications = _complete(_application_names)
complete_roles = _of_service(_roles_of)
complete_settings = _of_service(_settings_of)
complete_versions = _of_service(_versions_of)
complete_nodes = _of_service(_nodes_of)
service_argument = click.argument("service", metavar="NAME", shell_complete=complete_services)
