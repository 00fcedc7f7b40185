"""What happens, told twice: in the append-only log, and live to those who watch."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core.clock import Clock
from conpaas.core.messages.model import MetricPoint
from conpaas.core.messages.public import Live
from conpaas.director import views
from conpaas.director.db.database import Changes, Database
from conpaas.director.db.models import EventRow, Operation, Service, User

QUEUE_LENGTH = 200


def record(
    session: AsyncSession,
    kind: str,
    *,
    at: datetime,
    actor: str,
    user: str | None = None,
    service: Service | None = None,
    message: str = "",
    before: str = "",
    after: str = "",
) -> None:
    """Add a line to the event log, in the transaction of what it tells."""
    session.add(
        EventRow(
            at=at,
            kind=kind,
            actor=actor,
            user_id=service.user_id if service is not None else user,
            service_id=None if service is None else service.id,
            message=message,
            before=before,
            after=after,
        )
    )


class Subscription:
    """What one watcher has not yet read. Who is too slow loses it all and is told to look anew."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Live | None] = asyncio.Queue(QUEUE_LENGTH)
        self.overflown = False
        self.closed = False

    def put(self, live: Live) -> None:
        """Add an event; never waits."""
        try:
            self._queue.put_nowait(live)
        except asyncio.QueueFull:
            self.overflown = True

    async def next(self, timeout_s: float) -> Live | None:
        """Return the next event, or None when there was none for `timeout_s` seconds, or `closed` is set."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._queue.get()
        except TimeoutError:
            return None

    def close(self) -> None:
        """End the watch: the director stops."""
        self.closed = True
        self.clear()
        self._queue.put_nowait(None)

    def clear(self) -> None:
        """Forget what is queued: a fresh look makes up for it."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self.overflown = False


class Bus:
    """Tells watchers, by user, what has changed.

    Changes are noted at each commit and told together a moment later, as what is then so: a burst of writes costs one
    look at the database, and none at all while nobody watches.
    """

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db, self._clock = db, clock
        self._watchers: dict[str, set[Subscription]] = defaultdict(set)
        self._noted = Changes()
        self._news = asyncio.Event()
        self.closed = False
        """The director stops: whoever streams is to end."""
        db.on_commit.append(self._note)

    @contextlib.contextmanager
    def subscribe(self, user: str) -> Iterator[Subscription]:
        """Watch what is of `user`'s concern."""
        subscription = Subscription()
        self._watchers[user].add(subscription)
        try:
            yield subscription
        finally:
            self._watchers[user].discard(subscription)
            if not self._watchers[user]:
                del self._watchers[user]

    def publish(self, live: Live, user: str) -> None:
        """Tell the watchers of `user`; never waits."""
        for subscription in self._watchers.get(user, ()):
            subscription.put(live)

    def metrics(self, user: str, service: str, points: tuple[MetricPoint, ...]) -> None:
        """Tell new metrics."""
        self.publish(Live(kind="metrics", id=service, points=points), user)

    def _note(self, changes: Changes) -> None:
        if self._watchers:
            self._noted.services |= changes.services
            self._noted.operations |= changes.operations
            self._noted.users |= changes.users
            self._noted.events += changes.events
            self._news.set()

    async def run(self) -> None:
        """Tell what is noted, until cancelled; then all watches end."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                noted, self._noted = self._noted, Changes()
                await self._tell(noted)
        finally:
            self.closed = True
            for watchers in self._watchers.values():
                for subscription in watchers:
                    subscription.close()

    async def _tell(self, noted: Changes) -> None:
        async with self._db.read() as session:
            services = (await session.scalars(select(Service).where(Service.id.in_(noted.services)))).all()
            living = [service for service in services if service.terminated is None]
            shown = await views.service_views(session, living, self._clock.now())
            chosen = select(Operation).where(Operation.id.in_(noted.operations))
            operations = (await session.scalars(chosen)).all()
            users = (await session.scalars(select(User).where(User.id.in_(noted.users)))).all()
        for service in services:
            if service.terminated is not None:
                self.publish(Live(kind="removed", id=service.id), service.user_id)
        for view in shown:
            self.publish(Live(kind="service", id=view.id, service=view), view.owner)
        for operation in operations:
            live = Live(kind="operation", id=operation.id, operation=views.operation_view(operation))
            self.publish(live, operation.user_id)
        for user in users:
            self.publish(Live(kind="credits", credits=user.credits), user.id)
        for event in noted.events:
            if event.user_id is not None:
                self.publish(Live(kind="event", event=views.event_view(event)), event.user_id)
