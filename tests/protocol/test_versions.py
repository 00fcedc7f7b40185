"""Versions n and n-1 of the daemons understand each other, both ways, while a deployment is upgraded node by node.

What the previous version writes is kept as examples, what it takes as schemas: see `release.py`. A peer drops fields
that it does not know (`from_peer`), so that a field may be added that has a default; it cannot do without a field that
it requires, nor make sense of a value that it has never heard of.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from conpaas.core.messages.base import Json, from_peer
from tests.protocol import examples
from tests.protocol.release import PREVIOUS, SCHEMAS

MESSAGES = examples.messages()
EXAMPLES = sorted(path for path in PREVIOUS.glob("*.json") if path != SCHEMAS)
SCHEMA: dict[str, Json] = json.loads(SCHEMAS.read_text(encoding="utf-8"))
BETWEEN_DAEMONS = ("agent.", "internal.", "manager.", "model.")
SHARED = sorted(name for name in set(SCHEMA) & set(MESSAGES) if name.startswith(BETWEEN_DAEMONS))
GONE: frozenset[str] = frozenset()
"""Messages that the previous version still sends and that nobody reads any more."""
NEW_VALUES: frozenset[str] = frozenset()
"""`Enum.VALUE` that is sent only to peers that have shown themselves to be of this version."""


def as_a_previous_reader(schema: Any) -> Any:
    """Return a schema as `from_peer` reads by it: unknown fields are dropped."""
    if isinstance(schema, dict):
        return {key: as_a_previous_reader(value) for key, value in schema.items() if key != "additionalProperties"}
    if isinstance(schema, list):
        return [as_a_previous_reader(item) for item in schema]
    return schema


def enums(schema: Json) -> Iterator[tuple[str, frozenset[Any]]]:
    for name, kind in schema.get("$defs", {}).items():
        if "enum" in kind:
            yield name, frozenset(kind["enum"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_what_the_previous_version_writes_is_read_today(path: Path) -> None:
    if path.stem in GONE:
        return
    assert path.stem in MESSAGES, f"the previous version still sends {path.stem}: keep it, or name it in GONE"
    kind = MESSAGES[path.stem]

    assert isinstance(from_peer(kind, path.read_text(encoding="utf-8")), kind)


@pytest.mark.parametrize("name", SHARED)
def test_what_is_written_today_is_read_by_the_previous_version(name: str) -> None:
    wire = json.loads(examples.wire(examples.example(MESSAGES[name])))

    jsonschema.Draft202012Validator(as_a_previous_reader(SCHEMA[name])).validate(wire)


@pytest.mark.parametrize("name", SHARED)
def test_no_value_is_sent_that_the_previous_version_has_never_heard_of(name: str) -> None:
    before = dict(enums(SCHEMA[name]))
    for enum, values in enums(MESSAGES[name].model_json_schema()):
        new = {f"{enum}.{value}" for value in values - before.get(enum, values)}
        assert new <= NEW_VALUES, "send them only to peers of this version, and name them in NEW_VALUES"


def test_there_is_a_previous_version() -> None:
    assert len(SHARED) > 30
    assert {path.stem for path in EXAMPLES} == set(SCHEMA)


def test_a_field_that_the_previous_version_requires_cannot_be_left_out() -> None:
    validator = jsonschema.Draft202012Validator(as_a_previous_reader(SCHEMA["agent.AgentStatus"]))
    wire = json.loads((PREVIOUS / "agent.AgentStatus.json").read_text(encoding="utf-8"))

    assert not list(validator.iter_errors({**wire, "a field of ours": 1}))
    del wire["version"]
    assert [error.message for error in validator.iter_errors(wire)] == ["'version' is a required property"]
