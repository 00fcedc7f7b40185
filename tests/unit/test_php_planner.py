"""Who does what in a PHP service, and in which order it comes about."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conpaas.core.errors import BadInputError
from conpaas.core.messages.model import CodeVersionView, Wanted
from conpaas.core.service import MANAGER, Node, Situation, Step
from conpaas.services.php.messages import PhpSettings, SessionsConfig
from conpaas.services.php.planner import PhpPlanner

planner = PhpPlanner()


def node(name: str, *roles: str) -> Node:
    return Node(name, f"127.0.1.{ord(name[0])}", frozenset(roles))


def assigned(wanted: Mapping[str, int], *nodes: Node) -> tuple[dict[str, str], int]:
    result = planner.assign(wanted, nodes)
    roles = {name: " ".join(sorted(held)) for name, held in result.roles.items() if name != MANAGER}
    return roles, result.missing


def version(letter: str) -> CodeVersionView:
    return CodeVersionView(
        id=f"code-{letter}", filename="x.tar", sha256=letter * 64, size=1, created=datetime(2026, 1, 1, tzinfo=UTC)
    )


def situation(
    wanted: Mapping[str, int],
    *nodes: Node,
    code: CodeVersionView | None = None,
    previous: CodeVersionView | None = None,
    settings: dict[str, Any] | None = None,
) -> Situation:
    return Situation(
        service="svc-1",
        wanted=Wanted(running=bool(wanted), roles=dict(wanted), settings=settings or {}),
        nodes={MANAGER: Node(MANAGER, "127.0.0.9"), **{one.id: one for one in nodes}},
        assignment=planner.assign(wanted, [one for one in nodes if not one.id.startswith("leaving")]),
        code=code,
        previous_code=previous,
        secret=lambda purpose: f"secret of {purpose}",
    )


def story(situation: Situation) -> list[list[str]]:
    """Tell the stages as text: `node.role`, `!` for an end, `~` for a preparation."""

    def mark(step: Step) -> str:
        return "!" if step.config is None else "~" if getattr(step.config, "prepare", False) else ""

    return [sorted(f"{mark(step)}{step.node}.{step.role}" for step in stage) for stage in planner.stages(situation)]


# -- who ------------------------------------------------------------------------------------------------------------


def test_one_node_alone_does_it_all() -> None:
    assert assigned({"proxy": 1, "web": 0, "php": 0}, node("a")) == ({"a": "php proxy web"}, 0)


def test_the_sample_scenario_needs_three_more_nodes_that_are_specialised() -> None:
    wanted = {"proxy": 1, "web": 2, "php": 1}
    first = node("a", "proxy", "web", "php")
    assert assigned(wanted, first) == ({"a": "php proxy web"}, 3)
    assert assigned(wanted, first, node("b"), node("c"), node("d")) == (
        {"a": "proxy", "b": "php", "c": "web", "d": "web"},
        0,
    )


def test_the_first_dedicated_node_takes_its_role_off_the_shared_one() -> None:
    first = node("a", "proxy", "web", "php")
    assert assigned({"proxy": 1, "web": 1}, first, node("b")) == ({"a": "php proxy", "b": "web"}, 0)


def test_removing_the_last_dedicated_one_puts_its_role_back() -> None:
    nodes = node("a", "proxy", "web"), node("b", "php")
    assert assigned({"proxy": 1, "php": 0, "web": 0}, *nodes) == ({"a": "php proxy web"}, 0)


def test_the_last_ones_made_leave_first() -> None:
    nodes = node("a", "proxy", "web"), node("b", "php"), node("c", "php"), node("d", "php")
    assert assigned({"proxy": 1, "php": 2}, *nodes) == ({"a": "proxy web", "b": "php", "c": "php"}, 0)


def test_a_node_that_is_no_longer_needed_for_one_role_takes_another_that_is_open() -> None:
    nodes = node("a", "proxy", "php"), node("b", "web")
    assert assigned({"proxy": 1, "php": 1}, *nodes) == ({"a": "proxy web", "b": "php"}, 0)


def test_without_its_only_proxy_another_node_becomes_one() -> None:
    nodes = node("b", "php"), node("c", "web"), node("d", "web")
    assert assigned({"proxy": 1, "php": 1, "web": 2}, *nodes) == ({"b": "php", "c": "proxy", "d": "web"}, 1)
    assert assigned({"proxy": 1, "php": 1}, node("b", "php")) == ({"b": "php proxy web"}, 1)


def test_a_free_node_replaces_a_lost_proxy() -> None:
    nodes = node("b", "php"), node("e")
    assert assigned({"proxy": 1, "php": 1}, *nodes) == ({"b": "php", "e": "proxy web"}, 0)


def test_nothing_wanted_is_nobody_and_nothing() -> None:
    assert planner.assign({"proxy": 0}, [node("a", "proxy")]).roles == {}
    assert assigned({"proxy": 1}) == ({}, 1)


@given(
    st.fixed_dictionaries({"proxy": st.integers(1, 3), "php": st.integers(0, 3), "web": st.integers(0, 3)}),
    st.lists(st.sets(st.sampled_from(["proxy", "php", "web"])), min_size=1, max_size=8),
)
def test_whoever_is_left_no_role_is_without_somebody(wanted: Mapping[str, int], held: list[set[str]]) -> None:
    nodes = [node(f"{number}", *roles) for number, roles in enumerate(held)]
    roles = planner.assign(wanted, nodes).roles
    assert {"proxy", "php", "web"} <= {role for some in roles.values() for role in some}


# -- in which order -------------------------------------------------------------------------------------------------


def test_a_start_goes_from_providers_to_consumers() -> None:
    assert story(situation({"proxy": 1}, node("a"))) == [["manager.sessions"], ["a.php", "a.web"], ["a.proxy"]]


def test_on_the_way_down_the_proxies_let_go_first() -> None:
    old = node("a", "proxy"), node("leaving-b", "php"), node("leaving-c", "web", "proxy")
    assert story(situation({"proxy": 1}, *old)) == [
        ["manager.sessions"],
        ["a.php", "a.web"],
        ["a.proxy"],
        ["!leaving-c.proxy"],
        ["!leaving-b.php", "!leaving-c.web"],
    ]


def test_new_code_is_on_all_nodes_before_the_first_one_switches() -> None:
    nodes = node("a", "proxy", "web"), node("b", "php"), node("c")
    plan = situation({"proxy": 1, "php": 2}, *nodes, code=version("b"), previous=version("a"))
    assert story(plan) == [
        ["manager.sessions"],
        ["~a.proxy", "~a.web", "~b.php"],
        ["a.web", "b.php", "c.php"],
        ["a.proxy"],
    ]
    configs: dict[tuple[str, str], Any] = {
        (step.node, step.role): step.config for stage in planner.stages(plan) for step in stage
    }
    assert configs["b", "php"].code == "b" * 64
    assert configs["b", "php"].previous == "a" * 64
    assert configs["a", "proxy"].php == {"b": "127.0.1.98", "c": "127.0.1.99"}


def test_sessions_come_from_the_manager_before_until_every_back_end_knows_the_new_place() -> None:
    moving = replace(situation({"proxy": 1}, node("a")), predecessor="127.0.0.8")

    assert story(moving) == [["manager.sessions"], ["a.php", "a.web"], ["manager.sessions"], ["a.proxy"]]
    configs = [step.config for stage in planner.stages(moving) for step in stage]
    assert [one.source for one in configs if isinstance(one, SessionsConfig)] == ["127.0.0.8", ""]


def test_stopping_ends_every_role_and_the_sessions_last() -> None:
    assert story(situation({}, node("leaving-a", "proxy", "php", "web"))) == [
        ["!leaving-a.proxy"],
        ["!leaving-a.php", "!leaving-a.web"],
        ["!manager.sessions"],
    ]


def test_settings_reach_the_roles() -> None:
    settings = {"max_execution_time": 300, "memory_limit": "1G", "upload_max_filesize": "64M", "document_root": "/pub/"}
    steps = [step for stage in planner.stages(situation({"proxy": 1}, node("a"), settings=settings)) for step in stage]
    configs: dict[str, Any] = {step.role: step.config for step in steps}
    assert (configs["php"].memory_limit, configs["php"].document_root) == ("1024M", "pub")
    assert configs["php"].sessions == "127.0.0.9"
    assert configs["php"].sessions_password.get_secret_value() == "secret of sessions"
    assert (configs["proxy"].timeout_s, configs["proxy"].max_body_bytes) == (330, 65 << 20)


def test_users_look_at_the_first_proxy() -> None:
    nodes = node("a", "proxy"), node("b", "proxy")
    assert planner.urls(situation({"proxy": 2}, *nodes)) == {"application": "http://127.0.1.97:8080/"}
    assert planner.urls(situation({})) == {}


def test_the_summary_adds_up_the_proxies() -> None:
    metrics = {
        "a": {"request_rate": 30.0, "error_rate": 1.0, "throughput": 10.0, "response_p50": 10.0, "response_p95": 20.0},
        "b": {"request_rate": 10.0, "error_rate": 0.0, "throughput": 5.0, "response_p50": 50.0, "response_p95": 90.0},
        "c": {"php_request_rate": 40.0, "php_queue": 2.0},
    }
    total = planner.summary(metrics)
    assert (total["request_rate"], total["error_rate"], total["throughput"]) == (40.0, 1.0, 15.0)
    assert (total["response_p50"], total["response_p95"], total["php_queue"]) == (20.0, 90.0, 2.0)
    assert planner.summary({"c": metrics["c"]}) == {}
    assert planner.facts(situation({"proxy": 1}, node("a")), metrics)["Requests"] == "40/s"


# -- what cannot be wanted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"proxy": 0}, "at least 1 'proxy'"),
        ({}, "at least 1 'proxy'"),
        ({"proxy": 1, "web": -1}, "cannot remove"),
        ({"proxy": 1, "php": 10**9}, "too many"),
        ({"proxy": 1, "sessions": 2}, "fixed"),
        ({"proxy": 1, "mysql": 1}, "no role 'mysql'"),
    ],
)
def test_impossible_roles_are_refused(roles: dict[str, int], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        planner.check(Wanted(), Wanted(running=True, roles=roles))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("php_version", "5.3"),
        ("max_execution_time", 0),
        ("max_execution_time", 3601),
        ("memory_limit", "1M"),
        ("memory_limit", "lots"),
        ("upload_max_filesize", "2G"),
        ("document_root", "../etc"),
        ("document_root", 'a"; evil'),
        ("document_root", "a\nb"),
        ("front_controller", "maybe"),
        ("no_such_setting", 1),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadInputError, match=name):
        planner.check(Wanted(), Wanted(running=True, roles={"proxy": 1}, settings={name: value}))


def test_sizes_are_kept_in_the_form_that_php_reads() -> None:
    assert PhpSettings(memory_limit="0.5g").memory_limit == "512M"
    assert PhpSettings(upload_max_filesize="1 KiB").upload_max_filesize == "1024"
