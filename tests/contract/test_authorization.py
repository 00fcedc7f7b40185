"""Every command of every server, called by every kind of caller: only those that its declaration names get in.

The declared `allow` of an endpoint is compared with what the servers' own checks let through, over real connections.
"""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import aiohttp
import pytest
from aiohttp import web

from conpaas.core import rpc, tls
from conpaas.core.identity import Identity, client_context, server_context
from conpaas.core.member import authenticator
from conpaas.core.messages import agent, internal, manager, public
from conpaas.core.messages.base import Endpoint, Who
from conpaas.core.process import Process
from conpaas.core.tls import Authority
from conpaas.core.trust import Caller, Target
from conpaas.director.app import Director
from conpaas.director.gate import Gate
from tests.fakes.director import Rig, open_rig

LET_IN = 299
"""The status of the routes of these tests, which do nothing once a caller is let in."""
USERS = ("nobody", "expired", "forged", "stranger", "owner", "read-only owner", "admin", "read-only admin")
PEERS = (
    "no certificate",
    "owner",
    "stranger",
    "director",
    "manager",
    "replaced manager",
    "other manager",
    "agent",
    "other agent",
    "deleted agent",
)
IMPOSTORS = ("of another CA", "of another deployment", "expired")


def endpoints(module: ModuleType) -> dict[str, Endpoint]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Endpoint)}


def users_allowed(endpoint: Endpoint) -> set[str]:
    """Say, in words of its own, who may use a command of the public API."""
    names: set[str] = set()
    everybody = {"stranger", "owner", "admin"}
    for who in endpoint.allow:
        names |= {
            Who.ANYONE: set(USERS),
            Who.USER: everybody,
            Who.OWNER: {"owner", "admin"},
            Who.ADMIN: {"admin"},
        }[who]
    if Who.ANYONE not in endpoint.allow and endpoint.method == "GET":
        readers = {"owner": "read-only owner", "admin": "read-only admin"}
        readable = endpoint.allow != {Who.ADMIN}  # an administrator's business takes the scope 'admin'
        names |= {readers[name] for name in names & set(readers) if readable}
    return names


def peers_allowed(endpoint: Endpoint) -> set[str]:
    """Say, in words of its own, who may use a command between our own processes."""
    names = {
        Who.ANYONE: set(PEERS),
        Who.OWNER: {"owner"},
        Who.DIRECTOR: {"director"},
        Who.MANAGER: {"manager"},
        Who.AGENT: {"agent"},
    }
    return set().union(*(names[who] for who in endpoint.allow))


Check = Callable[[web.Request, Endpoint], Awaitable[Caller]]


def routes(declared: dict[str, Endpoint], check: Check) -> Iterator[web.RouteDef]:
    """Give a route for each endpoint that does nothing but `check` the caller."""
    for endpoint in declared.values():

        async def serve(request: web.Request, endpoint: Endpoint = endpoint) -> web.Response:
            await check(request, endpoint)
            return web.Response(status=LET_IN)

        yield web.RouteDef(endpoint.method, endpoint.path, serve, {})


@asynccontextmanager
async def served(declared: dict[str, Endpoint], check: Check, context: ssl.SSLContext | None) -> AsyncIterator[str]:
    app = web.Application(middlewares=[rpc.errors_to_replies])
    app.add_routes(routes(declared, check))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


class World:
    """Two users with a service each; the first one's has a replaced manager and a deleted node."""

    def __init__(self, rig: Rig, directory: Path) -> None:
        self.rig, self.directory = rig, directory
        self.deployment = rig.director.trust.deployment
        self.authority = rig.director.trust.authority

    async def build(self) -> None:
        rig = self.rig
        self.owner, self.stranger = await rig.add_user("alice"), await rig.add_user("mallory")
        self.admin = await rig.add_user("root", admin=True)
        self.service = (await rig.running(self.owner, nodes=2)).id
        self.other = (await rig.running(self.stranger)).id
        self.old_manager = (await rig.manager(self.service)).id
        await rig.reconciler.replace_manager(self.service, 1, "test")
        self.manager = (await rig.manager(self.service)).id
        await rig.enrol(self.manager)
        self.node, self.deleted = await rig.agents(self.service)
        await rig.ledger.delete(self.deleted, "enough")
        self.other_manager, [self.other_node] = (await rig.manager(self.other)).id, await rig.agents(self.other)
        view = await rig.view(self.service)
        assert view.operation is None
        operation = await rig.services.stop(self.service, actor="a", key=None, expected=None)
        self.words = {
            "service": self.service,
            "id": self.service,
            "application": view.application,
            "operation": operation.id,
            "user": self.owner,
            "instance": self.node,
        }

    def url(self, base: str, endpoint: Endpoint) -> str:
        words = {name: self.words.get(name, "x") for name in _names(endpoint.path)}
        return base + endpoint.url(**words)

    async def tokens(self) -> dict[str, str | None]:
        rig = self.rig
        found: dict[str, str | None] = {"nobody": None, "forged": "cps_forged"}
        expired = await rig.login("alice")
        rig.clock.advance(days=8)
        found["expired"] = expired
        for name, user in (("stranger", "mallory"), ("owner", "alice"), ("admin", "root")):
            found[name] = await rig.login(user)
        for name, user_id, admin in (("read-only owner", self.owner, False), ("read-only admin", self.admin, True)):
            me = Caller("user", user=user_id, admin=admin)
            made = await rig.accounts.create_token(me, public.CreateToken(name="r", scopes=("read",)))
            assert made.secret is not None
            found[name] = made.secret.get_secret_value()
        assert set(found) == set(USERS)
        return found

    def peers(self) -> dict[str, ssl.SSLContext]:
        d, s = self.deployment, self.service
        identities = {
            "owner": Identity.for_user(d, self.owner),
            "stranger": Identity.for_user(d, self.stranger),
            "director": Identity.director(d),
            "manager": Identity.manager(d, s, 2, self.manager),
            "replaced manager": Identity.manager(d, s, 1, self.old_manager),
            "other manager": Identity.manager(d, self.other, 1, self.other_manager),
            "agent": Identity.agent(d, s, self.node),
            "other agent": Identity.agent(d, self.other, self.other_node),
            "deleted agent": Identity.agent(d, s, self.deleted),
        }
        found = {name: self.client(identity) for name, identity in identities.items()}
        found["no certificate"] = client_context(None, None, self.ca)
        assert set(found) == set(PEERS)
        return found

    @property
    def ca(self) -> Path:
        return self.rig.settings.data_dir / "ca" / "ca.crt"

    def client(
        self, identity: Identity, authority: Authority | None = None, *, age: timedelta | None = None
    ) -> ssl.SSLContext:
        pair = self.pair(identity, authority or self.authority, age or timedelta())
        return client_context(pair, pair, self.ca)

    def pair(self, identity: Identity, authority: Authority, age: timedelta = timedelta()) -> Path:
        key, csr = tls.make_key_and_csr()
        pem = authority.sign(csr, identity, lifetime_s=3600, now=datetime.now(UTC) - age)
        path = self.directory / f"{len(list(self.directory.iterdir()))}.pem"
        path.write_bytes(key + pem)
        return path

    def server(self) -> ssl.SSLContext:
        pair = self.pair(Identity.director(self.deployment), self.authority)
        return server_context(pair, pair, self.ca, require_client=False)

    async def let_in(self, base: str, endpoint: Endpoint, context: ssl.SSLContext) -> bool:
        host = Identity.director(self.deployment).host
        async with (
            aiohttp.ClientSession() as session,
            session.request(endpoint.method, self.url(base, endpoint), ssl=context, server_hostname=host) as answer,
        ):
            assert answer.status in {LET_IN, 401, 403, 404}
            return answer.status == LET_IN


@pytest.fixture
async def world(rig: Rig, tmp_path: Path) -> World:
    directory = tmp_path / "keys"
    directory.mkdir()
    world = World(rig, directory)
    await world.build()
    return world


async def test_the_public_api_lets_in_whom_it_declares(world: World) -> None:
    tokens = await world.tokens()
    gate = Gate(world.rig.db, world.rig.accounts)
    declared = endpoints(public)
    async with served(declared, gate.authenticate, None) as base, aiohttp.ClientSession() as session:
        for name, endpoint in declared.items():
            let_in = set()
            for who, token in tokens.items():
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                url = world.url(base, endpoint)
                async with session.request(endpoint.method, url, headers=headers) as answer:
                    if answer.status == LET_IN:
                        let_in.add(who)
                    else:
                        assert answer.content_type == "application/problem+json"
                        expected = {401} if who in {"nobody", "expired", "forged"} else {403, 404}
                        assert answer.status in expected, (name, who)
            assert let_in == users_allowed(endpoint), name


async def test_what_belongs_to_others_looks_like_what_is_not_there(world: World) -> None:
    """Nobody learns from the answer whether an id is somebody's or nobody's."""
    token = (await world.tokens())["stranger"]
    gate = Gate(world.rig.db, world.rig.accounts)
    declared = {name: each for name, each in endpoints(public).items() if Who.OWNER in each.allow}
    headers = {"Authorization": f"Bearer {token}"}
    async with served(declared, gate.authenticate, None) as base, aiohttp.ClientSession() as session:
        for name, endpoint in declared.items():
            answers = []
            for words in (world.words, dict.fromkeys(world.words, "x")):
                url = base + endpoint.url(**{key: words.get(key, "x") for key in _names(endpoint.path)})
                async with session.request(endpoint.method, url, headers=headers) as answer:
                    answers.append((answer.status, await answer.read()))
            assert answers[0] == answers[1], name
            assert answers[0][0] == 404, name


async def test_the_port_for_instances_lets_in_whom_it_declares(world: World) -> None:
    director = world.rig.director
    declared = endpoints(internal)
    async with served(declared, director.internal.authenticate, world.server()) as base:
        for name, endpoint in declared.items():
            let_in = {who for who, tls_of in world.peers().items() if await world.let_in(base, endpoint, tls_of)}
            expected = peers_allowed(endpoint)
            if endpoint in {internal.RENEW, internal.READ_RELEASE, internal.DOWNLOAD_BUNDLE}:
                # they name no service: everybody renews their own certificate, and runs the same code
                expected |= {"other manager", "other agent"}
            # who is no longer wanted is refused even what anyone may do
            assert let_in == expected - {"replaced manager", "deleted agent"}, name


@pytest.mark.parametrize("module", [manager, agent], ids=["manager", "agent"])
async def test_managers_and_agents_let_in_whom_their_commands_declare(world: World, module: ModuleType) -> None:
    target = Target(owner=world.owner, service=world.service, epoch=2)
    declared = endpoints(module)
    async with served(declared, authenticator(world.deployment, lambda _: target), world.server()) as base:
        peers = world.peers()
        for name, endpoint in declared.items():
            let_in = {who for who, tls_of in peers.items() if await world.let_in(base, endpoint, tls_of)}
            assert let_in == peers_allowed(endpoint), name


@pytest.mark.parametrize("who", IMPOSTORS)
async def test_impostors_do_not_get_a_connection(world: World, who: str) -> None:
    identity = Identity.manager(world.deployment, world.service, 2, world.manager)
    match who:
        case "of another CA":
            context = world.client(identity, Authority.create(world.deployment))
        case "of another deployment":
            stranger = Identity.manager("dep-other", world.service, 2, world.manager)
            context = world.client(stranger, Authority.create("dep-other"))
        case _:
            context = world.client(identity, age=timedelta(hours=2))
    check = world.rig.director.internal.authenticate
    async with served(endpoints(internal), check, world.server()) as base:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await world.let_in(base, internal.READ_RECORD, context)


async def test_every_declared_command_is_served(rig: Rig) -> None:
    sites = rig.director._sites()
    for site, module in zip(sites, (public, internal), strict=True):
        found = {(route.method, route.path) for route in site.routes if isinstance(route, web.RouteDef)}
        declared = {(endpoint.method, endpoint.path) for endpoint in endpoints(module).values()}
        assert declared - found == set()
    assert issubclass(Director, Process)


def _names(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]
