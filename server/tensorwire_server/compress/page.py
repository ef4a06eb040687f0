"""A report as one HTML page: no script, no font, nothing that is not in the file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tensorwire_server.compress.charts import draw_charts
from tensorwire_server.compress.tables import (
    describe_pruning,
    describe_quantization,
    fact_table,
    layer_table,
    main_tables,
    short_bytes,
    told_date,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorwire_server.compress.report import Report
    from tensorwire_server.compress.tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.what { color: #555; margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #ddd;
  vertical-align: top; }
td:last-child { padding-right: 0; } th:last-child { padding-right: 0; }
/* On a narrow screen an interval goes below its number, and neither is broken. */
td small, td b { white-space: nowrap; } td small { color: #555; } td b { font-weight: normal; }
th { color: #555; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.facts { width: auto; } table.facts td { text-align: left; overflow-wrap: anywhere; }
table.facts td:first-child { color: #555; white-space: nowrap; }
figure { margin: 0; } figcaption { color: #555; font-size: .9rem; }
svg.plot { width: 100%; height: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; margin: 1.2rem 0; }
.tiles div { flex: 1 1 9rem; border: 1px solid #ddd; border-radius: .4rem; padding: .5rem .8rem; }
.tiles b { display: block; font-size: 1.35rem; }
.tiles span { color: #555; font-size: .9rem; }
.notes { border-left: .4rem solid #e69f00; padding: .3rem 1rem; background: #fdf6e7; }
.notes ul { margin: .3rem 0; padding-left: 1.1rem; }
.missed { border-left: .4rem solid #c00; padding: .4rem 1rem; background: #fdecec; }
details { margin-top: 2.2rem; } summary { font-size: 1.15rem; font-weight: bold; cursor: pointer; }
"""


def render(report: Report) -> str:
    """Return a whole HTML page."""
    title = f"{report.parent.name}, compressed"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="what">{escape(_summary(report))}</p>',
        *_missed(report),
        _tiles(report),
        *_notes(report),
        *(_section(table) for table in main_tables(report)),
        *(
            f"<h2>{escape(chart.title)}</h2><figure>{chart.svg}"
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
            for chart in draw_charts(report)
        ),
        _folded(layer_table(report)),
        _section(fact_table(report), "facts"),
    ]
    # The policy makes the browser refuse whatever would leave the page.
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _summary(report: Report) -> str:
    recipe = report.recipe
    parts = [f"prune {describe_pruning(pruning)}" for pruning in recipe.prune]
    if recipe.quantize is not None:
        parts.append(f"quantize {describe_quantization(recipe.quantize)}")
    return f"{'; '.join(parts)}. {told_date(report)}"


def _missed(report: Report) -> Iterator[str]:
    missed = [str(judgement.floor) for judgement in report.floors if not judgement.is_met]
    if missed:
        yield f'<p class="missed"><b>Floor missed:</b> {escape(", ".join(missed))}</p>'


def _tiles(report: Report) -> str:
    """Return the few numbers that a reader looks for first."""
    tiles = [
        f"<div><b>{escape(number)}</b><span>{escape(what)}</span></div>"
        for number, what in _headlines(report)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _headlines(report: Report) -> Iterator[tuple[str, str]]:
    quality = report.quality
    if quality.text is not None:
        yield f"{quality.text.perplexity_ratio.value:.4f}x", "perplexity"
        yield f"{quality.text.agreement.value:.1%}", "same next token as the parent"
    if quality.embedding is not None:
        yield f"{quality.embedding.mean.value:.5f}", "mean cosine to the parent"
    if quality.accuracy is not None:
        yield f"{quality.accuracy.difference.value:+.1%}", "accuracy"
    before, after = report.size_before.file_bytes, report.size_after.file_bytes
    yield f"{after / before:.3f}x", f"weight files, now {short_bytes(after)}"
    if report.speed is not None:
        rate = report.speed.typical
        # A median that a reader would take for a gain must not stand for rounds that disagree.
        told = "no difference" if rate.is_same else f"{rate.ratio:.2f}x"
        yield told, f"speed ({rate.name})"


def _notes(report: Report) -> Iterator[str]:
    if report.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        yield f'<div class="notes"><b>What to know about these numbers</b><ul>{items}</ul></div>'


def _section(table: Table, kind: str = "") -> str:
    return f"<h2>{escape(table.title)}</h2>{_table(table, kind)}"


def _folded(table: Table) -> str:
    """Return a long table that opens when it is asked for, without a script."""
    return f"<details><summary>{escape(table.title)}</summary>{_table(table)}</details>"


def _table(table: Table, kind: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.heads)
    body = "".join(
        f"<tr><td>{escape(row[0])}</td>{''.join(map(_cell, row[1:]))}</tr>" for row in table.rows
    )
    heads = f"<tr>{head}</tr>" if any(table.heads) else ""
    return f'<div class="scroll"><table class="{kind}">{heads}{body}</table></div>'


def _cell(text: str) -> str:
    """Return a cell, with an interval behind its number in smaller letters."""
    value, gap, interval = text.partition(" (")
    if not gap:
        return f"<td>{escape(value)}</td>"
    return f"<td><b>{escape(value)}</b> <small>({escape(interval)}</small></td>"
