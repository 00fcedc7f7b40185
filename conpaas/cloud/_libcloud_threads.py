"""A blocking library in threads of its own: one driver object per thread, every request with a deadline.

A call may take several requests, but not longer than `REQUESTS` of them. One that is cancelled or overdue is given up
at once; its thread goes on until the answer comes or the time of the request is over, whichever is first, and sends no
further request. So there are never more threads than the account's setting, whatever the provider does; a call that
finds none free in time is a CloudBusyError.
"""

import asyncio
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import requests
from libcloud.common.base import Connection
from libcloud.common.exceptions import BaseHTTPError
from libcloud.http import LibcloudConnection

from conpaas.cloud._libcloud_errors import GarbageError, OverdueError, is_code, readable, translate
from conpaas.core.errors import CloudBusyError, ConpaasError, DeadlineError

T = TypeVar("T")

REQUESTS = 4
"""How many requests' deadlines a call may take; as long may it wait for a thread, or for the call before it."""
_LAST_CHARACTERS = 64 * 1024


class Call:
    """One call of the cloud driver: its time, and what the provider has answered so far."""

    def __init__(self) -> None:
        self.given_up = False
        self.words = ""
        """Body of the last answer, if that is an error."""
        self.changes: list[str] = []
        """Bodies of the good answers to requests that are not GET."""
        self.reads = 0
        """Good answers to GET."""
        self._end = float("inf")
        self._request_s = 0.0

    def begin(self, request_s: float) -> None:
        """Begin to count. Each request may take `request_s` seconds."""
        self._request_s = request_s
        self._end = time.monotonic() + REQUESTS * request_s

    def left_s(self) -> float:
        """Return the time for a request, in seconds; raise OverdueError if none is left, or nobody waits any more."""
        left_s = self._end - time.monotonic()
        if self.given_up or left_s <= 0:
            raise OverdueError
        return min(left_s, self._request_s)

    def forget(self) -> None:
        """Count answers anew."""
        self.changes, self.reads = [], 0

    def answered(self, method: str, response: requests.Response) -> None:
        """Note the provider's answer; raise GarbageError if it is a page, which libcloud would often take for a yes."""
        if response.status_code >= 400:
            self.words = response.text[:_LAST_CHARACTERS]
        elif "html" in response.headers.get("Content-Type", "") and "<" in response.text[:_LAST_CHARACTERS]:
            raise GarbageError(f"a web page: {readable(response.text[:_LAST_CHARACTERS])}")
        elif method.upper() == "GET":
            self.reads += 1
        else:
            self.changes.append(response.text[:_LAST_CHARACTERS])


class Kit:
    """One thread's driver object, its connections, and the call that it is used for."""

    def __init__(self, make: Callable[[], Any], ca_file: str) -> None:
        self.call = Call()
        self.ca_file = ca_file
        self.sessions: list[Any] = []
        self.driver = make()
        for connection in vars(self.driver).values():
            if isinstance(connection, Connection):
                first = connection.connection
                if isinstance(first, LibcloudConnection) and first.session is not None:
                    first.session.close()
                # OpenStack's take other connections when they know the endpoints: of this class too.
                connection.conn_class = functools.partial(_Guarded, self)  # type: ignore[assignment]
                connection.connection = None

    def close(self) -> None:
        """Close all connections."""
        for session in self.sessions:
            session.close()


class _Guarded(LibcloudConnection):
    """A connection whose requests end when their call does."""

    def __init__(self, kit: Kit, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._kit = kit
        if kit.ca_file:
            self.ca_cert = kit.ca_file
        self._session: Any = self.session
        kit.sessions.append(self._session)

    def request(self, method: str, *args: Any, **kwargs: Any) -> None:
        call = self._kit.call
        self._session.timeout = call.left_s()  # libcloud hands it on
        call.words = ""
        super().request(method, *args, **kwargs)  # type: ignore[no-untyped-call]
        response: Any = self.response
        call.answered(method, response)


class _Lock:
    """A lock that can be referred to weakly."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


_locks: weakref.WeakValueDictionary[str, _Lock] = weakref.WeakValueDictionary()


class Threads:
    """The threads of one account."""

    def __init__(
        self, make: Callable[[], Any], *, name: str, count: int, deadline_s: float, renews: bool, ca_file: str
    ) -> None:
        self._make, self._ca_file = make, ca_file
        self._name, self._count = name, count
        self._deadline_s = deadline_s
        self._renews = renews
        self._pool = ThreadPoolExecutor(count, f"cloud-{name}")
        self._local = threading.local()
        self._kits: set[Kit] = set()
        self._running: set[Future[Any]] = set()

    async def run(self, act: Callable[[Any, Call], T], *, alone: str = "") -> T:
        """Run `act` with a driver object in a thread; raise what it raises as an error of ours.

        Calls of this process with the same `alone` follow each other, also if their callers have gone.
        """
        call, loop = Call(), asyncio.get_running_loop()
        lock = _locks.setdefault(alone, _Lock()) if alone else None
        future: Future[T] | None = None
        try:
            async with asyncio.timeout(REQUESTS * self._deadline_s) as limit:

                def limit_now() -> None:
                    if not (call.given_up or limit.expired()):
                        limit.reschedule(loop.time() + REQUESTS * self._deadline_s)

                def work() -> T:
                    with self._alone(lock):
                        call.begin(self._deadline_s)
                        loop.call_soon_threadsafe(limit_now)
                        return self._translated(act, call)

                future = self._pool.submit(work)
                self._running.add(future)
                future.add_done_callback(self._running.discard)
                return await asyncio.wrap_future(future)
        except TimeoutError as exc:
            if future is not None and future.cancelled():
                raise CloudBusyError(f"cloud {self._name}: all {self._count} threads are busy") from exc
            raise DeadlineError(f"cloud {self._name}: no answer in {REQUESTS * self._deadline_s:g} s") from exc
        finally:
            call.given_up = True

    async def close(self) -> None:
        """Wait for requests under way, for as long as one may take, and close all connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        running = [asyncio.wrap_future(future) for future in list(self._running)]
        if running:
            await asyncio.wait(running, timeout=self._deadline_s)
        for kit in list(self._kits):
            kit.close()

    @contextlib.contextmanager
    def _alone(self, lock: _Lock | None) -> Any:
        if lock is None:
            yield
            return
        if not lock.lock.acquire(timeout=REQUESTS * self._deadline_s):
            raise DeadlineError(f"cloud {self._name}: the same request is still under way")
        try:
            yield
        finally:
            lock.lock.release()

    def _translated(self, act: Callable[[Any, Call], T], call: Call) -> T:
        try:
            return self._renewed(act, call)
        except ConpaasError:
            raise
        except requests.RequestException as exc:  # its text quotes the URL, and EC2's holds the user data
            raise translate(exc, cloud=self._name, words=call.words) from None
        except Exception as exc:  # libcloud raises anything: bare ones too, and whatever reading garbage gives
            raise translate(exc, cloud=self._name, words=call.words) from exc

    def _renewed(self, act: Callable[[Any, Call], T], call: Call) -> T:
        """Act; once more with a fresh login if the provider refuses the token of an old one: nothing has happened."""
        try:
            return self._act(act, call)
        except BaseHTTPError as exc:
            if not self._renews or not is_code(exc, 401):
                raise
        return self._act(act, call)

    def _act(self, act: Callable[[Any, Call], T], call: Call) -> T:
        """Act with the thread's driver object. It is not used again after an error that may have left it in a mess."""
        kit: Kit | None = getattr(self._local, "kit", None)
        if kit is None:
            kit = self._local.kit = Kit(self._make, self._ca_file)
            self._kits.add(kit)
        kit.call = call
        try:
            return act(kit.driver, call)
        except Exception as exc:
            clean = isinstance(exc, ConpaasError) or (isinstance(exc, BaseHTTPError) and not is_code(exc, 401))
            if not clean:
                self._local.kit = None
                self._kits.discard(kit)
                kit.close()
            raise
