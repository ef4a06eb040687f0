"""How speed is measured: what is asked of whom, and what is made of it. Never how fast it was."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.loads import Decode, Embed, Prefill
from tensorwire_server.compress.serving import ServedModel
from tensorwire_server.compress.speed import Plan, Rate, compare, find_loads, measure_speed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tensorwire_server.compress.loads import Load

TEXTS = ("one", "two", "three")
SMALL: dict[str, Any] = {"context_tokens": 64, "vocab_size": 100}


class FakeMachine:
    """A clock, and two servers on it that take so long for each token or text."""

    def __init__(self, parent_s: float = 0.01, child_s: float = 0.005) -> None:
        self.now_s = 0.0
        self.asked: list[tuple[str, Any]] = []
        self.parent = FakeServer(self, "parent", parent_s)
        self.child = FakeServer(self, "child", child_s)

    def now(self) -> float:
        return self.now_s


class FakeServer:
    def __init__(self, machine: FakeMachine, name: str, unit_s: float) -> None:
        self._machine, self._name, self._unit_s = machine, name, unit_s

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        self._work(("generate", [list(ids) for ids in prompts], num_tokens), num_tokens)

    def embed(self, texts: Sequence[str]) -> None:
        self._work(("embed", list(texts)), len(texts))

    def _work(self, what: Any, units: int) -> None:
        self._machine.asked.append((self._name, what))
        self._machine.now_s += self._unit_s * units


def compared(machine: FakeMachine, *loads: Any, plan: Plan, seed: int = 0) -> tuple[Rate, ...]:
    return compare(
        machine.parent, machine.child, loads, plan=plan, seed=seed, now=machine.now,
        report=lambda *_: None,
    )  # fmt: skip


def test_both_do_the_same_in_each_round_and_take_turns_at_who_begins() -> None:
    machine = FakeMachine()
    plan = Plan(rounds=4, run_s=0.2)
    compared(machine, Decode(streams=2, **SMALL), plan=plan)
    rounds = machine.asked[-8:]
    names = [name for name, _ in rounds]
    assert names == ["parent", "child", "child", "parent"] * 2
    work = [what for _, what in rounds]
    assert work[::2] == work[1::2]
    # Another round is other work: a server keeps what prompts have in common.
    assert len({str(what) for what in work}) == 4


def test_both_have_done_as_much_before_the_first_round() -> None:
    machine = FakeMachine()
    compared(machine, Decode(streams=2, **SMALL), plan=Plan(rounds=1, run_s=0.3))
    warm, measured = machine.asked[-4:-2], machine.asked[-2:]
    assert {name for name, _ in warm} == {"parent", "child"}
    assert {num_tokens for _, (_, _, num_tokens) in [*warm, *measured]} == {30}


def test_the_amount_is_what_takes_the_parent_about_the_time_asked_for() -> None:
    machine = FakeMachine(parent_s=0.01)
    compared(machine, Decode(streams=3, **SMALL), plan=Plan(rounds=1, run_s=0.3))
    _, (_, prompts, num_tokens) = machine.asked[-1]
    assert (len(prompts), num_tokens) == (3, 30)


@pytest.mark.parametrize(("unit_s", "wanted"), [(1e-6, 56), (100.0, 1)])
def test_the_amount_stays_within_what_is_possible(unit_s: float, wanted: int) -> None:
    machine = FakeMachine(parent_s=unit_s)
    compared(machine, Decode(streams=1, **SMALL), plan=Plan(rounds=1, run_s=0.3))
    _, (_, _, num_tokens) = machine.asked[-1]
    assert num_tokens == wanted  # a context of 64 less a prompt of 8


def test_rates_are_units_a_second_and_ratios_pair_rounds() -> None:
    machine = FakeMachine(parent_s=0.01, child_s=0.004)
    loads = (Decode(streams=4, **SMALL), Embed(texts_at_once=8, texts=TEXTS))
    decode, embed = compared(machine, *loads, plan=Plan(rounds=3, run_s=0.2))
    assert decode.before == pytest.approx([400.0] * 3)  # 4 streams, 100 tokens/s each
    assert decode.after == pytest.approx([1000.0] * 3)
    assert decode.ratio == pytest.approx(2.5)
    assert embed.unit == "texts/s"
    assert embed.before == pytest.approx([100.0] * 3)


def test_progress_reaches_its_end() -> None:
    machine = FakeMachine()
    steps: list[tuple[int, int, str]] = []
    loads: list[Load] = [Decode(streams=1, **SMALL), Prefill(**SMALL)]
    compare(
        machine.parent, machine.child, loads, plan=Plan(rounds=2, run_s=0.1), seed=0,
        now=machine.now, report=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [done for done, _, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert {total for _, total, _ in steps} == {6}


def test_the_seed_decides_on_the_work() -> None:
    def asked(seed: int) -> list[Any]:
        machine = FakeMachine()
        compared(machine, Prefill(**SMALL), plan=Plan(rounds=2, run_s=0.1), seed=seed)
        return machine.asked[-4:]

    assert asked(1) == asked(1) != asked(2)


@pytest.mark.parametrize(
    ("after", "ratio", "is_same"),
    [
        ((11.0, 12.0, 30.0), 1.2, False),
        ((9.0, 12.0, 13.0), 1.2, True),
        ((8.0, 9.0, 7.0), 0.8, False),
    ],
)
def test_a_rate_tells_if_a_difference_was_seen(
    after: tuple[float, ...], ratio: float, is_same: bool
) -> None:
    rate = Rate(name="x", unit="tokens/s", before=(10.0, 10.0, 10.0), after=after)
    assert rate.ratio == pytest.approx(ratio)
    assert rate.is_same is is_same


def test_loads_are_what_the_model_can_do() -> None:
    text = {"tasks": ["generate", "tokenize"], **SMALL}
    names = [load.name for load in find_loads(text, (1, 8), TEXTS)]
    assert names == ["decode, 1 stream", "decode, 8 streams", "prefill, prompts of 63"]
    encoder = {"tasks": ["embed"], **SMALL}
    names = [load.name for load in find_loads(encoder, (1, 8), TEXTS)]
    assert names == ["embed, 1 text", "embed, 8 texts"]


def test_prompts_of_a_prefill_fill_the_context_and_are_all_different() -> None:
    machine = FakeMachine()
    assert Prefill(**SMALL).run(machine.parent, 5, random.Random(0)) == 5 * 63
    (_, (_, prompts, num_tokens)), *_ = machine.asked
    assert num_tokens == 1
    assert {len(ids) for ids in prompts} == {63}
    assert len({tuple(ids[:16]) for ids in prompts}) == 5
    assert all(0 <= token < 100 for ids in prompts for token in ids)


@pytest.mark.slow
def test_two_real_servers_are_compared() -> None:
    # Torch-free models: this is about processes and the wire.
    plan = Plan(rounds=2, run_s=0.02, streams=(1, 3))
    speed = measure_speed("oracle:", "oracle:step_ms=1", plan=plan)
    names = [rate.name for rate in speed.rates]
    assert names[:2] == ["decode, 1 stream", "decode, 3 streams"]
    assert re.fullmatch(r"prefill, prompts of \d+", names[2])
    for rate in speed.rates:
        assert len(rate.before) == len(rate.after) == 2
        assert min(*rate.before, *rate.after) > 0
    # A worker without torch: some ten MB.
    assert 5e6 < speed.resident_bytes_before < 1e9
    assert 5e6 < speed.resident_bytes_after < 1e9


@pytest.mark.slow
def test_a_model_that_cannot_be_served_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(MeasurementError, match=r"cannot measure the speed of .*config\.json"),
        ServedModel(str(tmp_path)) as server,
    ):
        server.connect()


@pytest.mark.slow
def test_what_a_server_refuses_is_told() -> None:
    with ServedModel("oracle:") as server:
        server.connect()
        assert server.describe()["name"] == "measured"
        with pytest.raises(MeasurementError, match="failed: "):
            server.embed(["a text"])
        server.generate([[1, 2, 3]], 4)
