"""From a folder or hub name to a running engine, or to one sentence that says why not.

What is read: config.json, tokenizer files, safetensors. What is never run: code that comes with a
model (`auto_map`, pickled weights). For a local folder nothing touches the network.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tensorwire_server.engine import backends, falcon, probe
from tensorwire_server.engine.attention import ATTENTION_NAME
from tensorwire_server.engine.backends import Backend
from tensorwire_server.engine.device import pick_device, pick_dtype
from tensorwire_server.engine.encoder import Encoder
from tensorwire_server.engine.errors import ModelLoadError as ModelLoadError
from tensorwire_server.engine.folder import (
    architecture_of,
    checked_config,
    find_folder,
    first_line,
    read_sentence_folder,
)
from tensorwire_server.engine.fused.linear import has_int8_products
from tensorwire_server.engine.fused.loading import load_fused
from tensorwire_server.engine.fused.stored import StoredWeights
from tensorwire_server.engine.generator import Generator, RaggedModel, Steps, num_parameters
from tensorwire_server.engine.int8_modules import multiply_in_int8
from tensorwire_server.engine.kv_cache import SlotCache
from tensorwire_server.engine.quantized import QuantizationFormat, name_of, read_block
from tensorwire_server.engine.tokenizing import TextTokenizer, load_wrapper
from tensorwire_server.scheduling.work import ModelCard

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from tensorwire_server.engine.backends import Choice

log = logging.getLogger(__name__)

# Beyond a length, their frequencies depend on the longest sequence of the forward pass.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
# How transformers marks what leaves attention to its interface; who does so without the mark.
_INTERFACE_FLAG = "_supports_attention_backend"
_CALLS_INTERFACE_UNFLAGGED = frozenset({"BioGptForCausalLM", "StableLmForCausalLM"})
# Who replaces the attention of classes that compute it themselves.
_OWN_ATTENTION: dict[str, ModuleType] = {"FalconForCausalLM": falcon}
# Where a model states no context at all.
_DEFAULT_CONTEXT_TOKENS = 2048


def load(
    path_or_hub_name: str | os.PathLike[str],
    *,
    device: str = "auto",
    revision: str | None = None,
    context_tokens: int | None = None,
    backend: str = "auto",
    quantize: str = "none",
) -> Generator | Encoder:
    """Load a model and prove that it runs.

    Args:
        path_or_hub_name: an existing folder, else a name on the Hugging Face hub.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        revision: of a hub name.
        context_tokens: an upper bound, where the model could do more.
        backend: `auto`, `any` or `fused`.
        quantize: `none` or `int8`.

    Returns:
        An `ArrayEngine` for a sentence-transformers folder, else a `GenerateEngine`.

    Raises:
        ModelLoadError: with one sentence fit for the person who named the model.
    """
    silence_transformers()
    name = os.fspath(path_or_hub_name)
    try:
        folder = find_folder(name, revision)
        place = pick_device(device)
        if (folder / "modules.json").is_file():
            return _load_encoder(folder, place, context_tokens, backend, quantize)
        return _load_generator(folder, place, context_tokens, backend, quantize)
    except ModelLoadError as error:
        raise ModelLoadError(f"cannot serve {name!r}: {error}") from error.__cause__
    except Exception as error:  # the room's edge: whatever transformers makes of a bad folder
        raise ModelLoadError(f"cannot serve {name!r}: {first_line(error)}") from error


def silence_transformers() -> None:
    """Keep what transformers tells its own users from ours."""
    chatter: Any = transformers.utils.logging
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()


def _load_generator(
    folder: Path, device: torch.device, context_tokens: int | None, backend: str, quantize: str
) -> Generator:
    said = checked_config(folder)
    architecture, quantization = architecture_of(said), read_block(said)
    _check_architecture(architecture)
    choice = backends.choose(
        architecture, asked=backend, quantize=quantize, stored=name_of(quantization)
    )
    wrapper = load_wrapper(folder)
    tokenizer = TextTokenizer(wrapper)
    config = _read_config(folder)
    text_config = config.get_text_config()
    context = served_context(text_config, wrapper, context_tokens)
    _refuse_batch_dependent_rope(text_config, context)
    steps, choice = _load_steps(folder, config, device, context, choice, architecture, quantization)
    generation = _generation_config(folder, config)
    ignored = ignored_settings(generation)
    if ignored:
        log.warning("generation_config_ignored settings=%s", ",".join(ignored))
    tasks = {"generate", "tokenize"} | ({"chat"} if tokenizer.has_chat_template else set())
    card = ModelCard(
        tasks=frozenset(tasks),
        architecture=architecture,
        backend=choice.backend,
        quantization=choice.quantization,
        parameters=steps.num_parameters,
        context_tokens=context,
        vocab_size=steps.vocab_size,
        eos_ids=_eos_ids(generation, wrapper),
        defaults=sampling_defaults(generation),
        resumable_layers=steps.resumable_layers,
    )
    return Generator(steps, tokenizer, card)


def _check_architecture(architecture: str) -> None:
    if architecture not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ModelLoadError(
            f"its architecture {architecture} neither continues text nor is it a "
            "sentence-transformers folder (no modules.json)"
        )
    own_attention = _OWN_ATTENTION.get(architecture)
    if own_attention is None and not _calls_attention_interface(architecture):
        raise ModelLoadError(
            f"its architecture {architecture} has attention of its own, outside of "
            "transformers' attention interface, which is what this engine serves"
        )


def _load_steps(
    folder: Path,
    config: Any,
    device: torch.device,
    context: int,
    choice: Choice,
    architecture: str,
    quantization: QuantizationFormat | None,
) -> tuple[Steps, Choice]:
    """Load the weights; return also what they run in, which may not be what was chosen."""
    if choice.backend is Backend.FUSED:
        dtype = pick_dtype(device, config.dtype)
        try:
            fused = load_fused(
                folder,
                config,
                device=device,
                dtype=dtype,
                context=context,
                int8=choice.rounds_to_int8,
                quantization=quantization,
            )
        except Exception as error:
            if not choice.may_fall_back:
                raise
            # What is wrong with the files, `any` will say as well.
            log.warning("backend_fell_back from=fused to=any reason=%r", first_line(error))
            choice = replace(choice, backend=Backend.ANY)
        else:
            return fused, choice
    return _load_modules(folder, device, context, architecture, quantization), choice


def _load_modules(
    folder: Path,
    device: torch.device,
    context: int,
    architecture: str,
    quantization: QuantizationFormat | None,
) -> RaggedModel:
    own_attention = _OWN_ATTENTION.get(architecture)
    reference = "eager" if own_attention is None else own_attention.REFERENCE
    model = load_weights(
        AutoModelForCausalLM, folder, device, quantization, attn_implementation=reference
    )
    if own_attention is not None:
        own_attention.adapt(model)
    model.set_attn_implementation(ATTENTION_NAME)
    vocab_size = int(model.get_input_embeddings().num_embeddings)
    geometry = probe.inspect(
        model,
        num_layers=int(model.config.get_text_config().num_hidden_layers),
        vocab_size=vocab_size,
        context_tokens=context,
    )
    ragged = RaggedModel(model, SlotCache(geometry, context_tokens=context))
    probe.prove(ragged, model, vocab_size=vocab_size, reference=reference)
    return ragged


def _load_encoder(
    folder: Path, device: torch.device, context_tokens: int | None, backend: str, quantize: str
) -> Encoder:
    said = read_sentence_folder(folder)
    config = checked_config(said.encoder)
    quantization = read_block(config)
    choice = backends.choose(
        architecture_of(config),
        asked=backend,
        quantize=quantize,
        stored=name_of(quantization),
    )
    wrapper = load_wrapper(said.encoder)
    model = load_weights(AutoModel, said.encoder, device, quantization)
    context = encoder_context(model, wrapper, said.max_tokens, context_tokens)
    tokenizer = TextTokenizer(
        wrapper, max_tokens=context, prefix=said.prefix, lower_case=said.lower_case
    )
    card = ModelCard(
        tasks=frozenset({"embed", "tokenize"}),
        architecture=architecture_of(config),
        backend=choice.backend,
        quantization=choice.quantization,
        parameters=num_parameters(model),
        context_tokens=context,
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        embedding_size=int(model.config.hidden_size) * len(said.recipe.pooling),
    )
    if quantization is not None and has_int8_products(device):
        multiply_in_int8(model, StoredWeights(said.encoder, quantization))
    return Encoder(model, tokenizer, card, said.recipe)


# Of transformers' generation config: they change what is generated, and are not had here.
_NOT_HONOURED = (
    "no_repeat_ngram_size", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "num_beams",
    "guidance_scale", "exponential_decay_length_penalty", "watermarking_config",
)  # fmt: skip
_MEANS_NOTHING = (None, False, 0, 0.0, 1, 1.0)


def sampling_defaults(config: GenerationConfig) -> dict[str, Any]:
    """Return what unset sampling options mean: the model's own, greedy unless it samples."""

    def said(name: str, unset: Any) -> Any:
        value = getattr(config, name, None)
        return unset if value is None else value

    sampled = bool(said("do_sample", False))
    banned = [list(word) for word in said("bad_words_ids", [])]
    banned += [[token_id] for token_id in said("suppress_tokens", [])]
    rare = {
        "min_p": float(said("min_p", 0.0)),
        "min_new_tokens": int(said("min_new_tokens", 0)),
        "bad_words": banned,
    }
    repetition_penalty = float(said("repetition_penalty", 1.0))
    return {
        "temperature": float(said("temperature", 1.0)) if sampled else 0.0,
        "top_k": said("top_k", None) or None,
        "top_p": float(said("top_p", 1.0)),
        **({} if repetition_penalty == 1 else {"repetition_penalty": repetition_penalty}),
        **{name: value for name, value in rare.items() if value},
    }


def ignored_settings(config: GenerationConfig) -> list[str]:
    """Return the names of what the generation config asks for and does not get."""
    return [name for name in _NOT_HONOURED if getattr(config, name, None) not in _MEANS_NOTHING]


def _read_config(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if hasattr(config, "quantization_config"):
        # Read by `read_block`; transformers would want a library of its own for it.
        del config.quantization_config
    return config


def _generation_config(folder: Path, config: Any) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def load_weights(
    auto_class: Any,
    folder: Path,
    device: torch.device,
    quantization: QuantizationFormat | None,
    *,
    attn_implementation: str | None = None,
) -> Any:
    """Return transformers' own modules with a folder's weights, complete and of the right shapes.

    Raises:
        ModelLoadError: a weight is missing, or has another shape.
    """
    config = _read_config(folder)
    stored = None if quantization is None else StoredWeights(folder, quantization)
    if stored is not None:
        # Only the class itself takes numbers that its caller has read.
        with torch.device("meta"):
            auto_class = type(auto_class.from_config(config))
    model, info = auto_class.from_pretrained(
        folder if stored is None else None,
        state_dict=None if stored is None else {name: stored.get(name) for name in stored},
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=pick_dtype(device, config.dtype),
        attn_implementation=attn_implementation,
        ignore_mismatched_sizes=True,  # they are refused below, with a name
        output_loading_info=True,
    )
    # transformers would fill the gaps with random numbers. Poolers are never used here.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        raise ModelLoadError(f"its files lack {len(missing)} weights, for example {missing[0]}")
    if info["mismatched_keys"]:
        key, found, wanted = min(info["mismatched_keys"])
        raise ModelLoadError(
            f"its weight {key} has shape {[*found]}, its config.json says {[*wanted]}"
        )
    if stored is not None:
        stored.check_layers(stored.layers_of(model).values())
    return model.to(device).eval().requires_grad_(False)


def _calls_attention_interface(architecture: str) -> bool:
    supported = getattr(getattr(transformers, architecture, None), _INTERFACE_FLAG, False)
    return bool(supported) or architecture in _CALLS_INTERFACE_UNFLAGGED


def _refuse_batch_dependent_rope(config: Any, context_tokens: int) -> None:
    """Refuse frequencies that follow the longest sequence of a forward pass, unless none does."""
    settings = getattr(config, "rope_parameters", None) or {}
    kinds = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    for kind in kinds:
        name = kind.get("rope_type")
        if name in _BATCH_DEPENDENT_ROPE:
            limit = kind.get("original_max_position_embeddings", _stated_context(config))
            if context_tokens > limit:
                raise ModelLoadError(
                    f"beyond {limit} tokens its rope type {name} depends on the batch, which is "
                    f"not supported; it can be served with a context of at most {limit}"
                )


def _stated_context(config: Any) -> int:
    stated = getattr(config, "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else _DEFAULT_CONTEXT_TOKENS


def served_context(config: Any, wrapper: Any, *limits: int | None) -> int:
    """Return how many tokens a model reads at most: the least of all that limits it.

    Args:
        config: of the text model.
        wrapper: its tokenizer, as transformers loaded it.
        limits: what else there is; None is no limit.
    """
    known = [limit for limit in (_stated_context(config), *limits) if limit is not None]
    # Without a limit of its own, transformers' tokenizer says 1e30.
    if wrapper.model_max_length < 1 << 30:
        known.append(int(wrapper.model_max_length))
    return int(min(known))


def encoder_context(model: Any, wrapper: Any, *limits: int | None) -> int:
    """Return how many tokens an encoder reads at most; of its positions some may be reserved."""
    positions = _stated_context(model.config) - _first_position(model)
    return served_context(model.config, wrapper, positions, *limits)


def _first_position(model: Any) -> int:
    """Return where an encoder's positions begin: RoBERTa's family counts from its padding id."""
    for module in model.modules():
        padding_id = getattr(module, "padding_idx", None)
        table = getattr(module, "position_embeddings", None)
        if isinstance(padding_id, int) and isinstance(table, torch.nn.Embedding):
            return padding_id + 1
    return 0


def _eos_ids(config: GenerationConfig, wrapper: Any) -> frozenset[int]:
    eos = config.eos_token_id
    if eos is None:
        eos = wrapper.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
