"""What a request must look like before anybody works on it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol.errors import (
    BadMeta,
    BadParams,
    RequestRefused,
    UnknownOperation,
)
from tensorwire_protocol.messages import Request
from tensorwire_protocol.operations import (
    INLINE_IDS,
    INLINE_TEXT_BYTES,
    OPERATIONS,
    STREAMED,
    check_inputs,
    check_request,
    milliseconds,
    read_ids,
    read_text,
    read_texts,
    write_ids,
    write_text,
    write_texts,
)
from tensorwire_protocol.tensors import RawTensor

from .samples import ARRAY, INPUTS, KEY, MAP, PLAIN

INPUT_SETS: dict[str, dict[str, Any]] = {
    "generate": {"prompt": "hi"},
    "chat": {"roles": ["user"], "texts": ["hi"]},
    "embed": {"texts": ["hi"]},
    "tokenize": {"prompt": "hi"},
    "infer": {"x": np.zeros(3)},
    "models": {},
    "health": {},
    "stats": {},
}
NAN, INF = math.nan, math.inf


def check(op: str, inputs: Any = None, params: Any = None, model: str | None = "m") -> None:
    inputs = INPUT_SETS[op] if inputs is None else inputs
    request = Request(stream=1, op=op, key=KEY, model=model, inputs=inputs, params=params or {})
    check_inputs(check_request(request), inputs)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_takes_its_own_inputs(op: str) -> None:
    check(op)


def test_every_operation_is_tested_here() -> None:
    assert set(INPUT_SETS) == set(OPERATIONS)
    assert set(OPERATIONS) >= STREAMED


def test_an_unknown_operation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownOperation, match=r"'generat'; known are generate, chat"):
        check("generat", {})


def test_a_long_unknown_operation_is_not_repeated_in_full() -> None:
    with pytest.raises(UnknownOperation) as caught:
        check("x" * 10_000, {})
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("model", [None, ""])
def test_only_operations_on_models_need_a_model(op: str, model: str | None) -> None:
    if OPERATIONS[op].needs_model:
        with pytest.raises(BadMeta, match=f"{op} needs a model id"):
            check(op, model=model)
    else:
        check(op, model=model)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("generate", {}),
        ("generate", {"prompt": "a", "ids": [1]}),
        ("generate", {"text": "a"}),
        ("chat", {"texts": ["a"]}),
        ("embed", {"texts": ["a"], "prompt": "b"}),
        ("models", {"x": 1}),
    ],
)
def test_other_inputs_are_refused_with_the_right_ones(op: str, inputs: Any) -> None:
    with pytest.raises(BadMeta, match=f"{op} takes the inputs"):
        check(op, inputs)


def test_many_wrong_inputs_do_not_make_a_long_message() -> None:
    with pytest.raises(BadMeta) as caught:
        check("embed", {f"input {i}": 1 for i in range(1000)})
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["ids", "prompt", "texts", "roles"])
def test_a_models_own_inputs_may_have_any_name(name: str) -> None:
    check("infer", {name: np.zeros((2, 3))})


I31, I63 = 2**31 - 1, 2**63 - 1
ALLOWED: list[tuple[str, list[Any], list[Any]]] = [
    ("max_new_tokens", [1, 2, I31 - 1, I31], [0, -1, I31 + 1, 1.0, True, "1", None]),
    ("temperature", [0, 0.0, 1, 99.9, 100], [-0.1, 100.1, NAN, INF, -INF, True, "1", None]),
    ("top_k", [1, 2, I31], [0, -1, I31 + 1, 1.5, True]),
    ("top_p", [1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.01, NAN, INF, True]),
    ("min_p", [0, 0.0, 0.05, 1], [-0.01, 1.01, NAN, True, "0.1"]),
    ("repetition_penalty", [0.01, 1, 1.2, 100], [0, 0.009, 100.1, -1, NAN, True]),
    ("presence_penalty", [-2, -0.5, 0, 2.0], [-2.1, 2.1, NAN, INF, True, "1"]),
    ("frequency_penalty", [-2, -0.5, 0, 2.0], [-2.1, 2.1, NAN, INF, True, "1"]),
    (
        "logit_bias",
        [[], [[0, 100]], [[I31, -100.0]], [[i, 0.5] for i in range(300)]],
        [
            [[i, 0.5] for i in range(301)],
            [[1, 1], [1, 2]],
            [[-1, 1]],
            [[I31 + 1, 1]],
            [[1]],
            [[1, 100.1]],
            [[1, NAN]],
            [[1, True]],
            [[1.0, 1]],
            [[1, 1, 1]],
            {"1": 1},
            [1, 1],
            None,
        ],
    ),
    (
        "bad_words",
        [[], ["a"], ["a" * 64], [[1]], [[0, I31]], [[1] * 16], ["a"] * 32, ["a", [1]]],
        [["a"] * 33, [""], ["a" * 65], [[]], [[1] * 17], [[-1]], [[I31 + 1]], [1], "a", [["a"]]],
    ),
    ("min_new_tokens", [0, 1, I31], [-1, I31 + 1, 1.0, True]),
    ("ignore_eos", [True, False], [0, 1, None, "true"]),
    ("logprobs", [0, 1, 19, 20], [-1, 21, 1.0, True, None]),
    ("prompt_logprobs", [0, 1, 19, 20], [-1, 21, 1.0, True, None]),
    ("seed", [0, 1, I63 - 1, I63], [-1, I63 + 1, 0.0, False]),
    (
        "stop",
        [[], ["a"], ["a"] * 8, ["a" * 63], ["a" * 64], ["é" * 32]],
        [["a"] * 9, [""], ["a" * 65], ["é" * 33], "a", ["a", 1], [b"a"], None],
    ),
    (
        "stop_ids",
        [[], [0], [I31], [1] * 64],
        [[1] * 65, [-1], [I31 + 1], [1.0], [True], 1, "1", [[1]], None],
    ),
    ("wait", [True, False], [0, 1, None, "true"]),
]


@pytest.mark.parametrize(("name", "right", "wrong"), ALLOWED, ids=[a[0] for a in ALLOWED])
@pytest.mark.parametrize("op", ["generate", "chat"])
def test_an_option_is_taken_up_to_its_bounds_and_refused_beyond(
    op: str, name: str, right: list[Any], wrong: list[Any]
) -> None:
    rule = OPERATIONS[op].params[name].rule
    for value in right:
        check(op, params={name: value})
    for value in wrong:
        with pytest.raises(BadParams) as caught:
            check(op, params={name: value})
        assert caught.value.message.startswith(f"{name} must be {rule}, not ")
        assert len(caught.value.message) < 300


def test_every_option_is_tested_here() -> None:
    named = {name for op in OPERATIONS.values() for name in op.params}
    assert named == {name for name, _, _ in ALLOWED} | {"echo"}


def test_only_a_prompt_can_be_echoed() -> None:
    check("generate", params={"echo": True})
    check("generate", params={"echo": False})
    with pytest.raises(BadParams, match="echo must be true to have the prompt's text before"):
        check("generate", params={"echo": 1})
    with pytest.raises(BadParams, match="chat has no option 'echo'"):
        check("chat", params={"echo": True})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("topk", "top_k")],
)
def test_a_misspelt_option_is_answered_with_the_one_that_was_meant(
    misspelt: str, meant: str
) -> None:
    with pytest.raises(BadParams, match=f"no option '{misspelt}'; did you mean '{meant}'"):
        check("generate", params={misspelt: 1})


def test_an_option_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(BadParams, match=r"no option 'xyzzy' \(options: max_new_tokens, "):
        check("generate", params={"xyzzy": 1})
    with pytest.raises(BadParams, match=r"\(options: none\)"):
        check("health", params={"xyzzy": 1})


def test_a_large_wrong_value_is_not_repeated_in_full() -> None:
    with pytest.raises(BadParams) as caught:
        check("generate", params={"stop": "x" * 10_000})
    assert len(caught.value.message) < 300


ROLE_ERRORS: list[Any] = [[], ["user", "user"], "user", None, {"user": 1}, ["User"], [None]]


@pytest.mark.parametrize(
    "roles", [*ROLE_ERRORS, [["user"]], [np.zeros(3)], [np.array("user")], [b"user"]], ids=repr
)
def test_a_chat_needs_one_known_role_for_each_text(roles: Any) -> None:
    with pytest.raises((BadMeta, BadParams)):
        check("chat", {"roles": roles, "texts": ["hi"]})


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_four_roles_are_known(role: str) -> None:
    check("chat", {"roles": [role], "texts": ["hi"]})


@pytest.mark.parametrize("op", ["embed", "chat"])
def test_no_texts_are_too_few(op: str) -> None:
    with pytest.raises(BadParams, match="at least one text"):
        check(op, {"texts": []} | ({"roles": []} if op == "chat" else {}))


# -- texts and ids --------------------------------------------------------------------------------


@given(st.text() | st.integers(1, 3).map(lambda n: "é漢a" * n * 500))
def test_a_text_comes_back_as_it_went(text: str) -> None:
    written = write_text(text)
    assert isinstance(written, str) == (len(text) * 4 <= INLINE_TEXT_BYTES)
    assert read_text(written, "prompt") == text


@given(st.lists(st.text(max_size=5), max_size=5), st.sampled_from([1, 300]))
def test_texts_come_back_as_they_went(texts: list[str], times: int) -> None:
    assert read_texts(write_texts(texts * times)) == texts * times


def test_long_texts_are_one_array_of_bytes_and_one_of_lengths() -> None:
    joined, lengths = write_texts(["é" * 1000, "", "a" * 1000])
    assert (joined.dtype, joined.shape, lengths.tolist()) == (np.uint8, (3000,), [2000, 0, 1000])


@pytest.mark.parametrize("count", [INLINE_IDS - 1, INLINE_IDS, INLINE_IDS + 1])
def test_ids_come_back_as_they_went(count: int) -> None:
    ids = list(range(count))
    assert isinstance(write_ids(ids), list) == (count <= INLINE_IDS)
    assert read_ids(write_ids(ids)) == ids


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1, 1.5, "1", None])
def test_many_ids_are_never_cut_to_fit(wrong: Any) -> None:
    with pytest.raises(BadParams):
        write_ids([1] * 300 + [wrong])


@pytest.mark.parametrize("text", ["\ud800" * 2000, "a" * 2000 + "\udfff"])
def test_half_a_surrogate_pair_has_no_bytes(text: str) -> None:
    with pytest.raises(BadParams):
        write_text(text)
    with pytest.raises(BadParams):
        write_texts([text])
    with pytest.raises(BadParams):
        check("generate", params={"stop": ["\ud800"]})


def u8(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8)


def i32(*values: int) -> Any:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "value",
    [
        1,
        None,
        b"text",
        ["a"],
        u8(b"\xff"),
        u8(b"\xed\xa0\x80"),
        u8(b"a").reshape(1, 1),
        np.array(97, np.uint8),
        np.array([97], np.int8),
        i32(97),
        RawTensor("F8_E4M3", u8(b"a")),
    ],
    ids=repr,
)
def test_a_text_is_a_string_or_one_row_of_utf8_bytes(value: Any) -> None:
    with pytest.raises(BadMeta):
        read_text(value, "prompt")
    with pytest.raises(RequestRefused):
        check("generate", {"prompt": value})


@pytest.mark.parametrize(
    "value",
    [
        "text",
        None,
        {"a": "b"},
        ["a", 1],
        ["a", b"b"],
        ["a", u8(b"b")],
        [u8(b"abc")],
        [u8(b"abc"), i32(1), i32(2)],
        [u8(b"abc"), i32(1, 1)],
        [u8(b"abc"), i32(4)],
        [u8(b"abc"), i32(4, -1)],
        [u8(b"abc"), i32(2**31 - 1, 2**31 - 1, 5)],
        [u8(b"abc"), np.array([3], np.int64)],
        [u8(b"abc"), i32(3).reshape(1, 1)],
        [i32(1), i32(1)],
        [u8(b"\xc3\xa9"), i32(1, 1)],
        [u8(b"\xff"), i32(1)],
        [[1], [2]],
    ],
    ids=repr,
)
def test_texts_are_strings_or_bytes_and_lengths_that_fit(value: Any) -> None:
    with pytest.raises(BadMeta):
        read_texts(value)
    with pytest.raises(BadMeta):
        check("embed", {"texts": value})


@pytest.mark.parametrize(
    "value",
    [
        "12",
        None,
        {"a": 1},
        [1.0],
        [True],
        [-1],
        [2**31],
        ["1"],
        [[1]],
        i32(-1),
        i32(1).reshape(1, 1),
        np.array([1], np.int64),
        np.array([1], np.uint32),
        np.array(1, np.int32),
    ],
    ids=repr,
)
def test_ids_are_integers_from_0_to_31_bits(value: Any) -> None:
    with pytest.raises((BadMeta, BadParams)):
        read_ids(value)
    with pytest.raises((BadMeta, BadParams)):
        check("generate", {"ids": value})


@pytest.mark.parametrize("value", [[0, 2**31 - 1], i32(0, 2**31 - 1)], ids=repr)
def test_ids_may_be_a_list_or_an_array(value: Any) -> None:
    assert read_ids(value) == [0, 2**31 - 1]


VALUES = PLAIN | ARRAY | st.lists(ARRAY, max_size=2)
SLOTS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt", "ids", "texts", "roles"), VALUES)
)


@given(op=st.sampled_from(list(OPERATIONS)), inputs=SLOTS | INPUTS, params=MAP, data=st.data())
def test_any_request_passes_or_is_refused_by_an_error_of_ours(
    op: str, inputs: Any, params: Any, data: st.DataObject
) -> None:
    for name in OPERATIONS[op].params:
        if data.draw(st.booleans()):
            params[name] = data.draw(PLAIN)
    with contextlib.suppress(RequestRefused):
        check(op, inputs, params)


# -- durations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "ms"),
    [
        (1e-9, 1),
        (0.001, 1),
        (0.0011, 2),
        (1, 1000),
        (30.0, 30_000),
        (4294967, 4294967000),
        (4294967.295, 2**32 - 1),
        (1e308, 2**32 - 1),
        (10**400, 2**32 - 1),
    ],
)
def test_durations_are_rounded_up_to_milliseconds(seconds: float, ms: int) -> None:
    assert milliseconds(seconds) == ms


@pytest.mark.parametrize("seconds", [0, -1, NAN, INF, -INF, "1", None])
def test_what_is_no_duration_is_refused(seconds: Any) -> None:
    with pytest.raises(BadParams, match="above 0"):
        milliseconds(seconds)


@pytest.mark.parametrize("length", [1, 5000])
def test_half_a_surrogate_pair_is_refused_in_words_however_long_the_text(length: int) -> None:
    text = "\ud800" * length
    with pytest.raises(BadParams, match="surrogate"):
        write_text(text)
    with pytest.raises(BadParams, match="surrogate"):
        write_texts(["fine", text])
