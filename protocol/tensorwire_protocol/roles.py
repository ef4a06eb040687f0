"""Which end of which link may send what, what kinds do, and the states of a connection.

Before Python 3.12 a member of an enum is looked up by a function of its class, at eight times the
price of a module's name (measured: 144 and 18 ns). So what is asked for with every frame or request
is kept in a name of the module that asks; and kinds are compared as plain ints. What a kind is
stands in tables of 256 bytes: to look there takes a few instructions, in a set a call.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from tensorwire_protocol.messages import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable


class Role(Enum):
    """Which end of which link this is."""

    CLIENT = "client"
    SERVER = "server"  # a gateway towards its clients
    DISPATCHER = "dispatcher"  # a gateway towards a worker
    WORKER = "worker"


class State(Enum):
    """Where the connection is in its life."""

    PREFACE = "preface"
    HANDSHAKE = "handshake"
    CONNECTING = "connecting"
    AUTHENTICATING = "authenticating"
    OPEN = "open"
    CLOSED = "closed"


def _ints(kinds: Iterable[Kind]) -> frozenset[int]:
    return frozenset(map(int, kinds))


_BOTH = {Kind.AUTH, Kind.PING, Kind.PONG, Kind.GOAWAY, Kind.ERR, Kind.DATA}
_ANSWERS = {Kind.WELCOME, Kind.ACK, Kind.RES, Kind.END}
ACCEPTS: Final[dict[Role, frozenset[int]]] = {
    Role.CLIENT: _ints(_BOTH | _ANSWERS | {Kind.CREDIT, Kind.EVT, Kind.EVB}),
    Role.SERVER: _ints(_BOTH | {Kind.HELLO, Kind.CREDIT, Kind.REQ, Kind.CANCEL, Kind.RESUME}),
    Role.DISPATCHER: _ints(_BOTH | _ANSWERS | {Kind.STEP, Kind.HEARTBEAT, Kind.SHM}),
    Role.WORKER: _ints(
        _BOTH | {Kind.HELLO, Kind.SUBMIT, Kind.CANCEL, Kind.DRAIN, Kind.LOAD, Kind.SHM}
    ),
}


def _table(kinds: Iterable[int]) -> bytes:
    """Return a table that has a 1 in the place of each of the kinds."""
    chosen = {*kinds}
    return bytes(kind in chosen for kind in range(256))


ACCEPTED: Final = {role: _table(kinds) for role, kinds in ACCEPTS.items()}
OPENINGS: Final = _table({Kind.REQ, Kind.RESUME, Kind.SUBMIT})  # each begins a stream
ENDINGS: Final = _table({Kind.RES, Kind.END, Kind.ERR})  # each ends one
NOT_BUILT: Final = _table({Kind.AUTH, Kind.LOAD})  # once a connection is open
OF_BODIES: Final = _table({Kind.DATA, Kind.CREDIT, Kind.SHM})
# These speak of the connection, so their stream is 0.
STREAMLESS: Final = _table(
    {
        Kind.HELLO, Kind.WELCOME, Kind.AUTH, Kind.PING, Kind.PONG, Kind.GOAWAY, Kind.EVB,
        Kind.STEP, Kind.HEARTBEAT, Kind.DRAIN, Kind.LOAD,
    }
)  # fmt: skip
PEER: Final = {
    Role.CLIENT: Role.SERVER,
    Role.SERVER: Role.CLIENT,
    Role.DISPATCHER: Role.WORKER,
    Role.WORKER: Role.DISPATCHER,
}
OPENERS: Final = frozenset({Role.CLIENT, Role.DISPATCHER})  # the side that connects and asks
WORKER_ROLES: Final = frozenset({Role.DISPATCHER, Role.WORKER})  # the two ends of a worker link
