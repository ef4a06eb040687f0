"""From a folder to a `FusedModel` that is proven right, one layer in memory at a time.

The weights are read straight from the files: transformers' modules are built without any, to say
which there must be, and to compute the reference of the proof (`streaming`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import transformers

from tensorwire_server.engine import probe
from tensorwire_server.engine.fused.families import Description, QKNorm, describe, windows_of
from tensorwire_server.engine.fused.linear import (
    Int8Linear,
    PlainLinear,
    has_int8_products,
    linear_form,
)
from tensorwire_server.engine.fused.model import FusedModel, LayerWeights, ModelWeights
from tensorwire_server.engine.fused.stored import StoredWeights, linear_layers
from tensorwire_server.engine.generator import num_parameters
from tensorwire_server.engine.kv_cache import SlotCache
from tensorwire_server.engine.quantized import join

if TYPE_CHECKING:
    from pathlib import Path

    from tensorwire_server.engine.fused.linear import Linear
    from tensorwire_server.engine.quantized import QuantizationFormat, QuantizedWeight
    from tensorwire_server.scheduling.work import Row

# What 8 bits may do to the logits, relative to the largest. Measured: 0.03 with the demo, up to
# 0.24 with tiny random models of sharp attention. What is above has lost its meaning.
_INT8_TOLERANCE = 0.5


def load_fused(
    folder: Path,
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    int8: bool,
    quantization: QuantizationFormat | None = None,
) -> FusedModel:
    """Load a model and compare it with transformers' own.

    Args:
        config: transformers' own, of this folder.
        context: the longest sequence.
        int8: compute all products in 8 bits, rounding what is stored as numbers.
        quantization: how the weights are stored. Products of stored 8-bit integers are computed in
            8 bits wherever that runs; all others are multiplied as the numbers that they stand for.

    Raises:
        ModelLoadError: with the reason; another back end may do better.
    """
    stored = StoredWeights(folder, quantization)
    reference = streaming(config, stored, device, dtype)
    description = describe(reference)
    geometry = probe.inspect(
        reference,
        num_layers=description.num_layers,
        vocab_size=config.vocab_size,
        context_tokens=context,
    )
    size = num_parameters(reference)

    def model_of(weights: ModelWeights) -> FusedModel:
        cache = SlotCache(geometry, context_tokens=context)
        return FusedModel(description, weights, cache, num_parameters=size)

    tolerance = None
    integers = stored.has_int8_layers and dtype == torch.float32 and has_int8_products(device)
    if int8 or integers:
        # 8 bits would hide a mistake, so the same steps are proven with the weights as stored.
        exact = _Reader(stored, description, reference, device, dtype, PlainLinear)
        unpacked = model_of(exact.read(lazily=True))
        _prove(unpacked, reference)
        tolerance = _INT8_TOLERANCE
    form = linear_form(device, dtype, int8=int8)
    with torch.inference_mode():
        reader = _Reader(
            stored, description, reference, device, dtype, form, keeps_integers=integers
        )
        model = model_of(reader.read())
    _prove(model, reference, tolerance)
    del reference
    _give_memory_back()
    return model


def _give_memory_back() -> None:
    """Return to the system what loading left behind: 400 MiB with SmolLM2-135M's shape."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def _prove(model: FusedModel, reference: Any, tolerance: float | None = None) -> None:
    narrowing = _Narrowing(model, reference)
    probe.prove(narrowing, reference, vocab_size=model.vocab_size, tolerance=tolerance)
    model.set_windows(windows_of(reference))


class _Narrowing:
    """A model whose windows are at any moment its reference's, which the proof makes small."""

    def __init__(self, model: FusedModel, reference: Any) -> None:
        self._model, self._reference = model, reference
        self.cache = model.cache
        self.vocab_size, self.num_parameters = model.vocab_size, model.num_parameters
        self.resumable_layers = model.resumable_layers

    def forward(self, rows: Sequence[Row]) -> tuple[list[Row], torch.Tensor]:
        """See `Steps`."""
        self._model.set_windows(windows_of(self._reference))
        return self._model.forward(rows)


def streaming(config: Any, stored: StoredWeights, device: torch.device, dtype: torch.dtype) -> Any:
    """Return transformers' own model, whose layers have weights only while they compute.

    Raises:
        ModelLoadError: the files do not hold what it needs.
    """
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.eval().requires_grad_(False)
    wanted = model.state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    stored.check(wanted, linear_layers(model))
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=config).to(device)

    def fill(module: torch.nn.Module, prefix: str) -> None:
        tensors = {
            name: stored.get(prefix + name).to(device, dtype) for name in module.state_dict()
        }
        module.load_state_dict(tensors, assign=True)

    def fill_before(prefix: str) -> Any:
        return lambda module, args: fill(module, prefix)

    def empty_after(module: torch.nn.Module, args: Any, output: Any) -> None:
        module.to("meta")

    for index, layer in enumerate(body.layers):
        layer.register_forward_pre_hook(fill_before(f"model.layers.{index}."))
        layer.register_forward_hook(empty_after)
    fill(body.embed_tokens, "model.embed_tokens.")
    fill(body.norm, "model.norm.")
    if config.tie_word_embeddings:
        model.lm_head.weight = body.embed_tokens.weight
    else:
        fill(model.lm_head, "lm_head.")
    return model


class _LayersAtWork(Sequence[LayerWeights]):
    """Layers that are read when their turn comes, and forgotten with the next one's."""

    def __init__(self, read: Callable[[int], LayerWeights], num_layers: int) -> None:
        self._read = lru_cache(maxsize=1)(read)
        self._num_layers = num_layers

    def __len__(self) -> int:
        return self._num_layers

    def __getitem__(self, index: Any) -> Any:
        if index >= self._num_layers:
            raise IndexError(index)
        return self._read(index)


class _Reader:
    """Turns stored tensors into the form in which they run."""

    def __init__(
        self,
        stored: StoredWeights,
        description: Description,
        reference: Any,
        device: torch.device,
        dtype: torch.dtype,
        form: Callable[[torch.Tensor, torch.Tensor | None], Linear],
        *,
        keeps_integers: bool = False,
    ) -> None:
        self._stored = stored
        self._d = description
        self._reference = reference
        self._device, self._dtype = device, dtype
        self._form = form
        self._keeps_integers = keeps_integers
        half = description.head_size // 2
        # Numbers i and i + half of a head turn together; they become neighbours.
        self._order = torch.arange(2 * half).view(2, half).t().flatten()

    def read(self, *, lazily: bool = False) -> ModelWeights:
        """Return the weights; `lazily`: of layers only while they compute."""
        tied = self._reference.config.tie_word_embeddings
        # 16 bits are exact as they are, and half the memory.
        embedding = self._stored.get("model.embed_tokens.weight").to(self._device, copy=True)
        rotary = self._reference.model.rotary_emb
        layers = _LayersAtWork(self.layer, self._d.num_layers)
        return ModelWeights(
            embedding_VC=embedding,
            layers=layers if lazily else tuple(layers),
            final_norm_C=self._tensor("model.norm.weight"),
            head=self._tied_head() if tied else self._linear("lm_head"),
            inverse_frequencies=rotary.inv_freq.float().clone(),
            rotation_scale=float(rotary.attention_scaling),
        )

    def layer(self, index: int) -> LayerWeights:
        """Return one layer's weights, fresh memory."""
        prefix = f"model.layers.{index}."
        attention, feed = prefix + "self_attn.", prefix + "mlp."
        first, second = "input_layernorm", "post_attention_layernorm"
        if self._d.family.norms_after:
            first, second = "post_attention_layernorm", "post_feedforward_layernorm"
        has_norms = self._d.family.qk_norm is not QKNorm.NONE
        return LayerWeights(
            attention_norm_C=self._tensor(f"{prefix}{first}.weight"),
            qkv=self._linear(*(f"{attention}{part}_proj" for part in "qkv"), num_turned=2),
            q_norm=self._turned(attention + "q_norm.weight") if has_norms else None,
            k_norm=self._turned(attention + "k_norm.weight") if has_norms else None,
            attention_out=self._linear(attention + "o_proj"),
            feed_norm_C=self._tensor(f"{prefix}{second}.weight"),
            gate_up=self._linear(feed + "gate_proj", feed + "up_proj"),
            feed_out=self._linear(feed + "down_proj"),
        )

    def _tied_head(self) -> Linear:
        return self._form(self._tensor("model.embed_tokens.weight"), self._bias("lm_head.bias"))

    def _linear(self, *names: str, num_turned: int = 0) -> Linear:
        """Return layers of the same input as one product; the first of them are turned."""
        turns = [index < num_turned for index in range(len(names))]
        biases = [
            self._turned(f"{name}.bias") if turned else self._tensor(f"{name}.bias")
            for name, turned in zip(names, turns, strict=True)
            if f"{name}.bias" in self._stored
        ]
        bias = torch.cat(biases) if biases else None
        integers = self._integers(names, turns)
        if integers is not None:
            return Int8Linear(integers, bias)
        weights = [
            self._turned(f"{name}.weight") if turned else self._tensor(f"{name}.weight")
            for name, turned in zip(names, turns, strict=True)
        ]
        return self._form(torch.cat(weights), bias)

    def _integers(self, names: Sequence[str], turns: Sequence[bool]) -> QuantizedWeight | None:
        """Return what layers have stored; None: some have numbers, or integers are not wanted."""
        if not self._keeps_integers:
            return None
        weights = []
        for name, turned in zip(names, turns, strict=True):
            weight = self._stored.quantized(f"{name}.weight")
            if weight is None:
                return None
            weights.append(weight.take(self._places(weight.values_OI)) if turned else weight)
        return join(weights)

    def _turned(self, name: str) -> torch.Tensor:
        """Return a tensor of heads with the numbers of each in the order of `_turn`."""
        tensor = self._tensor(name)
        return tensor[self._places(tensor).to(tensor.device)]

    def _places(self, tensor: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(tensor)).view(-1, self._d.head_size)
        return places[:, self._order].flatten()

    def _bias(self, name: str) -> torch.Tensor | None:
        return self._tensor(name) if name in self._stored else None

    def _tensor(self, name: str) -> torch.Tensor:
        return self._stored.get(name).to(self._device, self._dtype, copy=True)
