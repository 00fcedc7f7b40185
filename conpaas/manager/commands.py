"""The commands that a manager takes from its director and from the owner of its service (`managerc`)."""

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

from aiohttp import web
from pydantic import ValidationError

from conpaas.core import plugins, rpc, spec
from conpaas.core.errors import NotFoundError, StaleGenerationError
from conpaas.core.member import Member, authenticator
from conpaas.core.messages import agent as node_commands
from conpaas.core.messages import manager as commands
from conpaas.core.messages.internal import (
    CHANGE_SPEC,
    DOWNLOAD_BLOB,
    READ_STATES,
    UPLOAD_CODE_FOR,
    ChangeSpec,
    StateHistory,
    UploadQuery,
)
from conpaas.core.messages.model import (
    Ack,
    CodeVersionView,
    LogChunk,
    LogName,
    MetricPoint,
    NodeView,
    OperationView,
    Wanted,
)
from conpaas.core.roles import Roles
from conpaas.core.rpc import Call
from conpaas.core.service import MANAGER, Node, ServiceType
from conpaas.core.trust import Caller, Target
from conpaas.manager.nodes import Nodes
from conpaas.manager.rollout import Rollout

_ATTEMPTS = 3
_AVERAGE_POINTS = 12
"""So many of the newest points of the service make the averages of `getHighLevelMonitoring`: a minute."""


class Commands:
    """What a manager answers. Commands that change the service change its spec, at the director."""

    def __init__(
        self,
        member: Member,
        rollout: Rollout,
        nodes: Nodes,
        roles: Roles,
        kind: ServiceType,
        points: deque[MetricPoint],
        wake: Callable[[], None],
    ) -> None:
        self._member, self._rollout, self._nodes, self._roles = member, rollout, nodes, roles
        self._kind, self._points, self._wake = kind, points, wake
        self._service = member.context.service

    def routes(self) -> list[web.RouteDef]:
        """Return all routes of a manager."""
        context = self._member.context
        target = Target(owner=context.owner, service=context.service, epoch=context.epoch)
        serve = partial(rpc.route, authenticate=authenticator(context.deployment, lambda _: target))
        return [
            serve(commands.SPEC_CHANGED, self.spec_changed),
            serve(commands.STARTUP, self.startup),
            serve(commands.SHUTDOWN, self.shutdown),
            serve(commands.ADD, self.add),
            serve(commands.REMOVE, self.remove),
            serve(commands.LIST_NODES, self.list_nodes),
            serve(commands.GET_NODE, self.get_node),
            serve(commands.GET_STATE, self.get_state),
            serve(commands.GET_STATES, self.get_states),
            serve(commands.GET_CONFIGURATION, self.get_configuration),
            serve(commands.UPDATE_CONFIGURATION, self.update_configuration),
            serve(commands.LIST_CODE, self.list_code),
            serve(commands.UPLOAD_CODE, self.upload_code),
            serve(commands.DOWNLOAD_CODE, self.download_code),
            serve(commands.GET_MONITORING, self.get_monitoring),
            serve(commands.LIST_ALL_LOGS, self.list_logs),
            serve(commands.READ_NODE_LOG, self.read_log),
            serve(commands.RUN_COMMAND, self.run_command),
        ]

    # -- changes ----------------------------------------------------------------------------------------------------

    async def _change(
        self, change: Callable[[Wanted], Wanted], *, kind: str, key: str | None, caller: Caller
    ) -> OperationView:
        """Change the spec by compare-and-set; if somebody was faster, make the change to what is wanted now."""
        for attempt in range(1, _ATTEMPTS + 1):
            record = await self._rollout.read()
            body = ChangeSpec(
                generation=record.generation,
                wanted=change(record.wanted),
                kind=kind,
                key=key,
                actor=caller.name,
            )
            try:
                operation: OperationView = await self._member.director.call(CHANGE_SPEC, body, id=self._service)
            except StaleGenerationError:
                if attempt == _ATTEMPTS:
                    raise
            else:
                self._wake()
                return operation
        raise AssertionError("unreachable")

    async def spec_changed(self, _: Call[Caller], body: commands.SpecChanged) -> Ack:
        if body.generation != self._rollout.progress.generation:
            self._wake()
        return Ack()

    async def startup(self, call: Call[Caller], body: commands.Keyed) -> OperationView:
        return await self._change(spec.startup, kind="start", key=body.key, caller=call.caller)

    async def shutdown(self, call: Call[Caller], body: commands.Keyed) -> OperationView:
        return await self._change(spec.shutdown, kind="stop", key=body.key, caller=call.caller)

    async def add(self, call: Call[Caller], body: commands.ChangeRoles) -> OperationView:
        return await self._scale(call, body, 1)

    async def remove(self, call: Call[Caller], body: commands.ChangeRoles) -> OperationView:
        return await self._scale(call, body, -1)

    async def _scale(self, call: Call[Caller], body: commands.ChangeRoles, sign: int) -> OperationView:
        roles = {role: sign * count for role, count in body.roles.items()}
        change = partial(spec.change_roles, change=roles, cloud=body.cloud)
        return await self._change(change, kind="scale", key=body.key, caller=call.caller)

    async def update_configuration(self, call: Call[Caller], body: commands.Configure) -> OperationView:
        record = await self._rollout.read()
        known = [version.id for version in record.code]
        change = partial(spec.configure, settings=body.settings, code=body.code, known_code=known)
        kind = "activate" if body.code is not None and not body.settings else "configure"
        return await self._change(change, kind=kind, key=body.key, caller=call.caller)

    # -- questions --------------------------------------------------------------------------------------------------

    async def list_nodes(self, _: Call[Caller]) -> commands.Nodes:
        return commands.Nodes(nodes=tuple(self._views()))

    async def get_node(self, call: Call[Caller]) -> NodeView:
        for view in self._views():
            if call.params["node"] in {view.id, view.cloud_id}:
                return view
        raise NotFoundError("there is no such node", value=call.params["node"], hint="list them: listServiceNodes")

    def _views(self) -> list[NodeView]:
        return [
            handle.view.model_copy(
                update={"state": handle.state, "reason": handle.reason, "roles": tuple(sorted(handle.roles))}
            )
            for handle in self._nodes.handles.values()
        ]

    async def get_state(self, _: Call[Caller]) -> commands.ManagerState:
        record = await self._rollout.read()
        return commands.ManagerState(
            state=record.state, reason=self._rollout.progress.reason, generation=record.generation
        )

    async def get_states(self, _: Call[Caller]) -> StateHistory:
        history: StateHistory = await self._member.director.call(READ_STATES, id=self._service)
        return history

    async def get_configuration(self, _: Call[Caller]) -> commands.Configuration:
        return commands.Configuration(wanted=(await self._rollout.read()).wanted)

    async def get_monitoring(self, _: Call[Caller]) -> commands.Monitoring:
        return monitoring(self._points)

    # -- code -------------------------------------------------------------------------------------------------------

    async def list_code(self, _: Call[Caller]) -> commands.CodeVersions:
        return commands.CodeVersions(items=(await self._rollout.read()).code)

    async def upload_code(self, call: Call[Caller]) -> CodeVersionView:
        view: CodeVersionView = await self._member.director.call(
            UPLOAD_CODE_FOR, query=call.query(UploadQuery), data=call.chunks(), id=self._service
        )
        return view

    async def download_code(self, call: Call[Caller]) -> web.StreamResponse:
        record = await self._rollout.read()
        wanted = call.params["version"]
        version = next((version for version in record.code if version.id == wanted), None)
        if version is None:
            raise NotFoundError("there is no such code version", value=wanted, hint="list them first")
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(version.size),
                "X-Filename": version.filename,
            }
        )
        await response.prepare(call.http)
        async with self._member.director.stream(DOWNLOAD_BLOB, id=self._service, sha256=version.sha256) as source:
            async for chunk in source.content.iter_chunked(1 << 18):
                await response.write(chunk)
        await response.write_eof()
        return response

    # -- logs and commands of the service type ----------------------------------------------------------------------

    async def list_logs(self, _: Call[Caller]) -> commands.ManagerLogs:
        logs = [LogName(node=MANAGER, name=name, size=size) for name, size in self._roles.log_names().items()]
        for handle in self._nodes.living():
            if handle.usable:
                client = await self._nodes.client(handle)
                names: node_commands.LogNames = await client.call(node_commands.LIST_LOGS)
                logs += [LogName(node=handle.view.id, name=name, size=size) for name, size in names.logs.items()]
        return commands.ManagerLogs(logs=tuple(logs))

    async def read_log(self, call: Call[Caller]) -> LogChunk:
        node, name, query = call.params["node"], call.params["name"], call.query(node_commands.LogQuery)
        if node == MANAGER:
            return self._roles.read_log(name, query.offset, query.limit)
        handle = self._nodes.handles.get(node)
        if handle is None:
            raise NotFoundError("there is no such node", value=node, hint="list the logs first")
        client = await self._nodes.client(handle)
        chunk: LogChunk = await client.call(node_commands.READ_LOG, query=query, name=name)
        return chunk

    async def run_command(self, call: Call[Caller], body: commands.CommandBody) -> commands.CommandAnswer:
        name = call.params["name"]
        command = next((command for command in self._kind.commands if command.name == name), None)
        if command is None:
            raise NotFoundError(f"{self._kind.name} has no command '{name}'", value=name)
        try:
            arguments = command.arguments.model_validate(body.arguments)
        except ValidationError as exc:
            raise rpc.bad_input(exc) from exc
        result = await plugins.load(command.run)(arguments, self)
        return commands.CommandAnswer(result=result)

    # -- core.service.CommandContext --------------------------------------------------------------------------------

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes that answer, by id."""
        return {handle.view.id: handle.node() for handle in self._nodes.living() if handle.usable}

    @property
    def wanted(self) -> Wanted:
        """What is wanted, as last read."""
        return self._rollout.record.wanted

    def secret(self, purpose: str) -> str:
        """Derive the service's password for `purpose`."""
        return self._rollout.secret(purpose)


def monitoring(points: deque[MetricPoint]) -> commands.Monitoring:
    """Average the service's newest points; take the newest point of each node."""
    of_service = [point.values for point in points if not point.node][-_AVERAGE_POINTS:]
    names = [name for name in commands.Monitoring.model_fields if name != "nodes"]
    averages = {
        name: sum(values.get(name, 0.0) for values in of_service) / len(of_service) if of_service else 0.0
        for name in names
    }
    newest = {point.node: point for point in points if point.node}
    return commands.Monitoring(**averages, nodes=tuple(newest.values()))
