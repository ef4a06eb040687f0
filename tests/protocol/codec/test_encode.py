"""Messages to bytes: the hot frames byte by byte, and what cannot be sent."""

from __future__ import annotations

import datetime
import gc
from typing import Any

import numpy as np
import pytest
from tensorwire_protocol.codec import decode, encode
from tensorwire_protocol.errors import BadMeta, BadTensor
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    End,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Hello,
    Message,
    Ping,
    Result,
    Step,
    Submit,
)

from protocol.samples import EXAMPLES, KEY, cut, event, plain, request, wire

K = "c410000102030405060708090a0b0c0d0e0f"  # KEY as msgpack bin

LITERAL: list[tuple[Message, str]] = [
    (Hello(), "06000000 01 00 0000 00000000 06000000  95 01 90 80 a0 c0"),
    (
        Hello(features=("passive",), software="tw/1"),
        "12000000 01 00 0000 00000000 12000000  95 01 91a770617373697665 80 a474772f31 c0",
    ),
    (
        Ping(payload=b"abcdefgh"),
        "0a000000 04 00 0000 00000000 0a000000  c408 6162636465666768",
    ),
    (
        Goaway(code=0x0302, last_stream=7, grace_ms=500),
        "06000000 06 00 0203 00000000 06000000  93 07 cd01f4 90",
    ),
    (
        request(1),
        "2b000000 10 00 0000 01000000 2b000000"
        f" 99 a5656d626564 {K} a16d 81a574657874739 1a26869 80 c0 c0 00 c0",
    ),
    (Cancel(stream=2), "0b000000 12 00 0000 02000000 0b000000  91 a963616e63656c6c6564"),
    (event(5, 3, [9], "a"), "07000000 21 00 0000 05000000 07000000  94 03 9109 a161 c0"),
    (
        EventBatch(
            streams=[1, 2], first_indexes=[0, 5], counts=None, tokens=[7, 300], texts=["a", "b"]
        ),
        "13000000 22 00 0000 00000000 13000000  96 920102 920005 c0 9207cd012c 92a161a162 c0",
    ),
    (
        Failure(stream=9, code=0x0301, message="no", retryable=True, retry_after_ms=50),
        "0b000000 23 00 0103 09000000 0b000000  96 a26e6f c3 a26e6f 32 c0 80",
    ),
    (Ack(stream=4, prompt_tokens=12), "03000000 24 00 0000 04000000 03000000  92 0c c0"),
    (
        Ack(stream=4, prompt_tokens=1, prompt_ids=[258]),
        "08000000 24 00 0000 04000000 08000000  92 01 c40402010000",
    ),
    (
        End(stream=3, finish=Finish.STOP, count=2, checksum=0xDEADBEEF, usage={"n": 2}),
        "12000000 25 00 0000 03000000 12000000  96 a473746f70 02 cedeadbeef 81a16e02 80 80",
    ),
    (
        Submit(stream=1, op="x", key=KEY, attempt=2, so_far=[1], tenant="t"),
        f"23000000 60 00 0000 01000000 23000000  9a a178 {K} 02 c0 80 80 c0 00 c40401000000 a174",
    ),
    (
        Step(streams=[1], attempts=[2], first_indexes=[3], counts=[1], tokens=[4], texts=[""]),
        "0e000000 61 00 0000 00000000 0e000000  97 9101 9102 9103 9101 9104 91a0 c0",
    ),
]


@pytest.mark.parametrize(("message", "bytes_hex"), LITERAL, ids=lambda v: type(v).__name__)
def test_the_frame_is_these_bytes(message: Message, bytes_hex: str) -> None:
    expected = bytes.fromhex(bytes_hex.replace(" ", ""))
    assert wire(message).hex() == expected.hex()
    assert plain(decode(cut(expected)[0], WORKER_LINK)) == plain(message)


def test_a_large_array_travels_behind_the_meta_at_a_multiple_of_64() -> None:
    array = np.arange(300, dtype="<i4")
    frame = wire(Result(stream=1, outputs={"x": array}))
    meta = "94 81 a178 c7 0a 01 93 a3493332 91cd012c 00 80 80 80".replace(" ", "")
    assert frame[:24].hex() == "e0040000200001000100000014000000" + ("b004000000000000")
    assert frame[24:44].hex() == meta
    assert frame[44:64] == bytes(20)
    assert frame[64:] == array.tobytes()


def test_a_large_array_is_not_copied() -> None:
    array = np.zeros(2048, dtype=np.uint8)
    *_, segment = encode(request(1, inputs={"x": array}), CLIENT_LINK)
    array[7] = 9
    assert segment[7] == 9


def test_data_is_a_header_and_the_callers_bytes() -> None:
    (data,) = [m for m in EXAMPLES if m.KIND == 0x11]
    assert wire(data).hex() == "0100000011000000010000000000000078"


@pytest.mark.parametrize(
    "value",
    [object(), {1}, 1j, 2**64, -(2**63) - 1, "\ud800", datetime.datetime(2026, 1, 1)],
    ids=repr,
)
@pytest.mark.parametrize("place", ["inputs", "params"])
def test_a_value_without_a_place_on_the_wire_is_refused(value: Any, place: str) -> None:
    with pytest.raises(BadMeta, match="cannot be sent"):
        wire(request(1, **{place: {"a": value}}))


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(BadMeta):
        wire(request(1, params={"a": loop}))


@pytest.mark.parametrize("scalar", [np.int64(3), np.zeros(2)], ids=repr)
@pytest.mark.parametrize("place", ["usage", "timings", "extra"])
def test_arrays_outside_the_outputs_are_refused_here_not_by_the_peer(
    place: str, scalar: Any
) -> None:
    # The peer would cut the connection, and every stream on it, for one numpy scalar of ours.
    with pytest.raises(BadMeta):
        wire(Result(stream=1, **{place: {"n": scalar}}))
    with pytest.raises(BadMeta):
        wire(request(1, params={"n": scalar}))


@pytest.mark.parametrize("ids", [[2**31], [1.5], ["a"]])
def test_token_ids_beyond_32_bits_are_refused(ids: list[Any]) -> None:
    with pytest.raises(BadMeta):
        wire(Ack(stream=1, prompt_ids=ids))
    with pytest.raises(BadMeta):
        wire(Submit(stream=1, op="x", key=KEY, attempt=1, so_far=ids))


@pytest.mark.parametrize(("num_arrays", "fits"), [(63, True), (64, True), (65, False)])
def test_a_message_carries_at_most_64_segments(num_arrays: int, fits: bool) -> None:
    message = request(1, inputs={str(i): np.zeros(1025, np.uint8) for i in range(num_arrays)})
    if fits:
        assert plain(decode(cut(wire(message))[0], CLIENT_LINK)) == plain(message)
    else:
        with pytest.raises(BadTensor, match="65 arrays"):
            wire(message)


def test_a_failed_message_leaves_nothing_behind_for_the_next() -> None:
    before = [wire(m) for m in EXAMPLES]
    for bad in ({"a": [1, object()]}, {"a": ["x" * 5000, 2**70]}):
        with pytest.raises(BadMeta):
            wire(Result(stream=1, outputs=bad))
    assert [wire(m) for m in EXAMPLES] == before


class _EncodesMeanwhile(dict[str, Any]):
    """A map whose reading sends another message, as a finalizer in the middle of `pack` may."""

    def items(self) -> Any:
        wire(Cancel(stream=99))
        wire(Result(stream=99, outputs={"x": np.zeros(3)}))
        gc.collect()
        return super().items()


def test_a_message_sent_in_the_middle_of_another_changes_neither() -> None:
    quiet: dict[str, Any] = {"a": 1, "x": np.zeros(2000, np.uint8)}
    assert wire(request(1, inputs=_EncodesMeanwhile(quiet))) == wire(request(1, inputs=quiet))
    assert wire(Failure(stream=1, code=1, message="m", detail=_EncodesMeanwhile({"a": 1}))) == (
        wire(Failure(stream=1, code=1, message="m", detail={"a": 1}))
    )
