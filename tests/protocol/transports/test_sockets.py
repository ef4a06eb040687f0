from __future__ import annotations

import contextlib
import socket

import pytest
from tensorwire_protocol.transports.sockets import UNSENT_BYTES, limit_unsent

MIB = 1024 * 1024

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no such option"
)


def taken_by_the_kernel(*, is_limited: bool) -> int:
    """Return how many bytes an accepted connection takes whose peer reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as peer:
        if is_limited:
            limit_unsent(listener)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        peer.connect(listener.getsockname())
        sock, _ = listener.accept()
        with sock, contextlib.suppress(BlockingIOError):
            sock.setblocking(False)
            taken = 0
            while True:
                taken += sock.send(bytes(16 * 1024))
    return taken


def test_what_a_peer_does_not_take_waits_in_our_queues_and_not_in_the_kernel() -> None:
    assert taken_by_the_kernel(is_limited=True) < UNSENT_BYTES + 512 * 1024
    assert taken_by_the_kernel(is_limited=False) > 2 * MIB
