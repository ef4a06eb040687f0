"""`tensorwire bench` as its user has it: a process, against a server in processes of its own.

Whether a run was valid depends on the machine that the tests run on; what was counted does not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tensorwire.cli.app import run

from .conftest import number

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Bench

pytestmark = pytest.mark.slow

SHORT = ("--warmup", "200ms", "--duration", "1s")
MEASURED = {0, 3}  # INVALID only says that this machine was busy


def test_a_closed_loop_counts_every_request_and_checks_every_answer(bench: Bench) -> None:
    ran = bench("--task", "generate:oracle", "--arrivals", "closed:4", "--verify", "--json", *SHORT)
    assert ran.exit_code in MEASURED, ran.err
    result = ran.result
    assert number(result, "ok") == number(result, "planned") > 4
    assert number(result, "warmup") > 0
    assert number(result, "tokens_out") == 32 * number(result, "ok")
    assert number(result, "tokens_in") == 64 * number(result, "ok")
    load = result["groups"]["load"]
    assert sum(load["faults"].values()) == 0
    assert load["metrics"]["itl"]["count"] == 31 * number(result, "ok")
    assert load["metrics"]["server.decode"]["count"] == number(result, "ok")
    assert result["plan"]["arrivals"] == "closed:4"
    assert result["machine"]["cores"]
    assert result["versions"]["python"]


def test_an_open_loop_sends_what_was_planned_however_many_processes_share_it(bench: Bench) -> None:
    words = (
        "--task",
        "infer:echo[8x8]",
        "--arrivals",
        "constant:100",
        "--verify",
        "--json",
        *SHORT,
    )
    one, two = (bench(*words, "--processes", count).result for count in ("1", "2"))
    assert number(one, "planned") == number(two, "planned") == 100
    assert number(one, "ok") == number(two, "ok") == 100
    assert (len(one["own"]), len(two["own"])) == (1, 2)


def test_a_mix_reaches_all_its_models(bench: Bench, tmp_path: Path) -> None:
    log, prompts = tmp_path / "requests.jsonl", tmp_path / "prompts"
    prompts.write_text('ab\n{"prompt": "abcd"}\n')
    tasks = ("generate:oracle", "chat:oracle", "embed:echo", "infer:echo")
    ran = bench(
        *[word for task in tasks for word in ("--task", task)],
        *("--arrivals", "constant:100", "--log", str(log), "--prompts", str(prompts)),
        *("--verify", "--json", *SHORT),
    )
    assert ran.exit_code in MEASURED, ran.out
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {f"{line['task']}:{line['model']}" for line in lines} == set(tasks)
    assert len(lines) == number(ran.result, "planned") + number(ran.result, "warmup")
    assert {line["status"] for line in lines} == {"ok"}
    assert {line["tokens_in"] for line in lines if line["task"] == "generate"} == {2, 4}
    generated = next(line for line in lines if line["task"] == "generate")
    assert sum(generated["token_counts"]) == 32
    assert len(generated["token_us"]) == len(generated["token_counts"])
    assert generated["server_ms"]["total_ms"] >= 0


def test_trouble_is_made_and_told_apart_and_the_rest_does_not_suffer(bench: Bench) -> None:
    ran = bench(
        *("--task", "generate:oracle", "--arrivals", "constant:60", "--output", "200", "--verify"),
        *("--cancel", "share=20%,after=3", "--cut", "share=20%", "--slow", "share=10%,for=50ms"),
        *("--deadline", "share=10%,of=1ms", "--bystander", "20", "--json", *SHORT),
    )
    assert ran.exit_code in MEASURED, ran.out
    result = ran.result
    assert set(result["groups"]) == {"load", "trouble", "bystander"}
    assert number(result, "cancelled", "trouble") > 0
    assert result["tally"]["resumes"] > 0
    assert number(result, "failed") == number(result, "failed", "bystander") == 0
    assert set(result["groups"]["trouble"]["errors"]) <= {"DEADLINE"}
    for group in result["groups"].values():
        assert sum(group["faults"].values()) == 0
    assert number(result, "tokens_out", "bystander") == 4 * number(result, "ok", "bystander")


def test_a_command_runs_at_its_time_and_is_marked(bench: Bench, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    ran = bench(
        *("--task", "infer:echo", "--arrivals", "closed:1", "--json", *SHORT),
        *("--at", "500ms", f"touch {witness}; exit 7"),
    )
    (mark,) = ran.result["marks"]
    assert witness.exists()
    assert mark["exit_code"] == 7
    assert 0.5 <= mark["began_s"] <= mark["ended_s"]


def test_a_missed_objective_is_exit_code_1_unless_the_run_was_invalid(bench: Bench) -> None:
    ran = bench("--task", "infer:echo", "--slo", "e2e_p50=1us", "--json", *SHORT)
    assert ran.exit_code in {1, 3}
    assert not ran.result["slo"]["met"]
    assert number(ran.result, "good") == 0


def test_errors_are_counted_by_their_code_and_a_run_without_an_answer_is_no_success(
    bench: Bench,
) -> None:
    ran = bench("--task", "generate:nobody", "--arrivals", "constant:50", "--json", *SHORT)
    planned = number(ran.result, "planned")
    assert ran.result["groups"]["load"]["errors"] == {"UNKNOWN_MODEL": planned}
    assert number(ran.result, "ok") == 0
    assert ran.exit_code in {1, 3}


def test_the_table_says_what_is_excluded_and_how_the_tool_itself_did(bench: Bench) -> None:
    ran = bench("--task", "generate:oracle", *SHORT)
    assert "warm-up of 0.2 s excluded; latency counts from the planned send" in ran.out
    for word in ("ttft", "itl", "e2e", "sent late", "server's ms", "p99.9", "own process 0:"):
        assert word in ran.out


def test_two_results_are_compared(bench: Bench, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path in paths:
        bench("--task", "infer:echo", "--out", path, *SHORT)
    ran = bench("compare", *paths)
    assert ran.exit_code == 0, ran.err
    assert "load e2e p99.9 ms" in ran.out
    rows = bench("compare", "--json", *paths).result
    assert {row["verdict"] for row in rows} <= {  # type: ignore[index]
        "better", "worse", "noise", "equal", "unknown",
    }  # fmt: skip


def test_a_sweep_finds_a_rate(bench: Bench) -> None:
    ran = bench(
        *("--task", "infer:echo", "--arrivals", "constant:1", "--slo", "e2e_p50=5s"),
        *("--sweep", "20-60", "--warmup", "0s", "--duration", "500ms", "--json"),
    )
    points = ran.result["sweep"]["points"]
    assert [point["rate_per_s"] for point in points[:1]] == [20]
    assert len(ran.err.splitlines()) == len(points)
    if ran.result["valid"]:
        assert [point["rate_per_s"] for point in points] == [20, 40, 60]
        assert ran.result["sweep"]["highest_rate_per_s"] == 60


@pytest.mark.parametrize(
    "words",
    [("--arrivals", "often"), ("--arrivals", "poisson"), ("--arrivals", "closed:2.5"),
     ("--task", "sing:oracle"), ("--task", "infer:echo[4]x"), ("--task", "infer:echo[99999x9999]"),
     ("--prompt", "1.5"), ("--output", "9-3"), ("--prefix", "share=10%"), ("--seed", "-1"),
     ("--duration", "0s"), ("--timeout", "0s"), ("--slo", "x=1"), ("--slo", "ttft_p99"),
     ("--cancel", "share=2"), ("--cancel", "after=3"), ("--cancel", "share=10%,after=0"),
     ("--deadline", "share=1%,of=0s"), ("--at", "30s"), ("--at", "30s", "--json"),
     ("--at", "99s", "true"), ("--kind", "carrier-pigeon"), ("--processes", "0"),
     ("--prompts", "/nowhere"), ("--out", "/no/where"), ("--html", "/no/where"),
     ("--log", "/no/where"), ("--sweep", "1-2")],
    ids=" ".join,
)  # fmt: skip
def test_what_makes_no_sense_is_one_sentence_and_nothing_is_sent(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, for the time that a new one takes: nothing is started before all is checked.
    assert run(["bench", "--address", "127.0.0.1:1", *words]) in {1, 2}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "no server answers" not in line


def test_a_result_that_is_none_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('{"format": 99}')
    assert run(["bench", "compare", str(tmp_path / "a.json"), "/nowhere"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/a.json is no result")


def test_a_server_that_is_not_there_is_one_sentence(bench: Bench) -> None:
    ran = bench("--task", "infer:echo", address="127.0.0.1:1")
    assert ran.exit_code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith("error: no server answers at 127.0.0.1:1")


def test_a_report_is_written(bench: Bench, tmp_path: Path) -> None:
    result, page = tmp_path / "a.json", tmp_path / "a.html"
    bench("--task", "generate:oracle", "--out", str(result), "--html", str(page), *SHORT)
    assert page.read_text().count('<svg class="plot"') == 5
    ran = bench("compare", str(result), str(result), "--html", str(page))
    assert ran.exit_code == 0, ran.err
    assert "B, timeline" in page.read_text()
