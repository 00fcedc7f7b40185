"""What is wanted of a service changes in one step or not at all, in every state, whatever its manager does."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import event, select

from conpaas.core.errors import BadInputError, ConflictError, NotFoundError, QuotaExceededError, StaleGenerationError
from conpaas.core.messages.model import OperationView, Wanted
from conpaas.core.states import SERVICE_MOVES, NodeState, OperationState, ServiceState
from conpaas.director import lifecycle
from conpaas.director.db.models import Service
from conpaas.director.internal import state_history
from conpaas.director.ledger import service_of
from conpaas.director.settings import Limits
from conpaas.director.views import ACTIONS, service_views
from tests.fakes.director import DATABASES, Rig, open_rig

S = ServiceState


@pytest.fixture(params=DATABASES)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, request.param, limits=Limits(services=4)) as rig:
        yield rig


@pytest.fixture
async def user(rig: Rig) -> str:
    return await rig.add_user()


async def scale(rig: Rig, service: str, count: int, **words: object) -> OperationView:
    def edit(_: object, wanted: Wanted) -> Wanted:
        return wanted.model_copy(update={"roles": {**wanted.roles, "back": wanted.roles["back"] + count}})

    return await rig.services.change(service, edit, kind="scale", actor="user:alice", **words)  # type: ignore[arg-type]


async def start(rig: Rig, service: str) -> OperationView:
    return await rig.services.start(service, actor="user:alice", key=None, expected=None)


async def stop(rig: Rig, service: str) -> OperationView:
    return await rig.services.stop(service, actor="user:alice", key=None, expected=None)


async def terminate(rig: Rig, service: str) -> OperationView:
    return await rig.services.terminate(service, actor="user:alice", expected=None)


# -- making ---------------------------------------------------------------------------------------------------------


async def test_a_new_service_has_a_manager_and_its_types_defaults(rig: Rig, user: str) -> None:
    view = await rig.create(user)

    assert (view.state, view.name, view.type, view.owner, view.cloud) == (S.INIT, "echo", "echo", user, "sim")
    assert view.wanted == Wanted(
        roles={"front": 1, "back": 0},
        settings={"greeting": "hello", "broken": False, "engine_missing": False},
        cloud="sim",
    )
    assert view.actions[:2] == ("start", "terminate")
    assert len(rig.at_cloud()) == 1
    assert view.operation is not None
    assert (view.operation.kind, view.operation.state) == ("create", OperationState.RUNNING)

    await rig.enrol_manager(view.id)
    await rig.report(view.id, S.INIT)

    assert (await rig.operation(view.operation.id)).state is OperationState.DONE
    assert (await rig.view(view.id)).manager == "https://127.240.0.1:5555"


async def test_a_php_service_begins_with_its_default_code(rig: Rig, user: str) -> None:
    view = await rig.create(user, kind="php")

    assert view.wanted.code == "code-default"
    assert [version.active for version in await rig.director.code.list(view.id)] == [True]


async def test_the_same_key_makes_a_service_once(rig: Rig, user: str) -> None:
    one = await rig.create(user, key="k")
    other = await rig.create(user, key="k")

    assert one.id == other.id
    assert len(rig.at_cloud()) == 1


async def test_services_are_named_apart(rig: Rig, user: str) -> None:
    assert [(await rig.create(user)).name for _ in range(2)] == ["echo", "echo 2"]

    with pytest.raises(ConflictError, match="called 'echo'"):
        await rig.create(user, name="echo")
    assert (await rig.create(await rig.add_user("bob"), name="echo")).name == "echo"


@pytest.mark.parametrize("name", ["'; DROP TABLE services; --", "<script>alert(1)</script>", "日本語 🎉", "x" * 80])
async def test_names_are_only_names(rig: Rig, user: str, name: str) -> None:
    service = (await rig.create(user, name="plain")).id

    assert (await rig.services.rename(service, name, "user:alice")).name == name
    assert (await rig.view(service)).name == name


async def test_what_cannot_be_made_leaves_nothing(rig: Rig, user: str) -> None:
    for words in ({"kind": "nonesuch"}, {"application": "app-none"}):
        with pytest.raises((BadInputError, NotFoundError)):
            await rig.create(user, **words)

    assert rig.at_cloud() == set()
    assert await rig.credits(user) == 100


async def test_there_is_a_limit_to_the_number_of_services(rig: Rig, user: str) -> None:
    for _ in range(4):
        await rig.create(user)

    with pytest.raises(ConflictError, match="4 services, which is the limit"):
        await rig.create(user)


async def test_a_manager_that_is_refused_is_an_error_that_says_why(rig: Rig, user: str) -> None:
    rig.cloud.fail("create", QuotaExceededError("4 of 4 instances are in use"))

    view = await rig.view((await rig.create(user)).id)

    assert (view.state, view.reason) == (S.ERROR, "no manager: 4 of 4 instances are in use")
    assert await rig.credits(user) == 100

    rig.clock.advance(seconds=1)
    operation = await start(rig, view.id)  # there is room again
    await rig.reconciler.watch()
    assert (await rig.manager(view.id)).epoch == 2
    assert (await rig.operation(operation.id)).state is OperationState.RUNNING


async def test_listing_takes_as_many_queries_for_many_services_as_for_one(rig: Rig, user: str) -> None:
    queries: list[str] = []
    event.listen(rig.db.engine.sync_engine, "before_cursor_execute", lambda *words: queries.append(words[2]))
    counts = []
    for number in range(1, 4):
        await rig.running(user, nodes=2)
        async with rig.db.read() as session:
            rows = (await session.scalars(select(Service).where(Service.user_id == user))).all()
            queries.clear()
            assert len(await service_views(session, rows, rig.clock.now())) == number
        counts.append(len([query for query in queries if query.startswith("SELECT")]))

    assert counts == [2, 2, 2]


# -- changing -------------------------------------------------------------------------------------------------------


async def test_a_service_starts_and_stops_and_starts_again(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    assert (await rig.view(service)).state is S.RUNNING

    operation = await stop(rig, service)
    assert (await rig.view(service)).state is S.EPILOGUE
    await rig.ledger.delete_all(await rig.agents(service))
    await rig.report(service, S.STOPPED)

    view = await rig.view(service)
    assert (view.state, [node.kind for node in view.nodes]) == (S.STOPPED, ["manager"])
    assert (await rig.operation(operation.id)).state is OperationState.DONE

    await start(rig, service)
    assert (await rig.view(service)).state is S.PROLOGUE
    states = [change.state for change in (await state_history(rig.db, service)).changes]
    assert states == [S.INIT, S.PROLOGUE, S.RUNNING, S.EPILOGUE, S.STOPPED, S.PROLOGUE]


async def test_a_change_while_running_is_an_operation_with_progress(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id

    operation = await scale(rig, service, +2)
    assert (await rig.view(service)).state is S.ADAPTING

    await rig.report(service, S.ADAPTING, done=1, total=3, message="1 of 3 nodes serving")
    shown = await rig.operation(operation.id)
    assert (shown.state, shown.done, shown.total, shown.message) == (
        OperationState.RUNNING,
        1,
        3,
        "1 of 3 nodes serving",
    )

    await rig.report(service, S.RUNNING, done=3, total=3)
    assert (await rig.operation(operation.id)).state is OperationState.DONE
    assert (await rig.view(service)).state is S.RUNNING


async def test_a_report_of_an_older_generation_ends_nothing(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    operation = await scale(rig, service, +1)

    await rig.report(service, S.RUNNING, generation=operation.generation - 1)

    assert (await rig.operation(operation.id)).state is OperationState.RUNNING
    assert (await rig.view(service)).state is S.ADAPTING


async def test_changes_are_compared_and_set(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    generation = (await rig.view(service)).generation

    await scale(rig, service, +1, expected=generation)
    with pytest.raises(StaleGenerationError):
        await scale(rig, service, +1, expected=generation)

    assert (await rig.view(service)).wanted.roles["back"] == 1


async def test_two_changes_at_once_both_count(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id

    await asyncio.gather(scale(rig, service, +1), scale(rig, service, +2))

    assert (await rig.view(service)).wanted.roles["back"] == 3


async def test_the_same_key_is_the_same_operation(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id

    one = await scale(rig, service, +1, key="k")
    other = await scale(rig, service, +1, key="k")

    assert one.id == other.id
    assert (await rig.view(service)).wanted.roles["back"] == 1


@pytest.mark.parametrize("count", [-1, 10**9])
async def test_what_cannot_be_wanted_changes_nothing(rig: Rig, user: str, count: int) -> None:
    service = (await rig.running(user)).id
    before = await rig.view(service)

    with pytest.raises(BadInputError):
        await scale(rig, service, count)

    assert await rig.view(service) == before


async def test_settings_are_checked_by_their_model(rig: Rig, user: str) -> None:
    service = (await rig.create(user)).id
    with pytest.raises(BadInputError, match="broken: Input should be a valid boolean"):
        await rig.services.change(
            service,
            lambda _, wanted: wanted.model_copy(update={"settings": {"broken": "maybe"}}),
            kind="configure",
            actor="user:alice",
        )


async def test_a_change_while_stopped_is_done_at_once(rig: Rig, user: str) -> None:
    service = (await rig.create(user)).id

    operation = await rig.services.change(
        service,
        lambda _, wanted: wanted.model_copy(update={"settings": {"greeting": "good evening"}}),
        kind="configure",
        actor="user:alice",
    )

    assert operation.state is OperationState.DONE
    view = await rig.view(service)
    assert (view.state, view.wanted.settings["greeting"]) == (S.INIT, "good evening")


async def test_code_that_is_not_there_cannot_be_activated(rig: Rig, user: str) -> None:
    service = (await rig.create(user, kind="php")).id

    with pytest.raises(BadInputError, match="no code version 'code-none'"):
        await rig.services.change(
            service, lambda _, wanted: wanted.model_copy(update={"code": "code-none"}), kind="activate", actor="a"
        )


async def test_every_change_is_in_the_log_with_before_and_after(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    await scale(rig, service, +1)

    [event] = await rig.events("scale")

    assert (event.actor, event.service_id, event.user_id, event.message) == ("user:alice", service, user, "back +1")
    assert (event.before, event.after) == ('{"roles":{"front":1,"back":0}}', '{"roles":{"front":1,"back":1}}')


# -- cancelling -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_operation_puts_back_what_was_wanted(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    before = (await rig.view(service)).wanted
    operation = await scale(rig, service, +2)

    cancelled = await rig.services.cancel(operation.id, actor="user:alice")

    assert cancelled.state is OperationState.CANCELLED
    view = await rig.view(service)
    assert view.wanted == before
    assert view.operation is not None
    assert view.operation.kind == "undo"
    await rig.report(service, S.RUNNING)
    assert (await rig.operation(view.operation.id)).state is OperationState.DONE


async def test_cancelling_a_start_gives_the_nodes_back(rig: Rig, user: str) -> None:
    service = (await rig.create(user)).id
    operation = await start(rig, service)
    await rig.add_nodes(service, 1)

    await rig.services.cancel(operation.id, actor="user:alice")
    await rig.settle()

    assert (await rig.view(service)).state is S.STOPPED  # its manager is not there yet: the director does it
    assert await rig.agents(service) == []


async def test_only_the_newest_operation_under_way_can_be_cancelled(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    first = await scale(rig, service, +1)
    second = await scale(rig, service, +1)

    with pytest.raises(ConflictError, match="something newer"):
        await rig.services.cancel(first.id, actor="user:alice")
    await rig.report(service, S.RUNNING)
    with pytest.raises(ConflictError, match="is over"):
        await rig.services.cancel(second.id, actor="user:alice")
    with pytest.raises(NotFoundError):
        await rig.services.cancel("op-none", actor="user:alice")


async def test_a_stop_supersedes_what_is_under_way(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    operation = await scale(rig, service, +1)

    await stop(rig, service)

    shown = await rig.operation(operation.id)
    assert (shown.state, shown.message) == (OperationState.CANCELLED, "superseded by 'stop'")


# -- ending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(ServiceState))
@pytest.mark.parametrize("command", ["stop", "terminate"])
async def test_stop_and_terminate_work_in_every_state(tmp_path: Path, state: ServiceState, command: str) -> None:
    async with open_rig(tmp_path) as rig:
        user = await rig.add_user()
        service = (await rig.running(user)).id
        async with rig.db.write() as session:
            row = await service_of(session, service)
            row.state = state
            row.wanted = {**row.wanted, "running": state not in {S.INIT, S.STOPPED, S.EPILOGUE}}

        await (stop if command == "stop" else terminate)(rig, service)
        rig.clock.advance(seconds=200)  # the manager does not answer any more
        await rig.settle()
        await rig.reconciler.watch()

        row = await rig.service(service)
        if command == "stop":
            assert row.state is S.STOPPED
            assert await rig.agents(service) == []
        else:
            assert row.terminated is not None
            assert rig.at_cloud() == set()


async def test_a_live_manager_is_left_to_stop_its_service(rig: Rig, user: str) -> None:
    service = (await rig.running(user, nodes=2)).id

    operation = await stop(rig, service)
    await rig.settle()
    await rig.reconciler.watch()

    assert len(await rig.agents(service)) == 2
    assert (await rig.operation(operation.id)).state is OperationState.RUNNING


async def test_a_service_is_terminated_with_all_it_had(rig: Rig, user: str) -> None:
    service = (await rig.running(user, nodes=3)).id
    operation = await terminate(rig, service)
    assert (await terminate(rig, service)).id == operation.id  # twice is once
    await rig.settle()
    assert len(rig.at_cloud()) == 4  # its manager is at it

    await rig.ledger.delete_all(await rig.agents(service))
    await rig.report(service, S.STOPPED)

    assert rig.at_cloud() == set()
    assert (await rig.operation(operation.id)).state is OperationState.DONE
    assert len(await rig.events("service-terminated")) == 1
    with pytest.raises(NotFoundError):
        await start(rig, service)


async def test_a_service_that_is_being_terminated_takes_no_other_command(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    await terminate(rig, service)

    with pytest.raises(ConflictError, match="being terminated"):
        await start(rig, service)
    with pytest.raises(ConflictError, match="being terminated"):
        await stop(rig, service)


async def test_terminating_takes_no_longer_than_its_deadline_for_a_silent_manager(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    await terminate(rig, service)
    rig.clock.advance(seconds=21)

    await rig.reconciler.watch()

    assert rig.at_cloud() == set()
    assert (await rig.service(service)).terminated is not None


async def test_the_code_of_a_terminated_service_is_deleted(rig: Rig, user: str) -> None:
    service = (await rig.create(user, kind="php")).id
    assert [*(rig.settings.data_dir / "blobs").glob("??/*")]

    await terminate(rig, service)
    await rig.settle()

    assert not [*(rig.settings.data_dir / "blobs").glob("??/*")]


# -- reports --------------------------------------------------------------------------------------------------------


async def test_an_error_is_a_state_with_a_reason_and_can_be_left(rig: Rig, user: str) -> None:
    service = (await rig.create(user)).id
    await rig.enrol_manager(service)
    operation = await start(rig, service)

    await rig.report(service, S.ERROR, reason="the engine 'echo' is not installed")

    view = await rig.view(service)
    assert (view.state, view.reason) == (S.ERROR, "the engine 'echo' is not installed")
    shown = await rig.operation(operation.id)
    assert (shown.state, shown.error) == (OperationState.FAILED, "the engine 'echo' is not installed")

    await rig.report(service, S.PROLOGUE)  # an attempt is no news
    assert (await rig.view(service)).state is S.ERROR
    await start(rig, service)
    assert (await rig.view(service)).state is S.PROLOGUE
    await rig.report(service, S.RUNNING)
    assert (await rig.view(service)).state is S.RUNNING


async def test_a_report_shows_nodes_urls_and_facts(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id

    await rig.report(service, S.RUNNING, urls={"application": "http://a/"}, facts={"requests/s": "3"})

    view = await rig.view(service)
    assert (view.urls, view.facts) == ({"application": "http://a/"}, {"requests/s": "3"})
    assert [(node.kind, node.state, node.roles) for node in view.nodes] == [
        ("manager", NodeState.SERVING, ()),
        ("agent", NodeState.SERVING, ("front",)),
    ]


async def test_a_report_that_says_nothing_new_costs_no_write(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    await rig.report(service, S.RUNNING)
    writes = 0

    def count(_: object) -> None:
        nonlocal writes
        writes += 1

    rig.db.on_commit.append(count)
    await rig.report(service, S.RUNNING)
    assert writes == 0

    await rig.report(service, S.RUNNING, facts={"a": "b"})
    assert writes == 1


async def test_an_operation_that_takes_too_long_has_failed_and_its_service_keeps_trying(rig: Rig, user: str) -> None:
    service = (await rig.running(user)).id
    operation = await scale(rig, service, +1)
    rig.clock.advance(seconds=10)
    await rig.report(service, S.ADAPTING, done=1, total=2, message="1 of 2 nodes serving")
    rig.clock.advance(seconds=891)

    await rig.reconciler.watch()

    shown = await rig.operation(operation.id)
    assert (shown.state, shown.error) == (OperationState.FAILED, "not done within 901 s: 1 of 2 nodes serving")
    assert (await rig.view(service)).state is S.ADAPTING


@pytest.mark.parametrize("state", list(ServiceState))
@pytest.mark.parametrize("said", list(ServiceState))
@pytest.mark.parametrize("running", [True, False])
def test_no_report_asks_for_an_illegal_move(state: ServiceState, said: ServiceState, running: bool) -> None:
    new = lifecycle.after_report(state, said, running=running)

    assert new is None or new in SERVICE_MOVES[state]


@pytest.mark.parametrize("state", list(ServiceState))
@pytest.mark.parametrize("kind", ["start", "stop", "scale", "terminate", "undo"])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("was_running", [True, False])
def test_no_change_asks_for_an_illegal_move(state: ServiceState, kind: str, running: bool, was_running: bool) -> None:
    new = lifecycle.after_change(state, kind=kind, running=running, was_running=was_running)

    assert new is None or new in SERVICE_MOVES[state]


def test_the_buttons_are_those_of_the_slides() -> None:
    main = {state: set(actions) & {"start", "stop", "terminate"} for state, actions in ACTIONS.items()}
    assert main[S.INIT] == main[S.STOPPED] == {"start", "terminate"}
    assert main[S.RUNNING] == {"stop"}
