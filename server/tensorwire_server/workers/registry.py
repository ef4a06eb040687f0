"""All open requests of a worker, and the one gate through which each of them ends.

Membership is the gate: whoever takes a stream out may send its terminal frame, and whatever comes
later for a stream that is not in here any more is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import Busy, ModelError, TooLarge
from tensorwire_protocol.messages import Failure, Finish

from tensorwire_server.workers.deadlines import Deadlines
from tensorwire_server.workers.faults import as_internal_error
from tensorwire_server.workers.loop import Leave

if TYPE_CHECKING:
    from tensorwire_protocol.messages import End, Result

    from tensorwire_server.workers.compute import Compute
    from tensorwire_server.workers.link import Link
    from tensorwire_server.workers.streams import ArrayStream, Stream

log = logging.getLogger(__name__)

MAX_OPEN_ITEMS = 65536  # texts of all open embed requests


class Registry:
    """Open streams by id, their deadlines, and the commands that wait for the compute side."""

    def __init__(self, model: str, *, max_requests: int) -> None:
        self.model = model
        self.loop = asyncio.get_running_loop()
        self.compute: Compute | None = None  # none until the model has computed
        self.streams: dict[int, Stream] = {}
        self.commands: list[Any] = []
        self._max_requests = max_requests
        self._num_items = 0
        # Deadlines are kept on this side too, for all operations alike, and so that a step that
        # takes long does not hold up the answer.
        self._deadlines = Deadlines(self.streams)
        self._timer: asyncio.TimerHandle | None = None

    def flush(self) -> None:
        """Hand what has gathered to the compute side, in one go."""
        if self.commands and self.compute is not None:
            commands, self.commands = self.commands, []
            self.compute.post(commands)

    # -- in -------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Refuse when the bound on open requests is reached.

        Raises:
            Busy: with the numbers.
        """
        if len(self.streams) >= self._max_requests:
            raise Busy(f"{len(self.streams)} requests are open in this worker of {self.model!r}")

    def add(self, stream: Stream, deadline_ms: int | None) -> None:
        """Open a stream."""
        self.streams[stream.id] = stream.link.streams[stream.number] = stream
        if deadline_ms is not None:
            stream.deadline = stream.arrived_at + deadline_ms / 1000
            if self._deadlines.note(stream.deadline):
                self._arm_timer(stream.deadline)

    def add_items(self, stream: ArrayStream, num_items: int) -> None:
        """Set how many items make the answer to a stream.

        Raises:
            TooLarge, Busy: with the numbers.
        """
        if num_items > MAX_OPEN_ITEMS:
            raise TooLarge(f"{num_items} texts in one request; at most {MAX_OPEN_ITEMS} go")
        if self._num_items + num_items > MAX_OPEN_ITEMS:
            raise Busy(f"{self._num_items} texts are open in this worker of {self.model!r}")
        self._num_items += num_items
        stream.begin(num_items)

    # -- out: the gate --------------------------------------------------------------------------

    def finish(self, stream: Stream, terminal: End | Result | Failure) -> None:
        """Send the one terminal frame of a stream, unless it has had one.

        Raises:
            TensorwireError: the frame cannot be sent; the stream is still open.
        """
        if stream.id in self.streams:
            stream.link.send(terminal)
            self._forget(stream)
            stream.link.on_stream_ended()

    def fail(self, stream: Stream, error: BaseException) -> None:
        """End a stream with what went wrong."""
        if stream.id in self.streams:
            wire_error = as_internal_error(error, self.model, log)
            self.finish(stream, Failure.of(stream.number, wire_error))
            self.commands.append(Leave(stream.id))

    def cut(self, stream: Stream, finish: Finish) -> None:
        """End a stream now; what its step still makes of it is dropped."""
        self.finish(stream, stream.end(finish))
        self.commands.append(Leave(stream.id))

    def abandon(self, link: Link) -> None:
        """Drop all streams of a link that is gone."""
        for stream in [*link.streams.values()]:
            self._forget(stream)
            self.commands.append(Leave(stream.id))
        self.flush()

    def give_up(self, link: Link) -> None:
        """Fail what a drain could not wait for."""
        for stream in [*link.streams.values()]:
            self.fail(stream, ModelError("the worker is shutting down", retryable=True))
        self.flush()

    def _forget(self, stream: Stream) -> None:
        del self.streams[stream.id]
        del stream.link.streams[stream.number]
        self._num_items -= stream.num_items
        if stream.job is not None:
            stream.job.drop()

    # -- deadlines ------------------------------------------------------------------------------

    def _arm_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(max(0.0, at - time.monotonic()), self._on_deadline)

    def _on_deadline(self) -> None:
        self._timer = None
        for id in self._deadlines.take_due(time.monotonic()):
            self.cut(self.streams[id], Finish.DEADLINE)
        due = self._deadlines.next_due()
        if due is not None:
            self._arm_timer(due)
        self.flush()
