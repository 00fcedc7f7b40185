"""A Python that has started already: gives each call of a host a fork of itself, as if it were a new one.

    TOKEN=… python3 -I _ssh_python.py DESCRIPTOR PROGRAM

Whoever connects at DESCRIPTOR says in three lines the token, for anybody may connect, which host it is, and what is to
be run: `python3 -I -c …`; from then on the connection is that program's input and output. Starting a Python and what
PROGRAM imports takes 50 ms of the processor, a fork 3, and the contract suite makes more than a thousand calls.
"""

import os
import shlex
import socket
import sys
import traceback
from pathlib import Path
from types import CodeType
from typing import Any


def serve(server: socket.socket, source: bytes) -> None:
    """Fork for each connection, until we are killed."""
    program = compile(source, "conpaas", "exec")
    exec(program, {"__name__": "for its imports alone"})
    while True:
        peer, _ = server.accept()
        if os.fork() == 0:
            server.close()
            be(peer, source, program)
        peer.close()
        while _reaped():
            pass


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def be(peer: socket.socket, source: bytes, program: CodeType) -> None:
    """Be the Python that is asked for; `program`, if that is what it is to run, need not be compiled again."""

    def compiled(text: bytes, *words: Any) -> Any:
        return program if text == source else compile(text, *words)

    try:
        with peer, peer.makefile("rb", buffering=0) as lines:
            token, host, command = (lines.readline().decode().rstrip("\n") for _ in range(3))
            if token != os.environ.pop("TOKEN"):
                sys.exit()
            for descriptor in range(3):
                os.dup2(peer.fileno(), descriptor)
        os.environ.update(HOST=host, HOME=host, PATH=f"{host}/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        os.chdir(host)
        sys.executable = f"{host}/bin/python3"
        _python, _isolated, _c, loader, *words = shlex.split(command)
        sys.argv = ["-c", *words]
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - until we end
        exec(loader, {"__name__": "__main__", "compile": compiled})
    except SystemExit:
        pass
    except BaseException:  # noqa: BLE001 - the end of this process, told as Python would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]).read_bytes())
