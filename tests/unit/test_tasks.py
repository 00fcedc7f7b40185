"""Loops, retries and waits, in virtual time: the time is asserted, not waited for."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from structlog.testing import capture_logs

from conpaas.core import tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import CloudBusyError, ConpaasError, DeadlineError, NotFoundError, PeerError

pytestmark = pytest.mark.looptime


def now() -> float:
    return asyncio.get_running_loop().time()


class Act:
    """Notes when it is called; raises what it is told to, in turn."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.times: list[float] = []

    async def __call__(self) -> str:
        self.times.append(now())
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return "done"

    def pauses(self) -> list[float]:
        return [round(b - a, 6) for a, b in zip(self.times, self.times[1:], strict=False)]


async def run_for(seconds: float, loop: Callable[[], Awaitable[None]]) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(loop(), seconds)


async def acting(act: Act) -> None:
    await act()


async def test_every_acts_at_once_and_then_each_period() -> None:
    act = Act()
    await run_for(10.5, lambda: tasks.every(1.0, lambda: acting(act), clock=SYSTEM_CLOCK, jitter=0))
    assert len(act.times) == 11
    assert act.pauses() == [1.0] * 10


async def test_every_varies_its_period_by_the_jitter_and_not_beyond() -> None:
    act = Act()
    await run_for(1000, lambda: tasks.every(1.0, lambda: acting(act), clock=SYSTEM_CLOCK, jitter=0.1))
    pauses = act.pauses()
    assert 900 < len(pauses) < 1100
    assert min(pauses) >= 0.9
    assert max(pauses) <= 1.1
    assert max(pauses) - min(pauses) > 0.1


async def test_every_waits_a_whole_period_after_an_act_that_takes_long() -> None:
    act = Act()

    async def slow() -> None:
        await act()
        await asyncio.sleep(5)

    await run_for(20, lambda: tasks.every(1.0, slow, clock=SYSTEM_CLOCK, jitter=0))
    assert act.pauses() == [6.0] * 3


async def test_every_skips_a_round_for_an_expected_error_and_says_so() -> None:
    act = Act(None, PeerError("nobody there"), None)
    with capture_logs() as lines:
        await run_for(2.5, lambda: tasks.every(1.0, lambda: acting(act), clock=SYSTEM_CLOCK, jitter=0))
    assert len(act.times) == 3
    assert [(line["event"], line["error"], line["code"]) for line in lines] == [
        ("round-skipped", "nobody there", "peer-unreachable")
    ]


async def test_a_bug_gets_out_of_every() -> None:
    act = Act(None, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await tasks.every(1.0, lambda: acting(act), clock=SYSTEM_CLOCK)
    assert len(act.times) == 2


async def test_retry_waits_the_given_delays_and_returns_the_answer() -> None:
    act = Act(PeerError("1"), PeerError("2"), PeerError("3"))
    answer = await tasks.retry(act, on=PeerError, delays_s=(1, 5, 20), clock=SYSTEM_CLOCK)
    assert answer == "done"
    assert act.pauses() == [1.0, 5.0, 20.0]


async def test_the_last_error_of_retry_is_the_callers() -> None:
    act = Act(PeerError("1"), PeerError("2"), PeerError("3"))
    with pytest.raises(PeerError, match="3"):
        await tasks.retry(act, on=PeerError, delays_s=(1, 5), clock=SYSTEM_CLOCK)
    assert act.pauses() == [1.0, 5.0]


async def test_retry_takes_subclasses_and_leaves_other_errors_alone() -> None:
    act = Act(DeadlineError("late"), NotFoundError("gone"))
    with pytest.raises(NotFoundError):
        await tasks.retry(act, on=(PeerError, CloudBusyError), delays_s=(1, 1, 1), clock=SYSTEM_CLOCK)
    assert act.pauses() == [1.0]


async def test_retry_without_delays_is_one_attempt() -> None:
    act = Act(PeerError("1"))
    with pytest.raises(PeerError):
        await tasks.retry(act, on=PeerError, delays_s=(), clock=SYSTEM_CLOCK)
    assert len(act.times) == 1


async def test_wait_for_returns_the_first_answer() -> None:
    answers = [None, None, 0]

    async def check() -> int | None:
        return answers.pop(0)

    start = now()
    assert await tasks.wait_for(check, timeout_s=10, what="it", clock=SYSTEM_CLOCK, period_s=0.5) == 0
    assert now() - start == pytest.approx(1.0)


async def test_wait_for_gives_up_at_its_deadline_and_names_what_it_waited_for() -> None:
    async def never() -> int | None:
        return None

    start = now()
    with pytest.raises(DeadlineError, match=r"the ship: not within 10 s"):
        await tasks.wait_for(never, timeout_s=10, what="the ship", clock=SYSTEM_CLOCK, period_s=0.3)
    assert 10 <= now() - start <= 10.3


async def test_wait_for_asks_once_even_without_time() -> None:
    async def at_once() -> str | None:
        return "here"

    assert await tasks.wait_for(at_once, timeout_s=0, what="it", clock=SYSTEM_CLOCK) == "here"


async def test_loops_run_until_the_stop_and_are_cancelled_then() -> None:
    stop = asyncio.Event()
    cancelled: list[str] = []

    async def loop() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append("loop")

    asyncio.get_running_loop().call_later(7, stop.set)
    start = now()
    await tasks.run_until(stop, {"loop": loop})
    assert now() - start == pytest.approx(7)
    assert cancelled == ["loop"]


async def test_a_loop_that_ends_names_itself_and_cancels_the_others() -> None:
    cancelled: list[str] = []

    async def ends() -> None:
        await asyncio.sleep(1)

    async def other() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append("other")

    with pytest.raises(ExceptionGroup) as caught:
        await tasks.run_until(asyncio.Event(), {"short": ends, "other": other})
    assert [str(error) for error in caught.value.exceptions] == ["the loop 'short' ended"]
    assert cancelled == ["other"]


async def test_background_keeps_the_task_that_runs_and_drops_the_second_of_its_name() -> None:
    background = tasks.Background()
    done: list[str] = []

    async def work(word: str) -> None:
        await asyncio.sleep(1)
        done.append(word)

    background.start("one", work("first"))
    background.start("one", work("second"))
    await asyncio.sleep(2)
    background.start("one", work("third"))
    await asyncio.sleep(2)
    assert done == ["first", "third"]
    await background.close()


@pytest.mark.parametrize(
    ("error", "event"), [(ConpaasError("expected"), "task-failed"), (ValueError("a bug"), "task-broke")]
)
async def test_a_background_task_that_breaks_is_logged_once_with_its_name(error: Exception, event: str) -> None:
    background = tasks.Background()

    async def work() -> None:
        raise error

    with capture_logs() as lines:
        background.start("carry", work())
        await asyncio.sleep(1)
    assert [(line["event"], line["task"]) for line in lines] == [(event, "carry")]
    await background.close()


async def test_closing_the_background_cancels_and_waits() -> None:
    background = tasks.Background()
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(3)
            ended.append("work")

    background.start("work", work())
    await asyncio.sleep(0)
    start = now()
    with capture_logs() as lines:
        await background.close()
    assert ended == ["work"]
    assert now() - start == pytest.approx(3)
    assert lines == []


async def test_what_must_finish_does_so_although_its_caller_is_cancelled() -> None:
    background = tasks.Background()
    done: list[str] = []

    async def work() -> str:
        await asyncio.sleep(5)
        done.append("work")
        return "answer"

    caller = asyncio.create_task(background.finish(work()))
    await asyncio.sleep(1)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done == []
    await asyncio.sleep(5)
    assert done == ["work"]
    assert await background.finish(work()) == "answer"
    await background.close()


async def test_what_must_finish_gives_its_error_to_the_caller() -> None:
    background = tasks.Background()

    async def work() -> None:
        raise NotFoundError("gone")

    with pytest.raises(NotFoundError):
        await background.finish(work())
    await background.close()


async def test_the_error_of_what_must_finish_is_logged_if_its_caller_has_left() -> None:
    background = tasks.Background()

    async def deliver() -> None:
        await asyncio.sleep(5)
        raise NotFoundError("gone")

    caller = asyncio.create_task(background.finish(deliver()))
    await asyncio.sleep(1)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    with capture_logs() as lines:
        await asyncio.sleep(5)
    assert [(line["event"], line["error"]) for line in lines] == [("task-failed", "gone")]
    assert lines[0]["task"].endswith("deliver")
    await background.close()


async def test_a_round_whose_parts_failed_as_expected_is_skipped_and_a_bug_among_them_is_not() -> None:
    errors: list[Exception] = [ConpaasError("disk full"), ConpaasError("away")]
    rounds = 0

    async def act() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            errors.append(RuntimeError("bug"))
        raise ExceptionGroup("parts", errors)

    with pytest.raises(ExceptionGroup, match="parts"):
        await tasks.every(0.001, act, clock=SYSTEM_CLOCK)

    assert rounds == 3
