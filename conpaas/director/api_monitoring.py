"""Handlers of the public API: metrics, logs, live events, and commands that go to the manager."""

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from statistics import fmean
from typing import Any

from aiohttp import web
from sqlalchemy import select

from conpaas.core import rpc
from conpaas.core.clock import Clock
from conpaas.core.messages import manager, public
from conpaas.core.messages.agent import LogQuery
from conpaas.core.messages.base import Endpoint, Message
from conpaas.core.messages.model import LogChunk, MetricPoint
from conpaas.core.trust import ANONYMOUS
from conpaas.director import lifecycle, views
from conpaas.director.accounts import Accounts
from conpaas.director.db.database import Database
from conpaas.director.db.models import MetricRow, Service
from conpaas.director.events import Bus
from conpaas.director.gate import Call, Served, bearer
from conpaas.director.managers import Managers
from conpaas.director.services import living

CHART_POINTS = 360
"""Points per node in an answer: more than that are averaged."""
HEARTBEAT_S = 15.0
FOLLOW_S = 0.5


class MonitoringApi:
    """Handlers: read, ask, answer."""

    def __init__(self, db: Database, clock: Clock, *, accounts: Accounts, managers: Managers, bus: Bus) -> None:
        self._db, self._clock = db, clock
        self._accounts, self._managers, self._bus = accounts, managers, bus

    def served(self) -> Sequence[Served]:
        """Return the endpoints that are served here."""
        return [
            (public.GET_METRICS, self.metrics),
            (public.GET_MONITORING, self.monitoring),
            (public.LIST_LOGS, self.logs),
            (public.READ_LOG, self.read_log),
            (public.FOLLOW_LOG, self.follow_log),
            (public.RUN_COMMAND, self.run_command),
            (public.GET_EVENTS, self.events),
        ]

    async def metrics(self, call: Call) -> public.Metrics:
        """Show metrics for charts."""
        query = call.query(public.MetricsQuery)
        since = self._clock.now() - timedelta(minutes=query.minutes)
        rows = select(MetricRow).where(MetricRow.service_id == call.params["service"], MetricRow.at >= since)
        if query.node is not None:
            rows = rows.where(MetricRow.node == query.node)
        async with self._db.read() as session:
            points = [views.metric_point(row) for row in await session.scalars(rows.order_by(MetricRow.at))]
        return public.Metrics(points=tuple(thin(points, query.minutes * 60 / CHART_POINTS)))

    async def monitoring(self, call: Call) -> manager.Monitoring:
        """Ask the manager for the averages of the last minute."""
        answer: manager.Monitoring = await self._ask(call, manager.GET_MONITORING)
        return answer

    async def logs(self, call: Call) -> manager.ManagerLogs:
        """Ask the manager which logs there are."""
        answer: manager.ManagerLogs = await self._ask(call, manager.LIST_ALL_LOGS)
        return answer

    async def read_log(self, call: Call) -> LogChunk:
        """Ask the manager for a piece of a log."""
        return await self._log(call, call.query(LogQuery))

    async def _log(self, call: Call, query: LogQuery) -> LogChunk:
        chunk: LogChunk = await self._ask(
            call, manager.READ_NODE_LOG, query=query, node=call.params["node"], name=call.params["name"]
        )
        return chunk

    async def run_command(self, call: Call, body: manager.CommandBody) -> manager.CommandAnswer:
        """Have the manager run a command of the service type."""
        answer: manager.CommandAnswer = await self._ask(call, manager.RUN_COMMAND, body, name=call.params["name"])
        return answer

    async def _ask(
        self,
        call: Call,
        endpoint: Endpoint,
        body: Message | None = None,
        *,
        query: Message | None = None,
        **params: str,
    ) -> Any:
        async with self._db.read() as session:
            service = await living(session, call.params["service"])
            instances = await lifecycle.instances_of(session, service.id)
        found = views.manager_of(service, instances)
        return await self._managers.call(service, found, endpoint, body, query=query, **params)

    async def follow_log(self, call: Call) -> web.StreamResponse:
        """Send a log as it grows."""
        offset = call.query(public.FollowQuery).offset
        chunk = await self._log(call, LogQuery(offset=offset))  # an error is still an answer here
        async with rpc.EventStream(call.http) as stream:
            await stream.send(chunk)
            silent_s = 0.0
            while not self._bus.closed:
                await self._clock.sleep(FOLLOW_S)
                chunk = await self._log(call, LogQuery(offset=chunk.next))
                silent_s = 0.0 if chunk.text else silent_s + FOLLOW_S
                if chunk.text:
                    await stream.send(chunk)
                elif silent_s >= HEARTBEAT_S:
                    await stream.heartbeat()
                    silent_s = 0.0
        return stream.response

    async def events(self, call: Call) -> web.StreamResponse:
        """Send what there is, then what changes. Who reads too slowly gets what there is anew."""
        user, only = call.caller.user or "", call.query(public.EventsQuery).service
        async with rpc.EventStream(call.http) as stream:
            with self._bus.subscribe(user) as subscription:
                subscription.overflown = True  # to begin with a look at all there is
                while not subscription.closed:
                    if subscription.overflown:
                        subscription.clear()
                        async for live in self._all(user, only):
                            await stream.send(live)
                    news = await subscription.next(HEARTBEAT_S)
                    if news is not None and _concerns(news, only):
                        await stream.send(news)
                    elif news is None:
                        await stream.heartbeat()
                        if await self._accounts.caller(bearer(call.http) or "") is ANONYMOUS:
                            break  # logged out meanwhile
        return stream.response

    async def _all(self, user: str, only: str | None) -> AsyncIterator[public.Live]:
        yield public.Live(kind="hello")
        query = select(Service).where(Service.user_id == user, Service.terminated.is_(None)).order_by(Service.seq)
        if only is not None:
            query = query.where(Service.id == only)
        async with self._db.read() as session:
            services = (await session.scalars(query)).all()
            shown = await views.service_views(session, services, self._clock.now())
        for view in shown:
            yield public.Live(kind="service", id=view.id, service=view)
        yield public.Live(kind="credits", credits=(await self._accounts.me(user)).credits)


def _concerns(live: public.Live, only: str | None) -> bool:
    """Tell whether an event is for somebody who watches one service only."""
    if only is None or live.kind == "credits":
        return True
    if live.operation is not None:
        return live.operation.service == only
    if live.event is not None:
        return live.event.service == only
    return live.id == only


def thin(points: Iterable[MetricPoint], bucket_s: float) -> list[MetricPoint]:
    """Average points, oldest first, so that each node has at most one in `bucket_s` seconds."""
    buckets: dict[tuple[int, str], list[MetricPoint]] = defaultdict(list)
    for point in points:
        buckets[int(point.at.timestamp() // bucket_s), point.node].append(point)
    return [group[0] if len(group) == 1 else _mean(group) for group in buckets.values()]


def _mean(group: list[MetricPoint]) -> MetricPoint:
    values: dict[str, list[float]] = defaultdict(list)
    for point in group:
        for name, value in point.values.items():
            values[name].append(value)
    at = datetime.fromtimestamp(fmean(point.at.timestamp() for point in group), UTC)
    return MetricPoint(at=at, node=group[0].node, values={name: fmean(them) for name, them in values.items()})
