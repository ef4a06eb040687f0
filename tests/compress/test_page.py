"""The page, and what a real browser makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

import pytest
from browser import CHROMIUM, opened
from tensorwire_server.compress.floors import judge
from tensorwire_server.compress.page import render
from tensorwire_server.compress.quality import Quality
from tensorwire_server.compress.recipe import parse_floors
from tensorwire_server.compress.report import NamedModel
from tensorwire_server.compress.speed import Rate
from tensorwire_server.compress.tables import fact_table, layer_table, main_tables

from .samples import encoder_report, speed, text_report

if TYPE_CHECKING:
    from pathlib import Path

TRADE = "Quality against size and speed"
SPEED = "Speed of the result relative to its parent"
ZEROS = "Zeros of each matrix"
ERRORS = "Sensitivity: error of each matrix&#x27;s output"


def plots(page: str) -> list[str]:
    return re.findall(r'<svg class="plot" role="img" aria-label="([^"]*)"', page)


@pytest.mark.parametrize("report", [text_report(), encoder_report()], ids=["text", "encoder"])
def test_every_number_of_the_tables_is_on_the_page(report: object) -> None:
    page = re.sub("</?(small|b)>", "", render(report))  # type: ignore[arg-type]
    tables = [*main_tables(report), layer_table(report), fact_table(report)]  # type: ignore[arg-type]
    for table in tables:
        assert escape(table.title) in page
        for row in table.rows:
            assert "".join(f"<td>{escape(cell)}</td>" for cell in row) in page


def test_it_begins_with_the_numbers_that_matter() -> None:
    shown = re.findall(r"<div><b>([^<]*)</b><span>([^<]*)</span></div>", render(text_report()))
    assert shown == [
        ("1.0900x", "perplexity"),
        ("91.1%", "same next token as the parent"),
        ("0.293x", "weight files, now 3.46 MB"),
        ("1.48x", "speed (decode, 8 streams)"),
    ]


def test_rounds_that_disagree_are_no_gain() -> None:
    same = Rate(name="decode, 8 streams", unit="tokens/s", before=(1.0, 9.0), after=(6.0, 2.0))
    page = render(text_report(speed=speed(rates=(same,))))
    assert "<b>no difference</b><span>speed (decode, 8 streams)</span>" in page


def test_kinds_of_matrices_look_the_same_in_every_figure() -> None:
    report = text_report()
    mixed = render(replace(report, errors=report.errors[::-1]))
    assert plots(mixed) == plots(render(report))
    assert mixed == render(report)


def test_there_is_a_plot_for_all_that_was_measured() -> None:
    assert plots(render(text_report())) == [TRADE, SPEED, ZEROS, ERRORS]
    assert plots(render(text_report(speed=None))) == ["Quality against size", ZEROS, ERRORS]
    assert plots(render(text_report(quality=Quality(), errors=()))) == [SPEED, ZEROS]


def test_matrices_without_zeros_need_no_plot() -> None:
    report = text_report()
    dense = tuple(replace(matrix, zeros=0) for matrix in report.size_after.matrices)
    bare = replace(report, size_after=replace(report.size_after, matrices=dense))
    assert plots(render(bare)) == [TRADE, SPEED, ERRORS]


def test_plots_do_not_share_names() -> None:
    page = render(text_report())
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names)) > 20
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', page)
    assert used
    assert set(used) <= set(names)


def test_the_same_report_gives_the_same_page() -> None:
    assert render(text_report()) == render(text_report())


def test_what_is_said_against_it_is_shown_and_escaped() -> None:
    report = text_report(
        notes=("Less <b>than</b> it seems.",), parent=NamedModel(name="<script>", revision="0" * 64)
    )
    page = render(report)
    assert "<li>Less &lt;b&gt;than&lt;/b&gt; it seems.</li>" in page
    assert "<script" not in page
    assert "A Processor &lt;x&gt;" in page
    assert "What to know" not in render(text_report())


def test_a_missed_floor_is_said_at_the_top() -> None:
    report = text_report()
    missed = replace(report, floors=judge(parse_floors(["ppl=1.01x"]), report.quality))
    assert "Floor missed:</b> ppl=1.01x" in render(missed)
    assert "Floor missed" not in render(report)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_a_browser_shows_every_plot_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    page = render(text_report(notes=("A note.",)))
    document, asked = opened(page, tmp_path)
    assert [name.replace("'", "&#x27;") for name in plots(document)] == plots(page)
    assert document.count("<path") == page.count("<path") > 50
    assert document.count("<td>") == page.count("<td>")
    assert asked == []
    # The same page would have asked, had anything in it pointed anywhere.
    leaky = page.replace("<h1>", '<img src="http://page.test/x.png"><h1>')
    unguarded = re.sub(r"<meta http-equiv[^>]*>", "", leaky)
    assert opened(leaky, tmp_path)[1] == []
    assert len(opened(unguarded, tmp_path)[1]) >= 1
