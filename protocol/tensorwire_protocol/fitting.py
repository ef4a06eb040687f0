"""Would the peer accept a frame? By the limits that it has announced.

It would cut the connection, and every other stream on it, for one frame of ours that does not fit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tensorwire_protocol.codec import PLAIN
from tensorwire_protocol.errors import OutputTooLarge, RequestRefused, TooLarge
from tensorwire_protocol.frames import (
    HEADER_BYTES,
    SEGMENT_KINDS,
    Frame,
    cut_segments,
    unpack_header,
)
from tensorwire_protocol.messages import Event, EventBatch, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Message
    from tensorwire_protocol.outbox import OutgoingBody


class Fitting:
    """The limits of one peer.

    Args:
        limits: what it accepts.
        usual: the defaults of this link.
        is_opener: if this side is.

    Attributes:
        limits: for the encoder; no tensor need be inline because a peer would take it.
        welcome_bytes: a frame up to this size cannot break any of them.
    """

    __slots__ = ("_is_opener", "_meta_bytes", "_narrow", "limits", "welcome_bytes")

    def __init__(self, limits: Limits, usual: Limits, *, is_opener: bool) -> None:
        inline_bytes = min(limits.inline_bytes, usual.inline_bytes)
        self.limits = replace(limits, inline_bytes=inline_bytes)
        self._is_opener = is_opener
        self._meta_bytes = limits.meta_bytes(is_from_opener=is_opener)
        self._narrow = any(
            getattr(limits, name) < getattr(usual, name)
            for name in ("meta_depth", "key_bytes", "segments", "inline_bytes", "tensor_dims")
        )
        self.welcome_bytes = min(limits.frame_bytes, self._meta_bytes, limits.container_items)
        if self._narrow:
            self.welcome_bytes = 0

    def check(
        self, message: Message, buffers: Sequence[bytes | memoryview], body: OutgoingBody | None
    ) -> None:
        """Check a frame as it leaves, with the body that follows it.

        Raises:
            TooLarge, OutputTooLarge: the peer would not accept it.
        """
        limits, size = self.limits, sum(map(len, buffers)) - HEADER_BYTES
        if size > limits.frame_bytes:
            raise self._refusal(f"the message has {size} bytes; the peer accepts", "frame_bytes")
        if body is not None and body.left_bytes > limits.message_bytes:
            raise self._refusal(
                f"the arrays have {body.left_bytes} bytes; the peer accepts", "message_bytes"
            )
        meta_bytes = unpack_header(buffers[0])[5]
        if meta_bytes > self._meta_bytes:
            raise self._error(
                f"the message's text and options have {meta_bytes} bytes beside its arrays; the"
                f" peer accepts {self._meta_bytes}"
            )
        if (
            isinstance(message, Event | EventBatch | Step)
            and len(message.tokens) > limits.container_items
        ):
            raise self._refusal(
                f"{len(message.tokens)} tokens in one event; the peer accepts", "container_items"
            )
        if message.KIND in SEGMENT_KINDS and (self._narrow or meta_bytes > limits.container_items):
            self._check_inside(buffers, body)

    def _check_inside(
        self, buffers: Sequence[bytes | memoryview], body: OutgoingBody | None
    ) -> None:
        """Read a frame as the peer will."""
        _, kind, _, aux, stream, meta_bytes = unpack_header(buffers[0])
        if aux > self.limits.segments:
            raise self._refusal(f"{aux} arrays in one message; the peer accepts", "segments")
        start = HEADER_BYTES + 8 * aux
        meta = bytes(buffers[0])[start : start + meta_bytes]
        if body is not None:
            segments = list(body.segments)
        elif len(buffers) > 1:
            segments = [buffer for buffer in buffers if isinstance(buffer, memoryview)]  # no pads
        else:
            segments = cut_segments(memoryview(buffers[0]), aux, start + meta_bytes)
        try:
            PLAIN.decode(Frame(kind, 0, aux, stream, meta, segments), self.limits)
        except RequestRefused as error:
            raise self._error(f"the peer does not accept what is in it: {error.message}") from error

    def _refusal(self, text: str, limit: str) -> TooLarge | OutputTooLarge:
        return self._error(f"{text} {getattr(self.limits, limit)}")

    def _error(self, text: str) -> TooLarge | OutputTooLarge:
        return TooLarge(text) if self._is_opener else OutputTooLarge(text)
