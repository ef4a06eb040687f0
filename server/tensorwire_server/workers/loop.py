"""The compute thread of a text model: plan, step, commit, and a post for each step.

The asyncio side sends commands through a queue and gets outcomes through `post`. Nothing else is
shared: the scheduler and the engine belong to this thread.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from tensorwire_protocol.errors import BadParams, Busy, NumericError

from tensorwire_server.scheduling.continuous import (
    ContinuousScheduler,
    Emissions,
    NeverFits,
    WaitingFull,
)
from tensorwire_server.scheduling.pages import PagePool
from tensorwire_server.workers.faults import as_wire_error
from tensorwire_server.workers.kv_budget import find_kv_budget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as PySequence

    from tensorwire_protocol.errors import TensorwireError

    from tensorwire_server.scheduling.sequences import Sequence
    from tensorwire_server.scheduling.work import GenerateEngine, Load, Scores, StepPlan
    from tensorwire_server.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

# Steps whose outcome the asyncio side has not taken yet. What has gathered there it takes together,
# so that a model faster than the wire costs one frame for some steps, not one for each.
OUTCOMES_AHEAD = 16
_GATHERED_TOKENS = 16_384  # so many go into one frame with ease

# Where requests come in bursts, an idle engine lets the rest of one come before it reads the first
# prompts: else the rest would wait until these are read, and all would run in smaller batches. For
# so much of the time that such a step took last, and no longer than this; until so many requests
# have come alone, of which nothing is known at the start.
_GATHERING_SHARE, GATHERING_S, _GATHERINGS = 0.05, 0.005, 4
_SHORTEST_GATHERING_S = 0.0001  # nothing comes in less


@dataclass(frozen=True)
class Leave:
    """Drop what was submitted under this id, wherever it is."""

    request_id: int
    is_whole: bool = False  # the answer ended by itself, by what only its text shows


class StepOutcome:
    """What one turn of the loop did, for the asyncio side."""

    def __init__(
        self,
        *,
        emissions: Emissions | None = None,
        failed: dict[int, TensorwireError] | None = None,
        expired: PySequence[int] = (),
        started: tuple[int, ...] = (),  # ran for the first time, at `started_at`
        started_at: float = 0.0,
        loaded: PySequence[Load] = (),  # what of them, or of others, came out of the prefix cache
        num_rows: int = 0,
        scores: PySequence[Scores] = (),
    ) -> None:
        self.emissions = Emissions() if emissions is None else emissions
        self.failed = {} if failed is None else failed
        self.expired: Final = expired
        self.started: Final = started
        self.started_at: Final = started_at
        self.loaded: Final = loaded
        self.num_rows: Final = num_rows
        self.scores = scores


class GenerateLoop:
    """Drives one `GenerateEngine`; `run` is the thread, everything else is called from outside.

    Args:
        post: takes each outcome to the asyncio side, which answers with `outcome_taken`.
        gathering_s: how long, at most, an idle engine waits for the rest of a burst.
    """

    is_inline = False

    def __init__(
        self,
        engine: GenerateEngine,
        spec: WorkerSpec,
        *,
        post: Callable[[StepOutcome], None],
        gathering_s: float = GATHERING_S,
    ) -> None:
        self.engine = engine
        self.num_steps = 0
        self._model = spec.model
        self.kv_budget = budget = find_kv_budget(engine, spec)
        self._scheduler = ContinuousScheduler(
            PagePool(budget.num_pages, budget.page_tokens),
            max_running=budget.max_running,
            step_tokens=max(spec.step_tokens, budget.max_running),
            # Whoever submits keeps the bound over waiting and running together.
            max_waiting=spec.max_requests,
            model=spec.model,
            slowdown=spec.max_slowdown,
            num_layers=engine.card.resumable_layers,
            saved_on_leaving=budget.saved_on_leaving,
            share_prefixes=spec.share_prefixes,
        )
        self._post_outcome = post
        self._gathering_s = gathering_s
        self._max_running = budget.max_running
        self._gatherings_left = _GATHERINGS
        self._first_step_s = 0.0  # what the latest step took that found the engine idle
        self._commands: SimpleQueue[list[Sequence | Leave]] = SimpleQueue()
        # A semaphore, of the one kind that is written in C.
        self._permits: SimpleQueue[None] = SimpleQueue()
        for _ in range(min(OUTCOMES_AHEAD, 1 + _GATHERED_TOKENS // spec.max_running)):
            self._permits.put(None)
        self._load: Mapping[str, float] = {}
        self._publish_load()

    def post(self, commands: list[Sequence | Leave]) -> None:
        """Hand over what one turn of the asyncio loop gathered."""
        self._commands.put(commands)

    def outcome_taken(self) -> None:
        """Allow the thread one more outcome."""
        self._permits.put(None)

    def load(self) -> Mapping[str, float]:
        """Return the counts as they stood after the latest step."""
        return self._load

    def run(self) -> None:
        """Work until the process ends."""
        while True:
            is_idle, began = not self._scheduler.num_running, time.monotonic()
            if not self._turn():
                self._publish_load()
                self._apply(self._commands.get())
            elif is_idle and self._scheduler.num_running:
                self._first_step_s = time.monotonic() - began
                if not self._commands.empty():
                    self._gatherings_left = _GATHERINGS
            while not self._commands.empty():
                self._apply(self._commands.get())
            if self._gatherings_left and not self._scheduler.num_running:
                self._gather()

    def _gather(self) -> None:
        """Wait for the rest of a burst, as long as that is little beside what it is spared."""
        scheduler = self._scheduler
        if not scheduler.num_waiting:
            return
        is_burst = scheduler.num_waiting > 1
        self._gatherings_left = _GATHERINGS if is_burst else self._gatherings_left - 1
        until = time.monotonic() + min(_GATHERING_SHARE * self._first_step_s, self._gathering_s)
        while 0 < scheduler.num_waiting < self._max_running:
            left_s = until - time.monotonic()
            if left_s < _SHORTEST_GATHERING_S:
                return
            try:
                self._apply(self._commands.get(timeout=left_s))
            except Empty:
                return
            self._gatherings_left = _GATHERINGS

    def _turn(self) -> bool:
        """Run one step; False if there was none to run."""
        plan = self._scheduler.plan(time.monotonic())
        expired = self._scheduler.take_expired()
        if plan is None:
            if expired:
                self._post(StepOutcome(expired=expired))
            return False
        began = time.monotonic()
        outcome = StepOutcome(
            expired=expired,
            started=plan.started,
            started_at=began,
            loaded=plan.loads,
            num_rows=len(plan.rows),
        )
        try:
            result = self.engine.step(plan)
        except Exception as error:
            self._fail_step(plan, error, outcome)
        else:
            took_s = time.monotonic() - began
            outcome.emissions = self._scheduler.commit(plan, result, took_s=took_s)
            outcome.scores = result.scores
            failed = self._scheduler.take_failed()
            outcome.failed = {id_: NumericError(why) for id_, why in failed.items()}
        self.num_steps += 1
        self._publish_load()
        made = outcome.emissions.token_ids or outcome.scores
        if made or outcome.failed or expired or outcome.started:
            self._post(outcome)
        return True

    def _post(self, outcome: StepOutcome) -> None:
        # An asyncio side that falls behind slows the steps down; its backlog must not grow.
        self._permits.get()
        self._post_outcome(outcome)

    def _fail_step(self, plan: StepPlan, error: Exception, outcome: StepOutcome) -> None:
        """Fail whoever was in the step; the others go on."""
        wire_error = as_wire_error(error, "step_failed", self._model, log)
        outcome.failed = dict.fromkeys(self._scheduler.fail(plan), wire_error)

    def _apply(self, commands: list[Sequence | Leave]) -> None:
        refused: dict[int, TensorwireError] = {}
        for command in commands:
            if isinstance(command, Leave):
                self._scheduler.cancel(command.request_id, is_whole=command.is_whole)
                continue
            try:
                self._scheduler.submit(command)
            except WaitingFull as error:
                refused[command.id] = Busy(str(error))
            except NeverFits as error:
                refused[command.id] = BadParams(
                    f"{self._model!r}: the request {error}; shorten the prompt or ask for fewer"
                    " max_new_tokens (the server's --kv-memory sets the limit)"
                )
        if refused:
            self._post(StepOutcome(failed=refused))

    def _publish_load(self) -> None:
        self._load = {**self._scheduler.stats(), **self.engine.stats()}
