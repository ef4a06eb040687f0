from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol.samples import wire
from tensorwire_protocol.errors import Executed
from tensorwire_protocol.messages import EncodedTerminal, End, Failure, Finish, Result, changed
from tensorwire_protocol.tensors import RawTensor, pack_ids
from tensorwire_server.config import OutcomesConfig
from tensorwire_server.gateway.outcomes import Outcome, Outcomes, fingerprint

from .forwarding import encoded, packed_request

NAME = b"k"
END = wire(End(stream=1, finish=Finish.STOP, count=0, checksum=0))


def outcome(text: str = "") -> Outcome:
    return Outcome(b"f", None, b"", text, END)


@pytest.mark.parametrize("num_bytes", [100, 3000, 20_000])
def test_a_record_takes_no_more_memory_than_is_counted(num_bytes: int) -> None:
    table: Outcomes[object] = Outcomes(OutcomesConfig())
    terminals = [bytes([i]) * num_bytes for i in range(200)]
    live = object()
    tracemalloc.start()
    try:
        for i, terminal in enumerate(terminals):
            table.begin(bytes([i]) * 16, live)
            table.keep(bytes([i]) * 16, live, Outcome(bytes(16), 1, b"", "", terminal), 0.0)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 200 * num_bytes < taken <= 1.02 * table.num_bytes


STEP = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, 5)),
    st.tuples(st.just("forget"), st.integers(0, 5)),
    st.tuples(st.just("keep"), st.integers(0, 5)),
    st.tuples(st.just("pass"), st.integers(1, 6)),
)


@given(st.lists(STEP, max_size=60), st.integers(0, 4), st.integers(0, 4))
def test_whatever_happens_a_name_has_one_meaning_and_the_bounds_hold(
    steps: list[tuple[str, int]], keys: int, records: int
) -> None:
    one = size_of(Outcome(bytes(4), None, b"", "x", END))
    config = OutcomesConfig(seconds=10, keys=keys, bytes=records * one)
    table: Outcomes[object] = Outcomes(config)
    live: dict[bytes, object] = {}
    kept: list[tuple[float, bytes, Outcome]] = []
    now = 0.0
    numbers = itertools.count()
    for what, number in steps:
        name = bytes([number])
        kept = [k for k in kept if k[0] > now]
        if what == "pass":
            now += number
        elif what == "begin" and table.find(name, now) is None:
            live[name] = object()
            table.begin(name, live[name])
        elif what == "forget" and name in live:
            table.forget(name, live.pop(name))
        elif what == "keep" and name in live:
            made = Outcome(str(next(numbers)).zfill(4).encode(), None, b"", "x", END)
            table.keep(name, live.pop(name), made, now)
            kept = [*kept, (now + 10, name, made)]
        kept = [k for k in kept if k[0] > now]
        most = min(keys, records)
        kept = kept[len(kept) - most :] if len(kept) > most else kept
        table.check_invariants()
        for n in range(6):
            name = bytes([n])
            found = table.find(name, now)
            if isinstance(found, Outcome):
                assert [k[2].asked for k in kept if k[1] == name] == [found.asked]
            else:
                assert found is live.get(name)
                assert name not in [k[1] for k in kept]
        table.check_invariants()


def test_what_was_forgotten_leaves_no_outcome_and_does_not_take_anothers_place() -> None:
    table: Outcomes[str] = Outcomes(OutcomesConfig())
    name = b"k"
    table.begin(name, "first")
    table.forget(name, "first")
    table.begin(name, "second")
    table.keep(name, "first", outcome(), 0.0)
    table.forget(name, "first")
    assert table.find(name, 0.0) == "second"
    assert (table.num_live, table.num_kept) == (1, 0)


def size_of(outcome: Outcome) -> int:
    table: Outcomes[str] = Outcomes(OutcomesConfig())
    table.begin(NAME, "live")
    table.keep(NAME, "live", outcome, 0.0)
    return table.num_bytes


def test_the_bytes_of_texts_tokens_and_last_frames_count() -> None:
    plain = size_of(outcome())
    assert 1000 <= size_of(outcome("x" * 1000)) - plain <= 1100
    assert size_of(Outcome(b"f", None, pack_ids([1] * 10), "", END)) == plain + 40
    longer = size_of(Outcome(b"f", None, b"", "", END + bytes(300)))
    assert plain + 300 <= longer <= plain + 302  # and msgpack's longer word for the length


@pytest.mark.parametrize(
    "terminal",
    [
        End(stream=1, finish=Finish.LENGTH, count=2, checksum=7, timings={"b": 2.5}),
        Failure(stream=1, code=5, message="m", executed=Executed.MAYBE, detail={"k": [1, "x"]}),
        Result(stream=1, outputs={"x": np.arange(6, dtype=np.float32).reshape(2, 3)}),
        Result(stream=1, outputs={"x": np.zeros(1000)}, extra={"e": {"f": None}}),
    ],
)
def test_a_kept_last_frame_ends_another_stream_as_it_ended_the_first(
    terminal: End | Result | Failure,
) -> None:
    kept = b"".join(encoded(terminal).buffers)
    again = EncodedTerminal.of(kept, 9)
    assert (again.KIND, again.stream) == (terminal.KIND, 9)
    assert b"".join(again.buffers) == wire(changed(terminal, stream=9))


def asked(**fields: Any) -> bytes:
    return fingerprint(packed_request(**fields))


def test_a_fingerprint_is_of_what_was_asked_and_not_of_how_urgently() -> None:
    array = np.arange(4, dtype=np.float32)
    base = asked(inputs={"x": array}, params={"seed": 1})
    assert base == asked(
        inputs={"x": array.copy()},
        params={"seed": 1},
        stream=9,
        key=bytes([1] * 16),
        deadline_ms=5,
        priority=3,
        trace="t",
        credit=4,
    )
    others = [
        asked(inputs={"x": array}, params={"seed": 2}),
        asked(inputs={"x": array}, params={"seed": 1}, op="embed"),
        asked(inputs={"x": array}, params={"seed": 1}, model="m"),
        asked(inputs={"y": array}, params={"seed": 1}),
        asked(inputs={"x": array[::-1]}, params={"seed": 1}),
        asked(inputs={"x": array.reshape(2, 2)}, params={"seed": 1}),
        asked(inputs={"x": array.view(np.int32)}, params={"seed": 1}),
        asked(inputs={"x": array.tobytes().decode("latin-1")}, params={"seed": 1}),
        asked(inputs={"x": RawTensor("BF16", array.view(np.uint16))}, params={"seed": 1}),
        asked(inputs={"x": RawTensor("F8_E4M3", array.view(np.uint8))}, params={"seed": 1}),
    ]
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize("at", [0, 1, 99_999])
def test_a_large_array_is_looked_at_from_its_beginning_to_its_end(at: int) -> None:
    array = np.zeros(100_000, dtype=np.float32)
    before = asked(inputs={"x": array})
    array[at] = 1
    assert asked(inputs={"x": array}) != before
