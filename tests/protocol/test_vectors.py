"""The golden frames and exchanges of `protocol/vectors/`, as any implementation must run them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_protocol.codec import PLAIN, Codec, decode
from tensorwire_protocol.codec.typed import TYPED
from tensorwire_protocol.connection import FEATURE_RESUME, Connection
from tensorwire_protocol.errors import BadFraming, ErrorCode, RequestRefused, TensorwireError
from tensorwire_protocol.frames import (
    FIRST_OPTIONAL_KIND,
    HEADER_BYTES,
    PREFACE,
    Frame,
    FrameDecoder,
)
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK, Limits
from tensorwire_protocol.messages import (
    Failure,
    Hello,
    Kind,
    Message,
    Request,
    Resume,
    Submit,
    Welcome,
)
from tensorwire_protocol.roles import OPENERS, Role
from vectors import generate
from vectors.tagged import tagged, untagged

from .samples import cut, request, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

Vector = dict[str, Any]
Pieces = list[bytes]

SCRATCH = memoryview(bytearray(8192))
RECEIVERS = {
    "c>s": Role.SERVER, "s>c": Role.CLIENT, "g>w": Role.WORKER, "w>g": Role.DISPATCHER,
}  # fmt: skip
EXACT = (Kind.EVB, Kind.STEP)  # not only equal once decoded: the same bytes
NEGOTIABLE = {FEATURE_RESUME}  # what else has a feature depends on more than that one frame
# Of these the state table decides, which the scripts test.
ABOUT_STATE = {ErrorCode.SEQUENCE, ErrorCode.VERSION, ErrorCode.UNAUTHENTICATED}


def load(name: str) -> list[Vector]:
    text = (generate.FOLDER / name).read_text(encoding="ascii")
    return [json.loads(line) for line in text.splitlines()]


FRAMES, SCRIPTS = load("frames.jsonl"), load("scripts.jsonl")
GOOD = [vector for vector in FRAMES if "ok" in vector]
BAD = [vector for vector in FRAMES if "err" in vector]


def named(vectors: list[Vector]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in vectors])


on_both_codecs = pytest.mark.parametrize(
    "codec", [pytest.param(PLAIN, id="plain"), pytest.param(TYPED, id="typed")]
)


def ways_to_cut(data: bytes) -> Iterator[Pieces]:
    """Return the bytes whole, byte by byte, and cut in two at every offset."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


@pytest.mark.parametrize("name", ["frames.jsonl", "scripts.jsonl"])
def test_the_files_are_what_their_generator_makes(name: str) -> None:
    committed = (generate.FOLDER / name).read_text(encoding="ascii")
    assert committed == generate.files()[name], "run: python protocol/vectors/generate.py"


def test_all_vectors_together_are_small() -> None:
    assert sum(path.stat().st_size for path in generate.FOLDER.glob("*.jsonl")) < 1024 * 1024


# -- frames that are understood -------------------------------------------------------------------


def limits_of(vector: Vector) -> Limits:
    link = CLIENT_LINK if vector["direction"] in ("c>s", "s>c") else WORKER_LINK
    return replace(link, **vector.get("limits", {}))


def cut_frames(decoder: FrameDecoder, pieces: Pieces) -> Iterator[Frame]:
    """Return the frames of bytes that arrive in pieces, as soon as each is whole."""
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            buffer = decoder.get_buffer()
            part = view[: len(buffer)]
            buffer[: len(part)] = part
            decoder.received(len(part))
            view = view[len(part) :]
            while (frame := decoder.next_frame()) is not None:
                yield frame
    if decoder.is_mid_frame:
        raise AssertionError("the bytes stop inside a frame")


def understood(vector: Vector, pieces: Pieces, codec: Codec) -> list[Any]:
    """Return what the codec makes of the bytes."""
    limits = limits_of(vector)
    decoder = FrameDecoder(
        max_frame_bytes=limits.frame_bytes, max_segments=limits.segments, scratch=SCRATCH
    )
    frames = cut_frames(decoder, pieces)
    return [tagged(codec.decode(f, limits)) for f in frames if f.kind < FIRST_OPTIONAL_KIND]


@on_both_codecs
@named(GOOD)
def test_a_golden_frame_decodes_to_the_same_however_it_is_cut(vector: Vector, codec: Codec) -> None:
    for pieces in ways_to_cut(bytes.fromhex(vector["hex"])):
        assert understood(vector, pieces, codec) == vector["ok"], [len(piece) for piece in pieces]


@on_both_codecs
@named([vector for vector in GOOD if vector.get("encode", True)])
def test_a_golden_message_encodes_to_an_equal_frame(vector: Vector, codec: Codec) -> None:
    messages: list[Message] = untagged(vector["ok"])
    limits = replace(WORKER_LINK, **vector.get("limits", {}))
    data = b"".join(b"".join(codec.encode(message, limits)) for message in messages)
    golden = bytes.fromhex(vector["hex"])
    assert understood(vector, [data], codec) == vector["ok"]
    assert data[:HEADER_BYTES] == golden[:HEADER_BYTES]
    if messages and messages[0].KIND in EXACT:
        assert data == golden


@on_both_codecs
@named([vector for vector in GOOD if "feature" not in vector])
def test_an_end_of_a_connection_takes_a_golden_frame(vector: Vector, codec: Codec) -> None:
    connection = receiver(vector, codec)
    heard = connection.feed(bytes.fromhex(vector["hex"]))
    if connection.error is not None and vector["ok"][0]["kind"] != "ERR":  # which ends it rightly
        assert connection.error.code in ABOUT_STATE, connection.error
    if any(message["kind"] in ("REQ", "SUBMIT") for message in vector["ok"]):
        assert [tagged(message) for message in heard] == vector["ok"]


# -- frames that are refused ----------------------------------------------------------------------


def receiver(vector: Vector, codec: Codec) -> Connection:
    """Return the end that receives the vector, in the state where its frame belongs."""
    role = RECEIVERS[vector["direction"]]
    features = (vector["feature"],) if vector.get("feature") in NEGOTIABLE else ()
    connection = Connection(
        role, limits=limits_of(vector), scratch=SCRATCH, codec=codec, features=features
    )
    kind = int(vector["hex"][8:10], 16)
    if role in OPENERS:
        connection.feed(b"" if kind == Kind.WELCOME else wire(Welcome()))
        if kind != Kind.WELCOME:
            asked = Submit(stream=1, op="x", key=bytes(16), attempt=1)
            connection.send(request(1) if role is Role.CLIENT else asked)
    else:
        connection.feed(PREFACE if kind == Kind.HELLO else PREFACE + wire(Hello(features=features)))
    connection.take_output()
    return connection


def refusal(vector: Vector, pieces: Pieces, codec: Codec) -> dict[str, Any]:
    """Return how the bytes are refused, as the vector says it."""
    if "feature" in vector and vector["feature"] not in NEGOTIABLE:  # only its codec is tested
        try:
            understood(vector, pieces, codec)
        except RequestRefused:
            return said(BadFraming(""), "connection")
        except TensorwireError as error:
            return said(error, "connection")
        raise AssertionError("nothing was refused")
    connection = receiver(vector, codec)
    heard = [message for piece in pieces for message in connection.feed(piece)]
    assert heard == []
    if connection.error is not None:
        assert connection.is_closed
        return said(connection.error, "connection")
    (frame,) = cut(b"".join(connection.take_output()))
    failure = decode(frame, CLIENT_LINK)
    assert isinstance(failure, Failure)
    assert failure.stream == int.from_bytes(bytes.fromhex(vector["hex"])[8:12], "little")
    return said(failure.to_error(), "stream")


def said(error: TensorwireError, scope: str) -> dict[str, Any]:
    return {"code": int(error.code), "name": error.code.name, "scope": scope}


@on_both_codecs
@named(BAD)
def test_a_bad_frame_is_refused_for_the_same_reason_however_it_is_cut(
    vector: Vector, codec: Codec
) -> None:
    for pieces in ways_to_cut(bytes.fromhex(vector["hex"])):
        assert refusal(vector, pieces, codec) == vector["err"], [len(piece) for piece in pieces]


# -- what the vectors cover -----------------------------------------------------------------------


def test_every_kind_has_good_and_bad_vectors() -> None:
    good = {message["kind"] for vector in GOOD for message in vector["ok"]}
    assert good == {kind.name for kind in Kind}
    bad = {int(vector["hex"][8:10], 16) for vector in BAD}
    without_shape = {Kind.LOAD, Kind.SHM}
    assert bad >= set(Kind) - without_shape


def test_every_dtype_is_there_inline_and_in_a_segment() -> None:
    text = json.dumps(GOOD)
    for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8",
                 "U64", "U32", "U16", "U8", "BOOL"):  # fmt: skip
        assert f"tensor: inline {name}" in text
        assert f"tensor: {name} in a segment" in text


# -- exchanges ------------------------------------------------------------------------------------


class Run:
    """One script against one end of a connection."""

    def __init__(self, script: Vector, at: int | None, codec: Codec) -> None:
        features = tuple(script.get("features", ()))
        self.connection = Connection(
            Role(script["role"]),
            limits=replace(CLIENT_LINK, **script["limits"]) if "limits" in script else None,
            features=features,
            scratch=SCRATCH,
            codec=codec,
        )
        self.cut_at = at  # None: byte by byte
        self.now = 0.0
        self.heard: list[Message] = []
        self.out = b""
        self.connection.on_timer(0.0)

    def step(self, what: str, value: Any) -> None:
        connection = self.connection
        match what:
            case "peer":
                for piece in self.pieces(bytes.fromhex(value)):
                    self.heard += connection.feed(piece, self.now)
            case "app":
                connection.send(untagged(value))
            case "wait_s":
                self.now += value
                connection.on_timer(self.now)
            case "hears":
                assert [tagged(message) for message in self.heard] == value
                self.heard = []
            case "sends_bytes":
                data = bytes.fromhex(value)
                self.take_output()
                assert self.out[: len(data)] == data
                self.out = self.out[len(data) :]
            case "sends":
                self.take_output()
                frames = cut(self.out)
                assert sum(map(size_of, frames)) == len(self.out), "that is not frames alone"
                sent = [tagged(decode(frame, WORKER_LINK)) for frame in frames]
                assert len(sent) == len(value), sent
                assert [hide(s, pattern) for s, pattern in zip(sent, value, strict=True)] == value
                self.out = b""
            case "closed":
                assert connection.is_closed == (value is not False)
                if value:
                    code = None if connection.error is None else int(connection.error.code)
                    assert code == value["code"]
            case _:
                raise AssertionError(f"unknown step {what}")

    def pieces(self, data: bytes) -> Pieces:
        if self.cut_at is None:
            return [data[i : i + 1] for i in range(len(data))]
        return [data[: self.cut_at], data[self.cut_at :]]

    def take_output(self) -> None:
        self.out += b"".join(self.connection.take_output())

    def check_nothing_is_left(self) -> None:
        self.take_output()
        assert (self.out, self.heard) == (b"", [])


def size_of(frame: Frame) -> int:
    """Return the bytes of a frame whose only segment, if any, is that of DATA."""
    return HEADER_BYTES + len(frame.meta) + sum(map(len, frame.segments))


def hide(sent: dict[str, Any], pattern: dict[str, Any]) -> dict[str, Any]:
    """Return a message with what the pattern leaves open as the pattern has it."""
    free = {name: value for name, value in pattern.items() if value == {"$any": True}}
    return sent | free


@on_both_codecs
@pytest.mark.parametrize("script", SCRIPTS, ids=[s["name"] for s in SCRIPTS])
def test_an_exchange_goes_as_written_however_its_bytes_are_cut(
    script: Vector, codec: Codec
) -> None:
    lengths = [len(s["peer"]) // 2 for s in script["steps"] if "peer" in s]
    for at in [None, *range(max(lengths, default=0) + 1)]:
        run = Run(script, at, codec)
        for number, step in enumerate(script["steps"]):
            ((what, value),) = step.items()
            try:
                run.step(what, value)
            except AssertionError as error:
                raise AssertionError(f"step {number} ({what}), cut at {at}: {error}") from error
        run.check_nothing_is_left()


def test_requests_are_what_the_vectors_say_of_the_types() -> None:
    """The kinds that open a stream are answered on it, and the only ones with that scope."""
    kinds = {int(v["hex"][8:10], 16) for v in BAD if v["err"]["scope"] == "stream"}
    assert kinds == {Request.KIND, Resume.KIND, Submit.KIND}
