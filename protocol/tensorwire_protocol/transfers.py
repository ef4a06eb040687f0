"""The bodies of one connection: those that arrive, and those that leave."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tensorwire_protocol.bodies import (
    BODY_BYTES,
    SHARED_BYTES,
    WINDOW_BYTES,
    FreshMemory,
    IncomingBody,
    early_places,
)
from tensorwire_protocol.errors import (
    Busy,
    DeadlineExceeded,
    Executed,
    Flood,
    SequenceError,
    SlowConsumer,
    TensorwireError,
    TooLarge,
    UnknownKind,
)
from tensorwire_protocol.frames import (
    DATA_BYTES,
    HEADER_BYTES,
    MAX_BODY_BYTES,
    SEGMENT_KINDS,
    Flag,
    Frame,
    build_body,
)
from tensorwire_protocol.messages import Credit, Failure, Request, Shm, Submit, changed
from tensorwire_protocol.outbox import OutgoingBody, data_header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.bodies import Memory, Sharing
    from tensorwire_protocol.codec import Codec
    from tensorwire_protocol.frames import FrameDecoder
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Message
    from tensorwire_protocol.outbox import Outbox
    from tensorwire_protocol.receive_memory import Holding

_PATIENCE_S = 30.0  # for memory, and for a peer to take the next DATA frame


class Owner(Protocol):
    """The connection, as its bodies need it."""

    on_output: Callable[[], None]

    def send(self, message: Message) -> None:
        """Queue a message."""

    def note_waste(self) -> None:
        """Count that bytes have come for nothing.

        Raises:
            Flood: it was too often.
        """


class Transfers:
    """The books of all bodies of a connection; made when both sides have said they know bodies.

    Args:
        limits, codec: of this side.
        memory: where bodies land; None: in memory made for each.
        holding: told how much is taken that `memory` does not bound.
        sharing: memory in common with the peer; None: everything goes over the connection.
        is_metered_in, is_metered_out: this side allows, or needs to be allowed, bytes by CREDIT.
    """

    def __init__(
        self,
        owner: Owner,
        decoder: FrameDecoder,
        outbox: Outbox,
        limits: Limits,
        codec: Codec,
        memory: Memory | None,
        holding: Holding | None,
        sharing: Sharing | None,
        *,
        is_metered_in: bool,
        is_metered_out: bool,
    ) -> None:
        self._owner = owner
        self._decoder = decoder
        self._outbox = outbox
        self._limits = limits
        self._codec = codec
        self._memory = memory or FreshMemory()
        self._holding = holding
        self._held_bytes = 0
        self._sharing = sharing
        self._shared: Shm | None = None  # where the segments of the next body lie
        self._last_shared = 0  # the stream of the last body whose segments lay in shared memory
        if sharing is not None:
            sharing.on_returns = self._return_loans
        self._window_in = WINDOW_BYTES if is_metered_in else None
        self._window_out = WINDOW_BYTES if is_metered_out else None
        self._incoming: dict[int, IncomingBody] = {}
        self._num_left = 0  # DATA frames that had left when the clock was last looked at
        self._stalled_at: float | None = None  # since then none has left
        decoder.sinks = self

    @property
    def num_incoming(self) -> int:
        """How many bodies have begun to arrive and not ended, discarded ones too."""
        return len(self._incoming)

    def clear(self) -> None:
        """The connection has ended: give all memory back."""
        if self._sharing is not None:
            self._sharing.close()
        self._outbox.clear_bulk()
        for body in self._incoming.values():
            self._discard(body)
        self._incoming.clear()

    # -- in -----------------------------------------------------------------------------------

    def note_shared(self, message: Shm) -> None:
        """Take what the peer says of shared memory.

        Raises:
            UnknownKind: there is none.
        """
        if self._sharing is None:
            raise UnknownKind("SHM was not negotiated on this connection")
        if message.stream:
            self._shared = message
        else:
            returned = message.payload.get("returned")
            self._sharing.take_back(returned if type(returned) is list else ())

    def _borrow(self, frame: Frame) -> list[memoryview] | None:
        """Return the segments of a body that lie in shared memory; None if they do not."""
        shared, self._shared = self._shared, None
        if shared is None or self._sharing is None:
            return None
        if shared.stream != frame.stream:
            raise SequenceError(f"SHM for stream {shared.stream} came before another body")
        self._last_shared = frame.stream
        return self._sharing.borrow(shared.payload, frame.lengths)

    def begin(self, frame: Frame, now: float) -> Message | None:
        """Take the head of a body; return the message if all of it is here.

        Raises:
            TooLarge, Busy, RequestRefused: it is not wanted; `discard` it.
            Flood: too many begin and do not end.
        """
        num_bytes = sum(frame.lengths)
        limit = self._limits.message_bytes
        if num_bytes > limit:
            raise TooLarge(f"the arrays have {num_bytes} bytes; at most {limit} are accepted")
        shared = self._borrow(frame)
        if shared is not None:
            return self._decode(frame, shared)
        body = IncomingBody(frame.stream, frame.lengths, now, allowed=self._window_in)
        if type(self._memory) is FreshMemory:
            self._hold(body, num_bytes)
        reservation = self._memory.reserve(frame.lengths, partial(self._on_memory, body))
        body.reservation = reservation
        self._open(body)
        places = reservation.segments
        if places is None:
            self._hold(body, min(num_bytes, WINDOW_BYTES))
        if places is None and num_bytes <= WINDOW_BYTES:
            reservation.cancel()  # its bytes are on their way, and will wait for nothing
            body.reservation, places = None, early_places(frame.lengths)
        if places is None:
            body.place(early_places(frame.lengths))
            body.head = frame
        else:
            self._receive(body, frame, places)
        return None

    def _hold(self, body: IncomingBody, num_bytes: int) -> None:
        """Count what a body takes from now on.

        Raises:
            Busy: there is no room for it, and nothing has changed.
        """
        if self._holding is None or num_bytes == body.held_bytes:
            return
        held_bytes = self._held_bytes + num_bytes - body.held_bytes
        self._holding.hold_bodies(held_bytes)
        self._held_bytes, body.held_bytes = held_bytes, num_bytes

    def _discard(self, body: IncomingBody) -> None:
        body.discard()
        self._hold(body, 0)

    def _open(self, body: IncomingBody) -> None:
        if len(self._incoming) >= self._limits.streams:
            raise Flood(f"{len(self._incoming)} bodies were begun and not ended")
        self._incoming[body.stream] = body
        self._decoder.expects_data = True

    def _receive(self, body: IncomingBody, head: Frame, places: Sequence[memoryview]) -> None:
        body.place(places)
        body.message = self._decode(head, places)
        body.head = None
        left = body.num_bytes - WINDOW_BYTES
        if self._window_in is not None and left > 0:
            body.allow(left)
            self._allow(body.stream, left)

    def _allow(self, stream: int, num_bytes: int) -> None:
        while num_bytes:
            amount = min(num_bytes, MAX_BODY_BYTES)
            self._owner.send(Credit(stream=stream, amount=amount))
            num_bytes -= amount
        self._owner.on_output()

    def _return_loans(self, loans: list[Any]) -> None:
        self._owner.send(Shm(payload={"returned": loans}))
        self._owner.on_output()

    def _decode(self, head: Frame, places: Sequence[memoryview]) -> Message:
        message: Message = self._codec.decode(head.with_segments(list(places)), self._limits)
        return message

    def _on_memory(self, body: IncomingBody) -> None:
        """The memory that a body waits for is there."""
        if body.head is None or body.reservation is None:
            return
        assert body.reservation.segments is not None
        try:
            self._receive(body, body.head, body.reservation.segments)
        except TensorwireError as error:
            self._refuse(body, error)
        else:
            self._hold(body, 0)

    def discard(self, stream: int, now: float) -> None:
        """Throw away what has come and still comes of a body."""
        shared, self._shared = self._shared, None
        if shared is not None:
            self._return_loans([shared.payload.get("loan")])
        if shared is not None or stream == self._last_shared:
            return  # nothing of it is still to come
        body = self._incoming.get(stream)
        if body is None:
            body = IncomingBody(stream, (WINDOW_BYTES,), now, allowed=None)
            self._open(body)
        self._discard(body)

    def is_receiving(self, stream: int) -> bool:
        """Say if a body of this stream arrives and is wanted."""
        body = self._incoming.get(stream)
        return body is not None and not body.is_discarded

    def open_sink(
        self, stream: int, segment: int, num_bytes: int, *, is_last: bool
    ) -> IncomingBody:
        """Return the body that a DATA frame belongs to.

        Raises:
            SequenceError, Flood: the frame is not due.
        """
        body = self._incoming.get(stream)
        if body is None:
            raise SequenceError(f"DATA came on stream {stream}, where none is due")
        if body.is_discarded and body.is_waste(num_bytes) and not is_last:
            self._owner.note_waste()
        body.announce(segment, num_bytes, is_last=is_last)
        return body

    def finish(self, data: Frame, now: float) -> Message | None:
        """Return the message that the last DATA frame of a body completes; None if unwanted."""
        body = self._incoming.pop(data.stream)
        self._decoder.expects_data = bool(self._incoming)
        self._hold(body, 0)
        body.reservation = None  # which knows the body: its memory would wait for the collector
        message = body.message
        if isinstance(message, Request | Submit) and message.deadline_ms is not None:
            passed_ms = int((now - body.began_at) * 1000)
            return changed(message, deadline_ms=max(0, message.deadline_ms - passed_ms))
        return message

    # -- out ----------------------------------------------------------------------------------

    def cut(
        self, frame: list[bytes | memoryview], message: Message, size: int, peer: Limits
    ) -> tuple[list[bytes | memoryview], OutgoingBody | None]:
        """Return a message as it leaves: as its frame, or as a head and the body that follows."""
        limit = BODY_BYTES if self._sharing is None else SHARED_BYTES
        fits = size - HEADER_BYTES <= min(limit, peer.frame_bytes)
        if fits or len(frame) == 1 or message.KIND not in SEGMENT_KINDS:
            return frame, None
        head, segments = build_body(frame)
        stream: int = message.stream  # type: ignore[union-attr]  # which these kinds have
        data_bytes = min(DATA_BYTES, peer.frame_bytes)
        return [head], OutgoingBody(stream, segments, data_bytes, allowed=self._window_out)

    def send(self, head: Sequence[bytes | memoryview], body: OutgoingBody) -> None:
        """Queue a message that leaves as a head and a body."""
        loan = None if self._sharing is None else self._sharing.lend(body.segments)
        if loan is None:
            self._outbox.add(head, sum(map(len, head)))
            self._outbox.add_body(body)
            return
        buffers = [*self._codec.encode(Shm(stream=body.stream, payload=loan), self._limits), *head]
        self._outbox.add(buffers, sum(map(len, buffers)))

    def stop(self, stream: int) -> None:
        """Send nothing more of a stream's body but its end, if it has not left yet."""
        body = self._outbox.drop_body(stream)
        if body is not None:
            self._outbox.add([data_header(stream, body.segment, 0, Flag.END)], HEADER_BYTES)

    def leave(self, stream: int, now: float) -> None:
        """Give a stream up, as CANCEL has told the peer: nothing more of it leaves or lands."""
        self.stop(stream)
        if self.is_receiving(stream):
            self.discard(stream, now)

    # -- time ---------------------------------------------------------------------------------

    def forgive_unfinished(self) -> None:
        """Let the time of the bodies that are not complete begin anew."""
        for body in self._incoming.values():
            body.due_at = None

    def on_timer(self, now: float) -> None:
        """Look for bodies that take too long.

        Raises:
            Flood: one comes too slowly to be honest.
            SlowConsumer: the peer does not take what it asked for.
        """
        if self._window_in is not None:
            for body in [*self._incoming.values()]:
                self._check(body, now)
        outbox = self._outbox
        if outbox.num_bulk_frames != self._num_left or not outbox.has_bulk:
            self._num_left, self._stalled_at = outbox.num_bulk_frames, None
        elif self._stalled_at is None:
            self._stalled_at = now
        elif now - self._stalled_at >= _PATIENCE_S:
            raise SlowConsumer(f"the peer took nothing of a large answer for {_PATIENCE_S:g} s")

    def _check(self, body: IncomingBody, now: float) -> None:
        if body.head is not None:
            if now - body.began_at >= _PATIENCE_S:
                self._refuse(body, Busy("the server has no memory for this request; try again"))
        elif body.due_at is None:
            limits = self._limits
            body.due_at = now + limits.frame_grace_s + body.num_bytes / limits.frame_bytes_per_s
        elif now >= body.due_at:
            raise Flood(f"a body of {body.num_bytes} bytes did not come in time")
        deadline_ms = getattr(body.message, "deadline_ms", None)
        if deadline_ms is not None and (now - body.began_at) * 1000 >= deadline_ms:
            late = "the deadline passed before all of the request was here"
            self._refuse(body, DeadlineExceeded(late, executed=Executed.NO))

    def _refuse(self, body: IncomingBody, error: TensorwireError) -> None:
        self._discard(body)
        self._owner.send(Failure.of(body.stream, error))
        self._owner.on_output()
