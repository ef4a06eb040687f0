"""Whether a result is good enough, by the floors of its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorwire_server.compress.recipe import Floor, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tensorwire_server.compress.intervals import Estimate
    from tensorwire_server.compress.quality import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of a floor."""

    floor: Floor
    limit: float  # in the metric's own unit, also where the floor is relative
    found: float | None  # None: it was not measured
    is_met: bool


def judge(floors: Iterable[Floor], quality: Quality) -> tuple[Judgement, ...]:
    """Return what became of each floor; one whose metric was not measured is missed."""
    judgements = []
    for floor in floors:
        before, found = _values(floor.metric, quality)
        limit = floor.limit * before if floor.relative else floor.limit
        is_met = found is not None and (
            found >= limit if floor.metric.more_is_better else found <= limit
        )
        judgements.append(Judgement(floor=floor, limit=limit, found=found, is_met=is_met))
    return tuple(judgements)


def is_close(judgement: Judgement, quality: Quality) -> bool:
    """Say if other texts might have judged otherwise: the interval holds the limit."""
    metric, floor = judgement.floor.metric, judgement.floor
    text, embedding, accuracy = quality.text, quality.embedding, quality.accuracy
    found: Estimate | None = None
    limit = judgement.limit
    if metric is Metric.PERPLEXITY and text is not None:
        # Relative floors are of pairs: what is hard for both says nothing against the child.
        found = text.perplexity_ratio if floor.relative else text.perplexity_after
        limit = floor.limit
    elif metric is Metric.KL and text is not None:
        found = text.kl
    elif metric is Metric.AGREEMENT and text is not None:
        found = text.agreement
    elif metric is Metric.COSINE and embedding is not None:
        found = embedding.mean
    elif metric is Metric.ACCURACY and accuracy is not None:
        found = accuracy.difference if floor.relative else accuracy.after
        limit -= accuracy.before.value if floor.relative else 0.0
    return found is not None and found.is_bounded and found.may_be(limit)


def _values(metric: Metric, quality: Quality) -> tuple[float, float | None]:
    """Return a metric of the parent, which does not diverge from itself, and of the child."""
    text, embedding, accuracy = quality.text, quality.embedding, quality.accuracy
    if metric is Metric.PERPLEXITY and text is not None:
        return text.perplexity_before.value, text.perplexity_after.value
    if metric is Metric.KL and text is not None:
        return 0.0, text.kl.value
    if metric is Metric.AGREEMENT and text is not None:
        return 1.0, text.agreement.value
    if metric is Metric.COSINE and embedding is not None:
        return 1.0, embedding.mean.value
    if metric is Metric.ACCURACY and accuracy is not None:
        return accuracy.before.value, accuracy.after.value
    return 1.0, None
