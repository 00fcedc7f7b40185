"""A token bucket in the time of a `Clock`: calls wait their turn, in the order in which they came.

It is the generic cell rate algorithm in its form of virtual scheduling (ITU-T I.371): one number, when the next call
is due, in place of a count of tokens.
"""

import asyncio

from conpaas.core.clock import Clock


class TokenBucket:
    """Lets `per_s` calls through each second, and `burst` at once after a pause.

    A caller that comes late to its turn delays nobody after it, and one that gives up while it waits leaves its turn
    to the next.
    """

    def __init__(self, per_s: float, burst: int, clock: Clock) -> None:
        self.gap_s = 1 / per_s
        """Seconds between two turns."""
        self._slack_s = (max(1, burst) - 1) * self.gap_s
        self._clock = clock
        self._due = clock.monotonic() - self._slack_s
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Wait for a turn."""
        asked = self._clock.monotonic()
        async with self._turn:
            self._due = max(self._due, asked - self._slack_s)
            while (wait_s := self._due - self._clock.monotonic()) > 0:
                await self._clock.sleep(wait_s)
            self._due += self.gap_s

    def pause(self, pause_s: float) -> None:
        """Let nobody through for `pause_s` seconds, whoever waits already: the other side says that it is too much."""
        self._due = max(self._due, self._clock.monotonic() + pause_s)
