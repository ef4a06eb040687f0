"""Models of real shapes with random weights, written once into .cache/bench-engine.

Their answers mean nothing; how long they take does not depend on that. Weights are drawn small, so
that nothing overflows, and the tokenizer is the demo's, whose ids are a part of each vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorwire_server
import torch
import transformers
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import load

if TYPE_CHECKING:
    from collections.abc import Callable

CACHE = Path(__file__).parents[2] / ".cache" / "bench-engine"
_DEMO = Path(tensorwire_server.__file__).parent / "models" / "builtin" / "demo"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# M1: what overhead costs. M2: SmolLM2-135M. M3: Qwen2.5-0.5B.
SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": lambda: transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "m1": lambda: transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "m2": lambda: transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    ),
    "m3": lambda: transformers.Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    ),
}


def model_folder(name: str) -> Path:
    """Return the folder of a model of `SHAPES`; the first call writes it."""
    folder = CACHE / name
    if (folder / "model.safetensors").is_file():
        return folder
    config = SHAPES[name]()
    # The demo's tokenizer knows no stop token that these models could be told apart by.
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 0, 1
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in _TOKENIZER_FILES:
        shutil.copy(_DEMO / file, folder / file)
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def load_model(name: str) -> Generator:
    """Return an engine in this process for a model of `SHAPES`."""
    engine = load(model_folder(name), device="cpu")
    assert isinstance(engine, Generator)
    return engine
