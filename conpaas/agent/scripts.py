"""The user's own scripts (S122): one when an instance starts, one before it stops, with deadlines.

Their output stands in the node's log `scripts.log`. A script whose first line names an interpreter (`#!…`) runs under
it, any other under `/bin/sh`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import structlog

from conpaas.core import files, run
from conpaas.core.errors import CommandFailedError
from conpaas.core.messages.agent import Prepare

log = structlog.get_logger()


class Scripts:
    """The scripts of one instance. The start script runs once in the instance's life, also if it fails."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "scripts"
        self._log = directory / "scripts.log"
        self.busy = False
        """One of them runs."""

    @property
    def prepared(self) -> bool:
        """Whether the start script has run, or there was none."""
        return (self._directory / "prepared").exists()

    async def start(self, given: Prepare, env: Mapping[str, str]) -> None:
        """Keep both scripts; run the start script if it has not run on this instance.

        Raises CommandFailedError if it fails or exceeds its deadline; it is not run again then either.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._directory / "stop", given.stop_script, mode=0o700)
        if self.prepared:
            return
        files.write_atomically(self._directory / "start", given.start_script, mode=0o700)
        files.write_atomically(self._directory / "prepared", "")
        await self._run("start", given.timeout_s, env)

    async def stop(self, timeout_s: float, env: Mapping[str, str]) -> None:
        """Run the stop script; that it fails is logged and holds nothing up."""
        try:
            await self._run("stop", timeout_s, env)
        except CommandFailedError as exc:
            log.warning("stop-script-failed", error=exc.message)

    async def _run(self, name: str, timeout_s: float, env: Mapping[str, str]) -> None:
        path = self._directory / name
        if not path.exists() or not path.read_text().strip():
            return
        interpreted = path.read_text().startswith("#!")
        argv = [str(path)] if interpreted else ["/bin/sh", str(path)]
        inherited = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._directory)}
        with self._log.open("a") as output:
            output.write(f"--- {name} script\n")
        self.busy = True
        try:
            done = await run.run(argv, timeout_s=timeout_s, cwd=self._directory, env={**inherited, **env}, check=False)
        except CommandFailedError as exc:
            self._append(exc.message)
            raise CommandFailedError(f"the {name} script: {exc.message}", value=name) from exc
        finally:
            self.busy = False
        self._append((done.stdout + done.stderr).decode("utf-8", "replace"))
        self._append(f"--- {name} script: exit code {done.returncode}")
        if done.returncode != 0:
            raise CommandFailedError(
                f"the {name} script exited with code {done.returncode}",
                value=name,
                hint="its output is in scripts.log",
            )

    def _append(self, text: str) -> None:
        with self._log.open("a") as output:
            output.write(text.rstrip("\n") + "\n")
