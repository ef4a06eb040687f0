"""Golden frames that ask: REQ, CANCEL, RESUME, DATA."""

from __future__ import annotations

from typing import Any

from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import Flag
from tensorwire_protocol.messages import (
    Kind,
)
from vectors.making.building import (
    CONNECTION,
    KEY,
    STREAM,
    UP,
    Raw,
    Vector,
    bad,
    fields_of,
    frame,
    good,
    meta_with,
    pack,
    refused,
    request,
)


def requests() -> list[Vector]:
    everything = request(
        op="generate",
        model="demo@3f1c",
        inputs={"prompt": "Größe 🙂"},
        params={
            "max_new_tokens": 8, "temperature": 0.5, "top_k": 40, "top_p": 0.95,
            "min_p": 0.05, "repetition_penalty": 1.25, "presence_penalty": -2,
            "frequency_penalty": 1.5, "logit_bias": [[7, -100], [2**31 - 1, 0.5]],
            "bad_words": ["no", [1, 2]], "min_new_tokens": 2, "ignore_eos": True,
            "logprobs": 2, "prompt_logprobs": 0, "echo": True,
            "seed": 2**63 - 1, "stop": ["\n", "END"], "stop_ids": [0, 2**31 - 1], "wait": False,
        },
        deadline_ms=30_000,
        credit=16,
        priority=-100,
        trace="00-abc-01",
    )  # fmt: skip
    numbers = {
        "zero": 0, "fix": 127, "u8": 128, "u16": 256, "u32": 65536, "u64": 2**32,
        "largest": 2**64 - 1, "minus": -1, "i8": -33, "i16": -129, "i32": -32769,
        "smallest": -(2**63), "beyond double": 2**53 + 1,
    }  # fmt: skip
    floats = {
        "one": 1.0, "third": 1 / 3, "minus zero": -0.0, "infinity": float("inf"),
        "tiny": 5e-324, "nan": float("nan"),
    }  # fmt: skip
    return [
        good("req: everything", UP, everything),
        good("req: no model", UP, request(op="health", model=None)),
        good("req: two fields are enough", UP, request(model=None), _req([*fields_of()[:2]])),
        good("req: nil is absent", UP, request(model=None), _req(["infer", KEY] + [None] * 7)),
        good("req: the last stream", UP, request(stream=2**32 - 1)),
        good(
            "req: the largest numbers",
            UP,
            request(deadline_ms=2**32 - 1, credit=2**32 - 1, priority=100),
        ),
        good("req: an unknown operation is readable", UP, request(op="no.such")),
        good(
            "req: fields of a later version are skipped",
            UP,
            request(),
            _req([*fields_of(), 5, ["x"]]),
        ),
        good("req: integers of every size", UP, request(inputs={"n": numbers})),
        good("req: floats", UP, request(inputs=floats)),
        good(
            "req: a float of 32 bits is read as what it is",
            UP,
            request(inputs={"x": 0.5}),
            frame(Kind.REQ, meta_with(inputs={"x": Raw(b"\xca\x3f\x00\x00\x00")}), stream=1),
        ),
        good(
            "req: numbers need not be as short as they could be",
            UP,
            request(deadline_ms=5, priority=-1),
            frame(
                Kind.REQ,
                meta_with(
                    deadline_ms=Raw(b"\xcf" + (5).to_bytes(8)), priority=Raw(b"\xd1\xff\xff")
                ),
                stream=1,
            ),
        ),
        good(
            "req: strings and containers need not be as short as they could be",
            UP,
            request(op="ab", inputs={"x": [1]}),
            frame(
                Kind.REQ,
                meta_with(
                    op=Raw(b"\xdb\0\0\0\x02ab"),
                    inputs=Raw(b"\xdf\0\0\0\x01\xd9\x01x\xdd\0\0\0\x01\x01"),
                ),
                stream=1,
            ),
        ),
        good(
            "req: plain values of every type",
            UP,
            request(
                inputs={"": None, "t": True, "f": False, "b": b"\0\xff", "s": "", "l": [[], {}]}
            ),
        ),
        good(
            "req: names that some languages keep for themselves",
            UP,
            request(inputs={"__proto__": 1, "constructor": 2, "0": 3, "ключ": 4}),
        ),
        good(
            "req: strings and bytes of every size",
            UP,
            request(
                inputs={
                    "s": ["x" * 31, "x" * 32, "x" * 255, "x" * 256],
                    "b": [b"", bytes(255), bytes(256)],
                }
            ),
        ),
        good(
            "req: containers of more than 15 items",
            UP,
            request(params={f"k{i}": i for i in range(17)}, inputs={"l": list(range(16))}),
        ),
        good(
            "req: a NUL and a byte order mark are text",
            UP,
            request(inputs={"prompt": "\ufeffa\0b"}),
        ),
        good("two requests in a row", UP, [request(), request(stream=2, op="health", model=None)]),
        bad("req: stream 0", UP, _req(fields_of(), stream=0), ErrorCode.SEQUENCE, CONNECTION),
        bad(
            "req: a body that was not negotiated",
            UP,
            frame(Kind.REQ, pack(fields_of()), stream=1, flags=Flag.BODY, aux=1, table=bytes(8)),
            ErrorCode.UNSUPPORTED,
            STREAM,
        ),
        refused("req: no meta", b""),
        refused("req: a map", pack({"op": "infer"})),
        refused("req: nil", b"\xc0"),
        refused("req: no fields", pack([])),
        refused("req: no key", pack(["infer"])),
        refused("req: a key of 15 bytes", pack(fields_of(key=bytes(15)))),
        refused("req: a key of 17 bytes", pack(fields_of(key=bytes(17)))),
        refused("req: a key of text", pack(fields_of(key="x" * 16))),
        refused("req: the operation is bytes", pack(fields_of(op=b"infer"))),
        refused("req: the operation is nil", pack(fields_of(op=None))),
        refused("req: the model is a number", pack(fields_of(model=1))),
        refused("req: inputs are a list", pack(fields_of(inputs=[]))),
        refused("req: params are text", pack(fields_of(params="x"))),
        refused("req: a deadline below 0", pack(fields_of(deadline_ms=-1))),
        refused("req: a deadline of 33 bits", pack(fields_of(deadline_ms=2**32))),
        refused("req: a deadline with a fraction", pack(fields_of(deadline_ms=1.0))),
        refused("req: a deadline that is true", pack(fields_of(deadline_ms=True))),
        refused("req: credit below 0", pack(fields_of(credit=-1))),
        refused("req: a priority above 100", pack(fields_of(priority=101))),
        refused("req: a priority below -100", pack(fields_of(priority=-101))),
        refused("req: a trace of bytes", pack(fields_of(trace=b"t"))),
    ]


def _req(meta: list[Any], stream: int = 1) -> bytes:
    return frame(Kind.REQ, pack(meta), stream=stream)
