"""One example of every message, made of nothing but its declaration: the same on every run and every machine.

A field is filled even if it has a default, so that the example shows all that can travel.
"""

import importlib
import types
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from conpaas.core.messages.base import Message

MODULES = ("model", "agent", "manager", "internal", "public")
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WORDS = ("web", "EUR", "someone@example.org", "a long enough password", "0123456789abcdef" * 4)


def messages() -> dict[str, type[Message]]:
    """Return every message of the protocol by `module.Class`."""
    found: dict[str, type[Message]] = {}
    for name in MODULES:
        module = importlib.import_module(f"conpaas.core.messages.{name}")
        for thing in vars(module).values():
            if isinstance(thing, type) and issubclass(thing, Message) and thing.__module__ == module.__name__:
                found[f"{name}.{thing.__name__}"] = thing
    return found


def example(kind: type[BaseModel]) -> Any:
    """Return an example of `kind`, every field filled."""
    return kind(**{name: _field(name, field) for name, field in kind.model_fields.items()})


def wire(message: Message) -> str:
    """Return a message as peers see it."""
    return message.model_dump_json(context={"reveal": True}, indent=2) + "\n"


def _field(name: str, field: FieldInfo) -> Any:
    annotation: Any = field.annotation
    for item in field.metadata:
        annotation = Annotated[annotation, item]
    return _value(name, annotation)


def _value(name: str, annotation: Any) -> Any:
    """Return the example of a type; `name` is the field's, and the text of a plain string."""
    bare, bounds = _bare(annotation)
    arguments = get_args(bare)
    match get_origin(bare):
        case origin if origin is Union or origin is types.UnionType:
            return _value(name, next(one for one in arguments if one is not type(None)))
        case origin if origin is Literal:
            return arguments[0]
        case origin if origin is tuple:
            return (_value(name, arguments[0]),)
        case origin if origin is dict:
            return {_value("key", arguments[0]): _value("value", arguments[1])}
    return _plain(name, bare, annotation, bounds)


def _plain(name: str, kind: Any, annotation: Any, bounds: list[Any]) -> Any:
    if kind is Any:
        return "anything"
    if kind is datetime:
        return WHEN
    if kind is bool:
        return True
    if kind in {int, float, Decimal}:
        return kind(_number(bounds))
    if kind in {str, SecretStr}:
        return _text(name, annotation)
    if issubclass(kind, Enum):
        return next(iter(kind))
    if issubclass(kind, BaseModel):
        return example(kind)
    raise TypeError(f"no example of {annotation}: teach tests/protocol/examples.py to make one")


def _bare(annotation: Any) -> tuple[Any, list[Any]]:
    """Take the `Annotated` off a type, however deep; return what was in it."""
    found: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        found += more
    return annotation, found


def _number(bounds: list[Any]) -> float:
    low = max((float(b.ge) for b in bounds if isinstance(b, Ge)), default=None)  # type: ignore[arg-type]
    if low is None and any(isinstance(b, Gt) for b in bounds):
        low = 1.0
    high = min((float(b.le) for b in bounds if isinstance(b, Le)), default=None)  # type: ignore[arg-type]
    if high is None and any(isinstance(b, Lt) for b in bounds):
        raise TypeError("no example of a number below a bound: use `le`")
    wish = 7.0
    if low is not None:
        wish = max(wish, low)
    return wish if high is None else min(wish, high)


def _text(name: str, annotation: Any) -> Any:
    """Return the first text that the type takes: the field's own name, or one of the words."""
    adapter = TypeAdapter(annotation)
    for word in (name, *WORDS):
        try:
            return adapter.validate_python(word)
        except ValidationError:
            continue
    raise TypeError(f"no text for {annotation}: add one to WORDS")
