"""Proof at load that a model computes the same through our attention as by itself.

transformers hands every architecture's attention to one function, but some want more of it than
we do (windows, soft caps, sinks, biases), some keep other state (recurrent layers), some ignore
position ids. Each of these would answer wrongly without a word. So before a model is served:

1. one forward pass over a plain sequence notes what each layer asks for, and refuses what we lack;
2. two short sequences run through the real cache, prompts in chunks, then decodes, and the logits
   must equal those of the model alone with transformers' own readable (`eager`) attention.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from tensorwire_server.engine.attention import ATTENTION_NAME
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.kv_cache import KVGeometry
from tensorwire_server.scheduling.work import Row, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_server.engine.generator import Steps

# Arguments that say nothing about the result here: the step itself carries positions and cache.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}
)
_GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
# Relative to the largest logit: float32 errs around 1e-6, an omitted feature well above 1e-3.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class _Recorder:
    """An attention step that answers like plain causal attention, and notes what was asked."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}  # layer -> key heads, key, value size

    def attend(
        self,
        layer: int,
        q_NTD: torch.Tensor,
        k_HTD: torch.Tensor,
        v_HTD: torch.Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """See `AttentionStep`."""
        asked = sorted(
            name
            for name, value in extra.items()
            if name not in _HARMLESS and value is not None and value is not False
        )
        if asked:
            raise ModelLoadError(
                f"its attention needs {', '.join(asked)}, which this engine does not support"
            )
        self.shapes[layer] = (k_HTD.shape[0], k_HTD.shape[2], v_HTD.shape[2])
        groups = q_NTD.shape[0] // k_HTD.shape[0]
        k_NTD, v_NTD = (kv.repeat_interleave(groups, dim=0) for kv in (k_HTD, v_HTD))
        out_NTD = torch.nn.functional.scaled_dot_product_attention(
            q_NTD, k_NTD, v_NTD, is_causal=True, scale=scale
        )
        return out_NTD.transpose(0, 1)


def inspect(model: Any, *, num_layers: int, vocab_size: int) -> KVGeometry:
    """Return what a token of this model takes in the cache.

    Raises:
        ModelLoadError: its attention asks for something this engine does not do.
    """
    recorder = _Recorder()
    ids = torch.tensor([_token_ids(3, 0, vocab_size)], device=model.device)
    positions = torch.arange(3, device=model.device)[None]
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=positions, use_cache=False, step=recorder)
    except TypeError as error:  # an argument that got lost, or was refused, on the way
        raise ModelLoadError(f"its modules do not hand down their arguments: {error}") from error
    if sorted(recorder.shapes) != list(range(num_layers)):
        raise ModelLoadError(
            f"only {len(recorder.shapes)} of its {num_layers} layers use an attention "
            "this engine can run"
        )
    shapes = set(recorder.shapes.values())
    num_heads, key_size, value_size = shapes.pop()
    if shapes or key_size != value_size:
        raise ModelLoadError("its layers differ in the shape of their keys and values")
    return KVGeometry(
        num_layers=num_layers,
        num_heads=num_heads,
        head_size=key_size,
        dtype=model.dtype,
        device=model.device,
    )


def prove(ragged: Steps, model: Any, *, vocab_size: int, tolerance: float | None = None) -> None:
    """Compare the ragged path with the model alone; leaves the cache empty.

    Args:
        tolerance: relative to the largest logit; None: what the model's number format errs.

    Raises:
        ModelLoadError: they differ.
    """
    allowed = _TOLERANCE[model.dtype] if tolerance is None else tolerance
    prompts = [_token_ids(7, 0, vocab_size), _token_ids(5, 1, vocab_size)]
    with torch.inference_mode():
        ours = _logits_of_last_two(ragged, prompts)
        model.set_attn_implementation("eager")
        try:
            reference = [
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                .logits[0, -2:]
                .float()
                for ids in prompts
            ]
        finally:
            model.set_attn_implementation(ATTENTION_NAME)
    for mine, theirs in zip(ours, reference, strict=True):
        error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        if not error <= allowed:  # written so that NaN is refused too
            raise ModelLoadError(
                f"its logits differ by {error:.1e} from transformers' own in this engine"
            )


def _token_ids(count: int, salt: int, vocab_size: int) -> list[int]:
    return [(7 + salt + 7919 * (i + 1) * (salt + 3)) % vocab_size for i in range(count)]


def _logits_of_last_two(ragged: Steps, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Feed each prompt as a chunk, another chunk and one decode; return (2, V) per prompt."""
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    cuts = [0, 2, -1, None]
    for begin, end in pairwise(cuts):
        rows = []
        for sequence_id, ids in enumerate(prompts):
            start, stop, _ = slice(begin, end).indices(len(ids))
            rows.append(
                Row(
                    sequence_id=sequence_id,
                    token_ids=tuple(ids[start:stop]),
                    start=start,
                    pages=(),
                    sample=stop >= len(ids) - 1,
                    sampling=_GREEDY,
                )
            )
        sampled, logits = ragged.forward(rows)
        for row, row_logits in zip(sampled, logits, strict=True):
            found[row.sequence_id].append(row_logits)
    for sequence_id in range(len(prompts)):
        ragged.cache.release(sequence_id)
    return [torch.stack(rows) for rows in found]
