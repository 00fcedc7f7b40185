"""Stop and terminate, brought to their end: by the manager if it can, by the director if not."""

import structlog

from conpaas.core.clock import Clock
from conpaas.core.states import NodeState, OperationState, ServiceState
from conpaas.director import lifecycle
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, Service
from conpaas.director.events import record
from conpaas.director.ledger import Ledger, service_of
from conpaas.director.managers import Managers
from conpaas.director.settings import DirectorSettings
from conpaas.director.views import manager_of

log = structlog.get_logger()


class Endings:
    """Finishes what is ending. Every step finds by looking what is left to do."""

    def __init__(
        self,
        db: Database,
        ledger: Ledger,
        managers: Managers,
        code: CodeStore,
        settings: DirectorSettings,
        clock: Clock,
    ) -> None:
        self._db, self._ledger, self._managers, self._code = db, ledger, managers, code
        self._settings, self._clock = settings, clock

    async def settle(self, service_id: str) -> None:
        """Go on with the end of a service, unless its manager is at it."""
        async with self._db.read() as session:
            service = await service_of(session, service_id)
            instances = await lifecycle.instances_of(session, service_id)
        if service.terminated is not None or service.state is not ServiceState.EPILOGUE:
            return
        agents = [instance.id for instance in instances if instance.kind == "agent"]
        manager = manager_of(service, instances)
        living = any(i.kind == "agent" and i.state is not NodeState.DELETING for i in instances)
        if self._manager_does_it(service, manager, agents_live=living):
            return
        await self._ledger.delete_all(agents, "the service is stopped")
        if service.ending:
            await self._terminate(service_id)
        else:
            await self._stopped(service_id)

    def _manager_does_it(self, service: Service, manager: Instance | None, *, agents_live: bool) -> bool:
        if service.ending and not agents_live:
            return False
        if manager is None or manager.booted is None:
            return False
        if self._managers.silent_s(manager) > self._settings.manager_silent_s:
            return False
        return (self._clock.now() - service.since).total_seconds() < self._settings.stop_deadline_s

    async def _stopped(self, service_id: str) -> None:
        """Write down that all nodes are given back."""
        now = self._clock.now()
        async with self._db.write() as session:
            service = await service_of(session, service_id)
            if service.state is not ServiceState.EPILOGUE or service.ending:
                return
            lifecycle.move(session, service, ServiceState.STOPPED, at=now, actor="director")
            service.urls, service.facts = {}, {}
            for operation in await lifecycle.under_way(session, service_id):
                if operation.kind != lifecycle.CREATE:
                    lifecycle.finish(operation, OperationState.DONE, at=now)

    async def _terminate(self, service_id: str) -> None:
        """Give back what is left, the manager included, and write down that the service is gone."""
        async with self._db.read() as session:
            rest = [instance.id for instance in await lifecycle.instances_of(session, service_id)]
        await self._ledger.delete_all(rest, "the service is terminated")
        now = self._clock.now()
        async with self._db.write() as session:
            service = await service_of(session, service_id)
            if service.terminated is not None:
                return
            lifecycle.move(session, service, ServiceState.STOPPED, at=now, actor="director", reason="terminated")
            service.terminated, service.application_id = now, None
            for operation in await lifecycle.under_way(session, service_id):
                lifecycle.finish(operation, OperationState.DONE, at=now)
            record(session, "service-terminated", at=now, actor="director", service=service, message=service.name)
        log.info("service-terminated", service=service_id)
        await self._managers.forget(service_id)
        await self._code.collect_garbage()
