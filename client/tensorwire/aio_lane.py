"""One connection of the async client: routes what arrives to the calls that wait.

Without a task or a queue for each of them: measured, those cost more than the whole wire.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar, cast

from tensorwire_protocol.errors import (
    ConnectionLost,
    Executed,
    TensorwireError,
)
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    End,
    Event,
    EventBatch,
    Failure,
    Goaway,
    Result,
)
from tensorwire_protocol.transports.aio import AioTransport

from tensorwire.collecting import GRACE_S, Collector, gave_up
from tensorwire.dialing import explained, new_connection
from tensorwire.errors import ClientUnusable, for_call
from tensorwire.results import Delta, Generation
from tensorwire.retrying import Again, Reached, how_far

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.login import Login
    from tensorwire_protocol.messages import Message, Request, Resume

    from tensorwire.address import Address
    from tensorwire.call import Call
    from tensorwire.retrying import Attempts

T = TypeVar("T")
_TICK_S = 1.0
_DEADLINE_STEP_S = 0.1  # how late a deadline may be noticed; one timer for all calls
_RESUME: Final = Again.RESUME  # as a name of its own, see the protocol's `roles`


class Rescuer(Protocol):
    """Who can find another connection for a call: the link."""

    def rescue(self, reply: AsyncReply[Any], error: TensorwireError, reached: Reached) -> bool:
        """Try a call again after `error`, unless False is returned.

        Args:
            reached: how far its connection had got.
        """


class AsyncReply(Generic[T]):
    """The answer to one call, while it arrives. One task at a time waits for it."""

    __slots__ = (
        "_waiter",
        "attempts",
        "call",
        "can_resume",
        "collector",
        "deadline",
        "deltas",
        "error",
        "is_ended",
        "lane",
        "loop",
        "rescuer",
        "result",
        "stream",
    )

    def __init__(
        self,
        rescuer: Rescuer,
        call: Call[T],
        attempts: Attempts,
        loop: asyncio.AbstractEventLoop,
        deadline: float | None,
        *,
        keeps_deltas: bool,
    ) -> None:
        self.rescuer = rescuer
        self.attempts = attempts
        self.loop = loop
        self.call = call
        self.deadline = deadline  # the loop's time
        self.lane: Lane | None = None  # None: not sent, or its connection was lost
        self.stream = 0
        self.can_resume = False  # the server of a lost connection knew RESUME
        self.collector = Collector(call.op)
        self.deltas: deque[Delta] | None = deque() if keeps_deltas else None
        self.is_ended = False
        self.error: TensorwireError | None = None
        self.result: T | Generation | None = None
        self._waiter: asyncio.Future[None] | None = None

    def is_sent_on(self, lane: Lane, stream: int) -> None:
        """Note where the answer will come."""
        self.lane, self.stream = lane, stream

    @property
    def was_sent(self) -> bool:
        """Say if it was sent on any connection yet."""
        return self.stream > 0

    @property
    def left_s(self) -> float | None:
        """How many seconds are left before the deadline."""
        return None if self.deadline is None else self.deadline - self.loop.time()

    def check_deadline(self, now: float) -> None:
        """Give up if the server should have ended the call long ago."""
        if self.deadline is not None and self.deadline + GRACE_S <= now:
            assert self.call.timeout_s is not None
            self.cancel("deadline")
            self.end(error=self.collector.failed(gave_up(self.call.timeout_s)))

    def cancel(self, reason: str = "cancelled") -> None:
        """Tell the server to stop, and drop what still arrives; idempotent."""
        if self.is_ended:
            return
        lane, self.lane = self.lane, None
        if lane is not None:
            lane.cancel(self.stream, reason)
        if reason == "cancelled":
            self.end(error=ClientUnusable("this call was left before its end"))

    def fail(self, error: TensorwireError, reached: Reached) -> None:
        """An attempt ended in an error: try again, or end."""
        self.lane = None
        if not self.is_ended and not self.rescuer.rescue(self, error, reached):
            self.end(error=self.failure(error))

    def failure(self, error: TensorwireError) -> TensorwireError:
        """Return the error that the call ends with, after `error` was the last of it."""
        told = self.attempts.error or error
        failed = self.collector.failed(told)
        failed.__cause__ = told.__cause__
        return failed

    def add(self, index: int, token_ids: list[int], text: str) -> None:
        """Take what one event brought."""
        self.collector.add(token_ids, text)
        if self.deltas is not None and (token_ids or text):
            self.deltas.append(Delta(text, token_ids, index))
            self._wake()

    def take(self, message: Message) -> None:
        """Take a message other than an event."""
        if isinstance(message, Ack):
            self.collector.prompt_tokens = message.prompt_tokens
            return
        try:
            if isinstance(message, End):
                self.end(result=self.collector.finish(message))
            elif isinstance(message, Failure):
                self.fail(message.to_error(), Reached.GREETING)
        except TensorwireError as error:
            self.end(error=error)

    def take_result(self, result: Result) -> None:
        """Take the one answer of a unary call."""
        try:
            self.end(result=self.call.read(result))
        except TensorwireError as error:
            self.end(error=error)

    def end(
        self, *, result: T | Generation | None = None, error: TensorwireError | None = None
    ) -> None:
        """Settle the answer, once."""
        if self.is_ended:
            return
        self.is_ended = True
        self.result, self.error = result, error
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def change(self) -> asyncio.Future[None]:
        """Return a future that is done when something has changed; see `leave`."""
        if self._waiter is not None:
            raise ClientUnusable("another task already waits for this stream")
        self._waiter = self.loop.create_future()
        return self._waiter

    def leave(self) -> None:
        """Cancel the call: the task that waited for a change was cancelled."""
        self._waiter = None
        self.cancel()

    def outcome(self) -> Any:
        """Return the result of what has ended, or raise its error."""
        if self.error is not None:
            raise self.error
        return self.result


class Lane:
    """One connection and the replies that arrive on it.

    Args:
        on_change: called when there may be room for another call, or never again.
    """

    def __init__(
        self,
        address: Address,
        login: Login | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport = AioTransport(new_connection(is_passive=False, login=login), self)
        self.is_lost = False
        self.greeted: asyncio.Future[None] = self.loop.create_future()  # it is known what it takes
        self._address = address
        self._on_change = on_change
        self._was_greeted = False
        self._last_taken: int | None = None  # from GOAWAY: later streams were not executed
        self._replies: dict[int, AsyncReply[Any]] = {}
        self._tick_handle: asyncio.TimerHandle | None = None
        self._deadline_handle: asyncio.TimerHandle | None = None

    @property
    def is_usable(self) -> bool:
        """Say if new calls may go on this connection, once there is room."""
        connection = self.transport.connection
        return not (self.is_lost or connection.is_closed or connection.peer_is_leaving)

    @property
    def num_places(self) -> int:
        """How many calls more the server takes on this connection at present."""
        return self.transport.connection.num_places

    @property
    def has_room(self) -> bool:
        """Say if a new call may go on this connection now."""
        return self.is_usable and self.num_places > 0

    def start(self) -> None:
        """Let the connection's clock run."""
        self._tick_handle = self.loop.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self.transport.on_timer()
        if not self.is_lost:
            self.start()

    def begin(self, reply: AsyncReply[Any], how: Again, left_s: float | None) -> None:
        """Send a call, of whose timeout `left_s` is left, or ask for the rest of its answer.

        Raises:
            TensorwireError: it could not be sent.
        """
        stream = self.transport.connection.next_stream()
        message: Request | Resume
        if how is _RESUME:
            collector = reply.collector
            message = reply.call.resume(stream, len(collector.token_ids), collector.num_chars)
        else:
            message = reply.call.request(stream, left_s)
        self.transport.send(message)
        self._replies[stream] = reply
        reply.is_sent_on(self, stream)
        if self._deadline_handle is None and reply.deadline is not None:
            self._watch_deadlines()

    def _watch_deadlines(self) -> None:
        self._deadline_handle = self.loop.call_later(_DEADLINE_STEP_S, self._check_deadlines)

    def _check_deadlines(self) -> None:
        self._deadline_handle = None
        now = self.loop.time()
        for reply in tuple(self._replies.values()):
            reply.check_deadline(now)
        if self._replies:
            self._watch_deadlines()

    def cancel(self, stream: int, reason: str) -> None:
        """Tell the server to stop, and drop what still arrives."""
        if self._replies.pop(stream, None) is None or self.is_lost:
            return
        if not self.transport.connection.is_closed:
            self.transport.send(Cancel(stream=stream, reason=reason))

    # -- what the transport tells -------------------------------------------------------------

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Route what one read brought."""
        for message in messages:
            if type(message) is Result:
                reply = self._replies.pop(message.stream, None)
                if reply is not None:
                    reply.take_result(message)
            elif isinstance(message, EventBatch):
                self._route_batch(message)
            elif isinstance(message, Event):
                reply = self._replies.get(message.stream)
                if reply is not None:
                    reply.add(message.index, cast("list[int]", message.tokens), message.text)
            elif isinstance(message, Ack):
                reply = self._replies.get(message.stream)
                if reply is not None:
                    reply.take(message)
            elif isinstance(message, End | Failure):
                reply = self._replies.pop(message.stream, None)
                if reply is not None:
                    reply.take(message)
            elif isinstance(message, Goaway):
                self._last_taken = message.last_stream
        connection = self.transport.connection
        if not self._was_greeted and connection.was_greeted:
            self._was_greeted = True
            if not self.greeted.done():
                self.greeted.set_result(None)
        if not self._replies and connection.peer_is_leaving:
            self.transport.close()
        self._on_change()

    def _route_batch(self, batch: EventBatch) -> None:
        # By columns: building an Event for each token would double the cost of this loop.
        get = self._replies.get
        tokens, texts, firsts = cast("list[int]", batch.tokens), batch.texts, batch.first_indexes
        counts = batch.counts
        at = 0
        for i, stream in enumerate(batch.streams):
            count = 1 if counts is None else counts[i]
            reply = get(stream)
            if reply is not None:
                reply.add(firsts[i], tokens[at : at + count], texts[i])
            at += count

    def on_writable(self) -> None:
        """Nothing was held back: requests are bounded by the frame, and the loop keeps them."""

    def on_lost(self, error: TensorwireError | None) -> None:
        """Fail every call that still waits."""
        self.is_lost = True
        if not self.greeted.done():  # whoever waits finds a lane that is lost
            self.greeted.set_result(None)
        for handle in (self._tick_handle, self._deadline_handle):
            if handle is not None:
                handle.cancel()
        replies, self._replies = self._replies, {}
        plain = explained(
            error or ConnectionLost("the server closed the connection"),
            self._address,
            was_greeted=self._was_greeted,
        )
        connection = self.transport.connection
        for stream, reply in replies.items():
            own = for_call(plain)
            if self._last_taken is not None and stream > self._last_taken:
                own.executed = Executed.NO
            # A connection that was lost before WELCOME says nothing of it.
            reply.can_resume = reply.can_resume or connection.can_resume
            reply.fail(own, how_far(connection))
        self._on_change()

    def close(self) -> None:
        """End the connection, and all that runs on it; calls that wait get ConnectionLost."""
        if not self.transport.connection.is_closed:
            for stream in self._replies:  # a lost connection would let them go on
                self.transport.send(Cancel(stream=stream))
            self.transport.flush()
        self.on_lost(ConnectionLost("the client was closed"))
        self.transport.close()
