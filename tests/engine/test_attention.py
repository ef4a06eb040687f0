"""Attention over slots equals attention written down plainly, whatever a step is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.engine.attention import StepLayout, step_attention
from tensorwire_server.engine.kv_cache import KVGeometry, SlotCache
from tensorwire_server.scheduling.work import Row, Sampling

NUM_LAYERS, NUM_KEY_HEADS, GROUPS, HEAD_SIZE = 2, 2, 3, 4
CONTEXT_TOKENS = 300
GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)


class Histories:
    """Queries, keys and values of every sequence and layer, as a model would compute them."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def values(heads: int) -> torch.Tensor:
            shape = (6, NUM_LAYERS, heads, CONTEXT_TOKENS, HEAD_SIZE)
            return torch.randn(shape, generator=generator)

        self.q, self.k, self.v = (
            values(NUM_KEY_HEADS * GROUPS),
            values(NUM_KEY_HEADS),
            values(NUM_KEY_HEADS),
        )

    def expected(self, number: int, layer: int, position: int) -> torch.Tensor:
        """Return (heads, size) for one token: softmax over its own past, head by head."""
        heads = []
        for head in range(NUM_KEY_HEADS * GROUPS):
            keys = self.k[number, layer, head // GROUPS, : position + 1]
            values = self.v[number, layer, head // GROUPS, : position + 1]
            scores = keys @ self.q[number, layer, head, position] * HEAD_SIZE**-0.5
            heads.append(scores.softmax(0) @ values)
        return torch.stack(heads)


def new_cache() -> SlotCache:
    geometry = KVGeometry(
        num_layers=NUM_LAYERS,
        num_heads=NUM_KEY_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return SlotCache(geometry, context_tokens=CONTEXT_TOKENS)


def row(number: int, start: int, count: int) -> Row:
    return Row(
        sequence_id=number,
        token_ids=(1,) * count,
        start=start,
        pages=(),
        sample=True,
        sampling=GREEDY,
    )


def check_step(cache: SlotCache, histories: Histories, rows: list[Row]) -> None:
    layout = StepLayout(cache, rows)
    assert sorted(r.sequence_id for r in layout.rows) == sorted(r.sequence_id for r in rows)
    assert layout.num_tokens == sum(len(r.token_ids) for r in rows)
    places = [(r.sequence_id, r.start + i) for r in layout.rows for i in range(len(r.token_ids))]
    numbers = torch.tensor([number for number, _ in places])
    positions = torch.tensor([position for _, position in places])
    for layer in range(NUM_LAYERS):
        q, k, v = (
            states[numbers, layer, :, positions].transpose(0, 1)
            for states in (histories.q, histories.k, histories.v)
        )
        out = layout.attend(layer, q, k, v, HEAD_SIZE**-0.5, {})
        expected = torch.stack([histories.expected(n, layer, p) for n, p in places])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9),
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 1, 1, 2, 9, 70, 140]))),
        min_size=1,
        max_size=8,
    ),
)
def test_any_sequence_of_steps_equals_plain_attention(
    seed: int, steps: list[list[tuple[int, int]]]
) -> None:
    cache, histories = new_cache(), Histories(seed)
    lengths = [0] * 6
    for step in steps:
        rows = []
        for number, count in dict(step).items():
            if count == 0 or lengths[number] + count > CONTEXT_TOKENS:
                cache.release(number)
                lengths[number] = 0
            else:
                rows.append(row(number, lengths[number], count))
                lengths[number] += count
        if rows:
            check_step(cache, histories, rows)
        cache.check_invariants()


def test_decodes_of_one_length_need_no_mask() -> None:
    cache, histories = new_cache(), Histories(0)
    check_step(cache, histories, [row(0, 0, 5), row(1, 0, 5)])
    layout = StepLayout(cache, [row(0, 5, 1), row(1, 5, 1)])
    assert [share.mask for share in layout._shares] == [None]


def test_sequences_of_different_size_classes_share_a_step() -> None:
    cache, histories = new_cache(), Histories(1)
    check_step(cache, histories, [row(0, 0, 127), row(1, 0, 127), row(2, 0, 260)])
    check_step(cache, histories, [row(0, 127, 1), row(1, 127, 1), row(2, 260, 1)])
    check_step(cache, histories, [row(0, 128, 1), row(2, 261, 1), row(1, 128, 3)])


def test_transformers_finds_the_step_among_the_arguments() -> None:
    class Echo:
        def attend(self, layer: int, q: torch.Tensor, *rest: object) -> torch.Tensor:
            assert layer == 4
            assert rest[2] == 0.5
            assert rest[3] == {"attention_mask": None, "softcap": 30.0}
            return q.transpose(0, 1)

    module = torch.nn.Module()
    module.layer_idx = 4  # type: ignore[assignment]
    q, k = torch.randn(1, 6, 3, 4), torch.randn(1, 2, 3, 4)
    out, weights = step_attention(module, q, k, k, None, step=Echo(), softcap=30.0)
    assert weights is None
    torch.testing.assert_close(out, q.transpose(1, 2))


def test_without_a_step_the_call_is_refused() -> None:
    without: Any = step_attention
    with pytest.raises(TypeError, match="step"):
        without(torch.nn.Module(), *[torch.zeros(1, 1, 1, 1)] * 3, None)
