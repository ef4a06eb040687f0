"""The port: accepts clients and gives each a session."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from functools import partial
from typing import TYPE_CHECKING, cast

from tensorwire_protocol.allowance import Allowance
from tensorwire_protocol.transports.sockets import limit_unsent

from tensorwire_server.gateway.door import Door, source_of
from tensorwire_server.gateway.handshakes import TlsPort

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from tensorwire_server.config import ListenConfig
    from tensorwire_server.gateway.door import Guest
    from tensorwire_server.gateway.gateway import Gateway
    from tensorwire_server.gateway.handshakes import Handshake
    from tensorwire_server.gateway.session import Session

log = logging.getLogger(__name__)
_BACKLOG = 1024
_WARN_EACH_S = 10.0


class ListenError(OSError):
    """The address cannot be listened on; the message is one sentence for a person."""


def is_loopback(host: str) -> bool:
    """Say if only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_private(transport: asyncio.BaseTransport) -> bool:
    """Say if nobody else can read a connection: TLS, a Unix socket or loopback."""
    if transport.get_extra_info("sslcontext") is not None:
        return True
    peer = transport.get_extra_info("peername")
    # Of a Unix socket the name is a string, mostly an empty one.
    return is_loopback(peer[0]) if isinstance(peer, tuple) else isinstance(peer, str | bytes)


def bind(config: ListenConfig, *, has_auth: bool = False) -> socket.socket:
    """Return a listening socket.

    Args:
        has_auth: clients are asked who they are.

    Raises:
        ListenError: the port is taken, the address is not this machine's, or others could reach
            it although nothing would ask them who they are.
    """
    where = f"{config.host}:{config.port}"
    if not has_auth and not is_loopback(config.host):
        raise ListenError(
            f"refusing to listen on {where}: without authentication only loopback addresses are"
            " allowed; make a token with `tensorwire token new --name NAME --file FILE` and serve"
            " with --auth-file FILE, or use 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        limit_unsent(sock)  # connections inherit it
        sock.bind((config.host, config.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ListenError(
                f"port {config.port} on {config.host} is taken; stop what uses it or give --port"
            ) from error
        raise ListenError(f"cannot listen on {where}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


class Listener:
    """Accepts connections on a bound socket until closed; with `tls` none without it."""

    def __init__(
        self,
        gateway: Gateway,
        sock: socket.socket,
        config: ListenConfig,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._gateway = gateway
        self._sock = sock
        self._door = Door(config)
        self._warnings = Allowance(1, 1 / _WARN_EACH_S)
        self._tls = tls
        self._server: asyncio.Server | TlsPort | None = None

    @property
    def address(self) -> str:
        """Where clients connect, as HOST:PORT."""
        host, port, *_ = self._sock.getsockname()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Begin to accept."""
        if self._tls is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                lambda: _Arrival(self._accept), sock=self._sock, backlog=_BACKLOG
            )
            return
        self._server = TlsPort(
            self._sock,
            self._tls,
            on_arrival=lambda handshake: self._enter(handshake, handshake.address),
            build_protocol=lambda handshake: _Arrival(partial(self._greet, handshake)),
            on_over=self._door.leave,
        )

    def _greet(self, handshake: Handshake, transport: asyncio.Transport) -> asyncio.BaseProtocol:
        """Go on with a connection whose handshake is done; its time counts from the beginning."""
        self._door.leave(handshake)
        return self._accept(transport, since=handshake.arrived_at)

    def _accept(
        self, transport: asyncio.Transport, since: float | None = None
    ) -> asyncio.BaseProtocol:
        session = self._gateway.open_session(
            is_private=is_private(transport), on_closed=self._leave
        )
        if since is not None:
            session.transport.connection.on_timer(since)
        self._enter(session.transport, transport.get_extra_info("peername"))
        return session.transport

    def _enter(self, guest: Guest, peername: object) -> None:
        refused_before = self._door.num_refused
        self._door.enter(guest, source_of(peername))
        # However many there are, the log grows slowly.
        if self._door.num_refused > refused_before and self._warnings.spend(self._gateway.now()):
            log.warning(
                "connections_refused refused=%d connections=%d",
                self._door.num_refused,
                len(self._gateway.sessions),
            )

    def _leave(self, session: Session) -> None:
        self._door.leave(session.transport)

    def close(self) -> None:
        """Accept nothing more; open connections are not touched."""
        if self._server is not None:
            self._server.close()


class _Arrival(asyncio.BufferedProtocol):
    """Holds the place of a session until the connection is made.

    A TLS handshake that fails never makes one, and nobody would tell the session of its end.
    """

    def __init__(self, accept: Callable[[asyncio.Transport], asyncio.BaseProtocol]) -> None:
        self._accept = accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast("asyncio.Transport", transport)
        protocol = self._accept(stream)
        stream.set_protocol(protocol)
        protocol.connection_made(stream)
