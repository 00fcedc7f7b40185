"""The tables of the one database: users, credits, services with their spec, instances, code versions, records."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from conpaas.core.states import NodeState, OperationState, ServiceState


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, always in UTC and aware of it; SQLite, which has no zones, keeps the bare UTC time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _enum(kind: type[ServiceState | NodeState | OperationState]) -> Enum:
    return Enum(kind, native_enum=False, length=20, create_constraint=False)


_Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only in an INTEGER key


class Base(DeclarativeBase):
    """What all tables share. `seq` orders rows by their creation; `id` names them to the world."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's own way to say it)
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        dict[str, str]: JSON(),
        dict[str, float]: JSON(),
        list[str]: JSON(),
        ServiceState: _enum(ServiceState),
        NodeState: _enum(NodeState),
        OperationState: _enum(OperationState),
    }


class User(Base):
    """An account. `credits` is the sum of its credit entries, changed in the same transaction as they."""

    __tablename__ = "users"

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(60), unique=True)
    username: Mapped[str] = mapped_column(String(60), unique=True)
    email: Mapped[str] = mapped_column(String(200), default="")
    first_name: Mapped[str] = mapped_column(String(200), default="")
    last_name: Mapped[str] = mapped_column(String(200), default="")
    affiliation: Mapped[str] = mapped_column(String(200), default="")
    password_hash: Mapped[str] = mapped_column(String(300))
    admin: Mapped[bool] = mapped_column(default=False)
    disabled: Mapped[bool] = mapped_column(default=False)
    credits: Mapped[int] = mapped_column(default=0)
    warned: Mapped[bool] = mapped_column(default=False)
    """The event that says that credits run low has been written."""
    created: Mapped[datetime]


class Token(Base):
    """A bearer token, kept as its SHA-256: a login session, or an API token."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(60), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    kind: Mapped[str] = mapped_column(String(10))
    """`session` or `api`."""
    name: Mapped[str] = mapped_column(String(100), default="")
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]]
    created: Mapped[datetime]
    expires: Mapped[datetime]
    last_used: Mapped[datetime | None]


class SshKey(Base):
    """A public key that may push code as its user."""

    __tablename__ = "ssh_keys"

    id: Mapped[str] = mapped_column(String(60), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    key: Mapped[str] = mapped_column(Text)
    """One `authorized_keys` line without options or comment: `ssh-ed25519 AAAA…`."""
    fingerprint: Mapped[str] = mapped_column(String(100), unique=True)
    created: Mapped[datetime]


class Application(Base):
    """A named set of services of one user."""

    __tablename__ = "applications"

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(60), unique=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    created: Mapped[datetime]


class Service(Base):
    """One service and its spec of record."""

    __tablename__ = "services"
    __table_args__ = (UniqueConstraint("user_id", "key"),)

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(60), unique=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    application_id: Mapped[str | None] = mapped_column(ForeignKey("applications.id"), index=True)
    """None only after termination."""
    type: Mapped[str] = mapped_column(String(60))
    name: Mapped[str] = mapped_column(String(100))
    key: Mapped[str | None] = mapped_column(String(100))
    """The idempotency key of its creation."""
    wanted: Mapped[dict[str, Any]]
    """A `Wanted`."""
    generation: Mapped[int] = mapped_column(default=1)
    epoch: Mapped[int] = mapped_column(default=1)
    """Of its present manager; older ones are refused."""
    state: Mapped[ServiceState] = mapped_column(default=ServiceState.INIT)
    reason: Mapped[str] = mapped_column(Text, default="")
    since: Mapped[datetime]
    created: Mapped[datetime]
    urls: Mapped[dict[str, str]] = mapped_column(default=dict)
    facts: Mapped[dict[str, str]] = mapped_column(default=dict)
    seed: Mapped[str] = mapped_column(Text)
    """Encrypted; see `vault.Vault`."""
    spent: Mapped[dict[str, str]] = mapped_column(default=dict)
    """What its instances that have ended cost at their providers: decimals by currency."""
    ending: Mapped[bool] = mapped_column(default=False)
    """Termination was asked for: nothing else is any more."""
    terminated: Mapped[datetime | None]


class Instance(Base):
    """The ledger: one row per instance ever asked for, written before the cloud is."""

    __tablename__ = "instances"
    __table_args__ = (UniqueConstraint("service_id", "request_key", "request_index"),)

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(60), unique=True)
    """Also the token by which its cloud knows the request."""
    service_id: Mapped[str] = mapped_column(ForeignKey("services.id"), index=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    kind: Mapped[str] = mapped_column(String(10))
    """`manager` or `agent`."""
    meant_for: Mapped[str] = mapped_column(String(60))
    """The cloud that it was asked for."""
    cloud: Mapped[str] = mapped_column(String(60))
    """Where it is, or is being asked for: another one if that one refused it."""
    size: Mapped[str] = mapped_column(String(60), default="")
    zone: Mapped[str] = mapped_column(String(60), default="")
    price: Mapped[str | None] = mapped_column(String(40))
    """Per hour, a decimal in `currency`; None: unknown."""
    currency: Mapped[str] = mapped_column(String(3), default="")
    stage: Mapped[str] = mapped_column(Text, default="")
    """While it boots: how far it says it has come."""
    cloud_id: Mapped[str] = mapped_column(String(200), default="")
    address: Mapped[str] = mapped_column(String(200), default="")
    epoch: Mapped[int] = mapped_column(default=0)
    """Of a manager: the one it was made for."""
    state: Mapped[NodeState] = mapped_column(default=NodeState.REQUESTED, index=True)
    reason: Mapped[str] = mapped_column(Text, default="")
    roles: Mapped[list[str]] = mapped_column(default=list)
    metrics: Mapped[dict[str, float]] = mapped_column(default=dict)
    request_key: Mapped[str] = mapped_column(String(100))
    request_index: Mapped[int]
    enrol_key: Mapped[str] = mapped_column(String(64), default="")
    """SHA-256 of the public key that used the one-use token; empty: not used yet."""
    enrol_until: Mapped[datetime]
    created: Mapped[datetime]
    since: Mapped[datetime]
    launched: Mapped[datetime | None]
    """When the cloud said yes."""
    booted: Mapped[datetime | None]
    """When it enrolled."""
    ended: Mapped[datetime | None]
    """When it was given back, lost or refused: from then on it costs nothing."""
    charged: Mapped[int] = mapped_column(default=0)
    """Hours charged, counted from `created`."""
    next_charge: Mapped[datetime | None] = mapped_column(index=True)
    """When the next hour begins; None once `ended`."""


class CloudAccount(Base):
    """A cloud account that administrators have added; those of the settings file have no row."""

    __tablename__ = "cloud_accounts"

    name: Mapped[str] = mapped_column(String(60), primary_key=True)
    driver: Mapped[str] = mapped_column(String(60))
    settings: Mapped[str] = mapped_column(Text)
    """The driver's own, JSON, encrypted: see `vault.Vault`."""
    options: Mapped[dict[str, Any]]
    """A `CloudOptions`."""
    created: Mapped[datetime]


class VolumeRow(Base):
    """A disk that outlives instances, written before the cloud is asked for it."""

    __tablename__ = "volumes"

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(60), unique=True)
    """Also the token by which its cloud knows the request."""
    service_id: Mapped[str] = mapped_column(ForeignKey("services.id"), index=True)
    role: Mapped[str] = mapped_column(String(60))
    """Whose data it holds."""
    cloud: Mapped[str] = mapped_column(String(60))
    cloud_id: Mapped[str] = mapped_column(String(200), default="")
    zone: Mapped[str] = mapped_column(String(60), default="")
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes."""
    used: Mapped[bool] = mapped_column(default=False)
    """A node has had it: there may be data on it."""
    instance_id: Mapped[str | None] = mapped_column(ForeignKey("instances.id"))
    """Whose it is: the node that it is, or is being, attached to."""
    created: Mapped[datetime]
    deleted: Mapped[datetime | None]


class CreditEntry(Base):
    """One line of the credit ledger; a charge is unique by instance and hour."""

    __tablename__ = "credit_entries"
    __table_args__ = (UniqueConstraint("instance_id", "hour", "kind"),)

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    kind: Mapped[str] = mapped_column(String(10))
    """`grant`, `charge`, or `refund` of a charge for an instance that never was."""
    delta: Mapped[int]
    instance_id: Mapped[str | None] = mapped_column(ForeignKey("instances.id"))
    hour: Mapped[int | None]
    at: Mapped[datetime]
    reason: Mapped[str] = mapped_column(String(200), default="")


class CodeVersion(Base):
    """One immutable upload; its bytes are a blob named by the SHA-256."""

    __tablename__ = "code_versions"
    __table_args__ = (UniqueConstraint("service_id", "id"),)

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(60))
    """`code-default`, or random; unique within its service."""
    service_id: Mapped[str] = mapped_column(ForeignKey("services.id"))
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    filename: Mapped[str] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(String(500), default="")
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes."""
    kind: Mapped[str] = mapped_column(String(10))
    """`tar.gz`, `zip`, …"""
    created: Mapped[datetime]


class Operation(Base):
    """A long operation."""

    __tablename__ = "operations"
    __table_args__ = (
        UniqueConstraint("service_id", "key"),
        Index("ix_operations_service_id_state", "service_id", "state"),
    )

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(60), unique=True)
    service_id: Mapped[str] = mapped_column(ForeignKey("services.id"))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    kind: Mapped[str] = mapped_column(String(40))
    state: Mapped[OperationState] = mapped_column(default=OperationState.RUNNING)
    generation: Mapped[int]
    key: Mapped[str | None] = mapped_column(String(100))
    before: Mapped[dict[str, Any]]
    after: Mapped[dict[str, Any]]
    """What was wanted before and after: a `Wanted` each."""
    done: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=0)
    message: Mapped[str] = mapped_column(Text, default="")
    error: Mapped[str] = mapped_column(Text, default="")
    created: Mapped[datetime]
    finished: Mapped[datetime | None]
    deadline: Mapped[datetime]
    actor: Mapped[str] = mapped_column(String(100), default="")


class StateChangeRow(Base):
    """The state history of services."""

    __tablename__ = "state_changes"

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    service_id: Mapped[str] = mapped_column(ForeignKey("services.id"), index=True)
    state: Mapped[ServiceState]
    at: Mapped[datetime]
    reason: Mapped[str] = mapped_column(Text, default="")
    actor: Mapped[str] = mapped_column(String(100), default="")


class EventRow(Base):
    """The append-only log: who, what, when, before, after."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(60))
    actor: Mapped[str] = mapped_column(String(100))
    user_id: Mapped[str | None] = mapped_column(String(60), index=True)
    """Whose business it is."""
    service_id: Mapped[str | None] = mapped_column(String(60), index=True)
    message: Mapped[str] = mapped_column(Text, default="")
    before: Mapped[str] = mapped_column(Text, default="")
    after: Mapped[str] = mapped_column(Text, default="")


class MetricRow(Base):
    """One metric point of a node, or (empty `node`) of a whole service."""

    __tablename__ = "metrics"
    __table_args__ = (Index("ix_metrics_service_id_at", "service_id", "at"),)

    seq: Mapped[int] = mapped_column(_Number, primary_key=True)
    service_id: Mapped[str] = mapped_column(String(60))
    at: Mapped[datetime]
    node: Mapped[str] = mapped_column(String(60), default="")
    values: Mapped[dict[str, float]]
