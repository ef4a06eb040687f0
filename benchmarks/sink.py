"""A listener that does the least that any server must: accepts, reads, and cuts in the end.

    python sink.py --cut-after 4000000

Beside it a healthy client of another server shows what an attacker's process and the kernel take
from both, whoever is attacked: the control of `hostile.py`.
"""

from __future__ import annotations

import argparse
import selectors
import socket
from collections import Counter

from soak.ground import allow_descriptors, reset

_READ_BYTES = 256 * 1024  # as the gateway does
_BACKLOG = 1024


class Sink:
    """Reads what comes on every connection, and resets it after so many bytes (None: never)."""

    def __init__(self, listener: socket.socket, cut_after: int | None) -> None:
        self._cut_after = cut_after
        self._listener = listener
        self._buffer = bytearray(_READ_BYTES)
        self._num_bytes: Counter[socket.socket] = Counter()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until killed."""
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._listener:
                    self._accept()
                else:
                    self._read(sock)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, sock: socket.socket) -> None:
        try:
            count = sock.recv_into(self._buffer)
        except OSError:
            count = 0
        self._num_bytes[sock] += count
        if not count or (self._cut_after is not None and self._num_bytes[sock] >= self._cut_after):
            del self._num_bytes[sock]
            self._selector.unregister(sock)
            reset(sock)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cut-after", type=int, help="bytes of a connection; default: never")
    given = parser.parse_args()
    allow_descriptors(4096)
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        Sink(listener, given.cut_after).serve()


if __name__ == "__main__":
    main()
