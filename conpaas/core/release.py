"""How a manager or agent follows its director to a newer version, without its engines noticing.

What fetches and tries out a version (`core.upgrade`) is loaded only when there is one: most daemons never need it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

import structlog

from conpaas import __version__
from conpaas.core import plugins
from conpaas.core.member import Member
from conpaas.core.messages.internal import DOWNLOAD_BUNDLE, READ_RELEASE, Release

log = structlog.get_logger()

_UPGRADE = "conpaas.core.upgrade:"
_VERSIONS = "versions"


def newer(version: str, than: str) -> bool:
    """Tell whether one version of ours, `major.minor.patch`, is newer than another; one of no such form never is."""
    try:
        return _parts(version) > _parts(than)
    except ValueError:
        return False


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def begin(directory: Path) -> None:
    """Become the version that was chosen for the daemon whose folder is `directory`; return if it is this one."""
    if (directory / _VERSIONS).is_dir():
        plugins.load(f"{_UPGRADE}begin")(directory)


def become(argv: list[str]) -> NoReturn:
    """Replace this process by the program of `argv`: same id, same children."""
    plugins.load(f"{_UPGRADE}become")(argv)
    raise AssertionError("unreachable")


class Follower:
    """Brings one daemon to its director's version. `busy` tells whether something is under way that must not be cut."""

    def __init__(self, member: Member, directory: Path, stop: asyncio.Event, busy: Callable[[], bool]) -> None:
        self._member, self._directory, self._stop, self._busy = member, directory, stop, busy
        self.successor: list[str] | None = None
        """What this process is to become when it has stopped: an argument list. None: it just ends."""

    def settle(self) -> None:
        """Note that this version serves: it stays."""
        if (self._directory / _VERSIONS).is_dir():
            self._upgrader().settle()

    async def follow(self) -> None:
        """Become the director's version if that is newer: stop at a calm moment, and begin again as that.

        An instance that runs the director's own installation only stops: its supervisor starts what is installed now.
        """
        release: Release = await self._member.director.call(READ_RELEASE)
        if self._stop.is_set() or not newer(release.version, __version__):
            return
        upgrader = self._upgrader()
        if release.bundle and not await upgrader.prepare(release.bundle):
            return
        await upgrader.calm(self._busy)
        if release.bundle:
            self.successor = upgrader.arm(release.bundle)
        log.info("following", version=release.version, ours=__version__)
        self._stop.set()

    def _upgrader(self) -> Any:
        kind = plugins.load(f"{_UPGRADE}Upgrader")
        return kind(self._directory, download=self._download, clock=self._member.clock)

    async def _download(self, sha256: str) -> AsyncIterator[bytes]:
        async with self._member.director.stream(DOWNLOAD_BUNDLE, sha256=sha256) as response:
            async for chunk in response.content.iter_chunked(1 << 18):
                yield chunk
