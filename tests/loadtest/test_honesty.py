"""The tool tells the truth about a server, and about itself, on real processes.

Numbers are only looked at where the tool itself says that they count: on a busy machine it must
say INVALID, and then the test says so too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from system.serving import Command, RunningServer, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Bench

pytestmark = pytest.mark.slow

STEP_S = 0.02
TRIES = 3


def excuses(result: dict[str, Any]) -> list[str]:
    """Return why a run says nothing: the tool says so, or the server did not keep its programme."""
    took_ms = result["groups"]["load"]["metrics"]["server.decode"]["percentiles_ms"]["p99"]
    if took_ms > 1.03 * 7 * STEP_S * 1000:
        return [*result["reasons"], f"by its own account the server took {took_ms} ms, not 140 ms"]
    reasons: list[str] = result["reasons"]
    return reasons


def test_a_healthy_run_is_valid_and_a_known_programme_is_measured_as_it_is(bench: Bench) -> None:
    # Eight tokens of 20 ms each, and no request meets another one.
    words = ("--task", "generate:oracle", "--output", "8", "--arrivals", "constant:4",
             "--warmup", "500ms", "--duration", "6s", "--json")  # fmt: skip
    with RunningServer(f"oracle:step_ms={STEP_S * 1000:g}") as server:
        server.ready()
        for _ in range(TRIES):
            result = bench(*words, address=server.address).result
            reasons, wrong = excuses(result), list(misses(result))
            if not reasons and not wrong:
                return
    if reasons:
        pytest.skip(f"this machine is too busy to measure on: {'; '.join(reasons)}")
    # A neighbour may delay a gap of one run; three runs in a row that are off are the tool's.
    pytest.fail("; ".join(wrong))


def misses(result: dict[str, Any]) -> Iterator[str]:
    """Yield which percentiles are further from the programme than they may be."""
    for metric, expected_ms in (("itl", STEP_S * 1000), ("e2e", 8 * STEP_S * 1000)):
        found = result["groups"]["load"]["metrics"][metric]["percentiles_ms"]
        for percentile, allowed in (("p50", 0.05), ("p90", 0.05), ("p99", 0.10)):
            if found[percentile] != pytest.approx(expected_ms, rel=allowed):
                yield f"{metric} {percentile} is {found[percentile]} ms, not {expected_ms} ms"


def test_a_stall_of_the_server_shows_fully_in_an_open_loop_and_hides_in_a_closed_one(
    bench: Bench,
) -> None:
    words = ("--task", "generate:oracle", "--output", "8", "--warmup", "0s", "--duration", "5s")
    found = {}
    for arrivals in ("constant:20", "closed:1"):
        with RunningServer("oracle:step_ms=1,stall_every=401,stall_ms=2000") as server:
            server.ready()
            result = bench(*words, "--arrivals", arrivals, "--json", address=server.address).result
        found[arrivals] = result["groups"]["load"]["metrics"]["e2e"]["percentiles_ms"]
    assert found["constant:20"]["p99.9"] >= 1950
    assert found["constant:20"]["p90"] >= 500  # everybody who came meanwhile waited
    assert found["closed:1"]["p90"] < 500  # the one user sent nothing meanwhile


def _child(command: Command) -> int:
    """Return the process that sends, once it does."""
    (pid,) = wait_until(command.children, "the process that sends")
    return pid


@pytest.mark.parametrize(
    ("arrivals", "stopped_s", "reason"),
    [
        ("constant:50", 0.4, "the event loop stood still"),
        # Nothing is planned that could be late: what comes in is seen late all the same.
        ("closed:4", 0.1, "the event loop was late"),
    ],
)
def test_a_tool_that_is_stopped_from_outside_says_invalid(
    oracle_server: RunningServer, arrivals: str, stopped_s: float, reason: str
) -> None:
    words = ("--task", "infer:echo", "--arrivals", arrivals, "--duration", "3s", "--json")
    environ = {"TENSORWIRE_ADDRESS": oracle_server.address}
    with Command("bench", *words, "--warmup", "500ms", environ=environ) as command:
        pid = _child(command)
        while command.process.poll() is None:
            try:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(stopped_s)  # the burst itself
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                break
            time.sleep(0.3)
        assert command.wait() == 3, command.stderr
        assert reason in command.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to share a core")
def test_a_tool_whose_core_is_taken_says_invalid(oracle_server: RunningServer) -> None:
    words = ("--task", "infer:echo", "--arrivals", "closed:32", "--duration", "2s", "--json")
    environ = {"TENSORWIRE_ADDRESS": oracle_server.address}
    core = min(os.sched_getaffinity(0))
    hog = "while True: pass"
    with Command("bench", *words, "--warmup", "200ms", environ=environ) as command:
        os.sched_setaffinity(_child(command), {core})
        hogs = [subprocess.Popen([sys.executable, "-c", hog]) for _ in range(3)]
        try:
            for process in hogs:
                os.sched_setaffinity(process.pid, {core})
            assert command.wait(60) == 3, command.stderr
        finally:
            for process in hogs:
                process.kill()
                process.wait()
        assert "others had its core" in command.stdout
