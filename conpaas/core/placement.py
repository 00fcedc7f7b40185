"""Where the nodes of a service are, and where they are to be. Pure decisions over any service type's planner.

A planner says how many nodes are needed and who does what; it knows nothing of clouds. A node is in its place if its
role, cloud and size are what the spec says. What is out of place is replaced before it leaves: it goes on serving
until all its successors answer (`GATHER`), both serve while the world learns the new address (`OVERLAP`), then the
successors serve alone (`SETTLED`). Moving to another cloud, or to larger machines, is this and nothing else.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum

from conpaas.core.messages.model import Wanted
from conpaas.core.service import MANAGER, Assignment, Node, Planner


class Phase(StrEnum):
    """How far a change of place has come."""

    SETTLED = "SETTLED"
    """All nodes are in their places, or about to be made there."""
    GATHER = "GATHER"
    """Nodes out of place serve until their successors are there."""
    OVERLAP = "OVERLAP"
    """All successors answer: they serve beside those that will leave."""


@dataclass(frozen=True)
class Plan:
    """Who does what now, which nodes are still to be made where, and who may leave."""

    assignment: Assignment
    missing: Mapping[str, int] = field(default_factory=dict)
    """Nodes to be asked for, by cloud."""
    waiting: frozenset[str] = frozenset()
    """Nodes without work that must not leave: they are to take over."""
    phase: Phase = Phase.SETTLED

    @property
    def kept(self) -> AbstractSet[str]:
        """Ids of the nodes that stay for now."""
        return self.waiting | (self.assignment.roles.keys() - {MANAGER})


def plan(
    planner: Planner,
    wanted: Wanted,
    nodes: Sequence[Node],
    *,
    ready: frozenset[str],
    handover_s: float | None = None,
) -> Plan:
    """Say who does what.

    `nodes`: all that live, in the order of their creation. `ready`: ids of those that answer. `handover_s`: how long
    those that are replaced are still to serve beside their successors; None if that has not begun.
    """
    roles = wanted.roles if wanted.running else {}
    places = _places(wanted)
    sorted_ = _Sorted.of(wanted, places, nodes)
    leaving = [node for node in sorted_.leaving if node.roles]
    target = planner.assign(roles, sorted_.placed)
    missing = _missing(wanted, places, target, sorted_.placed)
    if not leaving or not target.roles or not (sorted_.moving or handover_s):
        return Plan(target, missing)
    successors = frozenset(target.roles.keys() - {MANAGER})
    if missing or not successors <= ready:
        now = planner.assign(roles, nodes)
        return Plan(now, missing, successors - now.roles.keys(), Phase.GATHER)
    if handover_s == 0:
        return Plan(target)
    before = {node.id: node.roles for node in leaving if node.id in ready}
    return Plan(Assignment({**target.roles, **before}), phase=Phase.OVERLAP)


@dataclass(frozen=True)
class _Sorted:
    """The nodes, by whether they are in their places."""

    placed: Sequence[Node]
    """New ones bear the role that they are meant for."""
    leaving: Sequence[Node]
    moving: bool
    """Some that serve leave because they are in the wrong place, and not because they are too many."""

    @classmethod
    def of(cls, wanted: Wanted, places: Mapping[str, Mapping[str, int]], nodes: Sequence[Node]) -> "_Sorted":
        open_ = Counter({(role, cloud): count for role, clouds in places.items() for cloud, count in clouds.items()})
        clouds = {cloud for role, cloud in open_ if open_[role, cloud] > 0}
        where = {node.id: node.meant_for if node.meant_for in clouds else node.cloud for node in nodes}
        wrong = {node.id for node in nodes if where[node.id] not in clouds or not _fits(wanted, node)}
        if not wrong and not wanted.places:
            return cls(nodes, (), moving=False)  # one place for all: who leaves is the planner's to say
        placed: dict[str, Node] = {}
        given: set[str] = set()
        for fresh in (False, True):  # who has a role keeps it, the oldest first; then the new ones get theirs
            for node in nodes:
                free = (role for role in places if open_[role, where[node.id]] > 0 and (fresh or role in node.roles))
                role = next(free, None)
                if role is None or node.id in placed or node.id in wrong:
                    continue
                open_[role, where[node.id]] -= 1
                given |= set() if node.roles else {role}
                meant = node.roles or frozenset({role})
                placed[node.id] = Node(node.id, node.address, meant, where[node.id], node.size)
        leaving = [node for node in nodes if node.id not in placed]
        wanting = given | {role for role, cloud in +open_}
        moving = any(node.roles and (node.id in wrong or node.roles & wanting) for node in leaving)
        return cls([placed[node.id] for node in nodes if node.id in placed], leaving, moving)


def _fits(wanted: Wanted, node: Node) -> bool:
    return wanted.sizes.get(node.cloud, "") in {"", node.size}


def _places(wanted: Wanted) -> dict[str, dict[str, int]]:
    """Return how many dedicated nodes of each role are to be on each cloud."""
    if not wanted.running:
        return {}
    places = {}
    for role, count in wanted.roles.items():
        elsewhere = wanted.places.get(role, {})
        places[role] = {wanted.cloud: count - sum(elsewhere.values()), **elsewhere}
    return places


def _missing(
    wanted: Wanted, places: Mapping[str, Mapping[str, int]], target: Assignment, placed: Sequence[Node]
) -> dict[str, int]:
    """Return how many of the nodes that the planner lacks are to be made on each cloud."""
    lacking: Counter[str] = Counter()
    for clouds in places.values():
        lacking.update(clouds)
    lacking.subtract(node.cloud for node in placed)
    missing: Counter[str] = Counter()
    for cloud, count in lacking.items():
        missing[cloud] = min(max(count, 0), target.missing - missing.total())
    missing[wanted.cloud] += target.missing - missing.total()
    return dict(+missing)
