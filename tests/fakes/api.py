"""A director as its clients see it: the public API on what it keeps in memory, with knobs for what goes wrong."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from aiohttp import web
from pydantic import SecretStr

from conpaas.core import rpc
from conpaas.core.errors import ConflictError, NotAuthenticatedError, NotFoundError
from conpaas.core.messages import manager, public
from conpaas.core.messages.base import Endpoint
from conpaas.core.messages.internal import StateHistory, UploadQuery
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
from conpaas.core.rpc import Call
from conpaas.core.states import NodeState, OperationState, ServiceState

TOKEN = "secret-token"
THEN = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
SETTINGS = {
    "properties": {
        "memory_limit": {"type": "string", "default": "128M"},
        "max_execution_time": {"type": "integer", "default": 30},
        "display_errors": {"type": "boolean"},
        "php_version": {"$ref": "#/$defs/Version"},
    },
    "$defs": {"Version": {"type": "string", "enum": ["8.2"]}},
}


CLOUD_SETTINGS = {
    "properties": {
        "region": {"type": "string", "description": "Such as `north-1`."},
        "secret_key": {"type": "string", "format": "password", "writeOnly": True},
        "token": {"type": "string", "format": "password", "writeOnly": True, "default": ""},
        "subnets": {"type": "array", "items": {"type": "string"}, "default": []},
        "networks": {"type": "array", "items": {"type": "integer"}, "default": []},
        "hosts": {"type": "array", "items": {"$ref": "#/$defs/Host"}, "default": []},
        "bid": {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}], "default": None},
        "spot": {"type": "boolean", "default": False},
    },
    "$defs": {"Host": {"type": "object", "properties": {"address": {"type": "string"}}}},
    "required": ["region", "secret_key"],
}
GIB = 1 << 30
SIZES = (
    public.SizeView(name="small", cores=1, memory=GIB, price=Decimal("0.0208"), currency="EUR", default=True),
    public.SizeView(name="large", cores=8, memory=16 * GIB, disk=40 * GIB, price=Decimal(0), currency="EUR"),
)


def node(number: int, *roles: str, kind: str = "agent", state: NodeState = NodeState.SERVING) -> NodeView:
    return NodeView.model_validate(
        {
            "id": f"ins-{number}",
            "kind": kind,
            "cloud": "local",
            "cloud_id": f"i-{number}",
            "address": f"127.9.0.{number}",
            "state": state,
            "roles": roles,
            "created": THEN,
            "since": THEN,
        }
    )


class FakeApi:
    """One user's director."""

    def __init__(self) -> None:
        self.services: dict[str, ServiceView] = {}
        self.operations: dict[str, OperationView] = {}
        self.code: dict[str, list[CodeVersionView]] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[tuple[str, dict[str, str], Any]] = []
        """Path, headers and body of every call that changes something."""
        self.live: list[public.Live] = []
        """What each stream of events says before it is cut off."""
        self.silent = False
        """Whether a stream of events then stays open and says nothing more."""
        self.over = asyncio.Event()
        self.polls = 2
        """How often an operation is asked for before it is done."""
        self.fail_with: str | None = None
        """The error with which the next operations end."""
        self.accounts = {
            "north": public.CloudAccountView(
                name="north",
                driver="north",
                settings={"region": "north-1", "secret_key": "**********"},
                options=public.CloudOptions(title="The North", prices={"small": Decimal("0.02")}, user_instances=5),
                sizes=SIZES,
                instances=4,
            )
        }
        self.examination = public.Examination(
            findings=(
                public.FindingView(name="the endpoint", ok=True, detail="north-1.example.org"),
                public.FindingView(name="the credentials", ok=True),
            ),
            quota=(public.RoomView(name="cores", used=4, limit=20),),
        )
        self.lose_answers = 0
        """How many of the next answers are lost on their way, after the command took effect."""
        self.url = ""

    def add(self, name: str, state: ServiceState = ServiceState.RUNNING, **more: Any) -> ServiceView:
        service = ServiceView.model_validate(
            {
                "id": f"svc-{len(self.services) + 1}",
                "name": name,
                "type": "php",
                "application": "app-1",
                "owner": "usr-1",
                "cloud": "local",
                "state": state,
                "since": THEN,
                "created": THEN,
                "generation": 7,
                "wanted": Wanted(roles={"proxy": 1, "web": 1}, settings={"memory_limit": "128M"}, code="code-default"),
                "nodes": (node(1, kind="manager"), node(2, "proxy", "php"), node(3, "web")),
                "urls": {"application": "http://127.9.0.2:8080/"},
                **more,
            }
        )
        self.services[service.id] = service
        self.code[service.id] = [_version("code-default", active=True)]
        return service

    def routes(self) -> list[web.RouteDef]:
        """Return a route for every method that is called as an endpoint in lower case."""
        found = []
        for name, endpoint in vars(public).items():
            handler = getattr(self, name.lower(), None) if isinstance(endpoint, Endpoint) else None
            if handler is not None:
                found.append(rpc.route(endpoint, handler, self._authenticate))
        return found

    async def _authenticate(self, request: web.Request, endpoint: Endpoint) -> None:
        open_to_all = endpoint.path in {"/api/v1/version", "/api/v1/login"}
        if not open_to_all and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise NotAuthenticatedError("who are you?")

    # -- account

    async def get_version(self, call: Call[None]) -> public.Version:
        return public.Version(version="3", deployment="dep-1")

    async def login(self, call: Call[None], body: public.Credentials) -> public.Session:
        if body.password.get_secret_value() != "right":
            raise NotAuthenticatedError("wrong user name or password", hint="try again")
        return public.Session(token=SecretStr(TOKEN), expires=THEN, user=self._user())

    async def logout(self, call: Call[None]) -> Ack:
        return Ack()

    async def get_me(self, call: Call[None]) -> public.UserView:
        return self._user()

    async def list_users(self, call: Call[None]) -> public.Users:
        return public.Users(items=(self._user(),))

    async def grant(self, call: Call[None], body: public.Grant) -> public.UserView:
        return self._user().model_copy(update={"credits": 9999 + body.amount})

    async def create_token(self, call: Call[None], body: public.CreateToken) -> public.TokenView:
        return public.TokenView(
            id="tok-1", name=body.name, scopes=body.scopes, created=THEN, expires=THEN, secret=SecretStr("s3cret")
        )

    def _user(self) -> public.UserView:
        return public.UserView(id="usr-1", username="ada", credits=9999, created=THEN)

    # -- catalogue

    async def list_types(self, call: Call[None]) -> public.ServiceTypes:
        roles = tuple(public.RoleView(name=name, title=name) for name in ("proxy", "web", "php"))
        view = public.ServiceTypeView(name="php", title="PHP", description="PHP", roles=roles, settings=SETTINGS)
        return public.ServiceTypes(items=(view,))

    async def list_clouds(self, call: Call[None]) -> public.Clouds:
        off = public.CloudView(name="ec2", title="EC2", driver="ec2", enabled=False, reason="no account")
        local = public.CloudView(name="local", title="Local", driver="local", default=True, instances=3, limit=10)
        return public.Clouds(items=(local.model_copy(update={"sizes": SIZES}), off))

    async def list_cloud_types(self, call: Call[None]) -> public.CloudTypes:
        kind = public.CloudTypeView(name="north", title="North", description="Cold.", settings=CLOUD_SETTINGS)
        return public.CloudTypes(items=(kind,))

    async def list_cloud_accounts(self, call: Call[None]) -> public.CloudAccounts:
        return public.CloudAccounts(items=tuple(self.accounts.values()))

    async def add_cloud(self, call: Call[None], body: public.CloudForm) -> public.CloudAccountView:
        self._record(call, body)
        return public.CloudAccountView(**dict(body))

    async def change_cloud(self, call: Call[None], body: public.CloudForm) -> public.CloudAccountView:
        self._record(call, body)
        return public.CloudAccountView(**dict(body))

    async def remove_cloud(self, call: Call[None]) -> Ack:
        self._record(call, None)
        return Ack()

    async def examine_cloud(self, call: Call[None]) -> public.Examination:
        return self.examination

    async def try_cloud(self, call: Call[None], body: public.CloudForm) -> public.Examination:
        self._record(call, body)
        return self.examination

    async def list_applications(self, call: Call[None]) -> public.Applications:
        cost = Cost(hourly={"USD": Decimal("0.04")}, total={"USD": Decimal("1.5")})
        shop = public.ApplicationView(id="app-1", name="shop", created=THEN, services=1, cost=cost)
        return public.Applications(items=(shop,))

    # -- services

    async def list_services(self, call: Call[None]) -> public.Services:
        """Give pages of two."""
        everything = list(self.services.values())
        start = int(call.query(public.ServiceQuery).cursor or 0)
        following = str(start + 2) if start + 2 < len(everything) else None
        return public.Services(items=tuple(everything[start : start + 2]), next=following)

    async def get_service(self, call: Call[None]) -> ServiceView:
        return self._service(call)

    async def create_service(self, call: Call[None], body: public.CreateService) -> ServiceView:
        self._record(call, body)
        return self.add(body.name or "php-1", ServiceState.INIT)

    async def rename_service(self, call: Call[None], body: public.Rename) -> ServiceView:
        return self._service(call).model_copy(update={"name": body.name})

    async def start(self, call: Call[None], body: public.Keyed) -> OperationView | web.StreamResponse:
        return self._operation(call, "start", body)

    async def stop(self, call: Call[None], body: public.Keyed) -> OperationView | web.StreamResponse:
        return self._operation(call, "stop", body)

    async def terminate(self, call: Call[None]) -> OperationView | web.StreamResponse:
        return self._operation(call, "terminate", None)

    async def scale(self, call: Call[None], body: public.Scale) -> OperationView | web.StreamResponse:
        return self._operation(call, "scale", body)

    async def move(self, call: Call[None], body: public.Move) -> OperationView | web.StreamResponse:
        return self._operation(call, "move", body)

    async def change_settings(
        self, call: Call[None], body: public.ChangeSettings
    ) -> OperationView | web.StreamResponse:
        return self._operation(call, "configure", body)

    async def change_scripts(self, call: Call[None], body: public.Scripts) -> OperationView | web.StreamResponse:
        return self._operation(call, "configure", body)

    async def get_nodes(self, call: Call[None]) -> manager.Nodes:
        return manager.Nodes(nodes=self._service(call).nodes)

    async def get_states(self, call: Call[None]) -> StateHistory:
        return StateHistory(changes=(StateChange(state=ServiceState.INIT, at=THEN, actor="user:ada"),))

    # -- code

    async def list_code(self, call: Call[None]) -> manager.CodeVersions:
        return manager.CodeVersions(items=tuple(self.code[self._service(call).id]))

    async def upload_code(self, call: Call[None]) -> CodeVersionView:
        words = call.query(UploadQuery)
        content = b"".join([chunk async for chunk in call.chunks()])
        version = _version(f"code-{len(self.blobs) + 1}").model_copy(
            update={"filename": words.filename, "size": len(content), "description": words.description}
        )
        self.blobs[version.id] = content
        self.code[self._service(call).id].insert(0, version)
        return version

    async def download_code(self, call: Call[None]) -> web.Response:
        return web.Response(body=self.blobs[call.params["version"]])

    async def delete_code(self, call: Call[None]) -> Ack:
        raise ConflictError("code-default is active", hint="activate another one first")

    async def activate_code(self, call: Call[None], body: public.Keyed) -> OperationView | web.StreamResponse:
        return self._operation(call, "activate", body)

    # -- operations

    async def get_operation(self, call: Call[None]) -> OperationView:
        operation = self.operations[call.params["operation"]]
        if operation.state is OperationState.RUNNING:
            operation = operation.model_copy(
                update={"done": operation.done + 1, "message": f"{operation.done + 1} of {self.polls} nodes serving"}
            )
            if operation.done >= self.polls:
                failed = self.fail_with is not None
                ended = {
                    "state": OperationState.FAILED if failed else OperationState.DONE,
                    "error": self.fail_with or "",
                }
                operation = operation.model_copy(update=ended)
            self.operations[operation.id] = operation
        return operation

    async def list_operations(self, call: Call[None]) -> public.Operations:
        return public.Operations(items=tuple(self.operations.values()))

    async def cancel_operation(self, call: Call[None]) -> OperationView:
        cancelled = self.operations[call.params["operation"]].model_copy(update={"state": OperationState.CANCELLED})
        self.operations[cancelled.id] = cancelled
        return cancelled

    async def get_history(self, call: Call[None]) -> public.History:
        return public.History(items=(EventView(id=1, at=THEN, kind="service-created", actor="user:ada"),))

    # -- watching

    async def get_events(self, call: Call[None]) -> web.StreamResponse:
        async with rpc.EventStream(call.http) as stream:
            for event in self.live:
                await stream.send(event)
            if self.silent:
                await self.over.wait()
        return stream.response

    async def list_logs(self, call: Call[None]) -> manager.ManagerLogs:
        return manager.ManagerLogs(
            logs=(LogName(node="manager", name="manager.log", size=12), LogName(node="ins-2", name="php.error.log"))
        )

    async def read_log(self, call: Call[None]) -> LogChunk:
        return LogChunk(text=f"{call.params['node']} {call.params['name']} says hello\n", next=12, size=12)

    async def follow_log(self, call: Call[None]) -> web.StreamResponse:
        """Give one line per connection, so that the client must come back for the next."""
        offset = max(0, call.query(public.FollowQuery).offset)
        async with rpc.EventStream(call.http) as stream:
            await stream.send(LogChunk(text=f"line at {offset}\n", next=offset + 10, size=offset + 10))
        return stream.response

    async def get_metrics(self, call: Call[None]) -> public.Metrics:
        return public.Metrics(points=(MetricPoint(at=THEN, values={"request_rate": 12.5}),))

    # -- inside

    def _service(self, call: Call[None]) -> ServiceView:
        service = self.services.get(call.params["service"])
        if service is None:
            raise NotFoundError("no such thing here", hint="'conpaas ls' shows what is yours")
        return service

    def _record(self, call: Call[None], body: Any) -> None:
        self.calls.append((call.http.path, dict(call.http.headers), body))

    def _operation(self, call: Call[None], kind: str, body: Any) -> OperationView | web.StreamResponse:
        self._record(call, body)
        key = getattr(body, "key", None) or f"{kind}-{len(self.operations)}"
        operation = self.operations.get(key) or OperationView(
            id=key,
            service=self._service(call).id,
            kind=kind,
            state=OperationState.RUNNING,
            total=self.polls,
            created=THEN,
            deadline=THEN + timedelta(minutes=15),
            actor="user:ada",
        )
        self.operations[key] = operation
        if self.lose_answers:
            self.lose_answers -= 1
            assert call.http.transport is not None
            call.http.transport.abort()
        return operation


@asynccontextmanager
async def serving(api: FakeApi) -> AsyncIterator[FakeApi]:
    """Serve `api` in this loop; its `url` says where."""
    app = web.Application(middlewares=[rpc.errors_to_replies])
    app.add_routes(api.routes())
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield api
    finally:
        api.over.set()
        await runner.cleanup()


@contextmanager
def serving_in_thread(api: FakeApi) -> Iterator[FakeApi]:
    """Serve `api` in a loop of its own: for clients that have a loop of their own as well."""
    ready, over = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with serving(api):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(45)
    try:
        yield api
    finally:
        loops[0].call_soon_threadsafe(over.set)
        thread.join(45)


def _version(name: str, *, active: bool = False) -> CodeVersionView:
    filename = f"{name}.tar.gz"
    return CodeVersionView(id=name, filename=filename, sha256="0" * 64, size=1536, created=THEN, active=active)
