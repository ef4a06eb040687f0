"""Checks of decoded values: msgpack's word is never taken for a type or a range.

Each returns its value with the type proven, or raises BadMeta (BadTensor for an array where none
is allowed) with a sentence that says what was expected.
"""

from __future__ import annotations

from array import array as array_of
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorwire_protocol.errors import BadMeta, BadTensor
from tensorwire_protocol.tensors import RawTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tensorwire_protocol.limits import Limits

U32_MAX = 2**32 - 1
_I32 = "i"
INT_ONLY: frozenset[type] = frozenset({int})
STR_ONLY: frozenset[type] = frozenset({str})
NUMBERS: frozenset[type] = frozenset({int, float})


def array(value: Any) -> list[Any]:
    if type(value) is not list:
        raise BadMeta("the meta must be an array")
    return value


def padded(value: Any, required: int, known: int) -> list[Any]:
    """Return exactly `known` fields: missing optional ones as None, later versions' ones cut."""
    fields = array(value)
    if len(fields) < required:
        raise BadMeta(f"the meta has {len(fields)} fields, at least {required} are needed")
    return fields[:known] + [None] * (known - len(fields))


def integer(value: Any, name: str, low: int = 0, high: int = U32_MAX) -> int:
    if type(value) is not int or not low <= value <= high:
        raise BadMeta(f"{name} must be an integer from {low} to {high}")
    return value


def optional_integer(value: Any, name: str, low: int = 0, high: int = U32_MAX) -> int | None:
    return None if value is None else integer(value, name, low, high)


def string(value: Any, name: str) -> str:
    if type(value) is not str:
        raise BadMeta(f"{name} must be a string")
    return value


def optional_string(value: Any, name: str) -> str | None:
    return None if value is None else string(value, name)


def byte_string(value: Any, name: str, length: int | None = None) -> bytes:
    if type(value) is not bytes or (length is not None and len(value) != length):
        raise BadMeta(f"{name} must be {'' if length is None else f'{length} '}bytes")
    return value


def column(value: Any, name: str, types: frozenset[type] = INT_ONLY) -> list[Any]:
    if type(value) is not list or not types.issuperset(map(type, value)):
        raise BadMeta(f"{name} must be a list of {'/'.join(t.__name__ for t in types)}")
    return value


def tokens_column(value: Any) -> list[int]:
    """Return token ids that are proven to fit 32 bits, as checksums and arrays need them."""
    if type(value) is not list:
        raise BadMeta("tokens must be a list of integers")
    try:
        return array_of(_I32, value).tolist()
    except (TypeError, OverflowError) as error:
        raise BadMeta("tokens must be integers of 32 bits") from error


def plain_map(value: Any, name: str, limits: Limits, *, arrays: bool = False) -> dict[str, Any]:
    if value is None:
        return {}
    if type(value) is not dict:
        raise BadMeta(f"{name} must be a map")
    if not value:  # as most of them are
        return value
    _check_plain(value, name, limits, limits.meta_depth - 1, arrays=arrays)
    return value


def numbers_map(value: Any, name: str, limits: Limits) -> dict[str, Any]:
    if value is None:
        return {}
    if type(value) is not dict:
        raise BadMeta(f"{name} must be a map")
    if value:
        _check_keys(value, name, limits)
        if not NUMBERS.issuperset(map(type, value.values())):
            raise BadMeta(f"{name} must hold numbers")
    return value


def _check_keys(value: dict[Any, Any], name: str, limits: Limits) -> None:
    key_bytes = limits.key_bytes
    for key in value:
        # Almost all keys are short: the length in characters decides without encoding.
        if type(key) is not str or len(key) * 4 > key_bytes < len(key.encode()):
            raise BadMeta(f"keys in {name} must be strings of up to {key_bytes} bytes")


_SCALARS = frozenset({type(None), bool, int, float, str, bytes})


def _check_plain(value: Any, name: str, limits: Limits, depth: int, *, arrays: bool) -> None:
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind is np.ndarray or kind is RawTensor:
        if not arrays:
            raise BadTensor(f"{name} may not hold a tensor")
        return
    if kind is not list and kind is not dict:  # msgpack's own timestamps, for one
        raise BadMeta(f"{name} holds a value of a type that is not allowed")
    if depth == 0:
        raise BadMeta(f"{name} is nested deeper than {limits.meta_depth}")
    children: Iterable[Any] = value
    if kind is dict:
        _check_keys(value, name, limits)
        children = value.values()
    elif _SCALARS.issuperset(map(type, value)):
        return
    for child in children:
        if type(child) not in _SCALARS:
            _check_plain(child, name, limits, depth - 1, arrays=arrays)
