"""Forms out of JSON Schema, and what people wrote in them back into values.

Bounds and patterns are checked by the browser for comfort and by the director for good; here only types are made.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Json

Kind = Literal["select", "switch", "integer", "number", "text", "long", "secret", "json"]
_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")


@dataclass(frozen=True)
class Field:
    """One line of a form."""

    name: str
    label: str
    kind: Kind
    value: str
    help: str = ""
    unit: str = ""
    options: tuple[str, ...] = ()
    required: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    """HTML attributes that hold the bounds: `min`, `max`, `maxlength`, `pattern`."""


def fields(schema: Json, values: Mapping[str, Any] | None = None) -> list[Field]:
    """Return the form of an object's schema, filled with `values` or else with defaults."""
    given = values or {}
    return [
        _field(name, _resolve(part, schema), given.get(name, part.get("default")), schema)
        for name, part in schema.get("properties", {}).items()
    ]


def read(schema: Json, form: Mapping[str, Any]) -> Json:
    """Return the values of a sent form, typed as the schema says; raise BadInputError for what is no such value.

    A switch that is off is not sent at all, as browsers do; an empty optional field is left out.
    """
    found: Json = {}
    for line in fields(schema):
        text = form.get(line.name)
        if line.kind == "switch":
            found[line.name] = text is not None
        elif text is None or (text == "" and not line.required and line.kind != "text"):
            continue
        else:
            found[line.name] = _typed(line, str(text), _resolve(schema["properties"][line.name], schema))
    return found


def read_changes(form: Mapping[str, Any], roles: Sequence[str]) -> dict[str, int]:
    """Return the nodes to add or remove by role: `+2`, `2` or `-1`; raise BadInputError for anything else."""
    changes: dict[str, int] = {}
    for role in roles:
        text = str(form.get(role, "")).strip()
        if not text:
            continue
        if not _WHOLE.fullmatch(text):
            raise BadInputError(
                f"'{text[:40]}' is not a number of instances",
                value=text,
                hint="write +1 to add one, -2 to remove two",
            )
        if int(text) == 0:
            raise BadInputError(f"'{text}' changes nothing", value=text, hint="write +1 or more, -1 or less")
        changes[role] = int(text)
    if not changes:
        raise BadInputError("no change was asked for", hint="choose a role and say how many instances")
    return changes


def _resolve(part: Json, schema: Json) -> Json:
    """Follow a `$ref`, and take the one alternative that is not null."""
    if "$ref" in part:
        name = part["$ref"].rsplit("/", 1)[-1]
        return {**schema.get("$defs", {}).get(name, {}), **{k: v for k, v in part.items() if k != "$ref"}}
    for word in ("anyOf", "allOf"):
        choices = [choice for choice in part.get(word, ()) if choice.get("type") != "null"]
        if len(choices) == 1:
            rest = {key: value for key, value in part.items() if key != word}
            return {**_resolve(choices[0], schema), **rest}
    return part


def _field(name: str, part: Json, value: Any, schema: Json) -> Field:
    kind = _kind(part)
    return Field(
        name=name,
        label=str(part.get("title") or name.replace("_", " ").capitalize()),
        kind=kind,
        value=_show(value),
        help=" ".join(str(part.get("description", "")).split("\n\n")[0].split()),
        unit=str(part.get("unit", "")),
        options=_options(part, value),
        required=name in schema.get("required", ()),
        attributes=_bounds(part),
    )


def _kind(part: Json) -> Kind:
    if "enum" in part or "const" in part or "examples" in part:
        return "select"
    if part.get("format") == "password":
        return "secret"
    if part.get("type") == "string":
        return "long" if part.get("maxLength", 0) > 1000 else "text"
    kinds: dict[Any, Kind] = {"boolean": "switch", "integer": "integer", "number": "number"}
    return kinds.get(part.get("type"), "json")


def _options(part: Json, value: Any) -> tuple[str, ...]:
    """Return what a drop-down offers; a present value that is none of the examples is kept among them."""
    offered = list(part.get("enum") or ([part["const"]] if "const" in part else part.get("examples", ())))
    if offered and value is not None and value not in offered:
        offered.append(value)
    return tuple(_show(option) for option in offered)


def _bounds(part: Json) -> dict[str, str]:
    names = {"minimum": "min", "maximum": "max", "maxLength": "maxlength", "minLength": "minlength"}
    found = {html: str(part[word]) for word, html in names.items() if word in part}
    if "pattern" in part:
        found["pattern"] = str(part["pattern"]).removeprefix("^").removesuffix("$")
    return found


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else ""
    return str(value)


def _typed(line: Field, text: str, part: Json) -> Any:
    if line.kind == "select":
        for option in (*part.get("enum", ()), *part.get("examples", ())):
            if _show(option) == text:
                return option
    makers: dict[str, Callable[[str], Any]] = {"integer": int, "number": float, "json": json.loads}
    try:
        return makers.get(line.kind, str)(text)
    except ValueError as exc:
        what = "JSON" if line.kind == "json" else "a number"
        raise BadInputError(f"{line.label}: '{text[:40]}' is not {what}", value=text) from exc
