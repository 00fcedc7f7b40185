"""A daemon becomes another version of itself: fetched, tried out, taken at a calm moment, given up if it fails.

The process stays the same (`exec`): its engines are its children still, and its supervisor sees nothing. Versions are
bundles (`core.bundle`), unpacked below `versions` in the daemon's own folder; `_upgrade_start` tells what runs.

    upgrader.running   ──wanted by the director──▶  prepare: fetch, verify, unpack, import it once
    prepare            ──nothing is being applied──▶  arm: choose it, on trial; then stop, close all, `become`
    trial              ──it serves: `settle`──▶  kept            ──it ends, or hangs──▶  the one before, for good
"""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog

import conpaas
from conpaas.core import _upgrade_start as start
from conpaas.core import bundle, files, run
from conpaas.core._upgrade_start import become
from conpaas.core.clock import Clock
from conpaas.core.errors import BadArchiveError, CommandFailedError, ConflictError

__all__ = ["VERSIONS", "Upgrader", "become", "begin"]

VERSIONS = "versions"
"""Name of the versions folder in a daemon's own one."""
BUNDLE_LIMIT_BYTES = 256 * 1024**2
CALM_PERIOD_S = 0.2
_IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); import conpaas.agent.app, conpaas.manager.app"
_IMPORT_TIMEOUT_S = 120.0

Download = Callable[[str], AsyncIterator[bytes]]
"""Gives the content of the bundle with this SHA-256."""

log = structlog.get_logger()


def begin(directory: Path) -> None:
    """Become the chosen version, as the first act of a daemon whose own folder is `directory`; return if it is this.

    A bundle has done so by itself before anything of it was imported; here it is done for an installation.
    """
    versions = directory / VERSIONS
    if not _running(versions):
        start.begin(versions, "")


def _running(versions: Path) -> str:
    home = Path(conpaas.__file__).resolve().parent.parent
    return home.name if home.parent == versions.resolve() else ""


class Upgrader:
    """The versions of one daemon, whose own folder is `directory`."""

    def __init__(self, directory: Path, *, download: Download, clock: Clock) -> None:
        self.versions = directory / VERSIONS
        self._download, self._clock = download, clock
        self.running = _running(self.versions)
        """The hash of what runs; empty: an installation that is no bundle."""

    def failure(self, sha256: str) -> str:
        """Say why a version is not tried (again); empty if it may be."""
        return str(start.read(self.versions / start.FAILED).get(sha256, ""))

    async def prepare(self, wanted: str) -> bool:
        """Make the version `wanted` ready to start; return whether there is anything to change to.

        Repeats nothing that is done, nor what has failed for good: then the answer is no, and `failure` says why.
        Raises what the download raises, and DiskFullError.
        """
        if wanted == self.running or self.failure(bundle.checked(wanted)):
            return False
        target = self.versions / wanted
        try:
            if not target.is_dir():
                await self._fetch(wanted)
            await run.run([sys.executable, "-I", "-c", _IMPORT, str(target)], timeout_s=_IMPORT_TIMEOUT_S)
        except (BadArchiveError, ConflictError, CommandFailedError) as exc:
            await self._give_up(wanted, exc.message)
            return False
        return True

    async def _fetch(self, wanted: str) -> None:
        self.versions.mkdir(mode=0o755, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.versions) as folder:
            stream = self._download(wanted)
            await files.receive_blob(stream, Path(folder), limit=BUNDLE_LIMIT_BYTES, expect_sha256=wanted)
            await asyncio.to_thread(bundle.unpack, Path(folder, wanted), self.versions, wanted)

    async def _give_up(self, wanted: str, reason: str) -> None:
        log.error("upgrade-refused", version=wanted, error=reason)
        start.write(self.versions / start.FAILED, {**start.read(self.versions / start.FAILED), wanted: reason})
        await asyncio.to_thread(shutil.rmtree, self.versions / wanted, ignore_errors=True)

    async def calm(self, busy: Callable[[], bool]) -> None:
        """Wait until nothing is under way that an end would cut off."""
        while busy():
            await self._clock.sleep(CALM_PERIOD_S)

    def arm(self, wanted: str) -> list[str]:
        """Choose a prepared version, on trial; return what to `become` when everything is closed."""
        before = start.current(self.versions)
        back = [sys.executable, *sys.orig_argv[1:]] if not self.running else start.command(self.versions, self.running)
        trial = {"sha256": wanted, "previous": before, "command": back, "started": False}
        start.write(self.versions / start.TRIAL, trial)
        start.choose(self.versions, wanted)
        log.info("upgrade", version=wanted, before=self.running or "the installation")
        return start.command(self.versions, wanted)

    def settle(self) -> None:
        """Note that this version serves: it stays. Versions other than it and the one before are removed."""
        before = str(start.read(self.versions / start.TRIAL).get("previous", ""))
        start.settle(self.versions)
        if before:
            for path in self.versions.glob("?" * 64):
                if path.name not in {before, self.running}:
                    shutil.rmtree(path, ignore_errors=True)
