"""Handlers of the public API: applications, services, code, operations."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from aiohttp import web
from sqlalchemy import func, select

from conpaas.core import ids, spec
from conpaas.core.clock import Clock
from conpaas.core.errors import ConflictError, NotFoundError
from conpaas.core.messages import public
from conpaas.core.messages.internal import StateHistory, UploadQuery
from conpaas.core.messages.manager import CodeVersions, Nodes
from conpaas.core.messages.model import Ack, CodeVersionView, Cost, OperationView, ServiceView, Wanted
from conpaas.core.tasks import Background
from conpaas.director import costs, views
from conpaas.director.accounts import Accounts
from conpaas.director.cache import Cache
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import Application, EventRow, Instance, Operation, Service
from conpaas.director.events import record
from conpaas.director.gate import Call, Served, expected
from conpaas.director.internal import state_history
from conpaas.director.ledger import user_of
from conpaas.director.services import Services, living
from conpaas.director.settings import DirectorSettings

_NOTHING = Cost()


class ServicesApi:
    """Handlers: read, do, answer. What changes something is finished even if the caller hangs up."""

    def __init__(
        self,
        db: Database,
        settings: DirectorSettings,
        clock: Clock,
        *,
        accounts: Accounts,
        services: Services,
        code: CodeStore,
        background: Background,
    ) -> None:
        self._db, self._settings, self._clock = db, settings, clock
        self._accounts, self._services, self._code, self._background = accounts, services, code, background
        self._cache = Cache(db, clock, "services", "instances", "operations")

    def served(self) -> Sequence[Served]:
        """Return the endpoints that are served here."""
        return [
            (public.LIST_APPLICATIONS, self.applications),
            (public.CREATE_APPLICATION, self.create_application),
            (public.RENAME_APPLICATION, self.rename_application),
            (public.DELETE_APPLICATION, self.delete_application),
            (public.LIST_SERVICES, self.services),
            (public.CREATE_SERVICE, self.create),
            (public.GET_SERVICE, self.service),
            (public.RENAME_SERVICE, self.rename),
            (public.START, self.start),
            (public.STOP, self.stop),
            (public.TERMINATE, self.terminate),
            (public.SCALE, self.scale),
            (public.MOVE, self.move),
            (public.CHANGE_SETTINGS, self.change_settings),
            (public.CHANGE_SCRIPTS, self.change_scripts),
            (public.GET_NODES, self.nodes),
            (public.GET_STATES, self.states),
            (public.LIST_CODE, self.code),
            (public.UPLOAD_CODE, self.upload),
            (public.CHECKOUT_CODE, self.checkout),
            (public.DOWNLOAD_CODE, self.download),
            (public.ACTIVATE_CODE, self.activate),
            (public.DELETE_CODE, self.delete_code),
            (public.LIST_OPERATIONS, self.operations),
            (public.GET_OPERATION, self.operation),
            (public.CANCEL_OPERATION, self.cancel),
            (public.GET_HISTORY, self.history),
        ]

    # -- applications -----------------------------------------------------------------------------------------------

    async def applications(self, call: Call) -> public.Applications:
        """Show the caller's applications with the number of their services and what they cost: three queries."""
        query = (
            select(Application, func.count(Service.seq))
            .outerjoin(Service, Service.application_id == Application.id)
            .where(Application.user_id == call.caller.user)
            .group_by(*Application.__table__.columns)
            .order_by(Application.seq)
        )
        async with self._db.read() as session:
            rows = (await session.execute(query)).all()
            mine = select(Service).where(Service.user_id == call.caller.user, Service.application_id.is_not(None))
            services = (await session.scalars(mine)).all()
            running = select(Instance).where(Instance.user_id == call.caller.user, Instance.ended.is_(None))
            instances = (await session.scalars(running)).all()
        now = self._clock.now()
        return public.Applications(
            items=tuple(_application(row, count, _cost(row, services, instances, now)) for row, count in rows)
        )

    async def create_application(self, call: Call, form: public.CreateApplication) -> public.ApplicationView:
        """Make an application."""
        return await self._background.finish(self._create_application(call.caller.user or "", form.name))

    async def _create_application(self, user_id: str, name: str) -> public.ApplicationView:
        async with self._db.write() as session:
            mine = select(Application.name).where(Application.user_id == user_id)
            names = (await session.scalars(mine)).all()
            if name in names:
                raise ConflictError(f"you have an application called '{name}'", value=name, hint="choose another name")
            if len(names) >= self._settings.limits.applications:
                raise ConflictError(f"you have {len(names)} applications, which is the limit", hint="delete one first")
            row = Application(id=ids.new("app"), user_id=user_id, name=name, created=self._clock.now())
            session.add(row)
            actor = f"user:{(await user_of(session, user_id)).username}"
            record(session, "application-created", at=row.created, actor=actor, user=user_id, message=name)
        return _application(row, 0)

    async def rename_application(self, call: Call, form: public.Rename) -> public.ApplicationView:
        """Give an application another name."""
        application_id = call.params["application"]
        async with self._db.write() as session:
            row = await session.scalar(select(Application).where(Application.id == application_id))
            if row is None:
                raise NotFoundError("there is no such application", value=application_id)
            same = select(Application.seq).where(Application.user_id == row.user_id, Application.name == form.name)
            if form.name != row.name and await session.scalar(same) is not None:
                raise ConflictError(f"you have an application called '{form.name}'", value=form.name)
            row.name = form.name
            query = select(func.count()).select_from(Service).where(Service.application_id == row.id)
            count = await session.scalar(query) or 0
        return _application(row, count)

    async def delete_application(self, call: Call) -> Ack:
        """Delete an application that has no services."""
        application_id = call.params["application"]
        async with self._db.write() as session:
            row = await session.scalar(select(Application).where(Application.id == application_id))
            if row is None:
                raise NotFoundError("there is no such application", value=application_id)
            count = await session.scalar(
                select(func.count()).select_from(Service).where(Service.application_id == row.id)
            )
            if count:
                raise ConflictError(
                    f"'{row.name}' has {count} services", value=count, hint="terminate its services first"
                )
            await session.delete(row)
        return Ack()

    # -- services ---------------------------------------------------------------------------------------------------

    async def services(self, call: Call) -> web.Response:
        """Show the caller's services; from memory, as long as nothing has changed."""
        return await self._cache.answer(call, lambda: self._list(call))

    async def _list(self, call: Call) -> public.Services:
        paging = call.query(public.ServiceQuery)
        query = select(Service).where(
            Service.user_id == call.caller.user, Service.terminated.is_(None), Service.seq > views.cursor(paging)
        )
        if paging.application is not None:
            query = query.where(Service.application_id == paging.application)
        async with self._db.read() as session:
            rows = (await session.scalars(query.order_by(Service.seq).limit(paging.limit + 1))).all()
            shown, following = views.page(rows, paging)
            return public.Services(
                items=tuple(await views.service_views(session, shown, self._clock.now())), next=following
            )

    async def create(self, call: Call, form: public.CreateService) -> ServiceView:
        """Make a service."""
        work = self._services.create(call.caller.user or "", form, self._actor(call))
        return await self._background.finish(work)

    async def service(self, call: Call) -> web.Response:
        """Show a service; from memory, as long as nothing has changed."""
        return await self._cache.answer(call, lambda: self._show(call.params["service"]))

    async def _show(self, service_id: str) -> ServiceView:
        async with self._db.read() as session:
            return (await views.service_views(session, [await living(session, service_id)], self._clock.now()))[0]

    async def rename(self, call: Call, form: public.Rename) -> ServiceView:
        """Give a service another name."""
        work = self._services.rename(call.params["service"], form.name, self._actor(call))
        return await self._background.finish(work)

    async def start(self, call: Call, form: public.Keyed) -> OperationView:
        """Start."""
        return await self._background.finish(self._services.start(*self._on(call), **self._with(call, form.key)))

    async def stop(self, call: Call, form: public.Keyed) -> OperationView:
        """Stop."""
        return await self._background.finish(self._services.stop(*self._on(call), **self._with(call, form.key)))

    async def terminate(self, call: Call) -> OperationView:
        """Terminate."""
        work = self._services.terminate(*self._on(call), actor=self._actor(call), expected=expected(call))
        return await self._background.finish(work)

    async def scale(self, call: Call, form: public.Scale) -> OperationView:
        """Add and remove nodes."""
        return await self._change(
            call, "scale", form.key, lambda wanted: spec.change_roles(wanted, form.roles, form.cloud)
        )

    async def move(self, call: Call, form: public.Move) -> OperationView:
        """Move the service, or change where else it may go."""
        return await self._change(
            call, "move", form.key, lambda wanted: spec.move(wanted, form.cloud, form.fallback, form.sizes)
        )

    async def change_settings(self, call: Call, form: public.ChangeSettings) -> OperationView:
        """Change settings."""
        return await self._change(
            call, "configure", form.key, lambda wanted: spec.configure(wanted, form.settings, None, ())
        )

    async def change_scripts(self, call: Call, form: public.Scripts) -> OperationView:
        """Change the user's scripts."""
        scripts = {"start_script": form.start, "stop_script": form.stop}
        return await self._change(call, "scripts", form.key, lambda wanted: wanted.model_copy(update=scripts))

    async def _change(self, call: Call, kind: str, key: str | None, edit: Callable[[Wanted], Wanted]) -> OperationView:
        work = self._services.change(
            call.params["service"], lambda _, wanted: edit(wanted), kind=kind, **self._with(call, key)
        )
        return await self._background.finish(work)

    def _on(self, call: Call) -> tuple[str]:
        return (call.params["service"],)

    def _with(self, call: Call, key: str | None) -> dict[str, Any]:
        return {"actor": self._actor(call), "key": key, "expected": expected(call)}

    def _actor(self, call: Call) -> str:
        return self._accounts.actor(call.caller)

    async def nodes(self, call: Call) -> Nodes:
        """Show the nodes of a service: its instances but the manager's."""
        view = await self._show(call.params["service"])
        return Nodes(nodes=tuple(node for node in view.nodes if node.kind == "agent"))

    async def states(self, call: Call) -> StateHistory:
        """Show the state history."""
        return await state_history(self._db, call.params["service"])

    # -- code -------------------------------------------------------------------------------------------------------

    async def code(self, call: Call) -> CodeVersions:
        """Show the code versions."""
        return CodeVersions(items=tuple(await self._code.list(call.params["service"])))

    async def upload(self, call: Call) -> CodeVersionView:
        """Take an archive."""
        query = call.query(UploadQuery)
        return await self._code.upload(
            call.params["service"], query.filename, query.description, call.chunks(), self._actor(call)
        )

    async def checkout(self, call: Call, form: public.CheckoutCode) -> CodeVersionView:
        """Take what a git repository holds."""
        return await self._code.checkout(call.params["service"], form.url, form.branch, self._actor(call))

    async def download(self, call: Call) -> web.StreamResponse:
        """Send the archive of a code version."""
        version = await self._code.get(call.params["service"], call.params["version"])
        disposition = f"attachment; filename*=UTF-8''{quote(version.filename)}"
        headers = {"Content-Type": "application/octet-stream", "Content-Disposition": disposition}
        return web.FileResponse(self._code.path(version.sha256), headers=headers)

    async def activate(self, call: Call, form: public.Keyed) -> OperationView:
        """Make a code version the active one."""
        version = call.params["version"]
        return await self._change(
            call, "activate", form.key, lambda wanted: wanted.model_copy(update={"code": version})
        )

    async def delete_code(self, call: Call) -> Ack:
        """Delete a code version."""
        work = self._code.delete(call.params["service"], call.params["version"], self._actor(call))
        await self._background.finish(work)
        return Ack()

    # -- operations and history -------------------------------------------------------------------------------------

    async def operations(self, call: Call) -> public.Operations:
        """Show the caller's operations, newest first."""
        paging = call.query(public.OperationQuery)
        query = select(Operation).where(Operation.user_id == call.caller.user)
        if paging.service is not None:
            query = query.where(Operation.service_id == paging.service)
        if paging.cursor is not None:
            query = query.where(Operation.seq < views.cursor(paging))
        async with self._db.read() as session:
            rows = (await session.scalars(query.order_by(Operation.seq.desc()).limit(paging.limit + 1))).all()
        shown, following = views.page(rows, paging)
        return public.Operations(items=tuple(views.operation_view(row) for row in shown), next=following)

    async def operation(self, call: Call) -> OperationView:
        """Show one operation."""
        operation_id = call.params["operation"]
        async with self._db.read() as session:
            row = await session.scalar(select(Operation).where(Operation.id == operation_id))
        if row is None:
            raise NotFoundError("there is no such operation", value=operation_id)
        return views.operation_view(row)

    async def cancel(self, call: Call) -> OperationView:
        """Undo an operation that is under way."""
        work = self._services.cancel(call.params["operation"], actor=self._actor(call))
        return await self._background.finish(work)

    async def history(self, call: Call) -> public.History:
        """Show what happened, newest first: to the caller, or to anybody if an administrator asks."""
        paging = call.query(public.HistoryQuery)
        query = select(EventRow)
        if not call.caller.admin:
            query = query.where(EventRow.user_id == call.caller.user)
        if paging.service is not None:
            query = query.where(EventRow.service_id == paging.service)
        if paging.cursor is not None:
            query = query.where(EventRow.id < views.cursor(paging))
        async with self._db.read() as session:
            rows = (await session.scalars(query.order_by(EventRow.id.desc()).limit(paging.limit + 1))).all()
        shown = rows[: paging.limit]
        return public.History(
            items=tuple(views.event_view(row) for row in shown),
            next=str(shown[-1].id) if len(rows) > paging.limit else None,
        )


def _application(row: Application, services: int, cost: Cost = _NOTHING) -> public.ApplicationView:
    return public.ApplicationView(id=row.id, name=row.name, created=row.created, services=services, cost=cost)


def _cost(row: Application, services: Sequence[Service], instances: Sequence[Instance], now: datetime) -> Cost:
    """Return what the services of an application cost."""
    own = {service.id: service.spent for service in services if service.application_id == row.id}
    return costs.of_all((one for one in instances if one.service_id in own), own.values(), now)
