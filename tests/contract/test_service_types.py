"""What every service type promises: its planner, its role agents, its settings."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conpaas.core import plugins
from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Message
from conpaas.core.messages.model import CodeVersionView, Wanted
from conpaas.core.service import MANAGER, PACKAGE, Assignment, Node, Planner, RoleAgent, ServiceType, Situation

TYPES = plugins.discover(PACKAGE, "SERVICE", ServiceType)
MOST_NODES = 12

pytestmark = pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in sorted(TYPES.items())])


def planner_of(kind: ServiceType) -> Planner:
    planner = plugins.load(kind.planner)()
    assert isinstance(planner, Planner)
    return planner


def initial(kind: ServiceType) -> dict[str, int]:
    return {role.name: role.initial for role in kind.roles if role.scalable}


def version(letter: str) -> CodeVersionView:
    return CodeVersionView(
        id=f"code-{letter}", filename="x.tar", sha256=letter * 64, size=1, created=datetime(2026, 1, 1, tzinfo=UTC)
    )


@st.composite
def wanted_roles(draw: st.DrawFn, kind: ServiceType) -> dict[str, int]:
    """Counts that the type's own bounds allow."""
    return {
        role.name: draw(st.integers(role.minimum, min(role.maximum, role.minimum + 4)))
        for role in kind.roles
        if role.scalable
    }


@st.composite
def some_nodes(draw: st.DrawFn, kind: ServiceType) -> list[Node]:
    """Nodes that came about by an assignment, some of them gone and some new ones there."""
    first = [Node(f"node-{number}", f"127.0.1.{number}") for number in range(draw(st.integers(0, MOST_NODES)))]
    before = planner_of(kind).assign(draw(wanted_roles(kind)), first)
    return [
        Node(one.id, one.address, before.roles.get(one.id, frozenset())) for one in first if draw(st.integers(0, 3))
    ]


def holding(nodes: list[Node], assignment: Assignment) -> list[Node]:
    """Return the nodes that stay, with what they were given."""
    return [Node(node.id, node.address, assignment.roles[node.id]) for node in nodes if node.id in assignment.roles]


def situation(
    kind: ServiceType, roles: Mapping[str, int], nodes: list[Node], assignment: Assignment, *, new_code: bool = False
) -> Situation:
    return Situation(
        service="svc-1",
        wanted=Wanted(running=any(roles.values()), roles=dict(roles)),
        nodes={MANAGER: Node(MANAGER, "127.0.0.9"), **{node.id: node for node in nodes}},
        assignment=assignment,
        code=version("b") if kind.takes_code else None,
        previous_code=version("a") if kind.takes_code and new_code else None,
        secret=lambda purpose: f"secret of {purpose}",
    )


examples = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# -- declarations ---------------------------------------------------------------------------------------------------


def test_it_says_what_it_is(kind: ServiceType) -> None:
    assert kind.title
    assert kind.description
    names = [role.name for role in kind.roles]
    assert len(set(names)) == len(names)
    assert all(role.title for role in kind.roles)
    assert any(role.initial for role in kind.roles)
    assert all(role.minimum <= role.maximum for role in kind.roles)
    assert all(role.minimum <= role.initial <= role.maximum for role in kind.roles if role.scalable)


def test_every_setting_has_a_default_and_says_what_it_is(kind: ServiceType) -> None:
    assert kind.settings() == kind.settings.model_validate(kind.settings().model_dump())
    for name, field in kind.settings.model_fields.items():
        assert not field.is_required(), name
        assert field.description, f"{kind.name}: the setting {name} has no docstring"
    assert kind.settings.model_json_schema()["properties"] is not None


def test_every_role_has_an_agent_that_loads(kind: ServiceType) -> None:
    assert set(kind.agents) == {role.name for role in kind.roles}
    for reference in kind.agents.values():
        agent = plugins.load(reference)
        assert issubclass(agent, RoleAgent)
        assert issubclass(agent.config, Message)


def test_a_role_that_keeps_data_is_one_of_nodes(kind: ServiceType) -> None:
    assert all(role.scalable for role in kind.roles if role.volume), "the manager's own instance has no volumes"


def test_its_commands_load(kind: ServiceType) -> None:
    for command in kind.commands:
        assert callable(plugins.load(command.run))
        assert command.title
    if kind.page:
        assert plugins.load(kind.page)


def test_its_default_code_is_there(kind: ServiceType) -> None:
    if not kind.takes_code:
        pytest.skip("takes no code")
    module = Path(str(plugins.load(f"{kind.planner.rpartition('.')[0]}:__file__")))
    folder = module.parent / kind.default_code
    assert any(path.is_file() for path in folder.rglob("*")), folder


# -- who ------------------------------------------------------------------------------------------------------------


@examples
@given(data=st.data())
def test_every_wanted_role_is_held_and_nobody_is_surplus(kind: ServiceType, data: st.DataObject) -> None:
    roles, nodes = data.draw(wanted_roles(kind)), data.draw(some_nodes(kind))
    assignment = planner_of(kind).assign(roles, nodes)
    staying = set(assignment.roles) - {MANAGER}

    if not any(roles.values()):
        assert not assignment.roles
        return
    assert staying <= {node.id for node in nodes}
    assert all(assignment.roles.values()), "a node without a role is surplus"
    assert len(staying) + assignment.missing >= max(roles.values())
    assert len(staying) <= sum(roles.values())
    assert (assignment.missing == 0) == (len(staying) == sum(roles.values()))
    if not assignment.missing:
        wanted = {role for role, count in roles.items() if count}
        assert wanted <= {role for held in assignment.roles.values() for role in held}


@examples
@given(data=st.data())
def test_what_was_assigned_stays_assigned(kind: ServiceType, data: st.DataObject) -> None:
    planner = planner_of(kind)
    roles, nodes = data.draw(wanted_roles(kind)), data.draw(some_nodes(kind))
    first = planner.assign(roles, nodes)
    again = planner.assign(roles, holding(nodes, first))

    assert dict(again.roles) == dict(first.roles)
    assert again.missing == first.missing


@examples
@given(data=st.data())
def test_the_nodes_that_are_missing_complete_it(kind: ServiceType, data: st.DataObject) -> None:
    planner = planner_of(kind)
    roles, nodes = data.draw(wanted_roles(kind)), data.draw(some_nodes(kind))
    first = planner.assign(roles, nodes)
    fresh = [Node(f"fresh-{number}", f"127.0.2.{number}") for number in range(first.missing)]
    complete = planner.assign(roles, [*holding(nodes, first), *fresh])

    assert complete.missing == 0
    for role, count in roles.items():
        held = [node for node, some in complete.roles.items() if role in some]
        assert len(held) >= count
    assert {node.id for node in fresh} <= set(complete.roles)


@examples
@given(data=st.data())
def test_growing_moves_no_node_that_had_work_of_its_own(kind: ServiceType, data: st.DataObject) -> None:
    planner = planner_of(kind)
    roles = data.draw(wanted_roles(kind))
    nodes = [Node(f"node-{number}", f"127.0.1.{number}") for number in range(sum(roles.values()))]
    before = planner.assign(roles, nodes)
    more = {name: count + data.draw(st.integers(0, 2)) for name, count in roles.items()}
    fresh = [Node(f"fresh-{number}", f"127.0.2.{number}") for number in range(sum(more.values()) - sum(roles.values()))]
    after = planner.assign(more, [*holding(nodes, before), *fresh])

    for node in set(before.roles) - {MANAGER}:
        assert before.roles[node] & after.roles[node], "it does something else altogether"


# -- in which order -------------------------------------------------------------------------------------------------


@examples
@given(data=st.data())
def test_the_stages_name_every_role_of_every_node_and_end_all_others(kind: ServiceType, data: st.DataObject) -> None:
    planner = planner_of(kind)
    roles, nodes = data.draw(wanted_roles(kind)), data.draw(some_nodes(kind))
    assignment = planner.assign(roles, nodes)
    plan = situation(kind, roles, nodes, assignment, new_code=data.draw(st.booleans()))
    steps = [step for stage in planner.stages(plan) for step in stage]

    made = {(step.node, step.role) for step in steps if step.config is not None}
    ended = {(step.node, step.role) for step in steps if step.config is None}
    assert made == {(node, role) for node, held in assignment.roles.items() for role in held}
    assert not made & ended
    held_now = {(node.id, role) for node in nodes for role in node.roles}
    assert held_now - made <= ended
    for step in steps:
        if step.config is not None:
            assert isinstance(step.config, plugins.load(kind.agents[step.role]).config)


@examples
@given(data=st.data())
def test_a_node_ends_nothing_before_everything_new_serves(kind: ServiceType, data: st.DataObject) -> None:
    planner = planner_of(kind)
    roles, nodes = data.draw(wanted_roles(kind)), data.draw(some_nodes(kind))
    plan = situation(kind, roles, nodes, planner.assign(roles, nodes))
    stages = planner.stages(plan)
    makes = [number for number, stage in enumerate(stages) for step in stage if step.config is not None]
    ends = [number for number, stage in enumerate(stages) for step in stage if step.config is None]

    assert not makes or not ends or max(makes) < min(ends)


@examples
@given(data=st.data())
def test_configurations_survive_the_wire(kind: ServiceType, data: st.DataObject) -> None:
    planner = planner_of(kind)
    roles, nodes = data.draw(wanted_roles(kind)), data.draw(some_nodes(kind))
    plan = situation(kind, roles, nodes, planner.assign(roles, nodes))
    for stage in planner.stages(plan):
        for step in stage:
            if step.config is not None:
                sent = step.config.model_dump_json(context={"reveal": True})
                assert type(step.config).model_validate_json(sent) == step.config
                assert "secret of" not in step.config.model_dump_json(), "a secret is shown"


def test_planning_the_same_twice_gives_the_same(kind: ServiceType) -> None:
    planner, roles = planner_of(kind), initial(kind)
    nodes = [Node(f"node-{number}", f"127.0.1.{number}") for number in range(sum(roles.values()))]
    plan = situation(kind, roles, nodes, planner.assign(roles, nodes))
    assert planner.stages(plan) == planner.stages(plan)
    assert isinstance(planner.urls(plan), dict)
    assert isinstance(planner.facts(plan, {}), dict)
    assert isinstance(planner.summary({}), dict)


# -- what cannot be wanted ------------------------------------------------------------------------------------------


def test_what_it_starts_with_is_accepted(kind: ServiceType) -> None:
    planner_of(kind).check(Wanted(), Wanted(running=True, roles=initial(kind)))


def test_nonsense_is_refused(kind: ServiceType) -> None:
    planner, start = planner_of(kind), initial(kind)
    before = Wanted(running=True, roles=start)
    scalable = next(role for role in kind.roles if role.scalable)
    nonsense = [
        {**start, "no-such-role": 1},
        {**start, scalable.name: -1},
        {**start, scalable.name: 10**9},
        *({**start, role.name: 2} for role in kind.roles if not role.scalable),
        *({**start, role.name: role.minimum - 1} for role in kind.roles if role.scalable and role.minimum),
    ]
    for roles in nonsense:
        with pytest.raises(BadInputError) as caught:
            planner.check(before, before.model_copy(update={"roles": roles}))
        assert caught.value.value is not None
    with pytest.raises(BadInputError, match="no_such_setting"):
        planner.check(before, before.model_copy(update={"settings": {"no_such_setting": 1}}))


def test_no_role_is_the_managers_and_scalable(kind: ServiceType) -> None:
    assignment = planner_of(kind).assign(initial(kind), [Node("a", "127.0.1.1")])
    for role in assignment.roles.get(MANAGER, frozenset()):
        assert not kind.role(role).scalable
