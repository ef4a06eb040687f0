"""A whole compression: what is written serves as it was measured, and nothing half done is left."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models_zoo
import numpy as np
import pytest
import sentence_transformers
import torch
from safetensors import safe_open
from tensorwire_server.compress import (
    Floor,
    FloorMissed,
    Method,
    Metric,
    Pruning,
    Quantization,
    Recipe,
    RecipeError,
    Rounding,
    Structure,
    compress,
)
from tensorwire_server.compress.recipe import parse_recipe
from tensorwire_server.compress.report import from_json
from tensorwire_server.compress.saving import OutputError
from tensorwire_server.compress.scoring import continue_greedily
from tensorwire_server.compress.text import read_text
from tensorwire_server.engine.loading import load
from tensorwire_server.engine.quantized import read_block, unpack
from tensorwire_server.models.manifest import revision_of
from tensorwire_server.models.spec import SpecError
from transformers import AutoModelForCausalLM, AutoTokenizer

from .demo_text import CALIBRATION_UNITS, DEMO, EVALUATION_UNITS, write_text
from .interrupting import children

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

PROMPT = "Return a list of"
WANDA = Pruning(structure=Structure.UNSTRUCTURED, target=0.5, method=Method.WANDA)
INT4 = Quantization(bits=4, rounding=Rounding.GPTQ, group_size=32)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """A compression collects garbage several times, each time among all that these tests hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("texts")
    return {
        "calibrate": write_text(folder / "calibrate.txt", CALIBRATION_UNITS),
        "evaluate": write_text(folder / "evaluate.txt", EVALUATION_UNITS),
    }


def small(texts: dict[str, Any], **recipe: Any) -> Recipe:
    return Recipe(**texts, num_windows=8, window_tokens=128, speed=False, **recipe)


def stored_zeros(folder: Path) -> dict[str, tuple[int, int]]:
    """Count zeros in the file, by names that are listed here and nowhere else."""
    counted = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for layer in range(4):
            for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate",
                         "mlp.up", "mlp.down"):  # fmt: skip
                name = f"model.layers.{layer}.{part}_proj.weight"
                tensor = file.get_tensor(name)
                counted[name] = (int((tensor == 0).sum()), tensor.numel())
    return counted


def test_sparsity_is_what_the_written_file_holds(tmp_path: Path, texts: dict[str, Any]) -> None:
    report = compress("demo", small(texts, prune=(WANDA,)), tmp_path / "out")
    counted = stored_zeros(tmp_path / "out")
    for zeros, size in counted.values():
        assert zeros / size == pytest.approx(0.5, abs=1e-3)
    (pruned,) = report.pruned
    told = {parameter.name: parameter.zeros for parameter in pruned.parameters}
    assert told == {name: zeros for name, (zeros, _) in counted.items()}
    assert pruned.met
    assert report.size_after.zeros >= sum(zeros for zeros, _ in counted.values())
    assert any(
        "they make neither the files nor the memory smaller" in note for note in report.notes
    )


@pytest.mark.parametrize(
    "recipe",
    [
        {"prune": (WANDA,)},
        {"prune": (Pruning(structure=Structure.NEURONS, target=0.25),)},
        {"prune": (Pruning(structure=Structure.HEADS, target=0.5),)},
        {"prune": (Pruning(structure=Structure.LAYERS, target=0.25),)},
        {"prune": (WANDA,), "quantize": INT4},
        {"quantize": INT4},
    ],
    ids=["wanda", "neurons", "heads", "layers", "wanda-int4", "int4"],
)
def test_what_is_written_is_served_with_the_same_answers(
    tmp_path: Path, texts: dict[str, Any], recipe: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    compress("demo", small(texts, **recipe), out)
    model = plain(out)
    ids = AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :].tolist()
    engine: Any = load(out, device="cpu")
    assert continue_greedily(engine, [ids[0].tolist()], len(wanted)) == [wanted]


def plain(folder: Path) -> Any:
    """Return transformers' own model of a folder; integers are multiplied out by this test."""
    config = json.loads((folder / "config.json").read_text())
    form = read_block(config)
    if form is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        state = {name: file.get_tensor(name).float() for name in names if "weight_" not in name}
        for name in {name.rpartition(".")[0] for name in names if "weight_" in name}:
            weight = unpack(form, file.get_tensor, name)
            scales = weight.scales_OG.repeat_interleave(form.group_size or 1, dim=1)
            state[f"{name}.weight"] = (
                weight.values_OI.float() * scales[:, : weight.values_OI.shape[1]]
            )
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sentences") / "sentences.txt"
    lines = read_text(write_text(path, EVALUATION_UNITS, num_documents=300), "test").lines
    path.write_text("\n".join(lines[:500]))
    assert len(lines) > 500
    return str(path)


def test_minilm_in_8_bits_keeps_its_vectors(tmp_path: Path, sentences: str) -> None:
    recipe = Recipe(quantize=Quantization(bits=8), evaluate=sentences, speed=False)
    report = compress("minilm", recipe, tmp_path / "out")
    cosine = report.quality.embedding
    assert cosine is not None
    assert cosine.num_texts == 500
    assert cosine.mean.value >= 0.99
    assert report.size_after.file_bytes < 0.75 * report.size_before.file_bytes


def test_an_encoder_with_fewer_neurons_embeds_as_sentence_transformers_does(
    tmp_path: Path, texts: dict[str, Any], sentences: str
) -> None:
    out = tmp_path / "out"
    recipe = Recipe(
        prune=(Pruning(structure=Structure.NEURONS, target=0.25),),
        calibrate=texts["calibrate"],
        evaluate=sentences,
        num_windows=8,
        speed=False,
    )
    report = compress("minilm", recipe, out)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 1152
    assert report.quality.embedding is not None
    assert report.quality.embedding.mean.value >= 0.9
    some = read_text(sentences, "test").lines[:16]
    wanted = sentence_transformers.SentenceTransformer(str(out), device="cpu").encode(some)
    engine: Any = load(out, device="cpu")
    found = engine.run([engine.tokenizer.encode(text) for text in some])
    np.testing.assert_allclose(np.stack(found), wanted, rtol=0, atol=1e-5)


def test_errors_of_layers_are_those_of_all_steps_together(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    nine_tenths = Pruning(structure=Structure.UNSTRUCTURED, target=0.9)
    recipe = small(texts, prune=(nine_tenths,), quantize=Quantization(bits=8))
    report = compress("demo", recipe, tmp_path / "out")
    assert len(report.errors) == 4 * 7
    assert min(error.error for error in report.errors) > 0.1  # int8 alone would make some 0.005


def test_structures_are_as_small_as_was_asked(tmp_path: Path, texts: dict[str, Any]) -> None:
    prune = (
        Pruning(structure=Structure.NEURONS, target=0.25),
        Pruning(structure=Structure.HEADS, target=0.5),
        Pruning(structure=Structure.LAYERS, target=0.25),
    )
    report = compress("demo", small(texts, prune=prune), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[key] for key in keys] == [3, 2, 1, 384]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes["model.layers.2.mlp.down_proj.weight"] == [256, 384]
    assert shapes["model.layers.2.self_attn.q_proj.weight"] == [128, 256]
    assert "model.layers.3.mlp.down_proj.weight" not in shapes
    assert {pruned.structure: pruned.achieved for pruned in report.pruned} == {
        "layers": 0.25, "heads": 0.5, "neurons": 0.25,
    }  # fmt: skip
    # 3 of 4 layers, half of their heads, 3 of 4 neurons; the embeddings stay, and are stored once.
    assert report.size_after.file_bytes < 0.6 * report.size_before.file_bytes


def test_the_folder_says_what_was_done_and_can_be_made_again(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    recipe = small(texts, prune=(WANDA,), quantize=INT4)
    report = compress("demo", recipe, tmp_path / "one")
    kept = tmp_path / "one" / "compression"
    assert sorted(path.name for path in kept.iterdir()) == [
        "recipe.toml", "report.html", "report.json",
    ]  # fmt: skip
    assert from_json((kept / "report.json").read_bytes()) == report
    told = [(text.use, text.name, text.sha256) for text in report.texts]
    assert told == [
        (
            use,
            f"{use.removesuffix('ion')}e.txt",
            hashlib.sha256(Path(texts[key]).read_bytes()).hexdigest(),
        )
        for use, key in (("calibration", "calibrate"), ("evaluation", "evaluate"))
    ]
    for file in kept.iterdir():  # where the texts lay is nobody's business
        assert str(Path(texts["calibrate"]).parent) not in file.read_text()
    told_again = replace(parse_recipe((kept / "recipe.toml").read_text()), **texts)
    again = compress("demo", told_again, tmp_path / "two")
    assert again.child.revision == report.child.revision == revision_of(tmp_path / "two")
    assert report.parent.revision == revision_of(DEMO)


def test_a_missed_floor_writes_nothing_and_says_how_far_it_was(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    floor = Floor(metric=Metric.PERPLEXITY, limit=1.0001, relative=True)
    with pytest.raises(FloorMissed, match=r"missed ppl=1\.0001x; nothing was written") as caught:
        compress("demo", small(texts, prune=(WANDA,), floors=(floor,)), tmp_path / "out")
    (judgement,) = caught.value.report.floors
    assert judgement.found is not None
    assert judgement.found > judgement.limit
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_at_any_of_fifty_points_leaves_nothing_and_the_parent_as_it_was(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    parent = models_zoo.tiny_model("llama")
    before = revision_of(parent)
    recipe = Recipe(
        **texts,
        prune=(Pruning(structure=Structure.NEURONS, target=0.25), WANDA),
        quantize=Quantization(bits=4, rounding=Rounding.GPTQ, group_size=8),
        num_windows=16,
        window_tokens=32,
        speed=False,
    )
    calls: list[str] = []
    compress(parent, recipe, tmp_path / "whole", on_progress=lambda stage, *_: calls.append(stage))
    assert len(calls) >= 50
    points = sorted({round(i * (len(calls) - 1) / 49) for i in range(50)})
    assert len(points) == 50
    points += [i for i, stage in enumerate(calls) if stage == "write" and i not in points]
    for point in points:
        count = itertools.count()

        def interrupt(*_: object, count: Any = count, point: int = point) -> None:
            if next(count) == point:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(parent, recipe, tmp_path / "out", on_progress=interrupt)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"], calls[point]
    assert revision_of(parent) == before


def test_an_interrupt_while_speed_is_measured_leaves_no_server(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, *_: object) -> None:
        if stage == "speed" and done:
            assert children() - before, "no server runs"
            raise KeyboardInterrupt

    before = children()
    recipe = Recipe(quantize=Quantization(bits=8))
    with pytest.raises(KeyboardInterrupt):
        compress(models_zoo.tiny_model("llama"), recipe, tmp_path / "out", on_progress=interrupt)
    assert children() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("too_large", ["tokenizer.json", "report.html"])
def test_a_full_disk_is_one_sentence_whatever_did_not_fit(tmp_path: Path, too_large: str) -> None:
    """No file may grow beyond a limit, which the system reports as it does a full disk."""
    parent = models_zoo.tiny_model("llama")
    recipe = Recipe(quantize=Quantization(bits=8), speed=False)
    compress(parent, recipe, tmp_path / "whole")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole").rglob("*.*")}
    limit = sizes[too_large] - 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match="the disk is full"):
            compress(parent, recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_folder_of_the_parent_is_no_place_for_the_result(tmp_path: Path) -> None:
    parent = shutil.copytree(models_zoo.tiny_model("llama"), tmp_path / "parent")
    (tmp_path / "link").symlink_to(parent)
    recipe = Recipe(quantize=Quantization(bits=8), speed=False)
    for out in (parent / "out", parent / "a" / "b", tmp_path / "link" / "out"):
        with pytest.raises(OutputError, match="lies in the folder of the model itself"):
            compress(parent, recipe, out)
    assert revision_of(parent) == revision_of(models_zoo.tiny_model("llama"))


def test_an_engine_without_weights_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(quantize=Quantization(bits=8), speed=False)
    with pytest.raises(SpecError, match="'oracle:step_ms=5' has no weights"):
        compress("oracle:step_ms=5", recipe, tmp_path / "out")


def test_what_is_there_is_never_replaced(tmp_path: Path, texts: dict[str, Any]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        compress("demo", small(texts, quantize=Quantization(bits=8)), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_floor_that_has_no_meaning_for_the_model_is_refused(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    floor = Floor(metric=Metric.COSINE, limit=0.99)
    with pytest.raises(RecipeError, match="no meaning for a text model; use ppl"):
        compress("demo", small(texts, prune=(WANDA,), floors=(floor,)), tmp_path / "out")


def test_a_model_that_is_quantized_already_is_refused(
    tmp_path: Path, texts: dict[str, Any]
) -> None:
    recipe = small(texts, quantize=Quantization(bits=8))
    compress("demo", recipe, tmp_path / "once")
    with pytest.raises(Exception, match="quantized already; compress the model that it was made"):
        compress(tmp_path / "once", recipe, tmp_path / "twice")
