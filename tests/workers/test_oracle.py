"""The oracle gives what `oracle_token` says, however its sequences are cut."""

from __future__ import annotations

import pytest
from tensorwire_server.scheduling.work import Load, Row, Sampling, StepPlan
from tensorwire_server.workers.oracle import (
    ByteTokenizer,
    OracleEngine,
    oracle_text,
    oracle_token,
    oracle_tokens,
)

PROMPT = list(b"Once upon a time")
SAMPLING = Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=7)


def row(token_ids: list[int], start: int, *, sample: bool = True, id: int = 1) -> Row:
    return Row(
        sequence_id=id, token_ids=tuple(token_ids), start=start, pages=(0,), sample=sample,
        sampling=SAMPLING,
    )  # fmt: skip


def step(engine: OracleEngine, *rows: Row) -> dict[int, int]:
    result = engine.step(StepPlan(rows=rows, released=()))
    assert not result.failed
    return dict(result.tokens)


def test_the_tokens_are_these_and_stay_these() -> None:
    """Clients and load tests of other versions compute them too."""
    assert oracle_tokens(b"Hello", 3, 4) == [293, 295, 263, 268]
    assert oracle_text([293, 295, 263, 268]) == "LNhm"


def test_a_token_depends_on_prompt_seed_and_index() -> None:
    base = oracle_tokens(PROMPT, 7, 50)
    assert base == [oracle_token(PROMPT, 7, i) for i in range(50)]
    assert len(set(base)) > 20
    assert base != oracle_tokens(PROMPT, 8, 50)
    assert base != oracle_tokens([*PROMPT, 33], 7, 50)


@pytest.mark.parametrize("cut", range(1, len(PROMPT)))
def test_a_prompt_in_two_chunks_gives_the_same_tokens(cut: int) -> None:
    engine = OracleEngine()
    assert step(engine, row(PROMPT[:cut], 0, sample=False)) == {}
    token = step(engine, row(PROMPT[cut:], cut))[1]
    made = [token]
    for i in range(4):
        made.append(step(engine, row([made[-1]], len(PROMPT) + i))[1])
    assert made == oracle_tokens(PROMPT, 7, 5)


def test_a_prompt_with_tokens_so_far_goes_on_where_they_end() -> None:
    so_far = oracle_tokens(PROMPT, 7, 9)
    assert step(OracleEngine(), row(PROMPT + so_far, 0)) == {1: oracle_token(PROMPT, 7, 9)}


def test_what_does_not_follow_the_cache_fails_its_row() -> None:
    engine = OracleEngine()
    step(engine, row(PROMPT, 0), row(PROMPT, 0, id=2))
    plan = StepPlan(rows=(row([260], 3), row([260], len(PROMPT), id=2)), released=())
    result = engine.step(plan)
    assert result.failed.keys() == {1}
    assert result.tokens.keys() == {2}


def test_a_released_sequence_leaves_nothing() -> None:
    engine = OracleEngine()
    step(engine, row(PROMPT, 0))
    assert engine.stats()["kv_sequences"] == 1
    engine.step(StepPlan(rows=(), released=(1, 99)))
    assert engine.stats() == {"kv_sequences": 0, "kv_tokens": 0}


def test_nan_in_the_prompt_fails_one_row_of_the_batch() -> None:
    rows = (row(list(b"say !NAN"), 0), row(PROMPT, 0, id=2))
    result = OracleEngine().step(StepPlan(rows=rows, released=()))
    assert dict(result.failed) == {1: "non-finite logits"}
    assert dict(result.tokens) == {2: oracle_token(PROMPT, 7, 0)}


@pytest.mark.parametrize("source", ["oracle:step=5", "oracle:step_ms=x", "oracle:vocab=256"])
def test_options_that_make_no_sense_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="oracle"):
        OracleEngine(source)


def test_text_goes_in_as_bytes_and_comes_out_printable() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("h\N{LATIN SMALL LETTER E WITH ACUTE}") == [104, 195, 169]
    assert oracle_text(range(320)).isprintable()
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == list(
        b"user: hi\nassistant: "
    )


def test_a_sequence_that_begins_with_pages_of_others_gives_the_same_tokens() -> None:
    so_far = oracle_tokens(PROMPT, 7, 9)
    for text in (PROMPT, PROMPT + so_far):
        for loaded in (1, 5, len(PROMPT), len(text) - 1):
            if loaded >= len(text):
                continue
            load = Load(sequence_id=1, pages=(3,), token_ids=tuple(text[:loaded]))
            engine = OracleEngine()
            plan = StepPlan(rows=(row(text[loaded:], loaded),), released=(), loads=(load,))
            expected = oracle_token(PROMPT, 7, len(text) - len(PROMPT))
            assert engine.step(plan).tokens == {1: expected}
