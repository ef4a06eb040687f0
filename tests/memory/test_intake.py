"""Where large requests land: at once, later, or never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tensorwire_protocol.errors import Busy, TooLarge
from tensorwire_server.memory import intake
from tensorwire_server.memory.intake import MAX_WAITING, IntakeMemory, Place
from tensorwire_server.memory.slab import Slab, make_shared

MIB = 1024 * 1024
Test = Callable[[IntakeMemory], Coroutine[Any, Any, None]]


def run(test: Test, num_bytes: int = MIB) -> None:
    async def main() -> None:
        await test(IntakeMemory(Slab(make_shared(num_bytes))))

    asyncio.run(main())


def test_segments_are_aligned_and_of_one_block() -> None:
    async def test(memory: IntakeMemory) -> None:
        place = memory.reserve((10, 0, 100), print)
        assert place.segments is not None
        assert [len(segment) for segment in place.segments] == [10, 0, 100]
        assert memory.num_used_bytes == 4096

    run(test)


@pytest.mark.parametrize(("size", "fits"), [(MIB, True), (MIB + 1, False)])
def test_what_can_never_fit_is_refused(size: int, fits: bool) -> None:
    async def test(memory: IntakeMemory) -> None:
        if fits:
            assert memory.reserve((size,), print).segments is not None
        else:
            with pytest.raises(TooLarge, match=r"1048640 bytes .* 1048576"):
                memory.reserve((size,), print)

    run(test)


def test_who_finds_no_room_gets_it_in_order() -> None:
    async def test(memory: IntakeMemory) -> None:
        ready: list[str] = []
        first = memory.reserve((MIB,), print)
        large = memory.reserve((MIB,), lambda: ready.append("large"))
        small = memory.reserve((10,), lambda: ready.append("small"))
        assert (first.segments is None, large.segments, small.segments) == (False, None, None)
        assert memory.num_waiting == 2
        first.segments = None
        await asyncio.sleep(0)
        assert ready == ["large"]
        large.segments = None
        await asyncio.sleep(0)
        assert ready == ["large", "small"]
        assert memory.num_waiting == 0

    run(test)


def test_a_small_request_does_not_pass_a_large_one_that_waits() -> None:
    async def test(memory: IntakeMemory) -> None:
        first = memory.reserve((MIB // 2,), print)
        large = memory.reserve((MIB,), print)
        small = memory.reserve((10,), print)  # for which there would be room
        assert (large.segments, small.segments) == (None, None)
        first.cancel()
        await asyncio.sleep(0)
        assert large.segments is not None

    run(test)


def test_who_leaves_the_line_holds_up_nobody() -> None:
    async def test(memory: IntakeMemory) -> None:
        ready: list[str] = []
        first = memory.reserve((MIB,), print)
        gone = memory.reserve((MIB,), lambda: ready.append("gone"))
        memory.reserve((10,), lambda: ready.append("next"))
        gone.cancel()
        assert memory.num_waiting == 1
        first.cancel()
        await asyncio.sleep(0)
        assert ready == ["next"]

    run(test)


@pytest.mark.parametrize(("num", "fits"), [(MAX_WAITING, True), (MAX_WAITING + 1, False)])
def test_the_line_has_an_end(num: int, fits: bool) -> None:
    async def test(memory: IntakeMemory) -> None:
        kept: list[Place] = [memory.reserve((MIB,), print)]
        kept += [memory.reserve((10,), print) for _ in range(MAX_WAITING - 1)]
        if num > MAX_WAITING:
            kept.append(memory.reserve((10,), print))
            with pytest.raises(Busy, match="64 large requests wait"):
                memory.reserve((10,), print)
        else:
            assert memory.reserve((10,), print).segments is None

    run(test)


def test_memory_that_is_idle_for_a_while_is_given_up() -> None:
    async def test(memory: IntakeMemory) -> None:
        trimmed: list[bool] = []
        memory._slab.trim = lambda: trimmed.append(True)  # type: ignore[method-assign]
        place = memory.reserve((10,), print)
        memory.on_timer(0.0)
        memory.on_timer(100.0)
        place.cancel()
        memory.on_timer(101.0)
        memory.on_timer(101.0 + intake._IDLE_S - 0.1)
        assert trimmed == []
        memory.on_timer(101.0 + intake._IDLE_S)
        assert trimmed == [True]

    run(test)
