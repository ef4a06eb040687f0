"""What a SUBMIT becomes, and the sentences with which it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_protocol.errors import BadParams, TensorwireError, UnknownOperation
from tensorwire_protocol.messages import Finish, Submit
from tensorwire_server.scheduling.work import ModelCard
from tensorwire_server.workers.oracle import ByteTokenizer
from tensorwire_server.workers.requests import Order, build_order, check_operation, read_prompt

if TYPE_CHECKING:
    from tensorwire_server.scheduling.sequences import Sequence

CARD = ModelCard(
    tasks=frozenset({"generate", "tokenize"}),
    architecture="fake",
    context_tokens=1024,
    vocab_size=300,
    eos_ids=frozenset({9}),
    defaults={"temperature": 0.7, "top_k": 40},
)


def order(
    num_prompt: int = 10, card: ModelCard = CARD, bad_words: Any = (), **fields: Any
) -> Order:
    fields = {"key": b"k" * 16, **fields}
    submit = Submit(stream=1, op="generate", attempt=1, **fields)
    prompt = [1] * num_prompt
    return build_order(submit, prompt, card=card, model="m", arrived_at=100.0, bad_words=bad_words)


def sequence(num_prompt: int = 10, **fields: Any) -> Sequence:
    made = order(num_prompt, **fields)
    assert made.finish is None
    return made.sequence(5)


def test_unset_options_come_from_the_card() -> None:
    sampling = sequence().sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 40, 1.0)
    sampling = sequence(params={"temperature": 0, "top_k": 5, "top_p": 0.5}).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 5, 0.5)


def test_without_a_seed_the_key_gives_it_so_that_a_retry_draws_the_same() -> None:
    seeds = [sequence(key=key * 16).sampling.seed for key in (b"a", b"a", b"b")]
    assert seeds[0] == seeds[1] != seeds[2]
    assert 0 <= seeds[0] < 2**63
    assert sequence(key=b"\xff" * 16).sampling.seed < 2**63
    assert sequence(params={"seed": 11}).sampling.seed == 11


def test_max_new_tokens_is_256_or_what_the_context_leaves() -> None:
    assert sequence(10).max_new_tokens == 256
    assert sequence(1000).max_new_tokens == 24
    assert sequence(1000, params={"max_new_tokens": 24}).max_new_tokens == 24


def test_deadline_priority_and_stop_ids_reach_the_scheduler() -> None:
    built = sequence(deadline_ms=1500, priority=3, params={"stop_ids": [4]})
    assert (built.deadline, built.priority, built.arrived_at) == (101.5, 3, 100.0)
    assert built.stop_ids == {4, 9}
    assert sequence().deadline is None


@pytest.mark.parametrize(
    ("num_prompt", "params", "sentence"),
    [
        (0, {}, "the prompt is empty"),
        (
            500, {"max_new_tokens": 600},
            "prompt of 500 tokens + max_new_tokens 600 exceed the context of 1024 of 'm';"
            " shorten the prompt or ask for at most 524",
        ),
        (
            1024, {},
            "prompt of 1024 tokens leaves no room in the context of 1024 of 'm';"
            " shorten it to at most 1023",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_numbers(
    num_prompt: int, params: dict[str, int], sentence: str
) -> None:
    with pytest.raises(BadParams) as raised:
        order(num_prompt, params=params)
    assert str(raised.value) == sentence


def test_ids_outside_the_vocabulary_are_refused() -> None:
    submit = Submit(stream=1, op="generate", key=bytes(16), attempt=1)
    with pytest.raises(BadParams, match=r"token id 300 is outside the vocabulary.*0 to 299"):
        build_order(submit, [299, 300], card=CARD, model="m", arrived_at=0.0)


def test_an_operation_the_model_lacks_is_refused_with_what_it_has() -> None:
    with pytest.raises(UnknownOperation, match="'m' does not offer 'embed'; it offers generate, t"):
        check_operation("embed", CARD, "m")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"so_far": [1, 2], "params": {"max_new_tokens": 2}}, Finish.LENGTH),
        ({"so_far": [1, 9]}, Finish.STOP),
        ({"so_far": [4], "params": {"stop_ids": [4]}}, Finish.STOP),
    ],
)
def test_tokens_so_far_may_already_be_all(fields: dict[str, Any], expected: Finish) -> None:
    assert order(**fields).finish is expected


def test_tokens_so_far_are_kept() -> None:
    assert sequence(so_far=[1, 2]).so_far == (1, 2)


def prompt_of(op: str, inputs: dict[str, Any]) -> list[int]:
    submit = Submit(stream=1, op=op, key=bytes(16), attempt=1, inputs=inputs)
    _, encode = read_prompt(submit, ByteTokenizer())
    return encode()


def test_a_prompt_is_text_ids_or_a_conversation() -> None:
    assert prompt_of("generate", {"prompt": "hi"}) == [104, 105]
    assert prompt_of("generate", {"ids": [3, 4]}) == [3, 4]
    chat = {"roles": ["system", "user"], "texts": ["be brief", "hi"]}
    assert bytes(prompt_of("chat", chat)) == b"system: be brief\nuser: hi\nassistant: "


def test_an_empty_text_is_no_prompt_but_can_be_tokenized() -> None:
    with pytest.raises(TensorwireError, match="the prompt is empty"):
        prompt_of("generate", {"prompt": ""})
    assert prompt_of("tokenize", {"prompt": ""}) == []


def test_a_card_without_defaults_is_greedy() -> None:
    assert order(card=replace(CARD, defaults={})).sampling.temperature == 0.0
