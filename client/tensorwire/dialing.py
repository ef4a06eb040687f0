"""What making a connection needs on both kinds of socket: options, features, plain sentences."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tensorwire_protocol.bodies import FEATURE_BODY
from tensorwire_protocol.codec import PLAIN, Codec
from tensorwire_protocol.connection import FEATURE_PASSIVE, FEATURE_RESUME, Connection
from tensorwire_protocol.errors import (
    BadFraming,
    BadPreface,
    ConnectionLost,
    Executed,
    FrameTooLarge,
    HandshakeTimeout,
    SequenceError,
    TensorwireError,
    UnknownKind,
)
from tensorwire_protocol.pool import PooledMemory
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.sockets import limit_unsent

if TYPE_CHECKING:
    from tensorwire_protocol.login import Login

    from tensorwire.access import Access
    from tensorwire.address import Address

CONNECT_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 4  # for calls of one client; a server takes 512 at the same time on each
SOFTWARE = "tensorwire-python"
_POOL_BYTES = 128 * 1024 * 1024  # of large answers that are gone, for those that come
_pool = PooledMemory(_POOL_BYTES)

# Name: seconds (or a count). Present where the platform has it.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a client's connections go, and how they are made."""

    address: Address
    access: Access
    connect_timeout_s: float
    max_connections: int  # at the same time, those that the server has said farewell on aside


def new_connection(*, is_passive: bool, login: Login | None = None) -> Connection:
    """Return the client's end of a connection; a passive one reads only while a call waits."""
    features = (FEATURE_RESUME, FEATURE_BODY)
    return Connection(
        Role.CLIENT,
        software=SOFTWARE,
        features=(FEATURE_PASSIVE, *features) if is_passive else features,
        login=login,
        codec=fastest_codec(),
        bodies=_pool,
    )


@lru_cache(1)
def fastest_codec() -> Codec:
    """Return the fastest codec that is installed: the thin client does without msgspec."""
    try:
        from tensorwire_protocol.codec.typed import TYPED
    except ImportError:
        return PLAIN
    return TYPED


def chance() -> float:
    """Return a random number from 0 to below 1, for jitter."""
    # The module `random` would bring ten others with it.
    return int.from_bytes(os.urandom(4), "big") / 2**32


def tune(sock: socket.socket) -> None:
    """Send small frames at once, and let the kernel notice a peer that is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit_unsent(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def cannot_connect(address: Address, error: OSError, timeout_s: float) -> ConnectionLost:
    """Return in one sentence why no connection could be made; nothing was sent."""
    if isinstance(error, ConnectionRefusedError):
        text = (
            f"no server answers at {address}: connection refused;"
            " start one with `tensorwire serve`, or name another with TENSORWIRE_ADDRESS"
        )
    elif isinstance(error, TimeoutError):
        text = f"no server answers at {address} within {timeout_s:g} s"
    elif isinstance(error, socket.gaierror):
        text = f"the host {address.host!r} cannot be found: {error.strerror}"
    elif address.is_tls:
        text = _without_tls(address, error)
    else:
        text = f"no connection to {address}: {error.strerror or error}"
    return ConnectionLost(text, executed=Executed.NO)


def _without_tls(address: Address, error: OSError) -> str:
    import ssl  # only who uses it pays for it

    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {address} is not accepted: {error.verify_message}; name who signed"
            " it with ca= or SSL_CERT_FILE, and another host name with server_name="
        )
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return f"no TLS 1.3 connection to {address}: {reason or error}"


def explained(error: TensorwireError, address: Address, *, was_greeted: bool) -> TensorwireError:
    """Return a plainer error where the first words show that something else speaks there."""
    if was_greeted:
        return error
    plain: TensorwireError
    if isinstance(error, BadFraming | FrameTooLarge | UnknownKind | SequenceError):
        plain = BadPreface(f"what answers at {address} is not a Tensorwire server")
    elif isinstance(error, BadPreface):
        plain = BadPreface(f"what answers at {address} is {error.message}")
    elif isinstance(error, HandshakeTimeout):
        plain = HandshakeTimeout(
            f"what answers at {address} did not greet like a Tensorwire server in time"
        )
    else:
        return error
    plain.__cause__ = error
    return plain
