"""The whole of a compression: read, prune, quantize, write, measure, judge, and only then keep."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tensorwire_server.compress.floors import judge
from tensorwire_server.compress.honesty import find_notes
from tensorwire_server.compress.machine import describe_machine, versions
from tensorwire_server.compress.material import (
    calibration_of,
    evaluation_of,
    read_texts,
    refuse_unmeasurable,
    without_folders,
)
from tensorwire_server.compress.originals import Originals
from tensorwire_server.compress.page import render
from tensorwire_server.compress.parent import load_parent
from tensorwire_server.compress.prune import prune_model
from tensorwire_server.compress.quality import measure_quality
from tensorwire_server.compress.quantize import quantize_model, refuse_unquantizable
from tensorwire_server.compress.recipe import Structure, write_recipe
from tensorwire_server.compress.report import NamedModel, Report, to_json
from tensorwire_server.compress.saving import (
    check_place,
    output_folder,
    refuse_inside,
    write_model,
    writing,
)
from tensorwire_server.compress.sizes import read_size
from tensorwire_server.compress.speed import measure_speed
from tensorwire_server.models.manifest import REPORT_FOLDER, revision_of
from tensorwire_server.models.spec import SpecError, parse_spec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import torch

    from tensorwire_server.compress.blocks import OnProgress
    from tensorwire_server.compress.parent import Parent
    from tensorwire_server.compress.recipe import Recipe
    from tensorwire_server.compress.results import LayerError, Pruned
    from tensorwire_server.engine.quantized import QuantizedWeight

    OnStage = Callable[[str, int, int, str], None]  # the stage, done, total, of what

# What goes makes everything after it smaller; what single weights are worth is asked last.
_ORDER = (Structure.LAYERS, Structure.HEADS, Structure.NEURONS, Structure.UNSTRUCTURED)


class FloorMissed(Exception):
    """The result is worse than allowed, and was not kept; `report` says how it was."""

    def __init__(self, report: Report) -> None:
        missed = [str(judgement.floor) for judgement in report.floors if not judgement.is_met]
        super().__init__(f"missed {', '.join(missed)}; nothing was written")
        self.report = report


def compress(
    model: str | os.PathLike[str],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    on_progress: OnStage = lambda *_: None,
) -> Report:
    """Compress a model into a folder, and say what that did to it.

    Args:
        model: a folder, a name on the hub, `demo` or `minilm`. Its files are only read.
        recipe: what is to be done.
        out: the folder to make. It is there when this returns, and not before.
        on_progress: called with the stage, how much of it is done, of how much, and what that is;
            what it raises ends the work, and leaves nothing behind.

    Raises:
        SpecError, RecipeError: what was asked for has no meaning, or not for this model.
        ModelLoadError: the model cannot be loaded.
        MeasurementError: something could not be measured.
        OutputError: the folder cannot be written.
        FloorMissed: the result is worse than the recipe allows; nothing is written.
    """
    out = Path(out)
    check_place(out)
    texts = read_texts(recipe)
    spec = parse_spec(str(model))
    if not spec.has_weights:
        raise SpecError(f"{spec.source!r} has no weights; name a model's folder, or 'demo'")
    stages = _Stages(on_progress)
    with stages.timed("load"):
        parent = load_parent(spec.source)
    source = parent.folder
    refuse_inside(out, source)
    refuse_unmeasurable(recipe, is_encoder=parent.is_encoder)
    if recipe.quantize is not None:
        refuse_unquantizable(parent.model)
    calibration = calibration_of(parent, texts, recipe)
    material = evaluation_of(parent, texts, recipe)
    with output_folder(out) as folder:
        changes = _change(parent, recipe, calibration, stages)
        with stages.timed("write"), writing(out):
            write_model(parent, changes.quantized, recipe.quantize, folder)
        # The measurements load both models themselves.
        del parent
        changes.quantized.clear()
        gc.collect()
        with stages.timed("quality") as step:
            quality = measure_quality(source, folder, material, seed=recipe.seed, on_progress=step)
        floors = judge(recipe.floors, quality)
        speed = None
        if recipe.speed and all(judgement.is_met for judgement in floors):  # what goes has no speed
            with stages.timed("speed") as step:
                speed = measure_speed(source, folder, seed=recipe.seed, on_progress=step)
        report = Report(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            parent=NamedModel(name=spec.name, revision=revision_of(source)),
            child=NamedModel(name=out.name, revision=revision_of(folder)),
            recipe=without_folders(recipe),
            texts=texts.named,
            pruned=tuple(changes.pruned),
            errors=changes.errors,
            size_before=read_size(source),
            size_after=read_size(folder),
            quality=quality,
            speed=speed,
            floors=floors,
            seconds=stages.seconds,
            versions=versions(),
            machine=describe_machine(),
        )
        report = replace(report, notes=find_notes(report))
        if not report.meets_floors:
            raise FloorMissed(report)
        with writing(out):
            _write_report(report, folder / REPORT_FOLDER)
    return report


@dataclass(slots=True)
class _Changes:
    """What was done to the modules of the parent."""

    pruned: list[Pruned] = field(default_factory=list)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    errors: tuple[LayerError, ...] = ()  # of all steps together; none without a text


def _change(
    parent: Parent, recipe: Recipe, calibration: list[torch.Tensor] | None, stages: _Stages
) -> _Changes:
    changes = _Changes()
    originals = None if calibration is None else Originals(parent.model)
    for pruning in sorted(recipe.prune, key=lambda pruning: _ORDER.index(pruning.structure)):
        with stages.timed(f"prune {pruning.structure}") as step:
            changes.pruned.append(
                prune_model(
                    parent.model,
                    pruning.target,
                    structure=pruning.structure,
                    method=pruning.method,
                    scope=pruning.scope,
                    calibration=calibration,
                    on_progress=step,
                )
            )
    if recipe.quantize is not None:
        with stages.timed(f"quantize int{recipe.quantize.bits}") as step:
            quantized = quantize_model(
                parent.model, recipe.quantize, calibration=calibration, on_progress=step
            )
        changes.quantized = quantized.weights
    if originals is not None and calibration is not None:
        with stages.timed("layer errors") as step:
            changes.errors = originals.measure(parent.model, calibration, on_progress=step)
    return changes


def _write_report(report: Report, folder: Path) -> None:
    folder.mkdir()
    (folder / "recipe.toml").write_text(write_recipe(report.recipe), encoding="utf-8")
    (folder / "report.json").write_bytes(to_json(report))
    (folder / "report.html").write_text(render(report), encoding="utf-8")


class _Stages:
    """Tells how far the work is, and keeps how long each part of it took."""

    def __init__(self, on_progress: OnStage) -> None:
        self._on_progress = on_progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[OnProgress]:
        """Give what a stage reports its progress to."""

        whole = 1

        def step(done: int, total: int, what: str) -> None:
            nonlocal whole
            whole = total
            self._on_progress(stage, done, total, what)

        began = time.monotonic()
        self._on_progress(stage, 0, whole, "")
        yield step
        self.seconds[stage] = time.monotonic() - began
        self._on_progress(stage, whole, whole, "")
