"""Drives scheduler and engine the way a worker does, and compares with transformers' `generate`."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import models_zoo
import torch
import transformers
from emissions import each
from tensorwire_server.engine.generator import Generator, RaggedModel
from tensorwire_server.scheduling.continuous import ContinuousScheduler
from tensorwire_server.scheduling.pages import PagePool
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import GenerateEngine, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tensorwire_server.scheduling.work import StepPlan

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
# Where the reference's own top two are closer than this, float32 cannot say which one is right.
TIE = 1e-4
# Of the tokens that are compared.
ALLOWED_EXCUSES = 0.001


def ragged_of(engine: Generator) -> RaggedModel:
    """Return what runs an engine of the back end `any`."""
    steps = engine._model
    assert isinstance(steps, RaggedModel)
    return steps


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and when it joins."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    joins_at_step: int = 0
    sampling: Sampling = GREEDY


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came out, by request number."""

    tokens: list[list[int]]
    largest_batch: int
    steps: int
    cancelled: frozenset[int]
    paths: Mapping[str, int]  # how often a path of the engine or the scheduler was taken
    stats: Mapping[str, float]  # of the scheduler, at the end
    num_prompt_tokens: int  # that were computed


def mixed_requests(count: int, seed: int, *, last_join: int = 40) -> list[Request]:
    """Prompts of 1 to 150 tokens that join at random steps; lengths repeat, for batched references.

    Some cross from one size class of the cache to the next while they are continued.
    """
    rng = random.Random(seed)
    shapes = [(1, 24), (3, 40), (17, 30), (40, 12), (90, 48), (120, 24), (150, 16), (64, 70)]
    requests = []
    for i in range(count):
        length, max_new_tokens = shapes[i % len(shapes)]
        requests.append(
            Request(
                prompt_ids=tuple(rng.randrange(3, models_zoo.VOCAB_SIZE) for _ in range(length)),
                max_new_tokens=max_new_tokens,
                joins_at_step=rng.randrange(last_join) if last_join else 0,
            )
        )
    return requests


def alike_requests(count: int, seed: int) -> list[Request]:
    """Prompts of 41 to 80 tokens that begin alike in fours; the last of each four is a twin."""
    rng = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, models_zoo.VOCAB_SIZE) for _ in range(length))

    beginnings = [ids(40) for _ in range(4)]
    shapes = [(1, 60), (24, 50), (40, 64), (40, 64)]
    requests: list[Request] = []
    for i in range(count):
        length, max_new_tokens = shapes[i % 4]
        prompt_ids = beginnings[i // 4 % 4] + ids(length)
        if i % 4 == 3:
            prompt_ids = requests[-1].prompt_ids
        requests.append(
            Request(prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, joins_at_step=i // 4 * 5)
        )
    return requests


def run(
    engine: GenerateEngine,
    requests: list[Request],
    *,
    max_running: int = 64,
    step_tokens: int = 96,
    num_pages: int = 1024,
    stop_ids: frozenset[int] | None = None,
    cancel_after: Mapping[int, int] | None = None,
    expected_share: float = 1.0,
    took_s: Callable[[StepPlan], float] = lambda _: 0.0,
) -> Run:
    """Continue all requests to their end, or until they have as many tokens as `cancel_after`.

    Args:
        took_s: what the scheduler is told that a step took; 0: nobody knows.
    """
    pool = PagePool(num_pages, 16)
    scheduler = ContinuousScheduler(
        pool,
        max_running=max_running,
        step_tokens=step_tokens,
        max_waiting=len(requests),
        expected_share=expected_share,
        num_layers=engine.card.resumable_layers,
    )
    stops = engine.card.eos_ids if stop_ids is None else stop_ids
    tokens: list[list[int]] = [[] for _ in requests]
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].joins_at_step)
    finished = step = largest = num_prompt_tokens = 0
    cancels, cancelled = dict(cancel_after or {}), set()
    paths: Counter[str] = Counter()
    while finished < len(requests):
        while waiting and requests[waiting[0]].joins_at_step <= step:
            number = waiting.pop(0)
            request = requests[number]
            scheduler.submit(
                Sequence(
                    id=number,
                    prompt_ids=request.prompt_ids,
                    max_new_tokens=request.max_new_tokens,
                    sampling=request.sampling,
                    stop_ids=stops,
                    arrived_at=float(step),
                )
            )
        plan = scheduler.plan(float(step))
        step += 1
        if plan is None:
            continue
        largest = max(largest, len(plan.rows))
        for row in plan.rows:
            if row.start < row.num_prompt_tokens:
                num_prompt_tokens += len(row.token_ids)
        paths.update(_paths(plan))
        paths.update(_twins(plan, requests))
        result = engine.step(plan)
        for emission in each(scheduler.commit(plan, result, took_s=took_s(plan))):
            assert emission.index == len(tokens[emission.sequence_id])
            tokens[emission.sequence_id].append(emission.token_id)
            finished += emission.finish is not None
        for number in [n for n, limit in cancels.items() if len(tokens[n]) >= limit]:
            del cancels[number]
            if scheduler.cancel(number):
                cancelled.add(number)
                finished += 1
        assert not scheduler.take_failed()
    plan = scheduler.plan(float(step))
    if plan is not None:
        scheduler.commit(plan, engine.step(plan))
    scheduler.check_invariants()
    assert pool.used == 0
    assert engine.stats()["kv_sequences"] == 0
    return Run(
        tokens=tokens,
        largest_batch=largest,
        steps=step,
        cancelled=frozenset(cancelled),
        paths=paths,
        stats=scheduler.stats(),
        num_prompt_tokens=num_prompt_tokens,
    )


def _paths(plan: StepPlan) -> Iterator[str]:
    """Yield what a step does beyond the plainest, before its rows are moved on."""
    lengths = [len(row.token_ids) for row in plan.rows]
    if 1 in lengths and max(lengths) > 1:
        yield "decodes beside a prompt"
    for row in plan.rows:
        end = row.start + len(row.token_ids)
        if not row.sample:
            yield "part of a prompt"
        if row.start and len(row.token_ids) > 1:
            yield "rest of a prompt"
        if row.layers is not None:
            yield "some of the layers"
        if any(row.start <= size < end for size in (128, 256)) and row.start:
            yield "grown into a larger slot"
    if plan.released and plan.rows:
        yield "a slot given back beside others"


def _twins(plan: StepPlan, requests: list[Request]) -> Iterator[str]:
    """Yield where one of n choices begins with all of a prompt that another read."""
    prompts = [request.prompt_ids for request in requests]
    for load in plan.loads:
        prompt = prompts[load.sequence_id]
        is_all = len(load.token_ids) == len(prompt) - 1
        if load.sequence_id in plan.started and prompts.count(prompt) > 1 and is_all:
            yield "a choice began with what another had read"


@cache
def reference_model(folder: Path) -> Any:
    """Return the model as transformers runs it by default."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def references(folder: Path, requests: list[Request]) -> list[tuple[list[int], list[float]]]:
    """Return what `generate` makes of each prompt, and how far apart the top two logits were."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, request in enumerate(requests):
        shape = (len(request.prompt_ids), request.max_new_tokens)
        groups.setdefault(shape, []).append(number)
    found: dict[int, tuple[list[int], list[float]]] = {}
    for numbers in groups.values():
        prompts = [requests[number].prompt_ids for number in numbers]
        found |= _generate(reference_model(folder), numbers, prompts, requests[numbers[0]])
    return [found[number] for number in range(len(requests))]


def _generate(
    model: Any, numbers: list[int], prompts: list[tuple[int, ...]], request: Request
) -> dict[int, tuple[list[int], list[float]]]:
    """Run prompts of equal length together: no padding, so nothing to get wrong."""
    ids = torch.tensor(prompts)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits, dim=1).topk(2, dim=-1).values
    gaps = (best[..., 0] - best[..., 1]).tolist()
    eos = model.generation_config.eos_token_id
    results = {}
    for i, number in enumerate(numbers):
        new = output.sequences[i, ids.shape[1] :].tolist()
        if eos in new:
            new = new[: new.index(eos) + 1]
        results[number] = (new, gaps[i][: len(new)])
    return results


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two lists of outputs agree."""

    compared: int
    excused: int
    wrong: Mapping[int, int]  # request number -> index of the first token that differs


def assert_right(comparison: Comparison, *, at_least: int = 1) -> None:
    """Fail if an answer is wrong, if too much had to be excused, or if too little was compared."""
    assert comparison.wrong == {}
    assert comparison.excused <= ALLOWED_EXCUSES * comparison.compared
    assert comparison.compared >= at_least


def compare(tokens: list[list[int]], expected: list[tuple[list[int], list[float]]]) -> Comparison:
    """Compare token for token; a difference at a tie ends the comparison of that request."""
    compared = excused = 0
    wrong: dict[int, int] = {}
    for number, (mine, (theirs, gaps)) in enumerate(zip(tokens, expected, strict=True)):
        differs = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), None)  # noqa: B905
        if differs is None:
            compared += len(theirs)
            if len(mine) != len(theirs):
                wrong[number] = min(len(mine), len(theirs))
        elif gaps[differs] < TIE:
            compared += differs + 1
            excused += 1
        else:
            wrong[number] = differs
    return Comparison(compared=compared, excused=excused, wrong=wrong)
