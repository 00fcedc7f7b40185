"""A token bucket in the time of a `Clock`: calls wait their turn, in the order in which they came."""

from conpaas.core.clock import Clock


class TokenBucket:
    """Lets `per_s` calls through each second, and `burst` at once after a pause.

    A caller is told its turn when it asks (a virtual schedule), so that nobody polls and nobody overtakes. A caller
    that gives up while it waits leaves its turn unused.
    """

    def __init__(self, per_s: float, burst: int, clock: Clock) -> None:
        self._per_s, self._burst, self._clock = per_s, max(1, burst), clock
        self._tokens, self._at = float(self._burst), clock.monotonic()

    @property
    def gap_s(self) -> float:
        """Seconds between two turns."""
        return 1 / self._per_s

    async def take(self) -> None:
        """Wait for a turn."""
        self._fill()
        self._tokens -= 1
        if self._tokens < 0:
            await self._clock.sleep(-self._tokens / self._per_s)

    def pause(self, pause_s: float) -> None:
        """Let nobody who asks from now on through for `pause_s` seconds: the other side says that it is too much."""
        self._fill()
        self._tokens = min(self._tokens, 1 - pause_s * self._per_s)

    def _fill(self) -> None:
        now = self._clock.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
