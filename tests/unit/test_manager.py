"""A manager brings its service to what is wanted, whatever dies on the way."""

import hashlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from conpaas.core import archive, plugins, run
from conpaas.core.messages.model import CodeVersionView
from conpaas.core.service import PACKAGE, ServiceType
from conpaas.core.states import NodeState, ServiceState
from tests.fakes.deployment import FakeDirector, deployment

S = ServiceState

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def director(tmp_path: Path, new_address: Callable[[], str]) -> AsyncIterator[FakeDirector]:
    async with deployment(tmp_path, new_address) as director:
        yield director


def engine_pids(director: FakeDirector) -> list[int]:
    pids = []
    for agent, _ in director.agents.values():
        for held in agent.roles._held.values():
            pid = held.supervisor.pid("sleep")
            if pid is not None:
                pids.append(pid)
    return pids


async def test_the_plug_in_is_found_by_its_entry_point() -> None:
    assert "echo" in plugins.discover(PACKAGE, "SERVICE", ServiceType)


async def test_start_scale_up_scale_down_stop(director: FakeDirector) -> None:
    director.want(running=True)
    await director.until_state(S.RUNNING)
    assert [node.roles for node in director.serving_nodes()] == [("front",)]
    assert director.reports[-1].urls["application"].startswith("http://127.")

    director.want(roles={"front": 1, "back": 3})
    await director.until(lambda: len(director.serving_nodes()) == 4)
    await director.until_state(S.RUNNING)
    assert sorted(node.roles for node in director.serving_nodes()) == [("back",)] * 3 + [("front",)]
    assert director.reports[-1].message == "4 of 4 nodes serving"

    director.want(roles={"front": 1, "back": 1})
    await director.until(lambda: len(director.nodes) == 2)
    await director.until_state(S.RUNNING)
    assert not any(gone.failed for gone in director.deleted.values())

    director.want(running=False)
    await director.until_state(S.STOPPED)
    assert director.nodes == {}
    assert director.agents == {}


async def test_the_last_ones_made_are_the_first_to_leave(director: FakeDirector) -> None:
    director.want(running=True, roles={"front": 1, "back": 3})
    await director.until_state(S.RUNNING)
    front, *_ = (node.id for node in director.serving_nodes() if node.roles == ("front",))
    first_back = next(node.id for node in director.nodes.values() if node.roles == ("back",))
    director.want(roles={"front": 1, "back": 1})
    await director.until(lambda: len(director.nodes) == 2)
    assert set(director.nodes) == {front, first_back}


async def test_a_node_that_never_boots_is_deleted_and_replaced_and_the_rest_serve(director: FakeDirector) -> None:
    director.never_boot = 1
    director.want(running=True, roles={"front": 1, "back": 3})

    await director.until(lambda: len(director.serving_nodes()) == 3)
    assert director.state is not S.RUNNING
    await director.give_up_one()
    await director.until(lambda: any("replaced" in report.reason for report in director.reports))
    await director.until_state(S.RUNNING)
    assert len(director.serving_nodes()) == 4
    assert [gone.failed for gone in director.deleted.values()] == [True]
    assert "did not answer within 60 s" in director.deleted["i-1"].reason


async def test_while_no_replacement_boots_the_service_goes_on_with_what_it_has(director: FakeDirector) -> None:
    director.want(running=True)
    await director.until_state(S.RUNNING)
    director.never_boot = 3

    director.want(roles={"front": 1, "back": 1})

    await director.give_up_one()
    await director.give_up_one()
    assert director.state is S.ADAPTING
    assert len(director.serving_nodes()) == 1
    assert "did not answer" in director.reports[-1].reason
    await director.give_up_one()
    await director.until_state(S.RUNNING)
    assert len(director.serving_nodes()) == 2


async def test_refused_nodes_are_asked_for_again_and_the_refusal_is_told(director: FakeDirector) -> None:
    director.refuse = 1
    director.want(running=True, roles={"front": 1, "back": 1})

    await director.until(lambda: any("no capacity" in report.reason for report in director.reports))
    await director.until_state(S.RUNNING)
    assert len(director.serving_nodes()) == 2


async def test_a_lost_answer_makes_no_second_instance(director: FakeDirector) -> None:
    director.lose_answers = 1
    director.want(running=True)

    await director.until_state(S.RUNNING)
    assert list(director.nodes) == ["i-1"]


async def test_what_comes_before_all_nodes_is_made_ready_while_they_boot(director: FakeDirector) -> None:
    director.never_boot = 1
    director.want(running=True)
    assert director.manager is not None
    own = director.manager[0].roles

    await director.until(lambda: "memory" in own._held and own._held["memory"].made is not None)

    assert director.serving_nodes() == []


async def test_a_booting_node_that_the_ledger_gives_up_is_replaced_long_before_its_time_out(
    director: FakeDirector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conpaas.manager.app.UNDONE_S", 0.1)
    director.never_boot = 1
    director.boot_timeout_s = 1000
    await director.end_manager()
    await director.start_manager()
    director.want(running=True)
    await director.until(lambda: "i-1" in director.nodes)

    lost = {"state": NodeState.LOST, "reason": "its creation was interrupted"}
    director.nodes["i-1"] = director.nodes["i-1"].model_copy(update=lost)

    await director.until_state(S.RUNNING)
    assert director.deleted["i-1"].failed
    assert list(director.nodes) == ["i-2"]


async def test_a_node_whose_instance_ended_is_replaced(director: FakeDirector) -> None:
    director.want(running=True, roles={"front": 1, "back": 1})
    await director.until_state(S.RUNNING)

    await director.end_agent("i-2", with_engines=True)

    await director.until(lambda: "i-2" in director.deleted)
    assert director.deleted["i-2"].failed
    await director.until(lambda: {node.id for node in director.serving_nodes()} == {"i-1", "i-3"})
    await director.until_state(S.RUNNING)
    assert S.ADAPTING in director.states


async def test_an_agent_that_restarts_finds_its_engines_and_is_not_replaced(director: FakeDirector) -> None:
    director.want(running=True)
    await director.until_state(S.RUNNING)
    before = engine_pids(director)

    await director.end_agent("i-1")
    await director.start_agent("i-1")

    await director.until(lambda: engine_pids(director) == before)
    await director.until(lambda: director.nodes["i-1"].state is NodeState.SERVING)
    assert director.deleted == {}


async def test_an_engine_that_dies_degrades_its_node_until_it_is_back(director: FakeDirector) -> None:
    director.want(running=True)
    await director.until_state(S.RUNNING)
    pid = engine_pids(director)[0]

    os.kill(pid, signal.SIGKILL)

    await director.until(lambda: engine_pids(director) not in ([], [pid]))
    await director.until(lambda: director.nodes["i-1"].state is NodeState.SERVING)
    assert director.deleted == {}


@pytest.mark.parametrize("serving_before", [0, 1, 2, 3])
async def test_a_manager_that_dies_on_the_way_up_goes_on_where_it_was(
    director: FakeDirector, serving_before: int
) -> None:
    director.want(running=True, roles={"front": 1, "back": 2})
    await director.until(lambda: len(director.serving_nodes()) >= serving_before and director.nodes)

    await director.end_manager()
    await director.start_manager()

    await director.until_state(S.RUNNING)
    assert set(director.nodes) == {"i-1", "i-2", "i-3"}


async def test_a_manager_that_dies_on_the_way_down_goes_on_where_it_was(director: FakeDirector) -> None:
    director.want(running=True, roles={"front": 1, "back": 2})
    await director.until_state(S.RUNNING)
    director.want(running=False)
    await director.until(
        lambda: director.deleted or any(n.state is NodeState.DRAINING for n in director.nodes.values())
    )

    await director.end_manager()
    await director.start_manager()

    await director.until_state(S.STOPPED)
    assert director.nodes == {}


async def test_nobody_leaves_before_those_who_count_on_him_were_told(director: FakeDirector) -> None:
    director.want(running=True, roles={"front": 1, "back": 2})
    await director.until_state(S.RUNNING)
    front = next(node.id for node in director.serving_nodes() if node.roles == ("front",))
    director.silent.add(front)
    await director.end_agent(front)
    assert director.manager is not None
    handle = director.manager[0].nodes.handles[front]
    await director.until(lambda: handle.silent_since is not None)

    director.want(roles={"front": 1, "back": 1})
    rounds = len(director.reports)
    await director.until(lambda: director.reports[rounds:] and director.reports[-1].generation == director.generation)
    assert director.deleted == {}
    await director.start_agent(front)

    await director.until(lambda: len(director.nodes) == 2)
    assert front in director.nodes


async def test_a_new_manager_fences_the_old_one_and_knows_everything(director: FakeDirector) -> None:
    director.want(running=True, roles={"front": 1, "back": 1})
    await director.until_state(S.RUNNING)
    assert director.manager is not None
    old = director.manager[0]
    pids = engine_pids(director)

    director.epoch = 2
    await director.start_manager()
    await director.until(lambda: director.agents["i-1"][0]._epoch == 2)
    handle = old.nodes.handles["i-1"]
    await old.nodes.check()

    assert "a manager may not do this" in handle.reason
    assert engine_pids(director) == pids
    await director.until_state(S.RUNNING)
    assert set(director.nodes) == {"i-1", "i-2"}


async def test_new_code_is_carried_to_every_node(director: FakeDirector, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.php").write_text("hello")
    archive.pack(source, tmp_path / "code.tar.gz")
    blob = (tmp_path / "code.tar.gz").read_bytes()
    sha256 = hashlib.sha256(blob).hexdigest()
    director.blobs[sha256] = blob
    director.code.append(
        CodeVersionView(id="code-1", filename="code.tar.gz", sha256=sha256, size=len(blob), created=datetime.now(UTC))
    )
    director.want(running=True, roles={"front": 1, "back": 1}, code="code-1")

    await director.until_state(S.RUNNING)
    for agent, _ in director.agents.values():
        assert (await agent.roles.unpacked(sha256) / "index.php").read_text() == "hello", agent.context.instance


async def test_a_missing_engine_is_an_error_at_start_and_start_goes_on_when_it_is_there(director: FakeDirector) -> None:
    director.want(running=True, settings={"engine_missing": True})
    await director.until_state(S.ERROR)
    assert "the engine 'echo' is not installed" in director.reports[-1].reason
    assert "conpaas engines install" in director.reports[-1].reason

    director.want(settings={})
    await director.until_state(S.RUNNING)


async def test_a_change_that_fails_while_running_is_told_and_stop_still_works(director: FakeDirector) -> None:
    director.want(running=True)
    await director.until_state(S.RUNNING)
    director.want(settings={"broken": True})
    await director.until(lambda: "told to fail" in director.reports[-1].reason)
    assert director.state is S.ADAPTING

    director.want(running=False)
    await director.until_state(S.STOPPED)
    assert director.nodes == {}


async def test_user_scripts_run_once_at_start_and_before_the_end(director: FakeDirector, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    director.want(
        running=True, start_script=f"echo start $CONPAAS_INSTANCE >> {trace}", stop_script=f"echo stop >> {trace}"
    )
    await director.until_state(S.RUNNING)
    director.want(settings={"greeting": "again"})
    await director.until_state(S.RUNNING)
    director.want(running=False)
    await director.until_state(S.STOPPED)

    assert trace.read_text() == "start i-1\nstop\n"


async def test_a_start_script_that_fails_or_hangs_is_told_and_the_node_serves(director: FakeDirector) -> None:
    director.want(running=True, start_script="echo oh no; exit 7")
    await director.until_state(S.RUNNING)
    await director.until(lambda: "exited with code 7" in director.nodes["i-1"].reason)
    agent, _ = director.agents["i-1"]
    assert "oh no" in agent.roles.read_log("scripts.log", -1000, 1000).text


async def test_nothing_of_a_stopped_service_runs_on(director: FakeDirector) -> None:
    director.want(running=True, roles={"front": 1, "back": 2})
    await director.until_state(S.RUNNING)
    pids = engine_pids(director)
    assert len(pids) == 3
    director.want(running=False)
    await director.until_state(S.STOPPED)
    assert all(run.start_time(pid) is None for pid in pids)
