"""What people write as ROLE=COUNT and KEY=VALUE, as data."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from conpaas.core.errors import BadInputError

_ROLE = re.compile(r"(?P<role>[a-z][a-z0-9-]{0,31})=(?P<sign>[+-]?)(?P<count>[0-9]{1,9})")
_ROLE_HINT = "write ROLE=+N to add, ROLE=-N to remove, ROLE=N for how many there shall be: web=+2 php=3"


def role_changes(words: Sequence[str], present: Mapping[str, int]) -> dict[str, int]:
    """Return how many nodes to add or remove by role; `web=3` is seen from `present`.

    Raises BadInputError for other words, a role named twice, and when nothing would change.
    """
    changes: dict[str, int] = {}
    for word in words:
        match = _ROLE.fullmatch(word)
        if match is None:
            raise BadInputError(f"'{word}' is not a change of roles", value=word, hint=_ROLE_HINT)
        role, count = match["role"], int(match["count"])
        if role in changes:
            raise BadInputError(f"the role '{role}' is named twice", value=word, hint=_ROLE_HINT)
        if match["sign"] and count == 0:
            raise BadInputError(f"'{word}' changes nothing", value=word, hint=_ROLE_HINT)
        changes[role] = int(f"{match['sign']}{count}") if match["sign"] else count - present.get(role, 0)
    changes = {role: change for role, change in changes.items() if change}
    if not changes:
        raise BadInputError("there are as many nodes as that already", value=" ".join(words), hint=_ROLE_HINT)
    return changes


def pairs(words: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE words by key; raise BadInputError for any other word."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or key in found:
            raise BadInputError(f"'{word}' is not a setting, or is named twice", value=word, hint="write KEY=VALUE")
        found[key] = value
    return found


def typed(values: Mapping[str, str], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as what a JSON Schema of an object says they are; raise BadInputError for an unknown key."""
    properties = schema.get("properties", {})
    for key in values:
        if key not in properties:
            raise BadInputError(f"there is no setting '{key}'", value=key, hint=f"there are: {', '.join(properties)}")
    return {key: _typed(key, text, _resolve(properties[key], schema)) for key, text in values.items()}


def like(text: str, present: Any) -> Any:
    """Return a value of the kind of the present one; what is not text is written as JSON."""
    if isinstance(present, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _typed(key: str, text: str, schema: Mapping[str, Any]) -> Any:
    if schema.get("type", "string") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError as exc:
        raise BadInputError(
            f"'{text}' is not a value of {key}", value=text, hint=f"it is of type {schema['type']}, written as JSON"
        ) from exc


def _resolve(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference, and see through `anyOf` with null, of a property."""
    if "$ref" in schema:
        return _resolve(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    choices = [choice for choice in schema.get("anyOf", schema.get("allOf", ())) if choice.get("type") != "null"]
    return _resolve(choices[0], whole) if choices else schema
