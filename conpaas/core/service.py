"""The contract of a service type: a planner of pure functions in the manager, role agents on the nodes.

A service type never touches HTTP, tasks, retries or clouds. It is one folder that exports `SERVICE`, a `ServiceType`.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Message
from conpaas.core.messages.model import CodeVersionView, Wanted

MANAGER = "manager"
"""The node id that stands for the manager's own instance in an assignment."""

PACKAGE = "conpaas.services"


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a node can do for its service."""

    name: str
    title: str
    description: str = ""
    minimum: int = 0
    """Fewest dedicated nodes while the service runs; 0 means that the role can live on a shared node."""
    maximum: int = 64
    initial: int = 0
    scalable: bool = True
    """People may add and remove nodes of it. A role of the manager's own instance is not."""
    ports: tuple[int, ...] = ()
    """Ports that must be reachable from outside the service."""
    inner_ports: tuple[int, ...] = ()
    """Ports on which the service's other instances reach it."""
    volume: int = 0
    """How large the disk is, in bytes, that keeps the role's data when its instance is replaced; 0: it keeps none."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of its own that a service type offers, run in the manager."""

    name: str
    title: str
    arguments: type[Message]
    run: str
    """`module:function`, an async function of (arguments, CommandContext) that returns a JSON object."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A program that must be on the instance's operating system."""

    program: str
    """Any of these names, separated by `|`: `valkey-server|redis-server`."""
    package: str
    """The Debian package that brings it, and what it needs beside it, separated by spaces."""


@dataclass(frozen=True, kw_only=True)
class ServiceType:
    """All that ConPaaS knows of one service type; UI, CLI, API and contract tests follow from it."""

    name: str
    title: str
    description: str
    icon: str = "box"
    roles: tuple[Role, ...]
    settings: type[Message]
    """What users can set, with defaults, bounds and docstrings; shown as a form."""
    planner: str
    """`module:Class` of the Planner, loaded by managers and by the director for its checks."""
    agents: Mapping[str, str]
    """By role (the manager's own included): `module:Class` of the RoleAgent, loaded on the node."""
    engines: tuple[Engine, ...] = ()
    takes_code: bool = False
    default_code: str = ""
    """Folder, in the service type's own folder, that becomes the first code version."""
    commands: tuple[Command, ...] = ()
    page: str = ""
    """`module:Class` of the service's own part of the web page; empty: the generic one."""

    @property
    def ports(self) -> tuple[int, ...]:
        """What a node may have to open to the world."""
        return tuple(sorted({port for role in self.roles for port in role.ports}))

    @property
    def inner_ports(self) -> tuple[int, ...]:
        """What an instance of the service may have to open to the others."""
        return tuple(sorted({port for role in self.roles for port in role.inner_ports}))

    def role(self, name: str) -> Role:
        """Return the role called `name`; raise BadInputError if there is none."""
        for role in self.roles:
            if role.name == name:
                return role
        known = ", ".join(role.name for role in self.roles if role.scalable)
        raise BadInputError(f"{self.name} has no role '{name}'", value=name, hint=f"its roles are: {known}")


# -- the planner's half ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A node as planners see it."""

    id: str
    address: str
    roles: frozenset[str] = frozenset()
    """What it holds now."""
    cloud: str = ""
    """Where it is."""
    size: str = ""
    meant_for: str = ""
    """The cloud that it was asked for, if that one refused it."""


@dataclass(frozen=True)
class Assignment:
    """Which node is to hold which roles. Nodes that are not named leave."""

    roles: Mapping[str, frozenset[str]]
    """By node id; MANAGER included if the manager's instance holds a role."""
    missing: int = 0
    """How many more nodes are needed to reach what is wanted."""

    def holders(self, role: str) -> list[str]:
        """Return the ids of the nodes with `role`, in order."""
        return [node for node, roles in self.roles.items() if role in roles]


@dataclass(frozen=True)
class Step:
    """One role of one node to be made so, or (`config` None) to be drained and stopped."""

    node: str
    role: str
    config: Message | None


Stage = Sequence[Step]
"""Steps applied in parallel; the next stage begins when all of their nodes report healthy."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a planner may look at when it makes stages."""

    service: str
    wanted: Wanted
    nodes: Mapping[str, Node]
    """Every node that answers, by id, those that leave included; MANAGER is the manager's own instance."""
    assignment: Assignment
    code: CodeVersionView | None
    """The active code version."""
    previous_code: CodeVersionView | None
    secret: Callable[[str], str]
    """Derives the service's password for a purpose: the same on every manager of the service."""
    predecessor: str = ""
    """Address of the instance that was the manager's before, while what is there can be taken over; else empty."""


class Planner(ABC):
    """Pure decisions of one service type. Constructed without arguments; keeps nothing."""

    @abstractmethod
    def check(self, before: Wanted, after: Wanted) -> None:
        """Raise BadInputError if `after` cannot be wanted: unknown roles, too few or too many nodes."""

    @abstractmethod
    def assign(self, wanted: Mapping[str, int], nodes: Sequence[Node]) -> Assignment:
        """Say which of `nodes` (in the order of their creation) holds which roles.

        With fewer nodes than wanted it makes the best of those there are. Nodes keep what they have where possible;
        the last ones made are the first to leave. With every count at zero the result is empty.
        """

    @abstractmethod
    def stages(self, situation: Situation) -> list[Stage]:
        """Say how to get there: providers first, consumers last; on the way down the other way round.

        Every role of every node is named at least once, also if nothing changes: applying the same twice does nothing.
        """

    def urls(self, situation: Situation) -> dict[str, str]:  # noqa: ARG002
        """Return where users look, by purpose; at least `application` if the service has a front door."""
        return {}

    def facts(self, situation: Situation, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, str]:  # noqa: ARG002
        """Return what the service's card shows, by label; `metrics` are the newest values by node."""
        return {}

    def summary(self, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:  # noqa: ARG002
        """Return the service's metrics out of its nodes' newest ones."""
        return {}


def check_roles(kind: ServiceType, before: Wanted, after: Wanted) -> None:
    """Raise BadInputError unless every count of `after` is of a known role and within its bounds."""
    for name, count in after.roles.items():
        role = kind.role(name)
        if not role.scalable:
            raise BadInputError(f"the number of '{name}' nodes is fixed", value=name)
        have = before.roles.get(name, 0)
        if count < 0:
            raise BadInputError(
                f"cannot remove {have - count} '{name}' nodes: there are {have}",
                value=count - have,
                hint=f"remove at most {have - role.minimum}",
            )
        if count < role.minimum:
            raise BadInputError(
                f"at least {role.minimum} '{name}' must stay",
                value=count,
                hint="stop the service to give back all its nodes",
            )
        if count > role.maximum:
            raise BadInputError(
                f"{count} '{name}' nodes are too many",
                value=count,
                hint=f"at most {role.maximum} nodes of this role",
            )


# -- the node's half ------------------------------------------------------------------------------------------------

C = TypeVar("C", bound=Message)


@dataclass(frozen=True)
class EngineSpec:
    """A supervised program: an engine of a role."""

    name: str
    argv: tuple[str, ...]
    directory: Path
    """Where it runs; its output goes to `NAME.out` in the role's log folder."""
    env: Mapping[str, str] = field(default_factory=dict)


class Engines(Protocol):
    """Keeps engines running: restarts what dies (with back-off), re-adopts what outlived the agent."""

    async def ensure(self, spec: EngineSpec) -> bool:
        """Make `spec` run; return whether it was started now. Another argv or environment restarts it."""

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the engine's first process; raise CommandFailedError if it does not run."""

    async def stop(self, name: str, *, number: int, timeout_s: float) -> None:
        """Send `number`, wait for its end, kill after `timeout_s`. Fine if it does not run."""

    def trouble(self, name: str) -> str:
        """Return why the engine does not run, with the end of its output; empty if it runs."""

    def pid(self, name: str) -> int | None: ...


@dataclass(frozen=True)
class Host:
    """What a role agent gets of its node: a folder of its own, an address, engines, blobs."""

    instance: str
    address: str
    directory: Path
    """The role's own folder; it survives restarts of the agent."""
    data: Path
    """Where the role keeps what must outlive its instance, if it has a volume; else a folder in its own one."""
    logs: Path
    """Files `*.log` and `*.out` in it are the role's logs, by name."""
    engines: Engines
    unpacked: Callable[[str], Awaitable[Path]]
    """Gives the folder of an unpacked code version by its SHA-256; raises BlobMissingError before the blob was sent."""
    forget_unpacked: Callable[[frozenset[str]], Awaitable[None]]
    """Deletes unpacked code versions and blobs other than the given ones."""


@dataclass(frozen=True)
class Health:
    """How a role is."""

    ok: bool
    detail: str = ""


class RoleAgent(ABC, Generic[C]):
    """One role on one node. Constructed anew when the agent starts; what must last is in files or engines."""

    config: ClassVar[type[Message]]
    """The model of its configuration, as the planner makes it."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @abstractmethod
    async def apply(self, config: C) -> None:
        """Make it so, and return when it is serving that way. Idempotent; interrupted anywhere, it can be repeated."""

    @abstractmethod
    async def health(self) -> Health:
        """Say whether the role serves, by asking the engines."""

    async def metrics(self) -> dict[str, float]:
        """Return values since the last call, by the names of `MetricPoint.values`."""
        return {}

    @abstractmethod
    async def stop(self, drain_s: float) -> None:
        """Finish what has begun, for at most `drain_s` seconds, then stop the engines. Fine if nothing runs."""


class CommandContext(Protocol):
    """What a service type's own command may use."""

    @property
    def nodes(self) -> Mapping[str, Node]: ...

    @property
    def wanted(self) -> Wanted: ...

    def secret(self, purpose: str) -> str: ...
