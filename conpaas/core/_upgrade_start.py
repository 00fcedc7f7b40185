"""Which version of a daemon is to run: looked up at its very start, before anything that could be broken is imported.

Standard library alone. A versions folder holds `<sha256>/`, the link `current`, and while a version has yet to prove
itself `trial.json`; `failed.json` says by hash why a version is not to be tried again.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

TRIAL_S = 300
"""How long a new version may take until it serves; restoring the roles of a node is part of it."""
CURRENT, TRIAL, FAILED = "current", "trial.json", "failed.json"


def begin(versions: Path, running: str) -> None:
    """Become the version that is to run; return if it is `running` (empty: the installation).

    The version on trial has one start, and TRIAL_S seconds, to `settle`; at the next start the one before is taken
    again. Whoever supervises the daemon sees it end and starts it anew, as ever.
    """
    chosen, trial = current(versions), read(versions / TRIAL)
    if trial and trial["sha256"] == chosen:
        if trial["started"]:
            become(roll_back(versions, trial))
        if chosen == running:
            write(versions / TRIAL, {**trial, "started": True})
            signal.alarm(TRIAL_S)  # the kernel's: it ends also what hangs
    if chosen not in {"", running}:
        become(command(versions, chosen))


def current(versions: Path) -> str:
    """Return the hash of the chosen version; empty if there is none, or it is not there."""
    link = versions / CURRENT
    return link.readlink().name if link.is_symlink() and link.is_dir() else ""


def command(versions: Path, sha256: str) -> list[str]:
    """Return the argument list that starts this daemon from an unpacked version."""
    return [sys.executable, "-I", str(versions / sha256), *sys.argv[1:]]


def settle(versions: Path) -> None:
    """Note that the running version serves: it is on trial no more."""
    signal.alarm(0)
    (versions / TRIAL).unlink(missing_ok=True)


def roll_back(versions: Path, trial: dict[str, Any]) -> list[str]:
    """Choose the version before the one on trial, which is not tried again; return how to start it."""
    reason = f"it did not serve within {TRIAL_S} s of its first start"
    write(versions / FAILED, {**read(versions / FAILED), trial["sha256"]: reason})
    choose(versions, trial["previous"])
    (versions / TRIAL).unlink(missing_ok=True)
    before: list[str] = trial["command"]
    return before


def choose(versions: Path, sha256: str) -> None:
    """Let `current` lead to an unpacked version from now on, empty: to none; atomic."""
    if not sha256:
        (versions / CURRENT).unlink(missing_ok=True)
        return
    fresh = versions / f".new-{CURRENT}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(sha256)
    fresh.replace(versions / CURRENT)


def become(argv: list[str]) -> NoReturn:
    """Replace this process: same id, same children, the program of `argv`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(argv[0], argv)  # noqa: S606 - an argument list, built by us


def read(path: Path) -> dict[str, Any]:
    """Return a JSON document; an empty one if it is missing or damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document, whole, also after a power cut."""
    fresh = path.with_name(f".new-{path.name}")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
