"""The manager: the daemon that runs one service.

It asks its director for what is wanted, its agents for what is, and brings the two together (`rollout`). It holds
nothing that can be lost.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from conpaas import __version__
from conpaas.core import engines, plugins, tasks
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.errors import ConpaasError, EngineMissingError, PeerError
from conpaas.core.member import Member
from conpaas.core.messages.internal import REPORT, Context, Report, ReportAck
from conpaas.core.messages.model import MetricPoint
from conpaas.core.process import Process, Site
from conpaas.core.release import Follower, newer
from conpaas.core.roles import Roles
from conpaas.core.service import PACKAGE, Planner, ServiceType
from conpaas.core.states import NodeState, ServiceState
from conpaas.core.usage import Usage
from conpaas.manager.commands import Commands
from conpaas.manager.nodes import Handle, Nodes, flat_metrics
from conpaas.manager.rollout import Rollout

log = structlog.get_logger()

RESYNC_S = 30.0
"""Compare with what is wanted this often, even if nothing seems to have changed."""
UNDONE_S = 5.0
"""And this often while it is not yet so: the ledger may know of a node what it cannot say itself."""
LOG_CHECK_S = 60.0
REPORT_RETRY_S = 1.0
POINTS_KEPT = 720


class Manager(Process):
    """One service's manager."""

    name = "manager"

    def __init__(self, context: Context, directory: Path, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__()
        self.context, self.clock, self.timings = context, clock, context.timings
        self.member = Member(context, directory, clock=clock)
        self.kind = plugins.discover(PACKAGE, "SERVICE", ServiceType)[context.service_type]
        self.planner: Planner = plugins.load(self.kind.planner)()
        self.roles = Roles(
            directory,
            instance=context.instance,
            address=context.address,
            agents=self.kind.agents,
            clock=clock,
        )
        self.nodes = Nodes(self.member, timings=self.timings, clock=clock, changed=self._changed)
        self.rollout = Rollout(self.member, self.nodes, self.roles, self.kind, timings=self.timings, boot=self._boot)
        self.points: deque[MetricPoint] = deque(maxlen=POINTS_KEPT)
        self._unsent: list[MetricPoint] = []
        self._booting = tasks.Background()
        self._wake = asyncio.Event()
        self._report_now = asyncio.Event()
        self._failures = 0
        self.follower = Follower(self.member, directory, self.stop, lambda: self.rollout.under_way)
        self._usage = Usage(directory)

    async def open(self, stack: AsyncExitStack) -> Sequence[Site]:
        """Enrol and open what is held; serve the commands of director and owner."""
        await self.member.open(stack)
        stack.callback(self.roles.close)
        stack.push_async_callback(self.nodes.close)
        stack.push_async_callback(self._booting.close)
        commands = Commands(self.member, self.rollout, self.nodes, self.roles, self.kind, self.points, self._wake.set)
        return [Site(self.context.address, self.context.port, commands.routes(), self.member.server_tls)]

    async def serving(self) -> None:
        """Find the engines again that an earlier run of this manager left on its instance."""
        await self.roles.restore()
        self.follower.settle()

    def loops(self) -> Mapping[str, tasks.Loop]:
        """Converge, watch, measure, report, renew."""
        timings = self.timings
        return {
            "converge": self._converge,
            "health": lambda: tasks.every(timings.health_period_s, self.nodes.check, clock=self.clock),
            "metrics": lambda: tasks.every(timings.metrics_period_s, self._measure, clock=self.clock),
            "report": self._reports,
            "logs": lambda: tasks.every(LOG_CHECK_S, self._bound_logs, clock=self.clock),
            "certificate": self.member.renew_loop,
        }

    # -- converging -------------------------------------------------------------------------------------------------

    async def _converge(self) -> None:
        while True:
            self._wake.clear()
            pause = await self._one_round()
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _one_round(self) -> float:
        """Run one round; return how long to wait for news before the next."""
        try:
            done = await self.rollout.round()
        except ConpaasError as exc:
            return self._failed(exc)
        if done:
            self._failures = 0
            self._report_now.set()
            return RESYNC_S
        self._failures += self.rollout.refused
        self._report_now.set()
        if self.rollout.handover_s is not None:
            return min(UNDONE_S, self.rollout.handover_s)
        return self._delay() if self._failures else UNDONE_S

    def _failed(self, exc: ConpaasError) -> float:
        """Note why a round failed. A service that cannot start says so; one that runs goes on with what it has."""
        self._failures += 1
        progress = self.rollout.progress
        progress.reason = f"{exc.message}. {exc.hint}".strip(". ") if exc.hint else exc.message
        log.warning("round-failed", error=exc.message, code=exc.code, failures=self._failures)
        hopeless = isinstance(exc, EngineMissingError) or (self._failures >= 3 and not isinstance(exc, PeerError))
        if hopeless and progress.state is ServiceState.PROLOGUE:
            progress.state = ServiceState.ERROR
        self._report_now.set()
        return self._delay()

    def _delay(self) -> float:
        delays = self.timings.retry_delays_s
        return delays[min(self._failures, len(delays)) - 1]

    def _changed(self, urgent: bool) -> None:
        self._report_now.set()
        if urgent:
            self._wake.set()

    def _boot(self, handle: Handle) -> None:
        self._booting.start(f"boot {handle.view.id}", self._until_booted(handle))

    async def _until_booted(self, handle: Handle) -> None:
        """Wait for a node; one that never boots is lost, and the next round replaces it, each time a little later."""
        try:
            await self.nodes.until_it_answers(handle)
        except ConpaasError as exc:
            self._failures += 1
            self.rollout.progress.reason = f"{exc.message}: it is replaced"
            log.warning("node-never-booted", node=handle.view.id, error=exc.message)
            await self.clock.sleep(self._delay() if self._failures > 1 else 0)
            self.nodes.move(handle, NodeState.LOST, exc.message)
        self._wake.set()

    # -- measuring and reporting ------------------------------------------------------------------------------------

    async def _measure(self) -> None:
        now = self.clock.now()
        await self.roles.measure()
        values = {
            handle.view.id: flat_metrics(handle.status)
            for handle in self.nodes.living()
            if handle.status is not None and handle.usable
        }
        fresh = [MetricPoint(at=now, node=node, values=metrics) for node, metrics in values.items()]
        summary = self.planner.summary(values) if values else {}
        if summary:
            fresh.append(MetricPoint(at=now, values=summary))
        self.points.extend(fresh)
        self._unsent = (self._unsent + fresh)[-POINTS_KEPT:]

    async def _reports(self) -> None:
        """Report whenever something changed, and as a heartbeat."""
        cut_off = False
        while True:
            try:
                await self._report()
                if cut_off:
                    self._wake.set()  # the director is back: go on at once
                cut_off = False
            except ConpaasError as exc:
                log.debug("not-reported", error=exc.message)
                cut_off = True
                await self.clock.sleep(REPORT_RETRY_S)
                continue
            try:
                async with asyncio.timeout(self.timings.metrics_period_s):
                    await self._report_now.wait()
            except TimeoutError:
                pass

    async def _report(self) -> None:
        self._report_now.clear()
        progress, points = self.rollout.progress, self._unsent
        report = Report(
            generation=progress.generation,
            state=progress.state,
            reason=progress.reason,
            nodes=tuple(handle.report() for handle in self.nodes.handles.values()),
            urls=progress.urls,
            facts=self._facts(),
            done=progress.done,
            total=progress.total,
            message=progress.message,
            points=tuple(points),
        )
        ack: ReportAck = await self.member.director.call(REPORT, report, id=self.context.service)
        self._unsent = self._unsent[len(points) :]
        if ack.generation > progress.generation:
            self._wake.set()
        if newer(ack.version, __version__):
            self._booting.start("follow", self._follow())

    async def _follow(self) -> None:
        await self.follower.follow()
        self.successor = self.follower.successor

    def _facts(self) -> dict[str, str]:
        situation = self.rollout.situation
        if situation is None or self.rollout.progress.state is ServiceState.STOPPED:
            return {}
        newest = {handle.view.id: flat_metrics(handle.status) for handle in self.nodes.living() if handle.status}
        return self.planner.facts(situation, newest)

    async def _bound_logs(self) -> None:
        engines.bound_logs(self.roles.logs)
