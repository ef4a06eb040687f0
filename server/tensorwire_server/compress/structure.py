"""Removing heads, neurons or layers: the model becomes smaller, and stays an ordinary one.

What goes is what matters least to the calibration text:

- a group of heads that share keys and values, or a neuron, by the norm of all that it adds to the
  output of its block's part: ||W[:, S] x[S]|| over the text, S being its inputs of the last linear
  layer. What is left of that layer is fitted again by least squares to what it gave before, as in
  He et al. 2017, arXiv:1707.06168. Every layer loses the same number.
- a layer by how little it turns the hidden states, 1 - cos(in, out) averaged over tokens ("block
  influence": Men et al. 2024, arXiv:2403.03853).

Dimensions: I inputs of a linear layer, O outputs, U units (head groups or neurons), K kept inputs.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tensorwire_server.compress.blocks import Passage, weight_of
from tensorwire_server.compress.recipe import RecipeError, Structure
from tensorwire_server.compress.results import Pruned, PrunedParameter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_server.compress.blocks import Block, OnProgress
    from tensorwire_server.compress.families import Family
    from tensorwire_server.compress.results import LayerError

# How far beyond the target a removal may go, as whole units do.
_MAX_OVERSHOOT = 0.02
_DAMPING = 0.01  # of the mean square of inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """How a model's attention is divided."""

    num_heads: int
    num_groups: int  # of heads that share keys and values
    size: int

    @property
    def per_group(self) -> int:
        return self.num_heads // self.num_groups


def remove_heads(
    model: Any,
    blocks: Sequence[Block],
    target: float,
    windows: Sequence[torch.Tensor],
    progress: OnProgress,
) -> Pruned:
    """Remove whole groups of heads that share keys and values, as many from every layer.

    Raises:
        RecipeError: the family's heads cannot go, or no number of them is near the target.
    """
    config = model.config
    heads = _heads_of(model, blocks[0].family)
    what = "head groups" if heads.per_group > 1 else "heads"
    count = _count(target, heads.num_groups, what)
    num_left = heads.num_groups - count
    shapes = _shapes(model)
    passage = Passage(model, windows)
    errors: list[LayerError] = []
    for block in blocks:
        original = block.copied()
        output = block.family.attention[-1]
        groups = _remove_units(block, output, passage, num_units=heads.num_groups, count=count)
        _keep_heads(block, heads, groups)
        # Phi-3 computes by the configuration; the blocks to come are still as they were.
        with _configured(config, num_attention_heads=num_left * heads.per_group):
            errors += passage.advance_compared(block, original)
        progress(block.index + 1, len(blocks), "removing heads")
    _renumber(config, num_attention_heads=num_left * heads.per_group, num_key_value_heads=num_left)
    config.head_dim = heads.size
    achieved = count / heads.num_groups
    return _result(model, Structure.HEADS, target, achieved, shapes, errors)


def _heads_of(model: Any, family: Family) -> _Heads:
    config = model.config
    # Phi normalises heads to a size that it takes from their number.
    if not family.heads_can_go or getattr(config, "qk_layernorm", False):
        raise RecipeError(
            f"heads of {config.model_type!r} models cannot go: transformers computes the size of a"
            " head from their number; prune neurons or layers instead"
        )
    num_heads = config.num_attention_heads
    return _Heads(
        num_heads=num_heads,
        num_groups=getattr(config, "num_key_value_heads", None) or num_heads,
        size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )


def _keep_heads(block: Block, heads: _Heads, groups: torch.Tensor) -> None:
    """Keep what computes the queries, keys and values of the groups that stay."""
    *inputs, output = block.family.attention
    kept_heads = _spread(groups, heads.per_group)
    queries, keys = _spread(kept_heads, heads.size), _spread(groups, heads.size)
    if len(inputs) == 1:  # queries, keys, values one below the other
        first_key = heads.num_heads * heads.size
        first_value = first_key + heads.num_groups * heads.size
        rows = torch.cat([queries, keys + first_key, keys + first_value])
        _keep(block.linear(inputs[0])[1], outputs=rows)
    else:
        for part, kept in zip(inputs, (queries, keys, keys), strict=True):
            _keep(block.linear(part)[1], outputs=kept)
    if block.family.head_norms:
        of_queries, of_keys = block.family.head_norms
        _keep_norm(block.module, of_queries, kept_heads, heads.num_heads)
        _keep_norm(block.module, of_keys, groups, heads.num_groups)
    attention = block.module.get_submodule(output.rpartition(".")[0])
    _renumber(attention, num_heads=kept_heads.numel(), num_key_value_heads=groups.numel())


@contextmanager
def _configured(config: Any, **numbers: int) -> Iterator[None]:
    """Have a configuration say something else as long as the context lasts."""
    before = {name: getattr(config, name) for name in numbers}
    _renumber(config, **numbers)
    try:
        yield
    finally:
        _renumber(config, **before)


def remove_neurons(
    model: Any,
    blocks: Sequence[Block],
    target: float,
    windows: Sequence[torch.Tensor],
    progress: OnProgress,
) -> Pruned:
    """Remove neurons of the feed-forward part, as many from every layer.

    Raises:
        RecipeError: no number of them is near the target.
    """
    family = blocks[0].family
    *inputs, output = family.feed_forward
    num_neurons = weight_of(blocks[0].linear(output)[1]).shape[1]
    count = _count(target, num_neurons, "neurons")
    shapes = _shapes(model)
    passage = Passage(model, windows)
    errors: list[LayerError] = []
    for block in blocks:
        original = block.copied()
        kept = _remove_units(block, output, passage, num_units=num_neurons, count=count)
        halves = [kept + half * num_neurons for half in range(family.neurons_per_row)]
        for part in inputs:
            _keep(block.linear(part)[1], outputs=torch.cat(halves))
        errors += passage.advance_compared(block, original)
        progress(block.index + 1, len(blocks), "removing neurons")
    setattr(model.config, family.num_neurons_key, num_neurons - count)
    return _result(model, Structure.NEURONS, target, count / num_neurons, shapes, errors)


def remove_layers(
    model: Any,
    blocks: Sequence[Block],
    target: float,
    windows: Sequence[torch.Tensor],
    progress: OnProgress,
) -> Pruned:
    """Remove whole layers; those after them are renumbered.

    Raises:
        RecipeError: no number of them is near the target, or a layer computes by its number.
    """
    config = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise RecipeError("layers of this model cannot go: each scales attention by its number")
    count = _count(target, len(blocks), "layers")
    passage = Passage(model, windows)
    influences = []
    for block in blocks:
        influences.append(_influence(block, passage))
        progress(block.index + 1, len(blocks), "removing layers")
    gone = sorted(torch.tensor(influences).argsort(stable=True)[:count].tolist())
    parameters = tuple(
        PrunedParameter(
            name=f"{blocks[index].name}.{name}",
            before=tuple(parameter.shape),
            after=(0, *parameter.shape[1:]),
            zeros=0,
        )
        for index in gone
        for name, parameter in blocks[index].module.named_parameters()
    )
    _remove_blocks(model, blocks, gone)
    names = ", ".join(f"{index} ({influences[index]:.3f})" for index in gone)
    return Pruned(
        structure=Structure.LAYERS.value,
        target=target,
        achieved=count / len(blocks),
        met=True,
        parameters=parameters,
        notes=(f"layers that went, by their old numbers, with their influence: {names}",),
    )


def _remove_blocks(model: Any, blocks: Sequence[Block], gone: Sequence[int]) -> None:
    holder = model.base_model.get_submodule(blocks[0].family.blocks)
    for index in reversed(gone):
        del holder[index]
    for index, block in enumerate(holder):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config = model.config
    config.num_hidden_layers = len(holder)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kind for index, kind in enumerate(kinds) if index not in gone]


def _influence(block: Block, passage: Passage) -> float:
    total, num_tokens = 0.0, 0

    def see(hidden: torch.Tensor, result: torch.Tensor) -> None:
        nonlocal total, num_tokens
        turned = 1 - F.cosine_similarity(hidden.double(), result.double(), dim=-1)
        total, num_tokens = total + float(turned.sum()), num_tokens + turned.numel()

    passage.advance(block, see)
    return total / num_tokens


def _count(target: float, total: int, what: str) -> int:
    """Return how many of them go.

    Raises:
        RecipeError: with the shares that are possible.
    """
    count = math.ceil(target * total - 1e-9)
    if count < total and count / total - target <= _MAX_OVERSHOOT:
        return count
    possible = range(1, total) if total <= 9 else range(max(count - 1, 1), min(count + 1, total))
    shares = ", ".join(f"{one / total:.4g}" for one in possible)
    raise RecipeError(
        f"{target:g} of {total} {what} is not a number that can go;"
        f" {f'possible shares are {shares}' if shares else 'one of them has to stay'}"
    )


def _remove_units(
    block: Block, output: str, passage: Passage, *, num_units: int, count: int
) -> torch.Tensor:
    """Remove the least important inputs of a part's last layer; returns the units that stay."""
    name, linear = block.linear(output)
    gram_II = passage.input_grams(block, [output])[name]
    weight_OI = weight_of(linear)
    importance_U = contributions(weight_OI, gram_II, num_units)
    kept = importance_U.argsort(stable=True)[count:].sort().values
    kept_inputs = _spread(kept, weight_OI.shape[1] // num_units)
    try:
        fitted = refit(weight_OI, gram_II, kept_inputs)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise RecipeError(f"{name} cannot be fitted again: {error}") from error
    _keep(linear, inputs=kept_inputs)
    weight_of(linear).copy_(fitted)
    return kept


def contributions(weight_OI: torch.Tensor, gram_II: torch.Tensor, num_units: int) -> torch.Tensor:
    """Return (U,), the squared norm of what each unit's inputs add to the output over a text."""
    added_II = (weight_OI.T @ weight_OI) * gram_II
    size = weight_OI.shape[1] // num_units
    return added_II.view(num_units, size, num_units, size).sum(dim=(1, 3)).diagonal()


def refit(weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_K: torch.Tensor) -> torch.Tensor:
    """Return (O, K), the weights of the inputs that stay which give most nearly the same output.

    They minimise ||W x - W' x[K]||^2 over the text, with a little weight on staying as they were.
    """
    gram_II = gram_II.double()
    kept_KK = gram_II[kept_K][:, kept_K]
    damping = _DAMPING * kept_KK.diagonal().mean() + torch.finfo(torch.float64).tiny
    kept_KK.diagonal().add_(damping)
    wanted_OK = weight_OI.double() @ gram_II[:, kept_K] + damping * weight_OI[:, kept_K]
    refitted_OK: torch.Tensor = torch.linalg.solve(kept_KK, wanted_OK, left=False)
    return refitted_OK.to(weight_OI.dtype)


def _spread(units: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices of what the units consist of, `size` each."""
    return (units.unsqueeze(1) * size + torch.arange(size)).flatten()


def _keep(
    linear: Any, *, outputs: torch.Tensor | None = None, inputs: torch.Tensor | None = None
) -> None:
    weight_OI = weight_of(linear)
    if outputs is not None:
        weight_OI = weight_OI[outputs]
        if linear.bias is not None:
            linear.bias = _like(linear.bias, linear.bias.data[outputs])
    if inputs is not None:
        weight_OI = weight_OI[:, inputs]
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = weight_OI.shape
        linear.weight = _like(linear.weight, weight_OI.T.contiguous())
    else:
        linear.out_features, linear.in_features = weight_OI.shape
        linear.weight = _like(linear.weight, weight_OI.contiguous())


def _keep_norm(block: nn.Module, part: str, kept: torch.Tensor, num_units: int) -> None:
    """Keep what a norm over all heads holds for those that stay; not every model has one."""
    parent, _, name = part.rpartition(".")
    norm: Any = getattr(block.get_submodule(parent), name, None)
    if norm is not None:
        weight = norm.weight.data
        by_unit = weight.view(num_units, -1)[kept]
        norm.weight = _like(norm.weight, by_unit.reshape(-1, *weight.shape[1:]))


def _like(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _renumber(holder: Any, **numbers: int) -> None:
    """Set those of the numbers that a module or configuration has."""
    for name, number in numbers.items():
        if hasattr(holder, name):
            setattr(holder, name, number)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _result(
    model: Any,
    structure: Structure,
    target: float,
    achieved: float,
    before: dict[str, tuple[int, ...]],
    errors: Sequence[LayerError],
) -> Pruned:
    parameters = tuple(
        PrunedParameter(
            name=name,
            before=before[name],
            after=tuple(parameter.shape),
            zeros=parameter.numel() - int(parameter.count_nonzero()),
        )
        for name, parameter in model.named_parameters()
        if tuple(parameter.shape) != before[name]
    )
    return Pruned(
        structure=structure.value,
        target=target,
        achieved=achieved,
        met=achieved >= target - 1e-9,
        parameters=parameters,
        errors=tuple(errors),
    )
