"""A director with simulated clouds: many creates at once, and what each of many nodes costs it.

Executed as a program, `python -m benchmarks.clouds NODES SECONDS`, it is one director with so many nodes, and prints
what that took.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import bench
from benchmarks.bench import Bench
from benchmarks.goals import Measured
from benchmarks.here import director_here
from conpaas.core import tls
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages.internal import NodeReport, Report, RequestInstances
from conpaas.core.messages.model import MetricPoint
from conpaas.core.states import NodeState, ServiceState
from conpaas.director import lifecycle
from conpaas.director.app import Director
from conpaas.sdk import Conpaas

CREATES = 200
PER_S, BURST = 5, 2
FEW, MANY = 200, 2000
_PER_SERVICE = 50
_REPORT_S = 5.0


async def _service(director: Director, client: Conpaas) -> str:
    """Make a service that is to run, and enrol its manager, of which there is nothing else."""
    service = (await client.create(type="php")).id
    async with director.db.read() as session:
        [manager] = await lifecycle.instances_of(session, service)
    csr = tls.make_key_and_csr()[1].decode()
    await director.enrolment.enrol(director.enrolment.token(manager.id), csr)
    await client.start(service)
    return service


async def _request(director: Director, service: str, count: int) -> list[str]:
    """Ask for nodes as a manager does, until its cloud has made them all; return their ids."""
    body = RequestInstances(count=count, cloud="", key="bench")
    while True:
        nodes = await director.services.request_nodes(service, body)
        if all(node.state is not NodeState.REQUESTED for node in nodes):
            return [node.id for node in nodes if node.state is not NodeState.GONE]
        await asyncio.sleep(0.05)


# -- many at once ---------------------------------------------------------------------------------------------------


async def creates(b: Bench) -> Mapping[str, Measured]:
    """Make 200 instances at a provider that makes five per second, and use the API meanwhile.

    Two may come close together, as none of this is in step with the provider's clock.
    """
    limits = {"creates_per_s": PER_S, "creates_burst": BURST, "rates": {"create": PER_S}, "call_s": 0.1}
    async with director_here(b.new_folder("creates"), **limits) as (director, client, _):
        services = [await _service(director, client) for _ in range(CREATES // _PER_SERVICE)]
        answers: list[float] = []
        asking = asyncio.create_task(_ask(client, answers), name="visitor")
        began = time.monotonic()
        made = await asyncio.gather(*[_request(director, service, _PER_SERVICE) for service in services])
        took_s = time.monotonic() - began
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    count, floor_s = sum(map(len, made)), (CREATES - BURST) / PER_S
    p50_ms, p99_ms = (1000 * statistics.quantiles(answers, n=100)[which - 1] for which in (50, 99))
    b.say(f"{count} creates: {took_s:.1f} s, provider {floor_s:.1f} s")
    b.say(f"{len(answers)} calls of the API meanwhile: median {p50_ms:.0f} ms, 99 % within {p99_ms:.0f} ms")
    if count != CREATES:
        raise RuntimeError(f"{count} of {CREATES} instances were made")
    return {"creates_200": Measured(took_s, floor_s), "creates_200_api": Measured(p99_ms)}


async def _ask(client: Conpaas, answers: list[float]) -> None:
    while True:
        began = time.monotonic()
        await client.services()
        answers.append(time.monotonic() - began)
        await asyncio.sleep(0.02)


# -- nodes that run -------------------------------------------------------------------------------------------------


async def crowd(b: Bench) -> Mapping[str, Measured]:
    """Compare a director that has 200 nodes with one that has 2,000: both in processes of their own."""
    seen = {}
    for nodes in (FEW, MANY):
        argv = [sys.executable, "-P", "-m", "benchmarks.clouds", str(nodes), str(b.effort.idle_s)]
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1], env=bench.ENV | bench.source_path()
        )
        output = (await process.communicate())[0]
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: exit code {process.returncode}")
        seen[nodes] = json.loads(output.splitlines()[-1])
        b.say(f"director with {nodes} nodes: {seen[nodes]}")
    memory, cpu = ((seen[MANY][what] - seen[FEW][what]) / (MANY - FEW) for what in ("rss_kib", "cpu_percent"))
    return {
        "director_2000_rss": Measured(seen[MANY]["rss_kib"] / 1024, seen[FEW]["rss_kib"] / 1024),
        "director_2000_cpu": Measured(seen[MANY]["cpu_percent"], seen[FEW]["cpu_percent"]),
        "director_node_rss": Measured(memory),
        "director_node_cpu": Measured(cpu * 1000),
    }


async def _live(nodes: int, seconds: float) -> dict[str, float]:
    """Be a director with so many nodes that all report, and see what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        async with director_here(Path(folder)) as (director, client, _):
            of: dict[str, list[str]] = {}
            for _ in range(nodes // _PER_SERVICE):
                service = await _service(director, client)
                of[service] = await _request(director, service, _PER_SERVICE)
            await _report(director, of, _REPORT_S)
            cpu, began = time.process_time(), time.monotonic()
            await _report(director, of, seconds)
            share = (time.process_time() - cpu) / (time.monotonic() - began)
            status = Path("/proc/self/status").read_text(encoding="ascii")
            rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
            return {"nodes": nodes, "rss_kib": rss, "cpu_percent": 100 * share}


async def _report(director: Director, of: Mapping[str, list[str]], seconds: float) -> None:
    """Report of every node of every service, as often as managers do."""
    until, pause_s = time.monotonic() + seconds, _REPORT_S / len(of)
    while time.monotonic() < until:
        for service, nodes in of.items():
            await asyncio.gather(director.reports.take(service, _said(nodes)), asyncio.sleep(pause_s))


def _said(nodes: list[str]) -> Report:
    now = SYSTEM_CLOCK.now()
    values = {"cpu": time.monotonic() % 1, "memory": 3e8, "request_rate": 79.5, "response_p95": 26.0}
    views = [NodeReport(id=node, state=NodeState.SERVING, roles=("php",), metrics=values) for node in nodes]
    points = [MetricPoint(at=now, node=node, values=values) for node in nodes]
    return Report(generation=2, state=ServiceState.RUNNING, nodes=tuple(views), points=tuple(points))


if __name__ == "__main__":
    bench.be_quiet()
    print(json.dumps(asyncio.run(_live(int(sys.argv[1]), float(sys.argv[2])))))
