"""The driver of the ssh cloud. The hosts are the provider: who has which, and how far it is, stands on them alone.

`create` takes a lease, in one step on the host, and returns. What follows is done by the host itself; only ConPaaS must
be copied to it, by whichever driver sees that it is missing: the one that created, or one that looks later.

A host that does not answer cannot be asked whether it has a token's lease already. `create` goes on with the others,
else one dead machine would keep all others from being used; should the same instance be found twice one day, `list`
shows both, and the one that the ledger does not know is given back.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog

from conpaas.cloud import _ssh_plan as plan
from conpaas.cloud._ssh_connection import Connections
from conpaas.cloud.ssh import SshHost, SshSettings
from conpaas.core import tasks
from conpaas.core.bundle import Bundle, Bundler
from conpaas.core.cloud import CloudContext, Finding, Room, Size, Vm, VmRequest, VmState
from conpaas.core.errors import ConpaasError, DeadlineError, DiskFullError
from conpaas.core.messages.base import Json

DAEMON_PORT = 5555
"""Where a daemon listens unless its context says otherwise."""

log = structlog.get_logger()


class SshCloud:
    """The machines of one account. `settings` are never shown: they hold a private key."""

    def __init__(self, settings: SshSettings, context: CloudContext) -> None:
        self._settings, self._context = settings, context
        self._what = f"cloud {context.name}"
        context.directory.mkdir(parents=True, exist_ok=True)
        self._hosts = {host.name: host for host in settings.hosts}
        self._connections = Connections(context.name, settings, context.directory, context.deadline_s)
        self._bundler = Bundler(context.directory / "bundles")
        self._background = tasks.Background()
        self._changing = {name: asyncio.Lock() for name in self._hosts}

    # -- instances --------------------------------------------------------------------------------------------------

    async def create(self, request: VmRequest) -> Vm:
        """Lease a free host. Once it has begun on a host it is not given up, also if it is cancelled."""
        hosts = plan.eligible(self._settings, request)
        seen = await self._look_at(hosts)
        for host, answer in seen.items():
            if not isinstance(answer, ConpaasError) and plan.is_of(answer, request.token):
                return plan.vm(host, answer)
        bundle, full = await self._bundle(), None
        for host, answer in seen.items():
            if not isinstance(answer, ConpaasError) and not answer["taken"]:
                try:
                    seen[host] = leased = await self._background.finish(self._lease(host, request, bundle))
                except DiskFullError as exc:  # it holds nothing of the request; another host may
                    full = full or exc
                    continue
                if plan.is_of(leased, request.token):
                    return plan.vm(host, leased)
        raise full or plan.none_free(self._what, [*seen.values()])

    async def describe(self, vm: str) -> Vm:
        """Look at the instance's host."""
        token, host = self._parse(vm)
        answer = await self._call(host, "look") if host is not None else None
        if host is None or answer is None or not plan.is_of(answer, token):
            return Vm(id=vm, token=token, state=VmState.GONE)
        self._go_on(host, answer)
        return plan.vm(host, answer)

    async def list(self) -> list[Vm]:
        """Look at every host; one that does not answer is an error, for it may carry an instance."""
        self._background.start("make the bundle", self._make_ready())  # so that the first instance need not wait for it
        found = []
        for host, answer in (await self._look_at(self._settings.hosts)).items():
            if isinstance(answer, ConpaasError):
                raise answer
            if answer["taken"] and answer["ours"]:
                self._go_on(host, answer)
                found.append(plan.vm(host, answer))
        return [vm for vm in found if vm.state is not VmState.GONE]

    async def delete(self, vm: str) -> None:
        """Give the host back clean; what takes longer than `stop_s` goes on there by itself."""
        token, host = self._parse(vm)
        if host is not None:
            await self._background.finish(self._give_back(host, token))

    async def console(self, vm: str) -> str:
        """Return the end of what preparation and daemon have printed."""
        token, host = self._parse(vm)
        return "" if host is None else str((await self._call(host, "console", token=token))["text"])

    async def close(self) -> None:
        """Close the connections; preparation goes on without us as far as it can."""
        await self._background.close()
        await self._connections.close()

    # -- what there is ----------------------------------------------------------------------------------------------

    async def sizes(self) -> Sequence[Size]:
        """Return one size for each host that answers, with its price, and one that every host has."""
        seen = await self._look_at(self._settings.hosts)
        own = [
            Size(
                name=host.name,
                cores=answer["cores"],
                memory=answer["memory"],
                disk=answer["disk"],
                price=host.price,
                currency=self._settings.currency,
            )
            for host, answer in seen.items()
            if not isinstance(answer, ConpaasError)
        ]
        if not own:
            raise plan.none_free(self._what, [*seen.values()])
        least = {part: min(getattr(size, part) for size in own) for part in ("cores", "memory", "disk")}
        every = Size(name=plan.ANY, **least, currency=self._settings.currency, default=True)
        return [every, *sorted(own, key=lambda size: (size.price is not None, size.price or 0, size.name))]

    async def quota(self) -> Sequence[Room]:
        """Return how many hosts are in use, by whomever."""
        used = 0
        for answer in (await self._look_at(self._settings.hosts)).values():
            if isinstance(answer, ConpaasError):
                raise answer
            used += bool(answer["taken"])
        return [Room(name="instances", used=used, limit=len(self._hosts))]

    async def examine(self) -> Sequence[Finding]:
        """Look at all that an instance needs, on every host."""
        try:
            bundle = await self._bundle()
        except ConpaasError as exc:
            return [Finding(name="what is copied to hosts", ok=False, detail=exc.message, hint=exc.hint)]
        checks = (self._check(host, plan.requirements(self._settings, host, bundle)) for host in self._settings.hosts)
        answers = await asyncio.gather(*checks, return_exceptions=True)
        findings: list[Finding] = []
        refused: list[Finding] = []
        for host, answer in zip(self._settings.hosts, answers, strict=True):
            if isinstance(answer, ConpaasError):
                refused.append(Finding(name=host.name, ok=False, detail=answer.message, hint=answer.hint))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                findings += [Finding(**{**one, "name": f"{host.name}: {one['name']}"}) for one in answer["findings"]]
                findings.append(plan.lease_finding(host, answer))
        return [*findings, *refused]

    async def _check(self, host: SshHost, requirements: Json) -> Json:
        ports = [(plan.listen(host), DAEMON_PORT)]
        return await self._call(host, "check", spec={**requirements, "ports": ports, "now": time.time()})

    # -- calls ------------------------------------------------------------------------------------------------------

    async def _make_ready(self) -> None:
        await self._bundle()

    async def _bundle(self) -> Bundle | None:
        return None if self._settings.command else await self._bundler.get()

    async def _call(self, host: SshHost, verb: str, **asked: Any) -> Json:
        return await self._connections.call(host, verb, deployment=self._context.deployment, **asked)

    async def _look_at(self, hosts: Sequence[SshHost]) -> dict[SshHost, plan.Seen]:
        """Look at hosts at once; return by host what it shows, or why it does not."""
        answers = await asyncio.gather(*(self._call(host, "look") for host in hosts), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ConpaasError):
                raise answer
        return dict(zip(hosts, answers, strict=True))  # type: ignore[arg-type]

    async def _lease(self, host: SshHost, request: VmRequest, bundle: Bundle | None) -> Json:
        async with self._changing[host.name]:
            spec = plan.spec(self._settings, self._context.deployment, host, request, bundle)
            answer = await self._call(host, "lease", spec=spec)
        if plan.is_of(answer, request.token):
            self._go_on(host, answer)
        return answer

    async def _give_back(self, host: SshHost, token: str) -> None:
        async with self._changing[host.name]:
            answer = await self._call(host, "delete", token=token, wait_s=self._context.deadline_s / 2)
            if not answer["gone"]:
                await self._wait_until_clean(host, token)

    async def _wait_until_clean(self, host: SshHost, token: str) -> None:
        async def is_clean() -> bool | None:
            answer = await self._call(host, "look")
            return None if answer["taken"] and answer["ours"] and answer["token"] == token else True

        try:
            await tasks.wait_for(
                is_clean, timeout_s=self._settings.stop_s, what=f"{host.name} is clean", clock=self._context.clock
            )
        except DeadlineError as exc:
            log.warning("host-not-clean-yet", cloud=self._context.name, instance=token, error=exc.message)

    def _go_on(self, host: SshHost, answer: Json) -> None:
        """See to it that an instance gets what it waits for."""
        work: dict[str, Callable[[SshHost, str], Awaitable[object]]] = {
            "bundle": self._upload,
            "prepare": lambda host, token: self._call(host, "prepare", token=token),
            "undo": self._give_back,
        }
        if answer["needs"]:
            self._background.start(
                f"{answer['needs']} {answer['token']} on {host.name}",
                self._do(work[answer["needs"]], host, answer["token"]),
            )

    async def _do(self, act: Callable[[SshHost, str], Awaitable[object]], host: SshHost, token: str) -> None:
        await act(host, token)

    async def _upload(self, host: SshHost, token: str) -> None:
        bundle = await self._bundler.get()
        await self._call(host, "upload", payload=bundle.path, token=token, bundle=bundle.sha256)

    def _parse(self, vm: str) -> tuple[str, SshHost | None]:
        token, _, name = vm.rpartition("@")
        return token or vm, self._hosts.get(name)
