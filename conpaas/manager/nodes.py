"""The manager's picture of its nodes: who answers, what each holds, what state each is in.

Rebuilt by looking: the ledger says which nodes there are, the agents say what they do.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import structlog

from conpaas import __version__
from conpaas.core import tasks
from conpaas.core.clock import Clock
from conpaas.core.errors import BlobMissingError, CloudBusyError, ConpaasError, DeadlineError, PeerError
from conpaas.core.identity import Identity
from conpaas.core.member import Member
from conpaas.core.messages import agent as commands
from conpaas.core.messages.internal import DESCRIBE_INSTANCE, DOWNLOAD_BLOB, ENSURE_VOLUME, NodeReport, VolumeView
from conpaas.core.messages.model import NodeView
from conpaas.core.release import newer
from conpaas.core.rpc import Client
from conpaas.core.service import Node
from conpaas.core.states import NodeState
from conpaas.core.timings import Timings

log = structlog.get_logger()

#: The agent has answered, and may be given work.
USABLE = frozenset({NodeState.CONFIGURING, NodeState.SERVING, NodeState.DEGRADED, NodeState.DRAINING})
ENDED = frozenset({NodeState.LOST, NodeState.DELETING, NodeState.GONE})


LOCATE_S = 0.5
"""How often a cloud is asked where a node is."""


@dataclass
class Handle:
    """One node: the ledger's view of it, and how it last answered."""

    view: NodeView
    state: NodeState
    client: Client | None = None
    status: commands.AgentStatus | None = None
    reason: str = ""
    silent_since: float | None = None
    degraded_since: float | None = None
    prepared: bool = False
    behind: bool = False
    """It runs an older version than we."""
    notice: str = ""
    """What its owner should know of it although it serves."""
    roles: frozenset[str] = field(default_factory=frozenset)

    @property
    def volumes(self) -> tuple[str, ...]:
        """The roles whose volume it has."""
        return () if self.status is None else self.status.volumes

    @property
    def usable(self) -> bool:
        """Whether it can be given work now."""
        return self.state in USABLE and self.silent_since is None

    @property
    def unseen(self) -> bool:
        """Whether it may be serving, and we cannot tell it anything: it is booting for all that we know, or silent."""
        return bool(self.roles) and self.state not in ENDED and not self.usable

    def node(self) -> Node:
        """Return the node as planners see it."""
        view = self.view
        return Node(view.id, view.address, self.roles, view.cloud, view.size, view.meant_for)

    def report(self) -> NodeReport:
        """Return the node as the director is told of it."""
        metrics = {} if self.status is None else flat_metrics(self.status)
        return NodeReport(
            id=self.view.id,
            state=self.state,
            reason=(self.reason or self.notice)[:500],
            roles=tuple(sorted(self.roles)),
            metrics=metrics,
        )


def flat_metrics(status: commands.AgentStatus) -> dict[str, float]:
    """Return the metrics of a node and of its roles in one mapping."""
    values = dict(status.metrics)
    for role in status.roles.values():
        values.update(role.metrics)
    return values


class Nodes:
    """All nodes of the service.

    `changed` is called when a node's state changes; with True if there is work to do because of it.
    """

    def __init__(self, member: Member, *, timings: Timings, clock: Clock, changed: Callable[[bool], None]) -> None:
        self._member, self._timings, self._clock, self._changed = member, timings, clock, changed
        self._context = member.context
        self.handles: dict[str, Handle] = {}
        self._closing = tasks.Background()

    def learn(self, views: Iterable[NodeView]) -> list[Handle]:
        """Take over the ledger's list; return the handles that are new and must be asked until they answer."""
        fresh = []
        known = {view.id: view for view in views}
        for gone in set(self.handles) - set(known):
            self._drop(self.handles.pop(gone))
        for view in known.values():
            handle = self.handles.get(view.id)
            if handle is None:
                state = view.state if view.state in ENDED else NodeState.BOOTING
                handle = self.handles[view.id] = Handle(view, state, roles=frozenset(view.roles))
                if state is NodeState.BOOTING:
                    fresh.append(handle)
            elif handle.view.address != view.address:
                self._drop(handle)
            handle.view = view
            if view.state in ENDED and handle.state not in ENDED:
                self.move(handle, view.state, view.reason)  # its cloud says so, or its creation was cut short
        return fresh

    def _drop(self, handle: Handle) -> None:
        """Close the connection to a node that is not there any more."""
        if handle.client is not None:
            self._closing.start(f"close {handle.client.base}", handle.client.close())
            handle.client = None

    def living(self) -> list[Handle]:
        """Return the nodes that are not on their way out, in the order of their creation."""
        return [handle for handle in self.handles.values() if handle.state not in ENDED]

    def move(self, handle: Handle, state: NodeState, reason: str = "") -> None:
        """Note a node's new state."""
        if handle.state is not state or handle.reason != reason:
            if handle.state is not state:
                log.info("node", node=handle.view.id, state=state, was=handle.state, reason=reason)
            handle.state, handle.reason = state, reason
            self._changed(state is NodeState.LOST)

    async def client(self, handle: Handle) -> Client:
        """Return the connection to a node's agent."""
        if handle.client is None:
            peer = Identity.agent(self._context.deployment, self._context.service, handle.view.id)
            base = f"https://{handle.view.address}:{self._context.port}"
            handle.client = self._member.client(base, peer)
        return handle.client

    # -- booting ----------------------------------------------------------------------------------------------------

    async def until_it_answers(self, handle: Handle) -> None:
        """Ask a booting node, with jitter, until it answers or is given back; DeadlineError after the boot time-out."""
        asked = self._clock.now().timestamp()
        pause = self._timings.boot_poll_s
        reason = "no address yet"
        while handle.state not in ENDED:
            if not handle.view.address:
                pause = self._timings.boot_poll_s if await self._locate(handle) else LOCATE_S
            else:
                try:
                    await self._ask(handle)
                except PeerError as exc:
                    reason = exc.message
                else:
                    self.move(handle, NodeState.CONFIGURING)
                    return
            if self._clock.now().timestamp() >= self._boot_deadline(handle, asked):
                raise DeadlineError(
                    f"{handle.view.id} on {handle.view.cloud} did not answer within"
                    f" {self._timings.node_boot_timeout_s:g} s: {reason}"
                )
            await self._clock.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311  (not a secret)
            pause = min(pause * 1.3, self._timings.boot_poll_s * 50)

    async def _locate(self, handle: Handle) -> bool:
        """Have the director ask the cloud where a node is, which did not know it when it said yes; tell if it knows."""
        try:
            handle.view = await self._member.director.call(
                DESCRIBE_INSTANCE, id=self._context.service, instance=handle.view.id
            )
        except ConpaasError as exc:
            log.debug("cannot-describe", node=handle.view.id, error=exc.message)
        return bool(handle.view.address)

    def _boot_deadline(self, handle: Handle, asked: float) -> float:
        """Return when a node counts as never booting, a Unix time: its time runs once its cloud has said yes."""
        made = self._clock.now() if handle.view.state is NodeState.REQUESTED else handle.view.since
        deadline = made.timestamp() + self._timings.node_boot_timeout_s
        if handle.roles:  # it has served, under a manager before us
            deadline = max(deadline, asked + self._timings.node_silent_s)
        return deadline

    async def _ask(self, handle: Handle) -> None:
        client = await self.client(handle)
        status: commands.AgentStatus = await client.call(commands.GET_STATUS, timeout_s=2.0)
        self._heard(handle, status)

    def _heard(self, handle: Handle, status: commands.AgentStatus) -> None:
        lacks_volume = bool(set(handle.volumes) - set(status.volumes))
        handle.status = status
        handle.behind = newer(__version__, status.version)
        handle.roles = frozenset(status.roles)
        if handle.silent_since is not None or lacks_volume:
            handle.silent_since = None
            self._changed(True)  # noqa: FBT003  (a callback takes no keywords)

    # -- health -----------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Ask every usable node how it is; note who is degraded, silent or lost."""
        await asyncio.gather(*(self._check(handle) for handle in self.living()))

    async def _check(self, handle: Handle) -> None:
        if handle.state not in USABLE:
            return  # it boots, or has gone since the others were asked
        try:
            await self._ask(handle)
        except PeerError as exc:
            await self._silent(handle, exc)
            return
        except ConpaasError as exc:
            self.move(handle, NodeState.DEGRADED, exc.message)
            return
        if handle.behind:
            await self._bring_up(handle)
        if handle.state in {NodeState.SERVING, NodeState.DEGRADED}:
            ill = (
                [f"{name}: {role.detail}" for name, role in handle.status.roles.items() if not role.healthy]
                if handle.status
                else []
            )
            self.move(handle, NodeState.DEGRADED if ill else NodeState.SERVING, "; ".join(ill))

    async def _bring_up(self, handle: Handle) -> None:
        """Have a node follow us to our version; it may be busy, or have tried in vain, and serves all the same."""
        try:
            await (await self.client(handle)).call(commands.FOLLOW)
        except ConpaasError as exc:
            log.warning("node-does-not-follow", node=handle.view.id, error=exc.message)

    async def _silent(self, handle: Handle, error: PeerError) -> None:
        now = self._clock.monotonic()
        if handle.silent_since is None:
            handle.silent_since = now
            return  # once is not silence: its agent may be restarting
        self.move(handle, NodeState.DEGRADED, f"silent: {error.message}")
        silent_s = now - handle.silent_since
        if silent_s >= self._timings.node_silent_s:
            self.move(handle, NodeState.LOST, f"silent for {silent_s:.0f} s")
        elif await self._ended_at_cloud(handle):
            self.move(handle, NodeState.LOST, "its cloud says that it has ended")

    async def _ended_at_cloud(self, handle: Handle) -> bool:
        try:
            view: NodeView = await self._member.director.call(
                DESCRIBE_INSTANCE, id=self._context.service, instance=handle.view.id
            )
        except ConpaasError as exc:
            log.debug("cannot-describe", node=handle.view.id, error=exc.message)
            return False
        return view.state in ENDED

    # -- work -------------------------------------------------------------------------------------------------------

    async def apply(self, handle: Handle, roles: dict[str, dict[str, object]], timeout_s: float) -> None:
        """Make roles so on a node, sending it the code versions that it lacks."""
        client = await self.client(handle)
        body = commands.ApplyRoles(roles=roles)
        for _ in range(8):  # at most so many code versions can be missing at once
            try:
                self._heard(handle, await client.call(commands.APPLY_ROLES, body, timeout_s=timeout_s))
            except BlobMissingError as exc:
                await self._send_blob(client, str(exc.value))
            else:
                return
        raise PeerError(f"{handle.view.id} goes on asking for code versions")

    async def _send_blob(self, client: Client, sha256: str) -> None:
        await client.call(commands.PUT_BLOB, data=self.blob(sha256), sha256=sha256)

    async def blob(self, sha256: str) -> AsyncIterator[bytes]:
        """Stream a code version from the director, never holding more than a piece of it."""
        async with self._member.director.stream(DOWNLOAD_BLOB, id=self._context.service, sha256=sha256) as response:
            async for chunk in response.content.iter_chunked(1 << 18):
                yield chunk

    async def give_volume(self, handle: Handle, role: str) -> None:
        """Have the director bring a role's disk to a node, and the node use it; DeadlineError if it does not come."""
        view = await tasks.wait_for(
            lambda: self._brought(handle, role),
            timeout_s=self._timings.apply_timeout_s,
            what=f"the volume of '{role}' comes to {handle.view.id}",
            clock=self._clock,
            period_s=0.5,
        )
        if view.devices:
            client = await self.client(handle)
            body = commands.Mount(volume=view.id, devices=view.devices)
            self._heard(handle, await client.call(commands.MOUNT, body, role=role))

    async def _brought(self, handle: Handle, role: str) -> VolumeView | None:
        service, node = self._context.service, handle.view.id
        try:
            view: VolumeView = await self._member.director.call(ENSURE_VOLUME, id=service, instance=node, role=role)
        except CloudBusyError:
            return None
        return view if view.ready else None

    async def stop_role(self, handle: Handle, role: str, drain_s: float) -> None:
        """Drain and stop a role of a node."""
        client = await self.client(handle)
        body = commands.StopRole(drain_s=drain_s)
        self._heard(handle, await client.call(commands.STOP_ROLE, body, role=role, timeout_s=drain_s + 60))

    async def prepare(self, handle: Handle, start: str, stop: str) -> None:
        """Give a node the user's scripts; the start script runs once."""
        if handle.prepared:
            return
        client = await self.client(handle)
        timeout_s = self._timings.script_timeout_s
        body = commands.Prepare(start_script=start, stop_script=stop, timeout_s=timeout_s)
        handle.prepared = True
        self._heard(handle, await client.call(commands.PREPARE, body, timeout_s=timeout_s + 10))

    async def farewell(self, handle: Handle) -> None:
        """Let a node end its roles and run the user's stop script."""
        client = await self.client(handle)
        drain_s, timeout_s = self._timings.drain_s, self._timings.script_timeout_s
        body = commands.Farewell(drain_s=drain_s, timeout_s=timeout_s)
        await client.call(commands.FAREWELL, body, timeout_s=drain_s + timeout_s + 10)

    async def close(self) -> None:
        """Close all connections."""
        closing: list[Awaitable[None]] = [h.client.close() for h in self.handles.values() if h.client is not None]
        await asyncio.gather(*closing)
        await self._closing.close()
