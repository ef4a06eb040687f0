"""The tree of errors: stable numbers, one class each, and their way over the wire."""

from __future__ import annotations

import copy

import pytest
from tensorwire_protocol import errors
from tensorwire_protocol.errors import (
    BY_CODE,
    ConnectionFailed,
    ErrorCode,
    Executed,
    ExecutionFailed,
    InternalError,
    RequestRefused,
    TensorwireError,
    Unavailable,
    from_wire,
)

BASES: list[tuple[int, type[TensorwireError]]] = [
    (0x01, ConnectionFailed),
    (0x02, RequestRefused),
    (0x03, Unavailable),
    (0x04, ExecutionFailed),
]
CLASSES = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, TensorwireError)
]
LEAVES = [cls for cls in CLASSES if not cls.__subclasses__()]


def test_no_number_is_used_twice() -> None:
    assert len({int(code) for code in ErrorCode}) == len(list(ErrorCode.__members__))
    assert len({cls.code for cls in LEAVES}) == len(LEAVES)


def test_every_number_outside_of_uploads_has_a_class() -> None:
    without = {code for code in ErrorCode if code not in BY_CODE}
    assert {code >> 8 for code in without} == {5}


@pytest.mark.parametrize("cls", LEAVES)
def test_a_class_stands_under_the_base_of_its_high_byte(cls: type[TensorwireError]) -> None:
    assert issubclass(cls, dict(BASES)[cls.code >> 8])
    assert BY_CODE[cls.code] is cls


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_says_what_it_means(cls: type[TensorwireError]) -> None:
    assert cls.__doc__


def test_connection_and_request_errors_cannot_have_run_unless_they_say_so() -> None:
    not_executed = [c for c in LEAVES if issubclass(c, (RequestRefused, Unavailable))]
    assert all(cls.default_executed is Executed.NO for cls in not_executed)


@pytest.mark.parametrize("code", sorted(BY_CODE))
@pytest.mark.parametrize("executed", Executed)
@pytest.mark.parametrize("retryable", [True, False])
def test_what_a_peer_says_of_an_error_is_kept(
    code: int, executed: Executed, retryable: bool
) -> None:
    error = from_wire(
        code,
        "text",
        retryable=retryable,
        executed=executed,
        retry_after_ms=5,
        log_id="id",
        detail={"a": 1},
    )
    assert type(error) is BY_CODE[code]
    assert (error.code, error.message, str(error)) == (code, "text", "text")
    assert (error.retryable, error.executed, error.retry_after_ms) == (retryable, executed, 5)
    assert (error.log_id, error.detail) == ("id", {"a": 1})


@pytest.mark.parametrize(("high", "base"), BASES)
def test_numbers_of_later_versions_keep_their_class(high: int, base: type[TensorwireError]) -> None:
    assert type(from_wire(high << 8 | 0xFE, "m", retryable=True, executed=Executed.NO)) is base


@pytest.mark.parametrize("code", [0, 0x05FE, 0x0601, 0xFFFF])
def test_numbers_of_no_known_class_are_still_errors_of_ours(code: int) -> None:
    assert isinstance(from_wire(code, "", retryable=False, executed=Executed.YES), TensorwireError)


def test_the_number_of_internal_errors_means_the_leaf_not_the_root() -> None:
    assert BY_CODE[ErrorCode.INTERNAL] is InternalError


def test_defaults_come_from_the_class_and_can_be_overridden() -> None:
    busy = errors.Busy("full")
    assert (busy.retryable, busy.executed, busy.detail) == (True, Executed.NO, {})
    assert errors.Busy("full", retryable=False, executed=Executed.YES).executed is Executed.YES
    assert errors.Busy("full", retryable=False).retryable is False


@pytest.mark.parametrize("cls", LEAVES)
def test_errors_survive_a_copy(cls: type[TensorwireError]) -> None:
    twin = copy.copy(cls("text", retryable=True, retry_after_ms=3))
    assert (type(twin), twin.message, twin.retryable, twin.retry_after_ms) == (cls, "text", True, 3)
