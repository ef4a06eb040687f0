"""One line of JSON per request; several processes may write into one file."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tensorwire.loadtest.outcomes import Outcome

_BLOCK_CHARS = 1 << 16


class RequestLog:
    """Appends whole lines: the kernel keeps what several processes append apart."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lines: list[str] = []
        self._num_chars = 0

    def take(self, outcome: Outcome) -> None:
        """Note a request that has ended."""
        line = _as_line(outcome)
        self._lines.append(line)
        self._num_chars += len(line)
        if self._num_chars >= _BLOCK_CHARS:
            self.flush()

    def flush(self) -> None:
        """Write what still waits."""
        if self._lines:
            os.write(self._file, ("\n".join(self._lines) + "\n").encode())
            self._lines, self._num_chars = [], 0

    def close(self) -> None:
        """Write what still waits, and close the file."""
        self.flush()
        os.close(self._file)


def _as_line(outcome: Outcome) -> str:
    # The numbers are written by hand: for a small request a general encoder costs more than all
    # else that the load tester does with it.
    ask, planned = outcome.ask, outcome.planned_at
    names = _names(ask.group, ask.task, ask.model, outcome.status)
    parts = [
        f'{{"index":{ask.index},{names},"planned_s":{outcome.planned_s:.6f},'
        f'"sent_us":{_us(outcome.sent_at - planned)},"ended_us":{_us(outcome.ended_at - planned)},'
        f'"tokens_in":{outcome.tokens_in}'
    ]
    if outcome.times:
        token_us = np.rint((np.array(outcome.times) - planned) * 1e6).astype(np.int64)
        parts.append(f'"token_us":{token_us.tolist()},"token_counts":{outcome.counts}')
    if outcome.message:
        parts.append(f'"message":{json.dumps(outcome.message)}')
    if outcome.server_ms:
        told = ",".join([f'"{name}":{ms:.3f}' for name, ms in outcome.server_ms.items()])
        parts.append(f'"server_ms":{{{told}}}')
    if not outcome.has_end:
        parts.append('"has_end":false')
    if outcome.faults.total:
        parts.append(f'"faults":{outcome.faults.total}')
    return ",".join(parts) + "}"


@lru_cache(1024)
def _names(group: str, task: str, model: str, status: str) -> str:
    named = {"group": group, "task": task, "model": model, "status": status}
    return json.dumps(named, separators=(",", ":"))[1:-1]


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
