"""What a SUBMIT becomes, and the sentences with which it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
from tensorwire_protocol.errors import BadParams, TensorwireError, UnknownOperation
from tensorwire_protocol.messages import Finish, Submit
from tensorwire_server.scheduling.work import ModelCard, Shaping
from tensorwire_server.workers.oracle import ByteTokenizer
from tensorwire_server.workers.requests import (
    MAX_ECHO_CHARS,
    Order,
    build_order,
    check_operation,
    read_bad_words,
    read_echo,
    read_input,
    read_prompt,
)

if TYPE_CHECKING:
    from tensorwire_server.scheduling.sequences import Sequence
    from tensorwire_server.scheduling.work import Tokenizer

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


# -- sampling --------------------------------------------------------------------------------------


def test_without_anything_that_shapes_logits_nothing_is_kept_of_it() -> None:
    neutral = {
        "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": [], "bad_words": [], "min_new_tokens": 0,
    }  # fmt: skip
    assert sequence().sampling.shaping is None
    assert sequence(params=neutral).sampling.shaping is None


def test_every_option_reaches_the_sampler() -> None:
    params = {
        "min_p": 0.1, "repetition_penalty": 1.5, "frequency_penalty": -1, "presence_penalty": 2,
        "logit_bias": [[4, 1], [5, -2.5]], "min_new_tokens": 3, "stop_ids": [7, 8],
        "logprobs": 2, "prompt_logprobs": 0,
    }  # fmt: skip
    made = order(params=params, bad_words=[(1, 2), (3,)])
    sampling = made.sampling
    assert (sampling.min_p, sampling.logprobs, sampling.prompt_logprobs) == (0.1, 2, 0)
    assert sampling.shaping == Shaping(
        bias=((4, 1.0), (5, -2.5)),
        repetition_penalty=1.5,
        frequency_penalty=-1.0,
        presence_penalty=2.0,
        bad_words=((1, 2), (3,)),
        min_new_tokens=3,
        stop_ids=(7, 8, 9),
    )


@pytest.mark.parametrize(
    "one",
    [
        {"logit_bias": [[4, 1]]}, {"repetition_penalty": 1.5}, {"frequency_penalty": 1},
        {"presence_penalty": 1}, {"min_new_tokens": 3},
    ],
)  # fmt: skip
def test_an_option_that_changes_logits_does_so_alone(one: dict[str, Any]) -> None:
    assert order(params=one).sampling.shaping is not None


def test_bad_words_change_logits_alone_whoever_names_them() -> None:
    assert order(bad_words=[(1,)]).sampling.shaping == Shaping(bad_words=((1,),))
    card = replace(CARD, defaults={"bad_words": [[1]]})
    assert order(card=card).sampling.shaping == Shaping(bad_words=((1,),))


def test_what_the_models_generation_config_says_holds_until_a_request_says_otherwise() -> None:
    said = {"min_p": 0.2, "repetition_penalty": 1.1, "min_new_tokens": 5, "bad_words": [[1], [2]]}
    card = replace(CARD, defaults=said)
    made = order(card=card).sampling
    assert made.min_p == 0.2
    assert made.shaping == Shaping(
        repetition_penalty=1.1, min_new_tokens=5, stop_ids=(9,), bad_words=((1,), (2,))
    )
    params = {"min_p": 0, "repetition_penalty": 1, "min_new_tokens": 0}
    made = order(card=card, params=params, bad_words=[(3,)]).sampling
    assert made.min_p == 0
    # Bad words of the model's stay: nobody can have asked for them.
    assert made.shaping == Shaping(bad_words=((1,), (2,), (3,)))
    short = order(card=card, params={"max_new_tokens": 2}).sampling.shaping
    assert short is not None
    assert short.min_new_tokens == 2


def test_the_models_own_stop_tokens_can_be_ignored_the_clients_cannot() -> None:
    assert sequence(params={"ignore_eos": True}).stop_ids == frozenset()
    assert sequence(params={"ignore_eos": True, "stop_ids": [4]}).stop_ids == {4}
    assert sequence(params={"ignore_eos": False}).stop_ids == {9}
    assert order(so_far=[1, 9], params={"ignore_eos": True}).finish is None
    assert sequence(params={"stop_ids": []}).stop_ids == {9}


@pytest.mark.parametrize(
    ("params", "bad_words", "sentence"),
    [
        (
            {"logit_bias": [[1, 1], [300, 1]]}, (),
            "token id 300 in logit_bias is outside the vocabulary of 'm' (0 to 299)",
        ),
        (
            {}, [(1, 300)],
            "token id 300 in bad_words is outside the vocabulary of 'm' (0 to 299)",
        ),
        (
            {"stop_ids": [300]}, (),
            "token id 300 in stop_ids is outside the vocabulary of 'm' (0 to 299)",
        ),
        (
            {"min_new_tokens": 11, "max_new_tokens": 10}, (),
            "min_new_tokens 11 is above the 10 tokens that are made at most",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_model_are_refused(
    params: dict[str, Any], bad_words: Any, sentence: str
) -> None:
    with pytest.raises(BadParams) as raised:
        order(params=params, bad_words=bad_words)
    assert str(raised.value) == sentence
    near = {"logit_bias": [[299, 1]], "stop_ids": [299], "min_new_tokens": 10, "max_new_tokens": 10}
    order(params=near, bad_words=[(299,)])


def test_a_whole_answer_is_read_again_with_no_choice_but_its_last_token() -> None:
    made = order(so_far=[5, 6, 7], params={"max_new_tokens": 3, "logprobs": 1, "min_p": 0.3})
    assert made.finish is Finish.LENGTH
    again = made.scoring_sequence(8)
    assert (again.id, again.so_far, again.max_new_tokens) == (8, (5, 6), 3)
    assert again.sampling == replace(made.sampling, shaping=Shaping(only=7))


def test_what_is_reported_decides_how_far_a_prefix_hit_may_reach() -> None:
    assert order(10).sampling.first_scored(10) is None
    assert order(10, params={"logprobs": 0}).sampling.first_scored(10) == 9
    assert order(10, params={"prompt_logprobs": 0}).sampling.first_scored(10) == 0


class Words:
    """Text has other ids behind a space."""

    @staticmethod
    def encode_word(text: str) -> list[list[int]]:
        ids = list(text.encode())
        return [ids, [200, *ids]] if text else [[]]


def test_bad_words_as_text_are_banned_wherever_they_stand_those_as_ids_as_they_are() -> None:
    words = cast("Tokenizer", Words())
    num_chars, encode = read_bad_words({"bad_words": ["ab", [7, 8], "ab", ""]}, words)
    assert num_chars == 8
    assert encode() == [(97, 98), (200, 97, 98), (7, 8)]
    assert read_bad_words({}, words)[1]() == []


def echo(params: dict[str, Any], inputs: dict[str, Any], **fields: Any) -> str:
    submit = Submit(
        stream=1, op="generate", key=bytes(16), attempt=1, inputs=inputs, params=params, **fields
    )
    return read_echo(submit, [104, 105], ByteTokenizer())


def test_a_prompt_is_echoed_as_it_was_given_once() -> None:
    assert echo({"echo": True}, {"prompt": "Größe"}) == "Größe"
    assert echo({"echo": True}, {"ids": [104, 105]}) == "hi"
    assert echo({"echo": False}, {"prompt": "hi"}) == echo({}, {"prompt": "hi"}) == ""
    assert echo({"echo": True}, {"prompt": "hi"}, so_far=[1]) == ""


def test_a_prompt_that_is_too_long_for_an_event_is_not_echoed() -> None:
    assert len(echo({"echo": True}, {"prompt": "x" * MAX_ECHO_CHARS})) == MAX_ECHO_CHARS
    with pytest.raises(BadParams, match="up to 65536 characters, not of 65537"):
        echo({"echo": True}, {"prompt": "x" * (MAX_ECHO_CHARS + 1)})


def test_more_ids_than_are_echoed_are_not_decoded() -> None:
    class Undecoding:
        @staticmethod
        def decode(ids: Any) -> str:
            raise AssertionError(f"{len(ids)} ids decoded")

    ids = [104] * (MAX_ECHO_CHARS + 1)
    submit = Submit(
        stream=1,
        op="generate",
        key=bytes(16),
        attempt=1,
        inputs={"ids": ids},
        params={"echo": True},
    )
    with pytest.raises(BadParams, match="prompt of up to 65536 ids, not of 65537"):
        read_echo(submit, ids, cast("Tokenizer", Undecoding()))


def test_tokens_that_become_text_count_as_work_for_a_thread() -> None:
    def num_chars(params: dict[str, Any], inputs: dict[str, Any], so_far: list[int]) -> int:
        submit = Submit(
            stream=1, op="generate", key=bytes(16), attempt=1, inputs=inputs, params=params,
            so_far=so_far,
        )  # fmt: skip
        return read_input(submit, ByteTokenizer())[0]

    assert num_chars({}, {"ids": [1] * 1000}, []) == 0
    assert num_chars({"echo": True}, {"ids": [1] * 1000}, []) == 4000
    assert num_chars({}, {"ids": [1]}, [1] * 1000) == 4000
    assert num_chars({"echo": True}, {"prompt": "abc"}, []) == 3
