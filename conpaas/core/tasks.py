"""Named tasks with owners, loops that are guarded, retries that are a list of delays.

The only module that creates tasks outside a `TaskGroup`.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import structlog

from conpaas.core.clock import Clock
from conpaas.core.errors import ConpaasError, DeadlineError

Loop: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
T = TypeVar("T")

log = structlog.get_logger()


async def run_until(stop: asyncio.Event, loops: Mapping[str, Loop]) -> None:
    """Run `loops` until `stop` is set. A loop that ends, or breaks, ends the process: its supervisor restarts it."""
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(_forever(name, loop), name=name) for name, loop in loops.items()]
        await stop.wait()
        for task in running:
            task.cancel()


async def _forever(name: str, loop: Loop) -> None:
    await loop()
    raise RuntimeError(f"the loop '{name}' ended")


async def every(period_s: float, act: Callable[[], Awaitable[None]], *, clock: Clock, jitter: float = 0.1) -> None:
    """Act, wait a period (± jitter), again. An expected error is logged and the round skipped; a bug gets out."""
    while True:
        try:
            await act()
        except ConpaasError as exc:
            _skipped(act, exc)
        except ExceptionGroup as group:
            expected, bugs = group.split(ConpaasError)
            if expected is None or bugs is not None:
                raise
            for error in expected.exceptions:
                _skipped(act, error)
        await clock.sleep(period_s * random.uniform(1 - jitter, 1 + jitter))  # noqa: S311  (not a secret)


def _skipped(act: Callable[[], Awaitable[None]], error: Exception) -> None:
    log.warning(
        "round-skipped", act=getattr(act, "__qualname__", str(act)), error=str(error), code=getattr(error, "code", "")
    )


async def retry(
    act: Callable[[], Awaitable[T]],
    *,
    on: type[ConpaasError] | tuple[type[ConpaasError], ...],
    delays_s: Sequence[float],
    clock: Clock,
) -> T:
    """Act until it succeeds, once more after each delay. The last error is the caller's."""
    for delay in delays_s:
        try:
            return await act()
        except on as exc:
            log.debug("retry", after_s=delay, error=exc.message)
            await clock.sleep(delay)
    return await act()


async def wait_for(
    check: Callable[[], Awaitable[T | None]],
    *,
    timeout_s: float,
    what: str,
    clock: Clock,
    period_s: float = 0.05,
) -> T:
    """Ask `check` until it returns something else than None; raise DeadlineError after `timeout_s` seconds."""
    deadline = clock.monotonic() + timeout_s
    while True:
        answer = await check()
        if answer is not None:
            return answer
        if clock.monotonic() >= deadline:
            raise DeadlineError(f"{what}: not within {timeout_s:g} s")
        await clock.sleep(period_s)


class Background:
    """Owner of tasks that outlive the call which began them. A task that breaks is logged, once, with its name."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unnamed: set[asyncio.Task[Any]] = set()

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` under `name`; a task of that name that still runs is kept and `work` dropped."""
        running = self._tasks.get(name)
        if running is not None and not running.done():
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._tasks[name] = task
        task.add_done_callback(self._finished)

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end, even if the caller is cancelled meanwhile; its answer, or error, is the caller's."""
        task = asyncio.create_task(work, name=getattr(work, "__qualname__", None))
        self._unnamed.add(task)
        task.add_done_callback(self._unnamed.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._finished)  # nobody else will hear of its error
            raise

    def _finished(self, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(task.get_name()) is task:
            del self._tasks[task.get_name()]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, ConpaasError):
            log.warning("task-failed", task=task.get_name(), error=error.message, code=error.code)
        elif error is not None:
            log.error("task-broke", task=task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel what still runs and wait for its end."""
        tasks = [*self._tasks.values(), *self._unnamed]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
