"""Commands that a manager gives to an agent, and what the agent answers."""

from typing import Any

from pydantic import Field

from conpaas.core.messages.base import Endpoint, Message, Who, who
from conpaas.core.messages.model import Ack, LogChunk, RoleName

_MANAGER = who(Who.MANAGER)


class RoleStatus(Message):
    """How one role on a node is."""

    healthy: bool
    detail: str = ""
    """Why it is not healthy, or what it is busy with, for people."""
    digest: str = ""
    """Of the configuration last applied: equal digests, equal configurations."""
    metrics: dict[str, float] = Field(default_factory=dict)


class AgentStatus(Message):
    """A node's own account of itself."""

    instance: str
    version: str
    roles: dict[str, RoleStatus] = Field(default_factory=dict)
    prepared: bool = False
    """The start script has run."""
    volumes: tuple[RoleName, ...] = ()
    """Roles whose volume is there."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Of the whole node: `cpu` (share of one core), `memory` (bytes), `disk_free` (bytes)."""


class ApplyRoles(Message):
    """Make these roles so. Roles not named are left alone. Applying the same twice does nothing."""

    roles: dict[RoleName, dict[str, Any]]


class StopRole(Message):
    """End a role: drain for at most `drain_s` seconds, then stop its engines. A role that is not there is fine."""

    drain_s: float = Field(default=10.0, ge=0, le=3600)


class Prepare(Message):
    """Give the user's scripts, and run the start script if it has not run on this instance."""

    start_script: str = ""
    stop_script: str = ""
    timeout_s: float = Field(default=60.0, gt=0, le=3600)


class Farewell(Message):
    """Stop all roles and run the user's stop script: the instance is about to be deleted."""

    drain_s: float = Field(default=10.0, ge=0, le=3600)
    timeout_s: float = Field(default=60.0, gt=0, le=3600)


class Mount(Message):
    """Use a volume for the data of a role; an empty one gets a file system."""

    volume: str
    devices: tuple[str, ...]
    """Where it may be: the first of these paths that is there is the one."""
    timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """How long to wait until one of them is."""


class BlobView(Message):
    """Whether a node has a blob."""

    present: bool


class LogNames(Message):
    """The logs of a node, by name, with their sizes in bytes."""

    logs: dict[str, int]


class LogQuery(Message):
    """From where to read a log. A negative offset counts from the end."""

    offset: int = -65536
    limit: int = Field(default=65536, ge=1, le=1_048_576)


GET_STATUS = Endpoint(
    method="GET", path="/status", summary="How the node is", allow=_MANAGER, response=AgentStatus, timeout_s=5
)
APPLY_ROLES = Endpoint(
    method="PUT",
    path="/roles",
    summary="Make roles so",
    allow=_MANAGER,
    request=ApplyRoles,
    response=AgentStatus,
    timeout_s=120,
)
STOP_ROLE = Endpoint(
    method="POST",
    path="/roles/{role}/stop",
    summary="Drain and stop a role",
    allow=_MANAGER,
    request=StopRole,
    response=AgentStatus,
    timeout_s=120,
)
PREPARE = Endpoint(
    method="POST",
    path="/prepare",
    summary="Run the user's start script",
    allow=_MANAGER,
    request=Prepare,
    response=AgentStatus,
    timeout_s=3660,
)
FAREWELL = Endpoint(
    method="POST",
    path="/farewell",
    summary="Stop all and run the user's stop script",
    allow=_MANAGER,
    request=Farewell,
    response=Ack,
    timeout_s=3660,
)
MOUNT = Endpoint(
    method="PUT",
    path="/volumes/{role}",
    summary="Use a volume for a role's data",
    allow=_MANAGER,
    request=Mount,
    response=AgentStatus,
    timeout_s=180,
)
FOLLOW = Endpoint(
    method="POST",
    path="/follow",
    summary="Become the director's version, if that is newer",
    allow=_MANAGER,
    response=Ack,
)
HAS_BLOB = Endpoint(
    method="GET",
    path="/blobs/{sha256}",
    summary="Whether the node has a blob",
    allow=_MANAGER,
    response=BlobView,
)
PUT_BLOB = Endpoint(
    method="PUT",
    path="/blobs/{sha256}",
    summary="Give the node a blob",
    allow=_MANAGER,
    upload=True,
    response=BlobView,
    timeout_s=600,
)
LIST_LOGS = Endpoint(method="GET", path="/logs", summary="The node's logs", allow=_MANAGER, response=LogNames)
READ_LOG = Endpoint(
    method="GET",
    path="/logs/{name}",
    summary="A piece of a log",
    allow=_MANAGER,
    query=LogQuery,
    response=LogChunk,
)
