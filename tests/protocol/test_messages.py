"""The closed list of messages, and failures as messages."""

from __future__ import annotations

from typing import get_args

import pytest
from tensorwire_protocol.errors import BY_CODE, Executed, TensorwireError
from tensorwire_protocol.messages import TERMINAL, End, Failure, Kind, Result, WireMessage

CLASSES = get_args(WireMessage)


def test_every_kind_is_one_message_class() -> None:
    assert [cls.KIND for cls in CLASSES] == list(Kind)


def test_the_numbers_of_the_kinds_are_those_of_the_specification() -> None:
    assert {kind.name: int(kind) for kind in Kind} == {
        "HELLO": 1, "WELCOME": 2, "AUTH": 3, "PING": 4, "PONG": 5, "GOAWAY": 6, "CREDIT": 7,
        "REQ": 0x10, "DATA": 0x11, "CANCEL": 0x12, "RESUME": 0x13,
        "RES": 0x20, "EVT": 0x21, "EVB": 0x22, "ERR": 0x23, "ACK": 0x24, "END": 0x25,
        "SUBMIT": 0x60, "STEP": 0x61, "HEARTBEAT": 0x62, "DRAIN": 0x63, "LOAD": 0x64, "SHM": 0x65,
    }  # fmt: skip


def test_three_messages_end_a_stream() -> None:
    assert set(TERMINAL) & set(CLASSES) == {Result, Failure, End}


@pytest.mark.parametrize("cls", BY_CODE.values(), ids=lambda cls: cls.__name__)
def test_an_error_comes_back_from_its_message_as_it_was(cls: type[TensorwireError]) -> None:
    error = cls("text", executed=Executed.YES, retry_after_ms=7, log_id="id", detail={"a": 1})
    back = Failure.of(5, error).to_error()
    assert type(back) is cls
    assert vars(back) == vars(error)
