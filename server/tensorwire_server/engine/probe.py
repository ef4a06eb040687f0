"""Proof at load that a model computes the same through our attention as by itself.

transformers hands every architecture's attention to one function, but each may want more of it
than plain attention (windows, soft caps, sinks, biases, and what is yet to come), some keep other
state (recurrent layers), some ignore position ids. Whatever we do not do would be answered wrongly
without a word. So before a model is served:

1. one forward pass over a plain sequence notes what each layer asks for, and refuses what we lack;
2. the mask of each layer is compared with the window the layer asks for, over the whole context;
3. so is the cache that transformers' `generate` would use, which also names state beyond keys and
   values;
4. two short sequences run through the real cache, prompts in chunks, then decodes, and the logits
   must equal those of the model alone with transformers' own attention. For this, windows and soft
   caps are made so small that seven tokens feel them.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from tensorwire_server.engine.attention import ATTENTION_NAME, serving
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.kv_cache import KVGeometry
from tensorwire_server.engine.masks import INSPECTION_NAME, MadeMasks, noting_masks
from tensorwire_server.scheduling.work import Row, Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_server.engine.generator import Steps

# What `StepLayout.attend` does for a layer that asks, and what it can tell by itself.
_SERVED = frozenset({"sliding_window", "softcap", "s_aux", "key_bias", "attention_mask"})
# Arguments that say nothing about the result here: the step itself carries positions and cache.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}
)
# Without keys and values of their own are layers that read another's.
_PLAIN_CACHES = frozenset({DynamicLayer, DynamicSlidingWindowLayer, DummyLayer})
_GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
# Relative to the largest logit: float32 errs around 1e-6, an omitted feature well above 1e-3.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What modules and configs call the settings that a short sequence would never meet.
_SHARPENED = {"sliding_window": 3, "attn_logit_softcapping": 0.5}


class _Recorder:
    """An attention step that answers like plain causal attention, and notes what was asked."""

    def __init__(self, masks: MadeMasks, context_tokens: int) -> None:
        self._masks = masks
        self._context_tokens = context_tokens
        self.shapes: dict[int, tuple[int, int]] = {}  # layer -> key heads, the larger head size
        self.windows: dict[int, int | None] = {}  # by layer; None: no window within the context

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
        unknown = sorted(
            name
            for name, value in extra.items()
            if name not in _HARMLESS | _SERVED and value is not None and value is not False
        )
        if unknown:
            raise ModelLoadError(
                f"its attention needs {', '.join(unknown)}, which this engine does not support"
            )
        self._check_window(layer, extra)
        self.shapes[layer] = (k_HTD.shape[0], max(k_HTD.shape[2], v_HTD.shape[2]))
        groups = q_NTD.shape[0] // k_HTD.shape[0]
        k_NTD, v_NTD = (kv.repeat_interleave(groups, dim=0) for kv in (k_HTD, v_HTD))
        out_NTD = torch.nn.functional.scaled_dot_product_attention(
            q_NTD, k_NTD, v_NTD, is_causal=True, scale=scale
        )
        return out_NTD.transpose(0, 1)

    def _check_window(self, layer: int, extra: dict[str, Any]) -> None:
        asked, mask = extra.get("sliding_window"), extra["attention_mask"]
        if asked is not None and asked >= self._context_tokens:
            asked = None
        # A module that hands down no mask is held to what it asks by the proof alone.
        masked = asked if mask is None else self._masks.window_of(mask, self._context_tokens)
        if asked != masked:
            raise ModelLoadError(
                f"its layer {layer} is masked to {_told(masked)}, but asks its attention for "
                f"{_told(asked)}"
            )
        self.windows[layer] = asked


def _told(window: int | None) -> str:
    return "all tokens" if window is None else f"the last {window} tokens"


def inspect(model: Any, *, num_layers: int, vocab_size: int, context_tokens: int) -> KVGeometry:
    """Return what a token of this model takes in the cache.

    Raises:
        ModelLoadError: its attention asks for something this engine does not do.
    """
    ids = torch.tensor([_token_ids(3, 0, vocab_size)], device=model.device)
    positions = torch.arange(3, device=model.device)[None]
    with noting_masks() as masks, _attention(model, INSPECTION_NAME), torch.inference_mode():
        recorder = _Recorder(masks, context_tokens)
        with serving(recorder):
            model(input_ids=ids, position_ids=positions, use_cache=False)
    if sorted(recorder.shapes) != list(range(num_layers)):
        raise ModelLoadError(
            f"only {len(recorder.shapes)} of its {num_layers} layers use an attention "
            "this engine can run"
        )
    _check_own_cache(model.config, recorder.windows, context_tokens)
    return KVGeometry(
        num_layers=num_layers,
        num_heads=max(heads for heads, _ in recorder.shapes.values()),
        head_size=max(size for _, size in recorder.shapes.values()),
        dtype=model.dtype,
        device=model.device,
    )


def _check_own_cache(config: Any, windows: dict[int, int | None], context_tokens: int) -> None:
    for layer, kept in enumerate(DynamicCache(config=config).layers):
        if type(kept) not in _PLAIN_CACHES:
            raise ModelLoadError(
                f"its layer {layer} keeps more than keys and values ({type(kept).__name__} of "
                "transformers), which is not supported"
            )
        window = getattr(kept, "sliding_window", None)
        if window is not None and window < context_tokens and window != windows[layer]:
            # A `sliding_window` in config.json that the architecture knows nothing of does this.
            raise ModelLoadError(
                f"transformers would forget all but {_told(window)} of its layer {layer}, which "
                f"asks its attention for {_told(windows[layer])}"
            )


def prove(
    ragged: Steps,
    model: Any,
    *,
    vocab_size: int,
    reference: str = "eager",
    tolerance: float | None = None,
) -> None:
    """Compare the ragged path with the model alone; leaves the cache empty.

    Args:
        ragged: the path to prove.
        model: of transformers, the one within.
        vocab_size: token ids to try are below this.
        reference: the attention of transformers that is right for this model.
        tolerance: relative to the largest logit; None: what the model's number format errs.

    Raises:
        ModelLoadError: they differ.
    """
    allowed = _TOLERANCE[model.dtype] if tolerance is None else tolerance
    prompts = [_token_ids(7, 0, vocab_size), _token_ids(5, 1, vocab_size)]
    with torch.inference_mode(), _sharpened(model):
        ours = _logits_of_last_two(ragged, prompts)
        with _attention(model, reference):
            theirs = [
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                .logits[0, -2:]
                .float()
                for ids in prompts
            ]
    for mine, expected in zip(ours, theirs, strict=True):
        error = (mine - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if not error <= allowed:  # written so that NaN is refused too
            raise ModelLoadError(
                f"its logits differ by {error:.1e} from transformers' own in this engine"
            )


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


@contextmanager
def _sharpened(model: Any) -> Iterator[None]:
    """Make windows and soft caps, where there are any, bite within a few tokens."""
    holders = {id(holder): holder for module in model.modules() for holder in _holders(module)}
    changed: list[tuple[Any, str, Any]] = []
    try:
        for holder in holders.values():
            for name, small in _SHARPENED.items():
                value = getattr(holder, name, None)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    changed.append((holder, name, value))
                    setattr(holder, name, small)
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


def _holders(module: torch.nn.Module) -> list[Any]:
    config = getattr(module, "config", None)
    return [module] if config is None else [module, config]


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
