"""What people write of a cloud account, as data: settings by the driver's schema, secrets, prices, limits."""

import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import click

from conpaas.cli import words
from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Json
from conpaas.core.messages.public import CloudOptions, CloudTypeView


def plain(given: Sequence[str], kind: CloudTypeView) -> Json:
    """Read `--set KEY=VALUE`, typed as the driver's schema says."""
    values = words.pairs(given)
    for key, text in values.items():
        if words.is_secret(kind.settings, key):
            raise BadInputError(f"'{key}' is a secret", value=key, hint=f"'--secret {key}' asks for it")
        if text.startswith("@") and kind.settings["properties"].get(key, {}).get("type") in {"array", "object"}:
            values[key] = _file(text[1:])
    return words.typed(values, kind.settings)


def secret(given: Sequence[str], kind: CloudTypeView) -> Json:
    """Read `--secret KEY`, `KEY=@FILE` or `KEY=-`."""
    found: Json = {}
    for word in given:
        key, _, source = word.partition("=")
        words.check_keys([key], kind.settings)
        if not words.is_secret(kind.settings, key):
            raise BadInputError(f"'{key}' is not a secret", value=key, hint=f"write '--set {key}=VALUE'")
        found[key] = _read(key, source)
    return found


def _read(key: str, source: str) -> str:
    if not source:
        return str(click.prompt(key, hide_input=True, err=True))
    if source == "-":
        text = sys.stdin.read()
    elif source.startswith("@"):
        text = _file(source[1:])
    else:
        raise BadInputError(
            f"a secret on the command line is no secret: {key}", value=key, hint=f"write {key}, {key}=@FILE or {key}=-"
        )
    return text.removesuffix("\n") if text.count("\n") == 1 else text  # a key in several lines stays as it is


def _file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise BadInputError(f"cannot read '{name}': {exc}", value=name, hint="name a text file") from exc


def ask_for(missing: Sequence[str], kind: CloudTypeView) -> Json:
    """Ask for the required settings that were not given, if they are secret; raise BadInputError for others."""
    properties = kind.settings.get("properties", {})
    plain = [key for key in missing if not words.is_secret(kind.settings, key)]
    if plain:
        said = " ".join(f"{key}: {' '.join(properties[key].get('description', '').split())}" for key in plain)
        settings = " ".join(f"--set {key}=…" for key in plain)
        raise BadInputError(f"{kind.title} needs more: {said}", value=plain[0], hint=f"write {settings}")
    return {key: _read(key, "") for key in missing}


def defaults(unset: Sequence[str], kind: CloudTypeView) -> Json:
    """Return what secrets become that are taken back: what is left out would stay. Others are just left out."""
    properties = kind.settings.get("properties", {})
    words.check_keys(unset, kind.settings)
    for key in unset:
        if key in kind.settings.get("required", ()):
            raise BadInputError(f"'{key}' cannot be unset: it is needed", value=key, hint=f"give another '{key}'")
    return {key: properties[key].get("default") for key in unset if words.is_secret(kind.settings, key)}


def changed(
    before: CloudOptions, prices: Sequence[str], rates: Sequence[str], given: Mapping[str, Any]
) -> CloudOptions:
    """Return the options of an account with those that were given."""
    update = {key: given[key] for key in ("title", "currency", "director_url") if given[key] is not None}
    for word, name in (("limit", "instances"), ("user_limit", "user_instances")):
        if given[word] is not None:
            update[name] = None if given[word] == "none" else given[word]
    update["prices"] = _amounts(before.prices, prices, "a price", "t3.small=0.02")
    update["rates"] = _amounts(before.rates, rates, "a number of calls per second", "create=0.5")
    return CloudOptions.model_validate({**dict(before), **update})


def _amounts(before: Mapping[Any, Any], given: Sequence[str], what: str, example: str) -> dict[str, Any]:
    """Return amounts by name with those that were given; one that is empty is taken back."""
    found = dict(before)
    for name, text in words.pairs(given).items():
        try:
            found[name] = Decimal(text) if text else None
        except InvalidOperation as exc:
            raise BadInputError(
                f"'{text}' is not {what} of {name}", value=text, hint=f"write an amount: {example}"
            ) from exc
    return {name: amount for name, amount in found.items() if amount is not None}
