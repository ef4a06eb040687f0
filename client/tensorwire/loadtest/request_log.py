"""One line of JSON per request; several processes may write into one file."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorwire.loadtest.outcomes import Outcome

_BLOCK_CHARS = 1 << 16


class RequestLog:
    """Appends whole lines: the kernel keeps what several processes append apart."""

    def __init__(self, path: str, start: float) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._start = start
        self._lines: list[str] = []
        self._num_chars = 0

    def take(self, outcome: Outcome) -> None:
        """Note a request that has ended."""
        line = json.dumps(_as_json(outcome, self._start), separators=(",", ":"))
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


def _as_json(outcome: Outcome, start: float) -> dict[str, Any]:
    ask, planned = outcome.ask, outcome.planned_at
    line: dict[str, Any] = {
        "index": ask.index,
        "group": ask.group,
        "task": ask.task,
        "model": ask.model,
        "status": outcome.status,
        "planned_s": round(planned - start, 6),
        "sent_ms": _ms(outcome.sent_at - planned),
        "ended_ms": _ms(outcome.ended_at - planned),
        "tokens_in": outcome.tokens_in,
    }
    if outcome.times:
        line["token_ms"] = [_ms(moment - planned) for moment in outcome.times]
        line["token_counts"] = outcome.counts
    if outcome.message:
        line["message"] = outcome.message
    if outcome.server_ms:
        line["server_ms"] = dict(outcome.server_ms)
    if not outcome.has_end:
        line["has_end"] = False
    if outcome.faults.total:
        line["faults"] = outcome.faults.total
    return line


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
