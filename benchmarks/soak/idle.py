"""Many connections that have logged in and do nothing: what each costs the gateway.

    python -m soak.idle --connections 10000 --minutes 10

Fails if one costs more than 12 KiB, if any is lost, or if a request beside them is not answered.
"""

from __future__ import annotations

import argparse
import selectors
import sys
import time
from typing import TYPE_CHECKING

import tensorwire
from soak.ground import KIB, allow_descriptors, ground
from tensorwire_protocol.frames import HEADER_BYTES, build_frame
from tensorwire_protocol.messages import Kind

if TYPE_CHECKING:
    import socket

    from soak.ground import Ground

MOST_BYTES_EACH = 12 * KIB
_WARM = 200  # connections that come and go first, so that only what each one adds is measured
_PING_BYTES = HEADER_BYTES + 10


class Crowd:
    """Connections that answer PINGs and do nothing else."""

    def __init__(self) -> None:
        self.num_lost = self.num_pings = 0
        self._socks: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()

    def join(self, place: Ground, num_connections: int) -> None:
        """Make so many connections, and answer meanwhile: on a busy machine it takes a minute."""
        for i in range(num_connections):
            self._socks.append(place.log_in())
            self._selector.register(self._socks[-1], selectors.EVENT_READ)
            if i % 100 == 0:
                self.idle(0.001)

    def leave(self) -> None:
        """Close all connections."""
        for sock in self._socks:
            sock.close()

    def idle(self, seconds: float) -> None:
        """Let time pass."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 1.0)):
                self._hear(key.fileobj)  # type: ignore[arg-type]

    def _hear(self, sock: socket.socket) -> None:
        ping = sock.recv(4096)
        if len(ping) % _PING_BYTES or ping[4:5] != bytes([Kind.PING]):  # an error, or the end
            self.num_lost += 1
            self._selector.unregister(sock)
            return
        self.num_pings += len(ping) // _PING_BYTES
        sock.sendall(build_frame(Kind.PONG, 0, ping[HEADER_BYTES:_PING_BYTES]))


def soak(place: Ground, num_connections: int, minutes: float) -> bool:
    """Hold the connections; print and judge what they cost."""
    for sock in [place.log_in() for _ in range(_WARM)]:
        sock.close()
    before, began_cpu_s = place.rss_bytes, place.cpu_s
    crowd = Crowd()
    crowd.join(place, num_connections)
    crowd.idle(3.0)
    each = (place.rss_bytes - before) / num_connections
    idle_from_s, idle_from_cpu_s = time.monotonic(), place.cpu_s
    connect_us = (idle_from_cpu_s - began_cpu_s) / num_connections * 1e6
    crowd.idle(minutes * 60)
    idle_s = time.monotonic() - idle_from_s
    idle_share = (place.cpu_s - idle_from_cpu_s) / idle_s
    later = (place.rss_bytes - before) / num_connections
    with tensorwire.Client(place.address, token=place.token) as client:
        answered = client.generate("oracle", "still here", max_new_tokens=8).usage
    print(
        f"idle connections={num_connections} minutes={minutes:g} kib_each={each / KIB:.2f}"
        f" kib_each_at_the_end={later / KIB:.2f} cpu_us_to_connect={connect_us:.0f}"
        f" idle_cpu_share={idle_share:.3f} pings={crowd.num_pings} lost={crowd.num_lost}"
    )
    crowd.leave()
    is_cheap = max(each, later) <= MOST_BYTES_EACH
    return is_cheap and crowd.num_lost == 0 and answered.completion_tokens == 8


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    allow_descriptors(given.connections + 1000)
    most = given.connections + 100
    with ground("oracle:", "--set", f"listen.max_connections={most}") as place:
        sys.exit(0 if soak(place, given.connections, given.minutes) else 1)


if __name__ == "__main__":
    main()
