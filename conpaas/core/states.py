"""The states of services, nodes and operations, and the moves between them.

One function moves (`check_move`); who calls it records time, reason and actor. The charts in the documentation are
generated from the tables.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from conpaas.core.errors import IllegalMoveError


class ServiceState(StrEnum):
    """What a service is doing."""

    INIT = "INIT"
    PROLOGUE = "PROLOGUE"
    RUNNING = "RUNNING"
    ADAPTING = "ADAPTING"
    EPILOGUE = "EPILOGUE"
    STOPPED = "STOPPED"
    ERROR = "ERROR"


class NodeState(StrEnum):
    """What an instance is doing for its service; the manager's instance uses the same states."""

    REQUESTED = "REQUESTED"
    BOOTING = "BOOTING"
    CONFIGURING = "CONFIGURING"
    SERVING = "SERVING"
    DEGRADED = "DEGRADED"
    DRAINING = "DRAINING"
    DELETING = "DELETING"
    GONE = "GONE"
    LOST = "LOST"


class OperationState(StrEnum):
    """How a long operation stands."""

    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


S, N = ServiceState, NodeState

SERVICE_MOVES: Mapping[ServiceState, frozenset[ServiceState]] = {
    S.INIT: frozenset({S.PROLOGUE, S.EPILOGUE, S.ERROR}),
    S.PROLOGUE: frozenset({S.RUNNING, S.EPILOGUE, S.ERROR}),
    S.RUNNING: frozenset({S.ADAPTING, S.EPILOGUE, S.ERROR}),
    S.ADAPTING: frozenset({S.RUNNING, S.EPILOGUE, S.ERROR}),
    S.EPILOGUE: frozenset({S.STOPPED, S.PROLOGUE, S.ERROR}),
    S.STOPPED: frozenset({S.PROLOGUE, S.EPILOGUE, S.ERROR}),
    S.ERROR: frozenset({S.PROLOGUE, S.ADAPTING, S.RUNNING, S.EPILOGUE}),
}

NODE_MOVES: Mapping[NodeState, frozenset[NodeState]] = {
    N.REQUESTED: frozenset({N.BOOTING, N.DELETING, N.LOST}),
    N.BOOTING: frozenset({N.CONFIGURING, N.SERVING, N.DELETING, N.LOST}),
    N.CONFIGURING: frozenset({N.SERVING, N.DEGRADED, N.DRAINING, N.DELETING, N.LOST}),
    N.SERVING: frozenset({N.CONFIGURING, N.DEGRADED, N.DRAINING, N.DELETING, N.LOST}),
    N.DEGRADED: frozenset({N.SERVING, N.CONFIGURING, N.DRAINING, N.DELETING, N.LOST}),
    N.DRAINING: frozenset({N.CONFIGURING, N.SERVING, N.DEGRADED, N.DELETING, N.LOST}),
    N.LOST: frozenset({N.DELETING, N.GONE}),
    N.DELETING: frozenset({N.GONE}),
    N.GONE: frozenset(),
}

#: Something is under way: a front-end keeps looking.
TRANSIENT = frozenset({S.PROLOGUE, S.ADAPTING, S.EPILOGUE})
#: The instance exists, or may exist, at the cloud.
HELD = frozenset(set(NodeState) - {N.GONE})

AnyState = TypeVar("AnyState", ServiceState, NodeState)


def check_move(moves: Mapping[AnyState, frozenset[AnyState]], old: AnyState, new: AnyState, why: str) -> None:
    """Raise IllegalMoveError when `new` cannot follow `old`."""
    if new not in moves[old]:
        raise IllegalMoveError(f"cannot go from {old} to {new}: {why}", value=new)
