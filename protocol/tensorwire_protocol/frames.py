"""The 16-byte frame header, and the decoder that cuts a byte stream into frames.

    0  u32 body_len   bytes after this header
    4  u8  kind
    5  u8  flags      1 END (only on DATA), 2 Z (reserved), 4 BODY; others must be 0
    6  u16 aux        number of segments, or an error code
    8  u32 stream     0 = the connection
    12 u32 meta_len   <= body_len

All little-endian. The body is: aux x u64 segment lengths (only kinds that carry segments), the
meta (one msgpack object), and the segments, each at a multiple of 64 from the start of the frame.
With BODY the segments are missing: they follow in DATA frames, which have no meta. Of a kind from
0x80 up only the header is understood: it may be laid out as a later version likes.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import TYPE_CHECKING, Final, Protocol

from tensorwire_protocol.errors import BadFraming, FrameTooLarge
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.tensors import aligned_buffer, padding

if TYPE_CHECKING:
    from collections.abc import Callable

PREFACE = b"\x94TW1\r\n\x1a\n"
HEADER: Final = struct.Struct("<IBBHII")
HEADER_BYTES: Final = HEADER.size
pack_header: Final = HEADER.pack
unpack_header: Final = HEADER.unpack_from
SEGMENT_KINDS: Final = frozenset({Kind.REQ, Kind.RES, Kind.SUBMIT})  # these carry arrays
FIRST_OPTIONAL_KIND: Final = 0x80  # unknown kinds from here on are skipped
SCRATCH_BYTES = 256 * 1024
MAX_BODY_BYTES: Final = 2**32 - 1  # what the header can say
DATA_BYTES = 1024 * 1024  # of one DATA frame, at most; a larger message is sent as a body

_FIRST_BUFFER_BYTES = 64 * 1024
# Five times the 256 KiB of a first read is more than a frame has: such a frame is copied once.
_GROWTH = 5
# Small frames are cut from copies of so much of what came: bytes are cut, compared and read in a
# third of the time of views.
_CHUNK_BYTES: Final = 16 * 1024
_U64 = struct.Struct("<Q")


class Flag(IntFlag):
    """Bits of the header's flags."""

    END = 1  # last frame of this side on the stream
    COMPRESSED = 2  # reserved in version 1
    BODY = 4  # segments follow as DATA frames


_KNOWN_FLAGS: Final = int(Flag.END | Flag.BODY)
_BODY: Final = int(Flag.BODY)
_END: Final = int(Flag.END)
_DATA: Final = int(Kind.DATA)
_NO_SEGMENTS: Final[list[memoryview]] = []  # nobody changes it
# Of the other kinds `aux` must be 0, and they have no body to follow.
_AUX_KINDS: Final = SEGMENT_KINDS | {Kind.DATA, Kind.ERR, Kind.GOAWAY}


class Frame:
    """One frame, its segments cut but its meta not yet decoded.

    `segments` are views of memory that this frame owns, except where the decoder says that they
    live in its scratch buffer (see `FrameDecoder.next_frame`).

    `lengths` are those of segments that do not stand here but follow in DATA frames.
    """

    __slots__ = ("aux", "flags", "kind", "lengths", "meta", "segments", "stream")

    def __init__(
        self,
        kind: int,
        flags: int,
        aux: int,
        stream: int,
        meta: bytes,
        segments: list[memoryview],
        lengths: tuple[int, ...] = (),
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.aux = aux
        self.stream = stream
        self.meta = meta
        self.segments = segments
        self.lengths = lengths

    def with_segments(self, segments: list[memoryview]) -> Frame:
        """Return the same frame with segments that came in DATA frames."""
        lengths = self.lengths
        return Frame(self.kind, self.flags, self.aux, self.stream, self.meta, segments, lengths)


class Sink(Protocol):
    """Where the bytes of one DATA frame land."""

    def room(self, num_bytes: int) -> memoryview | None:
        """Return memory for the next bytes, at most so many; None: they are thrown away."""

    def took(self, num_bytes: int) -> None:
        """So many bytes were written to the start of the last `room`, or thrown away."""


class Sinks(Protocol):
    """Who knows where DATA lands."""

    def open_sink(self, stream: int, segment: int, num_bytes: int, *, is_last: bool) -> Sink:
        """Return the sink for a DATA frame whose header has arrived.

        Raises:
            ConnectionFailed: the frame is not due.
        """


class FrameDecoder:
    """Cuts a byte stream into frames, whatever pieces it arrives in.

    Small frames are read in a scratch buffer that many decoders of one thread may share, so that an
    idle connection costs no buffer of its own; only an unfinished frame moves to memory of its own,
    which grows with the bytes that really arrived.

    Args:
        hold: told how many bytes the unfinished frame takes, before it takes them; may refuse.

    Attributes:
        sinks: who knows where DATA lands; without it, it comes as a frame with one segment.
        expects_data: DATA comes next, most likely. Then a header is read alone, so that what is
            behind it is read where it belongs, and not copied there.
    """

    def __init__(
        self,
        *,
        max_frame_bytes: int,
        max_segments: int = 64,
        scratch: memoryview | None = None,
        hold: Callable[[int], None] | None = None,
    ) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._hold = hold
        self._max_segments = max_segments
        self._scratch = memoryview(bytearray(SCRATCH_BYTES)) if scratch is None else scratch
        self._at = self._end = 0  # what was received into the scratch buffer and not yet cut
        self._chunk = b""  # a copy of some of it
        self._chunk_at = 0  # where that begins
        self._partial: memoryview | None = None  # an unfinished frame
        self._partial_bytes = 0
        self._wanted_bytes = 0  # of the unfinished frame, 0 while its header is incomplete
        self.num_copied_bytes = 0  # of DATA, which came in one read with what stands before it
        self.num_started = 0  # frames that did not arrive in one piece
        self.sinks: Sinks | None = None
        self.expects_data = False
        self._sink: Sink | None = None  # of the DATA frame that is arriving
        self._data_bytes = self._sink_bytes = 0  # of it; and still to come
        self._data: Frame | None = None  # that frame

    @property
    def is_mid_frame(self) -> bool:
        """Say if the stream stopped inside a frame."""
        return self._partial is not None or self._sink is not None or self._at < self._end

    @property
    def unfinished_bytes(self) -> int:
        """How long the unfinished frame will be, as far as that is known."""
        return self._wanted_bytes or HEADER_BYTES + self._data_bytes

    @property
    def unfinished(self) -> bytes:
        """What has come of the frame that is not complete; DATA aside."""
        if self._partial is not None:
            return bytes(self._partial[: self._partial_bytes])
        return bytes(self._scratch[self._at : self._end])

    def get_buffer(self) -> memoryview:
        """Return memory for the next bytes; it must be handed back by `received` at once."""
        if self._sink is not None:
            room = self._sink.room(self._sink_bytes)
            return self._scratch[: self._sink_bytes] if room is None else room
        if self._partial is None:
            return self._scratch[:HEADER_BYTES] if self.expects_data else self._scratch
        end = self.unfinished_bytes
        return self._partial[self._partial_bytes : end]

    def received(self, num_bytes: int) -> None:
        """Say that `num_bytes` were written to the start of what `get_buffer` returned."""
        if self._sink is not None:
            self._sink.took(num_bytes)
            self._sink_bytes -= num_bytes
        elif self._partial is None:
            self._at, self._end = 0, num_bytes
            self._chunk, self._chunk_at = b"", 0
        else:
            self._partial_bytes += num_bytes

    def clear(self) -> None:
        """Forget what was received, and free its memory; the stream cannot be taken up again."""
        self._at = self._end = 0
        self._chunk = b""
        self._drop_partial()
        self.sinks = self._sink = self._data = None
        self._sink_bytes = 0

    def _drop_partial(self) -> None:
        if self._partial is not None and self._hold is not None:
            self._hold(0)
        self._partial, self._partial_bytes, self._wanted_bytes = None, 0, 0

    def take(self, num_bytes: int) -> bytes:
        """Return up to `num_bytes` received bytes that are not part of any frame: the preface."""
        taken = bytes(self._scratch[self._at : min(self._at + num_bytes, self._end)])
        self._at += len(taken)
        return taken

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None until more bytes are received.

        Frames own their memory, except for DATA: where that goes to no sink, use or copy it
        before the next `get_buffer`. DATA that went to a sink comes without its bytes.

        Raises:
            FrameTooLarge, BadFraming: the stream cannot be understood from here on.
            Busy: `hold` refused; the frame cannot be received.
        """
        if self._sink is not None:
            return self._next_from_sink()
        if self._partial is not None:
            return self._next_from_partial()
        at, left = self._at, self._end - self._at
        if left < HEADER_BYTES:
            self._chunk = b""
            if left:
                self._stash(0)
            return None
        start = at - self._chunk_at
        if start + HEADER_BYTES > len(self._chunk):
            start = self._load_chunk(at, HEADER_BYTES)
        header: tuple[int, int, int, int, int, int] = unpack_header(self._chunk, start)
        body_bytes, kind, flags, aux, stream, meta_bytes = header
        if kind == _DATA and self.sinks is not None:
            self._at += HEADER_BYTES
            return self._open_sink(header)
        total = self._announced_bytes(body_bytes, kind, aux)
        if left < total:
            self._chunk = b""
            self._stash(total)
            return None
        self._at = at + total
        if flags or aux or meta_bytes != body_bytes or kind == _DATA:
            return self._cut(header, self._scratch[at : at + total], owned=False)
        if start + total > len(self._chunk):
            start = self._load_chunk(at, total)
        meta = self._chunk[start + HEADER_BYTES : start + total]
        return Frame(kind, 0, 0, stream, meta, _NO_SEGMENTS)

    def _load_chunk(self, at: int, num_bytes: int) -> int:
        """Copy at least so many received bytes; return where in the chunk is what came at `at`."""
        end = min(at + max(num_bytes, _CHUNK_BYTES), self._end)
        self._chunk, self._chunk_at = bytes(self._scratch[at:end]), at
        return 0

    def _next_from_partial(self) -> Frame | None:
        assert self._partial is not None
        if not self._wanted_bytes:
            if self._partial_bytes < HEADER_BYTES:
                return None
            header = unpack_header(self._partial)
            if header[1] == _DATA and self.sinks is not None:
                self._drop_partial()
                return self._open_sink(header)
            self._wanted_bytes = self._announced_bytes(header[0], header[1], header[3])
        if self._partial_bytes < self._wanted_bytes:
            if self._partial_bytes == len(self._partial):
                self._grow(self._partial, self._wanted_bytes)
            return None
        whole = self._partial[: self._wanted_bytes]
        self._drop_partial()
        return self._cut(unpack_header(whole), whole, owned=True)

    def _open_sink(self, header: tuple[int, ...]) -> Frame | None:
        """Let the bytes of a DATA frame go where they belong, those first that are here."""
        num_bytes, kind, flags, aux, stream, meta_bytes = header
        self._announced_bytes(num_bytes, kind, aux)
        _check_header(kind, flags, aux)
        if meta_bytes:
            raise BadFraming("a DATA frame has no meta")
        assert self.sinks is not None
        self._sink = self.sinks.open_sink(stream, aux, num_bytes, is_last=bool(flags & _END))
        self._sink_bytes = self._data_bytes = num_bytes
        self.num_started += 1
        self._data = Frame(kind, flags, aux, stream, b"", [])
        here = min(num_bytes, self._end - self._at)
        if here:
            room = self._sink.room(here)
            if room is not None:
                room[:] = self._scratch[self._at : self._at + here]
            self._at += here
            self.num_copied_bytes += here
            self.received(here)
        return self._next_from_sink()

    def _next_from_sink(self) -> Frame | None:
        if self._sink_bytes:
            self._chunk = b""  # the next frame may be long in coming
            return None
        frame, self._sink, self._data, self._data_bytes = self._data, None, None, 0
        return frame

    def _announced_bytes(self, body_bytes: int, kind: int, aux: int) -> int:
        # Refuse on what is announced: waiting for the body would let a peer make us buffer
        # whatever it likes, and a table of 65,535 segments has half a megabyte.
        if body_bytes > self.max_frame_bytes:
            raise FrameTooLarge(
                f"a frame of {body_bytes} bytes was announced; at most {self.max_frame_bytes}"
                " are accepted"
            )
        if aux > self._max_segments and kind in SEGMENT_KINDS:
            raise BadFraming(
                f"a frame with {aux} segments was announced; a message carries at most"
                f" {self._max_segments}"
            )
        return HEADER_BYTES + body_bytes

    def _stash(self, total: int) -> None:
        self.num_started += 1
        ready = self._scratch[self._at : self._end]
        self._at = self._end = self._partial_bytes = 0
        self._grow(ready, total or HEADER_BYTES)
        self._partial_bytes = len(ready)
        self._wanted_bytes = total

    def _grow(self, old: memoryview, wanted_bytes: int) -> None:
        # Growing by a factor of what really came bounds the memory by as many times the bytes
        # received, whatever the header claims.
        size = min(wanted_bytes, max(_GROWTH * len(old), _FIRST_BUFFER_BYTES))
        if self._hold is not None:
            self._hold(size)
        new = aligned_buffer(size)
        new[: len(old)] = old
        self._partial = new

    def _cut(self, header: tuple[int, ...], whole: memoryview, *, owned: bool) -> Frame:
        _, kind, flags, aux, stream, meta_bytes = header
        if kind >= FIRST_OPTIONAL_KIND:
            return Frame(kind, flags, aux, stream, bytes(whole[HEADER_BYTES:]), [])
        if flags or aux:
            _check_header(kind, flags, aux)
        num_segments = aux if kind in SEGMENT_KINDS else 0
        meta_start = HEADER_BYTES + 8 * num_segments
        meta_end = meta_start + meta_bytes
        if meta_end > len(whole):
            raise BadFraming("a frame's meta is longer than its body")
        meta = bytes(whole[meta_start:meta_end])
        if flags & _BODY and meta_end == len(whole):
            lengths = struct.unpack_from(f"<{num_segments}Q", whole, HEADER_BYTES)
            return Frame(kind, flags, aux, stream, meta, [], lengths)
        if not num_segments or flags & _BODY:
            if meta_end != len(whole) and kind != _DATA:
                raise BadFraming("a frame has bytes behind its meta that belong to nothing")
            if meta_bytes and kind == _DATA:
                raise BadFraming("a DATA frame has no meta")
            segments = [whole[meta_end:]] if kind == _DATA else []
            return Frame(kind, flags, aux, stream, meta, segments)
        if not owned:
            copy = aligned_buffer(len(whole))
            copy[:] = whole
            whole = copy
        segments = cut_segments(whole, num_segments, meta_end)
        return Frame(kind, flags, aux, stream, meta, segments)


def _check_header(kind: int, flags: int, aux: int) -> None:
    if flags & ~_KNOWN_FLAGS:
        raise BadFraming(f"a frame has reserved flags set ({flags:#04x})")
    if flags & _END and kind != _DATA:
        raise BadFraming(f"a frame of kind {kind:#04x} cannot be the end of a body")
    if flags & _BODY and kind not in SEGMENT_KINDS:
        raise BadFraming(f"a frame of kind {kind:#04x} has no body to follow")
    if flags & _BODY and not aux:
        raise BadFraming("a body was announced that has no segments")
    if aux and kind not in _AUX_KINDS:
        raise BadFraming(f"a frame of kind {kind:#04x} has {aux} in a field that must be 0")


def cut_segments(whole: memoryview, num_segments: int, meta_end: int) -> list[memoryview]:
    """Return the segments that stand behind the meta of a whole frame.

    Raises:
        BadFraming: the table of their lengths does not agree with the frame.
    """
    segments = []
    at = meta_end
    for i in range(num_segments):
        (length,) = _U64.unpack_from(whole, HEADER_BYTES + 8 * i)
        pad = padding(at)
        if at + pad + length > len(whole):
            raise BadFraming("a frame's segments are longer than its body")
        if any(whole[at : at + pad]):
            raise BadFraming("a frame's padding is not zero")
        at += pad
        segments.append(whole[at : at + length])
        at += length
    if at != len(whole):
        raise BadFraming("a frame has bytes behind its last segment")
    return segments


def build_frame(kind: int, stream: int, meta: bytes, *, flags: int = 0, aux: int = 0) -> bytes:
    """Return a frame without segments."""
    return pack_header(len(meta), kind, flags, aux, stream, len(meta)) + meta


def build_segmented_frame(
    kind: int, stream: int, meta: bytes, segments: list[memoryview], *, flags: int = 0
) -> list[bytes | memoryview]:
    """Return a frame with segments as buffers to be sent in order; segments are not copied.

    What is too long for any frame is returned as `build_body` does.
    """
    table = b"".join(_U64.pack(len(segment)) for segment in segments)
    buffers: list[bytes | memoryview] = []
    at = HEADER_BYTES + len(table) + len(meta)
    for segment in segments:
        pad = padding(at)
        buffers += [bytes(pad), segment] if pad else [segment]
        at += pad + len(segment)
    if at - HEADER_BYTES > MAX_BODY_BYTES:
        at, flags, buffers = HEADER_BYTES + len(table) + len(meta), flags | _BODY, [*segments]
    header = pack_header(at - HEADER_BYTES, kind, flags, len(segments), stream, len(meta))
    return [header + table + meta, *buffers]


def build_body(
    frame: list[bytes | memoryview],
) -> tuple[bytes, list[memoryview]]:
    """Turn a frame with segments into one without, and the segments that follow it as DATA."""
    _, kind, flags, aux, stream, meta_bytes = unpack_header(frame[0])
    rest = bytes(frame[0][HEADER_BYTES:])  # table and meta
    header = pack_header(len(rest), kind, flags | _BODY, aux, stream, meta_bytes)
    # Pads are bytes.
    return header + rest, [buffer for buffer in frame[1:] if isinstance(buffer, memoryview)]
