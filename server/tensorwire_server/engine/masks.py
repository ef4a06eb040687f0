"""What transformers lets each layer see, read off its own mask functions.

A mask function says of any two positions whether one sees the other, also of positions far beyond
what a test run at load could afford. While a model is inspected, transformers is given a mask maker
of ours, which makes the mask and remembers the function behind it.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tensorwire_server.engine.attention import step_attention
from tensorwire_server.engine.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # Of batch, head, query and key indices, which broadcast.
    MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Under this name our attention is called as under its own, but with masks.
INSPECTION_NAME = "tensorwire_inspection"


class MadeMasks:
    """The masks of a forward pass, and the functions behind them."""

    def __init__(self) -> None:
        self._made: list[tuple[torch.Tensor, MaskFunction]] = []

    def add(self, mask: torch.Tensor, function: MaskFunction) -> None:
        """Remember what a mask was made of."""
        self._made.append((mask, function))

    def window_of(self, mask: torch.Tensor, num_positions: int) -> int | None:
        """Return how many positions, its own included, a token sees; None: all up to its own.

        Args:
            mask: as it reached the attention of a layer.
            num_positions: how far to look.

        Raises:
            ModelLoadError: what a token sees is neither.
        """
        function = next((function for made, function in self._made if made is mask), None)
        if function is None:
            raise ModelLoadError("its masks are changed on their way to its attention")
        last = num_positions - 1
        window = int(_seen(function, last, num_positions, mask.device).sum())
        for query in {0, 1, window - 1, window, window + 1, 2 * window, last // 2, last}:
            if not 0 <= query <= last:
                continue
            expected = torch.zeros(num_positions, dtype=torch.bool, device=mask.device)
            expected[max(0, query + 1 - window) : query + 1] = True
            if not torch.equal(_seen(function, query, num_positions, mask.device), expected):
                raise ModelLoadError(
                    "its masks hide other tokens than later ones and those before a window"
                )
        return None if window == num_positions else window


_MADE: ContextVar[MadeMasks] = ContextVar("made")


@contextmanager
def noting_masks() -> Iterator[MadeMasks]:
    """Yield what the forward pass inside makes of masks, under `INSPECTION_NAME`."""
    made = MadeMasks()
    token = _MADE.set(made)
    try:
        yield made
    finally:
        _MADE.reset(token)


def _make_mask(*, mask_function: MaskFunction, **options: Any) -> torch.Tensor:
    """Do as transformers' own maker, but never leave a mask out because it would be plain."""
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(mask_function=mask_function, **options)
    assert mask is not None
    _MADE.get().add(mask, mask_function)
    return mask


def _seen(
    function: MaskFunction, query: int, num_positions: int, device: torch.device
) -> torch.Tensor:
    zero = torch.zeros(1, dtype=torch.long, device=device)
    keys = torch.arange(num_positions, device=device)
    return function(zero, zero, zero + query, keys).expand(num_positions)


AttentionInterface.register(INSPECTION_NAME, step_attention)
AttentionMaskInterface.register(INSPECTION_NAME, _make_mask)
