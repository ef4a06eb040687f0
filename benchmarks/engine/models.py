"""Models of real shapes with random weights, written once into .cache/bench-engine.

Their answers mean nothing; how long they take does not depend on that. Weights are drawn small, so
that nothing overflows. The tokenizer is the demo's, and every id beyond it has a text as well: a
token without any costs less to turn to text and to send than those of real models.
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
_CONTEXT_TOKENS = 8192

# M1: what overhead costs. M2: SmolLM2-135M. M3: Qwen2.5-0.5B.
SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": lambda: transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=_CONTEXT_TOKENS,
        tie_word_embeddings=True,
    ),
    "m1": lambda: transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=_CONTEXT_TOKENS,
        tie_word_embeddings=True,
    ),
    "m2": lambda: transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=_CONTEXT_TOKENS,
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
        max_position_embeddings=_CONTEXT_TOKENS,
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
    _write_tokenizer(folder, config.vocab_size)
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    shutil.copy(_DEMO / "chat_template.jinja", folder)
    said = json.loads((_DEMO / "tokenizer_config.json").read_text())
    said["model_max_length"] = _CONTEXT_TOKENS
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = json.loads((_DEMO / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    # No merge makes them, so prompts stay what they are.
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def load_model(name: str) -> Generator:
    """Return an engine in this process for a model of `SHAPES`."""
    engine = load(model_folder(name), device="cpu")
    assert isinstance(engine, Generator)
    return engine
