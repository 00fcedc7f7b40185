"""Rows of the database as the messages that travel, and the lists of them in a constant number of queries."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core.errors import BadInputError
from conpaas.core.messages.model import (
    CodeVersionView,
    EventView,
    MetricPoint,
    NodeView,
    OperationView,
    ServiceView,
    StateChange,
    Wanted,
)
from conpaas.core.messages.public import Paging, UserView
from conpaas.core.states import NodeState, OperationState, ServiceState
from conpaas.director import costs
from conpaas.director.db.models import (
    CodeVersion,
    EventRow,
    Instance,
    MetricRow,
    Operation,
    Service,
    StateChangeRow,
    User,
)

MANAGER_PORT = 5555
S = ServiceState
_CHANGES = ("settings", "scripts", "activate", "move")
ACTIONS: dict[ServiceState, tuple[str, ...]] = {
    S.INIT: ("start", "terminate", *_CHANGES),
    S.PROLOGUE: ("stop",),
    S.RUNNING: ("stop", "scale", *_CHANGES),
    S.ADAPTING: ("stop", "scale", *_CHANGES),
    S.EPILOGUE: (),
    S.STOPPED: ("start", "terminate", *_CHANGES),
    S.ERROR: ("start", "stop", "terminate", *_CHANGES),
}
"""The buttons of each state. Commands by API are not bound to them: stop and terminate work in every state."""


_ON_THE_WAY = frozenset({NodeState.REQUESTED, NodeState.BOOTING})


def user_view(row: User) -> UserView:
    """Show an account."""
    return UserView(
        id=row.id,
        username=row.username,
        email=row.email,
        first_name=row.first_name,
        last_name=row.last_name,
        affiliation=row.affiliation,
        admin=row.admin,
        disabled=row.disabled,
        credits=row.credits,
        created=row.created,
    )


def node_view(row: Instance, now: datetime) -> NodeView:
    """Show an instance."""
    return NodeView(
        id=row.id,
        kind="manager" if row.kind == "manager" else "agent",
        cloud=row.cloud,
        meant_for=row.meant_for,
        size=row.size,
        zone=row.zone,
        cloud_id=row.cloud_id,
        address=row.address,
        state=row.state,
        reason=row.reason,
        roles=tuple(row.roles),
        created=row.created,
        since=row.since,
        stage=row.stage if row.state in _ON_THE_WAY else "",
        metrics=row.metrics,
        cost=costs.of(row, now),
    )


def operation_view(row: Operation) -> OperationView:
    """Show an operation."""
    return OperationView(
        id=row.id,
        service=row.service_id,
        kind=row.kind,
        state=row.state,
        generation=row.generation,
        done=row.done,
        total=row.total,
        message=row.message,
        error=row.error,
        created=row.created,
        finished=row.finished,
        deadline=row.deadline,
        actor=row.actor,
    )


def code_view(row: CodeVersion, wanted: Wanted) -> CodeVersionView:
    """Show a code version."""
    return CodeVersionView(
        id=row.id,
        filename=row.filename,
        description=row.description,
        sha256=row.sha256,
        size=row.size,
        created=row.created,
        active=row.id == wanted.code,
    )


def event_view(row: EventRow) -> EventView:
    """Show a line of the event log."""
    return EventView(
        id=row.id,
        at=row.at,
        kind=row.kind,
        actor=row.actor,
        service=row.service_id,
        message=row.message,
        before=row.before,
        after=row.after,
    )


def state_change(row: StateChangeRow) -> StateChange:
    """Show a line of a state history."""
    return StateChange(state=row.state, at=row.at, reason=row.reason, actor=row.actor)


def metric_point(row: MetricRow) -> MetricPoint:
    """Show a metric."""
    return MetricPoint(at=row.at, node=row.node, values=row.values)


def manager_of(service: Service, instances: Iterable[Instance]) -> Instance | None:
    """Return the manager's present instance, if there is one."""
    for instance in instances:
        if instance.kind == "manager" and instance.epoch == service.epoch and instance.ended is None:
            return instance
    return None


def service_view(
    service: Service, instances: Sequence[Instance], operation: Operation | None, now: datetime
) -> ServiceView:
    """Show a service with its instances and the newest operation that is under way."""
    manager = manager_of(service, instances)
    wanted = Wanted.model_validate(service.wanted)
    return ServiceView(
        id=service.id,
        name=service.name,
        type=service.type,
        application=service.application_id or "",
        owner=service.user_id,
        cloud=wanted.cloud,
        state=service.state,
        reason=service.reason,
        since=service.since,
        created=service.created,
        generation=service.generation,
        wanted=wanted,
        nodes=tuple(node_view(instance, now) for instance in instances),
        urls=service.urls,
        manager=manager_url(manager),
        actions=() if service.ending else ACTIONS[service.state],
        facts=service.facts,
        operation=None if operation is None else operation_view(operation),
        cost=costs.of_all(instances, [service.spent], now),
    )


def manager_url(manager: Instance | None) -> str:
    """Return where a manager answers; empty if that is not known."""
    return f"https://{manager.address}:{MANAGER_PORT}" if manager is not None and manager.address else ""


async def service_views(session: AsyncSession, services: Sequence[Service], now: datetime) -> list[ServiceView]:
    """Show many services: two queries, however many there are."""
    if not services:
        return []
    ids = [service.id for service in services]
    instances: dict[str, list[Instance]] = defaultdict(list)
    query = select(Instance).where(Instance.service_id.in_(ids), held()).order_by(Instance.seq)
    for instance in await session.scalars(query):
        instances[instance.service_id].append(instance)
    under_way = (
        select(Operation)
        .where(Operation.service_id.in_(ids), Operation.state == OperationState.RUNNING)
        .order_by(Operation.seq)
    )
    operations = {operation.service_id: operation for operation in await session.scalars(under_way)}
    return [service_view(service, instances[service.id], operations.get(service.id), now) for service in services]


def cursor(query: Paging) -> int:
    """Return the row behind which a page begins; 0 for the first page."""
    if query.cursor is None:
        return 0
    if not query.cursor.isdecimal() or len(query.cursor) > 18:
        raise BadInputError("this is not a cursor", value=query.cursor, hint="use the 'next' of the page before")
    return int(query.cursor)


R = TypeVar("R", User, Service, Instance, Operation)


def page(rows: Sequence[R], query: Paging) -> tuple[Sequence[R], str | None]:
    """Cut `rows`, of which one more than the page holds was asked for; return also the cursor of the next page."""
    shown = rows[: query.limit]
    return shown, str(shown[-1].seq) if len(rows) > query.limit else None


def held() -> ColumnElement[bool]:
    """Select instances that exist, or may exist, at their cloud."""
    return Instance.state != NodeState.GONE
