"""The nouns: users, services, nodes, code versions, operations, events, as they travel in every direction."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from conpaas.core.messages.base import Message, Secret
from conpaas.core.states import NodeState, OperationState, ServiceState

Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]+$")
]
"""What people call a thing: 1 to 80 characters of any language, no control characters."""
RoleName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
CloudName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,59}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Ack(Message):
    """Done, nothing to say."""

    ok: bool = True


class Wanted(Message):
    """The spec of a service: what its owner wants. Owned by the director, changed by compare-and-set."""

    running: bool = False
    roles: dict[RoleName, int] = Field(default_factory=dict)
    """Dedicated nodes by role; a role at 0 lives on a shared node, as its planner says."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Validated by the service type's settings model."""
    code: str | None = None
    """Id of the active code version."""
    start_script: str = ""
    """Run on an instance when it starts; its first line names the interpreter."""
    stop_script: str = ""
    """Run on an instance before it stops."""
    cloud: str = ""
    """Where its manager is, and its nodes unless `places` says otherwise."""
    places: dict[RoleName, dict[CloudName, int]] = Field(default_factory=dict)
    """Of the dedicated nodes of a role, how many are on another cloud than `cloud`."""
    fallback: tuple[CloudName, ...] = ()
    """Clouds that take a node, in this order, when the one it is meant for refuses it."""
    sizes: dict[CloudName, str] = Field(default_factory=dict)
    """Of its instances, by cloud; a cloud that is not named gives its default size."""


class Cost(Message):
    """What instances cost at their providers, by currency. Empty where no price is known."""

    hourly: dict[str, Decimal] = Field(default_factory=dict)
    """Of what runs now, per hour."""
    total: dict[str, Decimal] = Field(default_factory=dict)
    """So far, of what runs and what has ended."""


class CodeVersionView(Message):
    """One immutable upload of user code."""

    id: str
    filename: str
    description: str = ""
    sha256: Sha256
    size: int
    """Bytes of the archive."""
    created: datetime
    active: bool = False


class NodeView(Message):
    """An instance of a service, its manager's included."""

    id: str
    kind: Literal["manager", "agent"]
    cloud: str
    """Where it is."""
    meant_for: str = ""
    """The cloud that it was asked for: another one if that one refused it."""
    size: str = ""
    zone: str = ""
    cloud_id: str = ""
    """The instance's id as the cloud reports it."""
    address: str = ""
    state: NodeState
    reason: str = ""
    roles: tuple[str, ...] = ()
    created: datetime
    since: datetime
    """When it came into its present state."""
    stage: str = ""
    """While it boots: how far it has come, in its own words."""
    metrics: dict[str, float] = Field(default_factory=dict)
    cost: Cost = Cost()


class OperationView(Message):
    """A long operation: it is under way until its state says otherwise."""

    id: str
    service: str
    kind: str
    """`create`, `start`, `stop`, `scale`, `configure`, `activate`, `terminate`, …"""
    state: OperationState
    generation: int = 0
    done: int = 0
    total: int = 0
    message: str = ""
    """Progress for people: `2 of 3 nodes serving`."""
    error: str = ""
    created: datetime
    finished: datetime | None = None
    deadline: datetime
    actor: str = ""


class ServiceView(Message):
    """A service as its owner sees it."""

    id: str
    name: str
    type: str
    application: str
    owner: str
    cloud: str
    state: ServiceState
    reason: str = ""
    since: datetime
    created: datetime
    generation: int
    """Raised with each change of what is wanted; send it as `If-Match` to change only what you have seen."""
    wanted: Wanted
    nodes: tuple[NodeView, ...] = ()
    urls: dict[str, str] = Field(default_factory=dict)
    """Where to look, by purpose: `application`, …"""
    manager: str = ""
    """Base URL of the manager, for `managerc`; empty while there is none."""
    actions: tuple[str, ...] = ()
    """What can be done now: `start`, `stop`, `terminate`, `scale`, …"""
    facts: dict[str, str] = Field(default_factory=dict)
    """What the type shows on its card, by label."""
    operation: OperationView | None = None
    """The newest operation that is under way."""
    cost: Cost = Cost()


class StateChange(Message):
    """One line of a service's state history."""

    state: ServiceState
    at: datetime
    reason: str = ""
    actor: str = ""


class EventView(Message):
    """One line of the append-only log: who, what, when, before, after."""

    id: int
    at: datetime
    kind: str
    actor: str
    service: str | None = None
    message: str = ""
    before: str = ""
    after: str = ""


class MetricPoint(Message):
    """Values of one node (or, with an empty `node`, of the whole service) over one interval."""

    at: datetime
    node: str = ""
    values: dict[str, float]
    """`request_rate` 1/s, `error_rate` 1/s, `throughput` bytes/s, `response_p50`, `_p95`, `_p99` ms, `cpu`, …"""


class LogChunk(Message):
    """A piece of a log. Ask again from `next` for what follows."""

    text: str
    next: int
    """Offset in bytes just behind this piece."""
    size: int


class LogName(Message):
    """A log that can be read."""

    node: str
    name: str
    size: int = 0


class ServiceRecord(Message):
    """All that a manager must know of its service, as the director's database has it."""

    id: str
    name: str
    type: str
    owner: str
    state: ServiceState
    generation: int
    epoch: int
    wanted: Wanted
    nodes: tuple[NodeView, ...]
    """Agents only, in the order of their creation, GONE ones left out."""
    code: tuple[CodeVersionView, ...]
    seed: Secret
    """Random per service: internal passwords are derived from it, so that a new manager knows them too."""
    cloud: str
    """As in `wanted`, where managers of version 3.0 do not look for it."""
    address: str = ""
    """Where the nodes reach the manager's instance, as its cloud says; empty while that is not known."""
    predecessor: str = ""
    """Where the instance of the manager before is, while it is kept for what is to be taken over; else empty."""
