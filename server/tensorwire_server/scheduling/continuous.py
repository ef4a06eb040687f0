"""Continuous batching, decided purely: who runs in the next step, and what a step's tokens mean.

A sequence's life:

    submit -> waiting --admitted: all pages reserved--> running --stop, length, failed--> gone
                 |                                         |
                 +---------- cancel, deadline -------------+---> gone

Whatever has run and is gone stands in the `released` of the next plan, so that the engine drops its
cache before the freed pages are used again. `plan` and `commit` alternate. A plan that was not
committed is superseded by the next one, which feeds the same tokens at the same positions again.

While nobody joins, leaves or reads a prompt, the rows of a step are those of the step before, each
moved on by a token: `commit` moves them, and `plan` has nothing to do.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from tensorwire_server.scheduling.sequences import Sequence, SequenceState
from tensorwire_server.scheduling.work import Row, StepPlan

if TYPE_CHECKING:
    from tensorwire_server.scheduling.pages import PagePool
    from tensorwire_server.scheduling.work import StepResult


class WaitingFull(Exception):
    """The queue is at its bound; the sequence was not taken."""

    def __init__(self, *, queued: int, limit: int) -> None:
        super().__init__(f"queue is full ({queued} of {limit})")
        self.queued, self.limit = queued, limit


class NeverFits(Exception):
    """The sequence needs more pages than the pool has; it was not taken."""

    def __init__(self, *, needed_tokens: int, limit_tokens: int) -> None:
        super().__init__(f"needs room for {needed_tokens} tokens, the cache holds {limit_tokens}")
        self.needed_tokens, self.limit_tokens = needed_tokens, limit_tokens


@dataclass(slots=True, kw_only=True, eq=False)
class Emissions:
    """The new tokens of one step as columns, at most one for each sequence.

    A stop token is emitted like any other, and finishes its sequence with "stop", as transformers'
    `generate` counts its EOS; a detokenizer that skips special tokens gives it no text.
    """

    sequence_ids: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)  # over all new tokens, earlier attempts' too
    token_ids: list[int] = field(default_factory=list)
    finishes: dict[int, str] = field(default_factory=dict)  # "stop" or "length", by sequence id


class ContinuousScheduler:
    """Joins and leaves between steps; priority then arrival; decodes first, then prompt chunks."""

    def __init__(
        self, pool: PagePool, *, max_running: int, step_tokens: int, max_waiting: int
    ) -> None:
        if max_running < 1 or max_waiting < 1:
            raise ValueError(f"bounds must be at least 1, got {max_running} and {max_waiting}")
        if step_tokens < max_running:
            # Otherwise a full batch could not decode in one step, and prompts would starve.
            raise ValueError(f"step_tokens {step_tokens} must be >= max_running {max_running}")
        self._pool = pool
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._max_waiting = max_waiting
        self._arrivals = count()
        # Entries of sequences that were cancelled or expired stay in the heap until they surface,
        # or until they outnumber the living.
        self._queue: list[tuple[int, float, int, Sequence]] = []
        self._earliest_deadline = math.inf  # no live deadline is earlier; spares a scan per step
        self._sequences: dict[int, Sequence] = {}  # waiting and running, by id
        self._running: dict[int, Sequence] = {}  # by id, in order of admission
        self._released: list[int] = []
        self._expired: list[int] = []
        self._failed: dict[int, str] = {}
        self._outstanding: StepPlan | None = None
        self._rows: tuple[Row, ...] = ()  # of the latest plan, or moved on by its commit
        self._in_step: list[Sequence] = []  # whose rows these are
        self._rows_are_next = False  # they are the next plan's
        self._last_batch_size = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that were submitted and have no pages yet."""
        return len(self._sequences) - len(self._running)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def last_batch_size(self) -> int:
        """Rows of the latest plan."""
        return self._last_batch_size

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            WaitingFull: the queue is at its bound.
            NeverFits: it would not fit even if it ran alone.
        """
        if sequence.id in self._sequences:
            raise ValueError(f"sequence {sequence.id} is already known")
        if self.num_waiting >= self._max_waiting:
            raise WaitingFull(queued=self.num_waiting, limit=self._max_waiting)
        if self._pages_needed(sequence) > self._pool.num_pages:
            raise NeverFits(
                needed_tokens=sequence.num_tokens_at_most,
                limit_tokens=self._pool.num_pages * self._pool.page_tokens,
            )
        self._sequences[sequence.id] = sequence
        order = (-sequence.priority, sequence.arrived_at, next(self._arrivals), sequence)
        heapq.heappush(self._queue, order)
        if sequence.deadline is not None:
            self._earliest_deadline = min(self._earliest_deadline, sequence.deadline)

    def cancel(self, sequence_id: int) -> bool:
        """Drop a sequence now; a step that already has it is ignored for it. False if unknown."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        self._drop(sequence)
        return True

    def plan(self, now: float) -> StepPlan | None:
        """Return the next step, or None when there is nothing to run or to release."""
        self._expire(now)
        self._admit()
        if not self._rows_are_next:
            self._build_rows()
        self._rows_are_next = False
        rows = self._rows
        if not rows and not self._released:
            return None
        plan = StepPlan(rows=rows, released=tuple(self._released))
        self._outstanding = plan
        self._last_batch_size = len(rows)
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> Emissions:
        """Take in what a step made; returns the new tokens in the order of the plan's rows."""
        assert plan is self._outstanding, "only the latest plan can be committed, once"
        self._outstanding = None
        # Cancels since `plan` have appended to the list; theirs are still to be told.
        del self._released[: len(plan.released)]
        emissions = Emissions()
        tokens, failed, running = result.tokens, result.failed, SequenceState.RUNNING
        page_tokens = self._pool.page_tokens
        add_id, add_index = emissions.sequence_ids.append, emissions.indexes.append
        add_token = emissions.token_ids.append
        for row, sequence in zip(plan.rows, self._in_step, strict=True):
            if sequence.state is not running:
                continue  # cancelled while the step ran
            sequence.num_cached = num_cached = row.start + len(row.token_ids)
            id = sequence.id
            if failed and id in failed:
                self._failed[id] = failed[id]
                self._drop(sequence)
            elif row.sample:
                token_id, known = tokens[id], sequence.tokens
                add_id(id)
                add_index(len(known) - len(sequence.prompt_ids))
                add_token(token_id)
                known.append(token_id)
                if token_id in sequence.stop_ids:
                    emissions.finishes[id] = "stop"
                    self._drop(sequence)
                    continue
                if len(known) >= sequence.num_tokens_at_most:
                    emissions.finishes[id] = "length"
                    self._drop(sequence)
                    continue
                row.token_ids, row.start = (token_id,), num_cached
                if num_cached % page_tokens == 0:
                    row.pages = sequence.pages[: num_cached // page_tokens + 1]
        # One for each row, and nobody has joined or left: every row has been moved on.
        self._rows_are_next = (
            len(emissions.token_ids) == len(self._running) == len(plan.rows)
            and not emissions.finishes
        )
        return emissions

    def take_expired(self) -> list[int]:
        """Return the ids whose deadline passed since the last call; they are already dropped."""
        expired, self._expired = self._expired, []
        return expired

    def take_failed(self) -> dict[int, str]:
        """Return the ids that an engine failed since the last call, and why; already dropped."""
        failed, self._failed = self._failed, {}
        return failed

    def check_invariants(self) -> None:
        """Fail if pages leaked or the books disagree."""
        self._pool.check_invariants()
        held = [page for sequence in self._running.values() for page in sequence.pages]
        assert len(held) == len(set(held)) == self._pool.used, "pages leaked or shared"
        assert len(self._running) <= self._max_running
        assert self.num_waiting <= self._max_waiting
        queued = {entry[3].id for entry in self._queue if self._is_live(entry[3])}
        assert len(self._queue) <= 2 * self._max_waiting + 16
        assert queued == self._sequences.keys() - self._running.keys(), "lost in the queue"
        for sequence in self._running.values():
            assert sequence.state is SequenceState.RUNNING
            assert sequence.num_to_feed >= 1, "a running sequence has nothing to feed"
            assert len(sequence.pages) == self._pages_needed(sequence)

    def _pages_needed(self, sequence: Sequence) -> int:
        # The last new token is never fed back, so its place is never written; it is reserved
        # all the same, so that the numbers a client sees (prompt + max_new_tokens) are the ones
        # that decide.
        return self._pool.pages_for(sequence.num_tokens_at_most)

    def _is_live(self, queued: Sequence) -> bool:
        return queued.state is SequenceState.WAITING

    def _expire(self, now: float) -> None:
        if now < self._earliest_deadline:
            return
        for sequence in [*self._sequences.values()]:
            if sequence.is_expired(now):
                self._expired.append(sequence.id)
                self._drop(sequence)
        deadlines = (sequence.deadline for sequence in self._sequences.values())
        self._earliest_deadline = min((at for at in deadlines if at is not None), default=math.inf)

    def _admit(self) -> None:
        while self._queue and len(self._running) < self._max_running:
            sequence = self._queue[0][3]
            if self._is_live(sequence):
                if self._pages_needed(sequence) > self._pool.free:
                    return  # nobody overtakes: a long sequence would wait for ever
                sequence.pages = self._pool.allocate(self._pages_needed(sequence))
                sequence.state = SequenceState.RUNNING
                self._running[sequence.id] = sequence
                self._rows_are_next = False
            heapq.heappop(self._queue)

    def _build_rows(self) -> None:
        """Every decode, then chunks of prompts in order of admission until the budget is spent."""
        decoding: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self._running.values():
            (decoding if sequence.num_to_feed == 1 else reading).append(sequence)
        rows = [self._row(sequence, 1) for sequence in decoding]
        budget = self._step_tokens - len(rows)
        for sequence in reading:
            if budget == 0:
                break
            num_tokens = min(budget, sequence.num_to_feed)
            rows.append(self._row(sequence, num_tokens))
            budget -= num_tokens
        self._rows = tuple(rows)
        self._in_step = decoding + reading[: len(rows) - len(decoding)]

    def _row(self, sequence: Sequence, num_tokens: int) -> Row:
        start, tokens = sequence.num_cached, sequence.tokens
        end = start + num_tokens
        return Row(
            sequence_id=sequence.id,
            token_ids=tuple(tokens[start:end]),
            start=start,
            pages=sequence.pages[: self._pool.pages_for(end)],
            sample=end == len(tokens),
            sampling=sequence.sampling,
            history=tokens,
            num_prompt_tokens=len(sequence.prompt_ids),
        )

    def _drop(self, sequence: Sequence) -> None:
        """The one way out: whatever ends a sequence passes here."""
        was_running = sequence.state is SequenceState.RUNNING
        sequence.state = SequenceState.FINISHED
        del self._sequences[sequence.id]
        if was_running:
            del self._running[sequence.id]
            self._rows_are_next = False
            self._pool.release(sequence.pages)
            sequence.pages = ()
            self._released.append(sequence.id)
        elif len(self._queue) > 2 * self.num_waiting + 16:
            # Without this, submits and cancels behind a blocked head would grow the heap for ever.
            self._queue = [entry for entry in self._queue if self._is_live(entry[3])]
            heapq.heapify(self._queue)
