"""The nginx of one role: started once, and never reloaded in its ordinary life.

A reload would close idle connections, and with them lose requests. So all that changes (the code, its front
controller, its closed folders, the PHP-FPM behind it) is found through symbolic links and marker files.
"""

import os
import resource
import signal

from conpaas.core import run
from conpaas.core.errors import PeerError
from conpaas.core.service import EngineSpec, Health, Host
from conpaas.services.php import node

ENGINE = "nginx"
PING = "/__conpaas/ping"
_FILES_MAX = 8192
_WORKERS_MAX = 4


async def ensure(host: Host, template: str, *, port: int) -> None:
    """Make nginx serve as `template` says, and return when it answers."""
    program = node.program("nginx", "nginx")
    for name in ("tmp", "run"):
        (host.directory / name).mkdir(exist_ok=True)
    most_files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], _FILES_MAX)
    text = node.render(
        template,
        directory=host.directory,
        logs=host.logs,
        address=host.address,
        port=port,
        workers=min(os.cpu_count() or 1, _WORKERS_MAX),
        files=most_files,
        connections=most_files // 2,
    )
    argv = (program, "-p", str(host.directory), "-c", "nginx.conf", "-e", str(host.logs / "nginx.log"))
    changed = node.write_if_changed(host.directory / "nginx.conf", text)
    started = await host.engines.ensure(EngineSpec(ENGINE, argv, host.directory))
    if changed and not started:  # only a newer ConPaaS comes here
        await run.run([*argv, "-t", "-q"], timeout_s=10, cwd=host.directory)
        host.engines.signal(ENGINE, signal.SIGHUP)
    await node.until_ready(host, ENGINE, lambda: node.get(host.address, port, PING))


async def health(host: Host, *, port: int) -> Health:
    """Ask nginx, and what stands behind it, with a real request."""
    try:
        await node.get(host.address, port, PING)
    except PeerError as exc:
        return Health(ok=False, detail=host.engines.trouble(ENGINE) or exc.message)
    return Health(ok=True)


async def stop(host: Host, drain_s: float) -> None:
    """Take no more connections, finish the requests under way, end."""
    await host.engines.stop(ENGINE, number=signal.SIGQUIT, timeout_s=drain_s)
