"""A proxy that resets connections behind chosen bytes."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST, and drops what was not sent


class Proxy:
    """Passes bytes on; each connection is reset behind so many bytes of one direction.

    Args:
        cuts: for each connection in turn, how many bytes go up (from the client) and down before
            the reset; None: all. Connections behind the last are left alone.
    """

    def __init__(self, address: str, cuts: list[tuple[int | None, int | None]]) -> None:
        self.num_connections = 0
        self.num_bytes = [0, 0]  # of the last connection: up, down
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._cuts = cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            number, self.num_connections = self.num_connections, self.num_connections + 1
            self.num_bytes = [0, 0]
            up, down = self._cuts[number] if number < len(self._cuts) else (None, None)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            for way, source, target, limit in ((0, near, far, up), (1, far, near, down)):
                thread = threading.Thread(
                    target=self._pump, args=(way, source, target, limit), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pump(
        self, way: int, source: socket.socket, target: socket.socket, limit: int | None
    ) -> None:
        left = limit
        with suppress(OSError):
            while left != 0:
                data = source.recv(65536 if left is None else left)
                if not data:
                    break
                target.sendall(data)
                self.num_bytes[way] += len(data)
                if left is not None:
                    left -= len(data)
        for sock in (source, target):
            with suppress(OSError):
                if left == 0:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    sock.shutdown(socket.SHUT_RD)  # only wakes the other direction's thread
            if left == 0:
                sock.close()
        if left != 0:
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in self._sockets:
            sock.close()
