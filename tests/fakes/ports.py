"""Ports for servers that must be told their number."""

import socket

_reserved: list[socket.socket] = []


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody else is given for as long as this process lasts.

    A socket is bound to it that does not listen: the kernel gives the port to nobody who asks for any, who connects
    to it is refused, and a server that asks for this number (with SO_REUSEADDR, as all of ours do) gets it.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _reserved.append(holder)
    port: int = holder.getsockname()[1]
    return port
