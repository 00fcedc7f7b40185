"""A whole deployment in one event loop: a director that keeps its record in memory, real managers, real agents.

The director's knobs break what can break: instances that never boot, are refused, or vanish; answers that get lost.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

from aiohttp import web
from pydantic import SecretStr

from conpaas.agent.app import Agent
from conpaas.core import keymaker, rpc, tls
from conpaas.core.clock import SystemClock
from conpaas.core.errors import PeerError, StaleGenerationError
from conpaas.core.identity import Identity, server_context
from conpaas.core.member import authenticator
from conpaas.core.messages import internal
from conpaas.core.messages.internal import Context
from conpaas.core.messages.model import Ack, CodeVersionView, NodeView, OperationView, ServiceRecord, Wanted
from conpaas.core.process import Process, Site
from conpaas.core.rpc import Call
from conpaas.core.states import NodeState, OperationState, ServiceState
from conpaas.core.timings import Timings
from conpaas.core.trust import Caller, Target
from conpaas.manager.app import Manager

KEYS = keymaker  # while it is loaded, agents and managers of this process make their keys by themselves
QUICK = Timings(
    node_boot_timeout_s=60.0,
    boot_poll_s=0.02,
    health_period_s=0.1,
    node_silent_s=45.0,
    metrics_period_s=0.2,
    drain_s=0.2,
    retry_delays_s=(0.1, 0.2, 0.5),
    script_timeout_s=45.0,
)
"""Short periods, and long deadlines: what a test wants to be too late, it makes late by `FakeDirector.clock`."""


class Ahead(SystemClock):
    """The system's clock, put forward by hand: sleeping takes its time, deadlines come when the test says so."""

    def __init__(self) -> None:
        self._by_s = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self._by_s)

    def monotonic(self) -> float:
        return super().monotonic() + self._by_s

    def advance(self, seconds: float) -> None:
        self._by_s += seconds


class FakeDirector(Process):
    """The director as one service's manager sees it."""

    name = "director"

    def __init__(self, directory: Path, address: Callable[[], str], *, service_type: str = "echo") -> None:
        super().__init__()
        self.directory, self._address = directory, address
        self.authority = tls.Authority.create("dep-test")
        self.wanted = Wanted(roles={"front": 1, "back": 0}, cloud="test")
        self.generation, self.epoch = 1, 1
        self.state = ServiceState.INIT
        self.states: list[ServiceState] = [self.state]
        self.nodes: dict[str, NodeView] = {}
        self.deleted: dict[str, internal.Gone] = {}
        self.reports: list[internal.Report] = []
        self.code: list[CodeVersionView] = []
        self.blobs: dict[str, bytes] = {}
        self.keys: dict[str, tuple[str, ...]] = {}
        self.boot_timeout_s = QUICK.node_boot_timeout_s
        self.never_boot = 0
        """So many of the next instances never boot."""
        self.refuse = 0
        self.lose_answers = 0
        """So many of the next requests for instances take effect, but their answers are lost."""
        self.silent: set[str] = set()
        """Instances that exist for their cloud although their agents do not answer."""
        self.clock = Ahead()
        """The managers' clock."""
        self._numbers = itertools.count(1)
        self.agents: dict[str, tuple[Agent, asyncio.Task[None]]] = {}
        self.service_type = service_type
        self.manager: tuple[Manager, asyncio.Task[None]] | None = None
        self._managers: list[tuple[Manager, asyncio.Task[None]]] = []

    async def open(self, stack: AsyncExitStack) -> list[Site]:
        key, csr = tls.make_key_and_csr()
        certificate = self.authority.sign(csr, Identity.director("dep-test"), lifetime_s=3600)
        pair, ca = self.directory / "director.pem", self.directory / "ca.crt"
        pair.write_bytes(key + certificate)
        ca.write_bytes(self.authority.certificate_pem)
        stack.push_async_callback(self.end_all)
        check = authenticator("dep-test", lambda _: Target(owner="u", service="svc-1", epoch=self.epoch))
        serve = partial(rpc.route, authenticate=check)
        routes = [
            serve(internal.ENROL, self.enrol),
            serve(internal.RENEW, self.renew),
            serve(internal.READ_RECORD, self.read_record),
            serve(internal.CHANGE_SPEC, self.change_spec),
            serve(internal.REQUEST_INSTANCES, self.request_instances),
            serve(internal.DELETE_INSTANCE, self.delete_instance),
            serve(internal.DESCRIBE_INSTANCE, self.describe_instance),
            serve(internal.REPORT, self.report),
            serve(internal.DOWNLOAD_BLOB, self.download_blob),
        ]
        return [Site("127.0.0.1", 0, routes, server_context(pair, pair, ca, require_client=False))]

    # -- what tests do ----------------------------------------------------------------------------------------------

    def want(self, **change: object) -> None:
        """Change what is wanted, as the director's own commands do."""
        self.wanted = self.wanted.model_copy(update=change)
        self.generation += 1
        started = {ServiceState.INIT: ServiceState.PROLOGUE, ServiceState.STOPPED: ServiceState.PROLOGUE}
        self.state = started.get(self.state, self.state) if self.wanted.running else ServiceState.EPILOGUE

    async def until(self, check: Callable[[], object], timeout_s: float = 45.0) -> None:
        """Wait until `check` holds."""
        try:
            async with asyncio.timeout(timeout_s):
                while not check():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not reached: {self.reports[-1:]}, {self.nodes}") from None

    async def until_state(self, state: ServiceState) -> None:
        await self.until(
            lambda: self.state is state and self.reports and self.reports[-1].generation == self.generation
        )

    async def give_up_one(self) -> None:
        """Let the boot time-out pass, as soon as nothing boots any more but instances that never will."""
        given_up = sum(gone.failed for gone in self.deleted.values())
        await self.until(lambda: (booting := self._booting()) and not booting & self.agents.keys())
        self.clock.advance(self.boot_timeout_s)
        await self.until(lambda: sum(gone.failed for gone in self.deleted.values()) > given_up)

    def _booting(self) -> set[str]:
        return {node.id for node in self.nodes.values() if node.state is NodeState.BOOTING}

    def serving_nodes(self) -> list[NodeView]:
        return [node for node in self.nodes.values() if node.state is NodeState.SERVING]

    def context(
        self, kind: Literal["manager", "agent"], instance: str, address: str, epoch: int | None = None
    ) -> Context:
        return Context(
            deployment="dep-test",
            kind=kind,
            instance=instance,
            service="svc-1",
            service_type=self.service_type,
            owner="u",
            epoch=epoch or self.epoch,
            address=address,
            director=f"https://127.0.0.1:{self.ports[0]}",
            ca=self.authority.certificate_pem.decode(),
            token=SecretStr(f"{kind} {instance}"),
            timings=QUICK.model_copy(update={"node_boot_timeout_s": self.boot_timeout_s}),
        )

    async def start_manager(self) -> Manager:
        """Start a manager at the current epoch, in a folder that a second start finds again."""
        folder = self.directory / f"manager-{self.epoch}"
        folder.mkdir(exist_ok=True)
        manager = Manager(self.context("manager", f"m-{self.epoch}", self._address()), folder, clock=self.clock)
        self.manager = (manager, asyncio.create_task(manager.run(signals=False)))
        self._managers.append(self.manager)
        return manager

    async def end_manager(self) -> None:
        """Let the manager end as if it were killed: nothing is said, nothing cleaned."""
        if self.manager is not None:
            await _end(*self.manager)
            self.manager = None

    async def start_agent(self, instance: str) -> Agent:
        folder = self.directory / instance
        folder.mkdir(exist_ok=True)
        agent = Agent(self.context("agent", instance, self.nodes[instance].address), folder)
        self.agents[instance] = (agent, asyncio.create_task(agent.run(signals=False)))
        return agent

    async def end_agent(self, instance: str, *, with_engines: bool = False) -> None:
        """Let an agent's daemon end; with its engines, as if the instance were destroyed."""
        agent, task = self.agents.pop(instance)
        if with_engines:
            await agent.roles.stop_all(0)
        await _end(agent, task)

    async def end_all(self) -> None:
        for manager, task in self._managers:
            await _end(manager, task)
            await manager.roles.stop_all(0)
        for instance in list(self.agents):
            await self.end_agent(instance, with_engines=True)

    # -- what the manager asks --------------------------------------------------------------------------------------

    async def enrol(self, _: Call[Caller], body: internal.Enrol) -> internal.Certificate:
        kind, instance = body.token.get_secret_value().split()
        identity = (
            Identity.manager("dep-test", "svc-1", int(instance.removeprefix("m-")), instance)
            if kind == "manager"
            else Identity.agent("dep-test", "svc-1", instance)
        )
        return self._certify(body.csr, identity)

    async def renew(self, call: Call[Caller], body: internal.Renew) -> internal.Certificate:
        assert call.caller.instance is not None
        return self._certify(body.csr, Identity.agent("dep-test", "svc-1", call.caller.instance))

    def _certify(self, csr: str, identity: Identity) -> internal.Certificate:
        certificate = self.authority.sign(csr.encode(), identity, lifetime_s=3600)
        return internal.Certificate(certificate=certificate.decode(), renew_in_s=2400)

    async def read_record(self, _: Call[Caller]) -> ServiceRecord:
        return ServiceRecord(
            id="svc-1",
            name="test",
            type=self.service_type,
            owner="u",
            state=self.state,
            generation=self.generation,
            epoch=self.epoch,
            wanted=self.wanted,
            nodes=tuple(node for node in self.nodes.values() if node.state is not NodeState.GONE),
            code=tuple(self.code),
            seed=SecretStr("seed"),
            cloud=self.wanted.cloud,
        )

    async def change_spec(self, _: Call[Caller], body: internal.ChangeSpec) -> OperationView:
        if body.generation != self.generation:
            raise StaleGenerationError("changed meanwhile")
        self.want(**dict(body.wanted))
        now = datetime.now(UTC)
        return OperationView(
            id="op-1",
            service="svc-1",
            kind=body.kind,
            state=OperationState.RUNNING,
            generation=self.generation,
            created=now,
            deadline=now + timedelta(minutes=5),
        )

    async def request_instances(self, _: Call[Caller], body: internal.RequestInstances) -> internal.Instances:
        if body.key not in self.keys:
            self.keys[body.key] = tuple([await self._make(body.cloud) for _ in range(body.count)])
        if self.lose_answers:
            self.lose_answers -= 1
            raise PeerError("the answer got lost")
        return internal.Instances(items=tuple(self.nodes[node] for node in self.keys[body.key]))

    async def _make(self, cloud: str) -> str:
        node = f"i-{next(self._numbers)}"
        now = self.clock.now()
        view = NodeView(
            id=node,
            kind="agent",
            cloud=cloud,
            meant_for=cloud,
            address=self._address(),
            state=NodeState.BOOTING,
            created=now,
            since=now,
        )
        self.nodes[node] = view
        if self.refuse:
            self.refuse -= 1
            self.nodes[node] = view.model_copy(update={"state": NodeState.GONE, "reason": "no capacity"})
        elif self.never_boot:
            self.never_boot -= 1
        else:
            await self.start_agent(node)
        return node

    async def delete_instance(self, call: Call[Caller], body: internal.Gone) -> Ack:
        instance = call.params["instance"]
        self.deleted[instance] = body
        self.nodes.pop(instance, None)
        if instance in self.agents:
            await self.end_agent(instance, with_engines=True)
        return Ack()

    async def describe_instance(self, call: Call[Caller]) -> NodeView:
        node = self.nodes[call.params["instance"]]
        ended = node.id not in self.agents and node.id not in self.silent
        return node.model_copy(update={"state": NodeState.LOST if ended else node.state})

    async def report(self, _: Call[Caller], body: internal.Report) -> internal.ReportAck:
        self.reports.append(body)
        if body.generation == self.generation and body.state is not self.state:
            self.state = body.state
            self.states.append(body.state)
        for node in body.nodes:
            if node.id in self.nodes and self.nodes[node.id].state is not NodeState.LOST:
                update = {"state": node.state, "roles": node.roles, "reason": node.reason}
                self.nodes[node.id] = self.nodes[node.id].model_copy(update=update)
        return internal.ReportAck(generation=self.generation)

    async def download_blob(self, call: Call[Caller]) -> web.Response:
        return web.Response(body=self.blobs[call.params["sha256"]])


async def _end(process: Process, task: asyncio.Task[None]) -> None:
    """Cancel a process, though not while it opens its ports: asyncio would lose them."""
    ready = asyncio.create_task(process.ready.wait())
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@asynccontextmanager
async def deployment(directory: Path, address: Callable[[], str]) -> AsyncIterator[FakeDirector]:
    """Run a director with a manager, until the end of the block."""
    director = FakeDirector(directory, address)
    task = asyncio.create_task(director.run(signals=False))
    ready = asyncio.create_task(director.ready.wait())
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    await director.start_manager()
    try:
        yield director
    finally:
        director.stop.set()
        await task
