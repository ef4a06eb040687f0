from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.marks import Mark, MarkDone, parse_marks, run_marks

if TYPE_CHECKING:
    from pathlib import Path


def test_marks_are_a_time_and_a_command_the_earliest_first() -> None:
    assert parse_marks(["2s kill -9 7", "500ms touch x"], 10.0) == (
        Mark(at_s=0.5, command="touch x"),
        Mark(at_s=2.0, command="kill -9 7"),
    )


@pytest.mark.parametrize("text", ["", "5s", "5s ", "soon true", "10s true", "5s --json"])
def test_what_is_no_mark_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_marks([text], 10.0)


def test_what_became_of_each_command_is_noted(tmp_path: Path) -> None:
    done: list[MarkDone] = []
    marks = [Mark(at_s=0.0, command=f"touch {tmp_path / 'x'}"), Mark(at_s=0.0, command="exit 3")]
    asyncio.run(run_marks(marks, time.monotonic(), done))
    assert (tmp_path / "x").exists()
    assert {mark.command: mark.exit_code for mark in done} == {marks[0].command: 0, "exit 3": 3}
    for mark in done:
        assert mark.ended_s is not None
        assert 0 <= mark.began_s <= mark.ended_s
