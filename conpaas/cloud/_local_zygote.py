"""A helper process that has loaded the daemons' code, and forks local instances: they start without waiting for Python.

Single-threaded, never runs an event loop, knows no secrets, and ends when its driver does; its instances live on.
Each request is one packet: a specification as JSON, with the descriptors of the instance's claim and of a pipe that
takes the answer (`_local_init.launch`).
"""

import gc
import importlib
import importlib.util
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Sequence
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
    """Import the daemons' modules and both halves of every service type."""
    for name in modules:
        importlib.import_module(name)
    for kind in plugins.discover(service.PACKAGE, "SERVICE", service.ServiceType).values():
        for reference in (kind.planner, *kind.agents.values()):
            importlib.import_module(reference.partition(":")[0])


def serve(channel: socket.socket) -> None:
    """Fork an instance per request until the driver closes the channel."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the launchers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.disable()
    gc.freeze()  # what all instances share is not written to by their collectors
    while True:
        packet, descriptors, _, _ = socket.recv_fds(channel, _PACKET_BYTES, 2)
        if not packet:
            return
        if os.fork() == 0:
            channel.close()
            _fork_instance(packet, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_instance(packet: bytes, descriptors: list[int]) -> None:
    claim, reply = descriptors
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        gc.enable()
        init.launch(init.Spec.read(packet), claim, reply, _run_daemon)
    except BaseException:  # noqa: BLE001 - the end of this fork, told in the zygote's log
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _run_daemon(spec: init.Spec) -> None:
    if spec.stamp != code_stamp():
        init.execute(spec)  # the code has been replaced since it was loaded
    seed = os.urandom(64)
    ssl.RAND_add(seed, len(seed))  # in a PID namespace OpenSSL may not notice that it was forked
    sys.argv = list(spec.argv)
    init.retitle(spec.id, ["conpaas", "run", spec.kind, "--context", spec.context])
    plugins.load(DAEMON)(spec.kind, spec.context)


def main() -> None:
    """Serve the channel whose descriptor is the first argument; the second is room for a title, the rest modules."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    modules = sys.argv[3:]
    init.retitle(init.placeholder(), ["conpaas-zygote"])
    preload(modules)
    if threading.active_count() > 1:
        raise RuntimeError(f"a preloaded module started threads: {threading.enumerate()}")
    serve(channel)


if __name__ == "__main__":
    main()
