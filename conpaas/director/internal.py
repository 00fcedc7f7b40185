"""The port for instances: what they and the managers ask of the director, over mutual TLS."""

from collections.abc import Sequence
from typing import TypeAlias

from aiohttp import web
from pydantic import SecretStr
from sqlalchemy import select

from conpaas import __version__
from conpaas.core import rpc
from conpaas.core.bundle import Bundler
from conpaas.core.clock import Clock
from conpaas.core.errors import ForbiddenError, NotFoundError
from conpaas.core.identity import peer_identity
from conpaas.core.messages import internal
from conpaas.core.messages.base import Endpoint
from conpaas.core.messages.model import Ack, CodeVersionView, NodeView, OperationView, ServiceRecord, Wanted
from conpaas.core.states import NodeState
from conpaas.core.tasks import Background
from conpaas.core.trust import Caller, Target, authorize, caller_of
from conpaas.director import lifecycle, views
from conpaas.director.clouds import Clouds
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import CodeVersion, Instance, Service, StateChangeRow, User
from conpaas.director.enrolment import Enrolment, check_wanted
from conpaas.director.ledger import Ledger, instance_of
from conpaas.director.reports import Reports
from conpaas.director.services import Services, living
from conpaas.director.vault import Vault
from conpaas.director.volumes import Volumes

Call: TypeAlias = rpc.Call[Caller]


class Internal:
    """Handlers: read, do, answer. What changes something is finished even if the caller hangs up."""

    def __init__(
        self,
        db: Database,
        deployment: str,
        *,
        enrolment: Enrolment,
        ledger: Ledger,
        services: Services,
        reports: Reports,
        code: CodeStore,
        vault: Vault,
        background: Background,
        clock: Clock,
        clouds: Clouds,
        bundler: Bundler,
        volumes: Volumes,
    ) -> None:
        self._db, self._deployment, self._clock = db, deployment, clock
        self._enrolment, self._ledger, self._services, self._reports = enrolment, ledger, services, reports
        self._code, self._vault, self._background = code, vault, background
        self._clouds, self._bundler, self._volumes = clouds, bundler, volumes

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes of this port."""
        handlers: list[tuple[Endpoint, rpc.Handler]] = [
            (internal.ENROL, self.enrol),
            (internal.REPORT_BOOT, self.boot),
            (internal.RENEW, self.renew),
            (internal.READ_RECORD, self.read_record),
            (internal.CHANGE_SPEC, self.change_spec),
            (internal.REQUEST_INSTANCES, self.request_instances),
            (internal.DELETE_INSTANCE, self.delete_instance),
            (internal.DESCRIBE_INSTANCE, self.describe_instance),
            (internal.REPORT, self.report),
            (internal.ENSURE_VOLUME, self.ensure_volume),
            (internal.READ_RELEASE, self.read_release),
            (internal.DOWNLOAD_BUNDLE, self.download_bundle),
            (internal.READ_STATES, self.read_states),
            (internal.DOWNLOAD_BLOB, self.download_blob),
            (internal.UPLOAD_CODE_FOR, self.upload_code),
        ]
        return [rpc.route(endpoint, handler, self.authenticate) for endpoint, handler in handlers]

    async def authenticate(self, request: web.Request, endpoint: Endpoint) -> Caller:
        """Say who calls, by the certificate; refuse whoever is not wanted any more, or has been replaced."""
        transport = request.transport
        tls = None if transport is None else transport.get_extra_info("ssl_object")
        caller = caller_of(peer_identity(tls, self._deployment))
        service_id = request.match_info.get("id", caller.service)
        service, instance = await self._look_up(service_id, caller.instance)
        target = Target() if service is None else Target(service.user_id, service.id, service.epoch)
        if caller.kind in {"manager", "agent"}:
            if instance is None or service is None or service.terminated is not None:
                raise ForbiddenError("this instance is not known here", value=caller.instance)
            if caller.service == service.id:
                check_wanted(instance, service)
        authorize(caller, endpoint, target)
        return caller

    async def _look_up(self, service_id: str | None, instance_id: str | None) -> tuple[Service | None, Instance | None]:
        async with self._db.read() as session:
            service = await session.scalar(select(Service).where(Service.id == service_id))
            instance = await session.scalar(select(Instance).where(Instance.id == instance_id))
        return service, instance

    async def enrol(self, _: Call, body: internal.Enrol) -> internal.Certificate:
        """Give a first certificate."""
        token = body.token.get_secret_value()
        certificate = await self._background.finish(self._enrolment.enrol(token, body.csr))
        instance = token.partition(".")[0]
        self._background.start(f"locate {instance}", self._locate(instance))
        return certificate

    async def _locate(self, instance_id: str) -> None:
        """Ask the cloud where an instance is that has enrolled, if that is not known yet."""
        async with self._db.read() as session:
            instance = await instance_of(session, instance_id)
        if not instance.address:
            await self._ledger.describe(instance_id)

    async def boot(self, _: Call, body: internal.BootReport) -> Ack:
        """Take down how far a booting instance has come."""
        await self._enrolment.note_stage(body.token.get_secret_value(), body.stage, body.detail)
        return Ack()

    async def renew(self, call: Call, body: internal.Renew) -> internal.Certificate:
        """Give the next certificate."""
        return await self._enrolment.renew(call.caller, body.csr)

    async def read_record(self, call: Call) -> ServiceRecord:
        """Tell a manager all about its service."""
        async with self._db.read() as session:
            service = await living(session, call.params["id"])
            instances = await lifecycle.instances_of(session, service.id)
            query = select(CodeVersion).where(CodeVersion.service_id == service.id).order_by(CodeVersion.seq.desc())
            versions = (await session.scalars(query)).all()
        wanted = Wanted.model_validate(service.wanted)
        manager, now = views.manager_of(service, instances), self._clock.now()
        before = [one for one in instances if one.kind == "manager" and one.state is NodeState.DRAINING]
        return ServiceRecord(
            id=service.id,
            name=service.name,
            type=service.type,
            owner=service.user_id,
            state=service.state,
            generation=service.generation,
            epoch=service.epoch,
            wanted=wanted,
            nodes=tuple(
                views.node_view(instance, now)
                for instance in instances
                if instance.kind == "agent" and instance.state is not NodeState.DELETING
            ),
            code=tuple(views.code_view(version, wanted) for version in versions),
            seed=SecretStr(self._vault.unseal(service.seed)),
            cloud=wanted.cloud,
            address="" if manager is None else manager.address,
            predecessor=before[-1].address if before else "",
        )

    async def change_spec(self, call: Call, body: internal.ChangeSpec) -> OperationView:
        """Change what is wanted, as a manager was told by its owner."""
        if body.kind in {lifecycle.CREATE, lifecycle.TERMINATE, lifecycle.UNDO}:
            raise ForbiddenError(f"'{body.kind}' is not a manager's to command", value=body.kind)
        work = self._services.change(
            call.params["id"],
            lambda _service, _wanted: body.wanted,
            kind=body.kind,
            actor=await self._actor(call, body.actor),
            expected=body.generation,
            key=body.key,
        )
        return await self._background.finish(work)

    async def _actor(self, call: Call, claimed: str) -> str:
        """Return whom the log names: the owner, if that is who told the manager; nobody else tells it anything."""
        query = select(User.id, User.username).join(Service, Service.user_id == User.id)
        async with self._db.read() as session:
            owner = (await session.execute(query.where(Service.id == call.params["id"]))).one_or_none()
        return f"user:{owner.username}" if owner and claimed == f"user:{owner.id}" else call.caller.name

    async def request_instances(self, call: Call, body: internal.RequestInstances) -> internal.Instances:
        """Make nodes."""
        nodes = await self._background.finish(self._services.request_nodes(call.params["id"], body))
        return internal.Instances(items=tuple(nodes))

    async def delete_instance(self, call: Call, body: internal.Gone) -> Ack:
        """Give a node back."""
        await self._background.finish(self._services.delete_node(call.params["id"], call.params["instance"], body))
        return Ack()

    async def describe_instance(self, call: Call) -> NodeView:
        """Say how the cloud sees a node."""
        instance = await self._services.node(call.params["id"], call.params["instance"])
        return views.node_view(await self._ledger.describe(instance.id), self._clock.now())

    async def report(self, call: Call, body: internal.Report) -> internal.ReportAck:
        """Take a manager's report."""
        return await self._background.finish(self._reports.take(call.params["id"], body))

    async def ensure_volume(self, call: Call) -> internal.VolumeView:
        """Bring the disk of a role's data to a node."""
        service, instance = call.params["id"], call.params["instance"]
        await self._services.node(service, instance)
        return await self._background.finish(self._volumes.ensure(service, instance, call.params["role"]))

    async def read_release(self, call: Call) -> internal.Release:
        """Say which version the caller is to run, and from what."""
        async with self._db.read() as session:
            instance = await instance_of(session, call.caller.instance or "")
        kind = self._clouds.account(instance.cloud).kind
        shared = kind is not None and kind.shares_code
        bundle = "" if shared else (await self._bundler.get()).sha256
        return internal.Release(version=__version__, bundle=bundle)

    async def download_bundle(self, call: Call) -> web.StreamResponse:
        """Send the archive of this version."""
        bundle = await self._bundler.get()
        if call.params["sha256"] != bundle.sha256:
            raise NotFoundError("there is no such bundle", value=call.params["sha256"])
        return web.FileResponse(bundle.path, headers={"Content-Type": "application/octet-stream"})

    async def read_states(self, call: Call) -> internal.StateHistory:
        """Tell the state history."""
        return await state_history(self._db, call.params["id"])

    async def download_blob(self, call: Call) -> web.StreamResponse:
        """Send the bytes of a code version of the service."""
        service_id, sha256 = call.params["id"], call.params["sha256"]
        async with self._db.read() as session:
            query = select(CodeVersion.seq).where(CodeVersion.service_id == service_id, CodeVersion.sha256 == sha256)
            if (await session.scalars(query.limit(1))).first() is None:
                raise NotFoundError("the service has no such code", value=sha256)
        return web.FileResponse(self._code.path(sha256), headers={"Content-Type": "application/octet-stream"})

    async def upload_code(self, call: Call) -> CodeVersionView:
        """Take a code version that came by way of the manager."""
        query = call.query(internal.UploadQuery)
        return await self._code.upload(
            call.params["id"], query.filename, query.description, call.chunks(), call.caller.name
        )


async def state_history(db: Database, service_id: str) -> internal.StateHistory:
    """Return the states of a service, oldest first."""
    async with db.read() as session:
        query = select(StateChangeRow).where(StateChangeRow.service_id == service_id).order_by(StateChangeRow.seq)
        changes = tuple(views.state_change(row) for row in await session.scalars(query))
    return internal.StateHistory(changes=changes)
