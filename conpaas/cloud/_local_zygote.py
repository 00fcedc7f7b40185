"""A helper process that has loaded the daemons' code, and forks local instances: they start without waiting for Python.

Single-threaded, never runs an event loop, knows no secrets, and ends when its driver does; its instances live on.
Each request is one packet: a specification as JSON, with the descriptors of the instance's claim and of a pipe that
takes the answer (`_local_init.launch`).
"""

import gc
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import conpaas
from conpaas.cloud import _local_init as init
from conpaas.core import plugins, service

DAEMON = "conpaas.core.daemon:main"
_PACKET_BYTES = 128 * 1024


def code_stamp() -> str:
    """Return a text that changes whenever the installed code does."""
    newest, count = 0, 0
    for folder, _, names in os.walk(Path(conpaas.__file__).parent):
        for name in names:
            if name.endswith(".py"):
                newest = max(newest, Path(folder, name).stat().st_mtime_ns)
                count += 1
    return f"{count}-{newest}"


def preload(modules: Sequence[str]) -> None:
    """Import the daemons' modules and, as far as they can be, both halves of every service type."""
    for name in modules:
        importlib.import_module(name)
    try:
        for kind in plugins.discover(service.PACKAGE, "SERVICE", service.ServiceType).values():
            for reference in (kind.planner, *kind.agents.values()):
                importlib.import_module(reference.partition(":")[0])
    except Exception:  # noqa: BLE001 - a broken plug-in breaks its own instances, not those of the others
        sys.excepthook(*sys.exc_info())


def serve(channel: socket.socket) -> None:
    """Fork an instance per request until the driver closes the channel."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the launchers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.disable()
    gc.freeze()  # what all instances share is not written to by their collectors
    zygote = os.getpid()
    while True:
        packet, descriptors, _, _ = socket.recv_fds(channel, _PACKET_BYTES, 2)
        if not packet:
            return
        if os.fork() == 0:
            channel.close()
            _fork_instance(packet, descriptors, zygote)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_instance(packet: bytes, descriptors: list[int], zygote: int) -> None:
    claim, reply = descriptors
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        gc.enable()
        init.launch(init.Spec.read(packet), claim, reply, partial(_run_daemon, zygote=zygote))
    except BaseException:  # noqa: BLE001 - the end of this fork, told in the zygote's log
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _run_daemon(spec: init.Spec, zygote: int) -> None:
    """Become the daemon; by executing it if its code has been replaced, or if OpenSSL cannot tell that it was forked.

    OpenSSL knows by the process id whether its random state is shared, and a new PID namespace has any id again.
    """
    if spec.stamp != code_stamp() or os.getpid() == zygote:
        init.execute(spec)
    sys.argv = list(spec.argv)
    init.retitle(spec.mark, ["conpaas", "run", spec.kind, "--context", spec.context])
    plugins.load(DAEMON)(spec.kind, spec.context)


def main() -> None:
    """Serve the channel whose descriptor is the first argument; the second is room for a title, the rest modules."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    modules = sys.argv[3:]
    init.retitle(init.placeholder(), ["conpaas-zygote"])
    sys.modules["rich"] = None  # type: ignore[assignment]  # structlog loads it if it can: 5 MB for every instance
    preload(modules)
    if threading.active_count() > 1:
        raise RuntimeError(f"a preloaded module started threads: {threading.enumerate()}")
    serve(channel)


if __name__ == "__main__":
    main()
