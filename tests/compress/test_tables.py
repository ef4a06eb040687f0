"""A report's numbers in words."""

from __future__ import annotations

import pytest
from tensorwire_server.compress.intervals import Estimate
from tensorwire_server.compress.quality import Quality
from tensorwire_server.compress.tables import (
    fact_table,
    layer_table,
    main_tables,
    short_bytes,
    told,
)

from .samples import encoder_report, text_report


def rows_of(title: str, report: object) -> dict[str, tuple[str, ...]]:
    (table,) = [table for table in main_tables(report) if table.title == title]  # type: ignore[arg-type]
    assert all(len(row) == len(table.heads) for row in table.rows)
    return {row[0]: row[1:] for row in table.rows}


def test_quality_of_a_text_model() -> None:
    assert rows_of("Quality", text_report()) == {
        "perplexity (32704 tokens)": (
            "12.346 (11.500 to 13.250)",
            "13.457 (12.500 to 14.500)",
            "1.0900x (1.0812 to 1.0985)",
        ),
        "KL divergence, nats a token": ("", "0.04321 (0.04010 to 0.04660)", ""),
        "same likeliest next token": ("", "91.12% (90.51% to 91.71%)", ""),
        "greedy answers alike (32 prompts)": ("", "61.20% (55.00% to 67.00%)", ""),
    }


def test_quality_of_an_encoder() -> None:
    assert rows_of("Quality", encoder_report()) == {
        "cosine to the parent (500 texts), mean": ("", "0.99512 (0.99490 to 0.99540)", ""),
        "cosine to the parent (500 texts), 1st percentile": ("", "0.98765", ""),
        "cosine to the parent (500 texts), least": ("", "0.97531", ""),
        "accuracy (300 texts, 4 labels)": (
            "81.0% (76.0% to 85.0%)",
            "77.0% (72.0% to 82.0%)",
            "-4.0% (-6.0% to -2.0%)",
        ),
    }


def test_size() -> None:
    rows = rows_of("Size", text_report())
    assert rows["weight files"] == ("11.8 MB", "3.46 MB", "0.293x")
    assert rows["parameters"] == ("2,953,000", "2,654,321", "0.899x")
    assert rows["memory of the worker, libraries included"] == ("812 MB", "655 MB", "0.807x")
    zeros = sum(matrix.zeros for matrix in text_report().size_after.matrices)
    assert rows["zeros in the blocks' matrices"] == ("0.00%", f"{zeros / 42 / 65536:.2%}", "")
    assert "memory of the worker, libraries included" not in rows_of(
        "Size", text_report(speed=None)
    )


def test_speed_is_the_median_of_the_rounds_and_of_their_ratios() -> None:
    rows = rows_of("Speed", text_report())
    # 152/101, 150/99 and 149/103
    assert rows["decode, 1 stream (tokens/s)"] == ("101", "150", "1.50x (1.45 to 1.52)")
    assert len(rows) == 4


def test_floors_and_pruning() -> None:
    assert rows_of("Floors", text_report()) == {"ppl=1.1x": ("13.58", "13.46", "met")}
    assert rows_of("Pruning", text_report()) == {
        "neurons": ("25.00%", "25.01%", "1")
    }  # fmt: skip


def test_what_was_not_measured_has_no_table() -> None:
    bare = text_report(quality=Quality(), speed=None, floors=(), pruned=())
    assert [table.title for table in main_tables(bare)] == ["Size"]


def test_each_matrix_has_a_row() -> None:
    table = layer_table(text_report())
    assert len(table.rows) == 42
    first = text_report().size_after.matrices[0]
    assert table.rows[0] == (
        "model.layers.0.self_attn.q_proj", "256 x 256", "8", f"{first.sparsity:.2%}", "0.0120",
    )  # fmt: skip
    assert layer_table(text_report(errors=())).rows[0][-1] == "-"


def test_how_it_was_made_is_told() -> None:
    facts = {row[0]: row[1] for row in fact_table(text_report()).rows}
    assert facts["parent"] == "demo@a1b2c3d4a1b2"
    assert facts["prune"] == "neurons 0.25"
    assert facts["quantize"] == "int8, gptq, one scale an output"
    assert facts["quality took"] == "33.5 s"
    assert facts["processor"] == "A Processor <x>"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_400, "999 kB"), (1_234_567, "1.23 MB"),
     (812_000_000, "812 MB"), (98_765_432_100, "98.8 GB")],
)  # fmt: skip
def test_bytes_are_short(count: int, said: str) -> None:
    assert short_bytes(count) == said


def test_an_estimate_has_its_interval_where_there_is_one() -> None:
    assert told(Estimate(value=0.5), ".1%") == "50.0%"
    assert told(Estimate(value=1.5, low=1.25, high=2.0), ".2f", "x") == "1.50x (1.25 to 2.00)"
