"""Looking on: live events, metrics, logs."""

from collections.abc import AsyncIterator

from conpaas.core.errors import PeerError
from conpaas.core.messages import manager, public
from conpaas.core.messages.agent import LogQuery
from conpaas.core.messages.model import LogChunk, LogName, MetricPoint
from conpaas.core.messages.public import EventsQuery, FollowQuery, Live, MetricsQuery
from conpaas.sdk.caller import RECONNECT_DELAYS_S, Caller


class WatchCalls(Caller):
    """What a service does, as it does it."""

    async def metrics(self, service: str, *, minutes: int = 60, node: str | None = None) -> tuple[MetricPoint, ...]:
        """Return the metrics of the last minutes, oldest first, of all nodes or of one."""
        query = MetricsQuery(minutes=minutes, node=node)
        answer: public.Metrics = await self._call(public.GET_METRICS, query=query, service=service)
        return answer.points

    async def monitoring(self, service: str) -> manager.Monitoring:
        """Return average request rate and throughput of the last minute."""
        answer: manager.Monitoring = await self._call(public.GET_MONITORING, service=service)
        return answer

    async def logs(self, service: str) -> tuple[LogName, ...]:
        """Return the logs of all nodes that can be read; the manager's own are under node `manager`."""
        answer: manager.ManagerLogs = await self._call(public.LIST_LOGS, service=service)
        return answer.logs

    async def read_log(
        self, service: str, node: str, name: str, *, offset: int = -65536, limit: int = 65536
    ) -> LogChunk:
        """Return a piece of a log; a negative offset counts from the end."""
        query = LogQuery(offset=offset, limit=limit)
        answer: LogChunk = await self._call(public.READ_LOG, query=query, service=service, node=node, name=name)
        return answer

    async def follow_log(self, service: str, node: str, name: str, *, offset: int = -16384) -> AsyncIterator[LogChunk]:
        """Yield a log as it grows, without end; after a broken connection it goes on where it was."""
        failures = 0
        while True:
            try:
                query = FollowQuery(offset=offset)
                async for chunk in self._rpc.events(
                    public.FOLLOW_LOG, query=query, service=service, node=node, name=name
                ):
                    failures, offset = 0, chunk.next
                    yield chunk
            except PeerError:
                failures += 1
            await self._pause(failures)

    async def events(self, *, service: str | None = None) -> AsyncIterator[Live]:
        """Yield what happens, of one service or of all, without end.

        The first events say how things are; so do the first after a broken connection, which is made again by
        itself. Raises what the director refuses for good, such as NotAuthenticatedError.
        """
        failures = 0
        while True:
            try:
                async for event in self._rpc.events(public.GET_EVENTS, query=EventsQuery(service=service)):
                    failures = 0
                    yield event
            except PeerError:
                failures += 1
            await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        await self._clock.sleep(RECONNECT_DELAYS_S[min(failures, len(RECONNECT_DELAYS_S) - 1)])
