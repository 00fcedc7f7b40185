"""The picture of a service: visitors, then a column of nodes for each role, in the order that requests take.

Pure layout in abstract units; templates draw it. `upright` turns it by a quarter for narrow screens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from conpaas.core.messages.model import NodeView
from conpaas.core.messages.public import RoleView
from conpaas.core.states import NodeState

ACROSS, DEEP = 150, 52  # of one box
GAP_ACROSS, GAP_DEEP = 64, 16
UPRIGHT_ACROSS, UPRIGHT_GAP = 116, 12
HEAD = 30
_LINES_SHOWN = {False: 6, True: 3}
_LABEL_LETTERS = {False: 14, True: 10}


@dataclass(frozen=True)
class Box:
    """A node, or the part of it that holds neighbouring roles."""

    label: str
    title: str
    state: str
    hues: tuple[int, ...]
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Head:
    """The name of a column."""

    label: str
    hue: int
    x: int
    y: int


@dataclass(frozen=True)
class Picture:
    """All that is to be drawn."""

    width: int
    height: int
    upright: bool
    heads: tuple[Head, ...]
    boxes: tuple[Box, ...]
    edges: tuple[str, ...]
    """SVG paths."""
    visitors: tuple[int, int]
    """Centre of the visitors' sign."""
    words: str
    """The picture for those who hear it."""


@dataclass
class _Run:
    """Neighbouring columns held by one node (`None`: a box that stands for those not shown), and its line."""

    node: NodeView | None
    first: int
    last: int
    line: int = 0
    more: int = 0


def draw(roles: Sequence[RoleView], nodes: Sequence[NodeView], *, upright: bool = False) -> Picture | None:
    """Lay out the nodes that hold roles; None if there is nothing to show."""
    agents = [node for node in nodes if node.kind == "agent" and node.state is not NodeState.GONE]
    columns = [role for role in roles if any(role.name in node.roles for node in agents)]
    if not columns:
        return None
    runs = _placed(_runs([role.name for role in columns], agents), len(columns), _LINES_SHOWN[upright])
    hues = {role.name: index for index, role in enumerate(roles)}
    plan = _Plan(upright, len(columns), max(run.line for run in runs) + 1)
    boxes = tuple(plan.box(run, [hues[role.name] for role in columns[run.first : run.last + 1]]) for run in runs)
    return Picture(
        width=plan.width,
        height=plan.height,
        upright=upright,
        heads=tuple(plan.head(index, role, hues[role.name]) for index, role in enumerate(columns)),
        boxes=boxes,
        edges=tuple(plan.edges(runs, boxes)),
        visitors=plan.visitors,
        words=_words(columns, agents),
    )


def _runs(names: Sequence[str], nodes: Sequence[NodeView]) -> list[_Run]:
    """Cut the roles of each node into runs of neighbouring columns."""
    runs: list[_Run] = []
    for node in nodes:
        held = [index for index, name in enumerate(names) if name in node.roles]
        for index in held:
            if runs and runs[-1].node is node and runs[-1].last == index - 1:
                runs[-1].last = index
            else:
                runs.append(_Run(node, index, index))
    return runs


def _placed(runs: list[_Run], columns: int, lines: int) -> list[_Run]:
    """Give each run the first line that is free in all its columns; say of those beyond `lines` how many there are."""
    taken: list[set[int]] = []
    shown: list[_Run] = []
    left = [0] * columns
    for run in sorted(runs, key=lambda run: run.first - run.last):
        span = set(range(run.first, run.last + 1))
        run.line = next((line for line, used in enumerate(taken) if not used & span), len(taken))
        if run.line >= lines:
            left[run.first] += 1
            continue
        if run.line == len(taken):
            taken.append(set())
        taken[run.line] |= span
        shown.append(run)
    shown += [_Run(None, column, column, lines, count) for column, count in enumerate(left) if count]
    return shown


class _Plan:
    """From columns and lines to units."""

    def __init__(self, upright: bool, columns: int, lines: int) -> None:
        self.upright = upright
        if upright:
            self.width = max(lines * (UPRIGHT_ACROSS + UPRIGHT_GAP) - UPRIGHT_GAP, 200)
            self.height = 56 + columns * (HEAD + DEEP + GAP_DEEP)
            self.visitors = (self.width // 2, 22)
        else:
            self.width = 76 + columns * (ACROSS + GAP_ACROSS) - GAP_ACROSS + 4
            self.height = HEAD + lines * (DEEP + GAP_DEEP)
            self.visitors = (24, HEAD + DEEP // 2)

    def box(self, run: _Run, hues: Sequence[int]) -> Box:
        node, span = run.node, run.last - run.first
        if self.upright:
            x, y = run.line * (UPRIGHT_ACROSS + UPRIGHT_GAP), self._row(run.first)
            width, height = UPRIGHT_ACROSS, DEEP + span * (HEAD + DEEP + GAP_DEEP)
        else:
            x, y = self._column(run.first), HEAD + run.line * (DEEP + GAP_DEEP)
            width, height = ACROSS + span * (ACROSS + GAP_ACROSS), DEEP
        if node is None:
            return Box(f"+ {run.more} more", f"{run.more} more", "", tuple(hues), x, y, width, height)
        name = node.cloud_id or node.id
        title = f"{name}: {', '.join(node.roles)}, {node.state.lower()}"
        letters = _LABEL_LETTERS[self.upright]
        label = name if len(name) <= letters else f"{name[: letters - 1]}…"
        return Box(label, title, node.state, tuple(hues), x, y, width, height)

    def head(self, index: int, role: RoleView, hue: int) -> Head:
        if self.upright:
            return Head(role.name, hue, 2, self._row(index) - 9)
        return Head(role.name, hue, self._column(index) + 2, 17)

    def edges(self, runs: Sequence[_Run], boxes: Sequence[Box]) -> list[str]:
        """Join each run to those that begin where it ends; the first ones to the visitors."""
        pairs = list(zip(runs, boxes, strict=True))
        firsts = [box for run, box in pairs if run.first == 0]
        x, y = self.visitors
        away = 20
        start = (x, y + away) if self.upright else (x + away, y)
        paths = [_curve(start, self._entry(box), upright=self.upright) for box in firsts]
        for left, right in pairwise(range(max(run.last for run in runs) + 1)):
            for run, box in pairs:
                if run.last != left:
                    continue
                ends = [other for far, other in pairs if far.first == right]
                paths += [_curve(self._exit(box), self._entry(end), upright=self.upright) for end in ends]
        return paths

    def _column(self, index: int) -> int:
        return 76 + index * (ACROSS + GAP_ACROSS)

    def _row(self, index: int) -> int:
        return 56 + HEAD + index * (HEAD + DEEP + GAP_DEEP)

    def _entry(self, box: Box) -> tuple[int, int]:
        return (box.x + box.width // 2, box.y) if self.upright else (box.x, box.y + box.height // 2)

    def _exit(self, box: Box) -> tuple[int, int]:
        if self.upright:
            return box.x + box.width // 2, box.y + box.height
        return box.x + box.width, box.y + box.height // 2


def _curve(start: tuple[int, int], end: tuple[int, int], *, upright: bool) -> str:
    (a, b), (c, d) = start, end
    if upright:
        middle = (b + d) // 2
        return f"M{a} {b}C{a} {middle} {c} {middle} {c} {d}"
    middle = (a + c) // 2
    return f"M{a} {b}C{middle} {b} {middle} {d} {c} {d}"


def _words(columns: Sequence[RoleView], nodes: Sequence[NodeView]) -> str:
    parts = [f"{sum(role.name in node.roles for node in nodes)} {role.name}" for role in columns]
    return f"visitors, then {', then '.join(parts)}"
