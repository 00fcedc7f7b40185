"""Agents and managers: what they take at rest, what a command costs, how soon a new one answers."""

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import aiohttp
from pydantic import SecretStr

from benchmarks import bench
from benchmarks.bench import Bench, Deployment
from benchmarks.goals import Measured, medians
from conpaas.cloud.local import CLOUD, LocalSettings
from conpaas.core import ids, rpc, tls
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext, VmRequest
from conpaas.core.errors import PeerError
from conpaas.core.identity import Identity, client_context, server_context
from conpaas.core.member import authenticator
from conpaas.core.messages import agent, internal, manager
from conpaas.core.messages.base import from_peer
from conpaas.core.messages.internal import Context
from conpaas.core.messages.model import NodeView, ServiceRecord, Wanted
from conpaas.core.process import Process, Site
from conpaas.core.states import ServiceState
from conpaas.core.trust import Caller, Target

Kind = Literal["manager", "agent"]
KINDS: tuple[Kind, ...] = ("agent", "manager")
_SETTLE_S = 8.0
"""From the start of a service until its daemons are at rest."""
_POLL_S = 0.005
_ROUNDS = 10
_SERVICE = "svc-bench"


# -- at rest --------------------------------------------------------------------------------------------------------


async def rest(b: Bench) -> Mapping[str, Measured]:
    """Look at the daemons of an idle PHP service; each was executed, as on a machine of its own, not forked."""
    async with b.director(zygote=False) as deployment:
        client = deployment.client
        service = await client.create(type="php")
        await client.start(service.id, wait=True)
        nodes = {node.kind: node for node in (await client.service(service.id)).nodes}
        peers = _Peers(deployment, nodes["manager"], nodes["agent"])
        with b.bare(b"{}", peers.server_files) as (url, bare):
            measured = await _commands(b, peers, url)
            await asyncio.sleep(_SETTLE_S)
            pids = {kind: deployment.daemon(nodes[kind]) for kind in KINDS}
            measured |= {f"{kind}_cpu": Measured(share, 0.0) for kind, share in (await _cpu(b, pids)).items()}
            floor = _memory(bare.pid)
            for kind, pid in pids.items():
                memory = _memory(pid)
                b.say(f"{kind} at rest: {memory}, bare {floor}, {measured[f'{kind}_cpu'].value:.2f} % of a core")
                measured |= {f"{kind}_{what}": Measured(memory[what], floor[what]) for what in ("rss", "pss")}
    return measured


def _memory(pid: int) -> dict[str, float]:
    """Return the resident memory of a process, and its share of it where pages are shared, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    sizes = {words[0]: int(words[1]) / 1024 for words in map(str.split, lines)}
    return {"rss": sizes["Rss:"], "pss": sizes["Pss:"]}


async def _cpu(b: Bench, pids: Mapping[Kind, int]) -> dict[Kind, float]:
    """Return how many percent of a core each process takes over a while."""
    before, began = {kind: _cpu_s(pid) for kind, pid in pids.items()}, time.monotonic()
    await asyncio.sleep(b.effort.idle_s)
    took = time.monotonic() - began
    return {kind: (_cpu_s(pid) - before[kind]) / took * 100 for kind, pid in pids.items()}


def _cpu_s(pid: int) -> float:
    """Return the processor time of all threads of a process so far, by the scheduler's own account."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9


# -- a command ------------------------------------------------------------------------------------------------------


class _Peers:
    """The manager and the agent of a running service, and what each proves itself with."""

    def __init__(self, deployment: Deployment, manager_node: NodeView, agent_node: NodeView) -> None:
        mine, theirs = deployment.home(manager_node), deployment.home(agent_node)
        context = from_peer(Context, (theirs / "context.json").read_bytes())
        self.server_files = (theirs / "member.pem", theirs / "ca.crt")
        self.tls = client_context(mine / "member.pem", mine / "member.pem", mine / "ca.crt")
        self.name = Identity.agent(context.deployment, context.service, agent_node.id).host
        self.url = f"https://{agent_node.address}:{context.port}"


async def _commands(b: Bench, peers: _Peers, bare_url: str) -> dict[str, Measured]:
    """Ask the agent as its manager does, for little and for its status, and the bare server for nothing, in turn."""
    client = rpc.Client(peers.url, tls=peers.tls, server_hostname=peers.name)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=peers.tls)) as session:
        asks: dict[str, Callable[[], Awaitable[object]]] = {
            "bare": partial(_get, session, bare_url, peers.name),
            "manager_to_agent": partial(client.call, agent.HAS_BLOB, sha256="0" * 64),
            "manager_to_agent_status": partial(client.call, agent.GET_STATUS),
        }
        times: dict[str, list[float]] = {name: [] for name in asks}
        await _until_answer(asks["bare"])
        for _ in range(_ROUNDS):
            for name, ask in asks.items():
                times[name] += await _times_ms(ask, b.effort.calls // _ROUNDS)
    await client.close()
    for name, some in times.items():
        late = statistics.quantiles(some, n=100)[98]
        b.say(f"{name}: median {statistics.median(some):.2f} ms, 99 % within {late:.2f} ms")
    floors = times.pop("bare")
    return {name: medians(some, floors) for name, some in times.items()}


async def _get(session: aiohttp.ClientSession, url: str, name: str) -> None:
    try:
        async with session.get(url, server_hostname=name) as answer:
            await answer.read()
    except (aiohttp.ClientError, OSError) as exc:
        raise PeerError(str(exc)) from exc


async def _times_ms(ask: Callable[[], Awaitable[object]], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await ask()
        times.append((time.perf_counter() - began) * 1000)
    return times


async def _until_answer(ask: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(bench.DEADLINE_S):
        while True:
            try:
                await ask()
            except PeerError:
                await asyncio.sleep(_POLL_S)
            else:
                return


# -- the first answer -----------------------------------------------------------------------------------------------


class Enrolment(Process):
    """As much of a director as a new manager or agent meets: it signs, gives a record, and takes reports."""

    name = "enrolment"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.deployment = "dep-bench"
        self._authority = tls.Authority.create(self.deployment)
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(self._authority.certificate_pem)
        self._folder = folder

    def pair(self, identity: Identity) -> Path:
        """Make a key and a certificate for somebody."""
        key, csr = tls.make_key_and_csr()
        path = self._folder / f"{identity.host}.pem"
        path.write_bytes(key + self._authority.sign(csr, identity, lifetime_s=3600))
        return path

    async def open(self, stack: AsyncExitStack) -> list[Site]:
        """Serve what instances ask for."""
        del stack
        pair = self.pair(Identity.director(self.deployment))
        check = authenticator(self.deployment, lambda _: Target(owner="u", service=_SERVICE, epoch=1))
        serve = partial(rpc.route, authenticate=check)
        routes = [
            serve(internal.ENROL, self._enrol),
            serve(internal.READ_RECORD, self._record),
            serve(internal.REPORT, self._report),
        ]
        return [Site(bench.HOST, 0, routes, server_context(pair, pair, self.ca, require_client=False))]

    def context(self, kind: Kind, instance: str, address: str) -> str:
        """Return the contextualization document of a new instance."""
        return Context(
            deployment=self.deployment,
            kind=kind,
            instance=instance,
            service=_SERVICE,
            service_type="php",
            owner="u",
            epoch=1,
            address=address,
            director=f"https://{bench.HOST}:{self.ports[0]}",
            ca=self._authority.certificate_pem.decode(),
            token=SecretStr(f"{kind} {instance}"),
        ).model_dump_json(context={"reveal": True})

    def client(self, kind: Kind, instance: str, address: str) -> rpc.Client:
        """Return a client of an instance's daemon, as the one that it obeys."""
        boss = Identity.director(self.deployment)
        if kind == "agent":
            boss = Identity.manager(self.deployment, _SERVICE, 1, "i-boss")
        pair = self.pair(boss)
        name = self._identity(kind, instance).host
        return rpc.Client(f"https://{address}:5555", tls=client_context(pair, pair, self.ca), server_hostname=name)

    def _identity(self, kind: str, instance: str) -> Identity:
        if kind == "agent":
            return Identity.agent(self.deployment, _SERVICE, instance)
        return Identity.manager(self.deployment, _SERVICE, 1, instance)

    async def _enrol(self, _: rpc.Call[Caller], body: internal.Enrol) -> internal.Certificate:
        identity = self._identity(*body.token.get_secret_value().split())
        certificate = self._authority.sign(body.csr.encode(), identity, lifetime_s=3600)
        return internal.Certificate(certificate=certificate.decode(), renew_in_s=2400)

    async def _record(self, _: rpc.Call[Caller]) -> ServiceRecord:
        return ServiceRecord(
            id=_SERVICE,
            name="bench",
            type="php",
            owner="u",
            state=ServiceState.INIT,
            generation=1,
            epoch=1,
            wanted=Wanted(roles={"proxy": 1}),
            nodes=(),
            code=(),
            seed=SecretStr("seed"),
            cloud="local",
        )

    async def _report(self, _: rpc.Call[Caller], __: internal.Report) -> internal.ReportAck:
        return internal.ReportAck(generation=1)


@asynccontextmanager
async def _enrolment(b: Bench) -> AsyncIterator[Enrolment]:
    process = Enrolment(b.new_folder("enrolment"))
    async with asyncio.TaskGroup() as group:
        group.create_task(process.run(signals=False), name="enrolment")
        await process.ready.wait()
        try:
            yield process
        finally:
            process.stop.set()


async def _until_first_answer(enrolment: Enrolment, kind: Kind, instance: str, address: str) -> None:
    client = enrolment.client(kind, instance, address)
    endpoint = agent.GET_STATUS if kind == "agent" else manager.GET_STATE
    try:
        await _until_answer(partial(client.call, endpoint))
    finally:
        await client.close()


async def first_answer(b: Bench) -> Mapping[str, Measured]:
    """Execute agents, managers and the bare server, in turn, and ask each until it answers."""
    times: dict[str, list[float]] = {"agent": [], "manager": [], "bare": []}
    async with _enrolment(b) as enrolment:
        for _ in range(b.effort.repetitions):
            for kind in KINDS:
                times[kind].append(await _execute(b, enrolment, kind))
            times["bare"].append(await _execute_bare(b, enrolment))
            b.say("first answer: " + ", ".join(f"{kind} {some[-1]:.3f} s" for kind, some in times.items()))
    return {f"{kind}_first_answer": medians(times[kind], times["bare"]) for kind in KINDS}


async def _execute(b: Bench, enrolment: Enrolment, kind: Kind) -> float:
    instance, address, folder = ids.new("i"), bench.free_address(), b.new_folder(kind)
    context = folder / "context.json"
    context.write_text(enrolment.context(kind, instance, address), encoding="utf-8")
    bench.own(folder)
    env = {**bench.ENV, "HOME": str(folder), **bench.source_path()}
    argv = [sys.executable, "-m", "conpaas", "run", kind, "--context", str(context)]
    began = time.monotonic()
    process = bench.launch(argv, folder, env, folder / "output")
    try:
        await _until_first_answer(enrolment, kind, instance, address)
        return time.monotonic() - began
    except TimeoutError as exc:
        raise RuntimeError(f"the {kind} does not answer: {(folder / 'output').read_text()[-500:]}") from exc
    finally:
        bench.kill(process)


async def _execute_bare(b: Bench, enrolment: Enrolment) -> float:
    me = Identity.director(enrolment.deployment)
    pair, ca = enrolment.pair(me), enrolment.ca
    began = time.monotonic()
    with b.bare(b"{}", (pair, ca)) as (url, _):
        connector = aiohttp.TCPConnector(ssl=client_context(pair, pair, ca))
        async with aiohttp.ClientSession(connector=connector) as session:
            await _until_answer(partial(_get, session, url, me.host))
        return time.monotonic() - began


async def first_answer_on_cloud(b: Bench) -> Mapping[str, Measured]:
    """Ask the local cloud for agents and managers, in turn, and ask each until it answers."""
    times: dict[Kind, list[float]] = {"agent": [], "manager": []}
    async with _enrolment(b) as enrolment:
        folder = b.new_folder("cloud")
        context = CloudContext(name="local", deployment=enrolment.deployment, directory=folder, clock=SYSTEM_CLOCK)
        cloud = CLOUD.open(LocalSettings(), context)
        try:
            for number in range(b.effort.repetitions + 1):
                for kind in KINDS:
                    took = await _create(cloud, enrolment, kind)
                    if number:  # the first one starts the helper that all others are forked from
                        times[kind].append(took)
        finally:
            await cloud.close()
    b.say("first answer on the local cloud: " + ", ".join(f"{kind} {min(some):.3f} s" for kind, some in times.items()))
    return {f"{kind}_first_answer_on_cloud": Measured(statistics.median(times[kind])) for kind in KINDS}


async def _create(cloud: Cloud, enrolment: Enrolment, kind: Kind) -> float:
    instance = ids.new("i")
    request = VmRequest(
        token=instance, name=instance, context=lambda address: enrolment.context(kind, instance, address)
    )
    began = time.monotonic()
    vm = await cloud.create(request)
    try:
        await _until_first_answer(enrolment, kind, instance, vm.address or "")
        return time.monotonic() - began
    finally:
        await cloud.delete(vm.id)
