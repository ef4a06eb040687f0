"""What is loaded by `fused`, what it costs to be wrong, and when `any` steps in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.fused import loading as fused_loading
from tensorwire_server.engine.fused.model import FusedModel
from tensorwire_server.engine.fused.stored import StoredWeights
from tensorwire_server.engine.generator import Generator, RaggedModel
from tensorwire_server.engine.loading import load

from .variants import variant_folder

if TYPE_CHECKING:
    from collections.abc import Callable

DEMO = Path(fused_loading.__file__).parents[2] / "models" / "builtin" / "demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a good model, for a test to spoil."""
    copy = tmp_path / "spoiled"
    shutil.copytree(variant_folder("llama"), copy)
    return copy


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(weights)
    model.save_pretrained(folder, state_dict=weights)


def test_the_card_names_back_end_and_quantization() -> None:
    for backend, quantize in [("any", "none"), ("fused", "none"), ("fused", "int8")]:
        card = load(DEMO, device="cpu", backend=backend, quantize=quantize).card
        assert (card.backend, card.quantization) == (backend, quantize)
        assert card.parameters == 2_885_888
        assert card.vocab_size == 2048
        assert card.eos_ids == {0}
        assert card.defaults == {"temperature": 0.8, "top_k": None, "top_p": 0.95}


def test_embeddings_stay_in_the_format_they_are_stored_in() -> None:
    engine = load(DEMO, device="cpu")
    assert isinstance(engine, Generator)
    assert isinstance(engine._model, FusedModel)
    assert engine._model._weights.embedding_VC.dtype is torch.bfloat16
    assert engine.kv_geometry.dtype is torch.float32


def test_weights_in_several_files_are_found(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(variant_folder("qwen2"))
    shutil.copytree(variant_folder("qwen2"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert load(tmp_path, device="cpu", backend="fused").card.backend == "fused"


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", 7])
def test_an_index_that_points_elsewhere_is_refused(folder: Path, name: object) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="cannot serve"):
        load(folder, device="cpu", backend="fused")


def drop_a_weight(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda folder: change_weights(folder, drop_a_weight),
            "lack 1 weights, for example model.layers.1.self_attn.q_proj.weight",
        ),
        (
            lambda folder: change_config(folder, intermediate_size=48),
            "has shape [96, 64], its config.json says [48, 64]",
        ),
        (lambda folder: change_config(folder, hidden_act="gelu"), "activation gelu is not silu"),
    ],
)
def test_what_was_asked_for_and_cannot_be_is_refused_in_one_sentence(
    folder: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelLoadError) as caught:
        load(folder, device="cpu", backend="fused")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_fused_back_end_lacks_falls_back_with_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_config(folder, hidden_act="gelu")
    engine = load(folder, device="cpu")
    assert isinstance(engine, Generator)
    assert isinstance(engine._model, RaggedModel)
    assert engine.card.backend == "any"
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert lines == ["backend_fell_back from=fused to=any reason='its activation gelu is not silu'"]


@pytest.fixture
def wrong_by_a_position(monkeypatch: pytest.MonkeyPatch) -> None:
    class OffByOne(FusedModel):
        def positions(self, rows: Any) -> list[int]:
            return [position + (position >= 2) for position in super().positions(rows)]

    monkeypatch.setattr(fused_loading, "FusedModel", OffByOne)


@pytest.mark.usefixtures("wrong_by_a_position")
def test_wrong_logits_fall_back_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    engine = load(variant_folder("qwen3"), device="cpu")
    assert engine.card.backend == "any"
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "its logits differ by" in line


@pytest.mark.usefixtures("wrong_by_a_position")
@pytest.mark.parametrize("options", [{"backend": "fused"}, {"quantize": "int8"}])
def test_wrong_logits_are_refused_where_another_back_end_was_not_asked_for(
    options: dict[str, Any],
) -> None:
    with pytest.raises(ModelLoadError, match="its logits differ by"):
        load(variant_folder("qwen3"), device="cpu", **options)


def test_the_reference_of_the_proof_holds_one_layer_at_a_time() -> None:
    folder = variant_folder("llama")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = fused_loading.streaming(
        config, StoredWeights(folder), torch.device("cpu"), torch.float32
    )
    held: list[int] = []

    def count(*_: object) -> None:
        held.append(sum(not p.is_meta for layer in model.model.layers for p in layer.parameters()))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(count)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    in_one_layer = len([*model.model.layers[0].parameters()])
    assert held == [in_one_layer] * 3
    count()
    assert held[-1] == 0
