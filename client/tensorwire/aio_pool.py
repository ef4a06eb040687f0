"""The async client's connections: made when a call needs one, and one more when all are full."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Executed,
    TensorwireError,
    Unauthenticated,
)

from tensorwire.aio_lane import Lane
from tensorwire.dialing import cannot_connect, tune
from tensorwire.errors import for_call
from tensorwire.retrying import Connecting

if TYPE_CHECKING:
    from tensorwire.call import Call
    from tensorwire.dialing import Route
    from tensorwire.home import Home
    from tensorwire.retrying import Attempts

_TRIES = 3  # to find a connection that has not ended before the request could be queued


class AsyncPool:
    """Finds a connection with a place for one more call.

    Calls fill one connection before there is a second. When there are as many as there may be and
    all are full, calls wait in the order in which they came.

    Args:
        waits_for_greeting: whether nothing is sent before it is known what the server takes.
    """

    def __init__(self, route: Route, home: Home, *, waits_for_greeting: bool) -> None:
        self._route, self._home = route, home
        self._waits_for_greeting = waits_for_greeting
        self._lanes: list[Lane] = []
        self._leaving: list[Lane] = []  # the server said GOAWAY; streams still end
        self._dialing: asyncio.Task[Lane] | None = None
        self._connecting = Connecting()
        self._queue: dict[asyncio.Future[None], None] = {}  # calls without a place, in order
        self._num_called = 0  # that have left the queue and not yet taken their place

    @property
    def lanes(self) -> list[Lane]:
        """The connections that calls may go on, full or not."""
        return self._lanes

    def find(self) -> Lane | None:
        """Return a connection with a place, unless somebody already waits for it."""
        if self._queue:
            return None
        for lane in self._lanes:
            if lane.has_room:
                return lane
        return None

    async def get(self, call: Call[Any], attempts: Attempts, deadline: float | None) -> Lane:
        """Return a connection with a place, as soon as there is one.

        Raises:
            TensorwireError: no connection could be made, or `deadline` (the loop's time) passed.
        """
        num_tries = 0
        lane = self.find()
        while lane is None:
            if num_tries == _TRIES:
                raise ConnectionLost(
                    f"the server at {self._route.address} closes each connection at once",
                    executed=Executed.NO,
                )
            self._home.check()
            if self._is_full():
                await self._wait_for_place(call, deadline)
            else:
                dialed = await self._connected(call, attempts, deadline)
                num_tries += not dialed.is_usable
                refusal = dialed.transport.connection.error
                if isinstance(refusal, Unauthenticated):  # the next would fare no better
                    raise for_call(refusal)
            lane = next((lane for lane in self._lanes if lane.has_room), None)
        return lane

    def _is_full(self) -> bool:
        self._sort_out()
        return len(self._lanes) >= self._route.max_connections

    def _sort_out(self) -> None:
        """Keep apart what takes no calls any more, and forget what is gone."""
        self._leaving += [lane for lane in self._lanes if not lane.is_usable]
        self._leaving = [lane for lane in self._leaving if not lane.is_lost]
        self._lanes = [lane for lane in self._lanes if lane.is_usable]

    async def _wait_for_place(self, call: Call[Any], deadline: float | None) -> None:
        place = asyncio.get_running_loop().create_future()
        self._queue[place] = None
        try:
            async with asyncio.timeout_at(deadline):
                await place
        except BaseException as error:
            if self._queue.pop(place, place) is place:  # it had been called
                self._num_called -= 1
            if isinstance(error, TimeoutError):
                raise _no_time(call, "no place on a connection") from None
            raise
        self._num_called -= 1

    def on_change(self) -> None:
        """Let those go on for whom there are places now, who has waited longest first."""
        if not self._queue:
            return
        usable = [lane for lane in self._lanes if lane.is_usable]
        num_places = sum(lane.num_places for lane in usable) - self._num_called
        if len(usable) < self._route.max_connections:
            num_places = len(self._queue)  # a connection was lost: there may be another
        for place in tuple(islice(self._queue, max(num_places, 0))):
            del self._queue[place]
            if not place.done():
                place.set_result(None)
                self._num_called += 1

    async def _connected(self, call: Call[Any], attempts: Attempts, deadline: float | None) -> Lane:
        """Wait for the one dialing task, which outlives a caller that is cancelled."""
        now = asyncio.get_running_loop().time()
        if self._dialing is None:
            self._connecting.begin(attempts, now)
            self._dialing = asyncio.create_task(self._dial())
            self._dialing.add_done_callback(_see_failure)
        dialing = self._dialing
        left_s = None if deadline is None else deadline - now
        await asyncio.wait((dialing,), timeout=left_s)
        self._home.check()  # `close` cancels the dialing
        if not dialing.done():
            raise _no_time(call, "no connection")
        try:
            return dialing.result()
        except TensorwireError as error:
            raise for_call(error) from error.__cause__

    async def _dial(self) -> Lane:
        """Make a connection, and keep it."""
        try:
            lane = await self._connect()
        finally:
            # In the task, not when it is done: in between a call would find a dialing that is over
            # and no connection, and would look again for ever, for neither makes it wait.
            self._dialing = None
        self._sort_out()
        self._lanes.append(lane)
        return lane

    async def _connect(self) -> Lane:
        loop = asyncio.get_running_loop()
        address, access = self._route.address, self._route.access
        timeout_s = self._route.connect_timeout_s
        lane = Lane(address, access.login(address), on_change=self.on_change)
        self._connecting.note_made(lane.transport.connection)
        try:
            async with asyncio.timeout(timeout_s):
                raw, _ = await loop.create_connection(
                    lambda: lane.transport,
                    address.host,
                    address.port,
                    ssl=access.tls,
                    server_hostname=access.server_name_at(address),
                )
                tune(raw.get_extra_info("socket"))
                lane.start()
                # What a further connection takes must be known: it will be filled to the brim.
                if self._waits_for_greeting or self._lanes:
                    await lane.greeted
        except BaseException as error:
            lane.close()  # cancelled or out of time: nobody else knows of its socket
            if isinstance(error, OSError):  # TimeoutError is one
                raise cannot_connect(address, error, timeout_s) from error
            raise
        return lane

    def close(self) -> None:
        """End all connections; the home is closed already."""
        if self._dialing is not None:
            self._dialing.cancel()
        for lane in [*self._leaving, *self._lanes]:
            if not lane.is_lost:
                lane.close()
        self._leaving, self._lanes = [], []
        self.on_change()  # whoever waits finds that it is closed


def _see_failure(task: asyncio.Task[Lane]) -> None:
    """Keep asyncio from logging what went wrong: whoever waited for it may have left."""
    if not task.cancelled():
        task.exception()


def _no_time(call: Call[Any], what: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{what} within the timeout of {call.timeout_s:g} s", executed=Executed.NO
    )
