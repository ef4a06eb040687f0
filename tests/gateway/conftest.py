"""The loops that gateway tests run on."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from .loops import FakeClockLoop, run_on

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on each kind of loop that the server can have."""
    if request.param == "uvloop":
        return partial(run_on, pytest.importorskip("uvloop").new_event_loop)
    return partial(run_on, asyncio.SelectorEventLoop)


@pytest.fixture
def run_fast() -> Run:
    """Run a coroutine on a loop whose clock is fake."""
    return partial(run_on, FakeClockLoop)
