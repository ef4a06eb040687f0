"""The async client's calls: sent, tried again, and the large ones on connections of their own."""

from __future__ import annotations

import asyncio
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tensorwire_protocol.errors import ConnectionLost, TensorwireError

from tensorwire.aio_lane import AsyncReply
from tensorwire.aio_pool import AsyncPool
from tensorwire.dialing import chance, fastest_codec
from tensorwire.errors import ClientUnusable
from tensorwire.home import Home
from tensorwire.retrying import Again, Attempts, Reached, RetryBudget

if TYPE_CHECKING:
    from tensorwire.call import Call
    from tensorwire.dialing import Route
    from tensorwire.retrying import Retry

T = TypeVar("T")
_REQUEST: Final = Again.REQUEST  # as a name of its own, see the protocol's `roles`
_get_ident: Final = get_ident


class AsyncLink:
    """Opens calls on connections of a pool."""

    def __init__(self, route: Route, max_attempts: int) -> None:
        fastest_codec()  # loaded now, so that no call's time goes on it
        self.address = route.address
        self.home = Home()
        self._max_attempts = max_attempts
        self.budget = RetryBudget()
        self.pool = AsyncPool(route, self.home, waits_for_greeting=False)
        # For large requests, behind which no small one shall wait.
        self._bulk_pool = AsyncPool(route, self.home, waits_for_greeting=True)
        self._rescues: dict[asyncio.Task[None], AsyncReply[Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0  # that runs the loop

    async def open(self, call: Call[T], *, keeps_deltas: bool = False) -> AsyncReply[T]:
        """Send `call`.

        Raises:
            TensorwireError: it could not be sent.
        """
        reply = self.begin(call, keeps_deltas=keeps_deltas)
        if not reply.was_sent:
            await self.connect(reply)
        return reply

    def begin(self, call: Call[T], *, keeps_deltas: bool = False) -> AsyncReply[T]:
        """Send `call` if a connection has a place for it; if not, `connect` must follow.

        Raises:
            TensorwireError: it could not be sent.
        """
        self.home.check()
        loop = self._check_loop()
        deadline = None if call.timeout_s is None else loop.time() + call.timeout_s
        attempts = Attempts(self._max_attempts, self.budget)
        reply = AsyncReply(self, call, attempts, loop, deadline, keeps_deltas=keeps_deltas)
        lane = self._pool_of(call).find()
        if lane is not None:
            lane.begin(reply, _REQUEST, call.timeout_s)
        return reply

    async def connect(self, reply: AsyncReply[Any]) -> None:
        """Send the call of `reply` as soon as a connection has a place for it.

        Raises:
            TensorwireError: it could not be sent.
        """
        await self._start(reply, _REQUEST, self._pool_of(reply.call))

    def _pool_of(self, call: Call[Any]) -> AsyncPool:
        return self._bulk_pool if call.is_bulk else self.pool

    async def _start(self, reply: AsyncReply[Any], how: Again, pool: AsyncPool) -> None:
        """Send a call, or ask for the rest; again while that fails and may be tried."""
        while True:
            try:
                lane = await pool.get(reply.call, reply.attempts, reply.deadline)
                if not reply.is_ended:  # it may have been left meanwhile
                    lane.begin(reply, how, reply.left_s)
                return
            except TensorwireError as error:
                retry = self._after(reply, error, Reached.NOTHING)
                if retry is None:
                    failure = reply.failure(error)
                    # What says most of the call may be an earlier error: show the last one too.
                    raise failure from (failure.__cause__ if failure is error else error)
            finally:
                pool.on_change()  # where it has not taken its place, another may
            await asyncio.sleep(retry.wait_s)
            how = retry.how

    def _after(
        self, reply: AsyncReply[Any], error: TensorwireError, reached: Reached
    ) -> Retry | None:
        if self.home.is_closed or not self.home.is_here:
            return None
        retry = reply.attempts.after(
            error,
            reached=reached,
            arrived=reply.collector.num_arrived,
            can_resume=reply.can_resume,
            params=reply.call.params,
            now=reply.loop.time(),
            deadline=reply.deadline,
            chance=chance(),
        )
        if retry is not None and retry.how is Again.ANEW:
            reply.call.renew()
        return retry

    def rescue(self, reply: AsyncReply[Any], error: TensorwireError, reached: Reached) -> bool:
        """Try a call again after `error`, unless False is returned."""
        retry = self._after(reply, error, reached)
        if retry is None:
            return False
        task = asyncio.create_task(self._rescue(reply, retry))
        self._rescues[task] = reply
        task.add_done_callback(self._rescues.pop)
        return True

    async def _rescue(self, reply: AsyncReply[Any], retry: Retry) -> None:
        try:
            await asyncio.sleep(retry.wait_s)
            if not reply.is_ended:
                await self._start(reply, retry.how, self._pool_of(reply.call))
        except TensorwireError as error:
            reply.end(error=error)

    def _check_loop(self) -> asyncio.AbstractEventLoop:
        # To find out which loop runs is a system call in some versions of Python; whether ours
        # does, on this thread, is none.
        loop = self._loop
        if loop is not None and loop.is_running() and self._thread_id == _get_ident():
            return loop
        running = asyncio.get_running_loop()
        if loop is not None and loop is not running:
            raise ClientUnusable(
                "this AsyncClient belongs to another event loop: make one inside each asyncio.run"
            )
        self._loop, self._thread_id = running, _get_ident()
        return running

    async def close(self) -> None:
        """End all connections."""
        self.home.is_closed = True
        if not self.home.is_here:
            return
        for rescue, reply in self._rescues.items():
            rescue.cancel()
            reply.end(error=reply.failure(ConnectionLost("the client was closed")))
        self.pool.close()
        self._bulk_pool.close()
        await asyncio.sleep(0)  # the loop closes the sockets in its next turn
