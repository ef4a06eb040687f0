"""The same on a GPU; and what differs there, other number formats, on any machine."""

from __future__ import annotations

import pytest
import torch
import transformers
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.fused.loading import load_fused
from tensorwire_server.engine.fused.model import FusedModel
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import load

from ..driving import assert_right, compare, mixed_requests, references, run
from .test_model import row
from .variants import variant_folder

without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3", "granite", "olmo2"])
def test_half_precision_is_as_near_as_it_can_be(variant: str, dtype: torch.dtype) -> None:
    folder = variant_folder(variant)
    config = transformers.AutoConfig.from_pretrained(folder)
    cpu = torch.device("cpu")
    ids = [5 + 7 * i % 500 for i in range(40)]
    found = []
    for number_format in (torch.float32, dtype):
        # Compared with transformers' own in the same format while it is loaded, too.
        model = load_fused(folder, config, device=cpu, dtype=number_format, context=64, int8=False)
        assert isinstance(model, FusedModel)
        with torch.inference_mode():
            _, logits = model.forward([row(0, ids)])
        assert logits.dtype is torch.float32
        found.append(logits)
    right, rounded = found
    # 8 and 11 significant bits, over three layers: measured up to 0.02 and 0.0015.
    allowed = 0.1 if dtype is torch.bfloat16 else 0.01
    assert (rounded - right).abs().max() <= allowed * right.abs().max()


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2", "qwen3", "olmo2"])
@pytest.mark.gpu
@without_gpu
def test_requests_on_a_gpu_equal_generate(variant: str) -> None:
    requests = mixed_requests(16, seed=1)
    engine = load(variant_folder(variant), device="cuda", backend="fused")
    assert isinstance(engine, Generator)
    expected = references(variant_folder(variant), requests)
    assert_right(compare(run(engine, requests).tokens, expected))


@pytest.mark.gpu
@without_gpu
def test_what_is_stored_in_16_bits_runs_in_16_bits_on_a_gpu() -> None:
    engine = load(variant_folder("qwen2-16-bits"), device="cuda")
    assert engine.card.backend == "fused"
    assert isinstance(engine, Generator)
    assert engine.kv_geometry.dtype is torch.bfloat16


@pytest.mark.gpu
@without_gpu
def test_8_bits_are_refused_on_a_gpu() -> None:
    with pytest.raises(ModelLoadError, match="x86 CPUs only"):
        load(variant_folder("llama"), device="cuda", quantize="int8")
