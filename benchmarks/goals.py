"""What is measured, what it is compared with, and how good it must be."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Goal:
    """One measurement with its bound: `ratio <= 3`, `value <= 0.7`, `value - floor <= 3`."""

    what: str
    unit: str
    of: Literal["value", "ratio", "value - floor"]
    sign: Literal["<=", ">="]
    bound: float

    def __str__(self) -> str:
        """Return the bound as people write it."""
        return f"{self.of} {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Result:
    """One line of the answer. `ratio` is value over floor, None where the floor is 0 or there is none."""

    value: float | None
    floor: float | None
    ratio: float | None
    goal: str
    ok: bool

    def json(self) -> dict[str, Any]:
        """Return what `--json` writes for it."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """A value, and the floor that was measured beside it; `paired` is their ratio, if that was taken pair by pair."""

    value: float
    floor: float | None = None
    paired: float | None = None


GOALS: dict[str, Goal] = {
    "start_to_first_page": Goal("start of a PHP service to its first page", "s", "ratio", "<=", 3),
    "create_and_start": Goal("create and start of a PHP service to its first page", "s", "value - floor", "<=", 3),
    "add_8_over_add_1": Goal("8 more nodes at once, over 1 more", "s", "ratio", "<=", 3),
    "requests_through": Goal("requests through a service", "1/s", "ratio", ">=", 0.97),
    "failed_requests": Goal("failed requests while the service changes", "", "value", "<=", 0),
    "agent_rss": Goal("resident memory of an idle agent", "MiB", "ratio", "<=", 1.6),
    "agent_pss": Goal("its share of memory (PSS)", "MiB", "ratio", "<=", 1.6),
    "manager_rss": Goal("resident memory of an idle manager", "MiB", "ratio", "<=", 1.6),
    "manager_pss": Goal("its share of memory (PSS)", "MiB", "ratio", "<=", 1.6),
    "agent_cpu": Goal("processor time of an idle agent", "% of a core", "value", "<=", 0.5),
    "manager_cpu": Goal("processor time of an idle manager", "% of a core", "value", "<=", 0.5),
    "list_services": Goal("lists of 20 services by the API", "1/s", "ratio", ">=", 0.25),
    "list_queries": Goal("database queries for a list of 20 services, over 2", "", "ratio", "<=", 1),
    "creates_200": Goal("200 instances of a provider that makes 5 per second", "s", "value - floor", "<=", 1),
    "creates_200_api": Goal("calls of the API meanwhile, 99th percentile", "ms", "value", "<=", 100),
    "director_2000_rss": Goal("resident memory of a director with 2,000 nodes, over 200", "MiB", "ratio", "<=", 2),
    "director_2000_cpu": Goal("its processor time", "% of a core", "ratio", "<=", 11),
    "director_node_rss": Goal("memory of a director per node", "KiB", "value", "<=", 50),
    "director_node_cpu": Goal("processor time of a director per 1,000 nodes", "% of a core", "value", "<=", 25),
    "boot_local": Goal("a node more on the local cloud, until it serves", "s", "value", "<=", 1),
    "boot_ec2": Goal("a node of a played Amazon EC2, from running to serving", "s", "value", "<=", 1),
    "boot_opennebula": Goal("a node of a played OpenNebula, from running to serving", "s", "value", "<=", 1),
    "boot_qemu": Goal("a virtual machine to serving, over the image's own boot", "s", "value - floor", "<=", 1),
    "boot_qemu_warm": Goal("one from a saved state, over the boot that it is spared", "s", "value - floor", "<=", 1),
    "manager_to_agent": Goal("a command from manager to agent, median", "ms", "value", "<=", 1.5),
    "manager_to_agent_status": Goal("one for which the agent asks three engines", "ms", "value", "<=", 1.5),
    "agent_first_answer": Goal("exec of an agent to its first answer", "s", "value", "<=", 0.7),
    "manager_first_answer": Goal("exec of a manager to its first answer", "s", "value", "<=", 0.7),
    "agent_first_answer_on_cloud": Goal("a new agent on the local cloud to its first answer", "s", "value", "<=", 0.7),
    "manager_first_answer_on_cloud": Goal(
        "a new manager on the local cloud to its first answer", "s", "value", "<=", 0.7
    ),
}


def judge(goal: Goal, measured: Measured | None) -> Result:
    """Hold what was measured against its goal; what could not be measured has not reached it."""
    if measured is None:
        return Result(None, None, None, str(goal), ok=False)
    value, floor, ratio = measured.value, measured.floor, measured.paired
    if ratio is None and floor:
        ratio = value / floor
    held = {"value": value, "ratio": ratio, "value - floor": value - (floor or 0.0)}[goal.of]
    ok = held is not None and (held <= goal.bound if goal.sign == "<=" else held >= goal.bound)
    return Result(_rounded(value), _rounded(floor), _rounded(ratio), str(goal), ok)


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def medians(values: Sequence[float], floors: Sequence[float]) -> Measured:
    """Return the medians of repetitions."""
    return Measured(statistics.median(values), statistics.median(floors))


def table(results: dict[str, Result]) -> str:
    """Return the results for people."""
    lines = [f"{'':30} {'value':>10} {'floor':>10} {'ratio':>7}  {'goal':20}    what"]
    for name, result in results.items():
        goal = GOALS[name]
        numbers = f"{_number(result.value):>10} {_number(result.floor):>10} {_number(result.ratio):>7}"
        unit = f" [{goal.unit}]" if goal.unit else ""
        lines.append(f"{name:30} {numbers}  {result.goal:20} {'ok' if result.ok else 'NO'} {goal.what}{unit}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
