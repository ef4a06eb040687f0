"""The 16-byte frame header, and the decoder that cuts a byte stream into frames.

    0  u32 body_len   bytes after this header
    4  u8  kind
    5  u8  flags      1 END (only on DATA), 2 Z (reserved), 4 BODY; others must be 0
    6  u16 aux        number of segments, or an error code
    8  u32 stream     0 = the connection
    12 u32 meta_len   <= body_len

All little-endian. The body is: aux x u64 segment lengths (only kinds that carry segments), the
meta (one msgpack object), and the segments, each at a multiple of 64 from the start of the frame.
Of a kind from 0x80 up only the header is understood: it may be laid out as a later version likes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

from tensorwire_protocol.errors import BadFraming, FrameTooLarge, TooLarge
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.tensors import aligned_buffer, padding

if TYPE_CHECKING:
    from collections.abc import Callable

PREFACE = b"\x94TW1\r\n\x1a\n"
HEADER = struct.Struct("<IBBHII")
HEADER_BYTES = HEADER.size
SEGMENT_KINDS = frozenset({Kind.REQ, Kind.RES, Kind.SUBMIT})  # these carry arrays
FIRST_OPTIONAL_KIND = 0x80  # unknown kinds from here on are skipped
SCRATCH_BYTES = 256 * 1024
MAX_BODY_BYTES = 2**32 - 1  # what the header can say

_FIRST_BUFFER_BYTES = 64 * 1024
_U64 = struct.Struct("<Q")


class Flag(IntFlag):
    """Bits of the header's flags."""

    END = 1  # last frame of this side on the stream
    COMPRESSED = 2  # reserved in version 1
    BODY = 4  # segments follow as DATA frames


_KNOWN_FLAGS = int(Flag.END | Flag.BODY)
_BODY = int(Flag.BODY)
_END = int(Flag.END)
_DATA = int(Kind.DATA)
_NO_SEGMENTS: list[memoryview] = []  # nobody changes it
# Of the other kinds `aux` must be 0, and they have no body to follow.
_AUX_KINDS = SEGMENT_KINDS | {Kind.DATA, Kind.ERR, Kind.GOAWAY}


@dataclass(slots=True, eq=False)
class Frame:
    """One frame, its segments cut but its meta not yet decoded.

    `meta` and `segments` are views of memory that this frame owns, except where the decoder says
    that they live in its scratch buffer (see `FrameDecoder.next_frame`).
    """

    kind: int
    flags: int
    aux: int
    stream: int
    meta: memoryview
    segments: list[memoryview]


class FrameDecoder:
    """Cuts a byte stream into frames, whatever pieces it arrives in.

    Small frames are read in a scratch buffer that many decoders of one thread may share, so that an
    idle connection costs no buffer of its own; only an unfinished frame moves to memory of its own,
    which grows with the bytes that really arrived.

    Args:
        hold: told how many bytes the unfinished frame takes, before it takes them; may refuse.
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
        self._partial: memoryview | None = None  # an unfinished frame
        self._partial_bytes = 0
        self._wanted_bytes = 0  # of the unfinished frame, 0 while its header is incomplete
        self.num_started = 0  # frames that did not arrive in one piece

    @property
    def is_mid_frame(self) -> bool:
        """Say if the stream stopped inside a frame."""
        return self._partial is not None or self._at < self._end

    @property
    def unfinished_bytes(self) -> int:
        """How long the unfinished frame will be, as far as that is known."""
        return self._wanted_bytes or HEADER_BYTES

    def get_buffer(self) -> memoryview:
        """Return memory for the next bytes; it must be handed back by `received` at once."""
        if self._partial is None:
            return self._scratch
        end = self.unfinished_bytes
        return self._partial[self._partial_bytes : end]

    def received(self, num_bytes: int) -> None:
        """Say that `num_bytes` were written to the start of what `get_buffer` returned."""
        if self._partial is None:
            self._at, self._end = 0, num_bytes
        else:
            self._partial_bytes += num_bytes

    def clear(self) -> None:
        """Forget what was received, and free its memory; the stream cannot be taken up again."""
        self._at = self._end = 0
        self._drop_partial()

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

        The frame's views of small frames point into the scratch buffer: use or copy them before
        the next `get_buffer`. Frames with segments own their memory.

        Raises:
            FrameTooLarge, BadFraming: the stream cannot be understood from here on.
            Busy: `hold` refused; the frame cannot be received.
        """
        if self._partial is not None:
            return self._next_from_partial()
        at, left = self._at, self._end - self._at
        if left < HEADER_BYTES:
            if left:
                self._stash(0)
            return None
        header = HEADER.unpack_from(self._scratch, at)
        body_bytes, kind, flags, aux, stream, meta_bytes = header
        total = self._announced_bytes(body_bytes)
        if left < total:
            self._stash(total)
            return None
        self._at = end = at + total
        if flags or aux or meta_bytes != body_bytes or kind == _DATA:
            return self._cut(header, self._scratch[at:end], owned=False)
        return Frame(kind, 0, 0, stream, self._scratch[at + HEADER_BYTES : end], _NO_SEGMENTS)

    def _next_from_partial(self) -> Frame | None:
        assert self._partial is not None
        if not self._wanted_bytes:
            if self._partial_bytes < HEADER_BYTES:
                return None
            self._wanted_bytes = self._announced_bytes(HEADER.unpack_from(self._partial)[0])
        if self._partial_bytes < self._wanted_bytes:
            if self._partial_bytes == len(self._partial):
                self._grow(self._partial, self._wanted_bytes)
            return None
        whole = self._partial[: self._wanted_bytes]
        self._drop_partial()
        return self._cut(HEADER.unpack_from(whole), whole, owned=True)

    def _announced_bytes(self, body_bytes: int) -> int:
        # Refuse on the announced size: waiting for the body would let a peer make us buffer
        # whatever it likes.
        if body_bytes > self.max_frame_bytes:
            raise FrameTooLarge(
                f"a frame of {body_bytes} bytes was announced; at most {self.max_frame_bytes}"
                " are accepted"
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
        # Doubling what really came bounds the memory by twice the bytes received, whatever the
        # header claims.
        size = min(wanted_bytes, max(2 * len(old), _FIRST_BUFFER_BYTES))
        if self._hold is not None:
            self._hold(size)
        new = aligned_buffer(size)
        new[: len(old)] = old
        self._partial = new

    def _cut(self, header: tuple[int, ...], whole: memoryview, *, owned: bool) -> Frame:
        _, kind, flags, aux, stream, meta_bytes = header
        if kind >= FIRST_OPTIONAL_KIND:
            return Frame(kind, flags, aux, stream, whole[HEADER_BYTES:], [])
        if flags or aux:
            _check_header(kind, flags, aux)
        num_segments = aux if kind in SEGMENT_KINDS else 0
        meta_start = HEADER_BYTES + 8 * num_segments
        meta_end = meta_start + meta_bytes
        if meta_end > len(whole):
            raise BadFraming("a frame's meta is longer than its body")
        if not num_segments or flags & _BODY:
            if meta_end != len(whole) and kind != _DATA:
                raise BadFraming("a frame has bytes behind its meta that belong to nothing")
            if meta_bytes and kind == _DATA:
                raise BadFraming("a DATA frame has no meta")
            segments = [whole[meta_end:]] if kind == _DATA else []
            return Frame(kind, flags, aux, stream, whole[meta_start:meta_end], segments)
        if num_segments > self._max_segments:
            # The codec refuses this request; cutting 65,535 segments first would be a gift.
            return Frame(kind, flags, aux, stream, whole[meta_start:meta_end], [])
        if not owned:
            copy = aligned_buffer(len(whole))
            copy[:] = whole
            whole = copy
        segments = _segments(whole, num_segments, meta_end)
        return Frame(kind, flags, aux, stream, whole[meta_start:meta_end], segments)


def _check_header(kind: int, flags: int, aux: int) -> None:
    if flags & ~_KNOWN_FLAGS:
        raise BadFraming(f"a frame has reserved flags set ({flags:#04x})")
    if flags & _END and kind != Kind.DATA:
        raise BadFraming(f"a frame of kind {kind:#04x} cannot be the end of a body")
    if flags & _BODY and kind not in SEGMENT_KINDS:
        raise BadFraming(f"a frame of kind {kind:#04x} has no body to follow")
    if aux and kind not in _AUX_KINDS:
        raise BadFraming(f"a frame of kind {kind:#04x} has {aux} in a field that must be 0")


def _segments(whole: memoryview, num_segments: int, meta_end: int) -> list[memoryview]:
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
    return HEADER.pack(len(meta), kind, flags, aux, stream, len(meta)) + meta


def build_segmented_frame(
    kind: int, stream: int, meta: bytes, segments: list[memoryview], *, flags: int = 0
) -> list[bytes | memoryview]:
    """Return a frame with segments as buffers to be sent in order; segments are not copied.

    Raises:
        TooLarge: the header cannot say how long the frame is.
    """
    table = b"".join(_U64.pack(len(segment)) for segment in segments)
    buffers: list[bytes | memoryview] = []
    at = HEADER_BYTES + len(table) + len(meta)
    for segment in segments:
        pad = padding(at)
        buffers += [bytes(pad), segment] if pad else [segment]
        at += pad + len(segment)
    if at - HEADER_BYTES > MAX_BODY_BYTES:
        raise TooLarge(f"a frame of {at - HEADER_BYTES} bytes; at most {MAX_BODY_BYTES} exist")
    header = HEADER.pack(at - HEADER_BYTES, kind, flags, len(segments), stream, len(meta))
    return [header + table + meta, *buffers]
