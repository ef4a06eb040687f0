from __future__ import annotations

from tensorwire.loadtest.rechecking import KEPT, Said, Sample
from tensorwire.loadtest.workloads import Ask


def test_a_sample_keeps_streams_of_the_whole_run() -> None:
    sample = Sample()
    for i in range(100 * KEPT):
        sample.take(Said(ask=Ask(index=i, task="generate", model="m"), ids=[i], is_whole=True))
    indexes = [said.ask.index for said in sample.kept]
    assert len(set(indexes)) == KEPT
    assert min(indexes) < 25 * KEPT
    assert max(indexes) > 75 * KEPT
