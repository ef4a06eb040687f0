"""Pruning: `prune_model`, and the choice of single weights.

Weights that go become zero. Which ones: those of least score among

- the weights of a matrix (magnitude) or of each of its rows (Wanda), `layer`;
- all weights of all blocks, `global`.

The score is a weight's magnitude, or for Wanda (Sun et al. 2023, arXiv:2306.11695) that times the
norm of its input over the calibration text. Embeddings, the head, norms and biases are left alone.

Dimensions: O outputs, I inputs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tensorwire_server.compress.blocks import Passage, checked_blocks, weight_of
from tensorwire_server.compress.recipe import Method, Pruning, RecipeError, Scope, Structure
from tensorwire_server.compress.results import LayerError, Pruned, PrunedParameter
from tensorwire_server.compress.structure import remove_heads, remove_layers, remove_neurons

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.nn import Module

    from tensorwire_server.compress.blocks import Block, OnProgress

_Choice = TypeVar("_Choice", bound=StrEnum)

# A share of a matrix is met to within a weight; this is what a share of all of them may be off.
_TOLERANCE = 0.001
_REMOVE = {
    Structure.HEADS: remove_heads,
    Structure.NEURONS: remove_neurons,
    Structure.LAYERS: remove_layers,
}


@torch.no_grad()
def prune_model(
    model: Any,
    target_sparsity: float,
    *,
    structure: str = "unstructured",
    method: str = "magnitude",
    scope: str = "layer",
    calibration: Sequence[torch.Tensor] | None = None,
    on_progress: OnProgress | None = None,
) -> Pruned:
    """Prune a model of transformers in place, and say what was achieved over which parameters.

    Args:
        model: a decoder or encoder of a family in `families.py`; is left in evaluation mode.
        target_sparsity: the share that goes, between 0 and 1.
        structure: `unstructured` makes weights zero; `heads`, `neurons` and `layers` remove them,
            so that the model becomes smaller.
        method: `magnitude` or `wanda`; of single weights.
        scope: `layer` or `global`; of single weights.
        calibration: token ids, int64 (1, T) each. All but `magnitude` need them; with them the
            errors of layers are measured.
        on_progress: is told what is done of how much.

    Raises:
        RecipeError: an argument is not allowed, or the model's family cannot do it. The model is
            as it was.
    """
    pruning = Pruning(
        structure=_one_of(Structure, structure),
        target=target_sparsity,
        method=_one_of(Method, method),
        scope=_one_of(Scope, scope),
    )
    blocks = checked_blocks(model)
    if calibration is None and pruning.needs_text:
        raise RecipeError(
            f"prune {structure} measures what is important on a text; give calibration"
        )
    progress = on_progress or _say_nothing
    if pruning.structure in _REMOVE:
        assert calibration is not None
        return _REMOVE[pruning.structure](model, blocks, pruning.target, calibration, progress)
    passage = None if calibration is None else Passage(model, calibration)
    if pruning.scope is Scope.LAYER:
        errors = _prune_each(blocks, pruning, passage, progress)
    else:
        errors = _prune_globally(blocks, pruning, passage, progress)
    return _counted(blocks, pruning.target, errors)


def _one_of(choices: type[_Choice], name: str) -> _Choice:
    try:
        return choices(name)
    except ValueError:
        known = ", ".join(choices)
        raise RecipeError(f"{choices.__name__.lower()} {name!r} is none of {known}") from None


def _say_nothing(done: int, total: int, what: str) -> None:
    pass


def _counted(blocks: Iterable[Block], target: float, errors: tuple[LayerError, ...]) -> Pruned:
    parameters = []
    num_zeros = num_weights = 0
    for block in blocks:
        for name, linear in block.linears.items():
            weight: torch.Tensor = linear.weight.data
            zeros = weight.numel() - int(weight.count_nonzero())
            shape = tuple(weight.shape)
            parameters.append(
                PrunedParameter(name=f"{name}.weight", before=shape, after=shape, zeros=zeros)
            )
            num_zeros, num_weights = num_zeros + zeros, num_weights + weight.numel()
    achieved = num_zeros / num_weights
    return Pruned(
        structure=Structure.UNSTRUCTURED.value,
        target=target,
        achieved=achieved,
        met=achieved >= target - _TOLERANCE,
        parameters=tuple(parameters),
        errors=errors,
    )


def _prune_each(
    blocks: Sequence[Block], pruning: Pruning, passage: Passage | None, progress: OnProgress
) -> tuple[LayerError, ...]:
    """Prune every matrix to the target, each block on what the pruned ones before it give."""

    def choose(name: str, scores_OI: torch.Tensor) -> torch.Tensor:
        if pruning.method is Method.WANDA:
            return least_of_rows(scores_OI, pruning.target)
        return least(scores_OI, round(pruning.target * scores_OI.numel()))

    errors: list[LayerError] = []
    for block in blocks:
        errors += _zero(block, _norms(block, pruning, passage), choose, passage)
        progress(block.index + 1, len(blocks), "pruning weights")
    return tuple(errors)


def _prune_globally(
    blocks: Sequence[Block], pruning: Pruning, passage: Passage | None, progress: OnProgress
) -> tuple[LayerError, ...]:
    """Prune all matrices together; norms are those in the model as it was."""
    norms: list[Mapping[str, torch.Tensor] | None] = []
    for block in blocks:
        norms.append(_norms(block, pruning, passage))
        if passage is not None:
            passage.advance(block)
        progress(block.index + 1, 2 * len(blocks), "pruning weights")

    def scores() -> Iterator[torch.Tensor]:
        for block in blocks:
            for name, linear in block.linears.items():
                yield _scores(name, linear, norms[block.index])

    num_left = round(pruning.target * sum(score.numel() for score in scores()))
    threshold = kth_smallest(scores, num_left)

    num_ties = num_left - sum(int((score < threshold).sum()) for score in scores())

    def choose(name: str, scores_OI: torch.Tensor) -> torch.Tensor:
        # Equal scores at the threshold: the first ones go, as many as make the total exact.
        nonlocal num_ties
        chosen = scores_OI < threshold
        ties = (scores_OI == threshold).flatten().nonzero().flatten()[:num_ties]
        chosen.view(-1)[ties] = True
        num_ties -= ties.numel()
        return chosen

    if passage is not None:
        passage.restart()
    errors: list[LayerError] = []
    for block in blocks:
        errors += _zero(block, norms[block.index], choose, passage)
        progress(len(blocks) + block.index + 1, 2 * len(blocks), "pruning weights")
    return tuple(errors)


def _norms(
    block: Block, pruning: Pruning, passage: Passage | None
) -> Mapping[str, torch.Tensor] | None:
    if passage is None or pruning.method is not Method.WANDA:
        return None
    return passage.input_norms(block)


def _scores(name: str, linear: Module, norms: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """Return (O, I), how important each weight is."""
    magnitudes = weight_of(linear).abs().float()
    return magnitudes if norms is None else magnitudes * norms[name]


def _zero(
    block: Block,
    norms: Mapping[str, torch.Tensor] | None,
    choose: Callable[[str, torch.Tensor], torch.Tensor],
    passage: Passage | None,
) -> tuple[LayerError, ...]:
    """Zero a block's chosen weights, and pass the text on through what is left."""
    original = block.copied()
    for name, linear in block.linears.items():
        weight_of(linear)[choose(name, _scores(name, linear, norms))] = 0
    return () if passage is None else passage.advance_compared(block, original)


def least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the `count` least scores are; of equal ones, the first."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(stable=True)[:count]] = True
    return chosen.view(scores.shape)


def least_of_rows(scores_OI: torch.Tensor, share: float) -> torch.Tensor:
    """Return where the least scores of each row are.

    Where the share is no whole number of a row's weights, rows lose one more or less, evenly
    spread, so that it is exact for all of them together.
    """
    num_rows = scores_OI.shape[0]
    total = round(share * scores_OI.numel())
    ends = torch.arange(num_rows + 1) * total // num_rows
    counts = ends.diff().unsqueeze(1)
    ranks = scores_OI.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts


def kth_smallest(scores: Callable[[], Iterable[torch.Tensor]], count: int) -> float:
    """Return the `count`-th smallest of many scores, without having them in one place.

    Args:
        scores: gives the same tensors every time, float32 and not negative.
    """
    # The bits of such numbers, read as integers, have the order of the numbers.
    low, high = 0, int(torch.tensor(torch.inf).view(torch.int32))
    while low < high:
        middle = (low + high) // 2
        limit = torch.tensor(middle, dtype=torch.int32).view(torch.float32)
        if sum(int((score <= limit).sum()) for score in scores()) >= count:
            high = middle
        else:
            low = middle + 1
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))
