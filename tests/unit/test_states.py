"""The tables of moves: everything can be reached, the end is the end, stop and start work from everywhere."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conpaas.core.errors import IllegalMoveError
from conpaas.core.states import (
    HELD,
    NODE_MOVES,
    SERVICE_MOVES,
    TRANSIENT,
    NodeState,
    ServiceState,
    check_move,
)

S, N = ServiceState, NodeState
TABLES: dict[str, Mapping[Any, frozenset[Any]]] = {"service": SERVICE_MOVES, "node": NODE_MOVES}
FIRST = {"service": S.INIT, "node": N.REQUESTED}


def reached_from(moves: Mapping[Any, frozenset[Any]], start: object) -> set[object]:
    found, queue = {start}, [start]
    while queue:
        for new in moves[queue.pop()] - found:
            found.add(new)
            queue.append(new)
    return found


@pytest.mark.parametrize("table", TABLES)
def test_every_state_has_its_moves_and_can_be_reached(table: str) -> None:
    moves = TABLES[table]
    assert set(moves) == set(type(FIRST[table]))
    assert reached_from(moves, FIRST[table]) == set(moves)


@pytest.mark.parametrize("table", TABLES)
def test_nothing_moves_to_where_it_is_nor_back_to_the_beginning(table: str) -> None:
    for old, news in TABLES[table].items():
        assert old not in news
        assert FIRST[table] not in news


@pytest.mark.parametrize("new", N)
def test_gone_is_the_end(new: NodeState) -> None:
    with pytest.raises(IllegalMoveError, match="cannot go from GONE"):
        check_move(NODE_MOVES, N.GONE, new, "wishful thinking")


@pytest.mark.parametrize("state", [state for state in N if state is not N.GONE])
def test_every_node_can_be_given_back_and_gets_lost(state: NodeState) -> None:
    assert state is N.DELETING or N.DELETING in NODE_MOVES[state]
    assert N.GONE in reached_from(NODE_MOVES, state)
    assert N.LOST in NODE_MOVES[state] | {state} or state is N.DELETING


@pytest.mark.parametrize("state", S)
def test_a_service_can_be_stopped_and_can_fail_in_every_state(state: ServiceState) -> None:
    assert S.EPILOGUE in SERVICE_MOVES[state] | {state}
    assert S.ERROR in SERVICE_MOVES[state] | {state}
    assert {S.RUNNING, S.STOPPED} <= reached_from(SERVICE_MOVES, state)


def test_only_what_moves_by_itself_is_transient() -> None:
    assert {S.PROLOGUE, S.ADAPTING, S.EPILOGUE} == TRANSIENT
    assert not {S.INIT, S.RUNNING, S.STOPPED, S.ERROR} & TRANSIENT


def test_an_instance_is_held_until_it_is_gone() -> None:
    assert set(N) - HELD == {N.GONE}


@given(old=st.sampled_from(S), new=st.sampled_from(S), why=st.text())
def test_a_service_moves_as_the_table_says(old: ServiceState, new: ServiceState, why: str) -> None:
    _follows_the_table(SERVICE_MOVES, old, new, why)


@given(old=st.sampled_from(N), new=st.sampled_from(N), why=st.text())
def test_a_node_moves_as_the_table_says(old: NodeState, new: NodeState, why: str) -> None:
    _follows_the_table(NODE_MOVES, old, new, why)


def _follows_the_table(moves: Mapping[Any, frozenset[Any]], old: Any, new: Any, why: str) -> None:
    if new in moves[old]:
        check_move(moves, old, new, why)
        return
    with pytest.raises(IllegalMoveError) as caught:
        check_move(moves, old, new, why)
    assert caught.value.message == f"cannot go from {old} to {new}: {why}"
    assert caught.value.value == new


@given(st.lists(st.sampled_from(N), max_size=30))
def test_no_walk_leads_out_of_gone(walk: list[NodeState]) -> None:
    state, was_gone = N.REQUESTED, False
    for new in walk:
        was_gone = was_gone or state is N.GONE
        if new in NODE_MOVES[state]:
            state = new
    assert not was_gone or state is N.GONE
