"""What commands make of a spec. Pure: `Wanted` in, `Wanted` out; checked by the planner where it is stored.

Used by the director for the public API and by managers for `managerc`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from conpaas.core.errors import BadInputError, ConflictError
from conpaas.core.messages.model import Wanted


def startup(wanted: Wanted) -> Wanted:
    """Return what is wanted when the service is started; ConflictError if it is already."""
    if wanted.running:
        raise ConflictError("the service is started already", hint="look at its status")
    return wanted.model_copy(update={"running": True})


def shutdown(wanted: Wanted) -> Wanted:
    """Return what is wanted when the service is stopped; fine in every state."""
    return wanted.model_copy(update={"running": False})


def change_roles(wanted: Wanted, change: Mapping[str, int]) -> Wanted:
    """Return what is wanted with `change` more (or fewer) nodes by role; a change of zero is an error."""
    if not wanted.running:
        raise ConflictError("nodes are added to and removed from a running service", hint="start it first")
    if not change or not all(change.values()):
        raise BadInputError("say how many nodes, by role", value=dict(change), hint="for example web=+2 or php=-1")
    roles = dict(wanted.roles)
    for role, count in change.items():
        roles[role] = roles.get(role, 0) + count
    return wanted.model_copy(update={"roles": roles})


def configure(wanted: Wanted, settings: Mapping[str, Any], code: str | None, known_code: Collection[str]) -> Wanted:
    """Return what is wanted with these settings changed and, if given, this code version active."""
    update: dict[str, Any] = {"settings": {**wanted.settings, **settings}}
    if code is not None:
        if code not in known_code:
            raise BadInputError(f"there is no code version '{code}'", value=code, hint="list them first")
        update["code"] = code
    return wanted.model_copy(update=update)
