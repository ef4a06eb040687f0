"""Reports as measurements could have made them, with every number another."""

from __future__ import annotations

from typing import Any

from tensorwire_server.compress.accuracy import Accuracy
from tensorwire_server.compress.embedding_quality import EmbeddingQuality
from tensorwire_server.compress.floors import judge
from tensorwire_server.compress.intervals import Estimate
from tensorwire_server.compress.quality import Quality
from tensorwire_server.compress.recipe import (
    Method,
    Pruning,
    Quantization,
    Recipe,
    Rounding,
    Structure,
    parse_floors,
)
from tensorwire_server.compress.report import NamedModel, NamedText, Report
from tensorwire_server.compress.results import LayerError, Pruned, PrunedParameter
from tensorwire_server.compress.sizes import FolderSize, StoredMatrix
from tensorwire_server.compress.speed import Rate, Speed
from tensorwire_server.compress.text_quality import Continuations, TextQuality

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
NUM_BLOCKS = 6


def text_quality(**changes: Any) -> TextQuality:
    facts: dict[str, Any] = {
        "num_windows": 64,
        "num_tokens": 32704,
        "perplexity_before": Estimate(value=12.3456, low=11.5, high=13.25),
        "perplexity_after": Estimate(value=13.4567, low=12.5, high=14.5),
        "perplexity_ratio": Estimate(value=1.09, low=1.0812, high=1.0985),
        "kl": Estimate(value=0.04321, low=0.0401, high=0.0466),
        "agreement": Estimate(value=0.9112, low=0.9051, high=0.9171),
    }
    return TextQuality(**facts | changes)


def speed(**changes: Any) -> Speed:
    facts: dict[str, Any] = {
        "rates": (
            rate("decode, 1 stream", (101.0, 99.0, 103.0), (152.0, 150.0, 149.0)),
            rate("decode, 8 streams", (602.0, 590.0, 611.0), (880.0, 871.0, 905.0)),
            rate("decode, 32 streams", (1210.0, 1190.0, 1250.0), (1490.0, 1502.0, 1440.0)),
            rate("prefill, prompts of 511", (5120.0, 5010.0, 5230.0), (7010.0, 6900.0, 7110.0)),
        ),
        "resident_bytes_before": 812_000_000,
        "resident_bytes_after": 655_000_000,
    }
    return Speed(**facts | changes)


def rate(name: str, before: tuple[float, ...], after: tuple[float, ...]) -> Rate:
    return Rate(name=name, unit="tokens/s", before=before, after=after)


def matrices(bits: int, zeros_percent: int) -> tuple[StoredMatrix, ...]:
    # Less at the ends, where it hurts most, as a global threshold makes it.
    return tuple(
        StoredMatrix(
            name=f"model.layers.{block}.{kind}",
            shape=(256, 256),
            bits=bits,
            zeros=65536 * max(zeros_percent + (place - 3) * 3 - abs(block - 2) * 4, 0) // 100
            if zeros_percent else 0,
        )
        for block in range(NUM_BLOCKS)
        for place, kind in enumerate(KINDS)
    )  # fmt: skip


def text_report(**changes: Any) -> Report:
    """A text model, half of its weights zero and the rest in 8 bits: nothing to be said."""
    quality = Quality(
        text=text_quality(),
        continuations=Continuations(
            num_prompts=32, num_tokens=1024, agreement=Estimate(value=0.612, low=0.55, high=0.67)
        ),
    )
    recipe = Recipe(
        prune=(Pruning(structure=Structure.NEURONS, target=0.25),),
        quantize=Quantization(bits=8, rounding=Rounding.GPTQ),
        calibrate="calibration.txt",
        evaluate="evaluation.txt",
        floors=parse_floors(["ppl=1.10x"]),
    )
    parameter = PrunedParameter(
        name="model.layers.0.mlp.up_proj", before=(1024, 256), after=(768, 256), zeros=7
    )
    facts: dict[str, Any] = {
        "date": "2026-01-02T03:04:05Z",
        "parent": NamedModel(name="demo", revision="a1b2c3d4" * 8),
        "child": NamedModel(name="demo-small", revision="0f1e2d3c" * 8),
        "recipe": recipe,
        "texts": (
            NamedText(use="calibration", name="calibration.txt", sha256="c0ffee" * 10 + "cafe"),
            NamedText(use="evaluation", name="evaluation.txt", sha256="decade" * 10 + "beef"),
        ),
        "pruned": (
            Pruned(
                structure="neurons", target=0.25, achieved=0.2501, met=True,
                parameters=(parameter,), notes=(),
            ),
        ),
        "errors": tuple(
            LayerError(
                name=f"model.layers.{block}.{kind}",
                error=0.012 + 0.004 * place + 0.003 * block * (place % 3),
            )
            for block in range(NUM_BLOCKS)
            for place, kind in enumerate(KINDS)
        ),
        "size_before": FolderSize(
            file_bytes=11_812_000, parameters=2_953_000, zeros=12, matrices=matrices(32, 0)
        ),
        "size_after": FolderSize(
            file_bytes=3_456_000, parameters=2_654_321, zeros=1201, matrices=matrices(8, 40)
        ),
        "quality": quality,
        "speed": speed(),
        "floors": judge(recipe.floors, quality),
        "seconds": {"prune": 12.25, "quality": 33.5, "speed": 61.0},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"processor": "A Processor <x>", "cores": "2"},
    }  # fmt: skip
    return Report(**facts | changes)


def unstructured(**changes: Any) -> Recipe:
    """A recipe that makes zeros."""
    pruning = Pruning(structure=Structure.UNSTRUCTURED, target=0.5, method=Method.WANDA)
    return Recipe(**{"prune": (pruning,), "calibrate": "calibration.txt", **changes})


def encoder_report(**changes: Any) -> Report:
    """An encoder in 8 bits, with a task."""
    quality = Quality(
        embedding=EmbeddingQuality(
            num_texts=500,
            mean=Estimate(value=0.99512, low=0.9949, high=0.9954),
            first_percentile=0.98765,
            least=0.97531,
        ),
        accuracy=Accuracy(
            num_texts=300,
            num_labels=4,
            before=Estimate(value=0.81, low=0.76, high=0.85),
            after=Estimate(value=0.77, low=0.72, high=0.82),
            difference=Estimate(value=-0.04, low=-0.06, high=-0.02),
        ),
    )
    rates = (
        Rate(name="embed, 8 texts", unit="texts/s", before=(50.0, 51.0), after=(120.0, 118.0)),
    )
    facts: dict[str, Any] = {
        "parent": NamedModel(name="minilm", revision="99" * 32),
        "recipe": Recipe(quantize=Quantization(bits=8), evaluate="sentences.txt"),
        "pruned": (),
        "quality": quality,
        "floors": (),
        "speed": speed(rates=rates),
    }
    return text_report(**facts | changes)
