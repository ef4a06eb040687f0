"""Write a model of `models.py` as llama.cpp reads it. Runs in the peers' own environment.

Usage: python gguf_model.py FOLDER OUT.gguf f32|f16|q8_0
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

TYPES = gguf.GGMLQuantizationType
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    name = name.removeprefix("model.")
    if not name.startswith("layers."):
        stem, _, kind = name.rpartition(".")
        return {"embed_tokens": "token_embd", "norm": "output_norm"}[stem] + "." + kind
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{kind}"


def _interleaved(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows: llama.cpp rotates neighbours of Llama's heads, transformers halves."""
    split = matrix.reshape(num_heads, 2, -1, *matrix.shape[1:])
    return split.swapaxes(1, 2).reshape(matrix.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    said = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {i: text for text, i in said["model"]["vocab"].items()}
    special = {token["id"] for token in said["added_tokens"]}
    vocabulary |= {token["id"]: token["content"] for token in said["added_tokens"]}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary[i] for i in range(vocab_size)])
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL for i in range(vocab_size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in said["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def write(folder: Path, out: Path, kind: str) -> None:
    """Write the model; norms and biases stay float32."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"]  # llama and qwen2 are called the same there
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // num_heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(_FILE_TYPES[kind])
    _add_tokenizer(writer, folder, config["vocab_size"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if architecture == "llama" and "q_proj" in name:
            values = _interleaved(values, num_heads)
        if architecture == "llama" and "k_proj" in name:
            values = _interleaved(values, num_kv_heads)
        type_ = TYPES[kind.upper()] if values.ndim == 2 else TYPES.F32
        writer.add_tensor(
            _gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(values), type_),
            raw_dtype=type_,
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
