"""The agent: the daemon on every node, obeying the manager of its own service."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from conpaas import __version__
from conpaas.agent.scripts import Scripts
from conpaas.agent.volumes import Volumes
from conpaas.core import engines, files, plugins, rpc, tasks
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.member import Member, authenticator
from conpaas.core.messages import agent as commands
from conpaas.core.messages.internal import Context
from conpaas.core.messages.model import Ack, LogChunk
from conpaas.core.process import Process, Site
from conpaas.core.release import Follower
from conpaas.core.roles import Roles
from conpaas.core.rpc import Call
from conpaas.core.service import PACKAGE, ServiceType
from conpaas.core.trust import Caller, Target
from conpaas.core.usage import Usage

log = structlog.get_logger()

LOG_CHECK_S = 60.0


class Agent(Process):
    """One node. Holds roles, engines and the highest epoch of a manager that it has obeyed."""

    name = "agent"

    def __init__(self, context: Context, directory: Path, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__()
        self.context = context
        self.clock = clock
        self.member = Member(context, directory, clock=clock)
        self._kind = kind = plugins.discover(PACKAGE, "SERVICE", ServiceType)[context.service_type]
        self.volumes = Volumes(directory, clock)
        self.roles = Roles(
            directory,
            instance=context.instance,
            address=context.address,
            agents=kind.agents,
            clock=clock,
            volume_of=self.volumes.of,
        )
        self.scripts = Scripts(directory)
        self.follower = Follower(self.member, directory, self.stop, lambda: self.roles.busy or self.scripts.busy)
        self._background = tasks.Background()
        self._usage = Usage(directory)
        self._metrics: dict[str, float] = {}
        self._epoch_file = directory / "epoch"
        self._epoch = json.loads(self._epoch_file.read_text()) if self._epoch_file.exists() else 0

    async def open(self, stack: AsyncExitStack) -> Sequence[Site]:
        """Enrol; serve the manager's commands."""
        await self.member.open(stack)
        stack.callback(self.roles.close)
        stack.push_async_callback(self._background.close)
        serve = partial(rpc.route, authenticate=authenticator(self.context.deployment, self._target))
        routes = [
            serve(commands.GET_STATUS, self.get_status),
            serve(commands.APPLY_ROLES, self.apply_roles),
            serve(commands.STOP_ROLE, self.stop_role),
            serve(commands.PREPARE, self.prepare),
            serve(commands.FAREWELL, self.farewell),
            serve(commands.MOUNT, self.mount),
            serve(commands.FOLLOW, self.follow),
            serve(commands.HAS_BLOB, self.has_blob),
            serve(commands.PUT_BLOB, self.put_blob),
            serve(commands.LIST_LOGS, self.list_logs),
            serve(commands.READ_LOG, self.read_log),
        ]
        return [Site(self.context.address, self.context.port, routes, self.member.server_tls)]

    async def serving(self) -> None:
        """Make the roles so again that this node held before; the manager can already ask how it goes."""
        await self.volumes.restore()
        await self.roles.restore()
        self.follower.settle()

    def loops(self) -> Mapping[str, tasks.Loop]:
        """Take metrics, bound logs, renew the certificate."""
        period = self.context.timings.metrics_period_s
        return {
            "metrics": lambda: tasks.every(period, self.measure, clock=self.clock),
            "logs": lambda: tasks.every(LOG_CHECK_S, self.bound_logs, clock=self.clock),
            "certificate": self.member.renew_loop,
        }

    def _target(self, caller: Caller) -> Target:
        """Fence: who was obeyed once at an epoch is never again overruled by an earlier one."""
        mine = caller.kind == "manager" and caller.service == self.context.service
        if mine and (caller.epoch or 0) > self._epoch:
            self._epoch = caller.epoch or 0
            files.write_atomically(self._epoch_file, json.dumps(self._epoch))
            log.info("new-manager", epoch=self._epoch)
        return Target(owner=self.context.owner, service=self.context.service, epoch=self._epoch)

    async def measure(self) -> None:
        """Take the metrics of the node and of its roles."""
        self._metrics = self._usage.read(self.clock.monotonic())
        await self.roles.measure()

    async def bound_logs(self) -> None:
        """Keep the logs from filling the disk."""
        engines.bound_logs(self.roles.logs)

    async def status(self) -> commands.AgentStatus:
        """Return the node's own account of itself."""
        return commands.AgentStatus(
            instance=self.context.instance,
            version=__version__,
            roles=await self.roles.status(),
            prepared=self.scripts.prepared,
            volumes=self.volumes.roles,
            metrics=self._metrics,
        )

    # -- commands ---------------------------------------------------------------------------------------------------

    async def get_status(self, _: Call[Caller]) -> commands.AgentStatus:
        return await self.status()

    async def apply_roles(self, _: Call[Caller], body: commands.ApplyRoles) -> commands.AgentStatus:
        await self.roles.apply(body.roles)
        return await self.status()

    async def stop_role(self, call: Call[Caller], body: commands.StopRole) -> commands.AgentStatus:
        await self.roles.stop(call.params["role"], body.drain_s)
        return await self.status()

    async def prepare(self, _: Call[Caller], body: commands.Prepare) -> commands.AgentStatus:
        await self.scripts.start(body, self._script_env())
        return await self.status()

    async def farewell(self, _: Call[Caller], body: commands.Farewell) -> Ack:
        await self.roles.stop_all(body.drain_s)
        await self.scripts.stop(body.timeout_s, self._script_env())
        await self.volumes.release()
        return Ack()

    async def mount(self, call: Call[Caller], body: commands.Mount) -> commands.AgentStatus:
        role = self._kind.role(call.params["role"]).name
        if not self.volumes.has(role, body.volume):
            await self.roles.stop(role, drain_s=0.0)  # what it has begun elsewhere
        await self.volumes.mount(role, body)
        return await self.status()

    async def follow(self, _: Call[Caller]) -> Ack:
        self._background.start("follow", self._follow())
        return Ack()

    async def _follow(self) -> None:
        await self.follower.follow()
        self.successor = self.follower.successor

    async def has_blob(self, call: Call[Caller]) -> commands.BlobView:
        return commands.BlobView(present=self.roles.has_blob(call.params["sha256"]))

    async def put_blob(self, call: Call[Caller]) -> commands.BlobView:
        await self.roles.receive_blob(call.params["sha256"], call.chunks())
        return commands.BlobView(present=True)

    async def list_logs(self, _: Call[Caller]) -> commands.LogNames:
        return commands.LogNames(logs=self.roles.log_names())

    async def read_log(self, call: Call[Caller]) -> LogChunk:
        query = call.query(commands.LogQuery)
        return self.roles.read_log(call.params["name"], query.offset, query.limit)

    def _script_env(self) -> dict[str, Any]:
        return {
            "CONPAAS_SERVICE": self.context.service,
            "CONPAAS_INSTANCE": self.context.instance,
            "CONPAAS_ADDRESS": self.context.address,
        }
