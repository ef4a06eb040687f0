"""Tiny random models of every family, which can tell right from wrong.

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

# What a test takes that wants several families, but not all of them.
FAMILIES = ("llama", "qwen2", "gpt2", "gemma", "opt")
# Windows that the shortest mixed requests pass.
WINDOW_TOKENS = 24
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


def _mixture(config_class: type[Any], **more: Any) -> Any:
    return _llama_like(
        config_class, num_experts_per_tok=2, moe_intermediate_size=48, num_experts=4, **more
    )


def _falcon(**more: Any) -> Any:
    return transformers.FalconConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        **_COMMON,
        **more,
    )


# Layers of both kinds, and a window's first layer neither first nor last of the model.
_MIXED = ["full_attention", "sliding_attention", "full_attention"]

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
    "qwen2-mixed": lambda: _llama_like(
        transformers.Qwen2Config,
        use_sliding_window=True,
        sliding_window=WINDOW_TOKENS,
        layer_types=_MIXED,
    ),
    "qwen3": lambda: _llama_like(transformers.Qwen3Config, head_dim=24),
    "mistral": lambda: _llama_like(transformers.MistralConfig, sliding_window=WINDOW_TOKENS),
    "gemma2": lambda: _llama_like(
        transformers.Gemma2Config,
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW_TOKENS,
        layer_types=_MIXED,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": lambda: _llama_like(
        transformers.Gemma3TextConfig,
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW_TOKENS,
        layer_types=_MIXED,
    ),
    "phi3": lambda: _llama_like(transformers.Phi3Config, sliding_window=WINDOW_TOKENS),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        **_COMMON,
    ),
    "falcon": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "falcon-multi-query": lambda: _falcon(multi_query=True, alibi=False, bias=True),
    "falcon-alibi": lambda: _falcon(multi_query=False, alibi=True, parallel_attn=False, bias=True),
    "stablelm": lambda: _llama_like(transformers.StableLmConfig),
    "stablelm-normed": lambda: _llama_like(
        transformers.StableLmConfig, qk_layernorm=True, use_parallel_residual=True
    ),
    "olmo2": lambda: _llama_like(transformers.Olmo2Config),
    "granite": lambda: _llama_like(
        transformers.GraniteConfig,
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
        residual_multiplier=0.7,
        logits_scaling=0.5,
    ),
    "mixtral": lambda: _mixture(transformers.MixtralConfig, sliding_window=WINDOW_TOKENS),
    "qwen2-moe": lambda: _mixture(
        transformers.Qwen2MoeConfig, shared_expert_intermediate_size=48, norm_topk_prob=True
    ),
    "phi": lambda: _llama_like(transformers.PhiConfig),
    "cohere": lambda: _llama_like(transformers.CohereConfig, logit_scale=1.0),
    "gpt-oss": lambda: _mixture(
        transformers.GptOssConfig,
        head_dim=16,
        sliding_window=WINDOW_TOKENS,
        layer_types=_MIXED,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
EVERY_FAMILY = tuple(_CONFIGS)


def _randomise(model: Any, seed: int) -> None:
    """Give every matrix gains near one, and attention twice that, so that nothing fades out."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        module_name, _, kind = name.rpartition(".")
        module = modules[module_name]
        if "Norm" in type(module).__name__ and kind == "weight":
            # Norms keep their ones (Gemma's: zeros); of queries and keys they set the gain.
            if any(mark in name for mark in _OF_QUERIES_AND_KEYS):
                parameter.data += 1.0
        elif isinstance(module, torch.nn.Embedding):
            # Gemma multiplies its embeddings by sqrt(hidden size): undone, or the last token alone
            # would decide what follows.
            parameter.data = noise / getattr(model.get_input_embeddings(), "scalar_embed_scale", 1)
        elif kind == "sinks":
            parameter.data = 2 * noise
        elif parameter.ndim < 2 or "bias" in kind:
            parameter.data = 0.1 * noise
        else:
            gain = 2.0 if any(mark in name for mark in _OF_QUERIES_AND_KEYS) else 1.0
            parameter.data = gain * noise * _num_inputs(module, parameter) ** -0.5


_OF_QUERIES_AND_KEYS = (
    *("q_proj", "k_proj", "c_attn", "qkv_proj", "query_key_value"),
    *("q_norm", "k_norm", "q_layernorm", "k_layernorm"),
)


def _num_inputs(module: torch.nn.Module, matrix: torch.Tensor) -> int:
    """Linear is (…, out, in); GPT-2's Conv1D and GPT-OSS's experts are (…, in, out)."""
    transposed = type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False)
    return matrix.shape[-2] if transposed else matrix.shape[-1]


def _discourage_repetition(model: Any) -> None:
    """Make what a token stands for speak against that token.

    Where a key's place changes little (ALiBi), a token repeated is soon all that there is to see.
    """
    embeddings = model.get_input_embeddings().weight.data
    head = model.get_output_embeddings().weight
    head.data -= 4 * embeddings / embeddings.norm(dim=1, keepdim=True)


# Seeds with which no family falls into a short loop; with most, some sequences meet EOS.
_SEED = 2
_SEEDS = {"gemma2": 6, "gpt-neox": 3, "falcon-multi-query": 3, "falcon-alibi": 23}


def write_model(folder: Path, family: str, *, seed: int | None = None) -> Path:
    """Write a tiny model of one family with its tokenizer; returns the folder."""
    config = _CONFIGS[family]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomise(model, _SEEDS.get(family, _SEED) if seed is None else seed)
    if family == "falcon-alibi":
        _discourage_repetition(model)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    save_tokenizer(folder, byte_level_tokenizer())
    return folder


@cache
def tiny_model(family: str) -> Path:
    """Return the folder of a tiny model, written once per process."""
    root = Path(tempfile.mkdtemp(prefix=f"tensorwire-zoo-{family}-"))
    return write_model(root / f"tiny-{family}", family)
