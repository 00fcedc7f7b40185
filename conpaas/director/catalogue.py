"""The service types there are, as the API shows them and as commands are checked against."""

import functools

from pydantic import ValidationError

from conpaas.core.errors import BadInputError, ConpaasError
from conpaas.core.messages import public
from conpaas.core.messages.model import Wanted
from conpaas.core.plugins import discover, load
from conpaas.core.rpc import bad_input
from conpaas.core.service import PACKAGE, Planner, Role, ServiceType


def kinds() -> dict[str, ServiceType]:
    """Return all service types by name."""
    return discover(PACKAGE, "SERVICE", ServiceType)


def kind_of(name: str) -> ServiceType:
    """Return a service type; raise BadInputError if there is none of that name."""
    found = kinds().get(name)
    if found is None:
        raise BadInputError(
            f"there is no service type '{name}'", value=name, hint=f"there are: {', '.join(sorted(kinds()))}"
        )
    return found


@functools.cache
def planner_of(name: str) -> Planner:
    """Return the planner of a service type."""
    planner: Planner = load(kind_of(name).planner)()
    return planner


def first_wanted(kind: ServiceType) -> Wanted:
    """Return what a new service wants: its type's defaults, not running."""
    return Wanted(
        roles={role.name: role.initial for role in kind.roles if role.scalable},
        settings=kind.settings().model_dump(mode="json", context={"reveal": True}),
    )


def checked(kind: ServiceType, before: Wanted, after: Wanted) -> Wanted:
    """Return `after` with its settings as their model has them; raise BadInputError if it cannot be wanted."""
    try:
        settings = kind.settings.model_validate(after.settings)
    except ValidationError as exc:
        raise bad_input(exc) from exc
    planner_of(kind.name).check(before, after)
    words = settings.model_dump(mode="json", context={"reveal": True})
    return after.model_copy(update={"settings": words})


@functools.cache
def service_types() -> public.ServiceTypes:
    """Show all service types; one that cannot be used says why."""
    return public.ServiceTypes(items=tuple(_view(kind) for _, kind in sorted(kinds().items())))


def _view(kind: ServiceType) -> public.ServiceTypeView:
    try:
        planner_of(kind.name)
        reason = ""
    except ConpaasError as exc:
        reason = exc.message
    return public.ServiceTypeView(
        name=kind.name,
        title=kind.title,
        description=kind.description,
        icon=kind.icon,
        roles=tuple(_role(role) for role in kind.roles),
        settings=kind.settings.model_json_schema(),
        commands=tuple(
            public.CommandView(name=command.name, title=command.title, arguments=command.arguments.model_json_schema())
            for command in kind.commands
        ),
        takes_code=kind.takes_code,
        enabled=not reason,
        reason=reason,
    )


def _role(role: Role) -> public.RoleView:
    return public.RoleView(
        name=role.name,
        title=role.title,
        description=role.description,
        minimum=role.minimum,
        maximum=role.maximum,
        initial=role.initial,
        scalable=role.scalable,
    )
