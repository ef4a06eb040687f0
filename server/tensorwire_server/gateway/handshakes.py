"""TLS handshakes: who has not finished one is at the door already.

The loop's own server tells nobody of a connection before its handshake is done: thousands that say
nothing would each hold a descriptor and what OpenSSL needs, and no bound would see them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from typing import TYPE_CHECKING, Any

from tensorwire_server.gateway.tls import HANDSHAKE_S, SHUTDOWN_S

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from tensorwire_protocol.errors import TensorwireError

log = logging.getLogger(__name__)
_AT_ONCE = 128  # accepted in one turn of the loop
_PAUSE_S = 1.0  # where descriptors or memory have run out
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Handshake:
    """A connection whose TLS handshake is not done; a `Guest` of the door."""

    is_stranger = True

    def __init__(self, conn: socket.socket, address: Any, arrived_at: float) -> None:
        self.conn, self.address, self.arrived_at = conn, address, arrived_at
        self.is_refused = False

    def fail(self, error: TensorwireError) -> None:
        """End it; there is no telling why to who cannot read it yet."""
        del error
        self.is_refused = True
        with contextlib.suppress(OSError):  # gone already
            self.conn.shutdown(socket.SHUT_RDWR)


class TlsPort:
    """Accepts connections on a socket and lets each shake hands.

    Args:
        on_arrival: told of each connection before its handshake.
        build_protocol: called for each whose handshake begins.
        on_over: told when a handshake is done, well or not.
    """

    def __init__(
        self,
        sock: socket.socket,
        tls: ssl.SSLContext,
        *,
        on_arrival: Callable[[Handshake], None],
        build_protocol: Callable[[Handshake], asyncio.BaseProtocol],
        on_over: Callable[[Handshake], None],
    ) -> None:
        self._sock, self._tls = sock, tls
        self._on_arrival, self._build_protocol, self._on_over = on_arrival, build_protocol, on_over
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[None], Handshake] = {}
        self._resumption: asyncio.TimerHandle | None = None
        self._resume()

    def _resume(self) -> None:
        self._resumption = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                conn, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                log.warning("accept_paused pause_s=%.1f reason=%s", _PAUSE_S, error.strerror)
                self._loop.remove_reader(self._sock)
                self._resumption = self._loop.call_later(_PAUSE_S, self._resume)
                return
            conn.setblocking(False)
            self._begin(Handshake(conn, address, self._loop.time()))

    def _begin(self, handshake: Handshake) -> None:
        self._on_arrival(handshake)
        if handshake.is_refused:
            handshake.conn.close()
            self._on_over(handshake)
            return
        task = self._loop.create_task(self._shake_hands(handshake))
        self._tasks[task] = handshake
        task.add_done_callback(self._tasks.pop)

    async def _shake_hands(self, handshake: Handshake) -> None:
        try:
            # Whatever goes wrong is the peer's doing, and it closes the connection.
            with contextlib.suppress(OSError):
                await self._loop.connect_accepted_socket(
                    lambda: self._build_protocol(handshake),
                    handshake.conn,
                    ssl=self._tls,
                    ssl_handshake_timeout=HANDSHAKE_S,
                    ssl_shutdown_timeout=SHUTDOWN_S,
                )
        finally:
            self._on_over(handshake)

    def close(self) -> None:
        """Accept nothing more, and wait for no handshake."""
        self._loop.remove_reader(self._sock)
        if self._resumption is not None:
            self._resumption.cancel()
        self._sock.close()
        for handshake in self._tasks.values():
            with contextlib.suppress(OSError):
                handshake.conn.shutdown(socket.SHUT_RDWR)
