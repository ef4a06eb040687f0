from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tensorwire.loadtest.outcomes import Outcome
from tensorwire.loadtest.request_log import RequestLog
from tensorwire.loadtest.verifying import Faults
from tensorwire.loadtest.workloads import Ask

if TYPE_CHECKING:
    from pathlib import Path


def test_a_line_is_json_and_holds_everything_that_is_known(tmp_path: Path) -> None:
    plain = Outcome(Ask(index=7, task="infer", model='a"b'), 100.0, 1.5, 101.502, 101.75)
    of = Ask(index=8, task="generate", model="m", group="trouble")
    stream = Outcome(of, 100.0, 2.0, 102.0, 103.0)
    stream.times, stream.counts, stream.tokens_in = [102.25, 102.5], [1, 3], 9
    stream.status, stream.message = "CONNECTION_LOST", 'cut "off"\n'
    stream.server_ms, stream.faults, stream.has_end = {"total_ms": 0.1}, Faults(lost=2), False

    path = tmp_path / "requests.jsonl"
    log = RequestLog(str(path))
    log.take(plain)
    log.take(stream)
    log.close()

    assert list(map(json.loads, path.read_text().splitlines())) == [
        {
            "index": 7, "group": "load", "task": "infer", "model": 'a"b', "status": "ok",
            "planned_s": 1.5, "sent_us": 2000, "ended_us": 250_000, "tokens_in": 0,
        },
        {
            "index": 8, "group": "trouble", "task": "generate", "model": "m",
            "status": "CONNECTION_LOST", "planned_s": 2.0, "sent_us": 0, "ended_us": 1_000_000,
            "tokens_in": 9, "token_us": [250_000, 500_000], "token_counts": [1, 3],
            "message": 'cut "off"\n', "server_ms": {"total_ms": 0.1}, "has_end": False, "faults": 2,
        },
    ]  # fmt: skip


def test_several_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    logs = [RequestLog(str(path)) for _ in range(2)]
    for i in range(4):
        logs[i % 2].take(Outcome(Ask(index=i, task="infer", model="m"), 0.0, 1.0))
    for log in logs:
        log.close()
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [
        0, 1, 2, 3,
    ]  # fmt: skip
