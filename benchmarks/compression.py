"""What compression does to the speed of a model of real shape: less of it, or 8 and 4 bits.

python benchmarks/compression.py [--shape m2] [--only int8 layers]

The weights are random, so only speed and size mean anything. Each row is `tensorwire compress` with
its own measurement: parent and result served side by side, asked in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.models import SHAPES, model_folder
from rich.console import Console
from rich.table import Table
from tensorwire_server.compress import Pruning, Quantization, Recipe, Rounding, Structure, compress

if TYPE_CHECKING:
    from tensorwire_server.compress.report import Report

_QUARTER = 0.25
RECIPES = {
    "neurons": Recipe(
        prune=(Pruning(structure=Structure.NEURONS, target=_QUARTER),),
        calibrate="text", num_windows=4, window_tokens=128,
    ),
    "layers": Recipe(
        prune=(Pruning(structure=Structure.LAYERS, target=_QUARTER),),
        calibrate="text", num_windows=4, window_tokens=128,
    ),
    "int8": Recipe(quantize=Quantization(bits=8)),
    "int4": Recipe(quantize=Quantization(bits=4, rounding=Rounding.NEAREST, group_size=32)),
}  # fmt: skip


def main() -> None:
    """Compress, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="m2", choices=sorted(SHAPES))
    parser.add_argument("--only", nargs="*", choices=sorted(RECIPES), default=sorted(RECIPES))
    given = parser.parse_args()
    table = Table("recipe", "load", "before", "after", "ratio (range)", "file", "memory")
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.write_text(Path(__file__).read_text() * 4, encoding="utf-8")
        for name in given.only:
            report = _compress(given.shape, name, text)
            before, after, speed = report.size_before, report.size_after, report.speed
            assert speed is not None
            size = f"{after.file_bytes / before.file_bytes:.2f}x"
            memory = f"{speed.resident_bytes_after / speed.resident_bytes_before:.2f}x"
            for rate in speed.rates:
                table.add_row(
                    name,
                    rate.name,
                    f"{sorted(rate.before)[len(rate.before) // 2]:.1f}",
                    f"{sorted(rate.after)[len(rate.after) // 2]:.1f} {rate.unit}",
                    f"{rate.ratio:.2f} ({min(rate.ratios):.2f}..{max(rate.ratios):.2f})",
                    size,
                    memory,
                )
    Console(width=120).print(table)


def _compress(shape: str, name: str, text: Path) -> Report:
    recipe = RECIPES[name]
    if recipe.calibrate is not None:
        recipe = replace(recipe, calibrate=str(text))
    return compress(model_folder(shape), recipe, text.parent / name)


if __name__ == "__main__":
    main()
