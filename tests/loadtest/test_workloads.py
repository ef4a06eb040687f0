from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.lengths import Uniform
from tensorwire.loadtest.workloads import (
    Ask,
    Prefixes,
    Task,
    Trouble,
    Workload,
    WorkloadSpec,
    parse_task,
    read_prompts,
)

GENERATE = Task(task="generate", model="oracle")


def asks(spec: WorkloadSpec, count: int = 3000) -> list[Ask]:
    workload = Workload(spec)
    return [workload.ask(i) for i in range(count)]


def test_one_seed_makes_the_same_requests_in_any_order() -> None:
    spec = WorkloadSpec(tasks=(GENERATE,), prompt_chars=Uniform(low=8, high=80), seed=3)
    forward, backward = Workload(spec), Workload(spec)
    listed = [backward.ask(i) for i in range(2100, -1, -150)]
    assert [forward.ask(ask.index) for ask in reversed(listed)] == listed[::-1]


def test_another_seed_makes_other_requests() -> None:
    first, second = (asks(WorkloadSpec(tasks=(GENERATE,), seed=seed), 20) for seed in (1, 2))
    assert {ask.text for ask in first}.isdisjoint({ask.text for ask in second})


def test_prompts_and_outputs_have_the_lengths_that_were_asked_for() -> None:
    spec = WorkloadSpec(
        tasks=(GENERATE,),
        prompt_chars=Uniform(low=5, high=90),
        output_tokens=Uniform(low=1, high=9),
    )
    made = asks(spec)
    assert {len(ask.text) for ask in made} == set(range(5, 91))
    assert {ask.max_new_tokens for ask in made} == set(range(1, 10))


def test_no_prompt_comes_twice() -> None:
    made = asks(WorkloadSpec(tasks=(GENERATE,)))
    assert len({ask.text[:8] for ask in made}) == len(made)


def test_a_prompt_may_be_longer_than_the_text_it_is_cut_from() -> None:
    (ask,) = asks(
        WorkloadSpec(tasks=(GENERATE,), prompt_chars=Uniform(low=200_000, high=200_000)), 1
    )
    assert len(ask.text) == 200_000


def test_a_share_of_the_prompts_begins_with_the_text_of_its_family() -> None:
    prefixes = Prefixes(share=0.5, chars=40, families=3)
    made = asks(WorkloadSpec(tasks=(GENERATE,), prefixes=prefixes))
    heads = Counter(ask.text[:40] for ask in made)
    families = [count for count in heads.values() if count > 1]
    assert len(families) == 3
    assert sum(families) / len(made) == pytest.approx(0.5, abs=0.04)
    assert len({ask.text for ask in made}) == len(made)


def test_a_mix_has_its_weights() -> None:
    tasks = (parse_task("generate:oracle*3"), parse_task("infer:echo[4x8]"))
    made = asks(WorkloadSpec(tasks=tasks))
    share = sum(ask.task == "generate" for ask in made) / len(made)
    assert share == pytest.approx(0.75, abs=0.03)
    arrays = [ask.array for ask in made if ask.array is not None]
    assert {(array.shape, array.dtype) for array in arrays} == {((4, 8), np.dtype(np.float32))}


def test_trouble_comes_to_its_share_of_the_streams() -> None:
    trouble = Trouble(
        cancel_share=0.1, cancel_after=5, slow_share=0.2, cut_share=0.3,
        deadline_share=0.1, deadline_s=0.5,
    )  # fmt: skip
    made = asks(WorkloadSpec(tasks=(GENERATE,), trouble=trouble))
    fates = Counter(
        (ask.cancel_after, ask.is_slow, ask.is_cut, ask.timeout_s == 0.5) for ask in made
    )
    shares = {fate: count / len(made) for fate, count in fates.items()}
    assert shares == {
        (5, False, False, False): pytest.approx(0.1, abs=0.03),
        (None, True, False, False): pytest.approx(0.2, abs=0.03),
        (None, False, True, False): pytest.approx(0.3, abs=0.03),
        (None, False, False, True): pytest.approx(0.1, abs=0.03),
        (None, False, False, False): pytest.approx(0.3, abs=0.03),
    }


def test_prompts_of_a_file_are_taken_in_turn() -> None:
    prompts = read_prompts(["one\n", "\n", '{"prompt": "two"}\n'])
    made = asks(WorkloadSpec(tasks=(GENERATE,), prompts=prompts), 3)
    assert [ask.text for ask in made] == ["one", "two", "one"]


@pytest.mark.parametrize("lines", [[], ["\n"], ['{"prompt": 1}'], ["{"], ["{}"]])
def test_a_file_without_prompts_is_refused(lines: list[str]) -> None:
    with pytest.raises(BadParams):
        read_prompts(lines)


@pytest.mark.parametrize(
    "text", ["generate", "generate:", "sing:oracle", "embed:echo*0", "infer:e[a]"]
)
def test_a_task_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_task(text)
