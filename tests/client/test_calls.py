"""Arguments into requests, results out of answers, without a socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire import BadParams, Generation, InternalError, Timings, Usage, calls
from tensorwire.address import Address, parse_address
from tensorwire.keys import new_key
from tensorwire.logprobs import read_logprobs
from tensorwire.results import with_choices
from tensorwire_protocol.messages import Result
from tensorwire_protocol.operations import check_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from tensorwire.call import Call


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:1", "localhost", 1),
        ("10.0.0.7:65535", "10.0.0.7", 65535),
        ("[::1]:8947", "::1", 8947),
        ("[::1]", "::1", 8947),
        ("box", "box", 8947),
        ("tensorwire://box:9", "box", 9),
        ("tensorwire://box:9/", "box", 9),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)


@pytest.mark.parametrize(
    "text", [":1", "a:", "a:0", "a:65536", "a:-1", "a:b", "::1", "a:1:2", "http://a:1", "a:\u0661"]
)
def test_wrong_addresses_are_refused_as_they_were_given(text: str) -> None:
    with pytest.raises(BadParams, match="host:port") as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


def test_the_address_comes_from_the_environment_or_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TENSORWIRE_ADDRESS", "elsewhere:12")
    assert str(parse_address(None)) == "elsewhere:12"
    assert str(parse_address("here:1")) == "here:1"
    monkeypatch.delenv("TENSORWIRE_ADDRESS")
    assert str(parse_address(None)) == "127.0.0.1:8947"
    assert str(parse_address("[::1]:5")) == "[::1]:5"


def test_keys_are_16_bytes_and_never_repeat() -> None:
    keys = [new_key() for _ in range(1000)]
    assert {len(key) for key in keys} == {16}
    assert len(set(keys)) == 1000


@pytest.mark.parametrize(
    ("prompt", "is_list"),
    [
        ("text", False),
        ([1, 2], False),
        (np.array([1]), False),
        ([], True),
        (["a"], True),
        ([[1]], True),
        ([np.array([1])], True),
    ],
)
def test_what_is_a_list_of_prompts(prompt: object, is_list: bool) -> None:
    assert calls.is_list_of_prompts(prompt) is is_list  # type: ignore[arg-type]


def test_texts_to_embed_are_cut_by_number_and_by_size() -> None:
    def sizes(texts: list[str]) -> list[int]:
        return [len(call.request(1, None).inputs["texts"]) for call in embed(texts)]

    def embed(texts: list[str]) -> list[Call[NDArray[np.float32]]]:
        return calls.embed("m", texts, {}, None)

    assert sizes(["x"] * 130) == [64, 64, 2]
    assert len(embed(["x" * 60_000] * 3)) == 3
    assert len(embed(["x" * 500_000])) == 1  # one text is never cut
    assert sizes([]) == [0]


def test_a_call_says_what_is_left_of_its_timeout() -> None:
    call = calls.generate("m", "x", {"timeout": 2.0}, 300.0)
    assert call.timeout_s == 2.0
    assert call.request(1, 1.5).deadline_ms == 1500
    assert call.request(1, -3.0).deadline_ms == 1
    assert call.request(1, None).deadline_ms is None
    assert call.request(1, None).key == call.request(2, None).key  # a repeat is the same request


def test_answers_of_the_wrong_form_are_internal_errors() -> None:
    (embed,) = calls.embed("m", ["x"], {}, None)
    for outputs in ({}, {"a": np.zeros(1), "b": np.zeros(1)}, {"a": "text"}):
        with pytest.raises(InternalError):
            embed.read(Result(stream=1, outputs=outputs))
    with pytest.raises(InternalError):
        calls.generate("m", "x", {}, None).read(Result(stream=1))


def test_unknown_numbers_are_kept_and_absent_ones_are_none() -> None:
    usage = Usage.from_wire({"prompt_tokens": 3, "gpu_joules": 7, "extra": 1})
    assert (usage.prompt_tokens, usage.cached_tokens) == (3, None)
    assert usage.extra == {"gpu_joules": 7, "extra": 1}
    assert Timings.from_wire({"largest_batch": 4}).largest_batch == 4


@pytest.mark.parametrize("seed", [2**64, -(2**64), 2**63, -1, 1.0])
def test_a_seed_out_of_range_is_refused_with_the_range(seed: object) -> None:
    with pytest.raises(BadParams, match=r"seed must be an integer from 0 to 2\*\*63 - 1, not"):
        calls.generate("m", "hi", {"seed": seed}, 1.0)


@pytest.mark.parametrize("name", ["stop", "stop_ids"])
def test_no_stops_in_a_list_are_none(name: str) -> None:
    assert calls.generate("m", "hi", {name: []}, 1.0).params == {}


class Settings(Mapping[int, float]):
    """A mapping that is no dict."""

    def __getitem__(self, key: int) -> float:
        return {5: 1.5}[key]

    def __iter__(self) -> Iterator[int]:
        return iter([5])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"stop": ("a", "b")}, {"stop": ["a", "b"]}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ()}, {}),
        ({"stop_ids": np.array([3, 4])}, {"stop_ids": [3, 4]}),
        ({"stop_ids": (np.int64(3),)}, {"stop_ids": [3]}),
        ({"stop_ids": np.array([], dtype=np.int64)}, {}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"top_k": np.int32(5), "echo": np.bool_(True)}, {"top_k": 5, "echo": True}),
        ({"logit_bias": {np.int64(5): np.float32(1.5)}}, {"logit_bias": [[5, 1.5]]}),
        ({"logit_bias": Settings()}, {"logit_bias": [[5, 1.5]]}),
        ({"bad_words": ("no", (1, 2), np.array([3]))}, {"bad_words": ["no", [1, 2], [3]]}),
    ],
)
def test_options_may_be_tuples_mappings_and_numpys_numbers(
    options: dict[str, Any], params: dict[str, Any]
) -> None:
    call = calls.generate("m", "hi", options, 1.0)
    assert call.params == params
    check_request(call.request(1, None))
    assert repr(dict(call.params)) == repr(params)  # no number of numpy's is left


def test_timeout_priority_choices_and_seed_may_be_numpys_numbers() -> None:
    call = calls.generate("m", "hi", {"timeout": np.float64(2), "priority": np.int8(3)}, 1.0)
    assert (repr(call.timeout_s), repr(call.priority)) == ("2.0", "3")
    each = calls.each_choice({"n": np.int64(2), "seed": np.int64(7)})
    assert repr(each) == "[{'seed': 7}, {'seed': 8}]"


def test_a_generation_fits_a_screen() -> None:
    arrays = {"token_logprobs": b"\0" * 4000, "top_ids": b"\0" * 8000, "top_logprobs": b"\0" * 8000}
    ids = list(range(1000, 2000))
    one = Generation(
        text="some text",
        token_ids=ids,
        finish_reason="stop",
        usage=Usage(),
        timings=Timings(),
        logprobs=read_logprobs(arrays, ids),
    )
    shown = repr(with_choices([one] * 8))
    assert shown.startswith("Generation(text='some text', token_ids=[1000, 1001,")
    assert "logprobs=Logprobs(<1000 tokens, 2 likeliest of each>)" in shown
    assert "choices=<8>" in shown
    assert "prompt_logprobs" not in shown
    assert len(shown) < 800
