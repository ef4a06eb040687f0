"""The least an echo can be: a blocking socket that sends back what it gets. Usage: PORT"""

from __future__ import annotations

import socket
import sys
import threading


def echo(sock: socket.socket) -> None:
    """Send everything back until the peer ends."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(1 << 16))
    with sock:
        while num_bytes := sock.recv_into(buffer):
            sock.sendall(buffer[:num_bytes])


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
