"""One client's connection: requests come in, frames go out, at most one batch each turn."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from tensorwire_protocol.bodies import FEATURE_BODY
from tensorwire_protocol.codec.typed import PACKING
from tensorwire_protocol.connection import FEATURE_PASSIVE, FEATURE_RESUME, Connection
from tensorwire_protocol.errors import InternalError, OutputTooLarge, TensorwireError
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    EncodedTerminal,
    Event,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Message,
    Request,
    Result,
    Resume,
)
from tensorwire_protocol.roles import Role, State
from tensorwire_protocol.transports.aio import AioTransport, shared_scratch

from tensorwire_server.telemetry.faults import log_fault

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Sequence

    from tensorwire_protocol.auth import Authenticator, Principal
    from tensorwire_protocol.bodies import Memory
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.receive_memory import ReceiveMemory

    from tensorwire_server.gateway.requests import LiveRequest

log = logging.getLogger(__name__)


class Handler(Protocol):
    """Who decides about requests: the gateway."""

    def accept(self, session: Session, request: Request) -> LiveRequest | None:
        """Take a request; None if it was answered at once."""

    def resume(self, session: Session, message: Resume) -> LiveRequest | None:
        """Go on with a request; None if it was answered at once."""

    def on_session_closed(self, session: Session) -> None:
        """The connection is gone, its requests were told."""

    def now(self) -> float:
        """Return monotonic seconds."""


class _Delta:
    """Tokens of one stream that wait to be sent."""

    __slots__ = ("first_index", "held_since", "texts", "tokens")

    def __init__(self, first_index: int) -> None:
        self.first_index = first_index
        self.held_since: float | None = None  # because the client does not read
        self.tokens: list[int] = []
        self.texts: list[str] = []


class Session:
    """Drives the transport of one client; the reader of its requests."""

    def __init__(
        self,
        handler: Handler,
        loop: asyncio.AbstractEventLoop,
        *,
        limits: Limits,
        memory: ReceiveMemory,
        session_id: bytes,
        software: str,
        authenticator: Authenticator | None = None,
        nonce: bytes = b"",
        bodies: Memory | None = None,
    ) -> None:
        connection = Connection(
            Role.SERVER,
            limits=limits,
            scratch=shared_scratch(),
            memory=memory,
            software=software,
            features=(FEATURE_PASSIVE, FEATURE_RESUME, FEATURE_BODY),
            session=session_id,
            authenticator=authenticator,
            nonce=nonce,
            bodies=bodies,
            codec=PACKING,
        )
        self.transport = AioTransport(connection, self)
        self._connection = connection
        self._handler = handler
        self._loop = loop
        self._live: dict[int, LiveRequest] = {}
        self._deltas: dict[int, _Delta] = {}
        self._stalls_s: dict[int, float] = {}  # how long a stream's tokens were held back
        self._flush_is_due = False

    @property
    def principal(self) -> Principal | None:
        """Who the client is, once it has logged in."""
        return self._connection.principal

    @property
    def principal_name(self) -> str:
        """Whose request keys it may use."""
        principal = self._connection.principal
        return "" if principal is None else principal.name

    @property
    def num_live(self) -> int:
        """How many of its requests have not ended."""
        return len(self._live)

    # -- the transport's driver ---------------------------------------------------------------

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Take what the client sent."""
        for message in messages:
            if isinstance(message, (Request, Resume)):
                self._on_opening(message)
            elif isinstance(message, Cancel):
                live = self._live.get(message.stream)
                if live is not None:
                    live.stop(Finish.CANCELLED)

    def _on_opening(self, request: Request | Resume) -> None:
        try:
            if isinstance(request, Request):
                live = self._handler.accept(self, request)
            else:
                live = self._handler.resume(self, request)
        except TensorwireError as error:
            self.send_terminal(Failure.of(request.stream, error))
        except Exception as error:
            log_id = log_fault(log, "request_failed", error, kind=request.KIND.name)
            failure = InternalError("the server failed on this request", log_id=log_id)
            self.send_terminal(Failure.of(request.stream, failure))
        else:
            if live is not None and not live.is_closed:
                self._live[request.stream] = live

    def on_writable(self) -> None:
        """The client reads again: send what was merged meanwhile."""
        self._flush()

    def on_lost(self, error: TensorwireError | None) -> None:
        """The client is gone."""
        if error is not None:
            log.debug("session_lost peer=%s reason=%s", self.transport.peername, error)
        live, self._live = self._live, {}
        self._deltas.clear()
        self._stalls_s.clear()
        for request in live.values():
            request.lose_reader(may_come_back=self._connection.can_resume)
        self._handler.on_session_closed(self)

    # -- the requests' reader -----------------------------------------------------------------

    def send_ack(self, ack: Ack) -> None:
        """Tell the client that the worker has its request."""
        self._send(ack)

    def send_tokens(self, stream: int, first_index: int, tokens: Sequence[int], text: str) -> None:
        """Send tokens at the end of this turn, with all others that this turn brings.

        While the client does not read they are merged: the batch is never held up, the delta grows.
        """
        delta = self._deltas.get(stream)
        if delta is None:
            delta = self._deltas[stream] = _Delta(first_index)
        delta.tokens += tokens
        if text:
            delta.texts.append(text)
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush_unless_paused)

    def settle(self, stream: int) -> float:
        """Send what a stream that ends still has waiting; return how long it was stalled (s)."""
        if stream in self._deltas:
            # A slow reader gets this one's rest and its end; the others' deltas go on growing.
            self._flush([stream] if self.transport.is_paused else None)
        return self._stalls_s.pop(stream, 0.0)

    def send_terminal(self, message: EncodedTerminal | Result | Failure) -> None:
        """Send the last frame of a stream, after `settle`."""
        self._live.pop(message.stream, None)
        try:
            self._send(message)
        except OutputTooLarge as error:
            self._send(Failure.of(message.stream, error))
        except TensorwireError as error:
            log_id = log_fault(log, "answer_not_sendable", error)
            failure = InternalError("the answer cannot be sent", log_id=log_id)
            self._send(Failure.of(message.stream, failure))

    def dismiss(self, stream: int, error: TensorwireError) -> None:
        """End a stream that goes on elsewhere; what it has not sent is sent there."""
        self._deltas.pop(stream, None)
        self._stalls_s.pop(stream, None)
        self.send_terminal(Failure.of(stream, error))

    def _send(self, message: Message) -> None:
        if self._connection.state is not State.CLOSED:
            self.transport.send(message)

    def _flush_unless_paused(self) -> None:
        self._flush_is_due = False
        if not self.transport.is_paused:
            self._flush()
            return
        now = self._handler.now()
        for delta in self._deltas.values():
            if delta.held_since is None:
                delta.held_since = now

    def _flush(self, only: list[int] | None = None) -> None:
        """Send the deltas of all streams, or of some, as one frame."""
        if only is None:
            deltas, self._deltas = self._deltas, {}
        else:
            deltas = {stream: self._deltas.pop(stream) for stream in only}
        if not deltas or self._connection.is_closed:
            return
        for stream, delta in deltas.items():
            if delta.held_since is not None:
                held_s = self._handler.now() - delta.held_since
                self._stalls_s[stream] = self._stalls_s.get(stream, 0.0) + held_s
        try:
            for batch in _batches(deltas, self._connection.peer_limits):
                self._send(_as_message(batch))
        except OutputTooLarge as error:
            # A client whose limits leave no room for one token: its loss, and nobody else's.
            self._connection.fail(error)
            self.transport.flush()

    # -- the gateway's side -------------------------------------------------------------------

    def go_away(self, code: int, grace_s: float) -> None:
        """Tell the client that nothing new is taken."""
        last = self._connection.last_stream
        self._send(Goaway(code=code, last_stream=last, grace_ms=int(grace_s * 1000)))

    def close(self) -> None:
        """End the connection; what was sent before still leaves."""
        self.transport.close()


# A frame of events stays far below what a client accepts (4,096 elements, 256 KiB of meta),
# however much was merged while it did not read.
_FRAME_TOKENS = 2048
_FRAME_CHARS = 16_384
_BYTES_EACH = 24  # of meta, more than any token or character with its share of the columns takes


def _batches(deltas: dict[int, _Delta], peer: Limits) -> Iterator[list[Event]]:
    """Cut deltas into events, and the events into frames."""
    room = min(peer.server_meta_bytes, peer.frame_bytes) // _BYTES_EACH
    max_tokens = max(1, min(_FRAME_TOKENS, peer.container_items, room))
    max_chars = max(1, min(_FRAME_CHARS, room))
    batch: list[Event] = []
    tokens = chars = 0
    for stream, delta in deltas.items():
        for event in _events(stream, delta, max_tokens, max_chars):
            tokens += len(event.tokens) + 1
            chars += len(event.text)
            if batch and (tokens > max_tokens or chars > max_chars):
                yield batch
                batch, tokens, chars = [], len(event.tokens) + 1, len(event.text)
            batch.append(event)
    yield batch


def _events(stream: int, delta: _Delta, max_tokens: int, max_chars: int) -> Iterator[Event]:
    text = "".join(delta.texts)
    tokens = delta.tokens
    pieces = max(-(-len(tokens) // max_tokens), -(-len(text) // max_chars), 1)
    num_tokens, num_chars = -(-len(tokens) // pieces), -(-len(text) // pieces)
    for i in range(pieces):
        first = min(i * num_tokens, len(tokens))
        yield Event(
            stream=stream,
            index=delta.first_index + first,
            tokens=tokens[first : first + num_tokens],
            text=text[i * num_chars : (i + 1) * num_chars],
        )


def _as_message(batch: list[Event]) -> Event | EventBatch:
    if len(batch) == 1:
        return batch[0]
    counts = [len(event.tokens) for event in batch]
    return EventBatch(
        streams=[event.stream for event in batch],
        first_indexes=[event.index for event in batch],
        counts=None if set(counts) == {1} else counts,
        tokens=[token for event in batch for token in event.tokens],
        texts=[event.text for event in batch],
    )
