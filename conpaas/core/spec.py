"""What commands make of a spec. Pure: `Wanted` in, `Wanted` out; checked by the planner where it is stored.

Used by the director for the public API and by managers for `managerc`.
"""

from collections.abc import Collection, Mapping, Sequence
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


def change_roles(wanted: Wanted, change: Mapping[str, int], cloud: str | None = None) -> Wanted:
    """Return what is wanted with `change` more (or fewer) nodes by role, on `cloud`; a change of zero is an error.

    Without a cloud they are added to the service's own; they are taken from there first, then from the others.
    """
    if not wanted.running:
        raise ConflictError("nodes are added to and removed from a running service", hint="start it first")
    if not change or not all(change.values()):
        raise BadInputError("say how many nodes, by role", value=dict(change), hint="for example web=+2 or php=-1")
    roles, places = dict(wanted.roles), {role: dict(counts) for role, counts in wanted.places.items()}
    for role, count in change.items():
        elsewhere = places.setdefault(role, {})
        if cloud is not None and cloud != wanted.cloud:
            have = elsewhere[cloud] = elsewhere.get(cloud, 0) + count
        elif count < 0 and cloud is None:
            have = roles.get(role, 0) + count
        else:
            have = roles.get(role, 0) - sum(elsewhere.values()) + count
        if have < 0:
            raise BadInputError(
                f"cannot remove {-count} '{role}' nodes{f' on {cloud}' if cloud else ''}: there are {have - count}",
                value=count,
                hint="look at the nodes and where they are",
            )
        roles[role] = roles.get(role, 0) + count
    return wanted.model_copy(update={"roles": roles, "places": _fitting(places, roles)})


def _fitting(places: Mapping[str, Mapping[str, int]], roles: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the places of as many nodes as there are to be, those on clouds that were named last given up first."""
    fitting = {}
    for role, counts in places.items():
        room, kept = roles.get(role, 0), {}
        for cloud, count in counts.items():
            kept[cloud] = min(count, room)
            room -= kept[cloud]
        kept = {cloud: count for cloud, count in kept.items() if count}
        if kept:
            fitting[role] = kept
    return fitting


def move(wanted: Wanted, cloud: str | None, fallback: Sequence[str] | None, sizes: Mapping[str, str] | None) -> Wanted:
    """Return what is wanted with all nodes on `cloud`, if one is given, and with another fallback or other sizes."""
    update: dict[str, Any] = {}
    if cloud is not None:
        update |= {"cloud": cloud, "places": {}}
    if fallback is not None:
        update["fallback"] = tuple(name for name in dict.fromkeys(fallback) if name != (cloud or wanted.cloud))
    if sizes is not None:
        update["sizes"] = dict(sizes)
    if not update:
        raise BadInputError("say where to, or what else is to change", hint="for example a cloud")
    return wanted.model_copy(update=update)


def configure(wanted: Wanted, settings: Mapping[str, Any], code: str | None, known_code: Collection[str]) -> Wanted:
    """Return what is wanted with these settings changed and, if given, this code version active."""
    update: dict[str, Any] = {"settings": {**wanted.settings, **settings}}
    if code is not None:
        if code not in known_code:
            raise BadInputError(f"there is no code version '{code}'", value=code, hint="list them first")
        update["code"] = code
    return wanted.model_copy(update=update)
