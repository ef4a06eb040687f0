"""Drives scheduler and engine step by step, as a worker's compute thread does, and times each.

Times are CPU seconds of this thread, with torch on one thread: what a step takes on a machine that
has nothing else to do, however busy this one is.
"""

from __future__ import annotations

import random
import time
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from tensorwire_server.scheduling.continuous import ContinuousScheduler
from tensorwire_server.scheduling.pages import PagePool
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling
from tensorwire_server.telemetry.process import settle_garbage_collector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire_server.scheduling.work import GenerateEngine

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
PAGE_TOKENS = 16


class Stepping:
    """An engine, a scheduler, and the book of who got a token when."""

    def __init__(
        self,
        engine: GenerateEngine,
        *,
        num_pages: int,
        max_running: int = 64,
        step_tokens: int = 2048,
        **more: Any,
    ) -> None:
        torch.set_num_threads(1)
        settle_garbage_collector()  # as a worker does
        self._engine = engine
        self._scheduler = ContinuousScheduler(
            PagePool(num_pages, PAGE_TOKENS),
            max_running=max_running,
            step_tokens=step_tokens,
            max_waiting=1 << 20,
            num_layers=engine.card.resumable_layers,
            **more,
        )
        self._ids = count()
        self._random = random.Random(0)
        self.now_s = 0.0  # CPU time of all steps
        self.tokens: dict[int, int] = {}
        self.finished: set[int] = set()
        self.num_rows = 0
        self.num_prompt_tokens = 0

    def ids(self, number: int) -> tuple[int, ...]:
        """Return random token ids."""
        return tuple(self._random.randrange(3, 4000) for _ in range(number))

    def submit(self, prompt_ids: tuple[int, ...], max_new_tokens: int, **more: Any) -> int:
        """Queue a request; returns its number."""
        number = next(self._ids)
        fields: dict[str, Any] = {"sampling": GREEDY, "arrived_at": self.now_s, **more}
        self._scheduler.submit(
            Sequence(id=number, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **fields)
        )
        self.tokens[number] = 0
        return number

    def step(self) -> float | None:
        """Run one step; returns what it took, None if there is nothing to do."""
        began = time.thread_time()
        plan = self._scheduler.plan(self.now_s)
        if plan is None:
            return None
        chunks = [len(row.token_ids) for row in plan.rows if len(row.token_ids) > 1]
        self.num_rows, self.num_prompt_tokens = len(plan.rows), sum(chunks)
        ran = time.thread_time()
        result = self._engine.step(plan)
        made = self._scheduler.commit(plan, result, took_s=time.thread_time() - ran)
        took_s = time.thread_time() - began
        self.now_s += took_s
        for number in made.sequence_ids:
            self.tokens[number] += 1
        self.finished.update(made.finishes)
        return took_s

    def run(self) -> None:
        """Run until nothing is left."""
        while self.step() is not None:
            pass

    def cancel_all(self) -> None:
        """Drop what has not ended, and let the engine know."""
        for number in self.tokens.keys() - self.finished:
            self._scheduler.cancel(number)
        self.run()

    def seconds_to_token(self, number: int, index: int = 0) -> float:
        """Step until a request has its `index`-th token; returns the time that took."""
        began = self.now_s
        while self.tokens[number] <= index:
            assert self.step() is not None, "nothing left to do"
        return self.now_s - began

    def stats(self) -> Mapping[str, float]:
        """Return the scheduler's counters."""
        return self._scheduler.stats()
