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

Kind = Literal["select", "switch", "integer", "number", "text", "long", "secret", "key", "list", "pairs", "json"]
"""`key`: a secret in several lines. `list`: a value a line. `pairs`: a `name = value` a line."""
_SECRET = frozenset({"secret", "key"})
_PLAIN = frozenset({"string", "integer", "number", "boolean"})
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

    @property
    def secret(self) -> bool:
        """Whether it is never shown."""
        return self.kind in _SECRET


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
        part = _resolve(schema["properties"][line.name], schema)
        text = form.get(line.name)
        if line.kind == "switch":
            found[line.name] = text is not None
        elif text is None or (text == "" and not _may_be_empty(line, part)):
            continue
        else:
            found[line.name] = _typed(line, str(text), part, schema)
    return found


def differing(schema: Json, values: Mapping[str, Any]) -> Json:
    """Return the values that are not what they would be anyhow: those that differ from their defaults."""
    parts = schema.get("properties", {})
    return {name: value for name, value in values.items() if name not in parts or value != _default(parts[name])}


def _default(part: Json) -> Any:
    default = part.get("default", {} if part.get("type") == "object" else None)
    return float(default) if isinstance(default, str) and _kind(_resolve(part, {})) == "number" else default


def _may_be_empty(line: Field, part: Json) -> bool:
    """Tell whether an empty field is a value: text, and lists that are something else by default."""
    if line.kind in {"text", "long"}:
        return part.get("default", "") is not None
    if line.kind in {"list", "pairs"}:
        return bool(_default(part))
    return line.required and not line.secret


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
        if {choice.get("type") for choice in choices} == {"number", "string"}:  # how decimals are sent
            choices = [choice for choice in choices if choice["type"] == "number"]
        if len(choices) == 1:
            rest = {key: value for key, value in part.items() if key != word}
            return {**_resolve(choices[0], schema), **rest}
    return part


def _field(name: str, part: Json, value: Any, schema: Json) -> Field:
    kind = _kind(part)
    return Field(
        name=name,
        label=_label(name, part),
        kind=kind,
        value="" if kind in _SECRET else _show(value, kind),
        help=" ".join(str(part.get("description", "")).split("\n\n")[0].split()),
        unit=str(part.get("unit", "")),
        options=_options(part, value),
        required=name in schema.get("required", ()),
        attributes=_bounds(part),
    )


def _label(name: str, part: Json) -> str:
    """Return a title that somebody wrote, or the name as words."""
    made = name.replace("_", " ").title()
    title = str(part.get("title", made))
    if title != made:
        return title
    words = [_ACRONYMS.get(word, word) for word in name.split("_")]
    unit = _UNITS.get(words[-1], "") if len(words) > 1 else ""
    text = " ".join(words[:-1] if unit else words)
    return f"{text[:1].upper()}{text[1:]}{f' ({unit})' if unit else ''}"


_ACRONYMS = {word.lower(): word for word in ("CA", "SSH", "UID", "URL")}
_UNITS = {"s": "seconds", "mib": "MiB", "gib": "GiB", "bytes": "bytes"}
"""What a name ends with that carries its unit."""


def _kind(part: Json) -> Kind:
    if "enum" in part or "const" in part or "examples" in part:
        return "select"
    if part.get("format") == "password":
        return "key" if "contentMediaType" in part else "secret"
    if part.get("type") == "string":
        return "long" if part.get("maxLength", 0) > 1000 else "text"
    if part.get("type") == "array" and _is_plain(part.get("items", {})):
        return "list"
    if part.get("type") == "object" and _is_plain(part.get("additionalProperties")):
        return "pairs"
    kinds: dict[Any, Kind] = {"boolean": "switch", "integer": "integer", "number": "number"}
    return kinds.get(part.get("type"), "json")


def _is_plain(part: Any) -> bool:
    """Tell whether values are simple enough to be written in one line."""
    if not isinstance(part, dict):
        return False
    return part.get("type") in _PLAIN or (bool(part.get("anyOf")) and all(map(_is_plain, part["anyOf"])))


def _options(part: Json, value: Any) -> tuple[str, ...]:
    """Return what a drop-down offers; a present value that is none of the examples is kept among them."""
    offered = list(part.get("enum") or ([part["const"]] if "const" in part else part.get("examples", ())))
    if offered and value is not None and value not in offered:
        offered.append(value)
    return tuple(_show(option, "text") for option in offered)


def _bounds(part: Json) -> dict[str, str]:
    names = {"minimum": "min", "maximum": "max", "maxLength": "maxlength", "minLength": "minlength"}
    found = {html: str(part[word]) for word, html in names.items() if word in part}
    if "pattern" in part:
        found["pattern"] = _for_browsers(str(part["pattern"]).removeprefix("^").removesuffix("$"))
    return found


def _for_browsers(pattern: str) -> str:
    """Return a pattern as browsers read it: within brackets they want `-` at an end, and some others, escaped."""
    return _BRACKETS.sub(lambda match: f"[{match[1]}{_ODD.sub(_ESCAPED, match[2])}]", pattern)


_BRACKETS = re.compile(r"\[(\^?)((?:\\.|[^\]\\])+)\]")
_ODD = re.compile(r"(?<!\\)(?:[/(){}|]|^-|-$)")
_ESCAPED = r"\\\g<0>"


def _show(value: Any, kind: Kind) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else ""
    if kind == "list":
        return "\n".join(str(item) for item in value)
    if kind == "pairs":
        return "\n".join(
            f"{name} = {item if isinstance(item, str) else json.dumps(item)}" for name, item in value.items()
        )
    return json.dumps(value, indent=2) if kind == "json" else str(value)


def _typed(line: Field, text: str, part: Json, schema: Json) -> Any:
    match line.kind:
        case "select":
            return _chosen(text, part)
        case "list":
            return [_one(line, item, part["items"], schema) for item in text.split("\n") if item.strip()]
        case "pairs":
            return dict(_pair(line, item, part, schema) for item in text.split("\n") if item.strip())
        case "integer" | "number" | "json":
            return _number(line, text)
        case _:
            return text.replace("\r\n", "\n")


def _chosen(text: str, part: Json) -> Any:
    return next((it for it in (*part.get("enum", ()), *part.get("examples", ())) if _show(it, "text") == text), text)


def _number(line: Field, text: str) -> Any:
    makers: dict[str, Callable[[str], Any]] = {"integer": int, "number": float, "json": json.loads}
    try:
        return makers[line.kind](text)
    except ValueError as exc:
        if line.kind == "json":  # there may be a secret somewhere in it
            raise BadInputError(f"{line.label}: this is not JSON: {exc}") from exc
        raise BadInputError(f"{line.label}: '{text[:40]}' is not a number", value=text) from exc


def _pair(line: Field, text: str, part: Json, schema: Json) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise BadInputError(f"{line.label}: '{text[:40].strip()}' is not 'name = value'", value=text)
    return name.strip(), _one(line, value, part["additionalProperties"], schema)


def _one(line: Field, text: str, part: Json, schema: Json) -> Any:
    """Return one value of a list; where several types will do, what reads as a number is one."""
    text, part = text.strip(), _resolve(part, schema)
    kinds = {(choice.get("type"), "format" in choice) for choice in part.get("anyOf", (part,))}
    if kinds <= {("string", False), ("string", True)}:
        return text
    try:
        return json.loads(text)
    except ValueError as exc:
        if "anyOf" in part:
            return text
        raise BadInputError(f"{line.label}: '{text[:40]}' is not of type {part['type']}", value=text) from exc
