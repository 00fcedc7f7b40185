"""A director's public API with canned answers, for pages in states that are hard to reach with a real one."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from math import sin
from typing import Any

from aiohttp import web
from altcha import create_challenge
from pydantic import Field, SecretStr

from conpaas.core import plugins, rpc
from conpaas.core.errors import ConflictError, NotAuthenticatedError, NotFoundError
from conpaas.core.messages import manager, public
from conpaas.core.messages.base import Endpoint, Message, Secret, Who
from conpaas.core.messages.internal import StateHistory
from conpaas.core.messages.model import (
    Ack,
    CodeVersionView,
    Cost,
    EventView,
    LogChunk,
    LogName,
    MetricPoint,
    NodeView,
    OperationView,
    ServiceView,
    StateChange,
    Wanted,
)
from conpaas.core.messages.public import (
    ApplicationView,
    CloudView,
    InstanceRow,
    KeyView,
    Live,
    ServiceTypeView,
    TokenView,
    UserView,
)
from conpaas.core.service import PACKAGE, ServiceType
from conpaas.core.states import NodeState, OperationState, ServiceState

TOKEN = "fake-session"
NOW = datetime.now(UTC)


class GenericSettings(Message):
    """Settings of the made-up type."""

    replicas: int = Field(default=2, ge=1, le=9)
    """How many copies of each value are kept."""
    persistent: bool = True
    """Write values to the disk."""
    label: str = Field(default="", max_length=40)
    """Shown to clients."""


class Backup(Message):
    """Arguments of a command."""

    target: str = Field(default="all", max_length=100)
    """What is kept."""


def kinds() -> tuple[ServiceTypeView, ...]:
    """Return the real php type, a made-up one, and one that is disabled."""
    php = plugins.discover(PACKAGE, "SERVICE", ServiceType)["php"]
    roles = tuple(
        public.RoleView(
            name=role.name,
            title=role.title,
            description=role.description,
            minimum=role.minimum,
            maximum=role.maximum,
            initial=role.initial,
            scalable=role.scalable,
        )
        for role in php.roles
    )
    return (
        ServiceTypeView(
            name="php",
            title=php.title,
            description=php.description,
            icon=php.icon,
            roles=roles,
            settings=php.settings.model_json_schema(),
            takes_code=True,
        ),
        ServiceTypeView(
            name="kv",
            title="In-memory key-value store",
            description="Keeps values in memory, copied between nodes.",
            icon="database",
            roles=(
                public.RoleView(name="router", title="Router", minimum=1),
                public.RoleView(name="store", title="Store", minimum=1),
            ),
            settings=GenericSettings.model_json_schema(),
            commands=(public.CommandView(name="backup", title="Make a backup", arguments=Backup.model_json_schema()),),
        ),
        ServiceTypeView(
            name="mysql",
            title="SQL database",
            description="",
            icon="database",
            roles=(),
            settings={},
            enabled=False,
            reason="mariadbd is not installed here",
        ),
    )


def node(number: int, state: NodeState, *roles: str, kind: str = "agent", reason: str = "") -> NodeView:
    return NodeView.model_validate(
        {
            "id": f"ins-{number}",
            "kind": kind,
            "cloud": "local",
            "cloud_id": str(number),
            "address": f"127.20.0.{number - 15700}",
            "state": state,
            "roles": roles,
            "created": NOW - timedelta(minutes=11),
            "since": NOW - timedelta(minutes=5),
            "metrics": {"cpu": 0.12, "memory": 47185920.0},
            "reason": reason,
        }
    )


def service(
    number: int, name: str, kind: str, state: ServiceState, nodes: tuple[NodeView, ...], **more: Any
) -> ServiceView:
    actions = {
        ServiceState.INIT: ("start", "terminate"),
        ServiceState.RUNNING: ("stop", "scale", "configure"),
        ServiceState.ADAPTING: ("stop", "scale", "configure"),
        ServiceState.STOPPED: ("start", "terminate"),
        ServiceState.ERROR: ("start", "stop", "terminate"),
    }.get(state, ())
    fields: dict[str, Any] = {
        "id": f"svc-{number}",
        "name": name,
        "type": kind,
        "application": "app-1",
        "owner": "usr-1",
        "cloud": "local",
        "state": state,
        "since": NOW - timedelta(minutes=4),
        "created": NOW - timedelta(minutes=11),
        "generation": 3,
        "wanted": Wanted(roles={"proxy": 1, "web": 2, "php": 1}),
        "nodes": nodes,
        "actions": actions,
        **more,
    }
    return ServiceView(**fields)


class AccountSettings(Message):
    """A made-up kind of cloud, with a setting of each kind."""

    region: str = Field(pattern="^[a-z][a-z0-9-]{0,62}$")
    """Such as `north-1`."""
    access_key: str = ""
    """Id of the key."""
    secret_key: Secret
    """The key itself."""
    image: str = ""
    """What instances start from."""
    subnets: tuple[str, ...] = ()
    """Ids of the networks."""
    prices: dict[str, Decimal] = Field(default_factory=dict)
    """Price of an hour, by size."""
    spot: bool = False
    """Rent spare capacity."""
    bid: Decimal | None = None
    """Most to pay."""


CLOUD_TYPES = (
    public.CloudTypeView(
        name="north",
        title="North",
        description="Machines far in the north.",
        settings=AccountSettings.model_json_schema(),
    ),
)
SIZES = (
    public.SizeView(name="small", cores=1, memory=1 << 30, price=Decimal("0.0208"), default=True),
    public.SizeView(name="large", cores=8, memory=16 << 30, disk=40 << 30, price=Decimal("0.1664")),
)


def cost(hourly: str, total: str) -> Cost:
    return Cost(hourly={"USD": Decimal(hourly)}, total={"USD": Decimal(total)})


class FakeApi:
    """All that the pages show, as lists to be changed by tests."""

    def __init__(self) -> None:
        self.credits = 9994
        self.name = "Ada"
        self.calls: list[tuple[str, Mapping[str, str], Any]] = []
        self.listeners: set[asyncio.Queue[Live]] = set()
        self.fail: dict[str, Exception] = {}
        self.clouds = [
            CloudView(name="local", title="Local", driver="local", default=True, instances=7),
            CloudView(
                name="ec2", title="Amazon EC2", driver="ec2", enabled=False, reason="no credentials are configured"
            ),
        ]
        self.accounts = [
            public.CloudAccountView(name="local", driver="local", default=True, fixed=True, instances=21),
            public.CloudAccountView(
                name="north",
                driver="north",
                settings={"region": "north-1", "secret_key": "**********"},
                options=public.CloudOptions(title="The North", instances=10, user_instances=3),
                trouble="cloud north: no answer within 30 s",
                instances=4,
                sizes=SIZES,
            ),
        ]
        self.examination = public.Examination(
            findings=(
                public.FindingView(name="the endpoint", ok=True, detail="north-1.example.org"),
                public.FindingView(name="the credentials", ok=True),
            ),
            quota=(public.RoomView(name="instances", used=4, limit=20),),
            zones=("north-1a",),
        )
        url = {"application": "http://127.20.0.52:8080/"}
        operation = OperationView(
            id="op-2",
            service="svc-2",
            kind="scale",
            state=OperationState.RUNNING,
            done=2,
            total=3,
            message="2 of 3 nodes serving",
            created=NOW,
            deadline=NOW + timedelta(minutes=15),
            actor="ada",
        )
        manager_node = partial(node, state=NodeState.SERVING, kind="manager")
        self.services = [
            service(
                1,
                "New Php Service",
                "php",
                ServiceState.INIT,
                (manager_node(15751),),
                wanted=Wanted(roles={"proxy": 1, "web": 0, "php": 0}),
            ),
            service(
                2,
                "Guestbook",
                "php",
                ServiceState.ADAPTING,
                (
                    manager_node(15761).model_copy(update={"roles": ("sessions",)}),
                    node(15762, NodeState.SERVING, "proxy"),
                    node(15763, NodeState.SERVING, "web"),
                    node(15764, NodeState.BOOTING, "web"),
                    node(15765, NodeState.SERVING, "php"),
                    node(15766, NodeState.LOST, "php", reason="did not answer for 10 s"),
                ),
                urls=url,
                facts={"requests/s": "128", "response time": "12 ms"},
                operation=operation,
            ),
            service(
                3,
                "Shared shop",
                "php",
                ServiceState.RUNNING,
                (manager_node(15771), node(15772, NodeState.SERVING, "proxy", "web", "php")),
                urls=url,
                facts={"requests/s": "3"},
                application="app-2",
                wanted=Wanted(roles={"proxy": 1, "web": 0, "php": 0}),
            ),
            service(
                4,
                "Cache",
                "kv",
                ServiceState.ERROR,
                (
                    manager_node(15781),
                    node(15782, NodeState.DEGRADED, "router", "store"),
                    *(node(15783 + n, NodeState.SERVING, "store") for n in range(9)),
                ),
                reason="the cloud has no room for another instance",
                application="app-2",
                wanted=Wanted(roles={"router": 1, "store": 9}),
            ),
        ]
        self.operations = [
            operation,
            operation.model_copy(
                update={"id": "op-1", "kind": "start", "state": OperationState.DONE, "message": "", "finished": NOW}
            ),
            operation.model_copy(
                update={
                    "id": "op-0",
                    "kind": "activate",
                    "state": OperationState.FAILED,
                    "message": "",
                    "error": "code-abc123 is gone",
                    "finished": NOW,
                }
            ),
        ]
        self.code = [
            CodeVersionView(
                id="code-y3gOfi",
                filename="guestbook.zip",
                sha256="0" * 64,
                size=48213,
                created=NOW - timedelta(minutes=2),
                active=True,
            ),
            CodeVersionView(
                id="code-default",
                filename="code-default.tar.gz",
                sha256="1" * 64,
                size=912,
                created=NOW - timedelta(minutes=11),
            ),
        ]
        self.applications = [
            ApplicationView(id="app-1", name="default", created=NOW),
            ApplicationView(id="app-2", name="Shop", created=NOW),
            ApplicationView(id="app-3", name="Empty", created=NOW),
        ]
        self.tokens = [
            TokenView(
                id="tok-1", name="laptop", scopes=("read", "write"), created=NOW, expires=NOW + timedelta(days=90)
            )
        ]
        self.keys = [
            KeyView(
                id="key-1", name="laptop", fingerprint="SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8", created=NOW
            )
        ]

    def spread(self) -> None:
        """Enable a second cloud with sizes and prices, and have the second service on both."""
        north = CloudView(name="north", title="The North", driver="north", sizes=SIZES, instances=1, limit=3)
        self.clouds.insert(1, north)
        found = self.one("svc-2")
        nodes = [node.model_copy(update={"cost": cost("0", "0")}) for node in found.nodes]
        away = {"cloud": "north", "size": "small", "zone": "north-1a", "cost": cost("0.0208", "0.1352")}
        nodes[2] = nodes[2].model_copy(update=away)
        nodes[3] = nodes[3].model_copy(update={"meant_for": "north", "stage": "unpacking the engines"})
        wanted = found.wanted.model_copy(
            update={"running": True, "places": {"web": {"north": 2}}, "fallback": ("north",)}
        )
        more = {"nodes": tuple(nodes), "wanted": wanted, "cost": cost("0.0208", "12.5"), "actions": ("scale", "move")}
        self.services = [found.model_copy(update=more) if it.id == found.id else it for it in self.services]
        self.applications[0] = self.applications[0].model_copy(update={"cost": cost("0.0208", "12.5")})

    def me(self) -> UserView:
        return UserView(
            id="usr-1",
            username="ada",
            email="ada@example.org",
            first_name=self.name,
            last_name="Lovelace",
            affiliation="Analytical Engines",
            admin=True,
            credits=self.credits,
            created=NOW - timedelta(days=3),
        )

    def one(self, name: str) -> ServiceView:
        for item in self.services:
            if item.id == name:
                return item
        raise NotFoundError(f"there is no service {name}", value=name)

    def publish(self, event: Live) -> None:
        for queue in self.listeners:
            queue.put_nowait(event)

    def replace(self, changed: ServiceView) -> None:
        self.services = [changed if item.id == changed.id else item for item in self.services]
        self.publish(Live(kind="service", id=changed.id, service=changed))

    def points(self) -> tuple[MetricPoint, ...]:
        return tuple(
            MetricPoint(
                at=datetime.now(UTC) - timedelta(seconds=5 * (120 - n)),
                node=where,
                values={
                    "request_rate": 120 + 30 * sin(n / 9),
                    "error_rate": max(0.0, sin(n / 7) - 0.9),
                    "throughput": 2e6 + 5e5 * sin(n / 11),
                    "response_p50": 9 + sin(n / 5),
                    "response_p95": 22 + 4 * sin(n / 8),
                    "response_p99": 41 + 9 * sin(n / 6),
                }
                if not where
                else {"cpu": 0.2 + 0.1 * sin(n / 9), "memory": 4.7e7},
            )
            for n in range(120)
            for where in ("", "ins-15762")
        )

    def routes(self) -> list[web.RouteDef]:
        found = []
        for name, endpoint in vars(public).items():
            if isinstance(endpoint, Endpoint):
                handler = getattr(self, f"on_{name.lower()}", None)
                found.append(rpc.route(endpoint, self._recorded(name, handler), self._authenticate))
        return found

    def _recorded(self, name: str, handler: Any) -> Any:
        async def serve(call: Any, body: Any = None) -> Any:
            self.calls.append((name, dict(call.params), body))
            if name in self.fail:
                raise self.fail[name]
            if handler is None:
                raise ConflictError(f"the fake does not answer {name}")
            answer = handler(call, body)
            return await answer if asyncio.iscoroutine(answer) else answer

        return serve

    async def _authenticate(self, request: web.Request, endpoint: Endpoint) -> str:
        if Who.ANYONE in endpoint.allow or request.headers.get("Authorization") == f"Bearer {TOKEN}":
            return "ada"
        raise NotAuthenticatedError("the session has ended")

    # -- answers

    def on_get_version(self, *_: Any) -> Message:
        return public.Version(version="3.0.0", deployment="dep-test", ssh_port=9922)

    def on_get_captcha(self, *_: Any) -> Message:
        challenge = create_challenge("PBKDF2/SHA-256", 10, hmac_secret="fake")
        return public.Captcha(challenge=challenge.to_dict())

    def on_login(self, _: Any, body: public.Credentials) -> Message:
        if body.password.get_secret_value() != "right password":
            raise NotAuthenticatedError("wrong user name or password")
        return public.Session(token=SecretStr(TOKEN), expires=NOW + timedelta(hours=8), user=self.me())

    def on_logout(self, *_: Any) -> Message:
        return Ack()

    def on_get_me(self, *_: Any) -> Message:
        return self.me()

    def on_list_types(self, *_: Any) -> Message:
        return public.ServiceTypes(items=kinds())

    def on_list_clouds(self, *_: Any) -> Message:
        return public.Clouds(items=tuple(self.clouds))

    def on_list_cloud_types(self, *_: Any) -> Message:
        return public.CloudTypes(items=CLOUD_TYPES)

    def on_list_cloud_accounts(self, *_: Any) -> Message:
        return public.CloudAccounts(items=tuple(self.accounts))

    def on_add_cloud(self, _: Any, body: public.CloudForm) -> Message:
        if body.name in {account.name for account in self.accounts}:
            raise ConflictError(f"there is a cloud '{body.name}'", value=body.name, hint="choose another name")
        self.accounts.append(public.CloudAccountView(**dict(body)))
        return self.accounts[-1]

    def on_change_cloud(self, call: Any, body: public.CloudForm) -> Message:
        made = public.CloudAccountView(**dict(body))
        self.accounts = [made if account.name == call.params["cloud"] else account for account in self.accounts]
        return made

    def on_remove_cloud(self, call: Any, _: Any) -> Message:
        self.accounts = [account for account in self.accounts if account.name != call.params["cloud"]]
        return Ack()

    def on_examine_cloud(self, *_: Any) -> Message:
        return self.examination

    def on_try_cloud(self, *_: Any) -> Message:
        return self.examination

    def on_move(self, call: Any, _: Any) -> Message:
        return self._begin(call, "move")

    def on_list_applications(self, *_: Any) -> Message:
        return public.Applications(items=tuple(self.applications))

    def on_list_services(self, *_: Any) -> Message:
        return public.Services(items=tuple(self.services))

    def on_get_service(self, call: Any, _: Any) -> Message:
        return self.one(call.params["service"])

    def on_rename_service(self, call: Any, body: public.Rename) -> Message:
        changed = self.one(call.params["service"]).model_copy(update={"name": body.name})
        self.replace(changed)
        return changed

    def on_create_service(self, _: Any, body: public.CreateService) -> Message:
        made = service(
            9,
            body.name or "New Php Service",
            body.type,
            ServiceState.INIT,
            (node(15799, NodeState.BOOTING, kind="manager"),),
        )
        self.services.append(made)
        return made

    def _begin(self, call: Any, kind: str) -> OperationView:
        return self.operations[0].model_copy(update={"kind": kind, "service": call.params["service"]})

    def on_start(self, call: Any, _: Any) -> Message:
        return self._begin(call, "start")

    def on_stop(self, call: Any, _: Any) -> Message:
        return self._begin(call, "stop")

    def on_terminate(self, call: Any, _: Any) -> Message:
        return self._begin(call, "terminate")

    def on_scale(self, call: Any, _: Any) -> Message:
        return self._begin(call, "scale")

    def on_change_settings(self, call: Any, _: Any) -> Message:
        return self._begin(call, "configure")

    def on_activate_code(self, call: Any, _: Any) -> Message:
        return self._begin(call, "activate")

    async def on_upload_code(self, call: Any, _: Any) -> Message:
        size = 0
        async for chunk in call.chunks():
            size += len(chunk)
        made = CodeVersionView(
            id=f"code-up{len(self.code)}", filename=call.http.query["filename"], sha256="2" * 64, size=size, created=NOW
        )
        self.code.insert(0, made)
        return made

    def on_list_code(self, *_: Any) -> Message:
        return manager.CodeVersions(items=tuple(self.code))

    def on_list_operations(self, call: Any, _: Any) -> Message:
        wanted = call.http.query.get("service")
        return public.Operations(items=tuple(item for item in self.operations if item.service == wanted))

    def on_get_states(self, *_: Any) -> Message:
        return StateHistory(
            changes=(
                StateChange(state=ServiceState.INIT, at=NOW - timedelta(minutes=11), actor="ada"),
                StateChange(state=ServiceState.PROLOGUE, at=NOW - timedelta(minutes=10), actor="ada", reason="start"),
                StateChange(state=ServiceState.RUNNING, at=NOW - timedelta(minutes=9), actor="manager"),
            )
        )

    def on_get_history(self, *_: Any) -> Message:
        return public.History(
            items=(
                EventView(
                    id=2,
                    at=NOW,
                    kind="scale",
                    actor="ada",
                    service="svc-2",
                    message="web +1",
                    before='{"web":1}',
                    after='{"web":2}',
                ),
            ),
            next="2",
        )

    def on_get_metrics(self, *_: Any) -> Message:
        return public.Metrics(points=self.points())

    def on_list_logs(self, *_: Any) -> Message:
        return manager.ManagerLogs(
            logs=(
                LogName(node="manager", name="manager.log", size=2048),
                LogName(node="ins-15762", name="haproxy.out", size=100),
            )
        )

    async def on_follow_log(self, call: Any, _: Any) -> web.StreamResponse:
        text = "".join(f"2026-07-24T12:00:{n:02d}Z info     stage-applied  stage={n} nodes=3\n" for n in range(60))
        text += '{"event": "enrolled", "level": "info", "kind": "agent", "timestamp": "2026-11-23T08:02:11.959046Z"}\n'
        async with rpc.EventStream(call.http) as stream:
            await stream.send(LogChunk(text=text, next=len(text), size=len(text)))
            await asyncio.Event().wait()
        return stream.response

    async def on_get_events(self, call: Any, _: Any) -> web.StreamResponse:
        queue: asyncio.Queue[Live] = asyncio.Queue()
        self.listeners.add(queue)
        try:
            async with rpc.EventStream(call.http) as stream:
                await stream.send(Live(kind="hello"))
                while True:
                    await stream.send(await queue.get())
        finally:
            self.listeners.discard(queue)

    def on_list_tokens(self, *_: Any) -> Message:
        return public.Tokens(items=tuple(self.tokens))

    def on_create_token(self, _: Any, body: public.CreateToken) -> Message:
        made = TokenView(
            id="tok-2",
            name=body.name,
            scopes=body.scopes,
            created=NOW,
            expires=NOW,
            secret=SecretStr("conpaas-secret-once"),
        )
        self.tokens.append(made.model_copy(update={"secret": None}))
        return made

    def on_list_keys(self, *_: Any) -> Message:
        return public.Keys(items=tuple(self.keys))

    def on_list_users(self, *_: Any) -> Message:
        other = self.me().model_copy(
            update={"id": "usr-2", "username": "gpierre", "admin": False, "disabled": True, "credits": 12}
        )
        return public.Users(items=(self.me(), other))

    def on_grant(self, call: Any, body: public.Grant) -> Message:
        return self.me().model_copy(
            update={"id": call.params["user"], "username": "gpierre", "credits": 12 + body.amount}
        )

    def on_list_instances(self, *_: Any) -> Message:
        rows = [
            InstanceRow(**dict(item), service=of.id, owner=of.owner, charged=2)
            for of in self.services
            for item in of.nodes
        ]
        return public.InstanceRows(items=tuple(rows))

    def on_run_command(self, *_: Any) -> Message:
        return manager.CommandAnswer(result={"kept": 3, "where": "<b>here</b>"})
