"""Golden frames between gateway and worker."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.messages import (
    Drain,
    Heartbeat,
    Kind,
    Load,
    Shm,
    Step,
    Submit,
)
from vectors.making.building import (
    CONNECTION,
    DOWN,
    FROM_WORKER,
    KEY,
    STREAM,
    TO_WORKER,
    UP,
    Vector,
    bad,
    fields_of,
    frame,
    framing,
    good,
    pack,
)

BAD = ErrorCode.BAD_META


def worker_link() -> list[Vector]:
    submit = Submit(
        stream=1,
        op="generate",
        key=KEY,
        attempt=2,
        model="demo",
        inputs={"prompt": "a"},
        params={"seed": 1},
        deadline_ms=1,
        priority=7,
        so_far=[5, 2**31 - 1],
        tenant="a team",
    )
    step = Step(
        streams=[1, 2],
        attempts=[1, 2],
        first_indexes=[0, 3],
        counts=None,
        tokens=[7, 8],
        texts=["a", ""],
    )
    ready = Heartbeat(
        state="ready",
        steps=12,
        load={"waiting": 1, "running": 2},
        card={"tasks": ["generate"], "vocab_size": 320},
    )

    def submitted(*meta: Any) -> bytes:
        return frame(Kind.SUBMIT, pack(list(meta)), stream=1)

    return [
        good("submit: everything", TO_WORKER, submit),
        good(
            "submit: three fields are enough",
            TO_WORKER,
            Submit(stream=1, op="stats", key=KEY, attempt=1),
            submitted("stats", KEY, 1),
        ),
        good(
            "submit: a segment",
            TO_WORKER,
            Submit(
                stream=1, op="infer", key=KEY, attempt=1, inputs={"x": np.zeros(1025, np.uint8)}
            ),
        ),
        bad("submit: attempt 0", TO_WORKER, submitted("stats", KEY, 0), BAD, STREAM),
        bad("submit: no attempt", TO_WORKER, submitted("stats", KEY), BAD, STREAM),
        bad(
            "submit: tokens so far that are not whole",
            TO_WORKER,
            submitted("stats", KEY, 1, None, {}, {}, None, 0, b"abc"),
            BAD,
            STREAM,
        ),
        bad(
            "submit: a tenant that is no text",
            TO_WORKER,
            submitted("stats", KEY, 1, None, {}, {}, None, 0, b"", 7),
            BAD,
            STREAM,
        ),
        good("step: one token each", FROM_WORKER, step),
        good(
            "step: counts and extra",
            FROM_WORKER,
            Step(
                streams=[1],
                attempts=[1],
                first_indexes=[0],
                counts=[2],
                tokens=[7, 8],
                texts=["ab"],
                extra={"n": 1},
            ),
        ),
        framing(
            "step: fewer attempts than streams",
            FROM_WORKER,
            frame(Kind.STEP, pack([[1, 2], [1], [0, 0], None, [7, 8], ["a", "b"]])),
        ),
        framing(
            "step: five fields", FROM_WORKER, frame(Kind.STEP, pack([[1], [1], [0], None, [7]]))
        ),
        framing(
            "step: on a stream",
            FROM_WORKER,
            frame(Kind.STEP, pack([[], [], [], None, [], []]), stream=1),
        ),
        good("heartbeat: ready", FROM_WORKER, ready),
        good("heartbeat: loading", FROM_WORKER, Heartbeat(state="loading", detail="weights")),
        good(
            "heartbeat: one field is enough",
            FROM_WORKER,
            Heartbeat(state="failed"),
            frame(Kind.HEARTBEAT, pack(["failed"])),
        ),
        good(
            "heartbeat: a state of a later version",
            FROM_WORKER,
            Heartbeat(state="warming", detail="2 of 8"),
        ),
        framing("heartbeat: no state", FROM_WORKER, frame(Kind.HEARTBEAT, pack([]))),
        framing(
            "heartbeat: steps below 0", FROM_WORKER, frame(Kind.HEARTBEAT, pack(["ready", -1]))
        ),
        good("drain", TO_WORKER, Drain(grace_ms=5000)),
        framing("drain: no grace", TO_WORKER, frame(Kind.DRAIN, pack([]))),
        good("load", TO_WORKER, Load(payload={"model": "m"})),
        good("shm", TO_WORKER, Shm(payload={"slots": 4})),
        good("shm: nil is empty", TO_WORKER, Shm(payload={}), frame(Kind.SHM, pack([None]))),
        framing("shm: no fields", TO_WORKER, frame(Kind.SHM, pack([]))),
        bad(
            "evt: on a worker link",
            FROM_WORKER,
            frame(Kind.EVT, pack([0, [5], "a"]), stream=1),
            ErrorCode.UNKNOWN_KIND,
            CONNECTION,
        ),
        bad(
            "req: on a worker link",
            TO_WORKER,
            frame(Kind.REQ, pack(fields_of()), stream=1),
            ErrorCode.UNKNOWN_KIND,
            CONNECTION,
        ),
        bad(
            "submit: on a client link",
            UP,
            submitted("stats", KEY, 1),
            ErrorCode.UNKNOWN_KIND,
            CONNECTION,
        ),
        bad(
            "step: on a client link",
            DOWN,
            frame(Kind.STEP, pack([[], [], [], None, [], []])),
            ErrorCode.UNKNOWN_KIND,
            CONNECTION,
        ),
    ]
