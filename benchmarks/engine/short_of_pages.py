"""100 requests of mixed length with room for 10: who finishes, and what is computed twice.

    python -m engine.short_of_pages

Which requests are admitted and preempted does not depend on the model: the torch-free oracle runs.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from engine.stepping import Stepping
from tensorwire_server.workers.oracle import OracleEngine

if TYPE_CHECKING:
    from tensorwire_server.scheduling.work import StepPlan, StepResult

REQUESTS, ROOM_FOR = 100, 10
SHAPES = ((16, 64), (64, 64), (128, 128), (256, 256), (512, 128), (64, 512))


class Stopping:
    """An engine whose answers end where a test says."""

    def __init__(self, ends: dict[int, int]) -> None:
        self._engine = OracleEngine("oracle:context=8192")
        self._ends = ends
        self.num_tokens_fed = 0

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; a sequence that is long enough gets the stop token 0."""
        result = self._engine.step(plan)
        tokens = dict(result.tokens)
        for row in plan.rows:
            self.num_tokens_fed += len(row.token_ids)
            if row.start + len(row.token_ids) >= self._ends[row.sequence_id]:
                tokens[row.sequence_id] = 0
        return type(result)(tokens=tokens, failed=result.failed)


def main() -> None:
    """Print what became of the requests, for answers of all kinds of length."""
    for what, low, high in [
        ("all that was asked for", 1.0, 1.0),
        ("any part of it", 0.05, 1.0),
        ("a tenth or all", 0.1, 0.1),
    ]:
        for share in (1.0, 0.0):
            rng = random.Random(1)
            ends: dict[int, int] = {}
            engine = Stopping(ends)
            shapes = [SHAPES[i % len(SHAPES)] for i in range(REQUESTS)]
            mean = sum(prompt + new for prompt, new in shapes) / REQUESTS
            stepping = Stepping(
                engine,  # type: ignore[arg-type]
                num_pages=int(ROOM_FOR * mean / 16),
                expected_share=share,
            )
            needed = 0
            for prompt, new in shapes:
                part = rng.uniform(low, high)
                if low == high != 1.0:
                    part = rng.choice((low, 1.0))
                ids = tuple(rng.randrange(32, 127) for _ in range(prompt))
                number = stepping.submit(ids, new, stop_ids=frozenset({0}))
                ends[number] = prompt + max(1, int(part * new))
                needed += ends[number]
            stepping.run()
            stats = stepping.stats()
            recomputed = stats["recomputed_tokens"] / needed
            print(
                f"answers of {what}, {share:.0%} expected at first: {len(stepping.finished)} of"
                f" {REQUESTS} finish, {stats['preemptions']} preemptions,"
                f" {recomputed:.1%} of tokens recomputed, fed {engine.num_tokens_fed} of {needed}"
            )


if __name__ == "__main__":
    main()
