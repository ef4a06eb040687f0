"""`--verify` finds what a broken server would do to streams, injected by a proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .conftest import number
from .forger import Forger, for_the_first, lose, repeat, swap

if TYPE_CHECKING:
    from collections.abc import Callable

    from system.serving import RunningServer

    from .conftest import Bench

pytestmark = pytest.mark.slow

STREAMS = ("--task", "generate:oracle", "--arrivals", "constant:20", "--connections", "2",
           "--verify", "--warmup", "0s", "--duration", "500ms", "--json")  # fmt: skip
FOUND = {1, 3}  # wrong answers; or INVALID, where this machine was busy


def test_a_proxy_that_changes_nothing_is_not_accused(
    bench: Bench, oracle_server: RunningServer
) -> None:
    with Forger(oracle_server.address) as forger:
        ran = bench(*STREAMS, address=forger.address)
    assert ran.exit_code in {0, 3}, ran.err
    assert number(ran.result, "ok") == 10
    assert sum(ran.result["groups"]["load"]["faults"].values()) == 0


@pytest.mark.parametrize(
    ("forge", "fault"), [(lose, "lost"), (repeat, "repeated"), (swap, "swapped")]
)
def test_a_forged_stream_is_found_and_the_fault_is_named(
    bench: Bench,
    oracle_server: RunningServer,
    forge: Callable[[list[int]], list[int]],
    fault: str,
) -> None:
    with Forger(oracle_server.address, forge) as forger:
        ran = bench(*STREAMS, address=forger.address)
    assert ran.exit_code in FOUND
    faults = ran.result["groups"]["load"]["faults"]
    assert faults.pop("wrong_streams") == faults.pop(fault) == 10
    assert set(faults.values()) == {0}


def test_a_forgery_that_the_client_itself_refuses_counts_too(
    bench: Bench, oracle_server: RunningServer
) -> None:
    with Forger(oracle_server.address, swap, is_clumsy=True) as forger:
        ran = bench(*STREAMS, address=forger.address)
    assert ran.exit_code in FOUND
    load = ran.result["groups"]["load"]
    assert load["faults"]["caught"] == load["errors"]["SEQUENCE"] == 10


def test_streams_without_their_end_are_found(bench: Bench, oracle_server: RunningServer) -> None:
    with Forger(oracle_server.address, drops_end=True) as forger:
        ran = bench(*STREAMS, "--timeout", "500ms", address=forger.address)
    assert ran.exit_code in FOUND
    load = ran.result["groups"]["load"]
    assert load["faults"]["without_end"] == 10
    assert number(ran.result, "ok") == 0


def test_a_model_without_a_rule_is_asked_again_alone(
    bench: Bench, oracle_server: RunningServer
) -> None:
    with Forger(oracle_server.address, for_the_first(4, lose), disguises=True) as forger:
        ran = bench(*STREAMS, address=forger.address)
    assert ran.exit_code in FOUND
    faults = ran.result["groups"]["load"]["faults"]
    assert ran.result["tally"]["rechecked"] == 10
    assert faults["wrong_streams"] == faults["lost"] == 4
