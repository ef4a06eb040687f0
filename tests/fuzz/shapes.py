"""Are a message's fields of the types that its class declares? No annotation is taken on trust."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from msgspec import Raw
from tensorwire_protocol.errors import Executed
from tensorwire_protocol.messages import Finish, Packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.messages import Message


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def _all(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in (list, tuple) and all(type(v) in types for v in value)


def _map(*types: type) -> Callable[[Any], bool]:
    return lambda value: (
        type(value) is dict
        and all(type(key) is str for key in value)
        and (not types or all(type(item) in types for item in value.values()))
    )


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": _is(int),
    "bool": _is(bool),
    "str": _is(str),
    "bytes": _is(bytes),
    "bytes | memoryview": _is(bytes, memoryview),
    "int | None": _optional(_is(int)),
    "str | None": _optional(_is(str)),
    "tuple[str, ...]": _all(str),
    "Sequence[int]": _all(int),
    "Sequence[str]": _all(str),
    "Sequence[int] | None": _optional(_all(int)),
    "Mapping[str, Any]": _map(),
    "Mapping[str, Any] | None": _optional(_map()),
    "Mapping[str, int]": _map(int, float),
    "Mapping[str, float]": _map(int, float),
    "Executed": _is(Executed),
    "Finish": _is(Finish),
    # `auth` of the greetings; what a gateway does not open.
    "Any": _optional(lambda value: _map()(value) or type(value) in (Packed, Raw)),
    "Packed": _is(Packed),
}


def misshapen(message: Message) -> str | None:
    """Return the name of a field that is not what it is declared to be, or None."""
    for field in signature(type(message)).parameters.values():
        if not _CHECKS[field.annotation](getattr(message, field.name)):
            return field.name
    return None
