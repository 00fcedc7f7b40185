"""Services: made, changed, cancelled. What is wanted of a service is changed here and nowhere else."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import ids, spec
from conpaas.core.clock import Clock
from conpaas.core.errors import (
    BadInputError,
    ConflictError,
    ConpaasError,
    NoCreditError,
    NotFoundError,
    StaleGenerationError,
)
from conpaas.core.messages import public
from conpaas.core.messages.internal import Gone, RequestInstances
from conpaas.core.messages.model import NodeView, OperationView, ServiceView, Wanted
from conpaas.core.service import ServiceType
from conpaas.core.states import NodeState, OperationState, ServiceState
from conpaas.core.tasks import Background
from conpaas.director import catalogue, lifecycle, views
from conpaas.director.clouds import Clouds
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import Application, CodeVersion, EventRow, Instance, Operation, Service, StateChangeRow
from conpaas.director.endings import Endings
from conpaas.director.events import record
from conpaas.director.ledger import Ledger, Wish, instance_of, service_of, user_of
from conpaas.director.managers import Managers
from conpaas.director.settings import DirectorSettings
from conpaas.director.vault import Vault

log = structlog.get_logger()

LAUNCH_S = 15.0
"""How long a manager waits for clouds to say yes to the nodes that it asks for, before it goes on to look for them."""
Edit = Callable[[Service, Wanted], Wanted]


class Services:
    """All services. Every command is one transaction; what follows from it is found by looking."""

    def __init__(
        self,
        db: Database,
        settings: DirectorSettings,
        clock: Clock,
        *,
        clouds: Clouds,
        ledger: Ledger,
        managers: Managers,
        code: CodeStore,
        vault: Vault,
        endings: Endings,
        background: Background,
    ) -> None:
        self._db, self._settings, self._clock = db, settings, clock
        self._clouds, self._ledger, self._managers, self._code = clouds, ledger, managers, code
        self._vault, self._endings, self._background = vault, endings, background

    # -- making -----------------------------------------------------------------------------------------------------

    async def create(self, user_id: str, form: public.CreateService, actor: str) -> ServiceView:
        """Make a service; its manager is asked for in the background.

        Raises BadInputError, ConflictError, NoCreditError and CloudRefusedError before anything is made.
        """
        kind = catalogue.kind_of(form.type)
        cloud = form.cloud or self._clouds.default
        fallback = tuple(name for name in dict.fromkeys(form.fallback) if name != cloud)
        sizes = {cloud: form.size} if form.size else {}
        place = Wanted(cloud=cloud, fallback=fallback, sizes=sizes)
        self._check_places(Wanted(), place)
        now = self._clock.now()
        async with self._db.write() as session:
            service = await self._created_before(session, user_id, form.key)
            if service is None:
                await self._check_room(session, user_id)
                application = await self._application(session, user_id, form.application)
                service = Service(
                    id=ids.new("svc"),
                    user_id=user_id,
                    application_id=application.id,
                    type=kind.name,
                    name=await _name(session, user_id, kind, form.name),
                    key=form.key,
                    wanted=place.model_dump(mode="json"),
                    generation=1,
                    epoch=1,
                    state=ServiceState.INIT,
                    reason="",
                    since=now,
                    created=now,
                    seed=self._vault.seal(ids.new_secret()),
                    ending=False,
                    urls={},
                    facts={},
                )
                session.add(service)
                await self._equip(session, service, kind, actor)
            view = (await views.service_views(session, [service], now))[0]
        manager = [node.id for node in view.nodes if node.kind == "manager"]
        self._background.start(f"launch manager of {view.id}", self._launch_first(view.id, manager))
        return view

    async def _created_before(self, session: AsyncSession, user_id: str, key: str | None) -> Service | None:
        if key is None:
            return None
        return await session.scalar(select(Service).where(Service.user_id == user_id, Service.key == key))

    async def _check_room(self, session: AsyncSession, user_id: str) -> None:
        query = select(func.count()).select_from(Service)
        count = await session.scalar(query.where(Service.user_id == user_id, Service.terminated.is_(None))) or 0
        if count >= self._settings.limits.services:
            raise ConflictError(
                f"you have {count} services, which is the limit", value=count, hint="terminate one first"
            )

    async def _application(self, session: AsyncSession, user_id: str, wanted: str | None) -> Application:
        """Return the application that was named, or else the user's first one, made if there is none."""
        query = select(Application).where(Application.user_id == user_id).order_by(Application.seq).limit(1)
        if wanted is not None:
            query = query.where(Application.id == wanted)
        application = await session.scalar(query)
        if application is None and wanted is not None:
            raise NotFoundError("you have no such application", value=wanted)
        if application is None:
            application = Application(
                id=ids.new("app"), user_id=user_id, name="My application", created=self._clock.now()
            )
            session.add(application)
            await session.flush()
        return application

    async def _equip(self, session: AsyncSession, service: Service, kind: ServiceType, actor: str) -> None:
        """Give a new service its first spec, code, manager and operation."""
        await session.flush()
        code = await self._code.add_default(service, session) if kind.takes_code else None
        place = Wanted.model_validate(service.wanted)
        first = {"code": None if code is None else code.id}
        wanted = catalogue.first_wanted(kind).model_copy(
            update=first | {name: getattr(place, name) for name in ("cloud", "fallback", "sizes")}
        )
        service.wanted = wanted.model_dump(mode="json")
        wish = Wish(kind="manager", count=1, cloud=wanted.cloud, key="manager-1", epoch=1)
        intent = await self._ledger.intend(session, service, wish)
        if intent.short is not None:
            raise intent.short
        self._operation(session, service, lifecycle.CREATE, wanted, wanted, actor, None)
        session.add(
            StateChangeRow(service_id=service.id, state=service.state, at=service.created, reason="", actor=actor)
        )
        message = f"{service.name}: {kind.title} on {wanted.cloud}"
        record(session, "service-created", at=service.created, actor=actor, service=service, message=message)
        await session.flush()

    async def _launch_first(self, service_id: str, manager: list[str]) -> None:
        """Have the first manager made; if its cloud refuses it, the service says why."""
        await self._ledger.launch(manager)
        async with self._db.write() as session:
            service = await service_of(session, service_id)
            instances = [await instance_of(session, instance) for instance in manager]
            refused = next((i.reason for i in instances if i.state is NodeState.GONE), None)
            if refused is None or service.state is ServiceState.EPILOGUE or service.terminated is not None:
                return
            now, reason = self._clock.now(), f"no manager: {refused}"
            if service.state is not ServiceState.ERROR:
                lifecycle.move(session, service, ServiceState.ERROR, at=now, actor="director", reason=reason)
            for operation in await lifecycle.under_way(session, service_id):
                lifecycle.finish(operation, OperationState.FAILED, at=now, error=reason)

    # -- changing ---------------------------------------------------------------------------------------------------

    async def change(
        self,
        service_id: str,
        edit: Edit,
        *,
        kind: str,
        actor: str,
        expected: int | None = None,
        key: str | None = None,
    ) -> OperationView:
        """Change what is wanted of a service, by compare-and-set if `expected` is given; tell its manager.

        Raises StaleGenerationError, BadInputError, ConflictError and NoCreditError; then nothing has changed. The same
        `key` answers the operation that it made before.
        """
        async with self._db.write() as session:
            service = await living(session, service_id)
            operation = await _made_before(session, service_id, key)
            if operation is not None:
                return views.operation_view(operation)
            if expected is not None and expected != service.generation:
                raise StaleGenerationError(
                    f"the service is at generation {service.generation}, not {expected}", value=expected
                )
            before = Wanted.model_validate(service.wanted)
            if service.ending and kind != lifecycle.TERMINATE:
                raise ConflictError("the service is being terminated", value=service.id)
            after = edit(service, before)
            after = catalogue.checked(catalogue.kind_of(service.type), before, after)
            operation = await self._apply(session, service, before, after, kind=kind, actor=actor, key=key)
            manager = await _manager(session, service)
            view = views.operation_view(operation)
        self._follow(service, manager)
        return view

    async def _apply(
        self,
        session: AsyncSession,
        service: Service,
        before: Wanted,
        after: Wanted,
        *,
        kind: str,
        actor: str,
        key: str | None,
    ) -> Operation:
        self._check_places(before, after)
        await self._check_code(session, service, before, after)
        await self._check_credit(session, service, before, after)
        now = self._clock.now()
        state = lifecycle.after_change(service.state, kind=kind, running=after.running, was_running=before.running)
        if kind == lifecycle.TERMINATE:
            service.ending = True
        settled = after == before and service.state is ServiceState.RUNNING
        if settled:
            state = None
        else:
            service.generation += 1
            service.wanted = after.model_dump(mode="json")
        if after.running != before.running or kind in {lifecycle.STOP, lifecycle.TERMINATE}:
            await self._supersede(session, service, kind)
        operation = self._operation(session, service, kind, before, after, actor, key)
        if state is not None:
            lifecycle.move(session, service, state, at=now, actor=actor, reason="")
        elif settled or (not after.running and service.state is not ServiceState.EPILOGUE):
            lifecycle.finish(operation, OperationState.DONE, at=now, message="nothing runs that would have to change")
            if settled:
                operation.message = "it is so already"
        record(
            session,
            kind,
            at=now,
            actor=actor,
            service=service,
            message=_summary(before, after),
            before=_difference(before, after),
            after=_difference(after, before),
        )
        await session.flush()
        log.info("spec-changed", service=service.id, kind=kind, generation=service.generation, actor=actor)
        return operation

    def _operation(
        self,
        session: AsyncSession,
        service: Service,
        kind: str,
        before: Wanted,
        after: Wanted,
        actor: str,
        key: str | None,
    ) -> Operation:
        now = self._clock.now()
        operation = Operation(
            id=ids.new("op"),
            service_id=service.id,
            user_id=service.user_id,
            kind=kind,
            state=OperationState.RUNNING,
            generation=service.generation,
            key=key,
            before=before.model_dump(mode="json"),
            after=after.model_dump(mode="json"),
            done=0,
            total=0,
            message="",
            error="",
            created=now,
            deadline=now + timedelta(seconds=self._settings.operation_deadline_s),
            actor=actor,
        )
        session.add(operation)
        return operation

    async def _supersede(self, session: AsyncSession, service: Service, kind: str) -> None:
        """Cancel what is under way and makes no sense any more."""
        now = self._clock.now()
        for operation in await lifecycle.under_way(session, service.id):
            if operation.kind != lifecycle.CREATE or kind == lifecycle.TERMINATE:
                lifecycle.finish(operation, OperationState.CANCELLED, at=now, message=f"superseded by '{kind}'")

    def _check_places(self, before: Wanted, after: Wanted) -> None:
        """Raise an error if a cloud that is newly wanted takes no instances, or has no such size."""
        for name in _clouds_of(after) - _clouds_of(before):
            self._clouds.offered(name)
        for name, size in after.sizes.items():
            known = [one.name for one in self._clouds.account(name).sizes]
            if size and before.sizes.get(name) != size and known and size not in known:
                raise BadInputError(
                    f"cloud '{name}' has no size '{size}'", value=size, hint=f"it has: {', '.join(known[:20])}"
                )

    async def _check_code(self, session: AsyncSession, service: Service, before: Wanted, after: Wanted) -> None:
        if after.code is None or after.code == before.code:
            return
        query = select(CodeVersion.seq).where(CodeVersion.service_id == service.id, CodeVersion.id == after.code)
        if await session.scalar(query) is None:
            raise BadInputError(
                f"there is no code version '{after.code}'", value=after.code, hint="list the versions there are"
            )

    async def _check_credit(self, session: AsyncSession, service: Service, before: Wanted, after: Wanted) -> None:
        grows = after.running and (not before.running or sum(after.roles.values()) > sum(before.roles.values()))
        if grows and (await user_of(session, service.user_id)).credits < 1:
            raise NoCreditError("you have no credit left for another instance")

    def _follow(self, service: Service, manager: Instance | None) -> None:
        """Tell the manager; what ends may have none that could do it."""
        self._managers.poke(service, manager)
        if service.state is ServiceState.EPILOGUE:
            self._background.start(f"settle {service.id}", self._endings.settle(service.id))

    # -- the commands -----------------------------------------------------------------------------------------------

    async def start(self, service_id: str, *, actor: str, key: str | None, expected: int | None) -> OperationView:
        """Start a service; one in ERROR may be started again."""

        def edit(service: Service, wanted: Wanted) -> Wanted:
            if service.state is ServiceState.ERROR:
                return wanted.model_copy(update={"running": True})
            return spec.startup(wanted)

        return await self.change(service_id, edit, kind=lifecycle.START, actor=actor, key=key, expected=expected)

    async def stop(self, service_id: str, *, actor: str, key: str | None, expected: int | None) -> OperationView:
        """Give back all instances but the manager; works in every state."""
        return await self.change(
            service_id,
            lambda _, wanted: spec.shutdown(wanted),
            kind=lifecycle.STOP,
            actor=actor,
            key=key,
            expected=expected,
        )

    async def terminate(self, service_id: str, *, actor: str, expected: int | None) -> OperationView:
        """Give back everything; works in every state, and twice."""
        async with self._db.read() as session:
            service = await living(session, service_id)
            for operation in await lifecycle.under_way(session, service_id):
                if service.ending and operation.kind == lifecycle.TERMINATE:
                    return views.operation_view(operation)
        return await self.change(
            service_id,
            lambda _, wanted: spec.shutdown(wanted),
            kind=lifecycle.TERMINATE,
            actor=actor,
            expected=expected,
        )

    async def cancel(self, operation_id: str, *, actor: str) -> OperationView:
        """Undo an operation that is under way: what was wanted before is wanted again.

        Raises ConflictError when it is over, cannot be undone, or something newer is wanted.
        """
        async with self._db.write() as session:
            operation = await session.scalar(select(Operation).where(Operation.id == operation_id))
            if operation is None:
                raise NotFoundError("there is no such operation", value=operation_id)
            service = await living(session, operation.service_id)
            _check_cancel(operation, service)
            before, after = Wanted.model_validate(service.wanted), Wanted.model_validate(operation.before)
            now = self._clock.now()
            lifecycle.finish(operation, OperationState.CANCELLED, at=now, message=f"cancelled by {actor}")
            await self._apply(session, service, before, after, kind=lifecycle.UNDO, actor=actor, key=None)
            manager = await _manager(session, service)
            view = views.operation_view(operation)
        self._follow(service, manager)
        return view

    async def rename(self, service_id: str, name: str, actor: str) -> ServiceView:
        """Give a service another name."""
        async with self._db.write() as session:
            service = await living(session, service_id)
            if name != service.name:
                await _check_name(session, service.user_id, name)
                now, before = self._clock.now(), service.name
                service.name = name
                record(session, "renamed", at=now, actor=actor, service=service, before=before, after=name)
            await session.flush()
            return (await views.service_views(session, [service], self._clock.now()))[0]

    # -- nodes, for managers ----------------------------------------------------------------------------------------

    async def request_nodes(self, service_id: str, body: RequestInstances) -> list[NodeView]:
        """Make nodes for a manager, as many as the credits pay for; those that are refused are GONE and say why."""
        async with self._db.write() as session:
            service = await living(session, service_id)
            if not Wanted.model_validate(service.wanted).running:
                raise ConflictError("the service is not to run: it gets no nodes", value=service_id)
            cloud = body.cloud or Wanted.model_validate(service.wanted).cloud
            wish = Wish(kind="agent", count=body.count, cloud=cloud, key=body.key)
            intent = await self._ledger.intend(session, service, wish)
            if intent.short is not None:
                await self._say_short(session, service, intent.short)
        rows = intent.rows
        with contextlib.suppress(TimeoutError):  # what takes longer goes on, and is found in the record
            async with asyncio.timeout(LAUNCH_S):
                await self._background.finish(self._ledger.launch([row.id for row in rows if row.launched is None]))
        now = self._clock.now()
        async with self._db.read() as session:
            query = select(Instance).where(Instance.id.in_([row.id for row in rows])).order_by(Instance.request_index)
            nodes = [views.node_view(row, now) for row in await session.scalars(query)]
        refused = [] if intent.short is None else [_refused(wish, intent.short, now)] * (body.count - len(rows))
        return nodes + refused

    async def _say_short(self, session: AsyncSession, service: Service, short: ConpaasError) -> None:
        kind = "credits-short" if isinstance(short, NoCreditError) else "cloud-full"
        message = short.message
        for operation in await lifecycle.under_way(session, service.id):
            operation.message = message
        query = select(EventRow).where(EventRow.service_id == service.id).order_by(EventRow.id.desc()).limit(1)
        last = await session.scalar(query)
        if last is not None and (last.kind, last.message) == (kind, message):
            return  # managers ask again and again: it is told once
        record(session, kind, at=self._clock.now(), actor="director", service=service, message=message)

    async def delete_node(self, service_id: str, instance_id: str, body: Gone) -> None:
        """Give back a node of a service; NotFoundError for an instance that is not one."""
        await self.node(service_id, instance_id)
        await self._ledger.delete(instance_id, body.reason, failed=body.failed)

    async def node(self, service_id: str, instance_id: str) -> Instance:
        """Return a node of a service; NotFoundError for an instance that is not one."""
        async with self._db.read() as session:
            instance = await instance_of(session, instance_id)
        if instance.service_id != service_id or instance.kind != "agent":
            raise NotFoundError(f"{instance_id} is no node of this service", value=instance_id)
        return instance


async def living(session: AsyncSession, service_id: str) -> Service:
    """Return a service that is not terminated; raise NotFoundError for any other."""
    service = await service_of(session, service_id)
    if service.terminated is not None:
        raise NotFoundError("this service is terminated", value=service_id)
    return service


async def _manager(session: AsyncSession, service: Service) -> Instance | None:
    return views.manager_of(service, await lifecycle.instances_of(session, service.id))


async def _made_before(session: AsyncSession, service_id: str, key: str | None) -> Operation | None:
    if key is None:
        return None
    return await session.scalar(select(Operation).where(Operation.service_id == service_id, Operation.key == key))


def _check_cancel(operation: Operation, service: Service) -> None:
    if operation.state is not OperationState.RUNNING:
        raise ConflictError(f"the operation is over: {operation.state}", value=operation.state)
    if operation.kind in {lifecycle.CREATE, lifecycle.TERMINATE, lifecycle.UNDO}:
        raise ConflictError(
            f"'{operation.kind}' cannot be cancelled", value=operation.kind, hint="terminate the service instead"
        )
    if operation.generation != service.generation:
        raise ConflictError(
            "something newer is wanted of the service: cancelling this would undo it too",
            value=operation.generation,
            hint="cancel the newest operation, or change the service to what you want",
        )


async def _check_name(session: AsyncSession, user_id: str, name: str) -> None:
    query = select(Service.seq).where(Service.user_id == user_id, Service.name == name, Service.terminated.is_(None))
    if await session.scalar(query) is not None:
        raise ConflictError(f"you have a service called '{name}'", value=name, hint="choose another name")


async def _name(session: AsyncSession, user_id: str, kind: ServiceType, given: str | None) -> str:
    """Return the name that was given, or the first free one made of the type's title."""
    if given is not None:
        await _check_name(session, user_id, given)
        return given
    query = select(Service.name).where(Service.user_id == user_id, Service.terminated.is_(None))
    taken = set(await session.scalars(query))
    names = (kind.name if number == 1 else f"{kind.name} {number}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _clouds_of(wanted: Wanted) -> set[str]:
    """Return every cloud that a spec names."""
    elsewhere = (cloud for places in wanted.places.values() for cloud in places)
    return {wanted.cloud, *wanted.fallback, *wanted.sizes, *elsewhere} - {""}


def _refused(wish: Wish, why: ConpaasError, now: datetime) -> NodeView:
    return NodeView(
        id=ids.new("vm"),
        kind="agent",
        cloud=wish.cloud,
        state=NodeState.GONE,
        reason=why.message,
        created=now,
        since=now,
    )


def _summary(before: Wanted, after: Wanted) -> str:
    """Say in few words what changes: `web +2, php +1`."""
    counts = {role: after.roles.get(role, 0) - before.roles.get(role, 0) for role in {**before.roles, **after.roles}}
    words = [f"{role} {count:+d}" for role, count in counts.items() if count]
    if after.cloud != before.cloud:
        words.append(f"to {after.cloud}")
    words += [f"{cloud}: {size}" for cloud, size in after.sizes.items() if before.sizes.get(cloud) != size]
    if after.fallback != before.fallback:
        words.append(f"fallback {', '.join(after.fallback) or 'none'}")
    words += [f"{name}: {value}" for name, value in after.settings.items() if before.settings.get(name) != value]
    if after.code != before.code:
        words.append(f"code {after.code}")
    if (after.start_script, after.stop_script) != (before.start_script, before.stop_script):
        words.append("scripts")
    return ", ".join(words)[:500]


def _difference(one: Wanted, other: Wanted) -> str:
    """Say what of `one` differs from `other`, as JSON; settings and scripts may be long, and are cut."""
    fields = {name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)}
    return one.model_dump_json(include=fields)[:2000] if fields else ""
