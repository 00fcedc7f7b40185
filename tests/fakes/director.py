"""A director in the test's own event loop, with a simulated cloud, a clock of ours, and no ports.

`Rig` is what tests of its parts hold; what the director repeats by itself is done by calling `rig.reconciler`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import argon2
from pydantic import SecretStr
from sqlalchemy import select

from conpaas.cloud import sim
from conpaas.core import tls
from conpaas.core.cloud import CloudContext
from conpaas.core.messages import public
from conpaas.core.messages.internal import NodeReport, Report, RequestInstances
from conpaas.core.messages.model import OperationView, ServiceView
from conpaas.core.states import NodeState, ServiceState
from conpaas.director import accounts, lifecycle, views
from conpaas.director.app import Director
from conpaas.director.db.models import CreditEntry, EventRow, Instance, Operation, Service, User
from conpaas.director.ledger import instance_of, service_of, user_of
from conpaas.director.settings import DirectorSettings
from tests.fakes import postgres

accounts.HASHER = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)  # quick: tests log in a lot

DATABASES = ("sqlite", "postgresql")
PASSWORD = "correct horse"
BLOCK = "127.240.0.0/16"
"""Addresses of instances: nobody answers there, and nothing leaves this machine."""
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class HandClock:
    """Time that passes when the test says so; to sleep is to let it pass."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def now(self) -> datetime:
        return START + timedelta(seconds=self.passed_s)

    def monotonic(self) -> float:
        return self.passed_s

    async def sleep(self, seconds: float) -> None:
        self.passed_s += seconds
        await asyncio.sleep(0)

    def advance(self, **words: float) -> None:
        self.passed_s += timedelta(**words).total_seconds()


class Rig:
    """A director, opened and not serving."""

    def __init__(self, director: Director, clock: HandClock, cloud: sim.Account) -> None:
        self.director, self.clock, self.cloud = director, clock, cloud
        self.db, self.settings = director.db, director.settings
        self.services, self.ledger, self.reconciler = director.services, director.ledger, director.reconciler
        self.accounts, self.reports, self.enrolment = director.accounts, director.reports, director.enrolment

    # -- people and services ----------------------------------------------------------------------------------------

    async def add_user(self, name: str = "alice", credit: int = 100, *, admin: bool = False) -> str:
        """Make an account, past the captcha; return its id."""
        form = public.Registration(username=name, email=f"{name}@example.org", password=SecretStr(PASSWORD))
        user = (await self.accounts._create(form, admin=admin)).id
        async with self.db.write() as session:
            row = await user_of(session, user)
            row.credits = credit
            for entry in await session.scalars(select(CreditEntry).where(CreditEntry.user_id == user)):
                entry.delta = credit
        return user

    async def login(self, name: str = "alice") -> str:
        """Return a session token."""
        form = public.Credentials(username=name, password=SecretStr(PASSWORD))
        return (await self.accounts.login(form, "127.0.0.1")).token.get_secret_value()

    async def create(self, user: str, *, kind: str = "echo", name: str | None = None, **words: Any) -> ServiceView:
        """Make a service and wait for its manager's instance."""
        view = await self.services.create(user, public.CreateService(type=kind, name=name, **words), "user:alice")
        await self.settle()
        return view

    async def running(self, user: str, *, nodes: int = 1, **words: Any) -> ServiceView:
        """Make a service, start it, and have its manager report that it runs on `nodes` nodes."""
        view = await self.create(user, **words)
        await self.enrol_manager(view.id)
        await self.services.start(view.id, actor="user:alice", key=None, expected=None)
        await self.add_nodes(view.id, nodes)
        await self.report(view.id, ServiceState.RUNNING)
        return await self.view(view.id)

    async def settle(self) -> None:
        """Wait until nothing is under way in the background."""
        background = self.director.background
        while background._tasks or background._unnamed:
            await asyncio.gather(*background._tasks.values(), *background._unnamed, return_exceptions=True)
            await asyncio.sleep(0)

    # -- what instances do ------------------------------------------------------------------------------------------

    async def enrol(self, instance: str, csr: str | None = None) -> str:
        """Do as a booting instance does; return its certificate."""
        csr = csr or tls.make_key_and_csr()[1].decode()
        return (await self.enrolment.enrol(self.enrolment.token(instance), csr)).certificate

    async def enrol_manager(self, service: str) -> Instance:
        manager = await self.manager(service)
        await self.enrol(manager.id)
        return manager

    async def add_nodes(self, service: str, count: int, key: str = "first") -> list[str]:
        """Do as a manager does that needs nodes; return their ids."""
        body = RequestInstances(count=count, cloud="", key=key)
        return [node.id for node in await self.services.request_nodes(service, body)]

    async def report(self, service: str, state: ServiceState, **words: Any) -> None:
        """Do as a manager does that has come to `state` at the present generation; its nodes serve."""
        async with self.db.read() as session:
            row = await service_of(session, service)
        nodes = tuple(
            NodeReport(id=node.id, state=NodeState.SERVING, roles=("front",))
            for node in await self.instances(service)
            if node.kind == "agent"
        )
        await self.reports.take(
            service, Report(**{"generation": row.generation, "state": state, "nodes": nodes, **words})
        )
        await self.settle()

    # -- looking ----------------------------------------------------------------------------------------------------

    async def service(self, service: str) -> Service:
        async with self.db.read() as session:
            return await service_of(session, service)

    async def view(self, service: str) -> ServiceView:
        async with self.db.read() as session:
            return (await views.service_views(session, [await service_of(session, service)], self.clock.now()))[0]

    async def instance(self, instance: str) -> Instance:
        async with self.db.read() as session:
            return await instance_of(session, instance)

    async def instances(self, service: str) -> Sequence[Instance]:
        async with self.db.read() as session:
            return await lifecycle.instances_of(session, service)

    async def manager(self, service: str) -> Instance:
        found = views.manager_of(await self.service(service), await self.instances(service))
        assert found is not None
        return found

    async def agents(self, service: str) -> list[str]:
        return [row.id for row in await self.instances(service) if row.kind == "agent"]

    async def operation(self, operation: str) -> OperationView:
        async with self.db.read() as session:
            row = await session.scalar(select(Operation).where(Operation.id == operation))
            assert row is not None
            return views.operation_view(row)

    async def events(self, kind: str) -> list[EventRow]:
        async with self.db.read() as session:
            return list(await session.scalars(select(EventRow).where(EventRow.kind == kind).order_by(EventRow.id)))

    async def credits(self, user: str) -> int:
        async with self.db.read() as session:
            return (await user_of(session, user)).credits

    async def users(self) -> Sequence[User]:
        async with self.db.read() as session:
            return (await session.scalars(select(User).order_by(User.seq))).all()

    def at_cloud(self) -> set[str]:
        """Return the tokens of the instances that the cloud has for this deployment."""
        deployment = self.director.trust.deployment
        return {vm.token for vm in self.cloud.vms.values() if vm.deployment == deployment}


def settings_for(directory: Path, **words: Any) -> DirectorSettings:
    """Return the settings of a director for tests."""
    given: dict[str, Any] = {
        "data_dir": directory,
        "port": 0,
        "instances_port": 0,
        "git_push": False,
        "clouds": {"sim": {"driver": "sim", "block": BLOCK}, "broken": {"driver": "nonesuch"}},
        "default_cloud": "sim",
        "captcha_work": 4,
        "admin_password": PASSWORD,
    }
    return DirectorSettings.load(**{**given, **words})


async def database_url(kind: str) -> str:
    """Return the URL of a fresh database; of SQLite, the default one."""
    return await postgres.new_migrated_database() if kind == "postgresql" else ""


@asynccontextmanager
async def open_rig(
    directory: Path, database: str = "sqlite", *, clock: HandClock | None = None, url: str | None = None, **words: Any
) -> AsyncIterator[Rig]:
    """Open a director on `directory`; opened again on the same one (and `url`), it is a restart."""
    clock = clock or HandClock()
    words["database"] = await database_url(database) if url is None else url
    director = Director(settings_for(directory / "data", **words), clock=clock)
    director.ports = [1, 2]
    async with AsyncExitStack() as stack:
        await director.open(stack)
        context = CloudContext(
            name="sim",
            deployment=director.trust.deployment,
            directory=director.settings.data_dir / "clouds" / "sim",
            clock=clock,
        )
        rig = Rig(director, clock, sim.account(context))
        yield rig
        await rig.settle()
