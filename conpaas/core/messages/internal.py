"""What instances, agents and managers ask of their director, over mutual TLS."""

from typing import Literal

from pydantic import Field

from conpaas.core.messages.base import Endpoint, Message, Secret, Who, who
from conpaas.core.messages.model import (
    Ack,
    CodeVersionView,
    MetricPoint,
    NodeView,
    OperationView,
    ServiceRecord,
    StateChange,
    Wanted,
)
from conpaas.core.states import NodeState, ServiceState
from conpaas.core.timings import Timings

_MANAGER = who(Who.MANAGER)
MEMBER_PORT = 5555
"""Where managers and agents listen."""


class Context(Message):
    """The contextualization document: all that a booting instance is told. No private key, no lasting secret."""

    deployment: str
    kind: Literal["manager", "agent"]
    instance: str
    service: str
    service_type: str
    owner: str
    epoch: int
    address: str
    """Where the daemon listens; empty: find out."""
    port: int = MEMBER_PORT
    director: str
    """Base URL of the director's port for instances."""
    ca: str
    """The deployment's CA certificate, PEM."""
    token: Secret
    """One-use enrolment token, valid for minutes."""
    timings: Timings = Timings()


class Enrol(Message):
    """An instance's request for its first certificate."""

    token: Secret
    csr: str


class BootReport(Message):
    """How far an instance has come that has no certificate yet."""

    token: Secret
    stage: str = Field(max_length=40)
    """`CONTEXT`, `NETWORK`, `ENROLLING`, `STARTING`, or `FAILED`."""
    detail: str = Field(default="", max_length=2000)


class Renew(Message):
    """A request for the next certificate, under the present one."""

    csr: str


class Certificate(Message):
    """A signed certificate, PEM."""

    certificate: str
    renew_in_s: float


class ChangeSpec(Message):
    """Compare-and-set of the spec: taken only if `generation` is still the current one."""

    generation: int
    wanted: Wanted
    kind: str
    """Of the operation that this makes."""
    key: str | None = Field(default=None, max_length=100)
    """Idempotency key: a second change with the same key answers the first one's operation."""
    actor: str = ""


class RequestInstances(Message):
    """Ask for nodes. Idempotent by `key`: the same key answers the same instances."""

    count: int = Field(ge=1, le=1000)
    cloud: str
    """For which they are meant; they may come to be on one of the spec's `fallback`, if it refuses them."""
    key: str = Field(max_length=100)


class Instances(Message):
    """Instances, in the order of creation. A refused one is GONE and says why."""

    items: tuple[NodeView, ...]


class NodeReport(Message):
    """What the manager knows of a node."""

    id: str
    state: NodeState
    reason: str = ""
    roles: tuple[str, ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict)


class Report(Message):
    """A manager's account of its service; also its heartbeat."""

    generation: int
    """The generation it works on, or has reached."""
    state: ServiceState
    """RUNNING or STOPPED when all is as wanted, a transient state while not, ERROR when it cannot be."""
    reason: str = ""
    nodes: tuple[NodeReport, ...] = ()
    urls: dict[str, str] = Field(default_factory=dict)
    facts: dict[str, str] = Field(default_factory=dict)
    done: int = 0
    total: int = 0
    message: str = ""
    points: tuple[MetricPoint, ...] = ()


class ReportAck(Message):
    """What the manager should know at once."""

    generation: int
    """The current one: read the record again if it is newer than yours."""
    version: str = ""
    """Of the director."""


class Release(Message):
    """What the caller is to run."""

    version: str
    """The director's."""
    bundle: str = ""
    """SHA-256 of the archive to run it from; empty: the instance runs the director's own installation."""


class VolumeView(Message):
    """A disk that keeps a role's data."""

    id: str
    role: str
    ready: bool = False
    """It is attached, and found at one of `devices`."""
    devices: tuple[str, ...] = ()
    """Paths of a block device, the surest first, or of a folder. Empty when ready: the cloud has no volumes."""
    reason: str = ""


class StateHistory(Message):
    """The states of a service, oldest first."""

    changes: tuple[StateChange, ...]


class UploadQuery(Message):
    """What an upload is."""

    filename: str = Field(default="code.tar.gz", max_length=200)
    description: str = Field(default="", max_length=500)


class Gone(Message):
    """Why an instance is to be deleted."""

    reason: str = ""
    failed: bool = False
    """It was lost or never booted, rather than no longer needed."""


ENROL = Endpoint(
    method="POST",
    path="/internal/enrol",
    summary="First certificate for a one-use token",
    allow=who(Who.ANYONE),
    request=Enrol,
    response=Certificate,
)
REPORT_BOOT = Endpoint(
    method="POST",
    path="/internal/boot",
    summary="How far a booting instance has come",
    allow=who(Who.ANYONE),
    request=BootReport,
    response=Ack,
)
RENEW = Endpoint(
    method="POST",
    path="/internal/renew",
    summary="Next certificate",
    allow=who(Who.MANAGER, Who.AGENT),
    request=Renew,
    response=Certificate,
)
READ_RECORD = Endpoint(
    method="GET",
    path="/internal/services/{id}",
    summary="All about the manager's service",
    allow=_MANAGER,
    response=ServiceRecord,
)
CHANGE_SPEC = Endpoint(
    method="PUT",
    path="/internal/services/{id}/spec",
    summary="Change what is wanted",
    allow=_MANAGER,
    request=ChangeSpec,
    response=OperationView,
)
REQUEST_INSTANCES = Endpoint(
    method="POST",
    path="/internal/services/{id}/instances",
    summary="Ask for nodes",
    allow=_MANAGER,
    request=RequestInstances,
    response=Instances,
    timeout_s=60,
)
DELETE_INSTANCE = Endpoint(
    method="POST",
    path="/internal/services/{id}/instances/{instance}/delete",
    summary="Give a node back",
    allow=_MANAGER,
    request=Gone,
    response=Ack,
    timeout_s=60,
)
DESCRIBE_INSTANCE = Endpoint(
    method="GET",
    path="/internal/services/{id}/instances/{instance}",
    summary="Ask the cloud how a node is",
    allow=_MANAGER,
    response=NodeView,
    timeout_s=30,
)
REPORT = Endpoint(
    method="POST",
    path="/internal/services/{id}/report",
    summary="State, progress and metrics",
    allow=_MANAGER,
    request=Report,
    response=ReportAck,
)
READ_RELEASE = Endpoint(
    method="GET",
    path="/internal/release",
    summary="Which version to run",
    allow=who(Who.MANAGER, Who.AGENT),
    response=Release,
    timeout_s=120,
)
DOWNLOAD_BUNDLE = Endpoint(
    method="GET",
    path="/internal/bundles/{sha256}",
    summary="The archive of a version",
    allow=who(Who.MANAGER, Who.AGENT),
    download=True,
    timeout_s=600,
)
ENSURE_VOLUME = Endpoint(
    method="POST",
    path="/internal/services/{id}/instances/{instance}/volumes/{role}",
    summary="Give a node the disk of a role's data",
    allow=_MANAGER,
    response=VolumeView,
    timeout_s=120,
)
READ_STATES = Endpoint(
    method="GET",
    path="/internal/services/{id}/states",
    summary="State history",
    allow=_MANAGER,
    response=StateHistory,
)
DOWNLOAD_BLOB = Endpoint(
    method="GET",
    path="/internal/services/{id}/blobs/{sha256}",
    summary="A code version's bytes",
    allow=_MANAGER,
    download=True,
    timeout_s=600,
)
UPLOAD_CODE_FOR = Endpoint(
    method="POST",
    path="/internal/services/{id}/code",
    summary="A new code version",
    allow=_MANAGER,
    query=UploadQuery,
    upload=True,
    response=CodeVersionView,
    timeout_s=600,
)
