"""Golden frames that answer, alone and as columns."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from tensorwire_protocol.errors import ErrorCode, Executed
from tensorwire_protocol.frames import Flag
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Data,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Kind,
    Result,
    Resume,
)
from tensorwire_protocol.tensors import ids_checksum
from vectors.making.building import (
    DOWN,
    FROM_WORKER,
    KEY,
    STREAM,
    TO_WORKER,
    UP,
    Vector,
    bad,
    frame,
    framing,
    good,
    pack,
    splice,
    tensor,
)


def bad_resume(name: str, meta: list[Any]) -> Vector:
    """Return a RESUME whose meta fails that stream alone."""
    data = frame(Kind.RESUME, pack(meta), stream=9)
    return bad(name, UP, data, ErrorCode.BAD_META, STREAM)


def of_a_stream() -> list[Vector]:
    return [
        good("cancel", UP, Cancel(stream=3)),
        good("cancel: for the deadline", UP, Cancel(stream=3, reason="deadline")),
        good("cancel: on a worker link", TO_WORKER, Cancel(stream=2**32 - 1)),
        framing("cancel: no reason", UP, frame(Kind.CANCEL, pack([]), stream=3)),
        framing("cancel: a number", UP, frame(Kind.CANCEL, pack([1]), stream=3)),
        framing("cancel: text without an array", UP, frame(Kind.CANCEL, pack("x"), stream=3)),
        good("resume", UP, Resume(stream=9, key=KEY, next_index=2**32 - 1)),
        good(
            "resume: with everything",
            UP,
            Resume(stream=9, key=KEY, next_index=7, next_char=2**32 - 1, credit=16),
        ),
        good(
            "resume: two fields are enough",
            UP,
            Resume(stream=9, key=KEY, next_index=7),
            frame(Kind.RESUME, pack([KEY, 7]), stream=9),
        ),
        bad_resume("resume: a short key", [b"k", 0]),
        bad_resume("resume: no index", [KEY]),
        bad_resume("resume: credit of 33 bits", [KEY, 0, 0, 2**32]),
        bad_resume("resume: an index below 0", [KEY, -1]),
        good("data: a chunk", UP, Data(stream=3, segment=0, payload=b"abc")),
        good("data: the last chunk", UP, Data(stream=3, segment=63, payload=b"\0", last=True)),
        good("data: of an answer", DOWN, Data(stream=3, segment=1, payload=bytes(70), last=True)),
        good("data: no bytes", UP, Data(stream=3, segment=0, payload=b"", last=True)),
        framing("data: a meta", UP, frame(Kind.DATA, b"\xc0", stream=3, rest=b"abc")),
        framing("data: BODY", UP, frame(Kind.DATA, b"", stream=3, flags=Flag.BODY, rest=b"abc")),
        good("ack: bare", DOWN, Ack(stream=1)),
        good("ack: with the number of tokens", DOWN, Ack(stream=1, prompt_tokens=12)),
        good("ack: no fields", DOWN, Ack(stream=1), frame(Kind.ACK, pack([]), stream=1)),
        good(
            "ack: on a worker link",
            FROM_WORKER,
            Ack(stream=1, prompt_tokens=2, prompt_ids=[0, 2**31 - 1]),
        ),
        framing("ack: tokens below 0", DOWN, frame(Kind.ACK, pack([-1]), stream=1)),
        framing(
            "ack: ids that are not whole",
            FROM_WORKER,
            frame(Kind.ACK, pack([1, b"\0\0\0"]), stream=1),
        ),
        good("evt: one token", DOWN, Event(stream=1, index=0, tokens=[5], text="a")),
        good("evt: text alone", DOWN, Event(stream=1, index=0, tokens=[], text="é🙂")),
        good(
            "evt: many tokens",
            DOWN,
            Event(
                stream=1,
                index=0,
                tokens=[0, 127, 128, 65535, 2**31 - 1],
                text="",
                extra={"logprobs": [-0.5]},
            ),
        ),
        good(
            "evt: three fields are enough",
            DOWN,
            Event(stream=1, index=0, tokens=[5], text="a"),
            frame(Kind.EVT, pack([0, [5], "a"]), stream=1),
        ),
        good(
            "evt: an empty extra is none",
            DOWN,
            Event(stream=1, index=0, tokens=[5], text="a"),
            frame(Kind.EVT, pack([0, [5], "a", {}]), stream=1),
        ),
        framing("evt: no text", DOWN, frame(Kind.EVT, pack([0, [5]]), stream=1)),
        framing("evt: text is nil", DOWN, frame(Kind.EVT, pack([0, [5], None]), stream=1)),
        framing("evt: text is bytes", DOWN, frame(Kind.EVT, pack([0, [5], b"a"]), stream=1)),
        framing("evt: an index below 0", DOWN, frame(Kind.EVT, pack([-1, [5], "a"]), stream=1)),
        framing(
            "evt: a token of 33 bits", DOWN, frame(Kind.EVT, pack([0, [2**31], "a"]), stream=1)
        ),
        framing(
            "evt: a token with a fraction", DOWN, frame(Kind.EVT, pack([0, [1.5], "a"]), stream=1)
        ),
        framing("evt: a token of text", DOWN, frame(Kind.EVT, pack([0, ["1"], "a"]), stream=1)),
        framing(
            "evt: tokens are bytes", DOWN, frame(Kind.EVT, pack([0, b"\5\0\0\0", "a"]), stream=1)
        ),
        framing(
            "evt: segments",
            DOWN,
            frame(Kind.EVT, pack([0, [5], "a"]), stream=1, aux=1, table=bytes(8)),
        ),
        good(
            "end: generated",
            DOWN,
            End(
                stream=1,
                finish=Finish.STOP,
                count=2,
                checksum=ids_checksum([5, 6]),
                usage={"prompt_tokens": 3, "completion_tokens": 2},
                timings={"queued_ms": 0.25, "largest_batch": 4},
                extra={"a": None},
            ),
        ),
        good(
            "end: log-probabilities",
            DOWN,
            End(
                stream=1,
                finish=Finish.LENGTH,
                count=2,
                checksum=ids_checksum([5, 6]),
                usage={"prompt_tokens": 2, "completion_tokens": 2},
                extra={
                    "logprobs": {
                        "token_logprobs": struct.pack("<2f", -0.5, -1.25),
                        "top_ids": struct.pack("<2i", 5, 9),
                        "top_logprobs": struct.pack("<2f", -0.5, -0.75),
                    },
                    "prompt_logprobs": {
                        "token_logprobs": struct.pack("<f", -3.5),
                        "top_ids": b"",
                        "top_logprobs": b"",
                        "token_ids": struct.pack("<i", 300),
                    },
                },
            ),
        ),
        *[
            good(f"end: {finish.value}", DOWN, End(stream=1, finish=finish, count=0, checksum=0))
            for finish in Finish
        ],
        good(
            "end: three fields are enough",
            DOWN,
            End(stream=1, finish=Finish.STOP, count=0, checksum=0),
            frame(Kind.END, pack(["stop", 0, 0]), stream=1),
        ),
        framing("end: no checksum", DOWN, frame(Kind.END, pack(["stop", 0]), stream=1)),
        framing("end: an unknown reason", DOWN, frame(Kind.END, pack(["tired", 0, 0]), stream=1)),
        framing("end: a checksum below 0", DOWN, frame(Kind.END, pack(["stop", 0, -1]), stream=1)),
        framing(
            "end: usage holds text",
            DOWN,
            frame(Kind.END, pack(["stop", 0, 0, {"a": "b"}]), stream=1),
        ),
        framing(
            "end: usage holds true",
            DOWN,
            frame(Kind.END, pack(["stop", 0, 0, {"a": True}]), stream=1),
        ),
        good(
            "err: refused",
            DOWN,
            Failure(
                stream=1,
                code=ErrorCode.BUSY,
                message="full",
                retryable=True,
                executed=Executed.NO,
                retry_after_ms=100,
            ),
        ),
        good(
            "err: failed",
            DOWN,
            Failure(
                stream=1,
                code=ErrorCode.INTERNAL,
                message="",
                executed=Executed.MAYBE,
                log_id="0badf00d",
                detail={"step": 3},
            ),
        ),
        good(
            "err: done all the same",
            DOWN,
            Failure(stream=1, code=ErrorCode.OUTPUT_TOO_LARGE, message="m", executed=Executed.YES),
        ),
        good(
            "err: of the connection, from a client",
            UP,
            Failure(stream=0, code=ErrorCode.FRAMING, message="m"),
        ),
        good(
            "err: a number of a later version",
            DOWN,
            Failure(stream=1, code=0x03FF, message="m", retryable=True),
        ),
        good(
            "err: three fields are enough",
            DOWN,
            Failure(stream=1, code=1, message="m"),
            frame(Kind.ERR, pack(["m", False, "no"]), stream=1, aux=1),
        ),
        framing(
            "err: not said if it was executed",
            DOWN,
            frame(Kind.ERR, pack(["m", False]), stream=1, aux=1),
        ),
        framing(
            "err: executed perhaps",
            DOWN,
            frame(Kind.ERR, pack(["m", False, "perhaps"]), stream=1, aux=1),
        ),
        framing(
            "err: retryable is a number",
            DOWN,
            frame(Kind.ERR, pack(["m", 0, "no"]), stream=1, aux=1),
        ),
        framing(
            "err: a tensor in its detail",
            DOWN,
            frame(
                Kind.ERR,
                splice(["m", False, "no", None, None, {"x": tensor("U8", [1], b"x")}]),
                stream=1,
                aux=1,
            ),
        ),
        good("res: empty", DOWN, Result(stream=1)),
        good(
            "res: one field is enough",
            DOWN,
            Result(stream=1),
            frame(Kind.RES, pack([{}]), stream=1),
        ),
        good(
            "res: everything",
            DOWN,
            Result(
                stream=1,
                outputs={"x": "y", "z": np.arange(2, dtype="<i4")},
                usage={"prompt_tokens": 1},
                timings={"queued_ms": 0.5},
                extra={"status": "ready"},
            ),
        ),
        framing("res: no fields", DOWN, frame(Kind.RES, pack([]), stream=1)),
        framing(
            "res: a tensor in extra",
            DOWN,
            frame(Kind.RES, splice([{}, {}, {}, {"x": tensor("U8", [1], b"x")}]), stream=1),
        ),
        framing(
            "res: a tensor among the timings",
            DOWN,
            frame(Kind.RES, splice([{}, {}, {"x": tensor("F32", [], bytes(4))}]), stream=1),
        ),
    ]


def batches() -> list[Vector]:
    def evb(*columns: Any) -> bytes:
        return frame(Kind.EVB, pack(list(columns)))

    return [
        good(
            "evb: one token each",
            DOWN,
            EventBatch(
                streams=[1, 2], first_indexes=[0, 0], counts=None, tokens=[7, 8], texts=["a", "bc"]
            ),
        ),
        good(
            "evb: counts",
            DOWN,
            EventBatch(
                streams=[1, 2, 3],
                first_indexes=[0, 0, 0],
                counts=[2, 0, 1],
                tokens=[7, 8, 2**31 - 1],
                texts=["", "x", "é"],
            ),
        ),
        good(
            "evb: a stream twice",
            DOWN,
            EventBatch(
                streams=[1, 1], first_indexes=[0, 1], counts=None, tokens=[7, 8], texts=["a", "b"]
            ),
        ),
        good(
            "evb: nobody",
            DOWN,
            EventBatch(streams=[], first_indexes=[], counts=None, tokens=[], texts=[]),
        ),
        good(
            "evb: extra",
            DOWN,
            EventBatch(
                streams=[1],
                first_indexes=[0],
                counts=[1],
                tokens=[7],
                texts=["a"],
                extra={"n": 1.5},
            ),
        ),
        good(
            "evb: 64 streams",
            DOWN,
            EventBatch(
                streams=list(range(1, 65)),
                first_indexes=[0] * 64,
                counts=None,
                tokens=list(range(200, 264)),
                texts=["ab"] * 64,
            ),
        ),
        good(
            "evb: five fields are enough",
            DOWN,
            EventBatch(streams=[1], first_indexes=[0], counts=None, tokens=[7], texts=["a"]),
            evb([1], [0], None, [7], ["a"]),
        ),
        framing("evb: four fields", DOWN, evb([1], [0], None, [7])),
        framing(
            "evb: on a stream", DOWN, frame(Kind.EVB, pack([[1], [0], None, [7], ["a"]]), stream=1)
        ),
        framing("evb: fewer tokens than streams", DOWN, evb([1, 2], [0, 0], None, [7], ["a", "b"])),
        framing("evb: fewer texts than streams", DOWN, evb([1, 2], [0, 0], None, [7, 8], ["a"])),
        framing(
            "evb: fewer indexes than streams", DOWN, evb([1, 2], [0], None, [7, 8], ["a", "b"])
        ),
        framing(
            "evb: fewer counts than streams", DOWN, evb([1, 2], [0, 0], [2], [7, 8], ["a", "b"])
        ),
        framing(
            "evb: counts that do not add up", DOWN, evb([1, 2], [0, 0], [1, 2], [7, 8], ["a", "b"])
        ),
        framing("evb: a count below 0", DOWN, evb([1, 2], [0, 0], [3, -1], [7, 8], ["a", "b"])),
        framing("evb: a stream is text", DOWN, evb(["1"], [0], None, [7], ["a"])),
        framing("evb: a text is nil", DOWN, evb([1], [0], None, [7], [None])),
        framing("evb: a token of 33 bits", DOWN, evb([1], [0], None, [2**31], ["a"])),
    ]
