"""What gateway and worker lend each other, and that all of it comes back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire_protocol.bodies import FEATURE_BODY, FEATURE_SHM
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import BadFraming, ErrorCode
from tensorwire_protocol.frames import Flag
from tensorwire_protocol.messages import Failure, Kind, Message, Result, Shm, Submit
from tensorwire_protocol.roles import Role
from tensorwire_server.memory.sharing import GATEWAY, WORKER, Sharing
from tensorwire_server.memory.slab import Borrowed, Slab, make_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

MIB = 1024 * 1024
KEY = bytes(16)


class Pair:
    """Both ends of a worker link in one process, each with its own view of the memory."""

    def __init__(self, num_bytes: int = MIB) -> None:
        asks, answers = make_shared(num_bytes), make_shared(num_bytes)
        self.asked, self.answered = Slab(asks), Slab(answers)
        self.gateway = Sharing(self.asked, Borrowed(self.answered.fd), is_gateway=True)
        self.worker = Sharing(self.answered, Borrowed(self.asked.fd), is_gateway=False)
        features = (FEATURE_BODY, FEATURE_SHM)
        self.up = Connection(Role.DISPATCHER, features=features, sharing=self.gateway)
        self.down = Connection(Role.WORKER, features=features, sharing=self.worker)
        self.num_sent = 0
        self.exchange()

    def exchange(self) -> list[Message]:
        heard: list[Message] = []
        while True:
            sent = [b"".join(end.take_output()) for end in (self.up, self.down)]
            self.num_sent += sum(map(len, sent))
            if not any(sent):
                return heard
            heard += self.down.feed(sent[0])
            heard += self.up.feed(sent[1])

    async def settle(self) -> list[Message]:
        """Let what is gone be returned."""
        heard: list[Message] = []
        for _ in range(3):
            await asyncio.sleep(0)
            heard += self.exchange()
        return heard

    def check_all_is_back(self) -> None:
        assert (self.asked.num_used_bytes, self.answered.num_used_bytes) == (0, 0)
        ends = (self.gateway, self.worker)
        assert [(end.num_lent, end.num_borrowed) for end in ends] == [(0, 0), (0, 0)]
        self.asked.check_invariants()
        self.answered.check_invariants()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def submit(stream: int = 1, **inputs: Any) -> Submit:
    return Submit(stream=stream, op="infer", key=KEY, attempt=1, inputs=inputs)


def in_slab(slab: Slab, num_bytes: int) -> Any:
    block = slab.allocate(num_bytes)
    assert block is not None
    array = np.frombuffer(block, np.uint8)
    array[:] = np.arange(num_bytes) % 251
    return array


def test_arrays_in_the_slab_are_read_where_they_lie_both_ways() -> None:
    async def test() -> None:
        pair = Pair()
        x = in_slab(pair.asked, 200_000)
        pair.num_sent = 0
        pair.up.send(submit(x=x))
        (asked,) = pair.exchange()
        assert isinstance(asked, Submit)
        np.testing.assert_array_equal(asked.inputs["x"], x)
        assert not asked.inputs["x"].flags.writeable
        pair.down.send(Result(stream=1, outputs=asked.inputs))
        (answer,) = pair.exchange()
        assert isinstance(answer, Result)
        assert np.shares_memory(answer.outputs["x"], x)  # it never left the gateway's memory
        assert pair.num_sent < 1000
        assert pair.answered.num_used_bytes == 0
        del asked, x
        await pair.settle()
        assert pair.asked.num_used_bytes > 0
        assert answer.outputs["x"][250] == 250
        del answer
        await pair.settle()
        pair.check_all_is_back()

    run(test)


def test_arrays_from_elsewhere_are_copied_into_the_slab() -> None:
    async def test() -> None:
        pair = Pair()
        pair.up.send(submit(x=np.arange(20_000.0), y=np.ones(0), z=np.ones(1000)))
        (asked,) = pair.exchange()
        assert isinstance(asked, Submit)
        assert asked.inputs["x"][19_999] == 19_999.0
        assert asked.inputs["z"].ctypes.data % 64 == 0
        pair.down.send(Result(stream=1, outputs={"y": asked.inputs["x"] + 1}))
        del asked
        (answer,) = pair.exchange()
        assert isinstance(answer, Result)
        assert answer.outputs["y"][19_999] == 20_000.0
        await pair.settle()
        assert pair.answered.num_used_bytes > 0
        del answer
        await pair.settle()
        pair.check_all_is_back()

    run(test)


def test_a_loan_ends_with_the_last_of_its_arrays() -> None:
    async def test() -> None:
        pair = Pair()
        pair.up.send(submit(x=np.ones(20_000), y=np.ones(30_000)))
        (asked,) = pair.exchange()
        assert isinstance(asked, Submit)
        kept = asked.inputs["y"]
        del asked
        await pair.settle()
        assert pair.gateway.num_lent == 1
        assert kept.sum() == 30_000
        del kept
        await pair.settle()
        pair.check_all_is_back()

    run(test)


@pytest.mark.parametrize("size", [60_000, 70_000])
def test_only_what_is_large_is_shared(size: int) -> None:
    async def test() -> None:
        pair = Pair()
        pair.num_sent = 0
        pair.up.send(submit(x=np.zeros(size, np.uint8)))
        assert len(pair.exchange()) == 1
        assert (pair.num_sent > size) == (size < 65_536)

    run(test)


def test_without_room_arrays_go_over_the_connection() -> None:
    async def test() -> None:
        pair = Pair()
        pair.up.send(submit(x=np.arange(MIB // 4, dtype=np.int64)))  # twice what there is
        (asked,) = pair.exchange()
        assert isinstance(asked, Submit)
        assert asked.inputs["x"][-1] == MIB // 4 - 1
        del asked
        await pair.settle()
        pair.check_all_is_back()

    run(test)


def test_an_attempt_that_was_given_up_gives_its_memory_back() -> None:
    async def test() -> None:
        pair = Pair()
        pair.up.send(submit(x=np.ones(100_000)))
        (asked,) = pair.exchange()
        assert isinstance(asked, Submit)
        pair.up.streams.end(1)
        pair.down.send(Result(stream=1, outputs={"y": np.ones(100_000)}))
        assert pair.exchange() == []
        del asked
        await pair.settle()
        pair.check_all_is_back()
        assert pair.up.error is None

    run(test)


@pytest.mark.parametrize("is_early", [True, False])
def test_a_submit_that_is_refused_gives_its_memory_back(is_early: bool) -> None:
    async def test() -> None:
        pair = Pair()
        if is_early:  # before anything of it is looked at
            pair.down.limits = replace(pair.down.limits, streams=0)
        pair.up.send(submit(x=np.ones(100_000)))
        frames = b"".join(pair.up.take_output())
        if not is_early:  # when its meta is read: where a map should be, there is a number
            frames = frames.replace(b"\x81\xa1x", b"\x07\xa1x")
        assert pair.down.feed(frames) == []
        (refusal,) = pair.exchange()
        assert isinstance(refusal, Failure)
        await pair.settle()
        pair.check_all_is_back()
        pair.down.limits = replace(pair.down.limits, streams=9)
        pair.up.send(submit(2, x=np.ones(100_000)))
        assert len(pair.exchange()) == 1

    run(test)


def test_a_worker_that_dies_gives_everything_back() -> None:
    async def test() -> None:
        pair = Pair()
        pair.up.send(submit(1, x=np.ones(50_000)))
        pair.up.send(submit(2, x=np.ones(20_000)))
        asked = pair.exchange()
        pair.down.send(Result(stream=1, outputs={"y": np.ones(30_000)}))
        answers = pair.exchange()
        assert (len(asked), len(answers)) == (2, 1)
        pair.up.close()
        assert (pair.asked.num_used_bytes, pair.gateway.num_lent) == (0, 0)
        (answer,) = answers
        assert isinstance(answer, Result)
        assert answer.outputs["y"].sum() == 30_000  # what it has said can still be read

    run(test)


def test_memory_is_returned_from_any_thread() -> None:
    async def test() -> None:
        pair = Pair()
        pair.up.send(submit(x=np.ones(100_000)))
        asked = pair.exchange()
        await asyncio.to_thread(asked.clear)
        await pair.settle()
        assert pair.asked.num_used_bytes == 0

    run(test)


LIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "memory that was not given out": {"loan": 1, "owners": [GATEWAY], "offsets": [0]},
    "beyond the end": {"loan": 1, "owners": [WORKER], "offsets": [MIB - 10]},
    "before the beginning": {"loan": 1, "owners": [WORKER], "offsets": [-1]},
    "a third memory": {"loan": 1, "owners": [2], "offsets": [0]},
    "too few": {"loan": 1, "owners": [], "offsets": []},
    "no integers": {"loan": 1, "owners": [WORKER], "offsets": ["0"]},
}


@pytest.mark.parametrize("payload", LIES.values(), ids=LIES)
def test_a_lie_about_memory_is_refused(payload: dict[str, Any]) -> None:
    async def test() -> None:
        pair = Pair()
        with pytest.raises(BadFraming):
            pair.gateway.borrow(payload, (100,))
        assert pair.gateway.num_borrowed == 0
        pair.gateway.take_back([1, "x", None])  # which nobody has

    run(test)


def test_whatever_a_peer_says_it_returns_costs_no_more_than_the_loans_it_names() -> None:
    async def test() -> None:
        pair = Pair()
        for stream in (1, 2):
            pair.up.send(submit(stream, x=np.ones(10_000)))
        assert pair.gateway.num_lent == 2
        pair.down.send(Shm(payload={"returned": [[1], {}, None, "1", 2**63, 2]}))
        pair.exchange()
        assert pair.gateway.num_lent == 1
        assert pair.up.error is None

    run(test)


def test_shm_for_one_stream_before_the_body_of_another_costs_the_connection() -> None:
    async def test() -> None:
        pair = Pair()
        pair.up.send(submit(1, x=np.ones(100_000)))
        frames = b"".join(pair.up.take_output())
        head_at = 16 + int.from_bytes(frames[:4], "little")
        assert (frames[4], frames[head_at + 4]) == (Kind.SHM, Kind.SUBMIT)
        assert frames[head_at + 5] == Flag.BODY
        wrong = bytearray(frames)
        wrong[8] = 9
        pair.down.feed(bytes(wrong))
        assert pair.down.error is not None
        assert pair.down.error.code == ErrorCode.SEQUENCE

    run(test)


def test_without_shared_memory_shm_is_unknown() -> None:
    up, down = (
        Connection(Role.DISPATCHER, features=[FEATURE_BODY]),
        Connection(Role.WORKER, features=[FEATURE_BODY]),
    )
    down.feed(b"".join(up.take_output()))
    up.feed(b"".join(down.take_output()))
    up.send(Shm())
    down.feed(b"".join(up.take_output()))
    assert down.error is not None
    assert down.error.code == ErrorCode.UNKNOWN_KIND
