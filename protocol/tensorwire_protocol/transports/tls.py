"""TLS on a blocking socket that threads share: one may read while another writes.

An `ssl.SSLSocket` is not made for that: OpenSSL's state of a connection belongs to one thread at a
time. Here a lock guards the state, and no system call happens under it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import cast

_RECORD_BYTES = 64 * 1024  # read from the socket at once: a few records
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


class TlsSocket:
    """A client's end: wraps a connected socket and shakes hands.

    Args:
        server_name: whose certificate it must be.

    Raises:
        OSError: the handshake failed; ssl.SSLError is one. The socket is still the caller's.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        # Order of acquisition: _write_lock before _lock.
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()  # records must leave in the order they were made
        self._may_have_more = False  # decrypted or not, beyond what the last read took
        self._shake_hands()

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_outgoing()
                self._take(self._sock.recv(_RECORD_BYTES))
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._send_outgoing()  # the alert that tells the server why
                raise
            else:
                self._send_outgoing()
                return

    def _take(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _send_outgoing(self) -> None:
        with self._write_lock:
            with self._lock:
                data = self._outgoing.read()
            if data:
                self._sock.sendall(data)

    def fileno(self) -> int:
        """Return the descriptor to wait on, unless `has_buffered`."""
        return self._sock.fileno()

    @property
    def has_buffered(self) -> bool:
        """Say if `recv_into` may return something although the socket has nothing to read."""
        return self._may_have_more

    def recv_into(self, buffer: memoryview) -> int:
        """Read what is there, after one wait at most; 0 at the end. One thread at a time.

        Raises:
            BlockingIOError: what came is not a whole record yet.
        """
        data = None if self._may_have_more else self._sock.recv(_RECORD_BYTES)
        with self._lock:
            if data is not None:
                self._take(data)
            count = self._decrypt(buffer)
            has_answer = self._outgoing.pending > 0
        if has_answer:  # to a change of keys, for example; a peer that is gone needs none
            with contextlib.suppress(OSError):
                self._send_outgoing()
        if count is None:
            raise BlockingIOError("no whole TLS record has come yet")
        return count

    def _decrypt(self, buffer: memoryview) -> int | None:
        count = 0
        self._may_have_more = True
        while count < len(buffer):
            try:
                # One record at a time is all that a read returns.
                got = cast("int", self._tls.read(len(buffer) - count, buffer[count:]))
            except ssl.SSLWantReadError:
                self._may_have_more = False
                return count or None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):  # with and without a goodbye
                return count  # what was read first is still handed out
            if not got:
                return count
            count += got
        return count

    def sendall(self, data: bytes | memoryview) -> None:
        """Encrypt and send everything."""
        with self._write_lock:
            with self._lock:
                self._tls.write(data)
                records = self._outgoing.read()
            self._sock.sendall(records)

    def shutdown(self, how: int) -> None:
        """Say that this side ends, where that needs no wait, and shut the socket down."""
        if self._write_lock.acquire(blocking=False):
            try:
                with self._lock, contextlib.suppress(ssl.SSLError):
                    self._tls.unwrap()
                with contextlib.suppress(OSError):
                    self._sock.send(self._outgoing.read(), _DONT_WAIT)
            finally:
                self._write_lock.release()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
