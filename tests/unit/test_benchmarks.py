"""The benchmarks' answer has its shape whatever happens; nothing here measures time."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks.bench import Bench, Effort
from benchmarks.goals import GOALS, Goal, Measured, judge


async def _half_way(_: Bench) -> Mapping[str, Measured]:
    return {"start_to_first_page": Measured(0.5, 0.2), "create_and_start": Measured(9.0, 0.2)}


async def _broken(_: Bench) -> Mapping[str, Measured]:
    raise RuntimeError("the engines are on strike")


BENCHMARKS = {("start_to_first_page", "create_and_start"): _half_way, ("failed_requests",): _broken}


@pytest.fixture
def _measured_by_fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real workspace would, at its end, end every process below this one."""

    @contextlib.contextmanager
    def workspace(effort: Effort) -> Iterator[Bench]:
        yield Bench(tmp_path, effort)

    monkeypatch.setattr(program, "BENCHMARKS", BENCHMARKS)
    monkeypatch.setattr(program, "workspace", workspace)


@pytest.mark.usefixtures("_measured_by_fakes")
def test_json_has_the_shape_and_nothing_else_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    code = program.main(["--json", "--only", "start_to_first_page", "create_and_start", "failed_requests"])

    output = capsys.readouterr()
    assert code == 1
    assert json.loads(output.out) == {
        "start_to_first_page": {"value": 0.5, "floor": 0.2, "ratio": 2.5, "goal": "ratio <= 3", "ok": True},
        "create_and_start": {"value": 9.0, "floor": 0.2, "ratio": 45.0, "goal": "value - floor <= 3", "ok": False},
        "failed_requests": {"value": None, "floor": None, "ratio": None, "goal": "value <= 0", "ok": False},
    }
    assert "the engines are on strike" in output.err


@pytest.mark.usefixtures("_measured_by_fakes")
def test_all_goals_reached_is_exit_code_0_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--only", "start_to_first_page"]) == 0
    assert "ratio <= 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("goal", "measured", "ok"),
    [
        (Goal("", "", "ratio", ">=", 0.97), Measured(97, 100), True),
        (Goal("", "", "ratio", ">=", 0.97), Measured(96, 100), False),
        (Goal("", "", "ratio", ">=", 0.97), Measured(96, 100, 0.98), True),
        (Goal("", "", "ratio", "<=", 1), Measured(1, 0.0), False),
        (Goal("", "", "value", "<=", 0), Measured(0, 0.0), True),
        (Goal("", "", "value", "<=", 0), Measured(1, 0.0), False),
        (Goal("", "", "value - floor", "<=", 3), Measured(3.2, 0.2), True),
        (Goal("", "", "value - floor", "<=", 3), Measured(3.3, 0.2), False),
    ],
)
def test_a_goal_is_reached_or_not(goal: Goal, measured: Measured, ok: bool) -> None:
    assert judge(goal, measured).ok is ok


def test_every_goal_is_measured_by_one_benchmark() -> None:
    assert sorted(name for names in program.BENCHMARKS for name in names) == sorted(GOALS)
