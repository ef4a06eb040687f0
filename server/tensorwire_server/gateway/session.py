"""One client's connection: requests come in, frames go out, at most one batch each turn."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from tensorwire_protocol.bodies import FEATURE_BODY
from tensorwire_protocol.codec.typed import PACKING
from tensorwire_protocol.connection import (
    FEATURE_CREDIT,
    FEATURE_PASSIVE,
    FEATURE_RESUME,
    Connection,
)
from tensorwire_protocol.credit import CreditBook
from tensorwire_protocol.errors import InternalError, OutputTooLarge, SlowConsumer, TensorwireError
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Credit,
    EncodedTerminal,
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

from tensorwire_server.gateway.bounds import ReadWatch
from tensorwire_server.gateway.events import Columns, Delta, FrameRoom, frames_of
from tensorwire_server.telemetry.faults import log_fault

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from tensorwire_protocol.auth import Authenticator, Principal
    from tensorwire_protocol.bodies import Memory
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.receive_memory import ReceiveMemory
    from tensorwire_protocol.transports.polling import BusyPoll

    from tensorwire_server.gateway.gateway import Gateway
    from tensorwire_server.gateway.requests import LiveRequest

log = logging.getLogger(__name__)
_CLOSED: Final = State.CLOSED  # see `roles`


class Session:
    """Drives the transport of one client; the reader of its requests."""

    def __init__(
        self,
        gateway: Gateway,
        loop: asyncio.AbstractEventLoop,
        *,
        limits: Limits,
        memory: ReceiveMemory,
        session_id: bytes,
        software: str,
        authenticator: Authenticator | None = None,
        nonce: bytes = b"",
        bodies: Memory | None = None,
        poll: BusyPoll | None = None,
    ) -> None:
        connection = Connection(
            Role.SERVER,
            limits=limits,
            scratch=shared_scratch(),
            memory=memory,
            software=software,
            features=(FEATURE_PASSIVE, FEATURE_RESUME, FEATURE_CREDIT, FEATURE_BODY),
            session=session_id,
            authenticator=authenticator,
            nonce=nonce,
            bodies=bodies,
            codec=PACKING,
        )
        self.transport = AioTransport(connection, self, poll)
        self._connection = connection
        self._gateway = gateway
        self._loop = loop
        self._live: dict[int, LiveRequest] = {}
        self._leaving = Columns()  # at the end of this turn
        # What the client does not take. Streams with counted events always go through here.
        self._deltas: dict[int, Delta] = {}
        self._merged_bytes = 0  # in these
        self._credits = CreditBook()
        self._watch = ReadWatch()
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
                # A violation came right behind it: nobody would hear the answer, and whoever
                # floods would have bought work with it.
                if self._connection.state is not _CLOSED:
                    self._on_opening(message)
            elif isinstance(message, Cancel):
                live = self._live.get(message.stream)
                if live is not None:
                    live.stop(Finish.CANCELLED)
            elif isinstance(message, Credit):
                self._credits.add(message.stream, message.amount)
                self._schedule_flush()

    def _on_opening(self, request: Request | Resume) -> None:
        if self._connection.has_credit:
            self._credits.open(request.stream, request.credit)
        try:
            if isinstance(request, Request):
                live = self._gateway.accept(self, request)
            else:
                live = self._gateway.resume(self, request)
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
        now = self._gateway.now()
        for stream, delta in self._deltas.items():
            self._note_stall(stream, now - delta.waits_since)
        live, self._live = self._live, {}
        stalls_s, self._stalls_s = self._stalls_s, {}
        self._merged_bytes = 0
        self._leaving = Columns()
        self._deltas.clear()
        self._credits.clear()
        for stream, request in live.items():
            request.stalled_s += stalls_s.get(stream, 0.0)
            request.lose_reader(may_come_back=self._connection.can_resume)
        self._gateway.on_session_closed(self)

    # -- the requests' reader -----------------------------------------------------------------

    def send_ack(self, ack: Ack) -> None:
        """Tell the client that the worker has its request."""
        self._send(ack)

    def send_tokens(self, stream: int, first_index: int, tokens: Sequence[int], text: str) -> None:
        """Send tokens at the end of this turn, with all others that this turn brings.

        While the client does not read they are merged: the batch is never held up, the delta grows.
        """
        if self.transport.is_paused:
            self._flush()  # what came earlier in this turn is held before it
            self._hold(stream, first_index, tokens, text)
            return
        if stream in self._credits:
            self._hold(stream, first_index, tokens, text)
        else:
            self._leaving.add(stream, first_index, tokens, text)
        self._schedule_flush()

    def settle(self, stream: int) -> float:
        """Send what a stream that ends still has waiting; return how long it was stalled (s)."""
        self._flush()
        if stream in self._deltas:
            # A slow reader gets this one's rest and its end; the others' deltas go on growing.
            self._credits.close(stream)
            rest = Columns()
            self._release(stream, rest)
            self._send_events(rest)
        return self._stalls_s.pop(stream, 0.0)

    def send_terminal(self, message: EncodedTerminal | Result | Failure) -> None:
        """Send the last frame of a stream, after `settle`."""
        self._live.pop(message.stream, None)
        self._credits.close(message.stream)
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
        self._flush()
        delta = self._deltas.pop(stream, None)
        if delta is not None:
            self._merged_bytes -= delta.num_bytes
            self._gateway.on_merged(self, -delta.num_bytes)
        self._stalls_s.pop(stream, None)
        self.send_terminal(Failure.of(stream, error))

    def _send(self, message: Message) -> None:
        if self._connection.state is not _CLOSED:
            self.transport.send(message)

    def _schedule_flush(self) -> None:
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what this turn brought, and what waited for it, unless the client does not read."""
        self._flush_is_due = False
        if not self._leaving.streams and not self._deltas:
            return
        leaving, self._leaving = self._leaving, Columns()
        if self.transport.is_paused:
            for event in leaving.each():
                self._hold(*event)
            return
        for stream in [*self._deltas]:
            self._release(stream, leaving)
        self._send_events(leaving)

    def _hold(self, stream: int, first_index: int, tokens: Sequence[int], text: str) -> None:
        if self._connection.is_closed:
            return
        delta = self._deltas.get(stream)
        if delta is None:
            delta = self._deltas[stream] = Delta(first_index, self._gateway.now())
        num_bytes = delta.add(tokens, text)
        self._merged_bytes += num_bytes
        self._gateway.on_merged(self, num_bytes)
        hard_bytes = self._connection.limits.send_hard_bytes
        if self._merged_bytes + self.transport.unsent_bytes > hard_bytes:
            self.give_up(f"more than {hard_bytes} bytes wait for the client")

    def _release(self, stream: int, leaving: Columns) -> None:
        """Let go of what was held of a stream, as far as its credit goes."""
        delta = self._deltas[stream]
        before_bytes = delta.num_bytes
        room = FrameRoom.of(self._connection.peer_limits)
        while delta and self._credits.spend(stream):
            leaving.add(stream, *delta.take(room))
        taken_bytes = before_bytes - delta.num_bytes
        self._merged_bytes -= taken_bytes
        self._gateway.on_merged(self, -taken_bytes)
        if not delta:
            del self._deltas[stream]
            self._note_stall(stream, self._gateway.now() - delta.waits_since)

    def _note_stall(self, stream: int, waited_s: float) -> None:
        self._stalls_s[stream] = self._stalls_s.get(stream, 0.0) + waited_s

    def _send_events(self, columns: Columns) -> None:
        if not columns.streams or self._connection.is_closed:
            return
        try:
            for frame in frames_of(columns, FrameRoom.of(self._connection.peer_limits)):
                self._send(frame)
        except OutputTooLarge as error:
            # A client whose limits leave no room for one token: its loss, and nobody else's.
            self._connection.fail(error)
            self.transport.flush()

    # -- the gateway's side -------------------------------------------------------------------

    def on_timer(self, now: float) -> None:
        """Let time pass; the gateway calls this about once a second."""
        transport, limits = self.transport, self._connection.limits
        transport.on_timer()
        written, unsent = transport.written_bytes, transport.unsent_bytes
        if self._watch.is_stuck(limits, written=written, unsent=unsent, now=now):
            self.give_up(f"what waits for the client has been unread for {limits.send_stuck_s:g} s")

    def give_up(self, why: str) -> None:
        """End the connection of a client that does not take what was made for it.

        Its streams lose their reader, who may come back.
        """
        log.debug("slow_consumer peer=%s reason=%s", self.transport.peername, why)
        self._connection.fail(SlowConsumer(why))
        self.transport.flush()

    def go_away(self, code: int, grace_s: float) -> None:
        """Tell the client that nothing new is taken."""
        last = self._connection.last_stream
        self._send(Goaway(code=code, last_stream=last, grace_ms=int(grace_s * 1000)))

    def close(self) -> None:
        """End the connection; what was sent before still leaves."""
        self.transport.close()
