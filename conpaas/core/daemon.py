"""Start of a manager or agent on its instance: read the context, run the process, leave with an exit code.

Kept apart from the command line so that the daemons load nothing that they do not need.
"""

import asyncio
import sys
from pathlib import Path

import structlog

from conpaas.core import logs, plugins
from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import from_peer
from conpaas.core.messages.internal import Context

PROCESSES = {"manager": "conpaas.manager.app:Manager", "agent": "conpaas.agent.app:Agent"}

log = structlog.get_logger()


def main(kind: str, context_path: str) -> None:
    """Run the daemon `kind` on the instance whose context document is at `context_path`, until it is stopped.

    Its folder is the context's. Raises BadInputError for another kind; an error of the daemon ends this process with
    exit code 1 and one line in the log.
    """
    if kind not in PROCESSES:
        raise BadInputError(f"there is no daemon '{kind}'", value=kind, hint="one of: " + ", ".join(PROCESSES))
    logs.set_up()
    path = Path(context_path).resolve()
    context = from_peer(Context, path.read_bytes())
    structlog.contextvars.bind_contextvars(service=context.service, instance=context.instance)
    asyncio.run(_run(kind, context, path.parent))


async def _run(kind: str, context: Context, directory: Path) -> None:
    process = plugins.load(PROCESSES[kind])(context, directory)
    try:
        await process.run()
    except Exception as exc:  # the end of the process: said in one line, its supervisor starts it again
        log.exception("daemon-ended", error=str(exc))
        sys.exit(1)
