"""A model as a chain of blocks, and a calibration text that passes through it block by block.

Only what lies between two blocks is kept: one array of hidden states for every window of the text.
A block that was changed passes on what it computes now, so later blocks are measured on what they
will really get.

Dimensions: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tensorwire_server.compress.families import Family, family_of
from tensorwire_server.compress.recipe import RecipeError
from tensorwire_server.compress.results import LayerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    OnProgress = Callable[[int, int, str], None]  # done, total, of what


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of a model, and its linear layers by their names in the model."""

    index: int
    name: str
    module: nn.Module
    family: Family

    def linear(self, part: str) -> tuple[str, Any]:
        """Return a linear layer's name in the model, and the layer."""
        return f"{self.name}.{part}", self.module.get_submodule(part)

    @property
    def linears(self) -> dict[str, Any]:
        """Return all linear layers of attention and feed-forward."""
        return dict(
            self.linear(part) for part in (*self.family.attention, *self.family.feed_forward)
        )

    def copied(self) -> Block:
        """Return the block as it is now, whatever becomes of this one."""
        return replace(self, module=copy.deepcopy(self.module))


def blocks_of(model: Any) -> list[Block]:
    """Return a model's blocks in their order.

    Raises:
        RecipeError: the family is not known.
    """
    family = family_of(model)
    holder = model.base_model.get_submodule(family.blocks)
    prefix = next(name for name, module in model.named_modules() if module is holder)
    return [
        Block(index=index, name=f"{prefix}.{index}", module=module, family=family)
        for index, module in enumerate(holder)
    ]


def checked_blocks(model: Any) -> list[Block]:
    """Return a model's blocks, as `blocks_of` does, of a model whose weights are all numbers.

    Raises:
        RecipeError: the family is not known, or a weight is infinite or NaN.
    """
    blocks = blocks_of(model)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise RecipeError(f"its weight {name} holds a number that is infinite or NaN")
    return blocks


def weight_of(linear: Any) -> torch.Tensor:
    """Return (O, I), a view: GPT-2's layers keep theirs the other way round."""
    weight: torch.Tensor = linear.weight.data
    return weight.T if isinstance(linear, Conv1D) else weight


class Passage:
    """A text on its way through a model: what the next block gets of every window."""

    def __init__(self, model: Any, windows: Sequence[torch.Tensor]) -> None:
        """Embed the text.

        Args:
            model: is left in evaluation mode.
            windows: int64 (1, T), each.

        Raises:
            RecipeError: there is no text, or it is not for this model.
        """
        _check(windows, model.get_input_embeddings().num_embeddings)
        model.eval()
        # Masks and rotations: all windows of a length share them, as none has padding.
        self._surroundings: dict[int, list[_Call]] = {}
        self._hidden = []
        modules = [block.module for block in blocks_of(model)]
        for window in windows:
            length = window.shape[1]
            if length not in self._surroundings:
                self._surroundings[length] = _calls(model, modules, window)
            self._hidden.append(_first_hidden(model, modules[0], window))
        self._first = self._hidden

    def restart(self) -> None:
        """Go back to before the first block."""
        self._hidden = self._first

    def compute(self, block: Block) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what a block gets and gives, window by window; both are (1, T, hidden)."""
        for hidden in self._hidden:
            yield hidden, self._result(block, hidden)

    def advance(
        self, block: Block, see: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    ) -> None:
        """Go on to the block after this one; `see` gets what the block got and gave."""
        results = []
        for hidden, result in self.compute(block):
            if see is not None:
                see(hidden, result)
            results.append(result)
        self._hidden = results

    def input_norms(self, block: Block) -> dict[str, torch.Tensor]:
        """Return (I,), the norm of every input of each linear layer over the text."""
        sums = {name: torch.zeros(()) for name in block.linears}

        def see(name: str, inputs_TI: torch.Tensor) -> None:
            sums[name] = sums[name] + inputs_TI.square().sum(0)

        self._watch(block, block.linears, see)
        return {name: total.sqrt() for name, total in sums.items()}

    def input_grams(self, block: Block, parts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return (I, I), the sum over the text of x xT, of the inputs of some linear layers."""
        linears = dict(block.linear(part) for part in parts)
        sums = {name: torch.zeros(()) for name in linears}

        def see(name: str, inputs_TI: torch.Tensor) -> None:
            sums[name] = sums[name] + inputs_TI.T @ inputs_TI

        self._watch(block, linears, see)
        return sums

    def advance_compared(self, block: Block, original: Block) -> tuple[LayerError, ...]:
        """Go on, and compare linear layers with those of the block that this one was made of.

        Both get the same inputs. A layer that lost inputs is compared with what the original would
        give for all that its own block would hand to it; one that lost outputs is left out.
        """
        linears, before = block.linears, original.linears
        compared = {
            name: linear
            for name, linear in linears.items()
            if len(weight_of(linear)) == len(weight_of(before[name]))
        }
        narrowed = {
            name: before[name]
            for name, linear in compared.items()
            if weight_of(linear).shape != weight_of(before[name]).shape
        }
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in compared}
        inputs_before: dict[str, torch.Tensor] = {}

        def see(name: str, inputs_TI: torch.Tensor) -> None:
            old = inputs_before.get(name, inputs_TI) @ weight_of(before[name]).T
            lost = old - inputs_TI @ weight_of(linears[name]).T
            sums[name] += torch.stack([lost.square().sum(), old.square().sum()])

        results = []
        for hidden in self._hidden:
            if narrowed:
                with _watched(narrowed, inputs_before.__setitem__):
                    self._result(original, hidden)
            with _watched(compared, see):
                results.append(self._result(block, hidden))
        self._hidden = results
        return tuple(
            LayerError(name=name, error=float((lost / old).sqrt()) if old > 0 else 0.0)
            for name, (lost, old) in sums.items()
        )

    def _result(self, block: Block, hidden: torch.Tensor) -> torch.Tensor:
        call = self._surroundings[hidden.shape[1]][block.index]
        result = block.module(hidden, *call.args, **call.kwargs)
        given: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return given

    def _watch(
        self,
        block: Block,
        linears: Mapping[str, nn.Module],
        see: Callable[[str, torch.Tensor], None],
    ) -> None:
        with _watched(linears, see):
            for _ in self.compute(block):
                pass


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block gets beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    pass


def _calls(model: Any, modules: Sequence[nn.Module], window: torch.Tensor) -> list[_Call]:
    calls: list[_Call] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args[1:], kwargs))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        model.base_model(input_ids=window, **_without_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_hidden(model: Any, first: nn.Module, window: torch.Tensor) -> torch.Tensor:
    hidden: list[torch.Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...]) -> None:
        hidden.append(args[0])
        raise _Stop

    handle = first.register_forward_pre_hook(record)
    try:
        model.base_model(input_ids=window, **_without_cache(model))
    except _Stop:
        pass
    finally:
        handle.remove()
    return hidden[0]


def _without_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


@contextmanager
def _watched(
    linears: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Show the inputs of linear layers, (T, I) float32, as long as the context lasts."""

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: see(name, args[0].flatten(0, -2).float())

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(windows: Sequence[torch.Tensor], vocab_size: int) -> None:
    if not windows:
        raise RecipeError("the calibration text is empty; give some windows of token ids")
    for window in windows:
        if window.ndim != 2 or window.shape[0] != 1 or window.shape[1] < 1:
            raise RecipeError(
                f"calibration windows must have the shape (1, tokens), got {[*window.shape]}"
            )
        if int(window.min()) < 0 or int(window.max()) >= vocab_size:
            raise RecipeError(
                f"the calibration text has token ids outside of the vocabulary (0 to"
                f" {vocab_size - 1}); it was made with another model's tokenizer"
            )
