"""A token bucket keeps its rate, its order and its pauses; a provider's limit costs no more than itself."""

import asyncio
import heapq
from collections.abc import Coroutine
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conpaas.core.states import NodeState
from conpaas.core.throttle import TokenBucket
from conpaas.director import services
from conpaas.director.db.database import Database
from tests.fakes.director import BLOCK, START, HandClock, open_rig

EPSILON = 1e-6


class QueueClock(HandClock):
    """Time in which many sleep at once; it passes when nobody has anything else to do."""

    def __init__(self) -> None:
        super().__init__()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._number = 0
        self.queued = False
        self.busy = 0
        """What is under way that takes none of this clock's time."""

    async def sleep(self, seconds: float) -> None:
        if not self.queued or seconds <= 0:
            return await super().sleep(max(seconds, 0))
        self._number += 1
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.passed_s + seconds, self._number, turn))
        return await turn

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` to its end, letting time pass whenever all of it waits for time."""
        self.queued, task = True, asyncio.ensure_future(work)
        try:
            while not task.done():
                await self._until_all_wait()
                if not task.done() and self._sleepers:
                    at, _, turn = heapq.heappop(self._sleepers)
                    self.passed_s = max(self.passed_s, at)
                    if not turn.done():
                        turn.set_result(None)
        finally:
            self.queued = False
        return task.result()

    async def _until_all_wait(self) -> None:
        spins = 0
        while spins < 10:
            await asyncio.sleep(0.0005 if self.busy else 0)
            spins = 0 if self.busy else spins + 1

    def now(self) -> datetime:
        return START + timedelta(seconds=self.passed_s)


def watch(db: Database, clock: QueueClock) -> None:
    """Count the sessions that are open as work that takes none of the clock's time."""
    for name in ("read", "write"):
        opened = getattr(db, name)

        @asynccontextmanager
        async def counted(opened: Any = opened) -> Any:
            clock.busy += 1
            try:
                async with opened() as session:
                    yield session
            finally:
                clock.busy -= 1

        setattr(db, name, counted)


GAPS = st.lists(st.floats(0, 3), min_size=1, max_size=30)
RATES = st.floats(0.2, 50)


async def turns(gaps: list[float], per_s: float, burst: int, pauses: dict[int, float]) -> list[tuple[int, float]]:
    """Have callers come after `gaps`, some pausing the bucket as they come; return who had his turn when, in order."""
    clock = QueueClock()
    bucket = TokenBucket(per_s, burst, clock)
    had: list[tuple[int, float]] = []

    async def caller(number: int, at: float) -> None:
        await clock.sleep(at)
        if number in pauses:
            bucket.pause(pauses[number])
        await bucket.take()
        had.append((number, clock.monotonic()))

    async def everybody() -> None:
        at, callers = 0.0, []
        for number, gap in enumerate(gaps):
            at += gap
            callers.append(caller(number, at))
        await asyncio.gather(*callers)

    await clock.run(everybody())
    return had


@given(GAPS, RATES, st.integers(1, 5))
def test_no_window_has_more_than_the_burst_and_what_the_rate_gives(gaps: list[float], per_s: float, burst: int) -> None:
    times = [at for _, at in asyncio.run(turns(gaps, per_s, burst, {}))]

    for first, start in enumerate(times):
        for last, end in enumerate(times[first:], first):
            assert last - first + 1 <= burst + per_s * (end - start) + EPSILON


@given(GAPS, RATES, st.integers(1, 5), st.dictionaries(st.integers(0, 29), st.floats(0, 10), max_size=3))
def test_whoever_comes_first_goes_first(gaps: list[float], per_s: float, burst: int, pauses: dict[int, float]) -> None:
    order = [number for number, _ in asyncio.run(turns(gaps, per_s, burst, pauses))]

    assert order == sorted(order)


@given(st.integers(1, 200), RATES, st.integers(1, 20))
def test_waiting_costs_no_more_than_the_rate_implies(count: int, per_s: float, burst: int) -> None:
    times = [at for _, at in asyncio.run(turns([0.0] * count, per_s, burst, {}))]

    assert times[-1] == pytest.approx(max(0, count - burst) / per_s)


@given(RATES, st.integers(1, 5), st.floats(0.1, 60))
def test_a_pause_holds_up_all_who_come_after_it(per_s: float, burst: int, pause_s: float) -> None:
    [(_, first), *_] = asyncio.run(turns([0.0] * 4, per_s, burst, {0: pause_s}))

    assert first >= pause_s - EPSILON


async def test_a_turn_that_is_given_up_is_the_next_ones() -> None:
    clock = QueueClock()
    bucket = TokenBucket(1.0, 1, clock)

    async def story() -> None:
        await bucket.take()
        waiting = asyncio.ensure_future(bucket.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await bucket.take()

    await clock.run(story())
    assert clock.monotonic() == 1.0


@given(RATES, st.floats(0.1, 60))
def test_a_pause_holds_up_those_who_wait_already(per_s: float, pause_s: float) -> None:
    clock = QueueClock()
    bucket = TokenBucket(per_s, 1, clock)

    async def told() -> None:
        await clock.sleep(0.5 / per_s)
        bucket.pause(1 / per_s + pause_s)

    async def story() -> None:
        await bucket.take()
        await asyncio.gather(bucket.take(), told())

    asyncio.run(clock.run(story()))
    assert clock.monotonic() == pytest.approx(1.5 / per_s + pause_s)


# -- 200 at once ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("known", [True, False], ids=["the rate is known", "the provider tells it"])
async def test_200_creates_take_as_long_as_the_provider_makes_them(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "LAUNCH_S", 120.0)  # of real time, in which nothing of this test should run out
    clock = QueueClock()
    cloud = {"driver": "sim", "block": BLOCK, "creates_per_s": 5, "call_s": 0.1}
    clouds = {"sim": {**cloud, "rates": {"create": 5}} if known else cloud}
    async with open_rig(tmp_path, clock=clock, clouds=clouds) as rig:
        user = await rig.add_user(credit=1000)
        service = (await rig.create(user)).id
        await rig.services.start(service, actor="user:alice", key=None, expected=None)
        clock.advance(minutes=1)
        watch(rig.db, clock)
        began = clock.monotonic()
        ids: list[str] = []

        async def make() -> None:
            ids.extend(await rig.add_nodes(service, 200))

        await clock.run(make())
        took_s = clock.monotonic() - began
        states = [(await rig.instance(node)).state for node in ids]
        assert states == [NodeState.BOOTING] * 200
        assert await rig.credits(user) == 1000 - 201
        assert took_s <= 199 / 5 + 1
