"""Attention over slots equals attention written down plainly, whatever a step is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.engine import attention, weighing
from tensorwire_server.engine.attention import Span, StepLayout, serving, step_attention
from tensorwire_server.engine.kv_cache import KVGeometry, SlotCache
from tensorwire_server.scheduling.work import Row, Sampling

NUM_KEY_HEADS, GROUPS, HEAD_SIZE = 2, 3, 4
NUM_HEADS = NUM_KEY_HEADS * GROUPS
CONTEXT_TOKENS = 300
GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer asks of its attention; all heads and sizes are the cache's unless said."""

    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    num_key_heads: int = NUM_KEY_HEADS
    head_size: int = HEAD_SIZE
    value_size: int = HEAD_SIZE

    def extra(self) -> dict[str, Any]:
        return {
            "sliding_window": self.window,
            "softcap": self.softcap,
            "s_aux": SINKS_N[: GROUPS * self.num_key_heads] if self.sinks else None,
            "key_bias": BIAS_NP[: GROUPS * self.num_key_heads] if self.bias else None,
        }


SINKS_N = torch.linspace(-1, 3, NUM_HEADS)
BIAS_NP = torch.randn(NUM_HEADS, CONTEXT_TOKENS, generator=torch.Generator().manual_seed(3))
LAYERS = (
    Layer(),
    Layer(window=7),
    Layer(window=40, softcap=0.8),
    Layer(sinks=True),
    Layer(bias=True),
    Layer(num_key_heads=1, head_size=3, value_size=2),
    Layer(window=1, softcap=0.8, sinks=True, bias=True, num_key_heads=1),
)
SCALE = 0.6


class Histories:
    """Queries, keys and values of every sequence and layer, as a model would compute them."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def values(heads: int) -> torch.Tensor:
            shape = (6, len(LAYERS), heads, CONTEXT_TOKENS, HEAD_SIZE)
            return torch.randn(shape, generator=generator)

        self._q, self._k, self._v = values(NUM_HEADS), values(NUM_KEY_HEADS), values(NUM_KEY_HEADS)

    def of(self, number: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return one sequence's, or several sequences', in one layer."""
        shape = LAYERS[layer]
        q = self._q[number, layer, ..., : GROUPS * shape.num_key_heads, :, : shape.head_size]
        k = self._k[number, layer, ..., : shape.num_key_heads, :, : shape.head_size]
        v = self._v[number, layer, ..., : shape.num_key_heads, :, : shape.value_size]
        return q, k, v

    def expected(self, number: int, layer: int, position: int) -> torch.Tensor:
        """Return (heads, size) for one token: attention over its own past, written down plainly."""
        wants = LAYERS[layer]
        q, k, v = self.of(number, layer)
        first = 0 if wants.window is None else max(0, position + 1 - wants.window)
        seen = slice(first, position + 1)
        k, v = (states[:, seen].repeat_interleave(GROUPS, 0) for states in (k, v))
        scores = (k @ q[:, position, :, None])[..., 0] * SCALE
        if wants.softcap is not None:
            scores = wants.softcap * torch.tanh(scores / wants.softcap)
        if wants.bias:
            scores = scores + BIAS_NP[: len(q), seen]
        weights = scores.exp()
        whole = weights.sum(1) + (SINKS_N[: len(q)].exp() if wants.sinks else 0)
        return (weights[:, None] @ v)[:, 0] / whole[:, None]


def new_cache(dtype: torch.dtype = torch.float32, device: str = "cpu") -> SlotCache:
    geometry = KVGeometry(
        num_layers=len(LAYERS),
        num_heads=NUM_KEY_HEADS,
        head_size=HEAD_SIZE,
        dtype=dtype,
        device=torch.device(device),
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


def check_step(
    cache: SlotCache, histories: Histories, rows: list[Row], *, atol: float = 1e-5
) -> StepLayout:
    like: Any = {"dtype": cache.geometry.dtype, "device": cache.geometry.device}
    layout = StepLayout(cache, rows)
    assert sorted(r.sequence_id for r in layout.rows) == sorted(r.sequence_id for r in rows)
    assert layout.num_tokens == sum(len(r.token_ids) for r in rows)
    places = [(r.sequence_id, r.start + i) for r in layout.rows for i in range(len(r.token_ids))]
    numbers = torch.tensor([number for number, _ in places])
    positions = torch.tensor([position for _, position in places])
    tokens = torch.arange(len(places))
    for layer, wants in enumerate(LAYERS):
        q, k, v = (
            states[tokens, :, positions].transpose(0, 1).to(**like)
            for states in histories.of(numbers, layer)
        )
        extra = wants.extra()
        for name in ("s_aux", "key_bias"):
            extra[name] = None if extra[name] is None else extra[name].to(**like)
        out = layout.attend(layer, q, k, v, SCALE, extra)
        assert (out.dtype, out.device) == (q.dtype, q.device)
        expected = torch.stack([histories.expected(n, layer, p) for n, p in places])
        torch.testing.assert_close(out.float().cpu(), expected, rtol=0, atol=atol)
    return layout


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


DEVICES = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


@DEVICES
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_other_number_formats_and_devices_agree(
    device: str, dtype: torch.dtype, atol: float
) -> None:
    cache, histories = new_cache(dtype, device), Histories(7)  # bfloat16 has 8 bits
    check_step(cache, histories, [row(0, 0, 50), row(1, 0, 9)], atol=atol)
    check_step(cache, histories, [row(0, 50, 1), row(1, 9, 3), row(2, 0, 1)], atol=atol)


@DEVICES
@pytest.mark.parametrize("most", [attention._MAX_REPEATED, 0])  # 0: as if prompts were long
@pytest.mark.parametrize("count", [63, 64, 65, 66, 127, 128, 129, 130])
def test_chunks_about_as_long_as_a_kernels_tiles_are_read_to_their_last_token(
    device: str, count: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MAX_REPEATED", most)
    cache, histories = new_cache(device=device), Histories(8)
    check_step(cache, histories, [row(0, 0, 21), row(1, 0, count)])
    check_step(cache, histories, [row(0, 21, count)])


@pytest.mark.parametrize("at_once", [weighing._SCORES_OF_A_HEAD, 5000])
@pytest.mark.parametrize("count", [2, 9, 33, 99])
def test_chunks_that_are_read_head_by_head_are_the_same(
    count: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_FEWEST_BY_HEAD", GROUPS * 2 * 100)
    monkeypatch.setattr(weighing, "_SCORES_OF_A_HEAD", at_once)
    cache, histories = new_cache(), Histories(4)
    # The second ends with its context; behind the first one's end there is room, and no garbage.
    check_step(cache, histories, [row(0, 0, 101), row(1, 0, CONTEXT_TOKENS - count)])
    rows = [row(0, 101, count), row(1, CONTEXT_TOKENS - count, count)]
    layout = check_step(cache, histories, rows)
    spans = [
        span
        for share in layout._shares
        for (_, window, is_plain), span in share.chunk_spans.items()
        if window is None and is_plain
    ]
    assert [span.by_head for span in spans] == [True, True]
    assert [span.high for span in spans] == [-(-(101 + count) // 64) * 64, CONTEXT_TOKENS]


def test_decodes_of_one_length_need_no_mask() -> None:
    cache, histories = new_cache(), Histories(0)
    check_step(cache, histories, [row(0, 0, 50), row(1, 0, 50)])
    layout = check_step(cache, histories, [row(0, 50, 1), row(1, 50, 1)])
    (share,) = layout._shares
    assert share.decode_spans == {
        None: Span(low=0, high=51, mask=None),
        7: Span(low=44, high=51, mask=None),
        40: Span(low=11, high=51, mask=None),
        1: Span(low=50, high=51, mask=None),
    }


def test_keys_before_a_window_are_not_read() -> None:
    cache, histories = new_cache(), Histories(2)
    check_step(cache, histories, [row(0, 0, 60), row(1, 0, 52)])
    with torch.inference_mode():
        cache.arenas[0].kv_L2SHPD[1, :, :, :, :40] = float("nan")
    layout = check_step(cache, histories, [row(0, 60, 1), row(1, 52, 9)])
    (share,) = layout._shares
    assert share.decode_spans[7] == Span(low=54, high=61, mask=None)
    assert share.chunk_spans[0, 7, True].low == 46


def test_decodes_whose_windows_lie_far_apart_are_read_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_LONE_CALL_POSITIONS", 8)  # as if sequences were long
    cache, histories = new_cache(), Histories(4)
    lengths = [10, 60, 30, 90]
    check_step(cache, histories, [row(i, 0, length) for i, length in enumerate(lengths)])
    # Sequence 1 reads a chunk, so that the slots that decode are no dense prefix either.
    rows = [row(i, length, 2 if i == 1 else 1) for i, length in enumerate(lengths)]
    (share,) = check_step(cache, histories, rows)._shares
    assert share.decode_spans[7] is None
    assert share.decode_spans[None] is not None


def test_a_window_that_no_sequence_has_passed_costs_nothing() -> None:
    cache, histories = new_cache(), Histories(5)
    layout = check_step(cache, histories, [row(0, 0, 30), row(1, 0, 20)])
    layout = check_step(cache, histories, [row(0, 30, 1), row(1, 20, 1)])
    (share,) = layout._shares
    assert set(share.decode_spans) == {None, 7, 1}


def test_sequences_of_different_size_classes_share_a_step() -> None:
    cache, histories = new_cache(), Histories(1)
    check_step(cache, histories, [row(0, 0, 127), row(1, 0, 127), row(2, 0, 260)])
    check_step(cache, histories, [row(0, 127, 1), row(1, 127, 1), row(2, 260, 1)])
    check_step(cache, histories, [row(0, 128, 1), row(2, 261, 1), row(1, 128, 3)])


def test_long_chunks_with_written_out_scores_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "_SCORES_AT_ONCE", 1000)
    check_step(new_cache(), Histories(6), [row(0, 0, 90), row(1, 0, 5), row(2, 0, 1)])


class Echo:
    """An attention step that answers its queries, and keeps what else it was told."""

    def attend(
        self, layer: int, q: torch.Tensor, k: object, v: object, scale: float, extra: dict[str, Any]
    ) -> torch.Tensor:
        self.told = layer, scale, extra
        return q.transpose(0, 1)


def test_transformers_finds_the_step_it_serves() -> None:
    module = torch.nn.Module()
    module.layer_idx = 4  # type: ignore[assignment]
    q, k = torch.randn(1, 6, 3, 4), torch.randn(1, 2, 3, 4)
    step = Echo()
    with serving(step):
        out, weights = step_attention(module, q, k, k, None, softcap=30.0)
    assert weights is None
    assert step.told == (4, 0.5, {"attention_mask": None, "softcap": 30.0})
    torch.testing.assert_close(out, q.transpose(1, 2))


def test_outside_of_a_step_the_call_is_refused() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    state = torch.zeros(1, 1, 1, 1)
    with serving(Echo()):
        pass
    with pytest.raises(LookupError):
        step_attention(module, state, state, state, None)
