"""What managers report: written down where it is news."""

from datetime import datetime

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas import __version__
from conpaas.core.clock import Clock
from conpaas.core.messages.internal import NodeReport, Report, ReportAck
from conpaas.core.messages.model import Wanted
from conpaas.core.states import TRANSIENT, NodeState, OperationState, ServiceState
from conpaas.core.tasks import Background
from conpaas.director import lifecycle
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, MetricRow, Operation, Service
from conpaas.director.endings import Endings
from conpaas.director.events import Bus
from conpaas.director.ledger import enter
from conpaas.director.managers import Managers
from conpaas.director.services import living

log = structlog.get_logger()

_SAID = frozenset(
    {
        NodeState.BOOTING,
        NodeState.CONFIGURING,
        NodeState.SERVING,
        NodeState.DEGRADED,
        NodeState.DRAINING,
        NodeState.LOST,
    }
)
"""States of nodes that their manager knows best; the others are the ledger's."""
_TABLES = ("services", "instances", "operations")


class Reports:
    """Takes the managers' reports."""

    def __init__(
        self, db: Database, bus: Bus, managers: Managers, endings: Endings, background: Background, clock: Clock
    ) -> None:
        self._db, self._bus, self._managers, self._endings = db, bus, managers, endings
        self._background, self._clock = background, clock
        self._last: dict[str, tuple[Report, tuple[int, ...]]] = {}

    async def take(self, service_id: str, report: Report) -> ReportAck:
        """Write a report down. One that says nothing new costs no write."""
        self._managers.heard(service_id)
        bare = report.model_copy(update={"points": ()})
        last = self._last.get(service_id)
        if not report.points and last is not None and last == (bare, self._db.stamp(*_TABLES)):
            async with self._db.read() as session:
                return ReportAck(generation=(await living(session, service_id)).generation, version=__version__)
        async with self._db.write() as session:
            service = await living(session, service_id)
            await self._write(session, service, report)
            session.add_all(
                MetricRow(service_id=service_id, at=point.at, node=point.node, values=point.values)
                for point in report.points
            )
        self._last[service_id] = (bare, self._db.stamp(*_TABLES))
        if report.points:
            self._bus.metrics(service.user_id, service_id, report.points)
        if service.ending:
            self._background.start(f"settle {service_id}", self._endings.settle(service_id))
        return ReportAck(generation=service.generation, version=__version__)

    async def _write(self, session: AsyncSession, service: Service, report: Report) -> None:
        now = self._clock.now()
        instances = await lifecycle.instances_of(session, service.id)
        said = {node.id: node for node in report.nodes}
        for instance in instances:
            if instance.kind == "manager" and instance.epoch == service.epoch and instance.ended is None:
                there = report.state not in TRANSIENT or instance.state is NodeState.SERVING
                enter(instance, NodeState.SERVING if there else NodeState.CONFIGURING, now)
            if instance.id in said:
                _note_node(instance, said[instance.id], now)
        if not Wanted.model_validate(service.wanted).running:
            service.urls, service.facts = report.urls, report.facts
        else:  # a new manager that has yet to look around knows none
            service.urls, service.facts = report.urls or service.urls, report.facts or service.facts
        if report.generation == service.generation:
            self._move(session, service, report, now)
        for operation in await lifecycle.under_way(session, service.id):
            _note_progress(operation, report, now)

    def _move(self, session: AsyncSession, service: Service, report: Report, now: datetime) -> None:
        if service.ending:
            return  # its end is written down when all is given back
        running = Wanted.model_validate(service.wanted).running
        state = lifecycle.after_report(service.state, report.state, running=running)
        if state is not None:
            lifecycle.move(session, service, state, at=now, actor="manager", reason=report.reason)
        elif report.state is service.state:
            service.reason = report.reason


def _note_node(instance: Instance, said: NodeReport, now: datetime) -> None:
    if instance.ended is not None:
        return
    if said.state in _SAID and instance.launched is not None:  # else its cloud has yet to say yes
        enter(instance, said.state, now, said.reason)
    instance.roles = sorted(said.roles)
    instance.metrics = said.metrics


def _note_progress(operation: Operation, report: Report, now: datetime) -> None:
    """End an operation that its service has reached, or note how far it is."""
    if operation.kind == lifecycle.CREATE:
        lifecycle.finish(operation, OperationState.DONE, at=now, message="the manager is there")
        return
    if operation.kind == lifecycle.TERMINATE or report.generation < operation.generation:
        return
    running = Wanted.model_validate(operation.after).running
    reached = ServiceState.RUNNING if running else ServiceState.STOPPED
    operation.done, operation.total = report.done, report.total
    operation.message = report.message or operation.message
    if report.state is reached:
        lifecycle.finish(operation, OperationState.DONE, at=now)
    elif report.state is ServiceState.ERROR:
        lifecycle.finish(operation, OperationState.FAILED, at=now, error=report.reason)
