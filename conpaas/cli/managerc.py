"""`managerc URL ACTION [options]`: straight to the manager of a service, with the user's certificate.

Before anything is sent, the manager's certificate must be one of our deployment and of a service of ours: the one that
`--service` names, or else one that the director says is ours.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec
from urllib.parse import urlsplit

import click

from conpaas.cli import certificate, output, views, words
from conpaas.cli.certificate import UserFiles
from conpaas.cli.config import Config
from conpaas.cli.output import Output
from conpaas.cli.session import Root, json_option
from conpaas.core import files, identity, ids, rpc, tasks, units
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import (
    BadInputError,
    ConflictError,
    ForbiddenError,
    NotAuthenticatedError,
    NotFoundError,
    PeerError,
)
from conpaas.core.identity import Identity
from conpaas.core.messages import manager
from conpaas.core.messages.agent import LogQuery
from conpaas.core.messages.internal import StateHistory, UploadQuery
from conpaas.core.messages.model import CodeVersionView, LogChunk, NodeView, OperationView
from conpaas.core.states import TRANSIENT, ServiceState
from conpaas.sdk import Conpaas, OperationFailedError, connect

DEFAULT_PORT = 5555
HANDSHAKE_TIMEOUT_S = 5.0
WAIT_TIMEOUT_S = 900.0
POLL_S = 0.2
LOG_BYTES = 65536
CHUNK_BYTES = 256 * 1024
DOWNLOAD_LIMIT_BYTES = 1 << 40
EXIT_USAGE = 2

P = ParamSpec("P")


class Managerc(Root):
    """The group of actions, with the help text that people know."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"Usage: {ctx.command_path.split()[0]} URL ACTION [options]\n\nAction could be one of:\n")
        formatter.write(f"{'[ACTION]':<23} [DESCRIPTION]\n")
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                formatter.write(f"{name:<23} {command.short_help}\n")


class Link:
    """One connection to one manager, which has proved to be the right one."""

    def __init__(self, client: rpc.Client, out: Output) -> None:
        self.client = client
        self.out = out

    async def nodes(self) -> list[NodeView]:
        """Return the nodes that serve, without the manager's instance."""
        answer: manager.Nodes = await self.client.call(manager.LIST_NODES)
        return [node for node in answer.nodes if node.kind == "agent"]

    async def finish(self, action: str, operation: OperationView, *, wait: bool) -> None:
        """Say that the operation has begun, or wait until the manager has reached what is wanted."""
        if wait:
            state = await tasks.wait_for(
                functools.partial(self._reached, operation.generation),
                timeout_s=WAIT_TIMEOUT_S,
                what=action,
                clock=SYSTEM_CLOCK,
                period_s=POLL_S,
            )
            if state.state is ServiceState.ERROR:
                raise OperationFailedError(f"{action} failed: {state.reason}", value=operation.id)
            self.out.done(state, f"{action}: {state.state}")
        else:
            self.out.done(operation, f"{action}: begun, as operation {operation.id}")

    async def _reached(self, generation: int) -> manager.ManagerState | None:
        now: manager.ManagerState = await self.client.call(manager.GET_STATE)
        return now if now.generation >= generation and now.state not in TRANSIENT else None


def _keep_service(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_SERVICE] = value


_SERVICE = "conpaas.service"
service_option = click.option(
    "--service",
    expose_value=False,
    callback=_keep_service,
    help="Id of the manager's service, if the director cannot be asked.",
)


def with_manager(handler: Callable[Concatenate[Link, P], Awaitable[None]]) -> Callable[P, None]:
    """Make an action's function of an async one that takes the link to the manager."""

    @json_option
    @service_option
    @click.pass_context
    @functools.wraps(handler)
    def run(ctx: click.Context, /, *args: P.args, **kwargs: P.kwargs) -> None:
        async def act() -> None:
            async with _linked(ctx.find_root().params["url"], ctx.meta.get(_SERVICE)) as client:
                await handler(Link(client, ctx.ensure_object(Output)), *args, **kwargs)

        asyncio.run(act())

    return run


wait_option = click.option("--wait", is_flag=True, help="Return when it is done.")
cloud_option = click.option("--cloud", help="Where; the service's own cloud if none is given.")
roles_argument = click.argument("roles", nargs=-1, required=True, metavar="ROLE=COUNT...")


@click.group(cls=Managerc, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("url")
@json_option
@click.pass_context
def managerc(ctx: click.Context, url: str) -> None:
    """Talk to the manager at URL."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(0 if url == "help" else EXIT_USAGE)


@managerc.command("help", short_help="Print the help menu")
@click.pass_context
def show_help(ctx: click.Context) -> None:
    """Print the help menu."""
    click.echo(ctx.find_root().get_help())


@managerc.command("add", short_help="Add more service nodes to a deployment")
@roles_argument
@cloud_option
@wait_option
@with_manager
async def add(link: Link, roles: tuple[str, ...], cloud: str | None, *, wait: bool) -> None:
    """Add COUNT nodes of each ROLE."""
    body = manager.ChangeRoles(roles=_counts(roles), cloud=cloud, key=ids.new("key"))
    await link.finish("add", await link.client.call(manager.ADD, body), wait=wait)


@managerc.command("remove", short_help="Remove some service nodes from a deployment")
@roles_argument
@cloud_option
@wait_option
@with_manager
async def remove(link: Link, roles: tuple[str, ...], cloud: str | None, *, wait: bool) -> None:
    """Remove COUNT nodes of each ROLE."""
    body = manager.ChangeRoles(roles=_counts(roles), cloud=cloud, key=ids.new("key"))
    await link.finish("remove", await link.client.call(manager.REMOVE, body), wait=wait)


@managerc.command("startup", short_help="Startup a deployment")
@wait_option
@with_manager
async def startup(link: Link, *, wait: bool) -> None:
    """Start the service."""
    body = manager.Keyed(key=ids.new("key"))
    await link.finish("startup", await link.client.call(manager.STARTUP, body), wait=wait)


@managerc.command("shutdown", short_help="Shutdown a deployment")
@wait_option
@with_manager
async def shutdown(link: Link, *, wait: bool) -> None:
    """Stop the service: give back all instances but the manager's."""
    body = manager.Keyed(key=ids.new("key"))
    await link.finish("shutdown", await link.client.call(manager.SHUTDOWN, body), wait=wait)


@managerc.command("getState", short_help="Get the state of a deployment")
@with_manager
async def get_state(link: Link) -> None:
    """Print the state of the service."""
    answer: manager.ManagerState = await link.client.call(manager.GET_STATE)
    link.out.done(answer, f"{answer.state} {answer.reason}".rstrip())


@managerc.command("getStateChanges", short_help="Get the state change history of a deployment")
@with_manager
async def get_state_changes(link: Link) -> None:
    """Print the states of the service, oldest first."""
    answer: StateHistory = await link.client.call(manager.GET_STATES)
    link.out.show(answer.changes, views.STATES)


@managerc.command("listServiceNodes", short_help="Get a list of service nodes")
@with_manager
async def list_service_nodes(link: Link) -> None:
    """Print the service nodes and their roles."""
    nodes = await link.nodes()
    lines = [f"{views.node_id(node):<17} {_roles(node)}" for node in nodes]
    _print(link.out, nodes, [f"{'Service Node':<17} Role(s)", *lines])


@managerc.command("getServiceNode", short_help="Get information about a single service node")
@click.argument("node")
@with_manager
async def get_service_node(link: Link, node: str) -> None:
    """Print address and roles of a node."""
    for found in await link.nodes():
        if node in {found.id, found.cloud_id}:
            head = f"{'Service Node':<17} {'Address':<16} Role(s)"
            line = f"{views.node_id(found):<17} {found.address:<16} {_roles(found)}"
            _print(link.out, found, [head, line])
            return
    raise NotFoundError(f"there is no service node '{node}'", value=node, hint="'listServiceNodes' lists them")


@managerc.command("getConfiguration", short_help="Get the configuration of a deployment")
@with_manager
async def get_configuration(link: Link) -> None:
    """Print what is wanted of the service, as JSON."""
    answer: manager.Configuration = await link.client.call(manager.GET_CONFIGURATION)
    link.out.document(output.document(answer.wanted))


@managerc.command("updateConfiguration", short_help="Update the configuration of a deployment")
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--code", help="Id of the code version to activate.")
@wait_option
@with_manager
async def update_configuration(link: Link, values: tuple[str, ...], code: str | None, *, wait: bool) -> None:
    """Change settings, or activate a code version."""
    if not values and code is None:
        raise BadInputError("there is nothing to change", hint="write KEY=VALUE, or --code VERSION")
    present: manager.Configuration = await link.client.call(manager.GET_CONFIGURATION)
    settings = {key: words.like(text, present.wanted.settings.get(key)) for key, text in words.pairs(values).items()}
    body = manager.Configure(settings=settings, code=code, key=ids.new("key"))
    operation = await link.client.call(manager.UPDATE_CONFIGURATION, body)
    await link.finish("updateConfiguration", operation, wait=wait)


@managerc.command("getHighLevelMonitoring", short_help="Get the average request rate and throughput")
@with_manager
async def get_high_level_monitoring(link: Link) -> None:
    """Print averages of the last minute."""
    answer: manager.Monitoring = await link.client.call(manager.GET_MONITORING)
    times = f"{answer.response_p50:.1f} / {answer.response_p95:.1f} / {answer.response_p99:.1f} ms"
    lines = (
        ("Request rate", f"{answer.request_rate:.2f} requests/s"),
        ("Error rate", f"{answer.error_rate:.2f} requests/s"),
        ("Throughput", f"{units.show_size(round(answer.throughput))}/s"),
        ("Response time", f"{times} (p50 / p95 / p99)"),
    )
    _print(link.out, answer, [f"{name:<17} {value}" for name, value in lines])


@managerc.command("getLog", short_help="Get raw logging")
@click.argument("node", default="manager")
@click.argument("log", required=False)
@with_manager
async def get_log(link: Link, node: str, log: str | None) -> None:
    """Print the end of a LOG of a NODE; of the manager, unless another one is named."""
    there: manager.ManagerLogs = await link.client.call(manager.LIST_ALL_LOGS)
    ids_of = {node} | {found.id for found in await link.nodes() if found.cloud_id == node}
    for entry in there.logs:
        if entry.node in ids_of and log in {None, entry.name}:
            query = LogQuery(offset=-LOG_BYTES, limit=LOG_BYTES)
            chunk: LogChunk = await link.client.call(
                manager.READ_NODE_LOG, query=query, node=entry.node, name=entry.name
            )
            link.out.done(chunk, chunk.text.removesuffix("\n"))
            return
    known = ", ".join(f"{entry.node} {entry.name}" for entry in there.logs)
    raise NotFoundError(f"there is no such log: {node} {log or ''}", value=node, hint=f"there are: {known}")


@managerc.command("listCodeVersions", short_help="List identifiers of all code versions stored by a deployment")
@with_manager
async def list_code_versions(link: Link) -> None:
    """Print the code versions, newest first."""
    answer: manager.CodeVersions = await link.client.call(manager.LIST_CODE)
    link.out.show(answer.items, views.CODE, empty="There is no code yet.")


@managerc.command("uploadCodeVersion", short_help="Upload a new code version")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--description", default="", help="What is new in it.")
@with_manager
async def upload_code_version(link: Link, file: Path, description: str) -> None:
    """Send an archive as a new code version; 'updateConfiguration --code' activates it."""
    query = UploadQuery(filename=file.name, description=description)
    version: CodeVersionView = await link.client.call(manager.UPLOAD_CODE, query=query, data=_read(file))
    link.out.done(version, f"Code version {version.id} has been uploaded")


@managerc.command("downloadCodeVersion", short_help="Download a code version")
@click.argument("version")
@click.argument("target", required=False, type=click.Path(path_type=Path))
@with_manager
async def download_code_version(link: Link, version: str, target: Path | None) -> None:
    """Write a code version to the file TARGET, or under its own name."""
    if target is None:
        known: manager.CodeVersions = await link.client.call(manager.LIST_CODE)
        names = [Path(found.filename).name for found in known.items if found.id == version]
        target = Path(names[0] if names else f"{version}.tar.gz")
    if target.exists():
        raise ConflictError(f"{target} exists", value=target, hint="name another file")
    async with link.client.stream(manager.DOWNLOAD_CODE, version=version) as response:
        await files.receive(response.content.iter_chunked(CHUNK_BYTES), target, limit=DOWNLOAD_LIMIT_BYTES)
    link.out.say(f"Wrote {target}")


def main() -> None:
    """Run the program; leaves by SystemExit with the exit code."""
    managerc.main(prog_name="managerc")


@contextlib.asynccontextmanager
async def _linked(url: str, service: str | None) -> AsyncIterator[rpc.Client]:
    host, port = _place(url)
    config = Config.load()
    async with contextlib.AsyncExitStack() as stack:
        conpaas = None
        if config.token is not None:
            conpaas = await stack.enter_async_context(connect(config.url, config.token))
        user = await certificate.ensure(config.directory, conpaas)
        name = _name(user, service) if service else (await _identify(host, port, user, conpaas)).host
        tls = identity.client_context(user.certificate, user.key, user.ca)
        client = rpc.Client(f"https://{_in_url(host)}:{port}", tls=tls, server_hostname=name)
        stack.push_async_callback(client.close)
        yield client


async def _identify(host: str, port: int, user: UserFiles, conpaas: Conpaas | None) -> Identity:
    """Read who listens there, and let the director say that it is ours."""
    if conpaas is None:
        raise NotAuthenticatedError(
            "whose manager this is must be asked of the director", hint="'conpaas login', or name it by --service"
        )
    peer = await _peer(host, port, user)
    if peer is None or peer.kind != "manager" or peer.service is None:
        raise ForbiddenError(f"what listens at {host}:{port} is no manager of this deployment", value=host)
    try:
        await conpaas.service(peer.service)
    except NotFoundError as exc:
        raise ForbiddenError(f"the manager at {host}:{port} is not of a service of yours", value=peer.service) from exc
    return peer


async def _peer(host: str, port: int, user: UserFiles) -> Identity | None:
    tls = identity.client_context(user.certificate, user.key, user.ca)
    tls.check_hostname = False  # the name is what we want to know; the chain is verified all the same
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=tls)
    except (OSError, TimeoutError) as exc:
        raise PeerError(f"no manager answers at {host}:{port}: {str(exc) or type(exc).__name__}", value=host) from exc
    try:
        return identity.peer_identity(writer.get_extra_info("ssl_object"), user.deployment)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _name(user: UserFiles, service: str) -> str:
    """Return the name that certificates of every manager of `service` bear."""
    return Identity.manager(user.deployment, service, 0, "any").host


def _place(url: str) -> tuple[str, int]:
    """Return host and port of `http://host:5555/`, `https://…` or `host:5555`; TLS it is in any case."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise BadInputError(f"'{url}' is not a URL: {exc}", value=url, hint="write HOST:5555") from exc
    if not host:
        raise BadInputError(f"'{url}' names no host", value=url, hint="write HOST:5555")
    return host, port or DEFAULT_PORT


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _counts(roles: Sequence[str]) -> dict[str, int]:
    """Return how many nodes of each role `php=2` words name; `+2` is taken for 2."""
    changes = words.role_changes([role.replace("=+", "=") for role in roles], {})
    for role, count in changes.items():
        if count < 0:
            raise BadInputError(f"'{role}={count}': a count is 1 or more", value=count, hint="write php=2 web=1")
    return changes


def _roles(node: NodeView) -> str:
    return ", ".join(role.upper() for role in node.roles)


def _print(out: Output, answer: Any, lines: Sequence[str]) -> None:
    if out.as_json:
        out.document(output.document(answer))
    else:
        click.echo("\n".join(line.rstrip() for line in lines))


async def _read(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as opened:
        while chunk := await asyncio.to_thread(opened.read, CHUNK_BYTES):
            yield chunk


if __name__ == "__main__":
    main()
