"""What this node uses: processor, memory, disk, read from /proc."""

import os
import shutil
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage:
    """Share of one core since the last reading, resident bytes, and free bytes of the disk.

    Counts the processes of our own user that /proc shows: inside an instance those are the instance's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before: tuple[float, int] | None = None

    def read(self, now: float) -> dict[str, float]:
        """Return `cpu`, `memory` and `disk_free`; `now` in seconds of any steady clock."""
        ticks, pages = 0, 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if path.stat().st_uid == os.geteuid():
                    fields = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
                    ticks += int(fields[11]) + int(fields[12])
                    pages += int(fields[21])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
        cpu = 0.0
        if self._before is not None and now > self._before[0]:
            cpu = max(0.0, (ticks - self._before[1]) / _TICKS / (now - self._before[0]))
        self._before = (now, ticks)
        free = shutil.disk_usage(self._directory).free
        return {"cpu": round(cpu, 4), "memory": float(pages * _PAGE), "disk_free": float(free)}
