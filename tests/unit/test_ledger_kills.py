"""The director dies at every step of 50 creates at once: nothing leaks, nothing is doubled, nobody else is touched."""

import copy
import functools
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.cloud import sim
from conpaas.core.states import NodeState
from conpaas.director.db.models import CreditEntry, Instance
from tests.fakes.director import HandClock, Rig, open_rig

pytestmark = pytest.mark.timeout(300)  # many lives of many directors

CREDITS = 1000
COUNT = 50
STEPS = 2 + 4 * COUNT
"""The commit of all intents; a call and a commit for each: with each, once before it takes effect and once after."""
STRIDE = 1 if os.environ.get("CONPAAS_EVERY_STEP") else 23
"""Of the steps, so many go by between those at which a director dies; all of them take minutes."""
CHUNKS = 3


class PowerCutError(BaseException):
    """The director has died here."""


class Power:
    """Goes out at one step, and stays out. Steps are calls of clouds and commits, each with a before and an after."""

    def __init__(self, rig: Rig, lasts: int) -> None:
        self.steps, self._lasts = 0, lasts
        cloud: Any = rig.director.clouds.usable("sim")
        for verb in ("create", "list", "describe", "delete"):
            setattr(cloud, verb, self._bounded(getattr(cloud, verb)))
        self._write = rig.db.write
        rig.db.write = self.write  # type: ignore[method-assign]

    def step(self) -> None:
        self.steps += 1
        if self.steps > self._lasts:
            raise PowerCutError

    def _bounded(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(call)
        async def bounded(*words: Any) -> Any:
            self.step()
            answer = await call(*words)
            self.step()
            return answer

        return bounded

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        async with self._write() as session:
            yield session
            self.step()
        self.step()


@dataclass(frozen=True)
class World:
    """A data folder and its cloud account as they were before the first step."""

    folder: Path
    vms: dict[str, sim.SimVm]
    clock_s: float
    user: str
    service: str


@pytest.fixture
async def world(tmp_path: Path) -> World:
    async with open_rig(tmp_path / "first") as rig:
        user = await rig.add_user(credit=CREDITS)
        service = (await rig.create(user)).id
        await rig.services.start(service, actor="user:alice", key=None, expected=None)
        rig.cloud.add_foreign()
        return World(tmp_path / "first", dict(rig.cloud.vms), rig.clock.passed_s, user, service)


@dataclass
class Life:
    """One copy of the world. Its cloud outlives its directors."""

    world: World
    folder: Path
    clock: HandClock

    @asynccontextmanager
    async def director(self) -> AsyncIterator[Rig]:
        async with open_rig(self.folder, clock=self.clock) as rig:
            if not rig.cloud.vms:
                rig.cloud.vms.update(copy.copy(self.world.vms))
                rig.cloud._made = 10
            yield rig

    async def dies_at(self, step: int, act: Callable[[Rig], Awaitable[object]]) -> bool:
        """Let a director act, and die at `step`; tell whether it came so far."""
        async with self.director() as rig:
            power = Power(rig, step)
            try:
                await act(rig)
            except PowerCutError:
                return True
            except BaseExceptionGroup as exc:
                others = exc.split(PowerCutError)[1]
                if others is not None:
                    raise others from exc
                return True
            return power.steps > step

    async def ends_well(self, act: Callable[[Rig], Awaitable[object]]) -> None:
        """Let the next director act and look after what is left, until it can have settled."""
        async with self.director() as rig:
            await act(rig)
            for _ in range(3):
                self.clock.advance(seconds=10)
                await rig.reconciler.reconcile()
            await rig.settle()


@asynccontextmanager
async def copy_of(world: World, target: Path) -> AsyncIterator[Life]:
    shutil.copytree(world.folder, target)
    clock = HandClock()
    clock.passed_s = world.clock_s
    yield Life(world, target, clock)
    sim._accounts.pop(target / "data" / "clouds" / "sim", None)
    shutil.rmtree(target)


async def check(life: Life, agents: int) -> None:
    """Assert that cloud and ledger hold the same, that others' instances are there, and that the money is right."""
    async with life.director() as rig:
        foreign = [vm for vm in rig.cloud.vms.values() if vm.deployment == "somebody-else"]
        assert len(foreign) == 1
        tokens = Counter(vm.token for vm in rig.cloud.vms.values() if vm not in foreign)
        assert not [token for token, count in tokens.items() if count > 1]
        held = {row.id: row for row in await rig.instances(life.world.service) if row.state is not NodeState.GONE}
        assert set(held) == set(tokens)
        assert {row.cloud_id for row in held.values()} == {vm.id for vm in rig.cloud.vms.values() if vm not in foreign}
        assert sum(row.kind == "agent" for row in held.values()) == agents
        async with rig.db.read() as session:
            entries = select(func.coalesce(func.sum(CreditEntry.delta), 0))
            assert await session.scalar(entries.where(CreditEntry.user_id == life.world.user)) == await rig.credits(
                life.world.user
            )
            charged = select(func.coalesce(func.sum(Instance.charged), 0))
            assert await rig.credits(life.world.user) == CREDITS - (await session.scalar(charged) or 0)
            launched = select(func.count()).select_from(Instance).where(Instance.launched.is_not(None))
            if agents:  # all within one hour: one credit for each that is, or was
                assert await rig.credits(life.world.user) == CREDITS - (await session.scalar(launched) or 0)


async def ask(life: Life, rig: Rig, count: int = COUNT) -> None:
    assert len(await rig.add_nodes(life.world.service, count)) == count


async def dies_and_ends_well(world: World, folder: Path, step: int, count: int) -> None:
    async with copy_of(world, folder) as life:
        manager = functools.partial(ask, life, count=count)  # it repeats what got no answer
        assert await life.dies_at(step, manager), f"{step} is beyond the last step"
        await life.ends_well(manager)
        await check(life, count)


async def test_killed_at_every_step_of_5_creates_the_next_director_has_each_of_them_once(
    world: World, tmp_path: Path
) -> None:
    for step in range(2 + 4 * 5):
        await dies_and_ends_well(world, tmp_path / f"dies-at-{step}", step, 5)


@pytest.mark.parametrize("chunk", range(CHUNKS))
async def test_killed_at_any_step_of_50_creates_the_next_director_has_each_of_them_once(
    world: World, tmp_path: Path, chunk: int
) -> None:
    for step in range(chunk * STRIDE, STEPS, CHUNKS * STRIDE):
        await dies_and_ends_well(world, tmp_path / f"dies-at-{step}", step, COUNT)


async def test_all_steps_are_these(world: World, tmp_path: Path) -> None:
    async with copy_of(world, tmp_path / "lives") as life:
        assert not await life.dies_at(STEPS, functools.partial(ask, life))


async def test_killed_and_then_not_wanted_any_more_everything_is_given_back(world: World, tmp_path: Path) -> None:
    async def terminate(rig: Rig) -> None:
        await rig.services.terminate(world.service, actor="user:alice", expected=None)
        await rig.settle()
        await rig.reconciler.watch()
        await rig.settle()

    for step in range(1, STEPS, 2 * STRIDE):
        async with copy_of(world, tmp_path / f"dies-at-{step}") as life:
            await life.dies_at(step, functools.partial(ask, life))
            await life.ends_well(terminate)
            async with life.director() as rig:
                life.clock.advance(seconds=400)  # what its manager cannot end, the director does
                await rig.reconciler.watch()
                await rig.settle()
                await rig.reconciler.reconcile()
                await rig.settle()
            await check(life, 0)


async def test_killed_at_any_step_of_50_deletes_nothing_stays(world: World, tmp_path: Path) -> None:
    async def delete(rig: Rig) -> None:
        await rig.ledger.delete_all(await rig.agents(world.service), "enough")

    async def nothing_more(_: Rig) -> None:
        pass

    for step in range(0, 6 * COUNT, 3 * STRIDE):
        async with copy_of(world, tmp_path / f"dies-at-{step}") as life:
            async with life.director() as rig:
                await ask(life, rig)
            assert await life.dies_at(step, delete)
            await life.ends_well(delete if step % 4 else nothing_more)
            async with life.director() as rig:
                await delete(rig)
            await check(life, 0)


async def test_killed_again_and_again_while_it_recovers(world: World, tmp_path: Path) -> None:
    async with copy_of(world, tmp_path / "often") as life:
        for step in range(3, 90, 20):
            await life.dies_at(step, functools.partial(ask, life))
            life.clock.advance(seconds=1)
            await life.dies_at(step, lambda rig: rig.reconciler.reconcile())
        await life.ends_well(functools.partial(ask, life))
        await check(life, COUNT)
