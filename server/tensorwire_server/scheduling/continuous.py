"""Continuous batching, decided purely: who runs in the next step, and what a step's tokens mean.

A sequence's life:

    submit -> waiting --admitted: pages for what is known--> running --stop, length, failed--> gone
               |   ^                                          |  |
               |   +----------- preempted: no pages ----------+  |
               +---------------- cancel, deadline ---------------+---> gone

A running sequence gets a page whenever it has filled the one before. When there is none, the last
of the running ones in the order of the queue is preempted: it gives its pages back and waits in its
old place; what it had computed is read again, or found in the prefix cache. The first one in that
order is never preempted, and fits alone: so somebody always gets to the end.

The order of the queue is a time, and never changes: of arrival, later by up to `_STEP_S` for a far
or no deadline, and earlier by `_STEP_S` for each of up to `_MOST_STEPS` steps of priority. So a
higher priority goes first, and within a priority the nearer deadline; but whoever has waited long
goes before all newcomers. Prompts are read in the same order with one half of what a step has for
them; the other half is for the shortest ones (`chunks.py`).

Whatever has run and is gone stands in the `released` of the next plan, so that the engine drops its
cache before the freed pages are used again. `plan` and `commit` (or `fail`) alternate. A plan that
was not committed is superseded by the next one, which feeds the same tokens at the same positions
again.

While nobody joins, leaves or reads a prompt, the rows of a step are those of the step before, each
moved on by a token: `commit` moves them, and `plan` has nothing to do.
"""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import TYPE_CHECKING, Any

from tensorwire_server.scheduling.chunks import Chunks
from tensorwire_server.scheduling.forecast import Forecast
from tensorwire_server.scheduling.pace import Pace
from tensorwire_server.scheduling.prefix_cache import PrefixCache
from tensorwire_server.scheduling.sequences import Sequence, SequenceState
from tensorwire_server.scheduling.work import Load, Row, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tensorwire_server.scheduling.chunks import Layers
    from tensorwire_server.scheduling.pages import PagePool
    from tensorwire_server.scheduling.work import StepResult

_STEP_S = 30.0  # what a step of priority is worth in time of arrival
# Everybody may ask for any priority: nobody is to get ahead of others by more than a minute.
_MOST_STEPS = 2


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


class Emissions:
    """The new tokens of one step as columns, at most one for each sequence.

    A stop token is emitted like any other, and finishes its sequence with "stop", as transformers'
    `generate` counts its EOS; a detokenizer that skips special tokens gives it no text.
    """

    def __init__(self) -> None:
        self.sequence_ids: list[int] = []
        self.indexes: list[int] = []  # over all new tokens, earlier attempts' too
        self.token_ids: list[int] = []
        self.finishes: dict[int, str] = {}  # "stop" or "length", by sequence id


class ContinuousScheduler:
    """Joins and leaves between steps; decodes first, then chunks of prompts.

    Args:
        step_tokens: of one step; beside sequences that are continued, prompts get less of it.
        model: its name and revision: prefixes are shared within it.
        slowdown: by how much prompts may slow down steps that continue sequences.
        num_layers: see `ModelCard.resumable_layers`.
        expected_share: of `max_new_tokens`, that answers are taken to use before there were any.
        saved_on_leaving: pages of a sequence that leaves which go to the prefix cache at most.
        share_prefixes: between tenants.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int,
        step_tokens: int,
        max_waiting: int,
        model: str = "",
        slowdown: float = 2.0,
        num_layers: int = 1,
        expected_share: float = 1.0,
        saved_on_leaving: int = 64,
        share_prefixes: bool = False,
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
        self._queue: list[_Queued] = []
        self._is_blocked = False  # the head of the queue has no room, and nobody has left since
        self._earliest_deadline = math.inf  # no live deadline is earlier; spares a scan per step
        self._sequences: dict[int, Sequence] = {}  # waiting and running, by id
        self._running: dict[int, Sequence] = {}  # by id, in order of admission
        self._prefixes = PrefixCache(
            pool, model, saved_on_leaving=saved_on_leaving, share=share_prefixes
        )
        self._pace = Pace(slowdown)
        self._num_layers = num_layers
        self._chunks = Chunks(num_layers=num_layers, most_tokens=step_tokens - max_running)
        self._forecast = Forecast(expected_share)
        self._short: list[Sequence] = []  # that have no page for their next token
        self._num_preemptions = 0
        self._released: list[int] = []
        self._expired: list[int] = []
        self._failed: dict[int, str] = {}
        self._outstanding: StepPlan | None = None
        self._rows: tuple[Row, ...] = ()  # of the latest plan, or moved on by its commit
        self._in_step: list[Sequence] = []  # whose rows these are
        self._num_decodes = 0  # the first ones of them
        self._loads: tuple[Load, ...] = ()  # for them
        self._started: tuple[int, ...] = ()  # of them
        self._reading: tuple[tuple[int, int], ...] = ()  # of them, and how long they are
        self._rows_are_next = False  # they are the next plan's
        self._is_moving = False  # the engine has other work in the next step

    @property
    def num_waiting(self) -> int:
        """Sequences that were submitted and have no pages."""
        return len(self._sequences) - len(self._running)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    def stats(self) -> Mapping[str, float]:
        """Return what is held and what happened since the start."""
        counts, pool = self._prefixes.counts, self._pool
        return {
            "waiting": self.num_waiting,
            "running": self.num_running,
            "pages_used": pool.used,
            "pages_cached": pool.cached,
            "pages_total": pool.num_pages,
            "page_evictions": pool.num_evictions,
            "prefix_asked_tokens": counts.asked_tokens,
            "prefix_hit_tokens": counts.hit_tokens,
            "prefix_hit_rate": round(counts.hit_tokens / max(1, counts.asked_tokens), 4),
            "preemptions": self._num_preemptions,
            "recomputed_tokens": counts.recomputed_tokens,
        }

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
        if self._pool.pages_for(sequence.num_tokens_at_most) > self._pool.num_pages:
            raise NeverFits(
                needed_tokens=sequence.num_tokens_at_most,
                limit_tokens=self._pool.num_pages * self._pool.page_tokens,
            )
        sequence.order = (_due(sequence), next(self._arrivals))
        self._sequences[sequence.id] = sequence
        self._enqueue((sequence,))
        if sequence.deadline is not None:
            self._earliest_deadline = min(self._earliest_deadline, sequence.deadline)

    def cancel(self, sequence_id: int, *, is_whole: bool = False) -> bool:
        """Drop a sequence now; a step that already has it is ignored for it. False if unknown.

        Args:
            is_whole: its answer ended by itself; that tells how long answers become.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        if is_whole:
            self._finish(sequence)
        else:
            self._drop(sequence)
        return True

    def plan(self, now: float) -> StepPlan | None:
        """Return the next step, or None when there is nothing to run, to save or to release."""
        self._expire(now)
        if self._short:
            self._make_room()
        else:
            self._admit()
        if not self._rows_are_next:
            self._build_rows()
        self._rows_are_next = False
        rows, prefixes = self._rows, self._prefixes
        if not (rows or self._released or prefixes.saves or prefixes.dropped):
            return None
        plan = StepPlan(
            rows=rows,
            released=tuple(self._released),
            dropped=tuple(prefixes.dropped),
            saves=tuple(prefixes.saves.values()),
            loads=self._loads,
            started=self._started,
            reading=self._reading,
        )
        self._outstanding = plan
        return plan

    def commit(self, plan: StepPlan, result: StepResult, *, took_s: float = 0.0) -> Emissions:
        """Take in what a step made; returns the new tokens in the order of the plan's rows.

        Args:
            took_s: how long the step took, as far as that is known.
        """
        self._note_told(plan)
        self._note_pace(plan, took_s)
        self._chunks.note_done()
        self._is_moving = result.moves_next
        emissions = Emissions()
        # `Any` is an int that compiled code passes on as the object it is.
        tokens: dict[Any, Any] = result.tokens
        ids: list[Any] = emissions.sequence_ids
        token_ids: list[Any] = emissions.token_ids
        failed, indexes, running = result.failed, emissions.indexes, SequenceState.RUNNING
        page_tokens, num_layers = self._pool.page_tokens, self._num_layers
        in_step = self._in_step
        for at, row in enumerate(plan.rows):
            sequence = in_step[at]
            if sequence.state is not running:
                continue  # cancelled while the step ran
            if row.layers is not None and row.layers[1] < num_layers:
                sequence.has_run = True
                continue
            sequence.num_cached = num_cached = row.start + len(row.token_ids)
            id: Any = sequence.id
            if failed and id in failed:
                self._failed[id] = failed[id]
                self._drop(sequence, keep=False)
                continue
            if sequence.is_reading:
                self._note_read(sequence, row)
            if row.sample:
                token_id = tokens[id]
                known: list[Any] = sequence.tokens
                ids.append(id)
                indexes.append(len(known) - len(sequence.prompt_ids))
                token_ids.append(token_id)
                known.append(token_id)
                if token_id in sequence.stop_ids:
                    emissions.finishes[id] = "stop"
                    self._finish(sequence)
                    continue
                if len(known) >= sequence.num_tokens_at_most:
                    emissions.finishes[id] = "length"
                    self._finish(sequence)
                    continue
                row.token_ids, row.start, row.layers = (token_id,), num_cached, None
                if num_cached % page_tokens == 0:
                    self._grow(sequence)
                    row.pages = tuple(sequence.pages)
        # One for each row, and nobody has joined, left or stopped: every row has been moved on.
        self._rows_are_next = (
            len(emissions.token_ids) == len(self._running) == len(plan.rows)
            and not emissions.finishes
            and not self._short
        )
        if self._rows_are_next:
            self._num_decodes = len(plan.rows)
        self._loads = self._started = self._reading = ()
        return emissions

    def fail(self, plan: StepPlan) -> list[int]:
        """Take in that a step broke off, nobody knows where; returns who was in it, now dropped."""
        assert plan is self._outstanding, "only the latest plan can fail, once"
        self._outstanding = None
        self._is_moving = False
        self._prefixes.note_failed(plan, self._running)
        dropped = [s for s in self._in_step if s.state is SequenceState.RUNNING]
        for sequence in dropped:
            self._drop(sequence, keep=False)
        if not plan.rows:
            # The same would be planned for ever.
            del self._released[: len(plan.released)]
            del self._prefixes.dropped[: len(plan.dropped)]
        return [sequence.id for sequence in dropped]

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
        self._prefixes.check_invariants(self._running)
        held = [page for sequence in self._running.values() for page in sequence.pages]
        assert len(held) == len(set(held)) == self._pool.used, "pages leaked or shared"
        assert len(self._running) <= self._max_running
        assert self.num_waiting <= self._max_waiting + self._max_running
        queued = [entry[-1].id for entry in self._queue if self._is_live(entry[-1])]
        queued += [sequence.id for sequence in self._prefixes.held_back]
        assert len(self._queue) <= 2 * self.num_waiting + 16 + self._max_running
        assert len(queued) == len(set(queued)), "twice in the queue"
        assert set(queued) == self._sequences.keys() - self._running.keys(), "lost in the queue"
        for sequence in self._running.values():
            assert sequence.state is SequenceState.RUNNING
            assert sequence.num_to_feed >= 1, "a running sequence has nothing to feed"
            assert len(sequence.pages) <= self._pool.pages_for(sequence.num_tokens_at_most)
            if sequence not in self._short:
                assert len(sequence.pages) >= self._pool.pages_for(sequence.num_cached + 1)

    # -- queue and admission --------------------------------------------------------------------

    def _enqueue(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            heapq.heappush(self._queue, (*sequence.order, sequence))
            if self._queue[0][-1] is sequence:
                self._is_blocked = False

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
        while self._queue and not self._is_blocked and len(self._running) < self._max_running:
            sequence = self._queue[0][-1]
            if self._is_live(sequence):
                hits = self._prefixes.find(sequence)
                if not self._prefixes.hold_back(sequence, len(hits)):
                    if not self._take_in(sequence, hits):
                        # Nobody overtakes: a long sequence would wait for ever.
                        self._is_blocked = True
                        return
                    self._rows_are_next = False
            heapq.heappop(self._queue)

    def _take_in(self, sequence: Sequence, hits: list[int]) -> bool:
        """Start a sequence, if there is room; False if there is not."""
        pool = self._pool
        num_pages = pool.pages_for(len(sequence.tokens))
        spare = pool.available - num_pages
        if spare < 0 or (self._running and spare < self._growth_to_come(sequence)):
            return False
        # What is loaded must not be evicted for the room that it is loaded into.
        num_idle = pool.num_idle(hits)
        while hits and num_idle > spare:
            num_idle -= pool.num_idle((hits.pop(),))
        self._prefixes.begin(sequence, hits, has_room=num_idle < spare)
        sequence.pages = self._prefixes.allocate(num_pages)
        sequence.is_reading = True
        sequence.state = SequenceState.RUNNING
        self._running[sequence.id] = sequence
        return True

    def _growth_to_come(self, newcomer: Sequence) -> int:
        """Return how many pages the running sequences and one more will ask for, probably."""
        pages_for, tokens = self._pool.pages_for, self._forecast.tokens
        growth = pages_for(tokens(newcomer)) - pages_for(len(newcomer.tokens))
        for sequence in self._running.values():
            growth += pages_for(tokens(sequence)) - len(sequence.pages)
        return growth

    # -- pages of running sequences -------------------------------------------------------------

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence its next page; False, and it is short of one, if there is none."""
        if self._pool.available:
            sequence.pages += self._prefixes.allocate(1)
            return True
        self._short.append(sequence)
        return False

    def _make_room(self) -> None:
        """Find a page for everybody who has none for the next token, by preempting the last."""
        short, self._short = sorted(self._short, key=_by_order), []
        self._rows_are_next = False
        for sequence in short:
            while sequence.state is SequenceState.RUNNING and not self._grow(sequence):
                self._short.clear()
                self._preempt(max(self._running.values(), key=_by_order))

    def _preempt(self, sequence: Sequence) -> None:
        self._num_preemptions += 1
        sequence.num_lost = sequence.num_cached
        self._stop_running(sequence, keep=True)
        sequence.state = SequenceState.WAITING
        sequence.num_cached = 0
        self._enqueue((sequence,))
        self._is_blocked = False

    def _stop_running(self, sequence: Sequence, *, keep: bool) -> None:
        del self._running[sequence.id]
        self._chunks.forget(sequence)
        self._rows_are_next = self._is_blocked = False
        self._enqueue(self._prefixes.leave(sequence, keep=keep))
        self._released.append(sequence.id)

    # -- steps ----------------------------------------------------------------------------------

    def _build_rows(self) -> None:
        """Every decode, then chunks of prompts until the budget is spent."""
        decoding: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self._running.values():
            (decoding if sequence.num_to_feed == 1 else reading).append(sequence)
        every_layer = 0, self._num_layers
        rows = [self._row(sequence, 1, every_layer) for sequence in decoding]
        paced = None
        # A prompt of one token looks like a decode, but is nobody who could be kept waiting.
        if reading and not all(sequence.is_reading for sequence in decoding):
            num_prompts = len(reading)
            paced = self._pace.prompt_tokens(len(decoding), num_prompts, spares=self._is_moving)
        chunks, layers = self._chunks.next(reading, self._step_tokens - len(rows), paced)
        rows += [self._row(sequence, num_tokens, layers) for sequence, num_tokens in chunks.items()]
        self._rows = tuple(rows)
        self._in_step = [*decoding, *chunks]
        self._num_decodes = len(decoding)
        loads = self._prefixes.loads
        self._loads = tuple(loads[s.id] for s in self._in_step if s.id in loads) if loads else ()
        self._started = tuple(s.id for s in self._in_step if not s.has_run)
        self._reading = tuple((s.id, len(s.tokens)) for s in self._in_step if s.is_reading)

    def _row(self, sequence: Sequence, num_tokens: int, layers: Layers) -> Row:
        start, tokens = sequence.num_cached, sequence.tokens
        end = start + num_tokens
        return Row(
            sequence_id=sequence.id,
            token_ids=tuple(tokens[start:end]),
            start=start,
            pages=tuple(sequence.pages[: self._pool.pages_for(end)]),
            sample=end == len(tokens) and layers[1] == self._num_layers,
            sampling=sequence.sampling,
            history=tokens,
            num_prompt_tokens=len(sequence.prompt_ids),
            layers=None if layers == (0, self._num_layers) else layers,
        )

    def _note_told(self, plan: StepPlan) -> None:
        assert plan is self._outstanding, "only the latest plan can be committed, once"
        self._outstanding = None
        # Cancels since `plan` have appended to the list; theirs are still to be told.
        del self._released[: len(plan.released)]
        if plan.saves or plan.dropped or plan.loads:
            self._prefixes.note_told(plan)
        if plan.loads:
            self._is_blocked = False  # pages that were loaded can be evicted now

    def _note_pace(self, plan: StepPlan, took_s: float) -> None:
        num_prompt_tokens = 0.0  # of one that goes through some layers, as much
        for row in plan.rows[self._num_decodes :]:
            if row.sampling.reports:
                return  # its tokens cost more than those of others
            first, last = row.layers or (0, self._num_layers)
            num_prompt_tokens += len(row.token_ids) * (last - first) / self._num_layers
        # Copies are a part of what a prompt costs, but not of what others cost.
        if self._is_moving:
            return
        if plan.rows and not plan.loads and (num_prompt_tokens or not plan.saves):
            self._pace.note(self._num_decodes, num_prompt_tokens, took_s)

    def _note_read(self, sequence: Sequence, row: Row) -> None:
        sequence.has_run = True
        sequence.is_reading = not row.sample
        self._enqueue(self._prefixes.note_read(sequence, row.start))

    # -- ends -----------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence) -> None:
        self._forecast.note_end(sequence)
        self._drop(sequence)

    def _drop(self, sequence: Sequence, *, keep: bool = True) -> None:
        """The one way out: whatever ends a sequence passes here."""
        was_running = sequence.state is SequenceState.RUNNING
        sequence.state = SequenceState.FINISHED
        del self._sequences[sequence.id]
        if was_running:
            self._stop_running(sequence, keep=keep)
        elif not self._prefixes.forget_held_back(sequence):
            self._is_blocked = False
            if len(self._queue) > 2 * self.num_waiting + 16:
                # Without this, submits and cancels behind a blocked head would grow the heap.
                self._queue = [entry for entry in self._queue if self._is_live(entry[-1])]
                heapq.heapify(self._queue)


_Queued = tuple[float, int, Sequence]  # its order, and who


def _due(sequence: Sequence) -> float:
    """Return the time that orders the queue."""
    slack = _STEP_S
    if sequence.deadline is not None:
        slack = min(slack, max(0.0, sequence.deadline - sequence.arrived_at))
    steps = max(-_MOST_STEPS, min(_MOST_STEPS, sequence.priority))
    return sequence.arrived_at + slack - _STEP_S * steps


def _by_order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order
