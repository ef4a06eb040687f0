"""Guards on the CPU that a request costs: a ratio to a loop that runs in turns with it, and calls.

Not a measurement (those are in `benchmarks/`). The ratio depends on the machine and may be half
above what was measured; it catches a copy or a loop that grew. The number of calls is the same each
time, and its bound is close: it catches a task, an await or a second encoding more.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from .one_process import OneProcess

_DEPTH = 64
_ROUNDS = 15
_COUNTED_ROUNDS = 3


class _Calibration:
    """Calls, dicts and attributes, as our own code is made of."""

    def __init__(self) -> None:
        self.open: dict[int, Any] = {}
        self.count = 0

    def begin(self, number: int) -> None:
        self.open[number] = (number, self)
        self.count += 1

    def end(self, number: int) -> None:
        if self.open.pop(number, None) is not None:
            self.count -= 1


def _calibrate() -> float:
    """Return the CPU seconds of 10,000 calls."""
    books = _Calibration()
    began = time.thread_time()
    for number in range(5000):
        books.begin(number)
        books.end(number)
    return time.thread_time() - began


async def _cost(inputs: dict[str, Any]) -> float:
    """Return what a request costs, in calls of the calibration."""
    process = OneProcess()
    await process.start()
    for _ in range(3):
        await process.ask(inputs, _DEPTH)
    requests, calls = [], []
    for _ in range(_ROUNDS):
        requests.append(await process.ask(inputs, _DEPTH))
        calls.append(_calibrate())
    return min(requests) / _DEPTH / (min(calls) / 10_000)


def _count(events: Counter[str], _frame: object, event: str, _arg: object) -> None:
    events[event] += 1


async def _calls(inputs: dict[str, Any]) -> Counter[str]:
    """Return how often a request calls a function of Python, and one of C."""
    process = OneProcess()
    await process.start()
    await process.ask(inputs, _DEPTH)
    rounds = []
    gc.collect()
    gc.disable()  # what it finalizes when is no cost of a request
    try:
        for _ in range(_COUNTED_ROUNDS):
            events: Counter[str] = Counter()
            sys.setprofile(partial(_count, events))
            await process.ask(inputs, _DEPTH)
            sys.setprofile(None)
            rounds.append(events)
    finally:
        sys.setprofile(None)
        gc.enable()
    return Counter({name: min(events[name] for events in rounds) for name in ("call", "c_call")})


_TEXT, _ARRAY = {"text": "x" * 64}, {"a": np.zeros(16, np.float32)}


@pytest.mark.parametrize(
    ("inputs", "measured"),
    [pytest.param(_TEXT, 830, id="text"), pytest.param(_ARRAY, 1000, id="array")],
)
def test_a_request_costs_no_more_cpu_than_it_did(inputs: dict[str, Any], measured: int) -> None:
    assert asyncio.run(_cost(inputs)) <= 1.5 * measured


@pytest.mark.parametrize(
    ("inputs", "calls", "c_calls"),
    [pytest.param(_TEXT, 257.2, 198.5, id="text"), pytest.param(_ARRAY, 272.2, 228.5, id="array")],
)
def test_a_request_makes_no_more_calls_than_it_did(
    inputs: dict[str, Any], calls: float, c_calls: float
) -> None:
    counted = asyncio.run(_calls(inputs))
    assert counted["call"] / _DEPTH <= 1.03 * calls
    assert counted["c_call"] / _DEPTH <= 1.03 * c_calls
