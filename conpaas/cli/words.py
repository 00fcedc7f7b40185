"""What people write as ROLE=COUNT and KEY=VALUE, as data."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conpaas.core.errors import BadInputError
from conpaas.core.messages.model import Wanted

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


def nodes_on(wanted: Wanted, cloud: str | None) -> dict[str, int]:
    """Return how many nodes of each role are wanted on `cloud`, or on all clouds together."""
    elsewhere = {role: sum(wanted.places.get(role, {}).values()) for role in wanted.roles}
    if cloud is None:
        return dict(wanted.roles)
    if cloud == wanted.cloud:
        return {role: count - elsewhere[role] for role, count in wanted.roles.items()}
    return {role: wanted.places.get(role, {}).get(cloud, 0) for role in wanted.roles}


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
    check_keys(values, schema)
    properties = schema.get("properties", {})
    return {key: _typed(key, text, _resolve(properties[key], schema), schema) for key, text in values.items()}


def check_keys(keys: Iterable[str], schema: Mapping[str, Any]) -> None:
    """Raise BadInputError for a key that a JSON Schema of an object does not have."""
    properties = schema.get("properties", {})
    for key in keys:
        if key not in properties:
            raise BadInputError(f"there is no setting '{key}'", value=key, hint=f"there are: {', '.join(properties)}")


def like(text: str, present: Any) -> Any:
    """Return a value of the kind of the present one; what is not text is written as JSON."""
    if isinstance(present, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def is_secret(schema: Mapping[str, Any], key: str) -> bool:
    """Tell whether a property of a JSON Schema of an object is not to be seen."""
    return bool(_resolve(schema.get("properties", {}).get(key, {}), schema).get("writeOnly"))


def _typed(key: str, text: str, schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Any:
    kind = schema.get("type", "string")
    if kind == "string":
        return text
    if kind == "array" and not text.lstrip().startswith("["):
        items = _resolve(schema.get("items", {}), whole)
        return [_typed(key, part.strip(), items, whole) for part in text.split(",") if part.strip()]
    try:
        return json.loads(text)
    except ValueError as exc:
        how = "words with commas between them, or JSON" if kind == "array" else "written as JSON"
        said = "this" if kind in {"array", "object"} else f"'{text}'"  # there may be a secret somewhere in it
        raise BadInputError(f"{said} is not a value of {key}", value=key, hint=f"it is of type {kind}, {how}") from exc


def _resolve(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference, and see through `anyOf` with null, of a property."""
    if "$ref" in schema:
        return _resolve(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    choices = [choice for choice in schema.get("anyOf", schema.get("allOf", ())) if choice.get("type") != "null"]
    return _resolve(choices[0], whole) if choices else schema
