"""Start of a manager or agent on its instance: read the context, run the process, leave with an exit code.

Kept apart from the command line so that the daemons load nothing that they do not need.
"""

import asyncio
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from conpaas.core import footprint, logs, plugins, release, tasks
from conpaas.core._boot_stages import Stages
from conpaas.core.errors import BadInputError, PeerError
from conpaas.core.messages.base import from_peer
from conpaas.core.messages.internal import Context
from conpaas.core.process import Process

PROCESSES = {"manager": "conpaas.manager.app:Manager", "agent": "conpaas.agent.app:Agent"}

log = structlog.get_logger()


def main(kind: str, context_path: str, *, stages: Stages | None = None) -> None:
    """Run the daemon `kind` on the instance whose context document is at `context_path`, until it is stopped.

    Its folder is the context's. `stages` are those of the boot that it ends. Raises BadInputError for another kind; an
    error of the daemon ends this process with exit code 1 and one line in the log.
    """
    if kind not in PROCESSES:
        raise BadInputError(f"there is no daemon '{kind}'", value=kind, hint="one of: " + ", ".join(PROCESSES))
    logs.set_up()
    path = Path(context_path).resolve()
    context = from_peer(Context, path.read_bytes())
    structlog.contextvars.bind_contextvars(service=context.service, instance=context.instance)
    release.begin(path.parent)
    successor = asyncio.run(_run(kind, context, path.parent, stages))
    if successor is not None:
        release.become(successor)


async def _run(kind: str, context: Context, directory: Path, stages: Stages | None) -> list[str] | None:
    """Run the daemon to its end; return what this process is to become then, None if nothing."""
    beside = tasks.Background()
    try:
        if not context.address:
            context = context.model_copy(update={"address": address_towards(context.director)})
        process = plugins.load(PROCESSES[kind])(context, directory)
        footprint.loaded()
        beside.start("tell-supervisor", _tell_supervisor(process))
        if stages is not None:
            beside.start("tell-boot", stages.accompany(process.member))
        await process.run()
        successor: list[str] | None = process.successor
    except Exception as exc:  # the end of the process: said in one line, its supervisor starts it again
        log.exception("daemon-ended", error=str(exc))
        if stages is not None:
            stages.failed(str(exc))
            await beside.close()
            await stages.last_words(context, directory)
        sys.exit(1)
    finally:
        await beside.close()
    return successor


async def _tell_supervisor(process: Process) -> None:
    """Tell systemd, if it wants to know, that the process serves: sd_notify(3)."""
    await process.ready.wait()
    name = os.environ.get("NOTIFY_SOCKET")
    if name:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
            supervisor.connect(f"\0{name[1:]}" if name.startswith("@") else name)
            supervisor.send(b"READY=1")


def address_towards(url: str) -> str:
    """Return the address of this machine from which it reaches the host of `url`. Nothing is sent.

    Raises PeerError if its name is not known, or no way leads there.
    """
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 443
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as exc:
        raise PeerError(f"no way leads to {host}: {exc}", value=host) from exc
