"""Guards on the CPU that a request costs: ratios to a loop that runs in turns with it.

Not a measurement (those are in `benchmarks/`): the bounds are half above what was measured, and
catch what makes each request dearer by a task, a copy or a second encoding.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from .one_process import OneProcess

_DEPTH = 64
_ROUNDS = 15


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


@pytest.mark.parametrize(
    ("inputs", "most_calls"),
    [
        pytest.param({"text": "x" * 64}, 1200, id="text"),
        pytest.param({"a": np.zeros(16, np.float32)}, 1450, id="array"),
    ],
)
def test_a_request_costs_no_more_cpu_than_it_did(inputs: dict[str, Any], most_calls: int) -> None:
    assert asyncio.run(_cost(inputs)) <= most_calls
