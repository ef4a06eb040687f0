"""Listening workers that many tests share, each with a link of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .dispatching import listening

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def oracle() -> Iterator[tuple[str, int, int]]:
    """An oracle with a short step, small enough a context to run into."""
    with listening("oracle:step_ms=1,context=1024", max_running=32, max_waiting=64) as address:
        yield address


@pytest.fixture(scope="session")
def echo() -> Iterator[tuple[str, int, int]]:
    """An echo that answers at once."""
    with listening("echo:") as address:
        yield address


@pytest.fixture(scope="session")
def slow_echo() -> Iterator[tuple[str, int, int]]:
    """An echo that takes a while for each batch of up to four items, on its thread."""
    with listening("echo:service_ms=50", max_items=4) as address:
        yield address
