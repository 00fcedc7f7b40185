"""From what is to what is wanted: plan, run the stages, compare again.

One path for start, scale, new code, new settings, a dead node and stop. Level-triggered: every round reads the record
of the service, so that it does not matter where the round before, or the manager before, came to an end.
"""

import asyncio
import hashlib
import hmac
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import structlog

from conpaas.core import placement, plugins
from conpaas.core.errors import BlobMissingError, ConpaasError, PeerError
from conpaas.core.member import Member
from conpaas.core.messages.internal import (
    DELETE_INSTANCE,
    READ_RECORD,
    REQUEST_INSTANCES,
    Gone,
    Instances,
    RequestInstances,
)
from conpaas.core.messages.model import CodeVersionView, ServiceRecord
from conpaas.core.placement import Phase, Plan
from conpaas.core.roles import Roles
from conpaas.core.service import MANAGER, Assignment, Node, Planner, ServiceType, Situation, Stage, Step
from conpaas.core.states import NodeState, ServiceState
from conpaas.core.timings import Timings
from conpaas.manager.nodes import ENDED, Handle, Nodes

log = structlog.get_logger()

#: The stages have run over the node; one that answered only while they ran waits for the next round.
ROLLED_OUT = frozenset({NodeState.SERVING, NodeState.DEGRADED})


@dataclass
class Progress:
    """How far the service is from what is wanted, for people."""

    state: ServiceState = ServiceState.INIT
    reason: str = ""
    done: int = 0
    total: int = 0
    generation: int = 0
    phase: Phase = Phase.SETTLED
    urls: dict[str, str] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """Say it in words: `2 of 3 nodes serving`."""
        if self.phase is Phase.OVERLAP:
            return "those that were replaced go on until all know the new address"
        return f"{self.done} of {self.total} nodes serving" if self.total else ""


class Rollout:
    """Brings one service to what is wanted. `boot` is given each new node, to be asked until it answers."""

    def __init__(
        self,
        member: Member,
        nodes: Nodes,
        own_roles: Roles,
        kind: ServiceType,
        *,
        timings: Timings,
        boot: Callable[[Handle], None],
    ) -> None:
        self._member, self._nodes, self._own, self._kind = member, nodes, own_roles, kind
        self._planner: Planner = plugins.load(kind.planner)()
        self._timings, self._boot = timings, boot
        self._service = member.context.service
        self._requests = 0
        self._overlap_since: float | None = None
        self._last_code: tuple[CodeVersionView | None, CodeVersionView | None] = (None, None)
        self.record: ServiceRecord
        self.progress = Progress()
        self.reached = -1
        """The generation that was last reached in full."""
        self.situation: Situation | None = None
        self.under_way = False
        """A round is."""
        self.refused = False
        """The last round asked for nodes, and got fewer: they are asked for again, with back-off."""

    async def read(self) -> ServiceRecord:
        """Read the record of the service, and learn of nodes from it."""
        self.record = await self._member.director.call(READ_RECORD, id=self._service)
        for handle in self._nodes.learn(self.record.nodes):
            self._boot(handle)
        return self.record

    async def round(self) -> bool:
        """Go as far as is possible now; return whether all is as wanted."""
        self.under_way = True
        try:
            return await self._round()
        finally:
            self.under_way = False

    async def _round(self) -> bool:
        self.refused = False
        record = await self.read()
        await self._delete_ended()
        plan = self._plan(record)
        self._note(record, plan)
        if plan.missing:
            for cloud, count in plan.missing.items():
                await self._request(count, cloud, record)
            plan = self._plan(record)
            self._note(record, plan)
        leaving = [handle for handle in self._nodes.living() if handle.view.id not in plan.kept]
        unseen = [handle.view.id for handle in self._nodes.living() if handle.unseen and handle not in leaving]
        if unseen:
            log.info("waiting", nodes=unseen)  # nobody may leave before all that count on him were told
            return False
        await self._roll_out(record, leaving)
        await asyncio.gather(*(self._give_back(handle) for handle in leaving))
        self._hand_over(plan)
        living = self._nodes.living()
        waiting = any(handle.state not in ROLLED_OUT for handle in living)
        lost = plan.assignment.roles.keys() - {MANAGER} - {handle.view.id for handle in living}  # while this round ran
        done = not (plan.missing or waiting or lost or self._ill() or plan.phase is not Phase.SETTLED)
        self._note(record, plan)
        if done:
            self.reached = record.generation
            self._settle(record)
        return done

    def _plan(self, record: ServiceRecord, among: Sequence[Handle] | None = None) -> Plan:
        """Say who does what as things are now: among all that live, or only some of them."""
        handles = self._nodes.living() if among is None else among
        return placement.plan(
            self._planner,
            record.wanted,
            [handle.node() for handle in handles],
            ready=frozenset(handle.view.id for handle in handles if handle.usable),
            handover_s=self.handover_s,
        )

    @property
    def handover_s(self) -> float | None:
        """How long those that have been replaced will still serve; None if there are none."""
        if self._overlap_since is None:
            return None
        return max(0.0, self._overlap_since + self._timings.handover_s - self._member.clock.monotonic())

    def _hand_over(self, plan: Plan) -> None:
        """Take down when successors began to serve; forget it when they serve alone."""
        if plan.phase is not Phase.OVERLAP:
            self._overlap_since = None
        elif self._overlap_since is None:
            self._overlap_since = self._member.clock.monotonic()

    # -- nodes come and go ------------------------------------------------------------------------------------------

    async def _request(self, count: int, cloud: str, record: ServiceRecord) -> None:
        ids = "+".join(handle.view.id for handle in self._nodes.living())
        words = f"{record.generation}/{record.epoch}/{self._requests}/{cloud}/{ids}"
        mark = hashlib.sha256(words.encode()).hexdigest()[:24]
        body = RequestInstances(count=count, cloud=cloud, key=mark)
        answer: Instances = await self._member.director.call(REQUEST_INSTANCES, body, id=self._service)
        self._requests += 1
        log.info("nodes-requested", count=count, got=len(answer.items))
        await self.read()
        refused = [view for view in answer.items if view.state is NodeState.GONE]
        self.refused = self.refused or bool(refused)
        if refused:
            self.progress.reason = f"{len(refused)} of {count} nodes refused: {refused[0].reason}"

    async def _delete_ended(self) -> None:
        """Give back the lost, and those that an earlier round could not give back."""
        ended = [handle for handle in self._nodes.handles.values() if handle.state in ENDED]
        await asyncio.gather(*(self._delete(one, failed=one.state is NodeState.LOST) for one in ended))

    async def _give_back(self, handle: Handle) -> None:
        if handle.usable:
            try:
                await self._nodes.farewell(handle)
            except ConpaasError as exc:  # it leaves all the same
                log.warning("no-farewell", node=handle.view.id, error=exc.message)
        await self._delete(handle, failed=False)

    async def _delete(self, handle: Handle, *, failed: bool) -> None:
        reason = handle.reason or "no longer needed"
        self._nodes.move(handle, NodeState.DELETING, reason)
        if handle.client is not None:
            await handle.client.close()
        body = Gone(reason=reason, failed=failed)
        await self._member.director.call(DELETE_INSTANCE, body, id=self._service, instance=handle.view.id)
        self._nodes.handles.pop(handle.view.id, None)

    # -- stages -----------------------------------------------------------------------------------------------------

    async def _roll_out(self, record: ServiceRecord, leaving: Sequence[Handle]) -> None:
        usable = [handle for handle in self._nodes.living() if handle.usable]
        staying = [handle for handle in usable if handle not in leaving]
        assignment = self._plan(record, staying).assignment
        self.situation = self._look(record, usable, assignment)
        if record.wanted.running and not staying:
            if self.reached < 0 and record.state is ServiceState.PROLOGUE:
                await self._run_ahead(self.situation)
            return
        for handle in leaving:
            if handle.usable:
                self._nodes.move(handle, NodeState.DRAINING, "no longer needed")
        await asyncio.gather(*(self._prepare(handle, record) for handle in staying))
        await self._on_all({handle.view.id: self._give_volumes(handle, assignment) for handle in staying})
        for stage in self._planner.stages(self.situation):
            await self._run(stage, {handle.view.id for handle in leaving})
        for handle in staying:
            if handle.state is NodeState.CONFIGURING:
                self._nodes.move(handle, NodeState.SERVING)
        self.progress.urls = self._planner.urls(self.situation)

    async def _run_ahead(self, situation: Situation) -> None:
        """While the first nodes boot, make ready on our own instance what comes before all of them."""
        for stage in self._planner.stages(situation):
            if any(step.node != MANAGER for step in stage):
                return
            await self._run(stage, set())

    def _look(self, record: ServiceRecord, usable: Sequence[Handle], assignment: Assignment) -> Situation:
        code = next((version for version in record.code if version.id == record.wanted.code), None)
        if self._last_code[0] != code:
            self._last_code = (code, self._last_code[0])
        nodes = {handle.view.id: handle.node() for handle in usable}
        own = Node(MANAGER, record.address or self._member.context.address)
        return Situation(
            service=self._service,
            wanted=record.wanted,
            nodes={**nodes, MANAGER: own},
            assignment=assignment,
            code=code,
            previous_code=self._last_code[1],
            secret=self.secret,
            predecessor=record.predecessor,
        )

    def secret(self, purpose: str) -> str:
        """Derive the service's password for `purpose`."""
        seed = self.record.seed.get_secret_value().encode()
        return hmac.new(seed, purpose.encode(), hashlib.sha256).hexdigest()[:40]

    async def _prepare(self, handle: Handle, record: ServiceRecord) -> None:
        try:
            await self._nodes.prepare(handle, record.wanted.start_script, record.wanted.stop_script)
        except PeerError:
            raise
        except ConpaasError as exc:  # a user's script that fails is told, and keeps nobody from serving
            handle.notice = exc.message
            log.warning("start-script-failed", node=handle.view.id, error=exc.message)

    async def _give_volumes(self, handle: Handle, assignment: Assignment) -> None:
        """Bring to a node the disks that its roles keep their data on."""
        roles = assignment.roles.get(handle.view.id, frozenset())
        for role in self._kind.roles:
            if role.name in roles and role.volume and role.name not in handle.volumes:
                await self._nodes.give_volume(handle, role.name)

    async def _run(self, stage: Stage, leaving: set[str]) -> None:
        """Run the steps of a stage in parallel, those of one node together; what fails on a leaving node is let go."""
        by_node: dict[str, list[Step]] = defaultdict(list)
        for step in stage:
            by_node[step.node].append(step)
        await self._on_all({node: self._run_on(node, steps) for node, steps in by_node.items()}, leaving)

    async def _on_all(self, work: Mapping[str, Awaitable[None]], leaving: AbstractSet[str] = frozenset()) -> None:
        """Work on nodes in parallel, to the end of all; then raise the first error that is not a leaving node's."""
        outcomes = await asyncio.gather(*work.values(), return_exceptions=True)
        for node, outcome in zip(work, outcomes, strict=True):
            if isinstance(outcome, ConpaasError):
                log.warning("step-failed", node=node, error=outcome.message, code=outcome.code)
                if node not in leaving:
                    outcome.message = f"{node}: {outcome.message}"
                    raise outcome
            elif outcome is not None:
                raise outcome

    async def _run_on(self, node: str, steps: Sequence[Step]) -> None:
        wanted = {
            step.role: step.config.model_dump(mode="json", context={"reveal": True})
            for step in steps
            if step.config is not None
        }
        ending = [step.role for step in steps if step.config is None]
        drain_s = self._timings.drain_s
        if node == MANAGER:
            if wanted:
                await self._apply_own(wanted)
            await asyncio.gather(*(self._own.stop(role, drain_s) for role in ending))
            return
        handle = self._nodes.handles.get(node)
        if handle is None:
            raise PeerError(f"{node} has gone meanwhile")
        if wanted:
            await self._nodes.apply(handle, wanted, self._timings.apply_timeout_s)
        await asyncio.gather(*(self._nodes.stop_role(handle, role, drain_s) for role in ending if role in handle.roles))

    async def _apply_own(self, wanted: dict[str, dict[str, Any]]) -> None:
        try:
            await self._own.apply(wanted)
        except BlobMissingError as exc:
            sha256 = str(exc.value)
            await self._own.receive_blob(sha256, self._nodes.blob(sha256))
            await self._own.apply(wanted)

    # -- progress ---------------------------------------------------------------------------------------------------

    def _ill(self) -> list[Handle]:
        return [handle for handle in self._nodes.living() if handle.silent_since is not None]

    def _note(self, record: ServiceRecord, plan: Plan) -> None:
        """Say how far we are; a service that was as wanted and is not any more adapts."""
        progress = self.progress
        progress.generation, progress.phase = record.generation, plan.phase
        progress.total = len(plan.kept) + sum(plan.missing.values())
        progress.done = sum(1 for handle in self._nodes.living() if handle.state is NodeState.SERVING)
        if not record.wanted.running:
            settled = record.state in {ServiceState.INIT, ServiceState.STOPPED} and not self._nodes.living()
            progress.state = record.state if settled else ServiceState.EPILOGUE
        elif record.state in {ServiceState.RUNNING, ServiceState.ADAPTING} or self.reached >= 0:
            progress.state = ServiceState.ADAPTING
        else:
            progress.state = ServiceState.PROLOGUE

    def _settle(self, record: ServiceRecord) -> None:
        if record.wanted.running:
            self.progress.state, self.progress.reason = ServiceState.RUNNING, ""
        else:
            self.progress.urls = {}
            self.progress.reason = ""
            self.progress.state = ServiceState.INIT if record.state is ServiceState.INIT else ServiceState.STOPPED
            self.reached = -1
