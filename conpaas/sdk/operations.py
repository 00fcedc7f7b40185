"""Long operations and the history: looking at them, waiting for them, cancelling them."""

from collections.abc import Callable

from conpaas.core.errors import ConpaasError, DeadlineError, PeerError
from conpaas.core.messages import public
from conpaas.core.messages.model import OperationView
from conpaas.core.messages.public import History, HistoryQuery, OperationQuery, Operations
from conpaas.core.states import OperationState
from conpaas.sdk.caller import Caller

POLL_S = 0.1
PATIENCE_S = 60.0
"""How long the director may be away, as while it restarts, before a wait gives up."""


class OperationFailedError(ConpaasError):
    """An operation that was waited for has failed or was cancelled; `operation` is how it ended."""

    code = "operation-failed"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        value: object = None,
        operation: OperationView | None = None,
    ) -> None:
        super().__init__(message, hint=hint, value=value)
        self.operation = operation


class OperationCalls(Caller):
    """The caller's operations."""

    async def operations(
        self, *, service: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> Operations:
        """Return a page of operations, newest first."""
        query = OperationQuery(service=service, cursor=cursor, limit=limit)
        answer: Operations = await self._call(public.LIST_OPERATIONS, query=query)
        return answer

    async def operation(self, operation: str) -> OperationView:
        """Return the operation with this id."""
        answer: OperationView = await self._call(public.GET_OPERATION, operation=operation)
        return answer

    async def cancel(self, operation: str) -> OperationView:
        """Undo an operation that is under way."""
        answer: OperationView = await self._call(public.CANCEL_OPERATION, operation=operation)
        return answer

    async def history(self, *, service: str | None = None, cursor: str | None = None, limit: int = 100) -> History:
        """Return a page of the event log, newest first: who did what, and when."""
        query = HistoryQuery(service=service, cursor=cursor, limit=limit)
        answer: History = await self._call(public.GET_HISTORY, query=query)
        return answer

    async def wait(
        self,
        operation: OperationView | str,
        *,
        on_progress: Callable[[OperationView], None] | None = None,
        timeout_s: float | None = None,
    ) -> OperationView:
        """Return when the operation is done, calling `on_progress` with each change of it.

        Every operation has a deadline of its own; `timeout_s` ends the wait sooner. A director that is away
        for less than a minute is waited for. Raises OperationFailedError, or DeadlineError after `timeout_s`
        seconds.
        """
        name = operation if isinstance(operation, str) else operation.id
        start = heard = self._clock.monotonic()
        shown: OperationView | None = None
        while True:
            try:
                now = await self.operation(name)
            except PeerError:
                if self._clock.monotonic() - heard > PATIENCE_S:
                    raise
            else:
                heard = self._clock.monotonic()
                if on_progress is not None and now != shown:
                    on_progress(now)
                shown = now
                if now.state is not OperationState.RUNNING:
                    return _succeeded(now)
            if timeout_s is not None and self._clock.monotonic() - start >= timeout_s:
                raise DeadlineError(
                    f"operation {name} is not done after {timeout_s:g} s",
                    value=name,
                    hint="it goes on: 'conpaas ops ls'",
                )
            await self._clock.sleep(POLL_S)

    async def _done(self, operation: OperationView, *, wait: bool) -> OperationView:
        return await self.wait(operation) if wait else operation


def _succeeded(operation: OperationView) -> OperationView:
    if operation.state is OperationState.DONE:
        return operation
    how = "was cancelled" if operation.state is OperationState.CANCELLED else "failed"
    why = operation.error or operation.message
    raise OperationFailedError(
        f"{operation.kind} {how}{f': {why}' if why else ''}",
        value=operation.id,
        hint="'conpaas history' and 'conpaas logs' tell more",
        operation=operation,
    )
