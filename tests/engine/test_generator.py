"""Tokens of the running batch equal transformers' own, and the comparison would notice if not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import torch
from tensorwire_server.engine.attention import StepLayout
from tensorwire_server.engine.generator import Generator, RaggedModel
from tensorwire_server.engine.loading import load
from tensorwire_server.scheduling.work import Row, Sampling, StepPlan, StepResult

from .driving import (
    GREEDY,
    Request,
    Run,
    alike_requests,
    assert_right,
    compare,
    mixed_requests,
    ragged_of,
    references,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@cache
def engine_of(family: str, backend: str = "any") -> Generator:
    engine = load(models_zoo.tiny_model(family), device="cpu", backend=backend)
    assert isinstance(engine, Generator)
    return engine


@cache
def requests_and_references(
    family: str, count: int
) -> tuple[list[Request], list[tuple[list[int], list[float]]]]:
    requests = mixed_requests(count, seed=1)
    return requests, references(models_zoo.tiny_model(family), requests)


@pytest.mark.slow
@pytest.mark.parametrize("family", models_zoo.EVERY_FAMILY)
def test_64_requests_joining_and_leaving_at_random_steps_equal_generate(family: str) -> None:
    requests, expected = requests_and_references(family, 64)
    leaves = {number: 1 + number % 9 for number in range(5, 64, 7)}
    made = run(engine_of(family), requests, cancel_after=leaves)
    assert_right(compare(made.tokens, cut(expected, made)), at_least=1500)
    assert made.largest_batch >= 24
    assert made.paths["part of a prompt"] >= 10
    assert made.paths["rest of a prompt"] >= 10
    assert made.paths["decodes beside a prompt"] >= 10
    assert made.paths["a slot given back beside others"] >= 10
    assert made.paths["grown into a larger slot"] >= 5
    assert len(made.cancelled) >= 5


def cut(expected: list[tuple[list[int], list[float]]], made: Run) -> list[Any]:
    """Cut references of requests that were cancelled to what these had got."""
    return [
        (theirs[: len(mine)], gaps[: len(mine)]) if number in made.cancelled else (theirs, gaps)
        for number, (mine, (theirs, gaps)) in enumerate(zip(made.tokens, expected, strict=True))
    ]


@cache
def alike_requests_and_references(
    family: str,
) -> tuple[list[Request], list[tuple[list[int], list[float]]]]:
    requests = alike_requests(24, seed=4)
    return requests, references(models_zoo.tiny_model(family), requests)


FUSED = ("llama", "qwen2-mixed", "qwen3", "mistral", "olmo2", "granite")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "any") for family in models_zoo.EVERY_FAMILY),
        *((family, "fused") for family in FUSED),
    ],
)
def test_prompts_that_begin_alike_in_a_tiny_cache_equal_generate(family: str, backend: str) -> None:
    requests, expected = alike_requests_and_references(family)
    leaves = dict.fromkeys(range(6, 24, 5), 30)
    made = run(engine_of(family, backend), requests, cancel_after=leaves, **TINY_CACHE)
    assert_right(compare(made.tokens, cut(expected, made)), at_least=700)
    assert len(made.cancelled) >= 2
    assert made.paths["a choice began with what another had read"] >= 3
    assert made.stats["prefix_hit_tokens"] >= 300
    assert made.stats["page_evictions"] >= 20
    assert made.stats["preemptions"] >= 1
    assert made.stats["recomputed_tokens"] >= 1


# Room for about 9 sequences of 24, admitted as if answers were short.
TINY_CACHE: Any = {"max_running": 24, "step_tokens": 64, "num_pages": 72, "expected_share": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("step_tokens", [16, 40, 4096])
def test_the_size_of_prompt_chunks_changes_nothing(step_tokens: int) -> None:
    requests, expected = requests_and_references("llama", 16)
    made = run(engine_of("llama"), requests, max_running=16, step_tokens=step_tokens)
    assert_right(compare(made.tokens, expected))


class Wrapped:
    """An engine that meddles before each step."""

    def __init__(self, engine: Generator, meddle: Callable[[Generator, int], None]) -> None:
        self._engine = engine
        self._meddle = meddle
        self._num_steps = 0
        self.card, self.tokenizer = engine.card, engine.tokenizer

    def step(self, plan: StepPlan) -> StepResult:
        self._num_steps += 1
        with torch.inference_mode():
            self._meddle(self._engine, self._num_steps)
        return self._engine.step(plan)

    def stats(self) -> Mapping[str, int]:
        return self._engine.stats()


def test_an_engine_says_when_its_next_step_moves_a_sequence() -> None:
    class Listening(Wrapped):
        def step(self, plan: StepPlan) -> StepResult:
            result = super().step(plan)
            self.num_moves = getattr(self, "num_moves", 0) + result.moves_next
            return result

    listening = Listening(engine_of("llama"), lambda *_: None)
    requests = [Request(prompt_ids=(*range(3, 80), 100 + i), max_new_tokens=70) for i in range(6)]
    run(listening, requests, stop_ids=frozenset())
    assert listening.num_moves == len(requests)  # each outgrows 128 tokens


class ShiftedPositions(RaggedModel):
    """Continues every sequence one position too late (for rotary models all shifted is none)."""

    def positions(self, rows: Sequence[Row]) -> list[int]:
        return [row.start + i + (row.start > 0) for row in rows for i in range(len(row.token_ids))]


class MeddledLayout(StepLayout):
    """Has layers get something else than what they ask for."""

    meddle: Callable[[dict[str, Any]], None]

    def attend(
        self, layer: int, q: Any, k: Any, v: Any, scale: float, extra: dict[str, Any]
    ) -> torch.Tensor:
        self.meddle(extra)
        return super().attend(layer, q, k, v, scale, extra)


def meddled(engine: Generator, meddle: Callable[[dict[str, Any]], None]) -> Generator:
    class Meddled(RaggedModel):
        def lay_out(self, rows: Sequence[Row]) -> StepLayout:
            layout = MeddledLayout(self.cache, rows)
            layout.meddle = meddle
            return layout

    right = ragged_of(engine)
    return Generator(Meddled(right._model, right.cache), engine.tokenizer, engine.card)


def forget_softcap(extra: dict[str, Any]) -> None:
    extra["softcap"] = None


def forget_sinks(extra: dict[str, Any]) -> None:
    extra["s_aux"] = None


def widen_window(extra: dict[str, Any]) -> None:
    if extra.get("sliding_window"):
        extra["sliding_window"] += 1


def narrow_window(extra: dict[str, Any]) -> None:
    if extra.get("sliding_window"):
        extra["sliding_window"] -= 1


def window_everywhere(extra: dict[str, Any]) -> None:
    extra["sliding_window"] = models_zoo.WINDOW_TOKENS


def forget_bias(extra: dict[str, Any]) -> None:
    extra["key_bias"] = None


def shift_bias(extra: dict[str, Any]) -> None:
    """From the 20th position on, a position too far: shifted altogether, nothing would change."""
    bias = extra["key_bias"].clone()
    bias[:, 20:-1] = bias[:, 21:]
    extra["key_bias"] = bias


WINDOWED = ("qwen2-mixed", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "gpt-oss")
MIXED = ("qwen2-mixed", "gemma2", "gemma3", "gpt-oss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "meddle"),
    [
        ("gemma2", forget_softcap),
        ("gpt-oss", forget_sinks),
        ("falcon-alibi", forget_bias),
        *((family, widen_window) for family in WINDOWED),
        *((family, narrow_window) for family in WINDOWED),
        *((family, window_everywhere) for family in MIXED),
    ],
)
def test_what_a_layer_asks_for_turns_the_comparison_red_when_it_is_wrong(
    family: str, meddle: Callable[[dict[str, Any]], None]
) -> None:
    requests, expected = requests_and_references(family, 8)
    made = run(meddled(engine_of(family), meddle), requests)
    assert len(compare(made.tokens, expected).wrong) >= 4


@pytest.mark.slow
def test_alibi_that_counts_a_position_twice_turns_the_comparison_red() -> None:
    requests, expected = requests_and_references("falcon-alibi", 64)  # one position weighs little
    made = run(meddled(engine_of("falcon-alibi"), shift_bias), requests)
    assert len(compare(made.tokens, expected).wrong) >= 4


def swap_two_slots_once(engine: Generator, num_steps: int) -> None:
    if num_steps == 12:
        arena = engine._model.cache.arenas[0]
        assert len(arena.owners) >= 2
        arena.kv_L2SHPD[:, :, [0, 1]] = arena.kv_L2SHPD[:, :, [1, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in models_zoo.EVERY_FAMILY if f != "falcon-alibi"])
def test_a_position_too_far_turns_the_comparison_red(family: str) -> None:
    requests, expected = requests_and_references(family, 8)
    engine = engine_of(family)
    shifted = ShiftedPositions(ragged_of(engine)._model, engine._model.cache)
    made = run(Generator(shifted, engine.tokenizer, engine.card), requests)
    assert len(compare(made.tokens, expected).wrong) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("family", models_zoo.EVERY_FAMILY)
def test_two_swapped_sequences_turn_the_comparison_red(family: str) -> None:
    requests, expected = requests_and_references(family, 8)
    requests = [replace(request, joins_at_step=0) for request in requests]
    untouched = run(engine_of(family), requests)
    assert compare(untouched.tokens, expected).wrong == {}
    made = run(Wrapped(engine_of(family), swap_two_slots_once), requests)
    assert compare(made.tokens, expected).wrong


class SwappedPages(Wrapped):
    """Swaps a page of the prefix cache that is about to be used with one that is not, once."""

    def __init__(self, engine: Generator) -> None:
        super().__init__(engine, lambda *_: None)
        self.num_swaps = 0

    def step(self, plan: StepPlan) -> StepResult:
        store = self._engine._model.cache.store
        saved_now = {save.page for save in plan.saves}
        # The last ones: what lies behind a window is not missed.
        wanted = {load.pages[-1] for load in plan.loads} - saved_now
        others = store._held.keys() - saved_now - set(plan.dropped)
        others -= {page for load in plan.loads for page in load.pages}
        pairs = [(store.page(one), store.page(other)) for one in wanted for other in others]
        pairs = [(one, other) for one, other in pairs if one.shape == other.shape]
        if pairs and not self.num_swaps:
            self.num_swaps += 1
            with torch.inference_mode():
                one, other = pairs[0]
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
        return super().step(plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"),
    [*((family, "any") for family in models_zoo.EVERY_FAMILY), ("llama", "fused")],
)
def test_two_swapped_pages_of_the_prefix_cache_turn_the_comparison_red(
    family: str, backend: str
) -> None:
    requests, expected = alike_requests_and_references(family)
    engine = SwappedPages(engine_of(family, backend))
    made = run(engine, requests, **TINY_CACHE)
    assert engine.num_swaps == 1
    assert compare(made.tokens, expected).wrong


def sampled_requests(count: int) -> list[Request]:
    settings = [(0.7, None, 1.0), (1.0, 20, 1.0), (1.3, None, 0.8), (1.0, 40, 0.9)]
    return [
        replace(
            request,
            max_new_tokens=20,
            sampling=Sampling(
                temperature=settings[i % 4][0],
                top_k=settings[i % 4][1],
                top_p=settings[i % 4][2],
                seed=1000 + i,
            ),
        )
        for i, request in enumerate(mixed_requests(count, seed=5, last_join=8))
    ]


@pytest.mark.slow
def test_a_seed_gives_the_same_tokens_alone_and_among_31_others() -> None:
    requests = sampled_requests(32)
    together = run(engine_of("llama"), requests)
    assert together.largest_batch >= 24
    for number in range(0, 32, 5):
        alone = run(engine_of("llama"), [replace(requests[number], joins_at_step=0)])
        assert alone.tokens[0] == together.tokens[number]
    assert len({tuple(tokens) for tokens in together.tokens}) == 32


def test_a_seed_gives_the_same_tokens_when_another_worker_goes_on() -> None:
    request = sampled_requests(4)[3]
    (whole,) = run(engine_of("llama"), [request], stop_ids=frozenset()).tokens
    resumed = replace(
        request,
        prompt_ids=request.prompt_ids + tuple(whole[:7]),
        max_new_tokens=request.max_new_tokens - 7,
        joins_at_step=0,
    )
    (rest,) = run(engine_of("llama"), [resumed], stop_ids=frozenset()).tokens
    assert whole[:7] + rest == whole


def test_different_seeds_give_different_tokens() -> None:
    request = replace(sampled_requests(1)[0], joins_at_step=0)
    other = replace(request, sampling=replace(request.sampling, seed=7))
    made = run(engine_of("llama"), [request, other])
    assert made.tokens[0] != made.tokens[1]


def row(number: int, ids: Sequence[int], start: int = 0, *, sample: bool = True) -> Row:
    return Row(
        sequence_id=number,
        token_ids=tuple(ids),
        start=start,
        pages=(),
        sample=sample,
        sampling=GREEDY,
    )


@pytest.fixture
def fresh() -> Any:
    """An engine whose weights a test may break."""
    return load(models_zoo.tiny_model("llama"), device="cpu", backend="any")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt-oss", "falcon-alibi"])
def test_non_finite_logits_fail_their_row_alone_and_leave_no_trace(
    family: str, poison: float
) -> None:
    engine: Any = load(models_zoo.tiny_model(family), device="cpu", backend="any")
    good, bad = list(range(5, 45)), [*range(5, 44), 300]  # beyond the windows
    with torch.inference_mode():
        ragged_of(engine)._model.get_input_embeddings().weight[300] = poison
    alone = run(engine, [Request(prompt_ids=tuple(good), max_new_tokens=3)]).tokens[0]
    made = engine.step(StepPlan(rows=(row(1, good), row(2, bad), row(3, good)), released=()))
    assert made.failed == {2: "non-finite logits"}
    assert made.tokens == {1: alone[0], 3: alone[0]}
    # One that decodes beside it, and the next owner of its slot, which must be clean.
    made = engine.step(StepPlan(rows=(row(1, alone[:1], 40), row(3, [300], 40)), released=(2,)))
    assert made.failed == {3: "non-finite logits"}
    assert made.tokens == {1: alone[1]}
    made = engine.step(StepPlan(rows=(row(1, alone[1:2], 41), row(4, good)), released=(3,)))
    assert made.tokens == {1: alone[2], 4: alone[0]}
    made = engine.step(
        StepPlan(rows=(row(4, alone[:1], 40), row(5, alone[:1]), row(6, [9] * 20)), released=(1,))
    )
    assert not made.failed
    assert made.tokens[4] == alone[1]
    engine.step(StepPlan(rows=(), released=(4, 5, 6)))
    engine._model.cache.check_invariants()


def test_a_plan_that_only_releases_runs_no_forward_pass(fresh: Generator) -> None:
    fresh.step(StepPlan(rows=(row(1, [5, 6]),), released=()))
    assert fresh.stats()["kv_sequences"] == 1
    made = fresh.step(StepPlan(rows=(), released=(1, 77)))
    assert (made.tokens, made.failed) == ({}, {})
    assert set(fresh.stats().values()) == {0}


def test_a_chunk_that_ends_inside_the_prompt_gives_no_token(fresh: Generator) -> None:
    made = fresh.step(StepPlan(rows=(row(1, [5, 6], sample=False), row(2, [5, 6, 7])), released=()))
    assert made.tokens.keys() == {2}
    rest = fresh.step(StepPlan(rows=(row(1, [7], 2),), released=()))
    assert rest.tokens[1] == made.tokens[2]


def test_a_step_that_is_run_again_gives_the_same(fresh: Generator) -> None:
    first = fresh.step(StepPlan(rows=(row(1, [5, 6, 7, 8]),), released=()))
    again = fresh.step(StepPlan(rows=(row(1, [5, 6], sample=False),), released=()))
    assert again.tokens == {}
    assert fresh.step(StepPlan(rows=(row(1, [7, 8], 2),), released=())) == first


def test_decodes_beside_a_prompt_that_holds_an_earlier_slot_stay_right(fresh: Generator) -> None:
    """The slots that decode are then no dense prefix."""
    alone = fresh.step(StepPlan(rows=(row(9, [3, 4, 5, 6, 7, 8]),), released=())).tokens[9]
    fresh.step(StepPlan(rows=(row(1, [11, 12], sample=False),), released=(9,)))
    fresh.step(StepPlan(rows=(row(2, [3, 4, 5, 6, 7], sample=False),), released=()))
    fresh.step(StepPlan(rows=(row(3, [3, 4, 5, 6], sample=False),), released=()))
    made = fresh.step(
        StepPlan(rows=(row(1, [13, 14], 2), row(2, [8], 5), row(3, [7], 4)), released=())
    )
    assert made.tokens[2] == alone
    assert fresh.step(StepPlan(rows=(row(3, [8], 5),), released=())).tokens[3] == alone


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", models_zoo.EVERY_FAMILY)
def test_on_a_gpu_requests_joining_at_random_steps_equal_generate_on_a_cpu(family: str) -> None:
    requests, expected = requests_and_references(family, 64)
    engine = load(models_zoo.tiny_model(family), device="cuda")
    assert isinstance(engine, Generator)
    assert engine.kv_geometry.device.type == "cuda"
    assert_right(compare(run(engine, requests).tokens, expected), at_least=1500)
