"""From texts to what compressors and measurements take: windows of ids, sentences, prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tensorwire_server.compress.quality import Material
from tensorwire_server.compress.recipe import Metric, RecipeError
from tensorwire_server.compress.report import NamedText
from tensorwire_server.compress.text import (
    choose_some,
    cut_windows,
    read_labels,
    read_text,
    refuse_shared,
)
from tensorwire_server.compress.text_quality import CONTINUED_TOKENS
from tensorwire_server.models.manifest import sha256_of

if TYPE_CHECKING:
    from tensorwire_server.compress.parent import Parent
    from tensorwire_server.compress.recipe import Recipe
    from tensorwire_server.compress.text import LabelledText, Text

_NUM_PROMPTS = 32
_PROMPT_TOKENS = 32
_NUM_SENTENCES = 1000
_NUM_LABELLED = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The files of a recipe, read; None: not given."""

    calibration: Text | None
    evaluation: Text | None
    labelled: tuple[LabelledText, ...]
    named: tuple[NamedText, ...]  # the files


def read_texts(recipe: Recipe) -> Texts:
    """Read what a recipe names; no model is needed for that.

    Raises:
        RecipeError: a file cannot be read, is empty, or two have text in common.
    """
    calibration = read_text(recipe.calibrate, "calibration") if recipe.calibrate else None
    evaluation = read_text(recipe.evaluate, "evaluation") if recipe.evaluate else None
    labelled = tuple(read_labels(recipe.labels)) if recipe.labels else ()
    if calibration and evaluation:
        what = f"the evaluation text {evaluation.path!r}"
        refuse_shared(calibration, evaluation.documents, what)
    if calibration and labelled:
        texts = [example.text for example in labelled]
        refuse_shared(calibration, texts, f"the file of labels {recipe.labels!r}")
    named = [
        NamedText(use=use, name=Path(text.path).name, sha256=text.sha256)
        for use, text in (("calibration", calibration), ("evaluation", evaluation))
        if text is not None
    ]
    if recipe.labels:
        file = Path(recipe.labels).expanduser()
        named.append(NamedText(use="labels", name=file.name, sha256=sha256_of(file)))
    return Texts(
        calibration=calibration, evaluation=evaluation, labelled=labelled, named=tuple(named)
    )


def without_folders(recipe: Recipe) -> Recipe:
    """Return a recipe that tells only the names of its files: where they lay is private."""
    return replace(
        recipe,
        calibrate=_name_of(recipe.calibrate),
        evaluate=_name_of(recipe.evaluate),
        labels=_name_of(recipe.labels),
    )


def _name_of(path: str | None) -> str | None:
    return None if path is None else Path(path).name


def refuse_unmeasurable(recipe: Recipe, *, is_encoder: bool) -> None:
    """Make sure that every floor can be measured on this kind of model.

    Raises:
        RecipeError: it cannot.
    """
    for floor in recipe.floors:
        if floor.metric is not Metric.ACCURACY and (floor.metric is Metric.COSINE) != is_encoder:
            kind = "an encoder" if is_encoder else "a text model"
            other = "cosine" if is_encoder else "ppl, kl or agreement"
            raise RecipeError(f"the floor {floor} has no meaning for {kind}; use {other}")


def calibration_of(parent: Parent, texts: Texts, recipe: Recipe) -> list[torch.Tensor] | None:
    """Return windows of ids, (1, T) each; None without a text.

    Raises:
        RecipeError: the text is too short for a single window.
    """
    if texts.calibration is None:
        return None
    length = parent.window_tokens(recipe.window_tokens)
    windows = _windows(parent, texts.calibration, length)
    if not windows:
        raise RecipeError(
            f"the calibration text {texts.calibration.path!r} has less than two tokens; give more"
        )
    chosen = choose_some(windows, recipe.num_windows, recipe.seed)
    return [torch.tensor([window]) for window in chosen]


def evaluation_of(parent: Parent, texts: Texts, recipe: Recipe) -> Material:
    """Return what quality is measured on.

    Raises:
        RecipeError: the text is too short for a single window.
    """
    examples = choose_some(texts.labelled, _NUM_LABELLED, recipe.seed)
    labelled = [(example.text, example.label) for example in examples]
    if texts.evaluation is None:
        return Material(labelled=labelled)
    if parent.is_encoder:
        lines = choose_some(texts.evaluation.lines, _NUM_SENTENCES, recipe.seed)
        return Material(sentences=lines, labelled=labelled)
    length = parent.window_tokens(recipe.window_tokens)
    windows = _windows(parent, texts.evaluation, length)
    if not windows:
        raise RecipeError(
            f"the evaluation text {texts.evaluation.path!r} has less than two tokens; give more"
        )
    windows = choose_some(windows, 2 * recipe.num_windows, recipe.seed)
    # A context that ends within the answer leaves no room for a prompt.
    most = parent.window_tokens(_PROMPT_TOKENS + CONTINUED_TOKENS) - CONTINUED_TOKENS
    prompts = [window[:most] for window in windows] if most > len(parent.start_ids) else []
    return Material(
        windows=windows,
        prompts=choose_some(prompts, _NUM_PROMPTS, recipe.seed),
        labelled=labelled,
    )


def _windows(parent: Parent, text: Text, length: int) -> list[list[int]]:
    if parent.is_encoder:
        return [ids for ids in parent.ids_of_lines(text.lines, length) if len(ids) > 1]
    start = parent.start_ids
    pieces = cut_windows(parent.ids_of(text.documents), length - len(start))
    return [[*start, *piece] for piece in pieces]
