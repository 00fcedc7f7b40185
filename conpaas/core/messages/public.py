"""The public API of the director, under `/api/v1`: what people, the web UI, the CLI and the SDK say to it."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, StringConstraints

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
    CloudName,
    CodeVersionView,
    Cost,
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


class SizeView(Message):
    """A kind of machine that a cloud rents out."""

    name: str
    cores: float
    memory: int
    """Bytes."""
    disk: int = 0
    """Bytes; 0: unknown."""
    price: Decimal | None = None
    """Per hour."""
    currency: str = "USD"
    default: bool = False


class CloudView(Message):
    """A configured cloud, as users see it."""

    name: str
    title: str
    driver: str
    enabled: bool = True
    reason: str = ""
    """Why it cannot be used, or (if it can) what its trouble is just now."""
    instances: int = 0
    """Of the caller."""
    limit: int | None = None
    """How many the caller may have there at once."""
    default: bool = False
    sizes: tuple[SizeView, ...] = ()


class Clouds(Message):
    """All clouds; a disabled one says why."""

    items: tuple[CloudView, ...]


class CloudOptions(Message):
    """What an administrator says of a cloud account, whatever its kind."""

    title: str = Field(default="", max_length=80)
    """What people see; empty: the kind's own."""
    enabled: bool = True
    """Whether new instances are made there; those that run go on."""
    instances: int | None = Field(default=None, ge=0)
    """Most instances there at once, everybody's together; unset: no limit of ours."""
    user_instances: int | None = Field(default=None, ge=0)
    """Most instances there at once of one user; unset: no limit of ours."""
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "USD"
    """What the prices are in: `EUR`, `USD`, …"""
    prices: dict[str, Annotated[Decimal, Field(ge=0)]] = Field(default_factory=dict)
    """Per instance and hour, by size, `*` for all others: they replace the provider's own."""
    rates: dict[Literal["create", "delete", "describe", "list", "volumes", "look"], PositiveFloat] = Field(
        default_factory=dict
    )
    """Most calls per second, by verb (`create`, `delete`, `describe`, `list`, `volumes`, `look`): they replace what
    is known of the provider."""
    director_url: str = Field(default="", max_length=300)
    """Where instances of this cloud find the director, if not where others do."""


class CloudForm(Message):
    """A cloud account as it is wanted. A secret setting that is left out stays as it is."""

    name: CloudName
    driver: CloudName
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the driver."""
    options: CloudOptions = CloudOptions()


class CloudAccountView(CloudForm):
    """A cloud account as administrators see it, its secrets as asterisks."""

    fixed: bool = False
    """It is part of the director's own settings, and only changed there."""
    default: bool = False
    usable: bool = True
    reason: str = ""
    """Why it cannot be used."""
    trouble: str = ""
    """What went wrong with the last call, if it did."""
    instances: int = 0
    """Everybody's."""
    sizes: tuple[SizeView, ...] = ()


class CloudAccounts(Message):
    """All cloud accounts."""

    items: tuple[CloudAccountView, ...]


class CloudTypeView(Message):
    """A kind of cloud that accounts can be added of."""

    name: str
    title: str
    description: str = ""
    settings: dict[str, Any]
    """JSON Schema of the settings; those with `writeOnly` are secret."""


class CloudTypes(Message):
    """All kinds of clouds."""

    items: tuple[CloudTypeView, ...]


class FindingView(Message):
    """One thing that was looked at when a cloud account was tried."""

    name: str
    ok: bool
    detail: str = ""
    hint: str = ""


class RoomView(Message):
    """How much of an allowance of the provider is used."""

    name: str
    used: float
    limit: float


class Examination(Message):
    """What came out when a cloud account was tried: it is fine if every finding is."""

    findings: tuple[FindingView, ...]
    quota: tuple[RoomView, ...] = ()
    images: tuple[str, ...] = ()
    """Ids of the account's own images, those first that could be ours."""
    zones: tuple[str, ...] = ()


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
    cost: Cost = Cost()


class Applications(Message):
    """All applications of a user."""

    items: tuple[ApplicationView, ...]


class CreateService(Message):
    """A new service. Its manager is created at once; nothing else runs until it is started."""

    type: str = Field(max_length=60)
    name: Name | None = None
    cloud: str | None = Field(default=None, max_length=60)
    fallback: tuple[CloudName, ...] = Field(default=(), max_length=20)
    """Clouds that take an instance, in this order, when the one before refuses it."""
    size: str | None = Field(default=None, max_length=60)
    """Of its instances on `cloud`."""
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
    cloud: str | None = Field(default=None, max_length=60)
    """Where they are added or removed; unset: the service's own cloud."""


class Move(Keyed):
    """Where a service is to be. It moves while it runs, and says so as it goes."""

    cloud: str | None = Field(default=None, max_length=60)
    """All of its nodes, and its manager, go there; unset: they stay, and only the rest changes."""
    fallback: tuple[CloudName, ...] | None = Field(default=None, max_length=20)
    sizes: dict[CloudName, str] | None = None


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
LIST_CLOUD_TYPES = Endpoint(
    method="GET",
    path=f"{P}/admin/cloud-types",
    summary="Kinds of clouds",
    allow=_ADMIN,
    response=CloudTypes,
    tags=("clouds",),
)
LIST_CLOUD_ACCOUNTS = Endpoint(
    method="GET",
    path=f"{P}/admin/clouds",
    summary="All cloud accounts",
    allow=_ADMIN,
    response=CloudAccounts,
    tags=("clouds",),
)
ADD_CLOUD = Endpoint(
    method="POST",
    path=f"{P}/admin/clouds",
    summary="Add a cloud account",
    allow=_ADMIN,
    request=CloudForm,
    response=CloudAccountView,
    status=201,
    tags=("clouds",),
)
CHANGE_CLOUD = Endpoint(
    method="PUT",
    path=f"{P}/admin/clouds/{{cloud}}",
    summary="Change a cloud account",
    allow=_ADMIN,
    request=CloudForm,
    response=CloudAccountView,
    tags=("clouds",),
)
REMOVE_CLOUD = Endpoint(
    method="DELETE",
    path=f"{P}/admin/clouds/{{cloud}}",
    summary="Remove a cloud account that has no instances",
    allow=_ADMIN,
    response=Ack,
    tags=("clouds",),
)
EXAMINE_CLOUD = Endpoint(
    method="POST",
    path=f"{P}/admin/clouds/{{cloud}}/examine",
    summary="Try a cloud account without making anything",
    allow=_ADMIN,
    response=Examination,
    timeout_s=60,
    tags=("clouds",),
)
TRY_CLOUD = Endpoint(
    method="POST",
    path=f"{P}/admin/examine",
    summary="Try a cloud account before it is added or changed",
    allow=_ADMIN,
    request=CloudForm,
    response=Examination,
    timeout_s=60,
    tags=("clouds",),
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
MOVE = Endpoint(
    method="POST",
    path=f"{_S}/move",
    summary="Move to another cloud or other machines, live",
    allow=_OWNER,
    request=Move,
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
