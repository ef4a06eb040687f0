"""The text engine that works with every architecture: transformers' modules on one ragged row.

All sequences of a step, decodes and prompt chunks alike, stand on one row of shape (1, T); what
keeps them apart is their position ids and our attention (`attention.py`) over our cache
(`kv_cache.py`). Only the rows to sample go through the vocabulary projection.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tensorwire_server.engine.attention import StepLayout, serving
from tensorwire_server.engine.sampler import Sampler, wanted_logits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tensorwire_server.engine.kv_cache import KVGeometry, SlotCache
    from tensorwire_server.engine.tokenizing import TextTokenizer
    from tensorwire_server.scheduling.work import ModelCard, Row, StepPlan, StepResult


class Steps(Protocol):
    """What a back end is: rows in, logits out, over a cache of its own."""

    cache: SlotCache
    vocab_size: int
    num_parameters: int
    resumable_layers: int  # see `ModelCard`

    def forward(self, rows: Sequence[Row]) -> tuple[list[Row], torch.Tensor]:
        """Run one forward pass.

        Returns:
            The rows whose logits are wanted (`sampler.wanted_logits`), and these in that order:
            (R, V), float32.
        """


def num_parameters(model: Any) -> int:
    """Return how many numbers a model of transformers has learnt."""
    return sum(parameter.numel() for parameter in model.parameters())


class RaggedModel:
    """A causal model of transformers behind one call: rows in, logits of the sampled rows out."""

    resumable_layers = 1

    def __init__(self, model: Any, cache: SlotCache) -> None:
        self._model = model
        self.cache = cache
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.num_parameters = num_parameters(model)

    def forward(self, rows: Sequence[Row]) -> tuple[list[Row], torch.Tensor]:
        """Run one forward pass.

        Returns:
            The rows whose logits are wanted (`wanted_logits`), and these in that order: (R, V),
            float32.
        """
        device = self.cache.geometry.device
        layout = self.lay_out(rows)
        ids = [token_id for row in layout.rows for token_id in row.token_ids]
        wanted, places = wanted_logits(layout.rows)
        positions = self.positions(layout.rows)
        with serving(layout):
            output = self._model(
                input_ids=torch.tensor(ids, device=device)[None],
                position_ids=torch.tensor(positions, device=device)[None],
                use_cache=False,
                logits_to_keep=torch.tensor(places, dtype=torch.long, device=device),
            )
        return wanted, output.logits[0].float()

    def lay_out(self, rows: Sequence[Row]) -> StepLayout:
        """Return the rows in the order of the ragged row, with their places in the cache."""
        return StepLayout(self.cache, rows)

    def positions(self, rows: Sequence[Row]) -> list[int]:
        """Return the position of each token of the ragged row in its own sequence."""
        return [row.start + i for row in rows for i in range(len(row.token_ids))]


class Generator:
    """A text model that continues many sequences at once; implements `GenerateEngine`."""

    def __init__(self, model: Steps, tokenizer: TextTokenizer, card: ModelCard) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._card = card
        self._sampler = Sampler()

    @property
    def card(self) -> ModelCard:
        """What this model is."""
        return self._card

    @property
    def tokenizer(self) -> TextTokenizer:
        """Text and token ids; safe to use from another thread."""
        return self._tokenizer

    @property
    def kv_geometry(self) -> KVGeometry:
        """What one token takes in the cache, for whoever sizes the page pool."""
        return self._model.cache.geometry

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step. An exception here is the engine's failure, not a request's."""
        with torch.inference_mode():
            rows, logits_RV = self.forward(plan)
            result = self._sampler.run(rows, logits_RV)
            return replace(result, moves_next=True) if self._model.cache.will_move else result

    def forward(self, plan: StepPlan) -> tuple[list[Row], torch.Tensor]:
        """Run one step up to its logits, for who wants more of them than a token.

        Returns:
            The rows whose logits are wanted, each as often as it has such, and these in that order:
            (R, V), float32.
        """
        with torch.inference_mode():
            self._model.cache.prepare(plan)
            for sequence_id in plan.released:
                self._sampler.release(sequence_id)
            if not plan.rows:
                return [], torch.empty(0, self._model.vocab_size)
            return self._model.forward(plan.rows)

    def stats(self) -> Mapping[str, int]:
        """Return what the cache says of itself."""
        return self._model.cache.stats()
