"""Batches for models that answer each item once: on a thread of their own, or at once."""

from __future__ import annotations

import logging
import sys
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from tensorwire_server.scheduling.microbatch import MicroBatcher
from tensorwire_server.workers.faults import as_wire_error
from tensorwire_server.workers.loop import Leave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tensorwire_server.scheduling.work import ArrayEngine
    from tensorwire_server.workers.spec import WorkerSpec

log = logging.getLogger(__name__)


# Plain classes, as messages are: there is one of each for each request.
class ArrayItem:
    """One text's ids or one set of named arrays; a request has one or more."""

    def __init__(self, request_id: int, index: int, payload: Any, cost_tokens: int) -> None:
        self.request_id: Final = request_id
        self.index: Final = index  # within its request
        self.payload: Final = payload
        self.cost_tokens: Final = cost_tokens


class BatchOutcome:
    """What one run of the engine made of its items."""

    def __init__(self, items: list[ArrayItem], results: list[Any], started_at: float) -> None:
        self.items: Final = items
        self.results: Final = results  # by item; an Exception fails its request
        self.started_at: Final = started_at


class ArrayLoop:
    """Drives one `ArrayEngine` with a micro-batcher; `run` is the thread."""

    is_inline = False

    def __init__(
        self, engine: ArrayEngine, spec: WorkerSpec, *, post: Callable[[BatchOutcome], None]
    ) -> None:
        self.engine = engine
        self.num_steps = 0
        self._model = spec.model
        self._batcher: MicroBatcher[ArrayItem] = MicroBatcher(
            max_items=spec.max_items,
            max_tokens=spec.max_batch_tokens,
            max_wait_s=spec.max_wait_ms / 1000,
            max_waiting=sys.maxsize,  # whoever submits keeps the bound, over items that run too
        )
        self._post_outcome = post
        self._commands: SimpleQueue[list[ArrayItem | Leave]] = SimpleQueue()
        self._num_running = 0

    def post(self, commands: list[ArrayItem | Leave]) -> None:
        """Hand over what one turn of the asyncio loop gathered."""
        self._commands.put(commands)

    def outcome_taken(self) -> None:
        """Nothing: a batch is bounded by the items that are open."""

    def load(self) -> Mapping[str, float]:
        """Return how many items wait and run."""
        return {"waiting": len(self._batcher), "running": self._num_running}

    def run(self) -> None:
        """Work until the process ends."""
        while True:
            self._take_commands()
            self._run_due()

    def _run_due(self) -> None:
        # A function of its own, whose variables end with it: while the thread waits for the next
        # batch, nothing here may keep the arrays of the last one, whose memory others wait for.
        batch = self._batcher.take(time.monotonic())
        if batch:
            self._num_running = len(batch)
            outcome = run_batch(self.engine, batch, self._model)
            self._num_running = 0
            self.num_steps += 1
            self._post_outcome(outcome)

    def _take_commands(self) -> None:
        """Wait until a batch is due, and take in whatever arrives meanwhile."""
        due = self._batcher.next_due()
        wait_s = None if due is None else max(0.0, due - time.monotonic())
        try:
            self._apply(self._commands.get(timeout=wait_s))
            while True:
                self._apply(self._commands.get_nowait())
        except Empty:
            return

    def _apply(self, commands: list[ArrayItem | Leave]) -> None:
        now = time.monotonic()
        gone = set()
        for command in commands:
            if isinstance(command, Leave):
                gone.add(command.request_id)
            else:
                self._batcher.add(command, command.cost_tokens, now)
        if gone:
            self._batcher.remove(lambda item: item.request_id in gone)


class InlineArrays:
    """Runs an engine where the request arrives, for engines that answer faster than threads do."""

    is_inline = True

    def __init__(
        self, engine: ArrayEngine, spec: WorkerSpec, *, take: Callable[[BatchOutcome], None]
    ) -> None:
        self.engine = engine
        self.num_steps = 0
        self._model = spec.model
        self._take = take

    def post(self, commands: list[ArrayItem | Leave]) -> None:
        """Run the items of one turn of the asyncio loop."""
        items = [command for command in commands if isinstance(command, ArrayItem)]
        if items:
            self.num_steps += 1
            self._take(run_batch(self.engine, items, self._model))

    def outcome_taken(self) -> None:
        """Nothing: nothing runs ahead."""

    def load(self) -> Mapping[str, float]:
        """Return zeros: nothing ever waits."""
        return {"waiting": 0, "running": 0}

    def run(self) -> None:
        """Return at once: there is no thread."""


def run_batch(engine: ArrayEngine, items: list[ArrayItem], model: str) -> BatchOutcome:
    """Run one batch; an engine that raises fails all its items."""
    started_at = time.monotonic()
    try:
        results = engine.run([item.payload for item in items])
    except Exception as error:
        results = [as_wire_error(error, "batch_failed", model, log)] * len(items)
    return BatchOutcome(items, results, started_at)
