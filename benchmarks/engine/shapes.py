"""Models with random weights and real shapes: speed does not ask what they say."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import load
from tokenizers import Tokenizer, models

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "m1": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "m2": {  # SmolLM2-135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


def load_shape(name: str, *, context_tokens: int = 8192) -> Generator:
    """Return an engine with random weights of the shape `m1` or `m2`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SHAPES[name], max_position_embeddings=context_tokens)
    config.eos_token_id = None
    with tempfile.TemporaryDirectory(prefix=f"tensorwire-{name}-") as folder:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
        wrapper = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        wrapper.save_pretrained(folder)
        engine = load(Path(folder), device="cpu")
    assert isinstance(engine, Generator)
    return engine
