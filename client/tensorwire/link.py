"""The sync client's calls: sent, tried again, and the large ones on connections of their own."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tensorwire_protocol.errors import (
    Busy,
    ConnectionFailed,
    RequestCancelled,
    TensorwireError,
    Unauthenticated,
)
from tensorwire_protocol.messages import TERMINAL, Failure

from tensorwire.collecting import GRACE_S, Collector, gave_up
from tensorwire.dialing import chance, explained, fastest_codec
from tensorwire.errors import for_call
from tensorwire.home import Home
from tensorwire.pool import Pool
from tensorwire.retrying import Again, Attempts, Reached, RetryBudget, how_far

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tensorwire_protocol.messages import Message, Request, Resume
    from tensorwire_protocol.transports.blocking import BlockingTransport, Mailbox

    from tensorwire.call import Call
    from tensorwire.dialing import Route
    from tensorwire.retrying import Retry

T = TypeVar("T")
_TRIES = 3  # to find a connection that has not ended before the request could be queued


class Reply(Generic[T]):
    """The answer to one call, while it arrives; leaving the `with` block early cancels the call.

    A lost connection, or a refusal that may pass, is not the caller's: see `retrying`.
    """

    def __init__(self, link: Link, call: Call[T], deadline: float | None) -> None:
        self.call = call
        self.collector = Collector(call.op)
        self.is_ended = False
        self._link = link  # kept alive as long as its answers are awaited
        self._deadline = deadline
        self._give_up_at = None if deadline is None else deadline + GRACE_S
        self._attempts = Attempts(link.max_attempts, link.budget)
        self._transport: BlockingTransport | None = None
        self._mailbox: Mailbox | None = None
        self._can_resume = False  # the server of a lost connection knew RESUME
        self._start(None)

    def _start(self, retry: Retry | None) -> None:
        """Send the request, or ask for the rest of it; again while that fails and may be tried."""
        while True:
            try:
                if self.is_ended:
                    raise RequestCancelled("the call was cancelled before its end")
                self._send(retry.how if retry is not None else Again.REQUEST)
                return
            except TensorwireError as error:
                retry = self._after(error, Reached.NOTHING)

    def _send(self, how: Again) -> None:
        call, collector, deadline = self.call, self.collector, self._deadline

        def build(stream: int) -> Request | Resume:
            if how is Again.RESUME:
                return call.resume(stream, len(collector.token_ids), collector.num_chars)
            left_s = None if deadline is None else deadline - time.monotonic()
            return call.request(stream, left_s)

        link, attempts = self._link, self._attempts
        self._transport, self._mailbox = link.open(call, attempts, deadline, build)

    def _after(self, error: TensorwireError, reached: Reached) -> Retry:
        """Wait until the call may be tried again; raise if it may not."""
        link = self._link
        retry = None
        if not link.home.is_closed and link.home.is_here:
            retry = self._attempts.after(
                error,
                reached=reached,
                arrived=self.collector.num_arrived,
                can_resume=self._can_resume,
                params=self.call.params,
                now=time.monotonic(),
                deadline=self._deadline,
                chance=chance(),
            )
        if retry is None:
            self.is_ended = True
            told = self._attempts.error or error
            raise self.collector.failed(told) from told.__cause__
        if retry.how is Again.ANEW:
            self.call.renew()
        time.sleep(retry.wait_s)
        return retry

    def receive(self) -> Message:
        """Wait for the next message; a failure is raised.

        Raises:
            TensorwireError: the stream's own error, a lost connection, or no answer in time.
        """
        while True:
            self._link.home.check_process()
            try:
                return self._receive()
            except _Failed as failed:
                self._start(self._after(failed.error, failed.reached))

    def _receive(self) -> Message:
        assert self._transport is not None
        assert self._mailbox is not None
        try:
            message = self._transport.receive(self._mailbox, self._give_up_at)
        except TensorwireError as error:
            connection = self._transport.connection
            # One that was lost before WELCOME says nothing of it.
            self._can_resume = self._can_resume or connection.can_resume
            told = self._link.explained(self._transport, error)
            raise _Failed(told, how_far(connection)) from None
        if message is None:
            self.cancel("deadline")
            assert self.call.timeout_s is not None
            raise self.collector.failed(gave_up(self.call.timeout_s))
        if isinstance(message, TERMINAL):
            if isinstance(message, Failure):
                raise _Failed(message.to_error(), Reached.GREETING)
            self.is_ended = True
        return message

    def cancel(self, reason: str = "cancelled", *, wait: bool = True) -> None:
        """Tell the server to stop, unless the answer has ended; idempotent."""
        if self.is_ended:
            return
        self.is_ended = True
        if self._link.home.is_here and self._transport is not None and self._mailbox is not None:
            self._transport.cancel(self._mailbox, reason, wait=wait)

    def __enter__(self) -> Reply[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # Left without a word: a stream nobody holds, or Ctrl-C just behind the request. This may
        # run anywhere, so it waits for no lock.
        if not self.is_ended:
            with contextlib.suppress(Exception):
                self.cancel(wait=False)


class _Failed(Exception):
    """An attempt ended in an error that may be worth another attempt."""

    def __init__(self, error: TensorwireError, reached: Reached) -> None:
        self.error, self.reached = error, reached


class Link:
    """Opens calls on connections of a pool; safe to share between threads."""

    def __init__(self, route: Route, max_attempts: int) -> None:
        fastest_codec()  # loaded now, so that no call's time goes on it
        self.address = route.address
        self.home = Home()
        self.max_attempts = max_attempts
        self.budget = RetryBudget()
        self.pool = Pool(route, self.home, waits_for_greeting=False)
        # For large requests, behind which no small one shall wait.
        self._bulk_pool = Pool(route, self.home, waits_for_greeting=True)

    def call(self, call: Call[T]) -> Reply[T]:
        """Send `call`.

        Raises:
            TensorwireError: it could not be sent.
        """
        self.home.check()
        deadline = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        return Reply(self, call, deadline)

    def open(
        self,
        call: Call[Any],
        attempts: Attempts,
        deadline: float | None,
        build: Callable[[int], Request | Resume],
    ) -> tuple[BlockingTransport, Mailbox]:
        """Send what `build` makes on a connection that lives.

        Raises:
            TensorwireError: it could not be sent.
        """
        pool = self._bulk_pool if call.is_bulk else self.pool
        num_tries = 0
        while True:
            self.home.check()
            transport = pool.get(call, attempts, deadline)
            num_tries += 1
            try:
                return transport, transport.open(build)
            except (ConnectionFailed, Unauthenticated, Busy) as error:
                # Nothing of the request has left, so it may go on another connection.
                if self.home.is_closed or num_tries == _TRIES:
                    raise for_call(self.explained(transport, error)) from error.__cause__

    def explained(self, transport: BlockingTransport, error: TensorwireError) -> TensorwireError:
        """Return `error` in plainer words where they are known."""
        was_greeted = transport.connection.was_greeted
        return explained(error, self.address, was_greeted=was_greeted)

    def close(self) -> None:
        """End all connections; calls that wait on other threads get ConnectionLost."""
        self.home.is_closed = True
        if not self.home.is_here:
            return  # the parent's connection is not this process's to end
        self.pool.close()
        self._bulk_pool.close()

    def __del__(self) -> None:
        # Whoever waits for an answer holds this object, so nobody waits any more.
        with contextlib.suppress(Exception):
            self.close()
