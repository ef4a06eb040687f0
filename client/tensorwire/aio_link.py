"""The async client's connection: made when a call needs it, made anew when it has ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from tensorwire_protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Executed,
    TensorwireError,
    Unauthenticated,
)

from tensorwire.access import Access
from tensorwire.aio_lane import AsyncReply, Lane
from tensorwire.dialing import Home, cannot_connect, chance, fastest_codec, tune
from tensorwire.errors import ClientUnusable, for_call
from tensorwire.retrying import Again, Attempts, RetryBudget

if TYPE_CHECKING:
    from tensorwire.address import Address
    from tensorwire.calls import Call
    from tensorwire.retrying import Retry

T = TypeVar("T")
_TRIES = 3  # to find a connection that has not ended before the request could be queued


class AsyncLink:
    """Opens calls on the current connection, and makes one when there is none."""

    def __init__(
        self,
        address: Address,
        connect_timeout_s: float,
        max_attempts: int,
        access: Access | None = None,
        *,
        home: Home | None = None,
    ) -> None:
        self.address = address
        self._access = access or Access()
        self.home = home or Home()
        fastest_codec()  # loaded now, so that no call's time goes on it
        self._max_attempts = max_attempts
        self._budget = RetryBudget()
        self._is_bulk = home is not None
        self._bulk: AsyncLink | None = None  # for large requests: no small one waits behind them
        self._rescues: dict[asyncio.Task[None], AsyncReply[Any]] = {}
        self._connect_timeout_s = connect_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lane: Lane | None = None
        self._leaving: list[Lane] = []
        self._dialing: asyncio.Task[Lane] | None = None

    async def open(self, call: Call[T], *, keeps_deltas: bool = False) -> AsyncReply[T]:
        """Send `call`.

        Raises:
            TensorwireError: it could not be sent.
        """
        self.home.check()
        loop = self._check_loop()
        if call.is_bulk and not self._is_bulk:
            return await self._bulk_link().open(call, keeps_deltas=keeps_deltas)
        deadline = None if call.timeout_s is None else loop.time() + call.timeout_s
        attempts = Attempts(self._max_attempts, self._budget)
        reply = AsyncReply(self, call, attempts, loop, deadline, keeps_deltas=keeps_deltas)
        lane = self._lane
        if lane is not None and lane.is_usable:
            lane.begin(reply, Again.REQUEST)
        else:
            await self._start(reply, Again.REQUEST)
        return reply

    def _bulk_link(self) -> AsyncLink:
        if self._bulk is None:
            self._bulk = AsyncLink(
                self.address,
                self._connect_timeout_s,
                self._max_attempts,
                self._access,
                home=self.home,
            )
            self._bulk._budget = self._budget
        return self._bulk

    async def _start(self, reply: AsyncReply[Any], how: Again) -> None:
        """Send a call, or ask for the rest; again while that fails and may be tried."""
        while True:
            try:
                lane = await self._usable_lane(reply.call, reply.deadline)
                if not reply.is_ended:  # it may have been left meanwhile
                    lane.begin(reply, how)
                return
            except TensorwireError as error:
                retry = self._after(reply, error)
                if retry is None:
                    failure = reply.failure(error)
                    raise failure from failure.__cause__
            await asyncio.sleep(retry.wait_s)
            how = retry.how

    async def _usable_lane(self, call: Call[Any], deadline: float | None) -> Lane:
        lane = self._lane
        num_tries = 0
        while lane is None or not lane.is_usable:
            if num_tries == _TRIES:
                raise ConnectionLost(
                    f"the server at {self.address} closes each connection at once",
                    executed=Executed.NO,
                )
            self.home.check()
            lane = await self._connected(call, deadline)
            num_tries += 1
            refusal = lane.transport.connection.error
            if isinstance(refusal, Unauthenticated):  # the next connection would fare no better
                raise for_call(refusal)
        return lane

    def _after(self, reply: AsyncReply[Any], error: TensorwireError) -> Retry | None:
        if self.home.is_closed or not self.home.is_here:
            return None
        return reply.attempts.after(
            error,
            arrived=reply.collector.num_arrived,
            can_resume=reply.can_resume,
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
                await self._start(reply, retry.how)
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

    async def _connected(self, call: Call[Any], deadline: float | None) -> Lane:
        """Wait for the one dialing task, which outlives a caller that is cancelled."""
        if self._dialing is None:
            self._dialing = asyncio.create_task(self._dial())
            self._dialing.add_done_callback(self._on_dialed)
        timeout_s = None if deadline is None else deadline - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(timeout_s):
                lane = await asyncio.shield(self._dialing)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no connection within the timeout of {call.timeout_s:g} s", executed=Executed.NO
            ) from None
        except TensorwireError as error:
            raise for_call(error) from error.__cause__
        self.home.check()
        return lane

    def _on_dialed(self, task: asyncio.Task[Lane]) -> None:
        self._dialing = None
        if task.cancelled() or task.exception() is not None:
            return
        if self._lane is not None and not self._lane.is_lost:
            self._leaving.append(self._lane)
        self._leaving = [lane for lane in self._leaving if not lane.is_lost]
        self._lane = task.result()
        if self.home.is_closed:
            self._lane.close()

    async def _dial(self) -> Lane:
        loop = asyncio.get_running_loop()
        access = self._access
        lane = Lane(self.address, access.login(self.address))
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                raw, _ = await loop.create_connection(
                    lambda: lane.transport,
                    self.address.host,
                    self.address.port,
                    ssl=access.tls,
                    server_hostname=access.server_name_at(self.address),
                )
                tune(raw.get_extra_info("socket"))
                lane.start()
                if self._is_bulk:
                    await lane.greeted
        except OSError as error:  # TimeoutError is one
            raise cannot_connect(self.address, error, self._connect_timeout_s) from error
        return lane

    async def close(self) -> None:
        """End all connections."""
        self.home.is_closed = True
        if not self.home.is_here:
            return
        if self._dialing is not None:
            self._dialing.cancel()
        for rescue, reply in self._rescues.items():
            rescue.cancel()
            reply.end(error=reply.failure(ConnectionLost("the client was closed")))
        for lane in [*self._leaving, self._lane]:
            if lane is not None and not lane.is_lost:
                lane.close()
        self._leaving, self._lane = [], None
        if self._bulk is not None:
            await self._bulk.close()
        await asyncio.sleep(0)  # the loop closes the sockets in its next turn
