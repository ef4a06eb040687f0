"""The header and the decoder: bytes to frames, however they are cut, within bounds."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol.errors import BadFraming, FrameTooLarge
from tensorwire_protocol.frames import (
    HEADER,
    PREFACE,
    SEGMENT_KINDS,
    Flag,
    Frame,
    FrameDecoder,
    build_body,
    build_frame,
    build_segmented_frame,
)
from tensorwire_protocol.messages import Kind

from .samples import cut

MIB = 1024 * 1024


def flat(frames: list[Frame]) -> list[tuple[Any, ...]]:
    """Return frames as values, copied out of the scratch buffer."""
    return [
        (f.kind, f.flags, f.aux, f.stream, bytes(f.meta), [bytes(s) for s in f.segments])
        for f in frames
    ]


def feed(decoder: FrameDecoder, data: bytes) -> list[tuple[Any, ...]]:
    """Push `data` through the decoder's buffers, as a transport does."""
    got: list[tuple[Any, ...]] = []
    view = memoryview(data)
    while len(view):
        buffer = decoder.get_buffer()
        assert len(buffer) > 0
        part = view[: len(buffer)]
        buffer[: len(part)] = part
        decoder.received(len(part))
        while (frame := decoder.next_frame()) is not None:
            got += flat([frame])
        view = view[len(part) :]
    return got


def segmented(segments: list[bytes], *, meta: bytes = b"\xc0", kind: int = Kind.REQ) -> bytes:
    return b"".join(build_segmented_frame(kind, 7, meta, [memoryview(s) for s in segments]))


SAMPLE = (
    build_frame(Kind.PING, 0, b"\xc4\x08abcdefgh")
    + segmented([b"a" * 100, b"", b"b"])
    + build_frame(Kind.EVT, 9, b"")
    + build_frame(0x90, 3, b"later")
    + build_frame(Kind.ERR, 3, b"\xc0", aux=0x0301)
)
SAMPLE_FRAMES = [
    (Kind.PING, 0, 0, 0, b"\xc4\x08abcdefgh", []),
    (Kind.REQ, 0, 3, 7, b"\xc0", [b"a" * 100, b"", b"b"]),
    (Kind.EVT, 0, 0, 9, b"", []),
    (0x90, 0, 0, 3, b"later", []),
    (Kind.ERR, 0, 0x0301, 3, b"\xc0", []),
]


def test_the_preface_is_neither_text_nor_tls_and_ends_in_newline_traps() -> None:
    assert PREFACE.hex() == "945457310d0a1a0a"


def test_a_header_is_sixteen_bytes_little_endian() -> None:
    frame = build_frame(Kind.ERR, 0x01020304, b"\xc0\xc0", aux=0x0301)
    assert frame.hex() == "02000000230001030403020102000000c0c0"


def test_segments_begin_at_multiples_of_64_from_the_start_of_the_frame() -> None:
    frame = segmented([b"\x11" * 3, b"\x22" * 65, b"\x33"])
    assert frame[:16].hex() == "f1000000100003000700000001000000"
    assert frame[16:41].hex() == "030000000000000041000000000000000100000000000000c0"
    assert frame[41:64] == bytes(23)
    assert frame[64:67] == b"\x11" * 3
    assert frame[67:128] == bytes(61)
    assert frame[128:193] == b"\x22" * 65
    assert frame[193:256] == bytes(63)
    assert frame[256:] == b"\x33"  # and no padding behind the last


@pytest.mark.parametrize("cut_at", range(len(SAMPLE) + 1))
def test_the_same_frames_come_out_wherever_the_stream_is_cut(cut_at: int) -> None:
    decoder = FrameDecoder(max_frame_bytes=1024)
    assert feed(decoder, SAMPLE[:cut_at]) + feed(decoder, SAMPLE[cut_at:]) == SAMPLE_FRAMES
    assert not decoder.is_mid_frame


@pytest.mark.parametrize("piece", [1, 2, 15, 16, 17, 63, 64])
def test_the_same_frames_come_out_of_pieces_of_any_size(piece: int) -> None:
    decoder = FrameDecoder(max_frame_bytes=1024)
    got = []
    for at in range(0, len(SAMPLE), piece):
        got += feed(decoder, SAMPLE[at : at + piece])
    assert got == SAMPLE_FRAMES


FRAMES = st.lists(
    st.one_of(
        st.builds(
            build_frame,
            st.sampled_from([Kind.PING, Kind.EVT, Kind.EVB, 0x80, 0xFF]),
            st.integers(0, 2**32 - 1),
            st.binary(max_size=40) | st.binary(min_size=300, max_size=700),
        ),
        st.builds(
            segmented,
            st.lists(st.binary(max_size=70) | st.binary(min_size=200, max_size=400), max_size=4),
        ),
    ),
    max_size=6,
)


@given(FRAMES, st.randoms(use_true_random=False))
def test_random_frames_in_random_pieces_come_out_whole(frames: list[bytes], chance: Any) -> None:
    # A scratch buffer smaller than most frames: every path between it and owned memory is taken.
    decoder = FrameDecoder(max_frame_bytes=8192, scratch=memoryview(bytearray(128)))
    data = b"".join(frames)
    got = []
    while data:
        size = chance.choice([1, 7, 16, 40, 128, 500, len(data)])
        got += feed(decoder, data[:size])
        data = data[size:]
    assert got == [flat(cut(frame))[0] for frame in frames]
    assert not decoder.is_mid_frame


def test_frames_of_reads_larger_than_a_chunk_come_out_whole() -> None:
    sizes = [0, 1, 16 * 1024 - 16, 100, 16 * 1024, 3, 40_000, 5000, 5000, 5000, 5000]
    frames = [build_frame(Kind.EVT, i, bytes([i]) * sizes[i % 11]) for i in range(33)]
    decoder = FrameDecoder(max_frame_bytes=MIB)
    got = feed(decoder, b"".join(frames[:20])) + feed(decoder, b"".join(frames[20:]))
    assert got == [flat(cut(frame))[0] for frame in frames]


class Discards:
    """Where all DATA is thrown away."""

    def open_sink(self, stream: int, segment: int, num_bytes: int, *, is_last: bool) -> Discards:
        return self

    def room(self, num_bytes: int) -> None:
        """There is none."""

    def took(self, num_bytes: int) -> None:
        """It is gone."""


def test_while_data_is_to_come_nothing_is_kept_of_what_came_before_it() -> None:
    before = build_frame(Kind.EVT, 1, bytes(15_000))
    header = HEADER.pack(MIB, Kind.DATA, 0, 0, 1, 0)
    decoders = [FrameDecoder(max_frame_bytes=2 * MIB) for _ in range(50)]
    for decoder in decoders:
        decoder.sinks = Discards()
    tracemalloc.start()
    try:
        for decoder in decoders:
            assert len(feed(decoder, before + header)) == 1
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 50 * 2000


def test_a_frame_larger_than_the_scratch_buffer_comes_out_whole() -> None:
    segment = bytes(range(256)) * 4096
    decoder = FrameDecoder(max_frame_bytes=2 * MIB)
    (got,) = feed(decoder, segmented([segment]))
    assert got[-1] == [segment]


@pytest.mark.parametrize(("size", "fits"), [(99, True), (100, True), (101, False)])
def test_the_announced_size_is_compared_with_the_limit(size: int, fits: bool) -> None:
    decoder = FrameDecoder(max_frame_bytes=100)
    frame = build_frame(Kind.EVT, 1, bytes(size))
    if fits:
        assert len(feed(decoder, frame)) == 1
    else:
        with pytest.raises(FrameTooLarge, match=r"101 bytes .* at most 100"):
            feed(decoder, frame)


@pytest.mark.parametrize("pieces", [[16], [10, 6], [1] * 16])
def test_four_gibibytes_are_refused_on_the_header_before_memory_is_spent(pieces: list[int]) -> None:
    header = HEADER.pack(2**32 - 1, Kind.REQ, 0, 0, 1, 4)
    decoder = FrameDecoder(max_frame_bytes=MIB)
    *before, last = pieces
    tracemalloc.start()
    try:
        for piece in before:
            feed(decoder, header[:piece])
            header = header[piece:]
        with pytest.raises(FrameTooLarge):
            feed(decoder, header[:last])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024


def test_memory_grows_with_what_came_not_with_what_was_announced() -> None:
    header = HEADER.pack(64 * MIB, Kind.REQ, 0, 0, 1, 4)
    decoder = FrameDecoder(max_frame_bytes=64 * MIB, scratch=memoryview(bytearray(4096)))
    chunk = bytes(4096)
    tracemalloc.start()
    try:
        feed(decoder, header)
        came = len(header)
        while came < 2 * MIB:
            feed(decoder, chunk)
            came += len(chunk)
            held, _ = tracemalloc.get_traced_memory()
            # Five times what came, 64 KiB to begin with, and a little for Python itself.
            assert held <= 5 * came + 80 * 1024
    finally:
        tracemalloc.stop()


def test_a_half_frame_is_noticed_and_clearing_forgets_it() -> None:
    decoder = FrameDecoder(max_frame_bytes=1024)
    feed(decoder, SAMPLE[:20])
    assert decoder.is_mid_frame
    decoder.clear()
    assert not decoder.is_mid_frame
    assert feed(decoder, SAMPLE) == SAMPLE_FRAMES


def test_the_shared_scratch_buffer_may_be_overwritten_between_reads() -> None:
    scratch = memoryview(bytearray(4096))
    one = FrameDecoder(max_frame_bytes=4096, scratch=scratch)
    two = FrameDecoder(max_frame_bytes=4096, scratch=scratch)
    assert feed(one, SAMPLE[:50]) + feed(two, SAMPLE[:60]) == 2 * SAMPLE_FRAMES[:1]
    assert feed(one, SAMPLE[50:]) == feed(two, SAMPLE[60:]) == SAMPLE_FRAMES[1:]


def test_segments_keep_their_bytes_and_alignment_after_later_reads() -> None:
    decoder = FrameDecoder(max_frame_bytes=4096)
    data = segmented([b"a" * 100, b"b" * 100])
    decoder.get_buffer()[: len(data)] = data
    decoder.received(len(data))
    frame = decoder.next_frame()
    assert frame is not None
    decoder.get_buffer()[:] = b"\xff" * len(decoder.get_buffer())
    assert [bytes(s) for s in frame.segments] == [b"a" * 100, b"b" * 100]
    for segment in frame.segments:
        assert np.frombuffer(segment, np.uint8).ctypes.data % 64 == 0


def header(
    body: bytes, *, kind: int = Kind.EVT, flags: int = 0, aux: int = 0, stream: int = 1, meta: int
) -> bytes:
    return HEADER.pack(len(body), kind, flags, aux, stream, meta) + body


def with_table(*lengths: int, body: bytes) -> bytes:
    table = b"".join(struct.pack("<Q", n) for n in lengths)
    return header(table + b"\xc0" + body, kind=Kind.REQ, aux=len(lengths), meta=1)


BROKEN = {
    "the meta is longer than the body": header(b"abc", meta=4),
    "bytes follow the meta": header(b"abcd", meta=3),
    "bytes follow the meta of a request": header(b"abcd", kind=Kind.REQ, meta=3),
    "the reserved flag for compression": header(b"abc", meta=3, flags=Flag.COMPRESSED),
    "an unknown flag": header(b"abc", meta=3, flags=0x80),
    "a body to follow where there is none": header(b"abc", meta=3, flags=Flag.BODY),
    "a number in a field that must be 0": header(b"abc", meta=3, aux=1),
    "the table of segments is cut": header(b"\0" * 15, kind=Kind.REQ, aux=2, meta=0),
    "a segment is longer than the frame": with_table(65, body=bytes(39) + b"x" * 64),
    "a segment of 2**64 - 1 bytes": with_table(2**64 - 1, body=bytes(39) + b"x" * 64),
    "two segments together too long": with_table(64, 1, body=bytes(31) + b"x" * 64),
    "bytes behind the last segment": with_table(63, body=bytes(39) + b"x" * 64),
    "padding that is not zero": with_table(64, body=bytes(38) + b"\1" + b"x" * 64),
    "no room for the padding": with_table(0, body=bytes(38)),
}


@pytest.mark.parametrize("frame", BROKEN.values(), ids=BROKEN)
def test_a_frame_whose_numbers_disagree_is_refused(frame: bytes) -> None:
    with pytest.raises(BadFraming):
        feed(FrameDecoder(max_frame_bytes=1024), frame)


def test_a_frame_beside_the_broken_ones_passes() -> None:
    (got,) = feed(FrameDecoder(max_frame_bytes=1024), with_table(64, body=bytes(39) + b"x" * 64))
    assert got[-1] == [b"x" * 64]


def test_the_layout_of_later_kinds_is_not_judged() -> None:
    later = header(b"abcdef", kind=0x80, flags=0xFF, aux=9, meta=3)
    (got,) = feed(FrameDecoder(max_frame_bytes=1024), later)
    assert got[0] == 0x80


@pytest.mark.parametrize("first", [1, 15, 16])
@pytest.mark.parametrize("kind", sorted(SEGMENT_KINDS))
def test_more_segments_than_allowed_are_refused_on_the_header_alone(kind: int, first: int) -> None:
    def read(count: int) -> list[tuple[Any, ...]]:
        decoder = FrameDecoder(max_frame_bytes=1024, max_segments=64)
        announced = HEADER.pack(8 * count + 1, kind, 0, count, 1, 1)
        return feed(decoder, announced[:first]) + feed(decoder, announced[first:])

    assert read(64) == []  # the table is still to come
    with pytest.raises(BadFraming, match=r"65 segments .* at most 64"):
        read(65)


def test_a_body_that_is_to_follow_has_its_table_here_and_its_bytes_elsewhere() -> None:
    table = struct.pack("<QQ", 10, 2**40)
    frame = header(table + b"\xc0", kind=Kind.REQ, flags=Flag.BODY, aux=2, meta=1)
    (got,) = feed(FrameDecoder(max_frame_bytes=1024), frame)
    assert got == (Kind.REQ, Flag.BODY, 2, 1, b"\xc0", [])


def test_a_data_frame_is_payload_behind_an_empty_meta() -> None:
    frame = header(b"payload", kind=Kind.DATA, flags=Flag.END, aux=3, meta=0)
    (got,) = feed(FrameDecoder(max_frame_bytes=1024), frame)
    assert got == (Kind.DATA, Flag.END, 3, 1, b"", [b"payload"])


def test_what_is_too_long_for_any_frame_becomes_a_body() -> None:
    huge = np.empty(2**32, np.uint8).data  # reserved, never touched
    frame = build_segmented_frame(Kind.RES, 1, b"\xc0", [huge])
    head, segments = build_body(frame)
    assert frame == [head, huge]
    assert head == header(
        struct.pack("<Q", 2**32) + b"\xc0", kind=Kind.RES, flags=Flag.BODY, aux=1, meta=1
    )
    assert segments == [huge]


def test_a_body_has_the_table_and_meta_of_its_frame_and_no_pads() -> None:
    one, two = memoryview(bytes(65)), memoryview(b"")
    head, segments = build_body(build_segmented_frame(Kind.REQ, 7, b"\xc0", [one, two]))
    assert head == header(
        struct.pack("<QQ", 65, 0) + b"\xc0", kind=Kind.REQ, flags=Flag.BODY, aux=2, stream=7, meta=1
    )
    assert segments == [one, two]


def test_taking_the_preface_leaves_the_frames_behind_it() -> None:
    decoder = FrameDecoder(max_frame_bytes=1024)
    data = PREFACE + SAMPLE
    decoder.get_buffer()[: len(data)] = data
    decoder.received(len(data))
    assert decoder.take(8) == PREFACE
    got = []
    while (frame := decoder.next_frame()) is not None:
        got += flat([frame])
    assert got == SAMPLE_FRAMES
