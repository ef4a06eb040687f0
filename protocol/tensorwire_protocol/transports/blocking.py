"""A connection on a blocking socket, shared by threads without a thread of its own.

Leader and followers: of the callers that wait for an answer, one reads the socket for all and
hands out what belongs to others; when it has its own answer it passes the lead on. A lone caller
pays no hand-over at all (measured: 1.2x the latency of a bare socket, a background event loop 4x).

A send that fails does not end it: what the peer had sent before is read first. A reset leaves it in
the kernel's receive queue (on Linux; Windows drops the queue). What the peer's own kernel had not
yet sent, because our window was full, is lost with the connection.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from tensorwire_protocol.errors import (
    Busy,
    ConnectionLost,
    PeerSilent,
    RequestCancelled,
    TensorwireError,
)
from tensorwire_protocol.frames import DATA_BYTES
from tensorwire_protocol.messages import (
    TERMINAL,
    Cancel,
    Event,
    EventBatch,
    Failure,
    Message,
    Ping,
)
from tensorwire_protocol.roles import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.connection import Connection
    from tensorwire_protocol.messages import Request, Resume
    from tensorwire_protocol.transports.tls import TlsSocket

_CLOSED: Final = "the client was closed"
_TICK_S: Final = 1.0  # how often a reader that hears nothing looks at the clock


def _readable(sock: socket.socket | TlsSocket) -> Callable[[float], bool]:
    """Return a function that waits up to so many seconds until `sock` has something to read."""
    wait = _waiting_on(sock)
    if isinstance(sock, socket.socket):
        return wait
    tls = sock
    # What TLS has taken from the socket no poll would tell.
    return lambda timeout_s: tls.has_buffered or wait(timeout_s)


def _waiting_on(sock: socket.socket | TlsSocket) -> Callable[[float], bool]:
    if not hasattr(select, "poll"):  # Windows
        return lambda timeout_s: bool(select.select([sock], [], [], timeout_s)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return lambda timeout_s: bool(poll.poll(timeout_s * 1000))


def _ticks(sock: socket.socket | TlsSocket) -> bool:
    """Have `recv` give up after a tick, so that nobody need wait in `poll` first; False: it cannot.

    A quarter of a lone caller's CPU went into `poll` (measured).
    """
    if not isinstance(sock, socket.socket) or not hasattr(select, "poll"):
        return False
    try:
        tick = struct.pack("ll", int(_TICK_S), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
    except OSError:  # where a timeval is not two longs
        return False
    return True


def _is_alarm_set() -> bool:
    """Say if a timer sends signals: after each, Python begins `recv` anew, and with it the tick."""
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


class Mailbox:
    """What has arrived for one stream and was not yet taken."""

    __slots__ = ("is_cancelled", "is_ended", "items", "stream", "wake")

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.items: deque[Message] = deque()
        self.is_ended = False  # its terminal frame has arrived
        self.is_cancelled = False  # from this side: nothing more comes
        self.wake: threading.Condition | None = None  # a lone caller never needs one

    def notify(self) -> None:
        """Wake whoever follows on this mailbox."""
        if self.wake is not None:
            self.wake.notify()


class BlockingTransport:
    """Moves bytes between a connected blocking socket and a `Connection`."""

    def __init__(self, sock: socket.socket | TlsSocket, connection: Connection) -> None:
        self.connection = connection
        self._sock = sock
        self._is_readable = _readable(sock)
        self._ticks = _ticks(sock)
        # Order of acquisition: _send_lock before _lock. _lock is never held during a system call.
        self._send_lock = threading.Lock()
        self._lock = threading.Lock()
        self._mailboxes: dict[int, Mailbox] = {}
        self._waiting: deque[Mailbox] = deque()
        self._has_leader = False
        self._error: TensorwireError | None = None
        self._send_error: ConnectionLost | None = None  # what had come before it is still read
        self._given_up: deque[tuple[Mailbox, str]] = deque()  # to be cancelled by the next send
        self._pinged = False  # since something was heard
        connection.on_timer(time.monotonic())
        self._send_queued(_nothing)

    def wait_for_greeting(self) -> None:
        """Wait until it is known what the server takes; before anybody else uses the transport.

        Raises:
            TensorwireError: the connection is lost, or the server did not greet in time.
        """
        while self._error is None and self.connection.state is State.CONNECTING:
            if self._is_readable(_TICK_S):
                self._read_once()
            else:
                self._on_silence(0.0, time.monotonic())
        if self._error is not None:
            raise self._error

    @property
    def error(self) -> TensorwireError | None:
        """Why the connection ended, or None while it lives."""
        return self._error

    @property
    def send_error(self) -> TensorwireError | None:
        """Why nothing can be sent any more, or None; answers may still be read."""
        return self._error or self._send_error

    def open(self, build: Callable[[int], Request | Resume]) -> Mailbox:
        """Send the request that `build` makes for a new stream id.

        A connection that is lost while the request is sent is told by `receive`, behind what the
        server may have said of it: that it is too large, for example.

        Raises:
            Busy: the server takes no further stream at present; nothing was sent.
            TensorwireError: the request cannot be sent, or the connection was lost before.
        """
        mailbox: Mailbox | None = None

        def queue() -> None:
            nonlocal mailbox
            if self.connection.num_places <= 0:
                limit = self.connection.peer_limits.streams
                raise Busy(f"{limit} streams are open on this connection; wait")
            request = build(self.connection.next_stream())
            self.connection.send(request)
            mailbox = self._mailboxes[request.stream] = Mailbox(request.stream)

        try:
            self._send_queued(queue)
        except TensorwireError:
            if mailbox is None:
                raise
        assert mailbox is not None
        return mailbox

    def send(self, message: Message) -> None:
        """Send a message that opens no stream."""
        self._send_queued(lambda: self.connection.send(message))

    def _send_queued(self, queue: Callable[[], None]) -> None:
        with self._send_lock:
            with self._lock:
                if error := self.send_error:
                    raise error.with_traceback(None)
                queue()
                self._queue_cancels()
                output = self.connection.take_output(DATA_BYTES)
            self._write(output)
        if self._given_up:
            self._cancel_without_waiting()

    def _write(self, output: list[bytes | memoryview]) -> None:
        try:
            for buffer in output:
                self._sock.sendall(buffer)
        except OSError as error:
            lost = ConnectionLost(f"the connection was lost: {error}")
            self._stop_sending(lost)
            raise (self._error or lost) from error
        except BaseException:
            # Ctrl-C in the middle of a frame: the peer could make no sense of what comes next.
            self._cut("a call was interrupted while it sent")
            raise

    def _stop_sending(self, lost: ConnectionLost) -> None:
        """See to it that what came before the end is read, then end."""
        with self._lock:
            self._send_error = lost
            if self._has_leader:
                return  # whoever leads goes on to the end, and so may this thread itself
            self._has_leader = True
        try:
            self._read_rest(lost)
        finally:
            self._stop_leading()

    def _read_rest(self, lost: ConnectionLost) -> None:
        """Read what is there; nothing comes any more that it would make sense to wait for."""
        while self._error is None:
            if self._is_readable(0):
                self._read_once()
            else:
                with self._lock:
                    self._end(lost)

    def cancel(self, mailbox: Mailbox, reason: str = "cancelled", *, wait: bool = True) -> None:
        """Give a stream up: CANCEL is sent, what still arrives for it is dropped.

        A thread that waits for it gets RequestCancelled.

        Args:
            wait: False for finalizers, which may run where this very thread holds a lock of this
                object; CANCEL then leaves at once or with whoever holds it.
        """
        self._given_up.append((mailbox, reason))
        if not wait:
            self._cancel_without_waiting()
            return
        with contextlib.suppress(TensorwireError):
            self._send_queued(_nothing)

    def _queue_cancels(self) -> None:
        while self._given_up:
            mailbox, reason = self._given_up.popleft()
            if self._mailboxes.pop(mailbox.stream, None) is None:
                continue
            self.connection.send(Cancel(stream=mailbox.stream, reason=reason))
            # Another thread may wait for it, and the server's own answer finds no mailbox now.
            mailbox.is_cancelled = True
            mailbox.notify()

    def _cancel_without_waiting(self) -> None:
        if not self._send_lock.acquire(blocking=False):
            return  # whoever holds it looks here again afterwards
        try:
            if not self._lock.acquire(blocking=False):
                return
            try:
                if self.send_error:
                    return
                self._queue_cancels()
                output = self.connection.take_output(0)
            finally:
                self._lock.release()
            with contextlib.suppress(TensorwireError):
                self._write(output)
        finally:
            self._send_lock.release()

    def receive(self, mailbox: Mailbox, deadline: float | None) -> Message | None:
        """Wait for the next message of `mailbox`; None when `deadline` (monotonic s) passes first.

        Raises:
            TensorwireError: the connection is lost.
            RequestCancelled: another thread has cancelled the stream.
        """
        with self._lock:
            try:
                while not mailbox.items:
                    self._check(mailbox)
                    if not self._has_leader:
                        self._has_leader = True
                        break
                    if not self._follow(mailbox, deadline) and not mailbox.items:
                        return None
                else:
                    return mailbox.items.popleft()
            finally:
                # Whoever was woken to lead and leaves instead must wake the next, or nobody reads.
                self._offer_lead()
        try:
            self._lead(mailbox, deadline)
        finally:
            self._stop_leading()
        with self._lock:
            if mailbox.items:
                return mailbox.items.popleft()
            self._check(mailbox)
            return None

    def _check(self, mailbox: Mailbox) -> None:
        if mailbox.is_cancelled:
            raise RequestCancelled("the call was cancelled before its end")
        if self._error:
            # One error for many callers: each starts a traceback of its own, or the error
            # would hold the frames of all of them.
            raise self._error.with_traceback(None)

    def _offer_lead(self) -> None:
        if self._has_leader:
            return
        for mailbox in self._waiting:
            if not mailbox.items:  # those that have something wake anyway, and leave
                mailbox.notify()
                return

    def _stop_leading(self) -> None:
        with self._lock:
            self._has_leader = False
            self._offer_lead()
        if self._given_up:
            self._cancel_without_waiting()

    def _follow(self, mailbox: Mailbox, deadline: float | None) -> bool:
        self._waiting.append(mailbox)
        try:
            timeout = None if deadline is None else deadline - time.monotonic()
            if mailbox.wake is None:
                mailbox.wake = threading.Condition(self._lock)
            return (timeout is None or timeout > 0) and mailbox.wake.wait(timeout)
        finally:
            self._waiting.remove(mailbox)

    def _lead(self, mailbox: Mailbox, deadline: float | None) -> None:
        """Read for everybody until `mailbox` has something, the deadline passes, or the end."""
        # Nobody listened before, so silence counts from now.
        heard = time.monotonic()
        self._pinged = False
        while not (mailbox.items or mailbox.is_cancelled or self._error):
            if self._send_error:
                self._read_rest(self._send_error)
                return
            # A part of what is large at a time: what arrives meanwhile is not left lying.
            has_bulk = self.connection.has_bulk
            if has_bulk:
                with contextlib.suppress(TensorwireError):  # it is kept as the connection's
                    self._send_queued(_nothing)
            wait_s = 0.0 if has_bulk else _TICK_S
            if deadline is not None:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                wait_s = min(wait_s, left_s)
            if self._read_within(wait_s):
                heard, self._pinged = time.monotonic(), False
            elif not has_bulk:
                self._on_silence(heard, time.monotonic())

    def _on_silence(self, heard: float, now: float) -> None:
        """Do what a connection's timer does, which cannot know when somebody listened."""
        if self.connection.state is not State.OPEN:
            with self._lock:
                self.connection.on_timer(now)
                if self.connection.error:
                    self._end(self.connection.error)
            return
        limits = self.connection.limits
        if now - heard >= limits.dead_after_s:
            with self._lock:
                self._end(PeerSilent(f"nothing was heard for {now - heard:.0f} s"))
        elif now - heard >= limits.ping_after_s and not self._pinged:
            self._pinged = True
            with contextlib.suppress(TensorwireError):  # it is kept, and what came is read first
                self.send(Ping())

    def _read_within(self, wait_s: float) -> bool:
        """Read once something comes; False if nothing has within `wait_s`."""
        # Inside a frame the bytes go into memory that a cancel by another thread gives back: nobody
        # waits with a hand on that.
        may_tick = self._ticks and wait_s == _TICK_S and not self.connection.is_mid_frame
        if may_tick and not _is_alarm_set():
            return self._read_once()
        if self._is_readable(wait_s):
            self._read_once()
            return True
        return False

    def _read_once(self) -> bool:
        """Read what there is; False if it is nothing."""
        taken: list[int] = []
        try:
            # In a single step of C, so that an interrupt tells if anything had been taken.
            taken.extend(map(self._sock.recv_into, (self.connection.get_buffer(),)))
            self._take(taken[0])
        except BlockingIOError:  # a tick has passed, or a part of a TLS record has come
            return False
        except OSError as error:
            with self._lock:
                self._end(self._send_error or ConnectionLost(f"the connection was lost: {error}"))
        except TensorwireError:
            raise
        except BaseException:
            # Ctrl-C between the kernel's buffer and ours: bytes may be gone.
            if taken or not isinstance(self._sock, socket.socket):
                self._cut("a call was interrupted while it read")
            raise
        return True

    def _take(self, count: int) -> None:
        with self._lock:
            if count == 0:
                where = " in the middle of a frame" if self.connection.is_mid_frame else ""
                closed = ConnectionLost(f"the server closed the connection{where}")
                self._end(self._send_error or closed)
                return
            for message in self.connection.received(count, time.monotonic()):
                self._deliver(message)
            has_output = self.connection.pending_bytes > 0 and not self._send_error
            is_closed = self.connection.is_closed
            if is_closed:
                self._end(self.connection.error or ConnectionLost("the connection was closed"))
        if is_closed and not self._send_error:
            self._say_last_words()
        elif has_output:
            # A failure is kept as the error; what was received before it is still handed out.
            with contextlib.suppress(TensorwireError):
                self._send_queued(_nothing)

    def _say_last_words(self) -> None:
        with self._send_lock, contextlib.suppress(OSError):
            with self._lock:
                output = self.connection.take_output()
            for buffer in output:
                self._sock.sendall(buffer)

    def catch_up(self) -> None:
        """Read what has arrived while nobody waited: a PING, a GOAWAY, the end."""
        with self._lock:
            # Looking does not block, so it may happen under the lock.
            if self._has_leader or self._error or not self._is_readable(0):
                return
            self._has_leader = True
        try:
            while self._error is None and self._is_readable(0):
                self._read_once()
        finally:
            self._stop_leading()

    def _deliver(self, message: Message) -> None:
        if isinstance(message, EventBatch):
            at = 0
            for i, stream in enumerate(message.streams):
                count = 1 if message.counts is None else message.counts[i]
                tokens = message.tokens[at : at + count]
                at += count
                index, text = message.first_indexes[i], message.texts[i]
                self._put(stream, Event(stream=stream, index=index, tokens=tokens, text=text))
            return
        stream = getattr(message, "stream", 0)
        if stream:
            self._put(stream, message)
        elif isinstance(message, Failure):
            self._end(message.to_error())

    def _put(self, stream: int, message: Message) -> None:
        mailbox = self._mailboxes.get(stream)
        if mailbox is None:  # its caller has left; the terminal frame is still to come
            return
        mailbox.items.append(message)
        mailbox.notify()
        if isinstance(message, TERMINAL):
            mailbox.is_ended = True
            del self._mailboxes[stream]

    def _end(self, error: TensorwireError) -> None:
        if self._error is None:
            self._error = error
            self.connection.close()
            for mailbox in self._waiting:
                mailbox.notify()

    def _say_farewell(self) -> None:
        """Cancel what runs, if that can be said at once: a lost connection would let it go on."""
        # TLS cannot write a part of a record; there the server finds out by the end of the socket.
        if not isinstance(self._sock, socket.socket) or not self._send_lock.acquire(blocking=False):
            return
        try:
            with self._lock:
                if self.send_error or not self._mailboxes:
                    return
                for stream in self._mailboxes:
                    self.connection.send(Cancel(stream=stream))
                output = b"".join(self.connection.take_output(0))
                self._end(ConnectionLost(_CLOSED))  # before the server answers these
            with contextlib.suppress(OSError):
                self._sock.setblocking(False)
                self._sock.send(output)
        finally:
            self._send_lock.release()

    def _cut(self, why: str) -> None:
        with self._lock:
            self._end(ConnectionLost(why))
        # shutdown wakes a leader that sits in recv or poll, which close alone would not; and it
        # tells the server at once, which then stops what it does for us.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, and all that runs on it; callers that wait get ConnectionLost."""
        self._say_farewell()
        self._cut(_CLOSED)
        self._sock.close()


def _nothing() -> None:
    """Queue nothing: what waits is to be sent."""
