"""Which labels are found, and what is made of that."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tensorwire_server.compress.accuracy import (
    compare_hits,
    find_by_centroid,
    find_by_likelihood,
)
from tensorwire_server.compress.errors import MeasurementError

if TYPE_CHECKING:
    from tensorwire_server.engine.generator import Generator

LABELS = ("list", "the names", "error")
LABELLED = [
    (text, label)
    for text in ("Return a", "Raise an", "Return a list of", "Raised when an")
    for label in LABELS
]


def test_the_label_that_transformers_finds_likeliest_is_the_one_found(
    demo: Generator, plain_demo: Any
) -> None:
    def score(text: str, label: str) -> float:
        start = demo.tokenizer.encode(f"{text} ")
        whole = demo.tokenizer.encode(f"{text} {label}")
        num_shared = next(
            (i for i, pair in enumerate(zip(start, whole, strict=False)) if pair[0] != pair[1]),
            len(start),
        )
        with torch.inference_mode():
            logs = plain_demo(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logs[at - 1, whole[at]]) for at in range(num_shared, len(whole)))

    hits = find_by_likelihood(demo, LABELLED)
    best = {text: max(LABELS, key=lambda label: score(text, label)) for text, _ in LABELLED}
    assert hits == [best[text] == label for text, label in LABELLED]
    assert len(set(best.values())) > 1  # else any order would do


def test_a_label_that_begins_another_is_told_from_it_by_the_end(
    demo: Generator, plain_demo: Any
) -> None:
    def score(text: str, label: str) -> float:
        start, whole = (demo.tokenizer.encode(words) for words in (text, f"{text} {label}"))
        whole = [*whole, *demo.card.eos_ids]
        with torch.inference_mode():
            logs = plain_demo(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logs[at - 1, whole[at]]) for at in range(len(start), len(whole)))

    labels = ("the", "the file")
    texts = ("Return the name of", "Close")
    best = {text: max(labels, key=lambda label: score(text, label)) for text in texts}
    labelled = [(text, label) for text in texts for label in labels]
    assert find_by_likelihood(demo, labelled) == [best[text] == label for text, label in labelled]
    assert "the file" in best.values()  # which never won against its own beginning


def test_without_an_end_such_labels_are_refused(demo: Generator) -> None:
    card = replace(demo.card, eos_ids=frozenset())
    endless: Any = SimpleNamespace(tokenizer=demo.tokenizer, card=card)
    with pytest.raises(MeasurementError, match="beginning of another"):
        find_by_likelihood(endless, [("Take", "1"), ("Take", "1 of")])


def test_each_text_is_told_when_it_is_done(demo: Generator) -> None:
    done: list[None] = []
    find_by_likelihood(demo, LABELLED[:4], on_text=lambda: done.append(None))
    assert len(done) == 4


def test_of_a_text_beyond_the_context_the_end_counts(demo: Generator) -> None:
    long = "else " * 2 * demo.card.context_tokens
    short = [("Return a", "list"), ("Raise an", "error")]
    assert find_by_likelihood(demo, [(long + text, label) for text, label in short]) == [True, True]


def test_a_label_beyond_the_context_is_refused(demo: Generator) -> None:
    label = "word " * 2 * demo.card.context_tokens
    with pytest.raises(MeasurementError, match="longer than the model's context"):
        find_by_likelihood(demo, [("text", label), ("text", "other")])


def test_the_nearest_centroid_leaves_the_text_itself_out() -> None:
    # The last of `a` lies nearest to `b`: only with itself in it `a`'s centroid would win.
    vectors = np.array([[1.0, 0.0], [1.0, 0.1], [0.2, 1.0], [0.0, 1.0], [0.1, 1.0], [0.3, 0.8]])
    labels = ["a", "a", "a", "b", "b", "b"]
    assert find_by_centroid(vectors, labels) == [True, True, False, True, True, True]


def test_a_label_with_one_text_is_never_found() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert find_by_centroid(vectors, ["a", "a", "b"]) == [True, True, False]


def test_lengths_of_vectors_do_not_matter() -> None:
    vectors = np.array([[100.0, 0.0], [1.0, 0.1], [0.0, 0.01], [0.1, 50.0]])
    assert find_by_centroid(vectors, ["a", "a", "b", "b"]) == [True] * 4


def test_the_difference_is_paired() -> None:
    before, after = [True, False] * 10, [True] * 20
    accuracy = compare_hits(before, after, num_labels=2, seed=0)
    assert (accuracy.before.value, accuracy.after.value) == (0.5, 1.0)
    assert accuracy.difference.value == 0.5
    same = compare_hits(before, before, num_labels=2, seed=0)
    assert (same.difference.low, same.difference.high) == (0.0, 0.0)
