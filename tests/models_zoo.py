"""Tiny random models of five families that can tell right from wrong.

Freshly initialised transformers tend to repeat one token whatever the prompt is, so that a broken
engine would still agree with them. Here weights are large, embeddings are not tied, and projections
of queries and keys are larger still: attention is peaky and depends on positions, and greedy output
wanders through the vocabulary. `test_models_zoo.py` checks that it does.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from collections.abc import Callable

FAMILIES = ("llama", "qwen2", "gpt2", "gemma", "opt")
CONTEXT_TOKENS = 320
VOCAB_SIZE = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"

_TEXT = """The quick brown fox jumps over the lazy dog. A server holds models and batches what
arrives; a client asks and waits. Numbers: 1, 2, 3, 42. Größe, naïve, 日本語, emoji 🙂."""

CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{ raise_exception('unknown role ' + message['role']) }}
{%- endif -%}
<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE: any text round-trips, and most characters beyond ASCII are split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Like sentencepiece: words carry a leading mark, unknown characters fall back to bytes."""
    pieces = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "▁the", "▁cat", "▁sat", "▁on", "▁mat", "the", "cat", ",", "."]
    vocabulary = [(piece, 0.0) for piece in pieces] + [(word, -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", BOS, EOS])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, *, chat: bool = True) -> None:
    """Write a tokenizer as transformers expects it."""
    wrapper = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    if chat:
        wrapper.chat_template = CHAT_TEMPLATE
    wrapper.save_pretrained(folder)


def _llama_like(config_class: type[Any], **more: Any) -> Any:
    return config_class(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        **_COMMON,
        **more,
    )


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama_like(transformers.LlamaConfig),
    "qwen2": lambda: _llama_like(transformers.Qwen2Config),
    "gemma": lambda: _llama_like(transformers.GemmaConfig, head_dim=24),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=CONTEXT_TOKENS, **_COMMON
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        word_embed_proj_dim=64,
        **_COMMON,
    ),
}


def _randomise(model: Any, seed: int) -> None:
    """Give every matrix gains near one, and attention twice that, so that nothing fades out."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            if not name.endswith("norm.weight") and "ln_" not in name:
                parameter.data = 0.1 * noise  # biases; norms keep their ones
            continue
        if "embed" in name or "wte" in name or "wpe" in name:
            # Gemma multiplies its embeddings by sqrt(hidden size): undone, or the last token alone
            # would decide what follows.
            parameter.data = noise / getattr(model.get_input_embeddings(), "scalar_embed_scale", 1)
            continue
        # Linear is (out, in), GPT-2's Conv1D is (in, out).
        inputs = parameter.shape[0] if "c_" in name else parameter.shape[1]
        gain = 2.0 if any(mark in name for mark in ("q_proj", "k_proj", "c_attn")) else 1.0
        parameter.data = gain * noise * inputs**-0.5


# Of the first seeds, one with which no family falls into a short loop and some sequences meet EOS.
_SEED = 2


def write_model(folder: Path, family: str, *, seed: int = _SEED) -> Path:
    """Write a tiny model of one family with its tokenizer; returns the folder."""
    config = _CONFIGS[family]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomise(model, seed)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    save_tokenizer(folder, byte_level_tokenizer())
    return folder


@cache
def tiny_model(family: str) -> Path:
    """Return the folder of a tiny model, written once per process."""
    root = Path(tempfile.mkdtemp(prefix=f"tensorwire-zoo-{family}-"))
    return write_model(root / f"tiny-{family}", family)
