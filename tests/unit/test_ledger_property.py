"""Whatever dies when: what is charged is the hours that instances have begun, each once, and nothing leaks."""

import asyncio
import math
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.cloud.sim import Lost, Outcome
from conpaas.core.errors import CloudRefusedError, ConpaasError, DeadlineError
from conpaas.core.states import NodeState
from conpaas.director.db.models import CreditEntry, Instance
from tests.fakes.director import HandClock, Rig, open_rig

pytestmark = pytest.mark.timeout(300)  # many lives of many directors

CREDITS = 1000


class Killed(BaseException):
    """The director has died here."""


@dataclass(frozen=True)
class Step:
    """One thing that happens. `dies` (if any): the director dies when it is about to commit that many writes later."""

    what: str
    number: int
    dies: int | None
    outcome: int
    before_commit: bool


STEPS = st.builds(
    Step,
    what=st.sampled_from(["request", "delete", "charge", "reconcile", "kill", "wait", "restart"]),
    number=st.integers(0, 5),
    dies=st.one_of(st.none(), st.integers(0, 4)),
    outcome=st.integers(0, 3),
    before_commit=st.booleans(),
)
OUTCOMES: list[Callable[[], Outcome]] = [
    lambda: None,
    lambda: CloudRefusedError("no"),
    lambda: DeadlineError("no connection"),
    lambda: Lost(DeadlineError("no answer")),
]


@given(st.lists(STEPS, min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_charges_are_the_hours_begun_whatever_dies_when(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(live(Path(directory), steps))


async def live(directory: Path, steps: list[Step]) -> None:
    """Live through `steps`, with a new director after each death; then look after what is left, and count."""
    clock = HandClock()
    user = service = ""
    async with open_rig(directory, clock=clock) as rig:
        user = await rig.add_user(credit=CREDITS)
        service = (await rig.create(user)).id
        await rig.services.start(service, actor="user:alice", key=None, expected=None)
    rest = list(steps)
    while rest:
        async with open_rig(directory, clock=clock) as rig:
            while rest:
                step = rest.pop(0)
                clock.advance(seconds=1)
                if step.what == "restart":
                    break
                if not await survives(rig, service, step):
                    break
    async with open_rig(directory, clock=clock) as rig:
        clock.advance(seconds=1)
        for _ in range(3):  # the first finds what is half done, the others what it has left
            await rig.reconciler.reconcile()
        await rig.reconciler.charge()
        await check(rig, user)


async def survives(rig: Rig, service: str, step: Step) -> bool:
    """Do what the step says; return whether the director lives."""
    lives = True
    try:
        async with dying(rig, step):
            await act(rig, service, step)
    except* Killed:
        lives = False
    except* ConpaasError:
        pass
    return lives


async def act(rig: Rig, service: str, step: Step) -> None:
    """Do what the step says."""
    match step.what:
        case "request":
            rig.cloud.fail("create", OUTCOMES[step.outcome]())
            await rig.add_nodes(service, 1 + step.number % 3, key=f"key-{step.number}")
        case "delete":
            rig.cloud.fail("delete", OUTCOMES[step.outcome]())
            nodes = await rig.agents(service)
            if nodes:
                await rig.ledger.delete(nodes[step.number % len(nodes)], "enough")
        case "charge":
            await rig.reconciler.charge()
        case "reconcile":
            await rig.reconciler.reconcile()
        case "kill":
            vms = list(rig.cloud.vms)
            if vms:
                await rig.cloud.kill(vms[step.number % len(vms)])
        case _:
            rig.clock.advance(minutes=25 * step.number)
    rig.cloud.outcomes["create"].clear()
    rig.cloud.outcomes["delete"].clear()


@asynccontextmanager
async def dying(rig: Rig, step: Step) -> AsyncIterator[None]:
    """Have the director die in the block: before, or after, one of its commits."""
    left = [step.dies]
    write = rig.db.write

    @asynccontextmanager
    async def mortal() -> AsyncIterator[AsyncSession]:
        if left[0] is not None and left[0] < 0:
            raise Killed
        async with write() as session:
            yield session
            dies = left[0] == 0
            left[0] = None if left[0] is None else left[0] - 1
            if dies and step.before_commit:
                raise Killed
        if dies:
            raise Killed

    rig.db.write = mortal  # type: ignore[method-assign]
    try:
        yield
    finally:
        rig.db.write = write  # type: ignore[method-assign]
        rig.cloud.outcomes["create"].clear()
        rig.cloud.outcomes["delete"].clear()


async def check(rig: Rig, user: str) -> None:
    """Compare the credit ledger with the lives of the instances, and the ledger with the cloud."""
    now = rig.clock.now()
    async with rig.db.read() as session:
        instances = (await session.scalars(select(Instance))).all()
        total = await session.scalar(select(func.sum(CreditEntry.delta)).where(CreditEntry.user_id == user))
        by_instance = select(CreditEntry.instance_id, func.sum(CreditEntry.delta)).group_by(CreditEntry.instance_id)
        sums = dict((await session.execute(by_instance)).all())
    assert total == await rig.credits(user)
    for instance in instances:
        assert instance.state not in {NodeState.REQUESTED, NodeState.DELETING}
        end = instance.ended or now
        begun = max(1, math.ceil((end - instance.created).total_seconds() / 3600))
        never_was = instance.state is NodeState.GONE and instance.launched is None and instance.charged == 0
        assert -sums[instance.id] == (0 if never_was else begun)
    held = {instance.id for instance in instances if instance.state is not NodeState.GONE}
    assert rig.at_cloud() == held
