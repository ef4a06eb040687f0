"""The async client's calls: sent, tried again, and the large ones on connections of their own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tensorwire_protocol.errors import ConnectionLost, TensorwireError

from tensorwire.aio_lane import AsyncReply
from tensorwire.aio_pool import AsyncPool
from tensorwire.dialing import Home, chance, fastest_codec
from tensorwire.errors import ClientUnusable
from tensorwire.retrying import Again, Attempts, RetryBudget

if TYPE_CHECKING:
    from tensorwire.calls import Call
    from tensorwire.dialing import Route
    from tensorwire.retrying import Retry

T = TypeVar("T")
_REQUEST: Final = Again.REQUEST  # as a name of its own, see the protocol's `roles`


class AsyncLink:
    """Opens calls on connections of a pool."""

    def __init__(self, route: Route, max_attempts: int) -> None:
        fastest_codec()  # loaded now, so that no call's time goes on it
        self.address = route.address
        self.home = Home()
        self._max_attempts = max_attempts
        self._budget = RetryBudget()
        self.pool = AsyncPool(route, self.home, waits_for_greeting=False)
        # For large requests, behind which no small one shall wait.
        self._bulk_pool = AsyncPool(route, self.home, waits_for_greeting=True)
        self._rescues: dict[asyncio.Task[None], AsyncReply[Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self, call: Call[T], *, keeps_deltas: bool = False) -> AsyncReply[T]:
        """Send `call`.

        Raises:
            TensorwireError: it could not be sent.
        """
        self.home.check()
        loop = self._check_loop()
        deadline = None if call.timeout_s is None else loop.time() + call.timeout_s
        attempts = Attempts(self._max_attempts, self._budget)
        reply = AsyncReply(self, call, attempts, loop, deadline, keeps_deltas=keeps_deltas)
        pool = self._bulk_pool if call.is_bulk else self.pool
        lane = pool.find()
        if lane is not None:
            lane.begin(reply, _REQUEST)
        else:
            await self._start(reply, _REQUEST, pool)
        return reply

    async def _start(self, reply: AsyncReply[Any], how: Again, pool: AsyncPool) -> None:
        """Send a call, or ask for the rest; again while that fails and may be tried."""
        while True:
            try:
                lane = await pool.get(reply.call, reply.deadline)
                if not reply.is_ended:  # it may have been left meanwhile
                    lane.begin(reply, how)
                return
            except TensorwireError as error:
                retry = self._after(reply, error)
                if retry is None:
                    failure = reply.failure(error)
                    # What says most of the call may be an earlier error: show the last one too.
                    raise failure from (failure.__cause__ if failure is error else error)
            finally:
                pool.on_change()  # where it has not taken its place, another may
            await asyncio.sleep(retry.wait_s)
            how = retry.how

    def _after(self, reply: AsyncReply[Any], error: TensorwireError) -> Retry | None:
        if self.home.is_closed or not self.home.is_here:
            return None
        return reply.attempts.after(
            error,
            arrived=reply.collector.num_arrived,
            can_resume=reply.can_resume,
            was_carried=reply.was_carried,
            params=reply.call.params,
            now=reply.loop.time(),
            deadline=reply.deadline,
            chance=chance(),
        )

    def rescue(self, reply: AsyncReply[Any], error: TensorwireError) -> bool:
        """Try a call again after `error`, unless False is returned."""
        retry = self._after(reply, error)
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
                pool = self._bulk_pool if reply.call.is_bulk else self.pool
                await self._start(reply, retry.how, pool)
        except TensorwireError as error:
            reply.end(error=error)

    def _check_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ClientUnusable(
                "this AsyncClient belongs to another event loop: make one inside each asyncio.run"
            )
        return loop

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
