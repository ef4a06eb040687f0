"""One step of a Llama-like model, without modules: a dozen operators a layer and the attention.

Queries, keys and values are one product, gate and up another. Rotary positions are one complex
multiplication: the rows of the query and key weights are reordered at load so that the two numbers
that turn together are neighbours. That changes the order of numbers within a head, for queries and
keys alike, so that scores stay as they were; keys in the cache lie in that order.

Dimensions: T tokens of the step, R rows to sample, C hidden size, N query heads, H key heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tensorwire_server.engine.attention import StepLayout
from tensorwire_server.engine.fused.families import QKNorm
from tensorwire_server.engine.halfway import parts_of
from tensorwire_server.engine.sampler import wanted_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_server.engine.fused.families import Description
    from tensorwire_server.engine.fused.linear import Linear
    from tensorwire_server.engine.kv_cache import SlotCache
    from tensorwire_server.scheduling.work import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer; norms stand before or after, as the family wants it."""

    attention_norm_C: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None  # (D,) or (N x D,), in the order of the reordered rows
    k_norm: torch.Tensor | None
    attention_out: Linear
    feed_norm_C: torch.Tensor
    gate_up: Linear
    feed_out: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """What a model has learnt, in the form in which it runs."""

    embedding_VC: torch.Tensor  # as it is stored
    layers: Sequence[LayerWeights]
    final_norm_C: torch.Tensor
    head: Linear
    inverse_frequencies: torch.Tensor  # (D / 2,), float32
    rotation_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows that go through layers together."""

    layout: StepLayout
    rotation: torch.Tensor  # (T, 1, D / 2) complex numbers, by the tokens' positions
    wanted: list[Row]  # see `wanted_logits`
    kept: torch.Tensor | None  # (R,) places of the tokens with logits; None: all have some


class FusedModel:
    """A causal model behind one call: rows in, the logits that are wanted out."""

    def __init__(
        self,
        description: Description,
        weights: ModelWeights,
        cache: SlotCache,
        *,
        num_parameters: int,
    ) -> None:
        self.cache = cache
        self.vocab_size = len(weights.embedding_VC)
        self.num_parameters = num_parameters
        self.resumable_layers = description.num_layers
        self._d = description
        self._device = cache.geometry.device
        self._weights = weights
        self.set_windows(description.windows)
        self._epsilon = torch.tensor(description.norm_epsilon)
        self._average_C: torch.Tensor | None = None  # on a CPU, where it makes a faster norm
        if cache.geometry.device.type == "cpu" and cache.geometry.dtype == torch.float32:
            hidden_size = weights.embedding_VC.shape[1]
            self._average_C = torch.full((hidden_size,), 1 / hidden_size)

    def set_windows(self, windows: Sequence[int | None]) -> None:
        """Let the tokens of each layer see only the last positions; None: all."""
        self._extras: list[dict[str, Any]] = [
            {} if window is None else {"sliding_window": window} for window in windows
        ]

    def forward(self, rows: Sequence[Row]) -> tuple[list[Row], torch.Tensor]:
        """Run one forward pass.

        Returns:
            The rows whose logits are wanted (`wanted_logits`), and these in that order: (R, V),
            float32.
        """
        halfway, num_layers = self.cache.halfway, self._d.num_layers
        halfway.begin(rows)
        parts: dict[tuple[int, ...], _Part] = {}
        logits, wanted = torch.empty(0, self.vocab_size, device=self._device), []
        for first, last, there in parts_of(rows, num_layers):
            ids = tuple(row.sequence_id for row in there)
            part = parts[ids] = parts.get(ids) or self._part(there)
            rows_there = part.layout.rows
            hidden_TC = halfway.get(rows_there, first) if first else self._embed(rows_there)
            for index in range(first, last):
                hidden_TC = self._layer(index, hidden_TC, part)
            if last < num_layers:
                halfway.put(rows_there, last, hidden_TC)
            elif part.wanted:
                wanted, logits = part.wanted, self._logits(hidden_TC)
        return wanted, logits

    def _part(self, rows: Sequence[Row]) -> _Part:
        layout = StepLayout(self.cache, rows)
        wanted, places = wanted_logits(layout.rows)
        kept = None  # all of them
        if len(wanted) < layout.num_tokens:
            kept = torch.tensor(places, dtype=torch.long, device=self._device)
        positions = torch.tensor(self.positions(layout.rows), device=self._device)
        return _Part(layout=layout, rotation=self._rotation(positions), wanted=wanted, kept=kept)

    def _logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        logits = self._weights.head(self._norm(hidden_RC, self._weights.final_norm_C)).float()
        return logits if self._d.logits_scale == 1 else logits.mul_(self._d.logits_scale)

    def positions(self, rows: Sequence[Row]) -> list[int]:
        """Return the position of each token of the ragged row in its own sequence."""
        return [row.start + i for row in rows for i in range(len(row.token_ids))]

    def _embed(self, rows: Sequence[Row]) -> torch.Tensor:
        ids = [token_id for row in rows for token_id in row.token_ids]
        ids_T = torch.tensor(ids, device=self._device)
        hidden_TC = self._weights.embedding_VC[ids_T].to(self.cache.geometry.dtype)
        return hidden_TC if self._d.embedding_scale == 1 else hidden_TC * self._d.embedding_scale

    def _rotation(self, positions_T: torch.Tensor) -> torch.Tensor:
        """Return (T, 1, D / 2) complex numbers that turn what stands at these positions."""
        weights = self._weights
        angles = positions_T[:, None, None].float() * weights.inverse_frequencies
        return torch.polar(torch.full_like(angles, weights.rotation_scale), angles)

    def _layer(self, index: int, hidden_TC: torch.Tensor, part: _Part) -> torch.Tensor:
        """Run one layer; behind the last one's attention only tokens with logits go on."""
        weights = self._weights.layers[index]
        after = self._d.family.norms_after
        x = hidden_TC if after else self._norm(hidden_TC, weights.attention_norm_C)
        collected = self._attend(index, weights, x, part)
        if part.kept is not None and index == self._d.num_layers - 1:
            if not part.wanted:
                return hidden_TC
            collected, hidden_TC = collected[part.kept], hidden_TC[part.kept]
        norm = weights.attention_norm_C if after else None
        hidden_TC = self._add(weights.attention_out, collected, hidden_TC, norm)
        x = hidden_TC if after else self._norm(hidden_TC, weights.feed_norm_C)
        gate, up = weights.gate_up(x).chunk(2, dim=-1)
        norm = weights.feed_norm_C if after else None
        return self._add(weights.feed_out, F.silu(gate).mul_(up), hidden_TC, norm)

    def _attend(
        self, index: int, weights: LayerWeights, x_TC: torch.Tensor, part: _Part
    ) -> torch.Tensor:
        """Return (T, N x D)."""
        d = self._d
        qkv_TxD = weights.qkv(x_TC).view(len(x_TC), -1, d.head_size)
        if weights.q_norm is not None:
            self._norm_qk(weights, qkv_TxD)
        _turn(qkv_TxD[:, : d.num_heads + d.num_kv_heads], part.rotation)
        q, k, v = torch.split(
            qkv_TxD.transpose(0, 1), [d.num_heads, d.num_kv_heads, d.num_kv_heads]
        )
        scale, extra = d.attention_scale, self._extras[index]
        return part.layout.attend(index, q, k, v, scale, extra).flatten(1)

    def _norm_qk(self, weights: LayerWeights, qkv_TxD: torch.Tensor) -> None:
        """Normalise queries and keys in place."""
        assert weights.q_norm is not None
        assert weights.k_norm is not None
        num_heads, num_kv_heads = self._d.num_heads, self._d.num_kv_heads
        q, k, _ = torch.split(qkv_TxD, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        for part, weight in ((q, weights.q_norm), (k, weights.k_norm)):
            whole = self._d.family.qk_norm is QKNorm.ALL_HEADS
            normed = self._norm_heads(part.flatten(1) if whole else part, weight)
            part.copy_(normed.view_as(part))

    def _norm(self, x_TC: torch.Tensor, weight_C: torch.Tensor) -> torch.Tensor:
        if self._average_C is None:
            return self._norm_heads(x_TC, weight_C)
        # On a CPU `rms_norm` is seven operators; these are five, and up to a third faster.
        squares_T = torch.addmv(self._epsilon, x_TC * x_TC, self._average_C)
        return (x_TC * squares_T.rsqrt_().unsqueeze(-1)).mul_(weight_C)

    def _norm_heads(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._d.norm_epsilon)

    def _add(
        self,
        linear: Linear,
        x: torch.Tensor,
        residual_TC: torch.Tensor,
        norm_C: torch.Tensor | None,
    ) -> torch.Tensor:
        scale = self._d.residual_scale
        if norm_C is None and scale == 1:
            return linear.add_to(residual_TC, x)
        product = linear(x)
        if norm_C is not None:
            product = self._norm(product, norm_C)
        return torch.add(residual_TC, product, alpha=scale)


def _turn(x_TxD: torch.Tensor, rotation: torch.Tensor) -> None:
    """Turn pairs of neighbours, in place."""
    pairs = x_TxD.float().view(*x_TxD.shape[:2], -1, 2)  # float32 itself is no copy
    torch.view_as_complex(pairs).mul_(rotation)
    if x_TxD.dtype != torch.float32:
        x_TxD.copy_(pairs.view(x_TxD.shape))
