"""Who may be connected: so many in all, of one source, and without a login. Pure.

A server that is full refuses the newest. Of those that have not logged in the oldest has to go: an
honest client is through in a moment, whoever is still there does not mean to be, and refusing the
newest would let strangers that say nothing keep everybody else out.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from tensorwire_protocol.errors import Busy

if TYPE_CHECKING:
    from tensorwire_protocol.errors import TensorwireError

    from tensorwire_server.config import ListenConfig

_SITE_BITS = 64  # of an IPv6 address: whoever has one has all of its /64


class Guest(Protocol):
    """A connection, from the moment it is accepted."""

    @property
    def is_stranger(self) -> bool:
        """Say if it is still to show who it is."""

    def fail(self, error: TensorwireError) -> None:
        """End it and tell the peer why, where it can be told."""


class Door:
    """Counts connections; each that `enter` was called with must `leave`."""

    def __init__(self, config: ListenConfig) -> None:
        self._config = config
        self._sources: dict[Guest, str] = {}
        self._num_of: Counter[str] = Counter()  # connections of each source
        self.num_refused = 0
        self._strangers: dict[Guest, None] = {}  # in order; some may have logged in meanwhile

    def enter(self, guest: Guest, source: str) -> None:
        """Let a new connection in, or close it or another one with BUSY.

        Args:
            source: whose it is, see `source_of`; empty for a peer on a Unix socket.
        """
        self._sources[guest] = source
        self._num_of[source] += 1
        try:
            self._check(source)
        except Busy as error:
            self._evict(guest, error)
        else:
            self._strangers[guest] = None
            if len(self._strangers) > self._config.max_unauthenticated:
                self._make_room()

    def leave(self, guest: Guest) -> None:
        """Forget a connection that is gone, if it is known."""
        source = self._sources.pop(guest, None)
        if source is None:
            return
        self._num_of[source] -= 1
        if not self._num_of[source]:
            del self._num_of[source]
        self._strangers.pop(guest, None)

    def _check(self, source: str) -> None:
        most = self._config.max_connections
        if len(self._sources) > most:
            raise Busy(f"the server has {most} connections, its limit; try again later")
        most_of_one = self._config.max_connections_per_source
        if source and most_of_one is not None and self._num_of[source] > most_of_one:
            raise Busy(f"the server takes {most_of_one} connections from one address")

    def _make_room(self) -> None:
        self._strangers = {guest: None for guest in self._strangers if guest.is_stranger}
        most = self._config.max_unauthenticated
        if len(self._strangers) > most:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            full = Busy(f"{most} newer connections have not logged in either; try again")
            self._evict(oldest, full)

    def _evict(self, guest: Guest, error: Busy) -> None:
        self.num_refused += 1
        guest.fail(error)

    def check_invariants(self) -> None:
        """All counts are those of the connections that are here."""
        assert self._num_of == Counter(self._sources.values())
        assert set(self._strangers) <= set(self._sources)


def source_of(peername: object) -> str:
    """Return what the connections of one peer have in common, from a socket's peer name."""
    if not isinstance(peername, tuple):
        return ""  # a Unix socket
    address = ipaddress.ip_address(peername[0].partition("%")[0])
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), _SITE_BITS), strict=False))
