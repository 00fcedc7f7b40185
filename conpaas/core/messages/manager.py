"""Commands that the director, or the owner by `managerc`, gives to a manager."""

from typing import Any

from pydantic import Field

from conpaas.core.messages.agent import LogQuery
from conpaas.core.messages.base import Endpoint, Message, Who, who
from conpaas.core.messages.internal import StateHistory, UploadQuery
from conpaas.core.messages.model import (
    Ack,
    CodeVersionView,
    LogChunk,
    LogName,
    MetricPoint,
    NodeView,
    OperationView,
    RoleName,
    Wanted,
)
from conpaas.core.states import ServiceState

_BOTH = who(Who.DIRECTOR, Who.OWNER)


class SpecChanged(Message):
    """What is wanted is new: read the record again."""

    generation: int


class ChangeRoles(Message):
    """How many nodes more (or, with `remove`, fewer) of each role."""

    roles: dict[RoleName, int]
    cloud: str | None = Field(default=None, max_length=60)
    """Where; unset: the service's own cloud."""
    key: str | None = Field(default=None, max_length=100)


class Configure(Message):
    """Settings to change; the rest stay. `code` activates a code version."""

    settings: dict[str, Any] = Field(default_factory=dict)
    code: str | None = None
    key: str | None = Field(default=None, max_length=100)


class Keyed(Message):
    """A command with nothing but an idempotency key."""

    key: str | None = Field(default=None, max_length=100)


class ManagerState(Message):
    """`getState`."""

    state: ServiceState
    reason: str = ""
    generation: int = 0


class Nodes(Message):
    """`listServiceNodes`."""

    nodes: tuple[NodeView, ...]


class Configuration(Message):
    """`getConfiguration`."""

    wanted: Wanted


class CodeVersions(Message):
    """`listCodeVersions`, newest first."""

    items: tuple[CodeVersionView, ...]


class Monitoring(Message):
    """`getHighLevelMonitoring`: averages of the last minute for the service, and the newest values of each node."""

    request_rate: float = 0.0
    """Requests per second."""
    throughput: float = 0.0
    """Bytes per second."""
    error_rate: float = 0.0
    """Failed requests per second."""
    response_p50: float = 0.0
    """Milliseconds; likewise p95 and p99."""
    response_p95: float = 0.0
    response_p99: float = 0.0
    nodes: tuple[MetricPoint, ...] = ()


class ManagerLogs(Message):
    """All logs of all nodes; the manager's own under node `manager`."""

    logs: tuple[LogName, ...]


class CommandBody(Message):
    """Arguments of a command of the service type, validated by its own model."""

    arguments: dict[str, Any] = Field(default_factory=dict)


class CommandAnswer(Message):
    """Answer of a command of the service type."""

    result: dict[str, Any] = Field(default_factory=dict)


SPEC_CHANGED = Endpoint(
    method="POST",
    path="/spec",
    summary="What is wanted is new",
    allow=who(Who.DIRECTOR),
    request=SpecChanged,
    response=Ack,
    timeout_s=3,
)
STARTUP = Endpoint(
    method="POST",
    path="/startup",
    summary="Start the service",
    allow=_BOTH,
    request=Keyed,
    response=OperationView,
)
SHUTDOWN = Endpoint(
    method="POST",
    path="/shutdown",
    summary="Stop the service",
    allow=_BOTH,
    request=Keyed,
    response=OperationView,
)
ADD = Endpoint(
    method="POST",
    path="/nodes/add",
    summary="Add service nodes",
    allow=_BOTH,
    request=ChangeRoles,
    response=OperationView,
)
REMOVE = Endpoint(
    method="POST",
    path="/nodes/remove",
    summary="Remove service nodes",
    allow=_BOTH,
    request=ChangeRoles,
    response=OperationView,
)
LIST_NODES = Endpoint(method="GET", path="/nodes", summary="All nodes", allow=_BOTH, response=Nodes)
GET_NODE = Endpoint(method="GET", path="/nodes/{node}", summary="One node", allow=_BOTH, response=NodeView)
GET_STATE = Endpoint(method="GET", path="/state", summary="State of the service", allow=_BOTH, response=ManagerState)
GET_STATES = Endpoint(method="GET", path="/states", summary="State history", allow=_BOTH, response=StateHistory)
GET_CONFIGURATION = Endpoint(
    method="GET", path="/configuration", summary="What is wanted", allow=_BOTH, response=Configuration
)
UPDATE_CONFIGURATION = Endpoint(
    method="PUT",
    path="/configuration",
    summary="Change settings or code",
    allow=_BOTH,
    request=Configure,
    response=OperationView,
)
LIST_CODE = Endpoint(method="GET", path="/code", summary="Code versions", allow=_BOTH, response=CodeVersions)
UPLOAD_CODE = Endpoint(
    method="POST",
    path="/code",
    summary="Upload a code version",
    allow=_BOTH,
    query=UploadQuery,
    upload=True,
    response=CodeVersionView,
    timeout_s=600,
)
DOWNLOAD_CODE = Endpoint(
    method="GET",
    path="/code/{version}",
    summary="Download a code version",
    allow=_BOTH,
    download=True,
    timeout_s=600,
)
GET_MONITORING = Endpoint(
    method="GET",
    path="/monitoring",
    summary="Average request rate and throughput",
    allow=_BOTH,
    response=Monitoring,
)
LIST_ALL_LOGS = Endpoint(method="GET", path="/logs", summary="Logs of all nodes", allow=_BOTH, response=ManagerLogs)
READ_NODE_LOG = Endpoint(
    method="GET",
    path="/logs/{node}/{name}",
    summary="A piece of a log",
    allow=_BOTH,
    query=LogQuery,
    response=LogChunk,
)
RUN_COMMAND = Endpoint(
    method="POST",
    path="/commands/{name}",
    summary="A command of the service type",
    allow=_BOTH,
    request=CommandBody,
    response=CommandAnswer,
    timeout_s=600,
)
