"""The director: the front-end's server, and the only keeper of what lasts."""

import asyncio
import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias

import structlog
from aiohttp import web
from pydantic import SecretStr

from conpaas import __version__
from conpaas.core import rpc, tasks
from conpaas.core.bundle import Bundler
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.errors import BadInputError, ConflictError
from conpaas.core.messages.internal import Context
from conpaas.core.process import Process, Site
from conpaas.director import openapi, ssh
from conpaas.director.accounts import ADMIN, Accounts
from conpaas.director.api_accounts import AccountsApi
from conpaas.director.api_clouds import CloudsApi
from conpaas.director.api_monitoring import MonitoringApi
from conpaas.director.api_services import ServicesApi
from conpaas.director.cloud_accounts import CloudAccounts
from conpaas.director.clouds import Clouds
from conpaas.director.code import CodeStore
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, Service
from conpaas.director.endings import Endings
from conpaas.director.enrolment import Enrolment, Trust
from conpaas.director.events import Bus
from conpaas.director.gate import Gate
from conpaas.director.internal import Internal
from conpaas.director.ledger import Ledger
from conpaas.director.managers import Managers
from conpaas.director.reconcile import Reconciler
from conpaas.director.reports import Reports
from conpaas.director.services import Services
from conpaas.director.settings import DirectorSettings
from conpaas.director.vault import Vault
from conpaas.director.volumes import Volumes

log = structlog.get_logger()

SIZES_S = 3600.0
"""How often clouds are asked what they offer, and at which price."""
Ui: TypeAlias = Callable[[Callable[[], str]], web.Application]
"""Makes the web UI; its argument tells, once the ports are open, where the API is."""
"""Makes the web application that is a client of the API at a base URL."""

LOCK_FILE = "director.lock"
PUBLIC, INSTANCES = 0, 1
"""Places of the two ports in `Director.ports`."""


class Director(Process):
    """One director on one data folder.

    `ports` are the public one (API and UI) and the one for instances; `ssh_port` is 0 when git push is off. What the
    process is made of is there once `ready` is set: `db`, `accounts`, `services`, `ledger`, `reconciler`, …
    """

    name = "director"

    def __init__(self, settings: DirectorSettings, ui: Ui | None = None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__()
        self.settings, self.clock = settings, clock
        self.ssh_port = 0
        self._port = settings.port
        self.new_admin_password: str | None = None
        """Of the administrator's account, if this start has made it: shown once, kept nowhere."""
        self._ui = ui
        self.background = tasks.Background()

    async def open(self, stack: AsyncExitStack) -> Sequence[Site]:
        """Lock the data folder, open the database, put everything together."""
        settings, clock = self.settings, self.clock
        stack.enter_context(locked(settings.data_dir))
        self.vault = Vault.load(settings.data_dir)
        self.trust = Trust.load(settings, clock)
        self.db = await Database.open(settings.database_url)
        stack.push_async_callback(self.db.close)
        self.clouds = Clouds(settings, self.trust.deployment, clock)
        stack.push_async_callback(self.clouds.close)
        self.cloud_accounts = CloudAccounts(self.db, self.clouds, self.vault, clock)
        self.clouds.open(await self.cloud_accounts.plans())
        self.managers = Managers(self.trust.client_context(), self.trust.deployment, clock, self.background)
        stack.push_async_callback(self.managers.close)
        stack.push_async_callback(self.background.close)
        self._compose()
        self.new_admin_password = await self.accounts.ensure_admin()
        if settings.git_push:
            pushes = ssh.serve(settings, self.db, self.code, self._activate, host=settings.host, port=settings.ssh_port)
            self.ssh_port = await stack.enter_async_context(pushes)
        self._port = stack.enter_context(reserved(settings.host, settings.port))
        return self._sites()

    def _compose(self) -> None:
        db, settings, clock, background = self.db, self.settings, self.clock, self.background
        self.bus = Bus(db, clock)
        self.accounts = Accounts(db, settings, self.trust, clock)
        self.code = CodeStore(db, settings.data_dir, settings, clock)
        self.enrolment = Enrolment(db, self.trust, self.vault, clock)
        self.ledger = Ledger(db, self.clouds, settings, clock, self._context)
        self.volumes = Volumes(db, self.clouds, clock)
        self.endings = Endings(db, self.ledger, self.managers, self.code, settings, clock)
        self.services = Services(
            db,
            settings,
            clock,
            clouds=self.clouds,
            ledger=self.ledger,
            managers=self.managers,
            code=self.code,
            vault=self.vault,
            endings=self.endings,
            background=background,
        )
        self.reports = Reports(db, self.bus, self.managers, self.endings, background, clock)
        self.reconciler = Reconciler(
            db,
            settings,
            clock,
            clouds=self.clouds,
            ledger=self.ledger,
            managers=self.managers,
            services=self.services,
            endings=self.endings,
            accounts=self.accounts,
            code=self.code,
        )
        self.internal = Internal(
            db,
            self.trust.deployment,
            enrolment=self.enrolment,
            ledger=self.ledger,
            services=self.services,
            reports=self.reports,
            code=self.code,
            vault=self.vault,
            background=background,
            clock=clock,
            clouds=self.clouds,
            bundler=Bundler(settings.data_dir / "bundles"),
            volumes=self.volumes,
        )

    def _sites(self) -> Sequence[Site]:
        settings, db, clock = self.settings, self.db, self.clock
        gate = Gate(db, self.accounts)
        accounts_api = AccountsApi(
            db,
            settings,
            self.trust.deployment,
            accounts=self.accounts,
            background=self.background,
            clock=clock,
            ssh_port=lambda: self.ssh_port,
        )
        services_api = ServicesApi(
            db,
            settings,
            clock,
            accounts=self.accounts,
            services=self.services,
            code=self.code,
            background=self.background,
        )
        monitoring_api = MonitoringApi(db, clock, accounts=self.accounts, managers=self.managers, bus=self.bus)
        clouds_api = CloudsApi(
            db, accounts=self.accounts, clouds=self.clouds, kept=self.cloud_accounts, background=self.background
        )
        served = [*accounts_api.served(), *clouds_api.served(), *services_api.served(), *monitoring_api.served()]
        routes: list[web.AbstractRouteDef] = [
            rpc.route(endpoint, handler, gate.authenticate) for endpoint, handler in served
        ]
        return [
            Site(settings.host, self._port, [*routes, *openapi.routes(__version__)], subapps=self._subapps()),
            Site(settings.instances_host, settings.instances_port, self.internal.routes(), self.trust.server_context()),
        ]

    def _subapps(self) -> Mapping[str, web.Application]:
        """Return the web UI, which takes what the API leaves."""
        return {} if self._ui is None else {"/": self._ui(lambda: self.url)}

    @property
    def url(self) -> str:
        """Where the API and the UI are reached on this machine."""
        host = "127.0.0.1" if self.settings.host in {"0.0.0.0", "::", ""} else self.settings.host  # noqa: S104
        return f"http://{host}:{self._port}"

    def _context(self, service: Service, instance: Instance, address: str) -> Context:
        """Return all that a booting instance is told."""
        settings = self.settings
        account = self.clouds.account(instance.cloud)
        url = settings.instances_url or f"https://{settings.instances_host}:{self.ports[INSTANCES]}"
        return Context(
            deployment=self.trust.deployment,
            kind="manager" if instance.kind == "manager" else "agent",
            instance=instance.id,
            service=service.id,
            service_type=service.type,
            owner=service.user_id,
            epoch=service.epoch,
            address=address,
            director=account.director_url(url),
            ca=self.trust.ca,
            token=SecretStr(self.enrolment.token(instance.id)),
            timings=settings.timings,
        )

    async def _activate(self, service_id: str, version: str, actor: str) -> object:
        """Make a code version that was pushed the active one."""
        return await self.services.change(
            service_id,
            lambda _, wanted: wanted.model_copy(update={"code": version}),
            kind="activate",
            actor=actor,
        )

    async def serving(self) -> None:
        """Show the new administrator's password, once; go on with what was under way."""
        await self.reconciler.wake_managers()
        if self.new_admin_password is not None:
            sys.stdout.write(f"administrator: {ADMIN}\npassword: {self.new_admin_password}\n")
            sys.stdout.flush()

    def loops(self) -> Mapping[str, tasks.Loop]:
        """Look after services, clouds, money and leftovers."""
        settings, clock, reconciler = self.settings, self.clock, self.reconciler
        return {
            "live": self.bus.run,
            "watch": lambda: tasks.every(settings.watch_period_s, reconciler.watch, clock=clock),
            "volumes": lambda: tasks.every(settings.reconcile_period_s, self.volumes.reconcile, clock=clock),
            "reconcile": lambda: tasks.every(settings.reconcile_period_s, reconciler.reconcile, clock=clock),
            "charge": lambda: tasks.every(settings.charge_period_s, reconciler.charge, clock=clock),
            "sizes": lambda: tasks.every(SIZES_S, self.clouds.learn_sizes, clock=clock),
            "prune": lambda: tasks.every(600, reconciler.prune, clock=clock),
            "certificate": lambda: tasks.every(60, self._renew, clock=clock),
        }

    async def _renew(self) -> None:
        await asyncio.to_thread(self.trust.renew_own)


@contextlib.contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Give `port`, or a free one for 0, which nobody else is given while the block lasts: the UI must know it early."""
    if port:
        yield port
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((host, 0))
        yield int(reservation.getsockname()[1])


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Make the data folder and hold it for one director; raise ConflictError if another one does."""
    try:
        data_dir.mkdir(mode=0o711, parents=True, exist_ok=True)  # instances of the local cloud look through
        for private in ("ca", "blobs", "git"):
            (data_dir / private).mkdir(mode=0o700, exist_ok=True)
        database = data_dir / "director.sqlite"
        database.touch(mode=0o600)  # else SQLite makes it readable for all
        descriptor = os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise BadInputError(
            f"the data folder cannot be used: {exc}", value=str(data_dir), hint="choose another with --data-dir"
        ) from exc
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConflictError(
                f"another director (process {file.read().strip() or 'unknown'}) uses {data_dir}",
                value=str(data_dir),
                hint="stop it first, or use another --data-dir",
            ) from exc
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
