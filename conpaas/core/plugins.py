"""Plug-ins are found by looking: a folder or a file that exports one constant. Nothing lists them."""

import functools
import importlib
import importlib.metadata
import pkgutil
from typing import Any, TypeVar

from conpaas.core.errors import NotFoundError

T = TypeVar("T")


@functools.cache
def _discover(package: str, constant: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if info.name.removeprefix(f"{package}.").startswith("_"):
            continue  # a part of a plug-in, perhaps a heavy one
        value = getattr(importlib.import_module(info.name), constant, None)
        if value is not None:
            found[value.name] = value
    for entry in importlib.metadata.entry_points(group=package):
        value = entry.load()
        found[value.name] = value
    return found


def discover(package: str, constant: str, kind: type[T]) -> dict[str, T]:
    """Return by name every plug-in of `package`, its own modules' and those of outside entry points.

    Each public module of the package that has `constant` is one; an outside distribution registers the same object
    under an entry point group of the package's name.
    """
    found = _discover(package, constant)
    for name, value in found.items():
        if not isinstance(value, kind):
            raise TypeError(f"plug-in {name} of {package}: {constant} is no {kind.__name__}")
    return dict(found)


def load(reference: str) -> Any:
    """Import what a reference such as `conpaas.services.php.planner:PhpPlanner` names."""
    module, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise NotFoundError(f"no plug-in at {reference}: {exc}", value=reference) from exc
