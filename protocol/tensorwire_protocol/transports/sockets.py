"""What both ends ask of their sockets."""

from __future__ import annotations

import socket

UNSENT_BYTES = 128 * 1024


def limit_unsent(sock: socket.socket) -> None:
    """Keep what the peer has no room for in our queues, where small frames pass large ones.

    The kernel would take megabytes, and whatever is sent later waits behind them. Sockets that a
    listening one accepts inherit it.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
