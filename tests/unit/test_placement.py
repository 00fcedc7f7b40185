"""Where nodes are to be: over the PHP planner, which knows nothing of clouds."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from conpaas.core import placement, spec
from conpaas.core.messages.model import Wanted
from conpaas.core.placement import Phase, Plan
from conpaas.core.service import MANAGER, Node
from conpaas.services.php.planner import PhpPlanner

PLANNER = PhpPlanner()
ALL = frozenset({"proxy", "web", "php"})


def wanted(cloud: str = "a", places: dict[str, dict[str, int]] | None = None, **roles: int) -> Wanted:
    return Wanted(running=True, roles={"proxy": 1, "web": 0, "php": 0} | roles, cloud=cloud, places=places or {})


def node(name: str, cloud: str = "a", *roles: str, meant_for: str = "", size: str = "") -> Node:
    return Node(name, f"addr-{name}", frozenset(roles), cloud, size, meant_for or cloud)


def plan(want: Wanted, *nodes: Node, ready: str | None = None, handover_s: float | None = None) -> Plan:
    answering = frozenset(node.id for node in nodes) if ready is None else frozenset(ready.split())
    return placement.plan(PLANNER, want, nodes, ready=answering, handover_s=handover_s)


def test_on_one_cloud_it_is_the_planner_who_decides() -> None:
    made = plan(wanted(web=2), node("n1", "a", *ALL))

    assert made == Plan(PLANNER.assign({"proxy": 1, "web": 2, "php": 0}, [node("n1", "a", *ALL)]), {"a": 2})


def test_nodes_are_asked_for_where_they_are_to_be() -> None:
    made = plan(wanted(web=3, places={"web": {"b": 2}}), node("n1", "a", *ALL))

    assert made.missing == {"a": 1, "b": 2}
    assert made.phase is Phase.SETTLED


def test_a_new_node_gets_the_role_that_its_cloud_is_wanted_for() -> None:
    want = wanted(web=1, php=1, places={"web": {"b": 1}, "php": {"c": 1}})
    made = plan(want, node("n1", "a", *ALL), node("n2", "c"), node("n3", "b"))

    assert made.assignment.roles["n2"] == {"php"}
    assert made.assignment.roles["n3"] == {"web"}


def test_a_service_that_moves_goes_on_until_its_successors_answer() -> None:
    old = node("n1", "a", *ALL)
    want = wanted("b")

    first = plan(want, old)
    assert (first.phase, first.missing, first.kept) == (Phase.GATHER, {"b": 1}, {"n1"})
    assert first.assignment.roles["n1"] == ALL

    booting = plan(want, old, node("n2", "b"), ready="n1")
    assert (booting.phase, booting.missing, booting.kept) == (Phase.GATHER, {}, {"n1", "n2"})
    assert "n2" not in booting.assignment.roles

    both = plan(want, old, node("n2", "b"))
    assert (both.phase, both.kept) == (Phase.OVERLAP, {"n1", "n2"})
    assert both.assignment.roles["n1"] == both.assignment.roles["n2"] == ALL
    assert both.assignment.holders("proxy")[0] == "n2"  # the address that the world is to learn

    last = plan(want, old, node("n2", "b", *ALL), handover_s=0)
    assert (last.phase, last.kept) == (Phase.SETTLED, {"n2"})


def test_an_old_node_that_dies_on_the_way_is_stood_in_for_by_a_successor() -> None:
    made = plan(wanted("b", web=1), node("n2", "a", "web"), node("n3", "b"), ready="n2 n3")

    assert made.phase is Phase.GATHER
    assert made.missing == {"b": 1}
    assert "proxy" in made.assignment.roles["n3"]


def test_a_node_whose_cloud_refused_it_stays_where_it_came_to_be() -> None:
    made = plan(wanted(web=1), node("n1", "a", "proxy", "php"), node("n2", "b", "web", meant_for="a"))

    assert (made.phase, made.missing, made.kept) == (Phase.SETTLED, {}, {"n1", "n2"})
    assert plan(wanted("b"), node("n2", "b", *ALL, meant_for="a")).phase is Phase.SETTLED


def test_another_size_is_another_place() -> None:
    want = wanted().model_copy(update={"sizes": {"a": "large"}})

    assert plan(want, node("n1", "a", *ALL, size="small")).missing == {"a": 1}
    assert plan(want, node("n1", "a", *ALL, size="large")).missing == {}


def test_fewer_nodes_are_not_a_move() -> None:
    nodes = [node("n1", "a", "proxy", "php"), node("n2", "a", "web"), node("n3", "a", "web")]
    made = plan(wanted(web=1), *nodes)

    assert (made.phase, made.kept) == (Phase.SETTLED, {"n1", "n2"})


def test_fewer_on_one_of_two_clouds_takes_the_node_from_there() -> None:
    nodes = [node("n1", "a", "proxy", "php"), node("n2", "b", "web"), node("n3", "a", "web")]
    want = spec.change_roles(wanted(web=2, places={"web": {"b": 1}}), {"web": -1}, "b")

    assert plan(want, *nodes, handover_s=0).kept == {"n1", "n3"}


def test_one_of_two_nodes_moves() -> None:
    nodes = [node("n1", "a", "proxy", "php"), node("n2", "a", "web"), node("n3", "a", "web")]
    want = wanted(web=2, places={"web": {"b": 1}})

    assert plan(want, *nodes).missing == {"b": 1}
    assert plan(want, *nodes, node("n4", "b")).kept == {"n1", "n2", "n3", "n4"}
    serving = (*nodes, node("n4", "b", "web"))
    assert plan(want, *serving, handover_s=5).phase is Phase.OVERLAP
    assert plan(want, *serving, handover_s=0).kept == {"n1", "n2", "n4"}


def test_a_stopped_service_keeps_nothing() -> None:
    made = plan(wanted().model_copy(update={"running": False}), node("n1", "a", *ALL), node("n2", "b", "web"))

    assert not made.kept
    assert not made.missing


CLOUDS = st.sampled_from(["a", "b", "c"])


@st.composite
def wishes(draw: st.DrawFn) -> Wanted:
    roles = {"proxy": draw(st.integers(1, 2)), "web": draw(st.integers(0, 3)), "php": draw(st.integers(0, 3))}
    places: dict[str, dict[str, int]] = {}
    for role, count in roles.items():
        elsewhere = draw(st.integers(0, count))
        if elsewhere:
            places[role] = {draw(st.sampled_from(["b", "c"])): elsewhere}
    return Wanted(running=True, roles=roles, cloud="a", places=places)


@settings(max_examples=200, deadline=None)
@given(st.lists(wishes(), min_size=1, max_size=4), st.data())
def test_whatever_is_wanted_next_it_is_reached_and_somebody_always_serves(
    wanted_: list[Wanted], data: st.DataObject
) -> None:
    nodes: list[Node] = []
    served = False
    for number, want in enumerate(wanted_):
        for step in range(8):
            if nodes and data.draw(st.integers(0, 9)) == 0:
                del nodes[data.draw(st.integers(0, len(nodes) - 1))]
                served = any("proxy" in one.roles for one in nodes)
            made = placement.plan(
                PLANNER, want, nodes, ready=frozenset(one.id for one in nodes), handover_s=[None, 5, 0][step % 3]
            )
            roles = made.assignment.roles
            new = [
                Node(f"n{number}-{step}-{cloud}-{i}", "", frozenset(), cloud, "", cloud)
                for cloud, count in made.missing.items()
                for i in range(count)
            ]
            nodes = [
                Node(one.id, "", roles.get(one.id, frozenset()), one.cloud, "", one.meant_for)
                for one in nodes
                if one.id in made.kept
            ] + new
            if served:
                assert any("proxy" in one.roles for one in nodes)
            served = served or any("proxy" in one.roles for one in nodes)
        final: Plan | None = None
        for step in range(18):  # nobody dies any more
            final = placement.plan(
                PLANNER, want, nodes, ready=frozenset(n.id for n in nodes), handover_s=[None, 5, 0][step % 3]
            )
            roles = final.assignment.roles
            nodes = [
                Node(one.id, "", roles.get(one.id, frozenset()), one.cloud, "", one.meant_for)
                for one in nodes
                if one.id in final.kept
            ] + [
                Node(f"f{number}-{step}-{cloud}-{i}", "", frozenset(), cloud, "", cloud)
                for cloud, count in final.missing.items()
                for i in range(count)
            ]
        assert final is not None
        assert (final.phase, final.missing) == (Phase.SETTLED, {})
        assert final.assignment.roles.keys() - {MANAGER} == {one.id for one in nodes}
        where = Counter(one.cloud for one in nodes)
        for cloud in "abc":
            elsewhere = sum(places.get(cloud, 0) for places in want.places.values())
            at_home = sum(want.roles.values()) - sum(sum(p.values()) for p in want.places.values())
            assert where[cloud] == (elsewhere if cloud != "a" else at_home)
