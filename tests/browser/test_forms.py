"""Forms out of schemas, and back; the picture of a service; instances by role."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Message, Secret
from conpaas.core.messages.public import RoleView
from conpaas.core.states import NodeState
from conpaas.web import forms, picture
from conpaas.web.views.service import groups
from tests.browser.fake_api import node

ROLES = tuple(RoleView(name=name, title=name) for name in ("proxy", "web", "php"))


class Everything(Message):
    """One field of each kind."""

    version: Literal["8.2", "8.3"] = "8.2"
    limit: int = Field(
        default=30, ge=1, le=300, title="Time limit", json_schema_extra={"examples": [30, 60], "unit": "seconds"}
    )
    ratio: float = Field(default=0.5, ge=0)
    count: int | None = None
    on: bool = False
    label: str = Field(default="", max_length=20, pattern="^[a-z]*$")
    """Words.

    More words.
    """
    extra: dict[str, int] = Field(default_factory=dict)


SCHEMA = Everything.model_json_schema()


def test_names_of_settings_become_words_with_their_units() -> None:
    names = ("max_instances", "memory_mib", "stop_s", "uid_base", "ca_file", "director_url", "s")
    lines = forms.fields({"properties": {name: {"type": "integer"} for name in names}})
    assert [line.label for line in lines] == [
        "Max instances",
        "Memory (MiB)",
        "Stop (seconds)",
        "UID base",
        "CA file",
        "Director URL",
        "S",
    ]


def test_each_kind_of_value_has_its_kind_of_field() -> None:
    lines = {line.name: line for line in forms.fields(SCHEMA, {"limit": 45})}
    assert {name: line.kind for name, line in lines.items()} == {
        "version": "select",
        "limit": "select",
        "ratio": "number",
        "count": "integer",
        "on": "switch",
        "label": "text",
        "extra": "pairs",
    }
    assert lines["version"].options == ("8.2", "8.3")
    assert lines["limit"].options == ("30", "60", "45")
    assert lines["limit"].label == "Time limit"
    assert lines["limit"].unit == "seconds"
    assert lines["label"].help == "Words."
    assert lines["label"].attributes == {"maxlength": "20", "pattern": "[a-z]*"}


def test_a_sent_form_becomes_typed_values() -> None:
    sent = {
        "version": "8.3",
        "limit": "60",
        "ratio": "1.5",
        "count": "",
        "on": "true",
        "label": "",
        "extra": "a = 1\r\n\r\nb=2",
    }
    assert forms.read(SCHEMA, sent) == {
        "version": "8.3",
        "limit": 60,
        "ratio": 1.5,
        "on": True,
        "label": "",
        "extra": {"a": 1, "b": 2},
    }
    assert forms.read(SCHEMA, {}) == {"on": False}


@pytest.mark.parametrize(("name", "text"), [("ratio", "abc"), ("count", "1.5"), ("extra", "{")])
def test_what_is_no_such_value_is_refused_with_its_label(name: str, text: str) -> None:
    with pytest.raises(BadInputError, match=f"(?i){name}"):
        forms.read(SCHEMA, {name: text})


class Account(Message):
    """What cloud accounts have besides."""

    secret: Secret
    key: Secret | None = Field(default=None, json_schema_extra={"contentMediaType": "application/x-pem-file"})
    file: Path | None = None
    sizes: tuple[str, ...] = ("small",)
    numbers: tuple[int, ...] = ()
    bid: Decimal | None = None
    price: Decimal = Decimal(0)
    hosts: tuple[dict[str, str], ...] = ()
    name: str = Field(default="", pattern="^[a-z/][a-z-]*$")


ACCOUNT = Account.model_json_schema()


def test_secrets_are_never_shown_and_lists_have_a_line_for_each_value() -> None:
    given = {"secret": "hush", "key": "hush", "sizes": ["a", "b"], "hosts": [{"a": "b"}]}
    lines = {line.name: line for line in forms.fields(ACCOUNT, given)}
    assert [(line.kind, line.value) for line in (lines["secret"], lines["key"])] == [("secret", ""), ("key", "")]
    assert (lines["sizes"].kind, lines["sizes"].value) == ("list", "a\nb")
    assert [lines[name].kind for name in ("bid", "price", "numbers", "hosts")] == ["number", "number", "list", "json"]
    assert json.loads(lines["hosts"].value) == given["hosts"]
    assert lines["name"].attributes["pattern"] == r"[a-z\/][a-z\-]*"  # as the browsers' `v` flag wants it


def test_what_is_left_as_it_would_be_anyhow_is_not_sent() -> None:
    same = {"secret": "", "key": "", "file": "", "sizes": "small", "numbers": "", "bid": "", "price": "0", "name": ""}
    assert forms.differing(ACCOUNT, forms.read(ACCOUNT, same)) == {}
    other = {"secret": "a", "key": "b\r\nc", "file": "/k", "sizes": "", "numbers": "1\r\n2", "price": "0.5"}
    assert forms.differing(ACCOUNT, forms.read(ACCOUNT, other)) == {
        "secret": "a",
        "key": "b\nc",
        "file": "/k",
        "sizes": [],
        "numbers": [1, 2],
        "price": 0.5,
    }


def test_what_is_not_json_is_not_repeated_for_there_may_be_secrets_in_it() -> None:
    with pytest.raises(BadInputError) as refused:
        forms.read(ACCOUNT, {"hosts": '[{"key": "hush"'})
    assert "hush" not in json.dumps(refused.value.problem())


def test_changes_of_roles_are_signed_numbers() -> None:
    assert forms.read_changes({"web": "+2", "php": "-1", "proxy": ""}, ["web", "php", "proxy"]) == {"web": 2, "php": -1}


@pytest.mark.parametrize("word", ["+0", "-0", "abc", "1e3", "1000000000", "½", "+", "2 web"])
def test_a_change_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(BadInputError) as refused:
        forms.read_changes({"web": word}, ["web"])
    assert refused.value.value == word
    assert refused.value.hint


def test_no_change_at_all_is_refused() -> None:
    with pytest.raises(BadInputError, match="no change"):
        forms.read_changes({}, ["web"])


def test_instances_are_grouped_manager_first_then_by_role() -> None:
    nodes = (
        node(1, NodeState.SERVING, "php"),
        node(2, NodeState.SERVING, "sessions", kind="manager"),
        node(3, NodeState.SERVING, "web"),
        node(4, NodeState.BOOTING),
        node(5, NodeState.SERVING, "php", "proxy"),
        node(6, NodeState.SERVING, "web"),
        node(7, NodeState.GONE, "web"),
    )
    found = [(group.roles, [one.cloud_id for one in group.nodes]) for group in groups(ROLES, nodes)]
    assert found == [
        (("manager", "sessions"), ["2"]),
        (("proxy", "php"), ["5"]),
        (("web",), ["3", "6"]),
        (("php",), ["1"]),
        ((), ["4"]),
    ]


def test_nothing_is_drawn_of_a_service_that_has_only_a_manager() -> None:
    assert picture.draw(ROLES, (node(1, NodeState.SERVING, kind="manager"),)) is None


def test_a_shared_node_is_one_wide_box() -> None:
    plan = picture.draw(ROLES, (node(1, NodeState.SERVING, "proxy", "web", "php"),))
    assert plan is not None
    assert len(plan.boxes) == 1
    assert plan.boxes[0].hues == (0, 1, 2)
    assert len(plan.edges) == 1  # from the visitors


held = st.lists(st.sets(st.sampled_from([role.name for role in ROLES]), min_size=1), min_size=1, max_size=40)


@given(held, st.booleans())
def test_boxes_stay_in_the_picture_and_never_overlap(roles: list[set[str]], upright: bool) -> None:
    nodes = tuple(node(index, NodeState.SERVING, *sorted(names)) for index, names in enumerate(roles))
    plan = picture.draw(ROLES, nodes, upright=upright)
    assert plan is not None
    for box in plan.boxes:
        assert box.x >= 0
        assert box.y >= 0
        assert box.x + box.width <= plan.width
        assert box.y + box.height <= plan.height
    for index, one in enumerate(plan.boxes):
        for other in plan.boxes[index + 1 :]:
            apart = one.x + one.width <= other.x or other.x + other.width <= one.x
            assert apart or one.y + one.height <= other.y or other.y + other.height <= one.y
