"""Golden frames at, below and above each limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tensorwire_protocol.codec import encode
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import Cancel, Event, Kind, Message, Result
from vectors.making.building import (
    CONNECTION,
    DOWN,
    STREAM,
    UP,
    Vector,
    bad,
    fields_of,
    framing,
    good,
    meta_with,
    pack,
    request,
    segmented,
    splice,
    tensor,
)

Bound = tuple[str, str, dict[str, int], Callable[[int], Message], ErrorCode]


def _cancel(meta_bytes: int) -> Cancel:
    return Cancel(stream=1, reason="x" * (meta_bytes - 3))


def _event(meta_bytes: int) -> Event:
    return Event(stream=1, index=0, tokens=[5], text="x" * (meta_bytes - 7))


def _traced(meta_bytes: int) -> Message:
    rest = len(pack(fields_of(trace="x" * 40))) - 40
    return request(trace="x" * (meta_bytes - rest))


# What is bounded, who receives, the limits, the message of a size, and the error above the limit.
BOUNDS: list[Bound] = [
    ("frame_bytes", UP, {"frame_bytes": 64}, _cancel, ErrorCode.FRAME_TOO_LARGE),
    ("meta of a cancel", UP, {"client_meta_bytes": 64}, _cancel, ErrorCode.FRAMING),
    ("meta of a request", UP, {"client_meta_bytes": 100}, _traced, ErrorCode.TOO_LARGE),
    ("meta of an event", DOWN, {"server_meta_bytes": 64}, _event, ErrorCode.FRAMING),
    (
        "elements of an array",
        UP,
        {"container_items": 16},
        lambda n: request(params={"x": [0] * n}),
        ErrorCode.BAD_META,
    ),
    (
        "pairs of a map",
        UP,
        {"container_items": 16},
        lambda n: request(params={f"k{i:02}": i for i in range(n)}),
        ErrorCode.BAD_META,
    ),
    (
        "tokens of an event",
        DOWN,
        {"container_items": 16},
        lambda n: Event(stream=1, index=0, tokens=[5] * n, text=""),
        ErrorCode.FRAMING,
    ),
    (
        "bytes of a key",
        UP,
        {"key_bytes": 64},
        lambda n: request(params={"k" * n: 1}),
        ErrorCode.BAD_META,
    ),
    (
        "bytes of a key in an answer",
        DOWN,
        {"key_bytes": 8},
        lambda n: Result(stream=1, usage={"k" * n: 1}),
        ErrorCode.FRAMING,
    ),
    (
        "bytes of a key, which are not characters",
        UP,
        {"key_bytes": 9},
        lambda n: request(inputs={"é" * 4 + "k" * (n - 8): 1}),
        ErrorCode.BAD_META,
    ),
    (
        "bytes of an inline tensor",
        UP,
        {"inline_bytes": 16},
        lambda n: request(inputs={"x": np.zeros(n, "u1")}),
        ErrorCode.BAD_TENSOR,
    ),
]


def at_each_bound() -> list[Vector]:
    """Return a frame at limit - 1, at the limit, and at limit + 1, for each."""
    vectors = []
    for what, direction, limits, message_of, code in BOUNDS:
        (limit,) = limits.values()
        for place, size in (("below", limit - 1), ("at", limit)):
            title = f"limit: {what}, {place} it"
            vectors.append(good(title, direction, message_of(size), **limits))
        # From a sender that knows nothing of the receiver's limits.
        careless = replace(WORKER_LINK, inline_bytes=1 << 20)
        data = b"".join(encode(message_of(limit + 1), careless))
        scope = STREAM if data[4] == Kind.REQ and code != ErrorCode.FRAME_TOO_LARGE else CONNECTION
        vectors.append(bad(f"limit: {what}, above it", direction, data, code, scope, **limits))
    return vectors


def segment_bounds() -> list[Vector]:
    """Return frames with one segment less than the limit, as many, and one more."""
    small = {"segments": 3, "inline_bytes": 4}
    vectors = []
    for place, count in (("below", 2), ("at", 3)):
        arrays = [np.full(5, i, "u1") for i in range(count)]
        message = request(inputs={"x": arrays})
        vectors.append(good(f"limit: segments of a request, {place} it", UP, message, **small))
    tensors = [tensor("U8", [5], i) for i in range(4)]
    segments = [bytes([i]) * 5 for i in range(4)]
    asking = segmented(Kind.REQ, meta_with(inputs={"x": tensors}), segments)
    answering = segmented(Kind.RES, splice([{"x": tensors}]), segments)
    vectors.append(framing("limit: segments of a request, above it", UP, asking, **small))
    vectors.append(framing("limit: segments of an answer, above it", DOWN, answering, **small))
    return vectors
