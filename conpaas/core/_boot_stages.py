"""How far a boot has come: a line on the console, and a report to the director as soon as it can be reached."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TextIO

import structlog

from conpaas.core import files
from conpaas.core.clock import Clock
from conpaas.core.errors import ConpaasError, PeerError
from conpaas.core.identity import Identity, client_context
from conpaas.core.member import Member
from conpaas.core.messages.internal import REPORT_BOOT, BootReport, Context
from conpaas.core.rpc import Client

log = structlog.get_logger()

LINE = "conpaas-boot:"
"""Begins every line on the console."""
DETAIL_CHARACTERS = 2000
RETRY_S = 2.0
LAST_WORDS_S = 5.0
"""How long a boot that failed may take to tell the director why."""


class Stages:
    """The stages of one boot: CONTEXT, NETWORK, ENROLLING and STARTING, or FAILED with the reason."""

    def __init__(self, console: TextIO, *, clock: Clock) -> None:
        self._console, self._clock = console, clock
        self._unreported: deque[tuple[str, str]] = deque()
        self._reached = ""

    def say(self, text: str) -> None:
        """Print one line on the console."""
        self._console.write(f"{LINE} {' '.join(text.split())}\n")
        self._console.flush()

    def reached(self, stage: str, detail: str) -> None:
        """Note that the boot has come to `stage`."""
        self._reached = stage
        self._note(stage, detail)

    def failed(self, reason: str) -> None:
        """Note why it does not get any further."""
        self._note("FAILED", f"after {self._reached}: {reason}" if self._reached else reason)

    def _note(self, stage: str, detail: str) -> None:
        self.say(f"{stage} {detail}")
        self._unreported.append((stage, detail[:DETAIL_CHARACTERS]))

    async def accompany(self, member: Member) -> None:
        """Report what was noted, and that `member` has enrolled."""
        async with _director(member.context, member.directory) as director, asyncio.TaskGroup() as group:
            early = group.create_task(self._report(director, member.context), name="report-boot")
            await member.enrolled.wait()
            self.reached("STARTING", f"the {member.context.kind} on {member.context.address}")
            await early
            await self._report(director, member.context)

    async def last_words(self, context: Context, directory: Path) -> None:
        """Report what was noted to a director that can be reached at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S), _director(context, directory) as director:
                await self._report(director, context)

    async def _report(self, director: Client, context: Context) -> None:
        """Report, in order, all that was not; a director that is away comes back."""
        while self._unreported:
            stage, detail = self._unreported[0]
            try:
                await director.call(REPORT_BOOT, BootReport(token=context.token, stage=stage, detail=detail))
            except PeerError:
                await self._clock.sleep(RETRY_S)
                continue
            except ConpaasError as exc:  # it knows enough, or is older than such reports
                log.debug("boot-not-reported", stage=stage, error=exc.message)
            self._unreported.popleft()


@contextlib.asynccontextmanager
async def _director(context: Context, directory: Path) -> AsyncIterator[Client]:
    """Give a connection to the director for one who has no certificate yet."""
    ca = directory / "boot-ca.crt"
    files.write_atomically(ca, context.ca, durable=False)
    name = Identity.director(context.deployment).host
    client = Client(context.director, tls=client_context(None, None, ca), server_hostname=name)
    try:
        yield client
    finally:
        await client.close()
