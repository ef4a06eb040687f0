"""Embeddings: a transformers encoder, then pooling and normalising as its folder says.

A batch is sorted by length and cut into groups of nearly equal length, each a rectangle: padding
costs as much as tokens do, and an answer that hardly meets padding hardly depends on its company.

Dimensions: B texts of one group, T tokens of the longest, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensorwire_protocol.errors import BadParams, NumericError, TensorwireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_server.engine.tokenizing import TextTokenizer
    from tensorwire_server.scheduling.work import ModelCard

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# How much of a group may be padding before another forward pass is the cheaper way.
_PADDED_SHARE = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRecipe:
    """What a sentence-transformers folder wants done with the encoder's output."""

    pooling: tuple[str, ...]  # of POOLING_MODES; several are put side by side
    normalize: bool


class Encoder:
    """Embeds batches of token ids; implements `ArrayEngine` for `embed`."""

    def __init__(
        self, model: Any, tokenizer: TextTokenizer, card: ModelCard, recipe: EmbeddingRecipe
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._card = card
        self._recipe = recipe

    @property
    def card(self) -> ModelCard:
        """What this model is."""
        return self._card

    @property
    def tokenizer(self) -> TextTokenizer:
        """Text to token ids; safe to use from another thread."""
        return self._tokenizer

    def run(self, items: Sequence[Any]) -> list[Any]:
        """Return a float32 (embedding_size,) array per list of ids, or why it has none."""
        outcomes: list[Any] = [self._objection(item) for item in items]
        good = [place for place, objection in enumerate(outcomes) if objection is None]
        good.sort(key=lambda place: len(items[place]))
        for group in _groups(good, [len(items[place]) for place in good]):
            embeddings = self._embed([items[place] for place in group])
            finite = embeddings.isfinite().all(-1).tolist()
            for place, embedding, usable in zip(group, embeddings.numpy(), finite, strict=True):
                outcomes[place] = (
                    embedding if usable else NumericError("the embedding is not finite")
                )
        return outcomes

    def _objection(self, ids: Sequence[int]) -> TensorwireError | None:
        limit, vocab = self._card.context_tokens, self._card.vocab_size
        if not 1 <= len(ids) <= limit:
            return BadParams(f"a text of {len(ids)} tokens; allowed are 1 to {limit}")
        if min(ids) < 0 or max(ids) >= vocab:
            return BadParams(f"token ids must be 0 to {vocab - 1}, got {min(ids)} to {max(ids)}")
        return None

    @torch.inference_mode()
    def _embed(self, group: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return (B, embedding_size) float32 on the CPU."""
        lengths = torch.tensor([len(ids) for ids in group])
        longest = len(group[-1])
        pad = [self._model.config.pad_token_id or 0]
        ids_BT = torch.tensor([[*ids, *pad * (longest - len(ids))] for ids in group])
        mask_BT = torch.arange(longest) < lengths[:, None]
        device = self._model.device
        output = self._model(
            input_ids=ids_BT.to(device),
            # Without padding no mask is needed, and attention takes its faster path.
            attention_mask=None if len(group[0]) == longest else mask_BT.long().to(device),
        )
        hidden_BTD = output.last_hidden_state.float()
        embedding = pool(hidden_BTD, mask_BT.to(device), self._recipe.pooling)
        if self._recipe.normalize:
            embedding = torch.nn.functional.normalize(embedding, dim=-1)
        return embedding.cpu()


def pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, modes: Sequence[str]) -> torch.Tensor:
    """Reduce token vectors to one vector per text; modes stand side by side in the result.

    Args:
        hidden_BTD: float32.
        mask_BT: bool, True for tokens, which stand on the left.
        modes: of `POOLING_MODES`.
    """
    return torch.cat([_pool_one(hidden_BTD, mask_BT, mode) for mode in modes], dim=-1)


def _pool_one(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, mode: str) -> torch.Tensor:
    mask = mask_BT[:, :, None]
    lengths = mask_BT.sum(1, keepdim=True)
    if mode == "cls":
        return hidden_BTD[:, 0]
    if mode == "lasttoken":
        return hidden_BTD[torch.arange(len(lengths), device=lengths.device), lengths[:, 0] - 1]
    if mode == "max":
        return hidden_BTD.masked_fill(~mask, float("-inf")).amax(1)
    if mode == "weightedmean":
        weights = mask * torch.arange(1, hidden_BTD.shape[1] + 1, device=mask.device)[:, None]
        return (hidden_BTD * weights).sum(1) / weights.sum(1)
    total = (hidden_BTD * mask).sum(1)
    return total / (lengths if mode == "mean" else lengths.sqrt())


def _groups(places: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut places, sorted by length, where padding would cost too much."""
    group: list[int] = []
    num_tokens = 0
    for place, length in zip(places, lengths, strict=True):
        if group and length * (len(group) + 1) > _PADDED_SHARE * (num_tokens + length):
            yield group
            group, num_tokens = [], 0
        group.append(place)
        num_tokens += length
    if group:
        yield group
