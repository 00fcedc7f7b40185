"""The public API of the director, under `/api/v1`: what people, the web UI, the CLI and the SDK say to it."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from conpaas.core.messages.agent import LogQuery
from conpaas.core.messages.base import Endpoint, Message, Secret, Who, who
from conpaas.core.messages.internal import StateHistory, UploadQuery
from conpaas.core.messages.manager import (
    CodeVersions,
    CommandAnswer,
    CommandBody,
    ManagerLogs,
    Monitoring,
    Nodes,
)
from conpaas.core.messages.model import (
    Ack,
    CodeVersionView,
    EventView,
    LogChunk,
    MetricPoint,
    Name,
    NodeView,
    OperationView,
    RoleName,
    ServiceView,
)

Username = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[a-z][a-z0-9_.-]{1,31}$")]
Password = Annotated[Secret, Field(min_length=8, max_length=200)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)]

_USER, _ADMIN, _OWNER = who(Who.USER), who(Who.ADMIN), who(Who.OWNER)


# -- accounts -----------------------------------------------------------------------------------------------------


class Captcha(Message):
    """An ALTCHA proof-of-work challenge, in the widget's own form."""

    challenge: dict[str, Any]


class Registration(Message):
    """A new account."""

    username: Username
    email: Annotated[str, StringConstraints(strip_whitespace=True, max_length=200, pattern=r"^[^@\s]+@[^@\s]+$")]
    password: Password
    first_name: Text = ""
    last_name: Text = ""
    affiliation: Text = ""
    captcha: str = ""
    """The solved challenge: base64 of the widget's payload."""


class Credentials(Message):
    """User name and password."""

    username: str = Field(max_length=200)
    password: Secret


class Session(Message):
    """A bearer token: send it as `Authorization: Bearer …`."""

    token: Secret
    expires: datetime
    user: "UserView"


class UserView(Message):
    """An account."""

    id: str
    username: str
    email: str = ""
    first_name: str = ""
    last_name: str = ""
    affiliation: str = ""
    admin: bool = False
    disabled: bool = False
    credits: int = 0
    created: datetime


class Users(Message):
    """A page of users."""

    items: tuple[UserView, ...]
    next: str | None = None


class ChangePassword(Message):
    """A new password, proved by the old one."""

    old: Secret
    new: Password


class ChangeUser(Message):
    """What an administrator changes of an account."""

    admin: bool | None = None
    disabled: bool | None = None


class Grant(Message):
    """Credits given to (or, negative, taken from) a user."""

    amount: int = Field(ge=-1_000_000, le=1_000_000)
    reason: Text = ""


class CreateToken(Message):
    """An API token to be made."""

    name: Name
    scopes: tuple[Literal["read", "write", "admin"], ...] = ("read", "write")
    expires_in_days: int = Field(default=90, ge=1, le=3650)


class TokenView(Message):
    """An API token; its secret is shown once, when it is made."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created: datetime
    expires: datetime
    last_used: datetime | None = None
    secret: Secret | None = None


class Tokens(Message):
    """All tokens of a user."""

    items: tuple[TokenView, ...]


class AddKey(Message):
    """An SSH public key, in one `authorized_keys` line."""

    name: Name
    key: str = Field(max_length=10_000)


class KeyView(Message):
    """An SSH public key that may push code."""

    id: str
    name: str
    fingerprint: str
    created: datetime


class Keys(Message):
    """All SSH keys of a user."""

    items: tuple[KeyView, ...]


class CertificateRequest(Message):
    """A CSR of the user, for `managerc`."""

    csr: str


class UserCertificate(Message):
    """A user's certificate and the CA's, PEM."""

    certificate: str
    ca: str
    deployment: str
    user: str


# -- catalogue ----------------------------------------------------------------------------------------------------


class RoleView(Message):
    """A role of a service type."""

    name: str
    title: str
    description: str = ""
    minimum: int = 0
    maximum: int = 64
    initial: int = 0
    scalable: bool = True


class CommandView(Message):
    """A command of a service type."""

    name: str
    title: str
    arguments: dict[str, Any]
    """JSON Schema."""


class ServiceTypeView(Message):
    """A service type that can be created here."""

    name: str
    title: str
    description: str
    icon: str = "box"
    roles: tuple[RoleView, ...]
    settings: dict[str, Any]
    """JSON Schema of the settings."""
    commands: tuple[CommandView, ...] = ()
    takes_code: bool = False
    enabled: bool = True
    reason: str = ""


class ServiceTypes(Message):
    """The catalogue."""

    items: tuple[ServiceTypeView, ...]


class CloudView(Message):
    """A configured cloud."""

    name: str
    title: str
    driver: str
    enabled: bool = True
    reason: str = ""
    instances: int = 0
    default: bool = False


class Clouds(Message):
    """All clouds; a disabled one says why."""

    items: tuple[CloudView, ...]


class Version(Message):
    """What answers here."""

    version: str
    deployment: str
    ssh_port: int = 0
    registration: bool = True


# -- applications and services ------------------------------------------------------------------------------------


class CreateApplication(Message):
    """A new, empty application."""

    name: Name


class Rename(Message):
    """A new name."""

    name: Name


class ApplicationView(Message):
    """A named set of services."""

    id: str
    name: str
    created: datetime
    services: int = 0


class Applications(Message):
    """All applications of a user."""

    items: tuple[ApplicationView, ...]


class CreateService(Message):
    """A new service. Its manager is created at once; nothing else runs until it is started."""

    type: str = Field(max_length=60)
    name: Name | None = None
    cloud: str | None = Field(default=None, max_length=60)
    application: str | None = Field(default=None, max_length=60)
    key: str | None = Field(default=None, max_length=100)


class Paging(Message):
    """Which page: `cursor` is the `next` of the page before."""

    cursor: str | None = None
    limit: int = Field(default=100, ge=1, le=500)


class ServiceQuery(Paging):
    """Which services."""

    application: str | None = None


class Services(Message):
    """A page of services, oldest first."""

    items: tuple[ServiceView, ...]
    next: str | None = None


class Keyed(Message):
    """A client-chosen idempotency key: the same key answers the same operation."""

    key: str | None = Field(default=None, max_length=100)


class Scale(Keyed):
    """Nodes to add (positive) or remove (negative), by role."""

    roles: dict[RoleName, int] = Field(min_length=1)


class ChangeSettings(Keyed):
    """Settings to change; the others stay as they are."""

    settings: dict[str, Any]


class Scripts(Keyed):
    """The user's scripts, run when an instance starts and before it stops."""

    start: str = Field(default="", max_length=100_000)
    stop: str = Field(default="", max_length=100_000)


class CheckoutCode(Keyed):
    """A git repository to make a code version of."""

    url: str = Field(max_length=1000)
    branch: str = Field(default="", max_length=200)


class Operations(Message):
    """A page of operations, newest first."""

    items: tuple[OperationView, ...]
    next: str | None = None


class OperationQuery(Paging):
    """Which operations."""

    service: str | None = None


class History(Message):
    """A page of the event log, newest first."""

    items: tuple[EventView, ...]
    next: str | None = None


class HistoryQuery(Paging):
    """Which events."""

    service: str | None = None


class MetricsQuery(Message):
    """Which metrics."""

    minutes: int = Field(default=60, ge=1, le=1440)
    node: str | None = None


class Metrics(Message):
    """Points in time, oldest first; an empty `node` is the service as a whole."""

    points: tuple[MetricPoint, ...]


class EventsQuery(Message):
    """Which live events."""

    service: str | None = None


class Live(Message):
    """One server-sent event. Of the fields, those that go with its kind are there."""

    kind: Literal["hello", "service", "removed", "operation", "metrics", "credits", "event"]
    service: ServiceView | None = None
    id: str | None = None
    operation: OperationView | None = None
    points: tuple[MetricPoint, ...] = ()
    credits: int | None = None
    event: EventView | None = None


class FollowQuery(Message):
    """From where to follow a log; negative counts from the end."""

    offset: int = -16384


class InstanceRow(NodeView):
    """An instance with whose it is, for the administrator."""

    service: str
    owner: str
    charged: int = 0
    """Credits charged for it so far."""


class InstanceRows(Message):
    """A page of all instances."""

    items: tuple[InstanceRow, ...]
    next: str | None = None


Session.model_rebuild()

P = "/api/v1"
GET_VERSION = Endpoint(
    method="GET",
    path=f"{P}/version",
    summary="What answers here",
    allow=who(Who.ANYONE),
    response=Version,
    tags=("meta",),
)
GET_CAPTCHA = Endpoint(
    method="GET",
    path=f"{P}/captcha",
    summary="A proof-of-work challenge for registration",
    allow=who(Who.ANYONE),
    response=Captcha,
    tags=("account",),
)
REGISTER = Endpoint(
    method="POST",
    path=f"{P}/register",
    summary="Make an account",
    allow=who(Who.ANYONE),
    request=Registration,
    response=UserView,
    status=201,
    tags=("account",),
)
LOGIN = Endpoint(
    method="POST",
    path=f"{P}/login",
    summary="Get a session",
    allow=who(Who.ANYONE),
    request=Credentials,
    response=Session,
    tags=("account",),
)
LOGOUT = Endpoint(
    method="POST", path=f"{P}/logout", summary="End the session", allow=_USER, response=Ack, tags=("account",)
)
GET_ME = Endpoint(method="GET", path=f"{P}/me", summary="My account", allow=_USER, response=UserView, tags=("account",))
CHANGE_PASSWORD = Endpoint(
    method="POST",
    path=f"{P}/me/password",
    summary="Change my password",
    allow=_USER,
    request=ChangePassword,
    response=Ack,
    tags=("account",),
)
LIST_TOKENS = Endpoint(
    method="GET",
    path=f"{P}/me/tokens",
    summary="My API tokens",
    allow=_USER,
    response=Tokens,
    tags=("account",),
)
CREATE_TOKEN = Endpoint(
    method="POST",
    path=f"{P}/me/tokens",
    summary="Make an API token",
    allow=_USER,
    request=CreateToken,
    response=TokenView,
    status=201,
    tags=("account",),
)
DELETE_TOKEN = Endpoint(
    method="DELETE",
    path=f"{P}/me/tokens/{{token}}",
    summary="Revoke an API token",
    allow=_USER,
    response=Ack,
    tags=("account",),
)
LIST_KEYS = Endpoint(
    method="GET", path=f"{P}/me/keys", summary="My SSH keys", allow=_USER, response=Keys, tags=("account",)
)
ADD_KEY = Endpoint(
    method="POST",
    path=f"{P}/me/keys",
    summary="Add an SSH key",
    allow=_USER,
    request=AddKey,
    response=KeyView,
    status=201,
    tags=("account",),
)
DELETE_KEY = Endpoint(
    method="DELETE",
    path=f"{P}/me/keys/{{key}}",
    summary="Remove an SSH key",
    allow=_USER,
    response=Ack,
    tags=("account",),
)
GET_CERTIFICATE = Endpoint(
    method="POST",
    path=f"{P}/me/certificate",
    summary="A certificate to talk to managers",
    allow=_USER,
    request=CertificateRequest,
    response=UserCertificate,
    tags=("account",),
)

LIST_USERS = Endpoint(
    method="GET",
    path=f"{P}/users",
    summary="All accounts",
    allow=_ADMIN,
    query=Paging,
    response=Users,
    tags=("administration",),
)
CHANGE_USER = Endpoint(
    method="PATCH",
    path=f"{P}/users/{{user}}",
    summary="Change an account",
    allow=_ADMIN,
    request=ChangeUser,
    response=UserView,
    tags=("administration",),
)
GRANT = Endpoint(
    method="POST",
    path=f"{P}/users/{{user}}/credits",
    summary="Grant credits",
    allow=_ADMIN,
    request=Grant,
    response=UserView,
    tags=("administration",),
)
LIST_INSTANCES = Endpoint(
    method="GET",
    path=f"{P}/instances",
    summary="All instances of all users",
    allow=_ADMIN,
    query=Paging,
    response=InstanceRows,
    tags=("administration",),
)

LIST_TYPES = Endpoint(
    method="GET",
    path=f"{P}/service-types",
    summary="What can be created",
    allow=_USER,
    response=ServiceTypes,
    tags=("catalogue",),
)
LIST_CLOUDS = Endpoint(
    method="GET",
    path=f"{P}/clouds",
    summary="Where it can run",
    allow=_USER,
    response=Clouds,
    tags=("catalogue",),
)

LIST_APPLICATIONS = Endpoint(
    method="GET",
    path=f"{P}/applications",
    summary="My applications",
    allow=_USER,
    response=Applications,
    tags=("applications",),
)
CREATE_APPLICATION = Endpoint(
    method="POST",
    path=f"{P}/applications",
    summary="Make an application",
    allow=_USER,
    request=CreateApplication,
    response=ApplicationView,
    status=201,
    tags=("applications",),
)
RENAME_APPLICATION = Endpoint(
    method="PATCH",
    path=f"{P}/applications/{{application}}",
    summary="Rename an application",
    allow=_OWNER,
    request=Rename,
    response=ApplicationView,
    tags=("applications",),
)
DELETE_APPLICATION = Endpoint(
    method="DELETE",
    path=f"{P}/applications/{{application}}",
    summary="Delete an empty application",
    allow=_OWNER,
    response=Ack,
    tags=("applications",),
)

_S = f"{P}/services/{{service}}"
LIST_SERVICES = Endpoint(
    method="GET",
    path=f"{P}/services",
    summary="My services",
    allow=_USER,
    query=ServiceQuery,
    response=Services,
    tags=("services",),
)
CREATE_SERVICE = Endpoint(
    method="POST",
    path=f"{P}/services",
    summary="Create a service",
    allow=_USER,
    request=CreateService,
    response=ServiceView,
    status=201,
    tags=("services",),
)
GET_SERVICE = Endpoint(
    method="GET", path=_S, summary="One service", allow=_OWNER, response=ServiceView, tags=("services",)
)
RENAME_SERVICE = Endpoint(
    method="PATCH",
    path=_S,
    summary="Rename a service",
    allow=_OWNER,
    request=Rename,
    response=ServiceView,
    tags=("services",),
)
START = Endpoint(
    method="POST",
    path=f"{_S}/start",
    summary="Start",
    allow=_OWNER,
    request=Keyed,
    response=OperationView,
    status=202,
    tags=("services",),
)
STOP = Endpoint(
    method="POST",
    path=f"{_S}/stop",
    summary="Give back all instances but the manager",
    allow=_OWNER,
    request=Keyed,
    response=OperationView,
    status=202,
    tags=("services",),
)
TERMINATE = Endpoint(
    method="DELETE",
    path=_S,
    summary="Destroy the service and give back everything",
    allow=_OWNER,
    response=OperationView,
    status=202,
    tags=("services",),
)
SCALE = Endpoint(
    method="POST",
    path=f"{_S}/scale",
    summary="Add or remove nodes",
    allow=_OWNER,
    request=Scale,
    response=OperationView,
    status=202,
    tags=("services",),
)
CHANGE_SETTINGS = Endpoint(
    method="PUT",
    path=f"{_S}/settings",
    summary="Change settings",
    allow=_OWNER,
    request=ChangeSettings,
    response=OperationView,
    status=202,
    tags=("services",),
)
CHANGE_SCRIPTS = Endpoint(
    method="PUT",
    path=f"{_S}/scripts",
    summary="Change the start and stop scripts",
    allow=_OWNER,
    request=Scripts,
    response=OperationView,
    status=202,
    tags=("services",),
)
GET_NODES = Endpoint(
    method="GET",
    path=f"{_S}/nodes",
    summary="Nodes of a service",
    allow=_OWNER,
    response=Nodes,
    tags=("services",),
)
GET_STATES = Endpoint(
    method="GET",
    path=f"{_S}/states",
    summary="State history",
    allow=_OWNER,
    response=StateHistory,
    tags=("services",),
)
LIST_CODE = Endpoint(
    method="GET",
    path=f"{_S}/code",
    summary="Code versions, newest first",
    allow=_OWNER,
    response=CodeVersions,
    tags=("code",),
)
UPLOAD_CODE = Endpoint(
    method="POST",
    path=f"{_S}/code",
    summary="Upload an archive as a code version",
    allow=_OWNER,
    query=UploadQuery,
    upload=True,
    response=CodeVersionView,
    status=201,
    timeout_s=600,
    tags=("code",),
)
CHECKOUT_CODE = Endpoint(
    method="POST",
    path=f"{_S}/checkout",
    summary="Make a code version of a git repository",
    allow=_OWNER,
    request=CheckoutCode,
    response=CodeVersionView,
    status=201,
    timeout_s=300,
    tags=("code",),
)
DOWNLOAD_CODE = Endpoint(
    method="GET",
    path=f"{_S}/code/{{version}}",
    summary="Download a code version",
    allow=_OWNER,
    download=True,
    timeout_s=600,
    tags=("code",),
)
ACTIVATE_CODE = Endpoint(
    method="POST",
    path=f"{_S}/code/{{version}}/activate",
    summary="Activate a code version",
    allow=_OWNER,
    request=Keyed,
    response=OperationView,
    status=202,
    tags=("code",),
)
DELETE_CODE = Endpoint(
    method="DELETE",
    path=f"{_S}/code/{{version}}",
    summary="Delete a code version that is not active",
    allow=_OWNER,
    response=Ack,
    tags=("code",),
)
GET_METRICS = Endpoint(
    method="GET",
    path=f"{_S}/metrics",
    summary="Metrics for charts",
    allow=_OWNER,
    query=MetricsQuery,
    response=Metrics,
    tags=("monitoring",),
)
GET_MONITORING = Endpoint(
    method="GET",
    path=f"{_S}/monitoring",
    summary="Average request rate and throughput",
    allow=_OWNER,
    response=Monitoring,
    tags=("monitoring",),
)
LIST_LOGS = Endpoint(
    method="GET",
    path=f"{_S}/logs",
    summary="Logs of all nodes",
    allow=_OWNER,
    response=ManagerLogs,
    tags=("monitoring",),
)
READ_LOG = Endpoint(
    method="GET",
    path=f"{_S}/logs/{{node}}/{{name}}",
    summary="A piece of a log",
    allow=_OWNER,
    query=LogQuery,
    response=LogChunk,
    tags=("monitoring",),
)
FOLLOW_LOG = Endpoint(
    method="GET",
    path=f"{_S}/logs/{{node}}/{{name}}/follow",
    summary="A log as it grows",
    allow=_OWNER,
    query=FollowQuery,
    events=True,
    response=LogChunk,
    tags=("monitoring",),
)
RUN_COMMAND = Endpoint(
    method="POST",
    path=f"{_S}/commands/{{name}}",
    summary="A command of the service type",
    allow=_OWNER,
    request=CommandBody,
    response=CommandAnswer,
    timeout_s=600,
    tags=("services",),
)

LIST_OPERATIONS = Endpoint(
    method="GET",
    path=f"{P}/operations",
    summary="My operations",
    allow=_USER,
    query=OperationQuery,
    response=Operations,
    tags=("operations",),
)
GET_OPERATION = Endpoint(
    method="GET",
    path=f"{P}/operations/{{operation}}",
    summary="One operation",
    allow=_OWNER,
    response=OperationView,
    tags=("operations",),
)
CANCEL_OPERATION = Endpoint(
    method="POST",
    path=f"{P}/operations/{{operation}}/cancel",
    summary="Undo an operation that is under way",
    allow=_OWNER,
    response=OperationView,
    tags=("operations",),
)
GET_HISTORY = Endpoint(
    method="GET",
    path=f"{P}/history",
    summary="Who did what, newest first",
    allow=_USER,
    query=HistoryQuery,
    response=History,
    tags=("operations",),
)
GET_EVENTS = Endpoint(
    method="GET",
    path=f"{P}/events",
    summary="Live: states, progress, metrics, credits",
    allow=_USER,
    query=EventsQuery,
    events=True,
    response=Live,
    tags=("operations",),
)
