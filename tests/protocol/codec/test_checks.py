"""The checks of decoded values, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwire_protocol.codec import checks
from tensorwire_protocol.errors import BadMeta, BadTensor
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.tensors import RawTensor


def nested(levels: int) -> Any:
    """Return maps within maps, `levels` in all."""
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "fits"), [(-1, False), (0, True), (5, True), (6, False), (True, False), (1.0, False)]
)
def test_integers_have_a_range_and_are_no_booleans(value: Any, fits: bool) -> None:
    if fits:
        assert checks.integer(value, "n", 0, 5) == value
    else:
        with pytest.raises(BadMeta, match="n must be an integer from 0 to 5"):
            checks.integer(value, "n", 0, 5)


@pytest.mark.parametrize("value", ["", "a", None])
def test_optional_fields_may_be_nil(value: str | None) -> None:
    assert checks.optional_string(value, "s") == value
    assert checks.optional_integer(None, "n") is None


@pytest.mark.parametrize(("length", "fits"), [(15, False), (16, True), (17, False)])
def test_byte_strings_may_have_a_fixed_length(length: int, fits: bool) -> None:
    if fits:
        checks.byte_string(bytes(length), "key", 16)
    else:
        with pytest.raises(BadMeta, match="key must be 16 bytes"):
            checks.byte_string(bytes(length), "key", 16)


def test_fields_of_later_versions_are_cut_and_missing_ones_are_nil() -> None:
    assert checks.padded([1, 2, 3], 1, 2) == [1, 2]
    assert checks.padded([1], 1, 3) == [1, None, None]
    with pytest.raises(BadMeta, match="0 fields, at least 1"):
        checks.padded([], 1, 3)


@pytest.mark.parametrize("value", [None, 1, "ab", b"ab", {}, [1.0], ["a"], [True], [1, None]])
def test_a_column_is_a_list_of_one_type(value: Any) -> None:
    with pytest.raises(BadMeta):
        checks.column(value, "column")


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**64 - 1, 1.5, "1", None, [1]])
def test_tokens_are_integers_of_32_bits(token: Any) -> None:
    assert checks.tokens_column([0, 2**31 - 1]) == [0, 2**31 - 1]
    with pytest.raises(BadMeta):
        checks.tokens_column([1, token])


def test_tokens_come_out_as_integers_and_nothing_like_them() -> None:
    assert [type(t) for t in checks.tokens_column([True, 1])] == [int, int]


@pytest.mark.parametrize(
    ("key", "fits"),
    [
        ("a" * 63, True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("é" * 32, True),
        ("é" * 33, False),
        ("", True),
        (b"a", False),
        (1, False),
    ],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_keys_are_strings_of_up_to_64_bytes(key: Any, fits: bool, depth: int) -> None:
    value = {key: 1} if depth == 1 else {"outer": [{key: 1}]}
    if fits:
        assert checks.plain_map(value, "params", CLIENT_LINK) == value
    else:
        with pytest.raises(BadMeta, match="64 bytes"):
            checks.plain_map(value, "params", CLIENT_LINK)


@pytest.mark.parametrize(("levels", "fits"), [(14, True), (15, True), (16, False), (17, False)])
def test_a_map_and_the_meta_around_it_may_be_16_deep(levels: int, fits: bool) -> None:
    if fits:
        checks.plain_map(nested(levels), "params", CLIENT_LINK)
    else:
        with pytest.raises(BadMeta, match="deeper than 16"):
            checks.plain_map(nested(levels), "params", CLIENT_LINK)


@pytest.mark.parametrize("value", [1, "a", [], b"", True, 0, "", False])
def test_what_is_no_map_is_refused(value: Any) -> None:
    with pytest.raises(BadMeta, match="params must be a map"):
        checks.plain_map(value, "params", CLIENT_LINK)


@pytest.mark.parametrize("array", [np.zeros(1), RawTensor("BF16", np.zeros(1, np.uint16))])
@pytest.mark.parametrize("wrap", [lambda a: {"a": a}, lambda a: {"a": [{"b": a}]}])
def test_arrays_stand_only_where_a_message_has_a_place_for_them(array: Any, wrap: Any) -> None:
    checks.plain_map(wrap(array), "inputs", CLIENT_LINK, arrays=True)
    with pytest.raises(BadTensor, match="params may not hold a tensor"):
        checks.plain_map(wrap(array), "params", CLIENT_LINK)


@pytest.mark.parametrize("value", [object(), {1}, (1,), 1j, np.float32(1)], ids=repr)
def test_values_of_other_types_are_refused_at_any_depth(value: Any) -> None:
    for wrapped in ({"a": value}, {"a": [value]}, {"a": {"b": [[value]]}}):
        with pytest.raises(BadMeta):
            checks.plain_map(wrapped, "params", CLIENT_LINK)


def test_a_shallower_limit_is_obeyed() -> None:
    with pytest.raises(BadMeta):
        checks.plain_map({"a": []}, "params", Limits(meta_depth=2))
