"""A report on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import rich.table
from rich.console import Console
from rich.text import Text

from tensorwire_server.compress.report import to_json
from tensorwire_server.compress.tables import main_tables

if TYPE_CHECKING:
    from typing import TextIO

    from tensorwire_server.compress.report import Report
    from tensorwire_server.compress.tables import Table


def show(report: Report, *, as_json: bool = False, file: TextIO | None = None) -> None:
    """Print a report, for people or for programs.

    Args:
        file: where to; None: the standard output.
    """
    file = file or sys.stdout
    if as_json:
        print(to_json(report).decode(), file=file)
        return
    console = Console(file=file)
    for table in main_tables(report):
        console.print(_shown(table))
    for note in report.notes:
        console.print(Text(f"! {note}", style="yellow"))


def _shown(table: Table) -> rich.table.Table:
    result = rich.table.Table(title=table.title, title_justify="left", title_style="bold")
    for number, head in enumerate(table.heads):
        result.add_column(head, justify="right" if number else "left")
    for row in table.rows:
        # As text: a name in brackets is no mark-up.
        result.add_row(*map(Text, row))
    return result
