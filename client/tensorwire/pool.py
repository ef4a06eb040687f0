"""The sync client's connections: made when a call needs one, and one more when all are full."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import Busy, DeadlineExceeded, Executed, TensorwireError
from tensorwire_protocol.transports.blocking import BlockingTransport

from tensorwire.dialing import cannot_connect, new_connection, tune
from tensorwire.retrying import Connecting

if TYPE_CHECKING:
    from tensorwire_protocol.transports.tls import TlsSocket

    from tensorwire.call import Call
    from tensorwire.dialing import Route
    from tensorwire.home import Home
    from tensorwire.retrying import Attempts


class Pool:
    """Finds a connection with a place for one more call; threads share it.

    Calls fill one connection before there is a second.

    Args:
        waits_for_greeting: whether nothing is sent before it is known what the server takes.
    """

    def __init__(self, route: Route, home: Home, *, waits_for_greeting: bool) -> None:
        self._route, self._home = route, home
        self._waits_for_greeting = waits_for_greeting
        self._dialing = threading.Lock()
        self._connecting = Connecting()
        self._transports: list[BlockingTransport] = []
        self._leaving: list[BlockingTransport] = []  # the server said GOAWAY; streams still end

    @property
    def transports(self) -> list[BlockingTransport]:
        """The connections that calls may go on, full or not."""
        return self._transports

    def get(self, call: Call[Any], attempts: Attempts, deadline: float | None) -> BlockingTransport:
        """Return a connection that was alive a moment ago, with a place on it.

        Raises:
            Busy: there are as many connections as there may be, and all are full. Waiting is the
                caller's: the thread that could read answers may be the one that asks.
            TensorwireError: no connection could be made, or `deadline` (monotonic s) passed.
        """
        transport = self._find()
        if transport is not None:
            return transport
        left_s = -1.0 if deadline is None else max(deadline - time.monotonic(), 0.0)
        if not self._dialing.acquire(timeout=left_s):
            raise _no_time_to_connect(call)
        try:
            self._home.check()
            transport = self._find()
            if transport is not None:  # another thread was quicker
                return transport
            self._retire()
            most = self._route.max_connections
            if len(self._transports) >= most:
                raise Busy(
                    f"all {most} connections have as many calls as the server takes on one:"
                    " read their answers, or use another client"
                )
            transport = self._dial(call, attempts, deadline)
            self._transports = [*self._transports, transport]  # others read the old list meanwhile
            if self._home.is_closed:
                transport.close()
            return transport
        finally:
            self._dialing.release()

    def _find(self) -> BlockingTransport | None:
        for transport in self._transports:
            if _is_usable(transport) and transport.connection.num_places > 0:
                return transport
        return None

    def _retire(self) -> None:
        """Keep apart what takes no calls any more, and close what has nothing left to bring."""
        usable = [transport for transport in self._transports if _is_usable(transport)]
        rest = [old for old in [*self._leaving, *self._transports] if old not in usable]
        self._transports, self._leaving = usable, []
        for old in rest:
            if old.error is not None or old.connection.num_streams == 0:
                old.close()
            else:
                self._leaving.append(old)

    def _dial(
        self, call: Call[Any], attempts: Attempts, deadline: float | None
    ) -> BlockingTransport:
        timeout_s = self._route.connect_timeout_s
        if deadline is not None:
            timeout_s = min(timeout_s, deadline - time.monotonic())
            if timeout_s <= 0:
                raise _no_time_to_connect(call)
        self._connecting.begin(attempts, time.monotonic())
        address = self._route.address
        try:
            sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
        except OSError as error:
            raise cannot_connect(address, error, timeout_s) from error
        try:
            tune(sock)
            channel = self._secured(sock, timeout_s)
            sock.settimeout(None)
            login = self._route.access.login(address)
            connection = new_connection(is_passive=True, login=login)
            self._connecting.note_made(connection)
            transport = BlockingTransport(channel, connection)
            # What a further connection takes must be known: it will be filled to the brim.
            if self._waits_for_greeting or self._transports:
                transport.wait_for_greeting()
            return transport
        except BaseException:
            sock.close()
            raise

    def _secured(self, sock: socket.socket, timeout_s: float) -> socket.socket | TlsSocket:
        address, access = self._route.address, self._route.access
        name = access.server_name_at(address)
        if name is None:
            return sock
        assert access.tls is not None
        from tensorwire_protocol.transports.tls import TlsSocket  # loads ssl

        try:
            return TlsSocket(sock, access.tls, name)
        except OSError as error:
            raise cannot_connect(address, error, timeout_s) from error

    def close(self) -> None:
        """End all connections; calls that wait on other threads get ConnectionLost."""
        for transport in [*self._leaving, *self._transports]:
            transport.close()
        self._leaving, self._transports = [], []


def _is_usable(transport: BlockingTransport) -> bool:
    try:
        transport.catch_up()
    except TensorwireError:
        return False
    return transport.send_error is None and not transport.connection.peer_is_leaving


def _no_time_to_connect(call: Call[Any]) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"no connection within the timeout of {call.timeout_s:g} s", executed=Executed.NO
    )
