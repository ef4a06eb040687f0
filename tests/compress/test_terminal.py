"""What is printed of a report."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from tensorwire_server.compress.report import from_json
from tensorwire_server.compress.tables import main_tables
from tensorwire_server.compress.terminal import show

from .samples import encoder_report, text_report

if TYPE_CHECKING:
    import pytest


def test_a_terminal_shows_every_table_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    report = text_report(notes=("Not [bold] what it seems.",))
    out = io.StringIO()
    show(report, file=out)
    for table in main_tables(report):
        assert table.title in out.getvalue()
        for row in table.rows:
            assert all(cell in out.getvalue() for cell in row)
    assert "! Not [bold] what it seems." in out.getvalue()


def test_programs_get_json(capsys: pytest.CaptureFixture[str]) -> None:
    show(encoder_report(), as_json=True)
    assert from_json(capsys.readouterr().out.encode()) == encoder_report()
