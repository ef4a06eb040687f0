"""The report, and what a real browser makes of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from browser import CHROMIUM, opened
from tensorwire.loadtest.histograms import Histogram
from tensorwire.loadtest.report import render

if TYPE_CHECKING:
    from pathlib import Path


def result(**changes: Any) -> dict[str, Any]:
    histogram = Histogram()
    histogram.record([0.001 * i for i in range(1, 500)])
    metric = {
        "percentiles_ms": {"p50": 250.0, "p90": 450.0, "p99": 495.0, "p99.9": 499.0},
        "hdr": histogram.encode(),
    }
    load = {
        "counts": {"planned": 499, "ok": 490, "failed": 9},
        "rates": {"requests_per_s": 49.0, "goodput_per_s": 40.0, "tokens_out_per_s": 1500.0},
        "metrics": {"ttft": metric, "itl": metric, "e2e": metric},
        "seconds": {
            "ended": {str(s): 50 for s in range(10)},
            "failed": {"4": 9},
            "tokens": {str(s): 1500 + 100 * s for s in range(10)},
        },
    }
    plan = {"tasks": ["generate:m"], "arrivals": "poisson:50", "duration_s": 8.0, "warmup_s": 2.0}
    return {
        "valid": True, "reasons": [], "plan": plan, "groups": {"load": load}, "slo": None,
        "marks": [{"began_s": 4.0, "command": "kill -9 <worker>"}], "date": "2026-01-01",
        "commit": "abc", "machine": {"cores": 2}, "versions": {"python": "3"}, "own": [],
    } | changes  # fmt: skip


def swept() -> dict[str, Any]:
    points = [
        {"rate_per_s": rate, "goodput_per_s": rate, "percentiles_ms": {"ttft": dict.fromkeys(
            ("p50", "p90", "p99"), rate * 2.0)}} for rate in (10.0, 20.0, 40.0)
    ]  # fmt: skip
    return result(sweep={"highest_rate_per_s": 40.0, "points": points})


def titles(page: str) -> list[str]:
    return re.findall(r'<svg class="plot" role="img" aria-label="([^"]*)"', page)


def test_a_run_has_its_distributions_and_its_timeline() -> None:
    assert titles(render([result()])) == [
        "Time to first token", "Gaps between tokens", "End to end", "requests/s", "tokens/s",
    ]  # fmt: skip


def test_a_sweep_shows_the_first_token_and_the_goodput_against_the_rate() -> None:
    assert titles(render([swept()]))[:2] == ["TTFT against rate", "Goodput against rate"]


def test_a_distribution_is_drawn_in_steps() -> None:
    histogram = Histogram()
    histogram.record([0.001] * 9 + [1.0])
    metric = {"percentiles_ms": dict.fromkeys(("p50", "p99"), 1.0), "hdr": histogram.encode()}
    made = result()
    made["groups"]["load"]["metrics"] = {"e2e": metric}
    (line,) = re.findall(r'points="([^"]*)"', render([made]).partition("Timeline")[0])
    places = [tuple(map(float, point.split(","))) for point in line.split()]
    # Level up to the ninth of ten, straight up, and no further: ten values have no p99.
    assert [x for x, _ in places[:2]] == [pytest.approx(x, abs=0.1) for x in (64.0, 212.8)]
    assert {x for x, _ in places[1:]} == {places[1][0]}
    assert places[0][1] == places[1][1] > places[2][1]


def test_several_runs_share_their_distributions() -> None:
    page = render([result(), result()])
    assert titles(page).count("End to end") == 1
    assert page.count("A, load") >= 3
    assert page.count("B, load") >= 3


def test_marks_and_reasons_are_shown_and_escaped() -> None:
    page = render([result(valid=False, reasons=["requests <were> late"])])
    assert "kill -9 &lt;worker&gt;" in page
    assert "requests &lt;were&gt; late" in page
    assert "INVALID" in page
    assert "INVALID" not in render([result()])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_a_browser_shows_every_plot_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    page = render([swept(), result()])
    document, asked = opened(page, tmp_path)
    assert titles(document) == titles(page)
    assert document.count("<polyline") == page.count("<polyline") > 10
    assert asked == []
    # The same page would have asked, had anything in it pointed anywhere.
    leaky = page.replace("<h1>", '<img src="http://page.test/x.png"><h1>')
    unguarded = re.sub(r"<meta http-equiv[^>]*>", "", leaky)
    assert opened(leaky, tmp_path)[1] == []
    assert len(opened(unguarded, tmp_path)[1]) >= 1
