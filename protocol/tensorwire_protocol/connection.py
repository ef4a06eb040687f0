"""The state machine of one connection: bytes in, messages out, and the other way round.

It does no I/O and knows no clock: a shell (`transports/`) moves the bytes and tells the time. Both
directions pass one gate: `_admit` for what the peer sends, `send` for what this side does.

    CONNECTING, PREFACE, HANDSHAKE, AUTHENTICATING    `handshake.py` decides what is admitted
        |
        v
      OPEN      requests may be sent before it, and wait
        |
        |  a violation: ERR on stream 0; or an end without a word
        v
     CLOSED
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tensorwire_protocol.bodies import FEATURE_BODY, FEATURE_SHM
from tensorwire_protocol.codec import PLAIN, encode
from tensorwire_protocol.conduct import CancelPace, Conduct, Silence, is_fault
from tensorwire_protocol.errors import (
    BadFraming,
    BadPreface,
    Busy,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    Executed,
    Flood,
    FrameTooLarge,
    RequestCancelled,
    RequestRefused,
    SequenceError,
    TensorwireError,
    TooLarge,
    Unauthenticated,
    UnknownKind,
    Unsupported,
)
from tensorwire_protocol.fitting import Fitting
from tensorwire_protocol.frames import (
    FIRST_OPTIONAL_KIND,
    Flag,
    Frame,
    FrameDecoder,
    unpack_header,
)
from tensorwire_protocol.handshake import Handshake, decode_sound
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK, Limits
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Credit,
    EncodedTerminal,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Hello,
    Kind,
    Message,
    PackedResult,
    Ping,
    Pong,
    Request,
    Result,
    Resume,
    Shm,
    Submit,
    Welcome,
)
from tensorwire_protocol.outbox import Outbox
from tensorwire_protocol.receive_memory import Holding
from tensorwire_protocol.roles import (
    ACCEPTED,
    ENDINGS,
    NOT_BUILT,
    OF_BODIES,
    OPENERS,
    OPENINGS,
    PEER,
    STREAMLESS,
    WORKER_ROLES,
    Role,
    State,
)
from tensorwire_protocol.streams import OpenStreams
from tensorwire_protocol.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tensorwire_protocol.auth import Authenticator, Principal
    from tensorwire_protocol.bodies import Memory, Sharing
    from tensorwire_protocol.codec import Codec
    from tensorwire_protocol.login import Login
    from tensorwire_protocol.receive_memory import ReceiveMemory

NOT_OURS = b"tensorwire: this port speaks the Tensorwire protocol, version 1, not what was sent\n"
# A peer with this feature reads only while one of its callers waits, so silence proves nothing.
FEATURE_PASSIVE = "passive"
# A lost connection's streams go on for a while without it, and RESUME finds them on another.
FEATURE_RESUME = "resume"
# A client may say how many events it takes; what is made meanwhile merges into the next one.
FEATURE_CREDIT = "credit"

# See `roles`: an enum's member is dear where it is asked for with every frame.
_PREFACE: Final = State.PREFACE
_OPEN: Final = State.OPEN
_CLOSED: Final = State.CLOSED
_CLIENT: Final = Role.CLIENT
_DATA: Final = int(Kind.DATA)
_RESUME: Final = int(Kind.RESUME)
_CREDIT: Final = int(Kind.CREDIT)
_CANCEL: Final = int(Kind.CANCEL)
_ERR: Final = int(Kind.ERR)
_BODY: Final = int(Flag.BODY)  # an IntFlag's own `&` costs two microseconds
_OPENINGS: Final = OPENINGS
_ENDINGS: Final = ENDINGS
_NOT_BUILT: Final = NOT_BUILT
_OF_BODIES: Final = OF_BODIES
_STREAMLESS: Final = STREAMLESS


class Connection:
    """One end of a connection.

    Args:
        role: which end of which link.
        limits: what this side accepts; the server side announces them.
        scratch: receive memory that all connections of one thread may share.
        memory: bounds what all connections together hold of unfinished frames.
        software, features, session: what HELLO or WELCOME says of this side.
        login: how a client says who it is.
        authenticator: who decides about a client's login; without one every peer may do all.
        nonce: 32 random bytes, fresh for each connection that has an authenticator.
        codec: how frames are read and written; all codecs agree on the bytes.
        bodies: where large messages land; by default in memory made for each.
        sharing: memory in common with the peer, for large messages both ways.

    Attributes:
        on_output: called when there is something to send that no call of the shell brought about.
    """

    def __init__(
        self,
        role: Role,
        *,
        limits: Limits | None = None,
        scratch: memoryview | None = None,
        memory: ReceiveMemory | None = None,
        software: str = "",
        features: Iterable[str] = (),
        session: bytes = b"",
        login: Login | None = None,
        authenticator: Authenticator | None = None,
        nonce: bytes = b"",
        codec: Codec = PLAIN,
        bodies: Memory | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        on_worker_link = role in WORKER_ROLES
        self.role = role
        self.limits = limits or (WORKER_LINK if on_worker_link else CLIENT_LINK)
        self.error: TensorwireError | None = None  # why it was closed, when a side did wrong
        self.streams = OpenStreams()
        self.peer_is_leaving = False  # GOAWAY was received
        self._is_opener = role in OPENERS
        self._codec = codec
        self._features = tuple(features)
        self._accepts, self._may_send = ACCEPTED[role], ACCEPTED[PEER[role]]
        self._meta_bytes = self.limits.meta_bytes(is_from_opener=not self._is_opener)
        holding = None if memory is None else Holding(memory, self)
        self._holding = holding
        self._decoder = FrameDecoder(
            max_frame_bytes=self.limits.frame_bytes,
            max_segments=self.limits.segments,
            scratch=scratch,
            hold=None if holding is None else holding.hold_frame,
        )
        self._outbox = Outbox()
        self._bodies, self._sharing = bodies, sharing
        self._transfers: Transfers | None = None  # until both sides have said that they know bodies
        self.on_output: Callable[[], None] = _nothing
        self._heard = 0.0
        self._ticked = 0.0
        self._silence = Silence(self.limits)
        self._conduct = Conduct(self.limits)
        self._cancel_pace: CancelPace | None = None
        self._handshake: Handshake | None = Handshake(
            role,
            self.limits,
            decoder=self._decoder,
            outbox=self._outbox,
            streams=self.streams,
            software=software,
            features=self._features,
            session=session,
            login=login,
            authenticator=authenticator,
            nonce=nonce,
        )
        self.state = self._handshake.state
        # Who the peer of a server is; None until it has shown it.
        self.principal: Principal | None = self._handshake.principal
        self.peer_limits = self._handshake.peer_limits
        self.peer_features: tuple[str, ...] = ()
        self.peer_software = ""
        self.was_greeted = False  # the peer's HELLO or WELCOME has come; still true when closed
        # What both sides know.
        self.can_resume = False  # a lost connection's streams go on
        self.has_credit = False  # the client may count events
        self._fitting = self._build_fitting()

    # -- what the driver asks -----------------------------------------------------------------

    @property
    def num_streams(self) -> int:
        """How many streams are open."""
        return len(self.streams)

    @property
    def num_places(self) -> int:
        """How many streams more the peer takes at present."""
        return self.peer_limits.streams - len(self.streams)

    @property
    def last_stream(self) -> int:
        """The highest stream that the client side has opened."""
        return self.streams.last

    @property
    def is_closed(self) -> bool:
        """Say if nothing more may be sent or received."""
        return self.state is _CLOSED

    @property
    def is_mid_frame(self) -> bool:
        """Say if the peer stopped inside a frame."""
        return self._decoder.is_mid_frame

    @property
    def pending_bytes(self) -> int:
        """How many bytes wait in `take_output`, large bodies aside."""
        return self._outbox.num_bytes

    @property
    def has_bulk(self) -> bool:
        """Say if `take_output` could go on with a large body."""
        return self._outbox.has_bulk

    @property
    def can_send_bodies(self) -> bool:
        """Say if messages may be larger than a frame."""
        return self._transfers is not None

    def is_open(self, stream: int) -> bool:
        """Say if `stream` has begun and not ended."""
        return stream in self.streams

    def open_streams(self) -> list[int]:
        """Return the streams that have begun and not ended."""
        return self.streams.ids()

    # -- bytes in -----------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """Return memory for the next bytes from the peer."""
        return self._decoder.get_buffer()

    def received(self, num_bytes: int, now: float) -> list[Message]:
        """Take `num_bytes` that were read into `get_buffer()`; return what they completed.

        After a violation the list ends with what came before it, `is_closed` is true, `error`
        says why, and `take_output` holds the last words for the peer. Messages may refer to
        receive memory only through arrays, and those own their memory.
        """
        self._heard = now
        messages: list[Message] = []
        if self.state is _CLOSED:
            return messages
        self._decoder.received(num_bytes)
        try:
            if self.state is _PREFACE and self._handshake is not None:
                self._handshake.take_preface()
                self.state = self._handshake.state
                if self.state is _PREFACE:
                    return messages
            decoder = self._decoder
            while self.state is not _CLOSED and (frame := decoder.next_frame()) is not None:
                message = self._admit(frame, now)
                if message is not None:
                    messages.append(message)
            if decoder.is_mid_frame:
                self._conduct.note_unfinished(self._decoder, now)
        except FrameTooLarge as error:
            self.fail(error if self._handshake is None else self._handshake.explain(error))
        except (ConnectionFailed, Unauthenticated, Busy) as error:
            self.fail(error)
        return messages

    def feed(self, data: bytes, now: float = 0.0) -> list[Message]:
        """Take bytes of any length, as `received` does; for tests and simple drivers."""
        messages: list[Message] = []
        view = memoryview(data)
        while len(view) and not self.is_closed:
            buffer = self.get_buffer()
            part = view[: len(buffer)]
            buffer[: len(part)] = part
            messages += self.received(len(part), now)
            view = view[len(part) :]
        return messages

    def _admit(self, frame: Frame, now: float) -> Message | None:
        """The gate for everything the peer sends."""
        kind = frame.kind
        if not self._accepts[kind]:
            if kind >= FIRST_OPTIONAL_KIND and self.state is _OPEN:
                return None
            raise UnknownKind(f"frames of kind {kind:#04x} are not accepted on this link (now)")
        if frame.stream and _STREAMLESS[kind]:
            raise BadFraming(f"{Kind(kind).name} came on stream {frame.stream}; it belongs on 0")
        if self.state is _OPEN and _OPENINGS[kind]:
            return self._admit_opening(frame, now)
        if len(frame.meta) > self._meta_bytes:
            raise BadFraming(f"a meta has {len(frame.meta)} bytes, {self._meta_bytes} allowed")
        if self._handshake is not None:
            return self._admit_early(self._handshake, frame)
        if _NOT_BUILT[kind] or (_OF_BODIES[kind] and not self._is_negotiated(kind)):
            raise UnknownKind(f"{Kind(kind).name} was not negotiated on this connection")
        if frame.flags:
            return self._admit_body(frame, now)
        if kind == _DATA:
            return None  # more is to come
        message = decode_sound(frame, self.limits, self._codec)
        if _ENDINGS[kind]:
            return self._note_terminal(message)
        return self._note(message, now)

    def _admit_early(self, handshake: Handshake, frame: Frame) -> Message | None:
        message = handshake.admit(frame)
        self.state, self.principal = handshake.state, handshake.principal
        if isinstance(message, Failure):
            return self._note_terminal(message)
        if message is not None:
            self.was_greeted = True
            self.peer_features = handshake.peer_features
            self.peer_software = handshake.peer_software
            self.peer_limits = handshake.peer_limits
            self._fitting = self._build_fitting()
            common = {*self._features} & {*self.peer_features}
            self.can_resume, self.has_credit = FEATURE_RESUME in common, FEATURE_CREDIT in common
            if FEATURE_BODY in common:
                self._transfers = self._build_transfers()
        if self.state is _OPEN:
            self._handshake = None
        return message

    def _build_fitting(self) -> Fitting:
        usual = WORKER_LINK if self.role in WORKER_ROLES else CLIENT_LINK
        return Fitting(self.peer_limits, usual, is_opener=self._is_opener)

    def _build_transfers(self) -> Transfers:
        return Transfers(
            self,
            self._decoder,
            self._outbox,
            self.limits,
            self._codec,
            self._bodies,
            self._holding,
            self._sharing if FEATURE_SHM in self.peer_features else None,
            is_metered_in=self.role is Role.SERVER,
            is_metered_out=self.role is _CLIENT,
        )

    def _admit_opening(self, frame: Frame, now: float) -> Message | None:
        """Take a REQ, RESUME or SUBMIT: what is wrong inside it fails that request alone."""
        stream = frame.stream
        if frame.kind == _RESUME and not self.can_resume:
            raise UnknownKind("RESUME was not negotiated on this connection")
        num_open = self.streams.open(stream)
        try:
            if num_open > self.limits.streams:
                raise Busy(f"{self.limits.streams} streams are open on this connection; wait")
            if frame.flags & _BODY and self._transfers is None:
                raise Unsupported("bodies in DATA frames were not negotiated")
            if len(frame.meta) > self._meta_bytes:
                raise TooLarge(
                    f"the meta has {len(frame.meta)} bytes; at most {self._meta_bytes} are accepted"
                )
            if frame.flags & _BODY and self._transfers is not None:
                return self._transfers.begin(frame, self._heard)
            message: Message = self._codec.decode(frame, self.limits)
            return message
        except (RequestRefused, Busy) as error:
            if frame.flags & _BODY and self._transfers is not None:
                self._transfers.discard(stream, self._heard)
            self.send(Failure.of(stream, error))
            if isinstance(error, Busy):
                self._note_fault(now)  # `send` counts what a request did wrong, this was the peer
            return None

    def _admit_body(self, frame: Frame, now: float) -> Message | None:
        """Take the head of an answer, or the last DATA of any message."""
        if self._transfers is None:
            raise BadFraming("an answer has a body, which was not negotiated")
        if frame.kind != _DATA:
            answer = self._begin_answer(self._transfers, frame, now)
            return None if answer is None else self._note_terminal(answer)
        message = self._transfers.finish(frame, now)
        if not self._is_opener:
            return message
        if message is not None:
            return self._note_terminal(message)
        self.streams.end(frame.stream)  # of an answer that nobody wants any more
        return None

    def _begin_answer(self, transfers: Transfers, frame: Frame, now: float) -> Message | None:
        if frame.stream not in self.streams:
            if self.role is _CLIENT:
                raise SequenceError(f"stream {frame.stream} ended, but it is not open")
            transfers.discard(frame.stream, now)  # of an attempt that was given up
            return None
        try:
            return transfers.begin(frame, now)
        except (RequestRefused, Busy) as error:
            raise BadFraming(f"RES: {error.message}") from error

    def _note(self, message: Message, now: float) -> Message | None:
        """Keep the books for a message of an open connection."""
        if isinstance(message, Event):
            self.streams.advance(message.stream, message.index, len(message.tokens))
        elif isinstance(message, EventBatch):
            self.streams.advance_all(message)
        elif isinstance(message, Ack):
            if message.stream not in self.streams and self.role is _CLIENT:
                raise SequenceError(f"ACK for stream {message.stream}, which is not open")
        elif isinstance(message, Cancel):
            self._note_fault(now)
            return self._note_cancel(message, now)
        elif isinstance(message, Credit):
            return self._note_credit(message, now)
        elif isinstance(message, Shm):
            if self._transfers is not None:
                self._transfers.note_shared(message)
            return None
        elif isinstance(message, Ping):
            self._answer_ping(message, now)
            return None
        elif isinstance(message, Pong):
            self._note_fault(now)  # one in 20 s was asked for; a flood of them is one
            return None
        elif isinstance(message, Goaway):
            self._note_fault(now)
            self.peer_is_leaving = True
        elif isinstance(message, (Hello, Welcome)):
            raise SequenceError(f"{message.KIND.name} came a second time")
        return message

    def _is_negotiated(self, kind: int) -> bool:
        return self._transfers is not None or (kind == _CREDIT and self.has_credit)

    def _note_credit(self, credit: Credit, now: float) -> Credit | None:
        """Take what the peer allows: bytes of a body to its client, events to a server."""
        if self._is_opener:
            self._outbox.allow(credit.stream, credit.amount)
            return None
        if credit.stream not in self.streams:
            self._note_fault(now)
            return None
        return credit if self.has_credit else None

    def _note_cancel(self, cancel: Cancel, now: float) -> Cancel | None:
        transfers, stream = self._transfers, cancel.stream
        if transfers is None or not transfers.is_receiving(stream):
            return cancel if stream in self.streams else None
        transfers.discard(stream, now)
        is_late = cancel.reason == Finish.DEADLINE.value
        kind = DeadlineExceeded if is_late else RequestCancelled
        error = kind("it was stopped before all of it had come", executed=Executed.NO)
        self.send(Failure.of(stream, error))
        return None

    def _note_terminal(self, message: Message) -> Message | None:
        # Spelled out, not as `TERMINAL`: compiled code compares these one by one.
        assert isinstance(message, (Result, Failure, End, PackedResult, EncodedTerminal))
        stream = message.stream
        if isinstance(message, Failure) and stream == 0:
            self.error = message.to_error()
            self.close()
            return message
        if not self._is_opener:
            raise SequenceError(f"ERR for stream {stream} came from the side that asks")
        if self._transfers is not None:
            if self._transfers.is_receiving(stream):
                raise SequenceError(f"stream {stream} ended inside the body of its answer")
            if self._outbox.has_bodies:
                self._transfers.stop(stream)
        expected = self.streams.end(stream)
        if expected is None:
            if self.role is Role.DISPATCHER:
                return None  # of an attempt that was given up
            raise SequenceError(f"stream {stream} ended, but it is not open")
        if self.role is _CLIENT and isinstance(message, End) and message.count != expected:
            raise SequenceError(
                f"stream {stream} ended after {message.count} tokens, {expected} came"
            )
        return message

    def _answer_ping(self, ping: Ping, now: float) -> None:
        self._conduct.note_ping(now)
        self._emit(Pong(payload=ping.payload))  # behind all that was answered before

    def _note_fault(self, now: float) -> None:
        if not self._is_opener:  # whoever asks hears of nothing that it did not ask for
            self._conduct.note_fault(now)

    # -- messages out -------------------------------------------------------------------------

    def next_stream(self) -> int:
        """Return the id for the next request of this side."""
        return self.streams.last + 1

    def send(self, message: Message) -> None:
        """Queue a message; the one gate for everything this side sends.

        Raises:
            TensorwireError: the connection is closed; `error` where that says why.
            TooLarge, OutputTooLarge: the peer would not accept the message; nothing changed.
            BadTensor, BadMeta: the message cannot be sent; nothing changed.
        """
        if self.state is _CLOSED:
            raise self.error or ConnectionLost("the connection is closed", executed=Executed.NO)
        kind: int = message.KIND
        if not self._may_send[kind]:
            raise AssertionError(f"{self.role.value} may not send {message.KIND.name}")
        buffers = self._codec.encode(message, self._fitting.limits)
        size = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        body = None
        if size > self._fitting.welcome_bytes:
            if self._transfers is not None:
                buffers, body = self._transfers.cut(buffers, message, size, self.peer_limits)
            if body is not None:
                size = len(buffers[0])
            self._fitting.check(message, buffers, body)
        if _OPENINGS[kind] or _ENDINGS[kind]:
            self._note_sent(message, kind)
        elif kind == _CREDIT and not self._is_opener:  # whose own must not pass its REQ
            self._outbox.add_urgent(buffers)
            return
        elif isinstance(message, Cancel) and not self._may_cancel(message):
            return
        if self._handshake is not None and self._handshake.holds_output:
            # Among them a GOAWAY, which may not come before WELCOME.
            self._outbox.hold(buffers, body)
            return
        if body is not None and self._transfers is not None:
            self._transfers.send(buffers, body)
            return
        self._outbox.add(buffers, size)
        if kind == _CANCEL:
            self._leave(message)
        elif kind == _ERR and is_fault(unpack_header(buffers[0])[3]):
            self._note_refusal()

    def _may_cancel(self, cancel: Cancel) -> bool:
        if self._cancel_pace is None:
            self._cancel_pace = CancelPace(self.peer_limits)
        return self._cancel_pace.may_go(cancel, max(self._heard, self._ticked))

    def _leave(self, message: Message) -> None:
        """After a CANCEL: nothing more of the stream's bodies leaves or lands."""
        if self._transfers is not None and isinstance(message, Cancel):
            self._transfers.leave(message.stream, self._heard)

    def _note_refusal(self) -> None:
        """Count that the peer has made this side refuse, whenever that turned out."""
        try:
            self._note_fault(self._heard)
        except Flood as error:
            self.fail(error)

    def _note_sent(self, message: Message, kind: int) -> None:
        if _ENDINGS[kind]:
            assert isinstance(message, (Result, Failure, End, PackedResult, EncodedTerminal))
            if message.stream and self.streams.end(message.stream) is None:
                raise AssertionError(f"stream {message.stream} ends, but it is not open")
        elif isinstance(message, Submit):
            self._open(message.stream, len(message.so_far))
        elif isinstance(message, Resume):
            self._open(message.stream, message.next_index)
        elif isinstance(message, Request):
            self._open(message.stream, 0)

    def _open(self, stream: int, next_index: int) -> None:
        if stream <= self.streams.last:
            raise AssertionError("stream ids must rise")
        self.streams.open(stream, next_index)

    def fail(self, error: TensorwireError) -> None:
        """Close the connection; the peer is told why in its last words."""
        if self.state is _CLOSED:
            return
        if isinstance(error, BadPreface):
            # Whatever speaks here is not ours: no frame would mean anything to it.
            if not self._is_opener:
                self._outbox.add([NOT_OURS], len(NOT_OURS))
        else:
            if isinstance(error, Flood) and self.state is _OPEN and not self._is_opener:
                # What is above was not executed; what is not may have been.
                self._emit(Goaway(code=int(error.code), last_stream=self.streams.last))
            self._emit(Failure.of(0, error))
        # Without its traceback: that would keep the frame that was refused for as long as anybody
        # keeps the connection.
        self.error = error.with_traceback(None)
        self.close()

    def evict(self, error: Busy) -> None:
        """Close the connection: what it holds of unfinished frames is too much for the server."""
        self.fail(error)

    def close(self) -> None:
        """Close from this side without a word; what is queued may still be sent."""
        self.state, self._handshake = _CLOSED, None
        self._decoder.clear()  # or its last buffer, filled up, would have no room for a next read
        if self._transfers is not None:
            self._transfers.clear()
            self._transfers = None
        # The shell knows this object: a circle would keep both, and the memory they share.
        self.on_output, self._sharing = _nothing, None

    def _emit(self, message: Message) -> None:
        """Queue a message of the connection itself."""
        buffers = encode(message, self.limits)
        self._outbox.add(buffers, sum(map(len, buffers)))

    def take_output(self, budget: int | None = None) -> list[bytes | memoryview]:
        """Return what is to be written, in order, small frames joined.

        Of large bodies it is as much as `budget` bytes allow, and a frame more; None: all of them.
        """
        return self._outbox.take(budget)

    def note_waste(self) -> None:
        """Count that bytes of a body have come for nothing; for `transfers`."""
        self._note_fault(self._heard)

    # -- time ---------------------------------------------------------------------------------

    def forgive_silence(self, now: float) -> None:
        """Blame the peer for nothing that has not come until `now`: this side did not read."""
        self._heard = now
        self._conduct.forgive_unfinished(now)
        if self._transfers is not None:
            self._transfers.forgive_unfinished()

    def on_timer(self, now: float) -> None:
        """Let time pass: handshake, frames that trickle, PING after silence, end after longer."""
        self._ticked = now
        if self.state is _CLOSED:
            return
        try:
            if self._handshake is not None:
                self._handshake.check_time(now)
                return
            if self._transfers is not None:
                self._transfers.on_timer(now)
            # A server's frame may wait in the kernel while no caller of its client reads.
            if self._decoder.is_mid_frame and not self._is_opener:
                self._conduct.check_unfinished(self._decoder, now)
            is_silence_told = FEATURE_PASSIVE not in self.peer_features or self._is_opener
            if is_silence_told and self._silence.is_ping_due(now, now - self._heard):
                self._outbox.add_urgent(encode(Ping(), self.limits))
        except ConnectionFailed as error:
            self.fail(error)
        if self._cancel_pace is not None and not self.is_closed:
            for cancel in self._cancel_pace.take(self.streams, now):
                self._emit(cancel)
                self._leave(cancel)


def _nothing() -> None:
    """Stand in for `on_output` until a shell has come."""
