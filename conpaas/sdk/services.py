"""Applications and services: what there is, and changes of what is wanted."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from conpaas.core.errors import BadInputError, NotFoundError
from conpaas.core.messages import manager, public
from conpaas.core.messages.internal import StateHistory
from conpaas.core.messages.model import NodeView, OperationView, ServiceView, StateChange
from conpaas.core.messages.public import (
    ApplicationView,
    ChangeSettings,
    CloudView,
    CreateApplication,
    CreateService,
    Keyed,
    Move,
    Rename,
    Scale,
    Scripts,
    ServiceQuery,
    ServiceTypeView,
)
from conpaas.sdk.caller import new_key
from conpaas.sdk.operations import OperationCalls


class ApplicationCalls(OperationCalls):
    """The catalogue, and the caller's applications."""

    async def types(self) -> tuple[ServiceTypeView, ...]:
        """Return the service types that can be created here."""
        answer: public.ServiceTypes = await self._call(public.LIST_TYPES)
        return answer.items

    async def clouds(self) -> tuple[CloudView, ...]:
        """Return where services can run, with sizes and prices; a cloud that takes no instances says why."""
        answer: public.Clouds = await self._call(public.LIST_CLOUDS)
        return answer.items

    async def applications(self) -> tuple[ApplicationView, ...]:
        """Return the caller's applications."""
        answer: public.Applications = await self._call(public.LIST_APPLICATIONS)
        return answer.items

    async def create_application(self, name: str) -> ApplicationView:
        """Make an empty application."""
        answer: ApplicationView = await self._call(public.CREATE_APPLICATION, CreateApplication(name=name))
        return answer

    async def rename_application(self, application: str, name: str) -> ApplicationView:
        """Rename the application with this id."""
        answer: ApplicationView = await self._call(
            public.RENAME_APPLICATION, Rename(name=name), application=application
        )
        return answer

    async def delete_application(self, application: str) -> None:
        """Delete the application with this id; raise ConflictError while it has services."""
        await self._call(public.DELETE_APPLICATION, application=application)

    async def find_application(self, name_or_id: str) -> ApplicationView:
        """Return the one application of this id or name, as `find` does for services."""
        return _the_one(name_or_id, list(await self.applications()), "application", "conpaas app ls")


class ServiceCalls(OperationCalls):
    """The caller's services.

    Changes answer an operation at once; with `wait` they return when it is done, as `Conpaas.wait` does. With
    `generation` a change is made only if the service is still as it was seen (else StaleGenerationError). The
    same `key` names the same change, however often it is sent.
    """

    async def services(self, *, application: str | None = None) -> list[ServiceView]:
        """Return the caller's services, oldest first."""
        query = ServiceQuery(application=application)
        return [service async for service in self._pages(public.LIST_SERVICES, query)]

    async def service(self, service: str) -> ServiceView:
        """Return the service with this id."""
        answer: ServiceView = await self._call(public.GET_SERVICE, service=service)
        return answer

    async def find(self, name_or_id: str) -> ServiceView:
        """Return the one service of this id or name.

        Raises NotFoundError, or BadInputError when several have that name.
        """
        return _the_one(name_or_id, await self.services(), "service", "conpaas ls")

    async def create(
        self,
        *,
        type: str,  # noqa: A002  (it is what everybody calls it)
        name: str | None = None,
        cloud: str | None = None,
        fallback: Sequence[str] = (),
        size: str | None = None,
        application: str | None = None,
        key: str | None = None,
    ) -> ServiceView:
        """Create a service; its manager is made at once, all else when it is started.

        `size` is of its instances on `cloud`; the clouds of `fallback` take, in this order, what `cloud` refuses.
        """
        body = CreateService(
            type=type,
            name=name,
            cloud=cloud,
            fallback=tuple(fallback),
            size=size,
            application=application,
            key=new_key(key),
        )
        answer: ServiceView = await self._change(public.CREATE_SERVICE, body)
        return answer

    async def rename(self, service: str, name: str) -> ServiceView:
        """Rename a service."""
        answer: ServiceView = await self._call(public.RENAME_SERVICE, Rename(name=name), service=service)
        return answer

    async def start(
        self, service: str, *, wait: bool = False, generation: int | None = None, key: str | None = None
    ) -> OperationView:
        """Start a service."""
        answer = await self._change(public.START, Keyed(key=new_key(key)), generation=generation, service=service)
        return await self._done(answer, wait=wait)

    async def stop(
        self, service: str, *, wait: bool = False, generation: int | None = None, key: str | None = None
    ) -> OperationView:
        """Give back all instances but the manager."""
        answer = await self._change(public.STOP, Keyed(key=new_key(key)), generation=generation, service=service)
        return await self._done(answer, wait=wait)

    async def terminate(self, service: str, *, wait: bool = False) -> OperationView:
        """Destroy a service, with its code and data, and give back everything."""
        return await self._done(await self._call(public.TERMINATE, service=service), wait=wait)

    async def scale(
        self,
        service: str,
        roles: Mapping[str, int],
        *,
        cloud: str | None = None,
        wait: bool = False,
        generation: int | None = None,
        key: str | None = None,
    ) -> OperationView:
        """Add (`{"web": +2}`) or remove (`{"php": -1}`) nodes by role, on the service's own cloud or on `cloud`."""
        body = Scale(roles=dict(roles), cloud=cloud, key=new_key(key))
        answer = await self._change(public.SCALE, body, generation=generation, service=service)
        return await self._done(answer, wait=wait)

    async def move(
        self,
        service: str,
        *,
        cloud: str | None = None,
        fallback: Sequence[str] | None = None,
        sizes: Mapping[str, str] | None = None,
        wait: bool = False,
        generation: int | None = None,
        key: str | None = None,
    ) -> OperationView:
        """Move a service to `cloud` while it runs, or to other machines: `sizes` by cloud, all that are wanted.

        New instances take over when all of them answer; only then those before are given back. What is None stays.
        """
        body = Move(
            cloud=cloud,
            fallback=None if fallback is None else tuple(fallback),
            sizes=None if sizes is None else dict(sizes),
            key=new_key(key),
        )
        answer = await self._change(public.MOVE, body, generation=generation, service=service)
        return await self._done(answer, wait=wait)

    async def change_settings(
        self,
        service: str,
        settings: Mapping[str, Any],
        *,
        wait: bool = False,
        generation: int | None = None,
        key: str | None = None,
    ) -> OperationView:
        """Change the given settings; the others stay."""
        body = ChangeSettings(settings=dict(settings), key=new_key(key))
        answer = await self._change(public.CHANGE_SETTINGS, body, generation=generation, service=service)
        return await self._done(answer, wait=wait)

    async def change_scripts(
        self,
        service: str,
        *,
        start: str = "",
        stop: str = "",
        wait: bool = False,
        generation: int | None = None,
        key: str | None = None,
    ) -> OperationView:
        """Replace the scripts that run when an instance starts and before it stops."""
        body = Scripts(start=start, stop=stop, key=new_key(key))
        answer = await self._change(public.CHANGE_SCRIPTS, body, generation=generation, service=service)
        return await self._done(answer, wait=wait)

    async def nodes(self, service: str) -> tuple[NodeView, ...]:
        """Return the nodes of a service, its manager's instance included."""
        answer: manager.Nodes = await self._call(public.GET_NODES, service=service)
        return answer.nodes

    async def states(self, service: str) -> tuple[StateChange, ...]:
        """Return the state history of a service, oldest first."""
        answer: StateHistory = await self._call(public.GET_STATES, service=service)
        return answer.changes

    async def command(self, service: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run a command of the service's own type."""
        body = manager.CommandBody(arguments=dict(arguments))
        answer: manager.CommandAnswer = await self._call(public.RUN_COMMAND, body, service=service, name=name)
        return answer.result


class _Named(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...


ThingT = TypeVar("ThingT", bound=_Named)


def _the_one(name_or_id: str, things: list[ThingT], noun: str, how: str) -> ThingT:
    """Return the thing whose id, or else whose name, is the given one."""
    found = [thing for thing in things if thing.id == name_or_id]
    found = found or [thing for thing in things if thing.name == name_or_id]
    if not found:
        raise NotFoundError(f"you have no {noun} '{name_or_id}'", value=name_or_id, hint=f"'{how}' shows yours")
    if len(found) > 1:
        named = ", ".join(thing.id for thing in found)
        raise BadInputError(
            f"{len(found)} {noun}s are called '{name_or_id}'",
            value=name_or_id,
            hint=f"say which by its id: {named}",
        )
    return found[0]
