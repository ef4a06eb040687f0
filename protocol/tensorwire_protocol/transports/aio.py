"""A connection on an asyncio event loop (uvloop or the standard one)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Protocol, cast

from tensorwire_protocol.errors import ConnectionLost, SlowConsumer, TensorwireError
from tensorwire_protocol.frames import SCRATCH_BYTES
from tensorwire_protocol.roles import OPENERS, Role, State
from tensorwire_protocol.transports.polling import AnswerWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_protocol.connection import Connection
    from tensorwire_protocol.messages import Message
    from tensorwire_protocol.transports.polling import BusyPoll

_CLOSE_PATIENCE_S = 5.0  # for the last words to a peer that does not read
_DISCARD_BYTES = 4 * 1024 * 1024  # from a peer that does not stop when it is told why
_MAX_LINGERING = 256  # connections of a thread that were closed and whose peers have not
# So much does not wait for the end of the turn. A turn that answers many at once would otherwise
# keep the peer idle meanwhile, and then wait for it: 256 requests in flight went through three
# processes one after the other (measured: up to 1.8x the requests/s with early flushes). The first
# of a turn is smaller, so that 16 in flight are cut in two as well (measured: 1.3x).
_FIRST_EARLY_BYTES = 1024
_EARLY_BYTES = 4096
# uvloop reads a socket up to 32 times in a row while more comes: 8 MiB and more, in which nobody
# else is served. A client that sends as fast would have all its requests read before one answer.
_TURN_BYTES = 512 * 1024
_LARGE_READ_BYTES = 16 * 1024  # smaller ones are not counted: they do not come in a row
_BEFORE_LOGIN = frozenset({State.PREFACE, State.HANDSHAKE, State.AUTHENTICATING})
_thread = threading.local()


def shared_scratch() -> memoryview:
    """Return this thread's receive buffer, which all its connections share.

    A loop reads into the buffer and has it parsed before it turns to another connection, so
    that ten thousand idle ones need one buffer between them.
    """
    scratch: memoryview | None = getattr(_thread, "scratch", None)
    if scratch is None:
        scratch = _thread.scratch = memoryview(bytearray(SCRATCH_BYTES))
    return scratch


def _lingering() -> dict[AioTransport, None]:
    """Return this thread's closed connections whose peers still have to close, in order."""
    lingering: dict[AioTransport, None] | None = getattr(_thread, "lingering", None)
    if lingering is None:
        lingering = _thread.lingering = {}
    return lingering


class Driver(Protocol):
    """What stands on top of a transport. All calls come from the event loop."""

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Take what one read completed."""

    def on_writable(self) -> None:
        """The peer reads again: what was held back may be sent."""

    def on_lost(self, error: TensorwireError | None) -> None:
        """Nothing comes or goes any more; None after an orderly end without open streams."""


class AioTransport(asyncio.BufferedProtocol):
    """Moves bytes between a socket and a `Connection`; few flushes in a turn of the loop.

    Args:
        poll: keeps the loop awake for a moment after output, where answers are near.
    """

    def __init__(
        self, connection: Connection, driver: Driver, poll: BusyPoll | None = None
    ) -> None:
        self.connection = connection
        self.is_paused = False  # the peer does not read; unsent bytes are above the high water
        self.written_bytes = 0  # handed to the loop since the beginning
        self._is_server = connection.role is Role.SERVER
        self._is_deaf = False  # the peer has to take answers before it is heard again
        self._turn_bytes = 0  # of large reads in this turn of the loop
        self._is_reading = True
        connection.on_output = self._schedule_flush
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._flush_is_due = False
        self._early_bytes = _FIRST_EARLY_BYTES
        self._watch = AnswerWatch(poll) if poll is not None and poll.window_s else None
        self._lost = False
        self._discarded_bytes = 0
        self._abort_timer: asyncio.TimerHandle | None = None

    @property
    def peername(self) -> str:
        """The peer's address, for logs."""
        name = self._transport.get_extra_info("peername") if self._transport else None
        return ":".join(map(str, name[:2])) if isinstance(name, tuple) else str(name or "local")

    @property
    def unsent_bytes(self) -> int:
        """Bytes that are queued here or in the event loop."""
        waiting = self._transport.get_write_buffer_size() if self._transport else 0
        return waiting + self.connection.pending_bytes

    # -- asyncio's side -----------------------------------------------------------------------

    @property
    def is_stranger(self) -> bool:
        """Say if the peer is still to show who it is."""
        return self.connection.state in _BEFORE_LOGIN

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the socket."""
        self._transport = cast("asyncio.Transport", transport)
        high = self.connection.limits.send_high_water_bytes
        self._transport.set_write_buffer_limits(high=high, low=high // 4)
        self.connection.on_timer(self._loop.time())
        self.flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        if self._lost:
            return shared_scratch()
        return self.connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        if self._lost:
            self._discard(nbytes)
            return
        if self._watch is not None:
            self._watch.note_input()
        messages = self.connection.received(nbytes, self._loop.time())
        if messages:
            self._driver.on_messages(messages)
        connection = self.connection
        if connection.pending_bytes or connection.has_bulk or connection.is_closed:
            self._schedule_flush()
        if nbytes >= _LARGE_READ_BYTES and self._is_server:
            self._note_large_read(nbytes)

    def _note_large_read(self, num_bytes: int) -> None:
        if not self._turn_bytes:
            self._loop.call_soon(self._begin_turn)
        self._turn_bytes += num_bytes
        self._choose_reading()

    def _begin_turn(self) -> None:
        self._turn_bytes = 0
        self._choose_reading()

    def _choose_reading(self) -> None:
        """Read from the peer, or leave to the kernel what it sends."""
        may_read = self._lost or not (self._is_deaf or self._turn_bytes >= _TURN_BYTES)
        transport = self._transport
        if may_read is self._is_reading or transport is None or transport.is_closing():
            return
        self._is_reading = may_read
        if may_read:
            transport.resume_reading()
        else:
            transport.pause_reading()

    def _check_unsent(self, unsent_bytes: int) -> None:
        """Hear no more requests of a client that leaves the answers to others unread.

        Only while writing is paused: or nobody would tell when it may be heard again.
        """
        is_much = unsent_bytes > self.connection.limits.send_pause_bytes
        if is_much and self.is_paused and self._is_server and not self._is_deaf:
            self._is_deaf = True
            self._choose_reading()

    def _hear(self) -> None:
        """Read from the client again; what it did not say until now is forgiven."""
        self._is_deaf = False
        self.connection.forgive_silence(self._loop.time())
        self._choose_reading()

    def pause_writing(self) -> None:
        """The loop holds more unsent bytes than the high-water mark."""
        self.is_paused = True
        self._check_unsent(self.unsent_bytes)

    def resume_writing(self) -> None:
        """The loop's unsent bytes fell below the low-water mark."""
        self.is_paused = False
        if self._is_deaf:
            self._hear()
        self._driver.on_writable()
        if self.connection.has_bulk:
            self._schedule_flush()

    def eof_received(self) -> bool:
        """The peer sends nothing more: without it no stream can go on."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        if self._abort_timer is not None:  # it would keep every closed connection for 5 s
            self._abort_timer.cancel()
            _lingering().pop(self, None)
        try:
            if isinstance(exc, OSError) and self.connection.role in OPENERS:
                self._read_rest()
        finally:
            self._end(exc)

    def _read_rest(self) -> None:
        """Take what had come before a send failed: loops give the socket up without reading it."""
        assert self._transport is not None
        sock = self._transport.get_extra_info("socket")
        is_tls = self._transport.get_extra_info("sslcontext") is not None
        if sock is None or is_tls or not hasattr(os, "readv"):  # Windows, where a reset drops it
            return
        with contextlib.suppress(OSError):  # nothing is left, or the reset shows at last
            while not self._lost and (count := os.readv(sock.fileno(), [self.get_buffer(-1)])):
                self.buffer_updated(count)

    def _end(self, exc: Exception | None) -> None:
        """Tell the driver, once, that nothing comes or goes any more."""
        if self._lost:
            return
        self._lost = True
        connection = self.connection
        error: TensorwireError | None = connection.error
        was_mid_frame = connection.is_mid_frame
        if error is None and (exc or was_mid_frame or connection.num_streams):
            where = " in the middle of a frame" if was_mid_frame else ""
            error = ConnectionLost(f"the connection was lost{where}")
        connection.close()
        self._driver.on_lost(error)

    # -- the driver's side --------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue a message; it leaves at the end of this turn of the loop, or when many wait.

        Raises:
            TensorwireError: as `Connection.send`.
        """
        connection = self.connection
        connection.send(message)
        # After a last word the socket is closed at the end of the turn: whoever sends is not to
        # hear meanwhile that the connection is lost.
        if not self._flush_is_due:
            if connection.num_streams <= 1 and not connection.is_closed:
                self._flush_and_watch()  # nothing would join it
                return
            self._schedule_flush()
        if connection.pending_bytes >= self._early_bytes and not connection.is_closed:
            self._early_bytes = _EARLY_BYTES
            self.flush()

    def _schedule_flush(self) -> None:
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._flush_is_due = False
        self._early_bytes = _FIRST_EARLY_BYTES
        self._flush_and_watch()

    def _flush_and_watch(self) -> None:
        self.flush()
        if self._watch is not None and not self._lost:
            self._watch.note_output()

    def flush(self) -> None:
        """Hand all queued bytes to the loop; close the socket if the connection has ended."""
        if self._transport is None or self._lost:
            return
        output = self.connection.take_output(self._room())
        if len(output) == 1:
            self.written_bytes += len(output[0])
            self._transport.write(output[0])
        elif output:
            self.written_bytes += sum(map(len, output))
            self._transport.writelines(output)
        if self.connection.is_closed:
            self._close_socket(has_last_words=bool(output))
            return
        unsent_bytes = self.unsent_bytes
        if unsent_bytes > self.connection.limits.send_hard_bytes:
            # close() would keep every unsent byte in memory until the peer reads; abort frees them.
            limit = self.connection.limits.send_hard_bytes
            self.connection.fail(SlowConsumer(f"the peer left more than {limit} bytes unread"))
            self._transport.abort()
            return
        self._check_unsent(unsent_bytes)
        if self.connection.has_bulk and not self.is_paused:
            self._schedule_flush()

    def _room(self) -> int:
        """Return how many bytes of large bodies may be handed to the loop now."""
        if not self.connection.has_bulk:
            return 0
        assert self._transport is not None
        limit = self.connection.limits.send_high_water_bytes
        return limit - self._transport.get_write_buffer_size()

    def _close_socket(self, *, has_last_words: bool) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        self._abort_timer = self._loop.call_later(_CLOSE_PATIENCE_S, self._transport.abort)
        self._linger()
        if not (has_last_words and self._transport.can_write_eof()):
            self._transport.close()
            return
        # Closing a socket with unread input makes the kernel reset the connection, which can take
        # the last words from the peer before it has read them. So only our half is closed, and what
        # still comes is thrown away until the peer closes its own.
        try:
            self._transport.write_eof()
        except OSError:  # the peer has reset it: there is no half left to close
            self._transport.abort()
            return
        self._end(None)
        self._choose_reading()

    def _linger(self) -> None:
        # Whoever makes and breaks connections faster than they are closed would use up descriptors.
        lingering = _lingering()
        lingering[self] = None
        if len(lingering) > _MAX_LINGERING:
            oldest = next(iter(lingering))
            del lingering[oldest]
            if oldest._transport is not None:
                oldest._transport.abort()

    def _discard(self, num_bytes: int) -> None:
        self._discarded_bytes += num_bytes
        if self._discarded_bytes > _DISCARD_BYTES:
            assert self._transport is not None
            self._transport.abort()

    def fail(self, error: TensorwireError) -> None:
        """End the connection and tell the peer why."""
        self.connection.fail(error)
        self._schedule_flush()

    def close(self) -> None:
        """End the connection; what was sent before still leaves."""
        self.connection.close()
        self.flush()

    def on_timer(self) -> None:
        """Let time pass; the owner calls this about once a second."""
        now = self._loop.time()
        if self._is_deaf:
            self.connection.forgive_silence(now)
            # Nothing would end a client that takes no more from here on (see `is_stuck`'s mark).
            if self.unsent_bytes <= self.connection.limits.send_high_water_bytes:
                self._hear()
        self.connection.on_timer(now)
        if self.connection.pending_bytes or self.connection.is_closed:
            self._schedule_flush()
