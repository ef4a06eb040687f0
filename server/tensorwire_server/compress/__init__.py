"""Compression: prune, quantize, and measure what that did.

    from tensorwire_server.compress import Pruning, Recipe, compress

    report = compress("demo", Recipe(prune=(Pruning(...),), evaluate="text.txt"), out="smaller")

Torch comes with the first use of a name, not with the import: `tensorwire --help` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tensorwire_server.compress.recipe import (
    Floor,
    Method,
    Metric,
    Pruning,
    Quantization,
    Recipe,
    RecipeError,
    Rounding,
    Scope,
    Structure,
)

if TYPE_CHECKING:
    from tensorwire_server.compress.pipeline import FloorMissed, compress
    from tensorwire_server.compress.prune import prune_model
    from tensorwire_server.compress.quantize import quantize_model
    from tensorwire_server.compress.report import Report

__all__ = [
    "Floor",
    "FloorMissed",
    "Method",
    "Metric",
    "Pruning",
    "Quantization",
    "Recipe",
    "RecipeError",
    "Report",
    "Rounding",
    "Scope",
    "Structure",
    "compress",
    "prune_model",
    "quantize_model",
]

_ROOM = __name__
_WHERE = {
    "FloorMissed": "pipeline",
    "compress": "pipeline",
    "prune_model": "prune",
    "quantize_model": "quantize",
    "Report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {_ROOM!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{_ROOM}.{_WHERE[name]}"), name)
