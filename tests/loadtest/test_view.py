"""What a terminal shows while a run goes on."""

from __future__ import annotations

import io

from rich.console import Console
from tensorwire.cli.bench_view import _progress_table
from tensorwire.loadtest.plan import Plan


def shown(at_s: float, groups: dict[str, dict[str, int]], before: dict[str, object]) -> str:
    plan = Plan(warmup_s=2.0, duration_s=10.0)
    console = Console(file=io.StringIO(), width=80)
    console.print(_progress_table(plan, at_s, groups, before))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_rates_are_of_the_time_since_the_last_look() -> None:
    before = {"at": 3.0, "groups": {"load": {"ended": 100, "tokens": 1000, "failed": 3}}}
    now = {"load": {"ended": 150, "tokens": 3000, "failed": 4, "open": 7}}
    text = shown(5.0, now, before)
    assert "measuring 5 of 12 s" in text
    assert "load 25 1000 7 4" in text


def test_the_load_comes_first_whichever_group_was_heard_of_first() -> None:
    counts = {"ended": 1, "open": 1}
    text = shown(
        3.0, dict.fromkeys(("bystander", "trouble", "load"), counts), {"at": 0.0, "groups": {}}
    )
    assert text.index("load") < text.index("trouble") < text.index("bystander")


def test_it_says_what_is_not_measured() -> None:
    nothing: dict[str, object] = {"at": 0.0, "groups": {}}
    assert "warm-up" in shown(1.0, {}, nothing)
    assert "draining" in shown(12.5, {}, nothing)
