"""A server that is started to be measured is never left behind."""

from __future__ import annotations

import sys

import pytest
from tensorwire_server.compress.serving import ServedModel

from .interrupting import InterruptAt, children

pytestmark = pytest.mark.slow


def start_and_leave(interrupt: InterruptAt) -> bool:
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with ServedModel("oracle:"):
            sys.settrace(before)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_of_the_start_leaves_no_server() -> None:
    before = children()
    for line in range(1, 100):
        interrupt = InterruptAt(line, "compress/serving.py", "compress/interrupts.py")
        caught = start_and_leave(interrupt)
        assert children() == before, line
        if interrupt.left > 0:
            break  # there are no more lines
        assert caught, line
    assert 20 < line < 99
