"""`benchmarks/run`: measure, compare, print."""

import argparse
import asyncio
import json
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from benchmarks import api, boots, clouds, daemons, php
from benchmarks.bench import QUICK, Bench, Effort, be_quiet, workspace
from benchmarks.goals import GOALS, Measured, Result, judge, table

Benchmark: TypeAlias = Callable[[Bench], Awaitable[Mapping[str, Measured]]]

BENCHMARKS: Mapping[tuple[str, ...], Benchmark] = {
    ("start_to_first_page", "create_and_start"): php.start,
    ("add_8_over_add_1",): php.growth,
    ("requests_through",): php.requests,
    ("failed_requests",): php.disturbance,
    (
        *(f"{kind}_{what}" for kind in daemons.KINDS for what in ("rss", "pss", "cpu")),
        "manager_to_agent",
        "manager_to_agent_status",
    ): daemons.rest,
    ("list_services",): api.lists,
    ("list_queries",): api.queries,
    ("creates_200", "creates_200_api"): clouds.creates,
    ("director_2000_rss", "director_2000_cpu", "director_node_rss", "director_node_cpu"): clouds.crowd,
    ("boot_local",): boots.local,
    ("boot_ec2", "boot_opennebula"): boots.providers,
    ("boot_qemu", "boot_qemu_warm"): boots.machines,
    tuple(f"{kind}_first_answer" for kind in daemons.KINDS): daemons.first_answer,
    tuple(f"{kind}_first_answer_on_cloud" for kind in daemons.KINDS): daemons.first_answer_on_cloud,
}
"""What measures what."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0 if every goal is reached, 1 if not."""
    options = _options(arguments)
    results = asyncio.run(run(options.only or list(GOALS), QUICK if options.quick else Effort()))
    if options.json:
        print(json.dumps({name: result.json() for name, result in results.items()}, indent=2))
    else:
        print(table(results))
    return 0 if all(result.ok for result in results.values()) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Measure what ConPaaS costs over doing the same by hand. See docs/benchmarks.md.",
        epilog=f"Exits 0 if every goal is reached. NAME is one of: {', '.join(GOALS)}.",
    )
    parser.add_argument("--json", action="store_true", help="write the results as JSON, progress to standard error")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(GOALS), help="measure only these")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: for trying out, not for numbers")
    return parser.parse_args(arguments)


async def run(names: Sequence[str], effort: Effort) -> dict[str, Result]:
    """Measure `names`, one benchmark after the other; one that breaks has not reached its goals."""
    measured: dict[str, Measured] = {}
    with workspace(effort) as b:
        for produced, benchmark in BENCHMARKS.items():
            if set(produced) & set(names):
                try:
                    measured.update(await benchmark(b))
                except Exception as exc:  # noqa: BLE001 - the others are measured all the same
                    b.say(f"{', '.join(produced)}:\n{''.join(traceback.format_exception(exc))}")
    return {name: judge(GOALS[name], measured.get(name)) for name in GOALS if name in names}


if __name__ == "__main__":
    be_quiet()
    sys.exit(main())
