"""The moves of services and operations: which follows from what, and how one is written down."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core.states import SERVICE_MOVES, OperationState, ServiceState, check_move
from conpaas.director.db.models import Instance, Operation, Service, StateChangeRow
from conpaas.director.views import held

S = ServiceState

CREATE, START, STOP, TERMINATE, UNDO = "create", "start", "stop", "terminate", "undo"
_ENDING = {STOP, TERMINATE}


def after_change(state: ServiceState, *, kind: str, running: bool, was_running: bool) -> ServiceState | None:
    """Return the state that a service enters when what is wanted changes; None if it stays where it is."""
    if running:
        if state is S.RUNNING or (state is S.ERROR and kind != START and was_running):
            return S.ADAPTING
        return None if state in {S.PROLOGUE, S.ADAPTING} else S.PROLOGUE
    if (kind in _ENDING or was_running) and state is not S.EPILOGUE:
        return S.EPILOGUE
    return None


def after_report(state: ServiceState, said: ServiceState, *, running: bool) -> ServiceState | None:
    """Return the state that a service enters when its manager says how it is; None if it stays where it is.

    A service that has failed leaves ERROR only when it runs after all, or by a command: attempts in between are no
    news. A new manager that has yet to look around does not take its service out of RUNNING.
    """
    if running:
        from_states = {S.RUNNING: {S.PROLOGUE, S.ADAPTING, S.ERROR}, S.ADAPTING: {S.RUNNING}}
    else:
        from_states = {S.STOPPED: {S.EPILOGUE}}
    from_states[S.ERROR] = {S.PROLOGUE, S.ADAPTING, S.RUNNING, S.EPILOGUE}
    return said if state in from_states.get(said, set()) else None


def move(
    session: AsyncSession, service: Service, state: ServiceState, *, at: datetime, actor: str, reason: str = ""
) -> None:
    """Move a service to another state and write it into its history; raise IllegalMoveError if it cannot go there."""
    check_move(SERVICE_MOVES, service.state, state, reason)
    service.state, service.since, service.reason = state, at, reason
    session.add(StateChangeRow(service_id=service.id, state=state, at=at, reason=reason, actor=actor))


def finish(operation: Operation, state: OperationState, *, at: datetime, message: str = "", error: str = "") -> None:
    """End an operation that is under way."""
    operation.state, operation.finished = state, at
    operation.message = message or operation.message
    operation.error = error


async def under_way(session: AsyncSession, service_id: str) -> Sequence[Operation]:
    """Return the operations of a service that are under way, oldest first."""
    query = select(Operation).where(Operation.service_id == service_id, Operation.state == OperationState.RUNNING)
    return (await session.scalars(query.order_by(Operation.seq))).all()


async def instances_of(session: AsyncSession, service_id: str) -> Sequence[Instance]:
    """Return the instances of a service that are not gone, in the order of their creation."""
    query = select(Instance).where(Instance.service_id == service_id, held()).order_by(Instance.seq)
    return (await session.scalars(query)).all()
