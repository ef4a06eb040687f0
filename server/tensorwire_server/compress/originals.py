"""What a model's blocks were, and how far from that they are when all is done."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tensorwire_server.compress.blocks import Passage, blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_server.compress.results import LayerError


class Originals:
    """A copy of every block, found again by the block itself: others may go, and numbers change."""

    def __init__(self, model: Any) -> None:
        self._copies = {block.module: block.copied().module for block in blocks_of(model)}

    @torch.no_grad()
    def measure(
        self,
        model: Any,
        calibration: Sequence[torch.Tensor],
        *,
        on_progress: Callable[[int, int, str], None] = lambda *_: None,
    ) -> tuple[LayerError, ...]:
        """Return how far the outputs of linear layers are from what they were.

        Several steps count together. Layers that lost outputs are left out: what they lack shows
        in the layer that takes what they give.

        Args:
            model: the one that this was made of, changed since.
            calibration: token ids, int64 (1, T) each.
            on_progress: is told what is done of how much.
        """
        passage = Passage(model, calibration)
        blocks = blocks_of(model)
        errors: list[LayerError] = []
        for block in blocks:
            original = replace(block, module=self._copies[block.module])
            errors += passage.advance_compared(block, original)
            on_progress(block.index + 1, len(blocks), "layer errors")
        return tuple(errors)
