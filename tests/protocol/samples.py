"""Messages to test with: one of each class, and Hypothesis strategies that make any of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorwire_protocol.codec import encode
from tensorwire_protocol.errors import Executed
from tensorwire_protocol.frames import Frame, FrameDecoder
from tensorwire_protocol.limits import WORKER_LINK, Limits
from tensorwire_protocol.messages import (
    Ack,
    Auth,
    Cancel,
    Credit,
    Data,
    Drain,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Heartbeat,
    Hello,
    Load,
    Message,
    Ping,
    Pong,
    Request,
    Result,
    Resume,
    Shm,
    Step,
    Submit,
    Welcome,
    field_names,
)
from tensorwire_protocol.tensors import RawTensor

KEY = bytes(range(16))


def request(stream: int, **changes: Any) -> Request:
    fields_: dict[str, Any] = {
        "op": "embed",
        "key": KEY,
        "model": "m",
        "inputs": {"texts": ["hi"]},
    }
    return Request(stream=stream, **(fields_ | changes))


def end(stream: int, count: int, finish: Finish = Finish.STOP) -> End:
    return End(stream=stream, finish=finish, count=count, checksum=0)


def event(stream: int, index: int, tokens: list[int], text: str = "") -> Event:
    return Event(stream=stream, index=index, tokens=tokens, text=text)


def wire(message: Message, limits: Limits = WORKER_LINK) -> bytes:
    """Return the message's frame as it travels."""
    return b"".join(encode(message, limits))


def cut(data: bytes, *, limit: int = 2**26) -> list[Frame]:
    """Return the frames of bytes that arrive whole; each owns its memory."""
    decoder = FrameDecoder(max_frame_bytes=limit, scratch=memoryview(bytearray(len(data) or 1)))
    decoder.get_buffer()[: len(data)] = data
    decoder.received(len(data))
    frames = []
    while (frame := decoder.next_frame()) is not None:
        frames.append(frame)
    return frames


def plain(value: Any) -> Any:
    """Return a message, or anything in one, as what `==` can compare."""
    if isinstance(value, np.ndarray):
        return ("array", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, RawTensor):
        return ("raw", value.dtype, value.bits.shape, value.bits.tobytes())
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if hasattr(value, "KIND"):
        return (
            type(value),
            {name: plain(getattr(value, name)) for name in field_names(value)},
        )
    return value


U32 = st.integers(0, 2**32 - 1)
STREAM = st.integers(1, 2**32 - 1)
TOKEN = st.integers(0, 2**31 - 1)
TOKENS = st.lists(TOKEN, max_size=6)
TEXT = st.text(max_size=12)
NAMES = st.lists(TEXT, max_size=3).map(tuple)
MAP_KEY = st.text(max_size=16)  # at most 64 bytes
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=12)
)
PLAIN = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MAP_KEY, inner, max_size=3),
    max_leaves=6,
)
MAP = st.dictionaries(MAP_KEY, PLAIN, max_size=3)
EXTRA = st.none() | st.dictionaries(MAP_KEY, PLAIN, min_size=1, max_size=2)
NUMBERS = st.dictionaries(MAP_KEY, st.integers(0, 2**40) | st.floats(allow_nan=False), max_size=3)
DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1"]
ARRAY = hnp.arrays(
    dtype=st.sampled_from([np.dtype("<" + name) for name in DTYPES] + [np.dtype("?")]),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12),
)
INPUTS = st.dictionaries(MAP_KEY, PLAIN | ARRAY | st.lists(ARRAY, max_size=2), max_size=3)


@st.composite
def columns(draw: st.DrawFn, *, attempts: bool) -> dict[str, Any]:
    streams = draw(st.lists(STREAM, max_size=5))
    n = len(streams)
    counts = draw(st.none() | st.lists(st.integers(0, 3), min_size=n, max_size=n))
    num_tokens = n if counts is None else sum(counts)
    drawn: dict[str, Any] = {
        "streams": streams,
        "first_indexes": draw(st.lists(U32, min_size=n, max_size=n)),
        "counts": counts,
        "tokens": draw(st.lists(TOKEN, min_size=num_tokens, max_size=num_tokens)),
        "texts": draw(st.lists(TEXT, min_size=n, max_size=n)),
        "extra": draw(EXTRA),
    }
    if attempts:
        drawn["attempts"] = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    return drawn


_REQUEST: dict[str, Any] = {
    "stream": STREAM,
    "op": TEXT,
    "key": st.binary(min_size=16, max_size=16),
    "model": st.none() | TEXT,
    "inputs": INPUTS,
    "params": MAP,
    "deadline_ms": st.none() | U32,
    "priority": st.integers(-100, 100),
}
STRATEGIES: dict[type[Any], st.SearchStrategy[Any]] = {
    Hello: st.builds(Hello, version=U32, features=NAMES, limits=MAP, software=TEXT, auth=EXTRA),
    Welcome: st.builds(
        Welcome,
        version=U32,
        features=NAMES,
        limits=MAP,
        software=TEXT,
        session=st.binary(max_size=16),
        auth=EXTRA,
    ),
    Auth: st.builds(Auth, payload=MAP),
    Ping: st.builds(Ping, payload=st.binary(min_size=8, max_size=8)),
    Pong: st.builds(Pong, payload=st.binary(min_size=8, max_size=8)),
    Goaway: st.builds(
        Goaway, code=st.integers(0, 65535), last_stream=U32, grace_ms=U32, alternatives=NAMES
    ),
    Credit: st.builds(Credit, stream=U32, amount=st.integers(1, 2**32 - 1)),
    Request: st.builds(Request, **_REQUEST, credit=st.none() | U32, trace=st.none() | TEXT),
    Data: st.builds(
        Data,
        stream=STREAM,
        segment=st.integers(0, 63),
        payload=st.binary(max_size=200),
        last=st.booleans(),
    ),
    Cancel: st.builds(Cancel, stream=STREAM, reason=TEXT),
    Resume: st.builds(
        Resume,
        stream=STREAM,
        key=st.binary(min_size=16, max_size=16),
        next_index=U32,
        next_char=U32,
        credit=st.none() | U32,
    ),
    Result: st.builds(
        Result, stream=STREAM, outputs=INPUTS, usage=NUMBERS, timings=NUMBERS, extra=MAP
    ),
    Event: st.builds(Event, stream=STREAM, index=U32, tokens=TOKENS, text=TEXT, extra=EXTRA),
    EventBatch: columns(attempts=False).map(lambda drawn: EventBatch(**drawn)),
    Failure: st.builds(
        Failure,
        stream=U32,
        code=st.integers(0, 65535),
        message=TEXT,
        retryable=st.booleans(),
        executed=st.sampled_from(Executed),
        retry_after_ms=st.none() | U32,
        log_id=st.none() | TEXT,
        detail=MAP,
    ),
    Ack: st.builds(
        Ack, stream=STREAM, prompt_tokens=st.none() | U32, prompt_ids=st.none() | TOKENS
    ),
    End: st.builds(
        End,
        stream=STREAM,
        finish=st.sampled_from(Finish),
        count=U32,
        checksum=U32,
        usage=NUMBERS,
        timings=NUMBERS,
        extra=MAP,
    ),
    Submit: st.builds(
        Submit,
        **_REQUEST,
        attempt=st.integers(1, 2**32 - 1),
        so_far=TOKENS,
        tenant=st.text(max_size=8),
    ),
    Step: columns(attempts=True).map(lambda drawn: Step(**drawn)),
    Heartbeat: st.builds(
        Heartbeat, state=TEXT, steps=U32, load=MAP, card=st.none() | MAP, detail=st.none() | TEXT
    ),
    Drain: st.builds(Drain, grace_ms=U32),
    Load: st.builds(Load, payload=MAP),
    Shm: st.builds(Shm, stream=STREAM, payload=MAP),
}

EXAMPLES: list[Message] = [
    Hello(),
    Welcome(),
    Auth(),
    Ping(),
    Pong(),
    Goaway(),
    Credit(stream=1, amount=1),
    request(1),
    Data(stream=1, segment=0, payload=b"x"),
    Cancel(stream=1),
    Resume(stream=1, key=KEY, next_index=0, next_char=0),
    Result(stream=1),
    event(1, 0, [5]),
    EventBatch(streams=[1], first_indexes=[0], counts=None, tokens=[5], texts=["a"]),
    Failure(stream=1, code=0x0407, message="m"),
    Ack(stream=1),
    end(1, 0),
    Submit(stream=1, op="embed", key=KEY, attempt=1),
    Step(streams=[1], attempts=[1], first_indexes=[0], counts=None, tokens=[5], texts=["a"]),
    Heartbeat(state="ready"),
    Drain(),
    Load(),
    Shm(),
]
