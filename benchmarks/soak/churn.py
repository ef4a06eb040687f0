"""Many connections that come and go, politely and not: the gateway must be as it was before.

    python -m soak.churn --connections 100000

Fails if a descriptor is left, or more than 5 MiB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from typing import TYPE_CHECKING

from soak.ground import MIB, allow_descriptors, ground, reset
from tensorwire_protocol.codec import encode
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from soak.ground import Ground

MOST_GROWTH_BYTES = 5 * MIB
_WARM_SHARE = 0.1
_SETTLE_S = 15.0  # closed connections may wait 5 s for their peers, lost streams as long for theirs


def _ask() -> bytes:
    request = Request(
        stream=1,
        op="generate",
        key=os.urandom(16),
        model="oracle",
        inputs={"prompt": "x"},
        params={"max_new_tokens": 4},
    )
    return b"".join(encode(request, CLIENT_LINK))


def polite(place: Ground) -> None:
    """Log in and leave."""
    place.log_in().close()


def busy(place: Ground) -> None:
    """Leave with a request under way."""
    with place.log_in() as sock:
        sock.sendall(_ask())


def rude(place: Ground) -> None:
    """Log in and reset the connection."""
    reset(place.log_in())


def mute(place: Ground) -> None:
    """Leave without a word."""
    place.connect().close()


def stranger(place: Ground) -> None:
    """Say something else and wait to be told so."""
    with place.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while sock.recv(4096):
            pass


def unfinished(place: Ground) -> None:
    """Leave in the middle of a frame."""
    with place.connect() as sock:
        sock.sendall(place.greeting() + _ask()[:-3])


VISITS: list[Callable[[Ground], None]] = [polite, busy, polite, rude, mute, stranger, unfinished]


def visit(place: Ground, visits: Iterator[Callable[[Ground], None]], count: int) -> None:
    """Come and go `count` times."""
    for each in itertools.islice(visits, count):
        each(place)


def settled(place: Ground, num_descriptors: int) -> tuple[int, int]:
    """Return memory and descriptors, as soon as the latter are as few as they were."""
    until = time.monotonic() + _SETTLE_S
    while place.num_descriptors > num_descriptors and time.monotonic() < until:
        time.sleep(0.1)
    return place.rss_bytes, place.num_descriptors


def soak(place: Ground, num_connections: int) -> bool:
    """Come and go; print and judge what is left."""
    visits = itertools.cycle(VISITS)
    before = place.num_descriptors
    visit(place, visits, int(num_connections * _WARM_SHARE))
    rss, num_descriptors = settled(place, before)
    began_cpu_s = place.cpu_s
    visit(place, visits, num_connections)
    cpu_us = (place.cpu_s - began_cpu_s) / num_connections * 1e6
    rss_after, num_descriptors_after = settled(place, num_descriptors)
    print(
        f"churn connections={num_connections} cpu_us_each={cpu_us:.0f}"
        f" grown_kib={(rss_after - rss) / 1024:.0f} rss_mib={rss_after / MIB:.1f}"
        f" descriptors={num_descriptors}->{num_descriptors_after}"
    )
    return rss_after - rss <= MOST_GROWTH_BYTES and num_descriptors_after <= num_descriptors


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=100_000)
    given = parser.parse_args()
    allow_descriptors(4096)
    # Outcomes are kept by design; here they would look like a leak.
    with ground("oracle:", "--set", "outcomes.keys=100") as place:
        sys.exit(0 if soak(place, given.connections) else 1)


if __name__ == "__main__":
    main()
