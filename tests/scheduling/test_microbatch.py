import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.scheduling.continuous import WaitingFull
from tensorwire_server.scheduling.microbatch import MicroBatcher


def batcher(
    *, max_items: int = 3, max_tokens: int = 100, max_wait_s: float = 0.5, max_waiting: int = 8
) -> MicroBatcher[str]:
    return MicroBatcher(
        max_items=max_items, max_tokens=max_tokens, max_wait_s=max_wait_s, max_waiting=max_waiting
    )


def test_a_lone_item_waits_for_company_no_longer_than_allowed() -> None:
    waiting = batcher()
    waiting.add("a", 1, now=10.0)
    assert waiting.next_due() == 10.5
    assert waiting.take(10.4) == []
    assert waiting.take(10.5) == ["a"]
    assert waiting.next_due() is None


def test_a_full_batch_is_due_at_once_and_the_rest_stays() -> None:
    waiting = batcher()
    for item in "abcd":
        waiting.add(item, 1, now=10.0)
    assert waiting.next_due() == 10.0
    assert waiting.take(10.0) == ["a", "b", "c"]
    assert waiting.take(10.0) == []
    assert len(waiting) == 1


def test_a_batch_is_full_by_tokens_too() -> None:
    waiting = batcher(max_tokens=10)
    waiting.add("a", 6, now=0.0)
    assert waiting.take(0.0) == []
    waiting.add("b", 6, now=0.0)
    assert waiting.take(0.0) == ["a"]
    assert waiting.take(0.0) == []


def test_an_item_larger_than_a_batch_runs_alone() -> None:
    waiting = batcher(max_tokens=10)
    waiting.add("a", 50, now=0.0)
    waiting.add("b", 1, now=0.0)
    assert waiting.take(0.0) == ["a"]


def test_a_full_queue_refuses_with_the_numbers() -> None:
    waiting = batcher(max_waiting=2)
    waiting.add("a", 1, now=0.0)
    waiting.add("b", 1, now=0.0)
    with pytest.raises(WaitingFull) as caught:
        waiting.add("c", 1, now=0.0)
    assert (caught.value.queued, caught.value.limit) == (2, 2)


def test_removed_items_never_run_and_the_others_keep_their_order() -> None:
    waiting = batcher(max_items=4)
    for item in "abcd":
        waiting.add(item, 1, now=0.0)
    assert waiting.remove(lambda item: item in "bd") == ["b", "d"]
    waiting.check_invariants()
    assert waiting.take(1.0) == ["a", "c"]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 0.3)), max_size=60),
    st.integers(1, 5),
    st.integers(1, 60),
)
def test_every_item_runs_once_in_order_within_bounds_and_in_time(
    arrivals: list[tuple[int, float]], max_items: int, max_tokens: int
) -> None:
    waiting: MicroBatcher[int] = MicroBatcher(
        max_items=max_items, max_tokens=max_tokens, max_wait_s=0.5, max_waiting=60
    )
    costs = [cost for cost, _ in arrivals]
    arrived_at: list[float] = []
    ran: list[int] = []

    def drain(now: float) -> None:
        while batch := waiting.take(now):
            assert len(batch) <= max_items
            assert len(batch) == 1 or sum(costs[item] for item in batch) <= max_tokens
            ran.extend(batch)

    now = 0.0
    for number, (cost, gap) in enumerate(arrivals):
        # Between two arrivals the driver wakes whenever something is due.
        while (due := waiting.next_due()) is not None and due <= now + gap:
            drain(max(due, now))
        now += gap
        arrived_at.append(now)
        waiting.add(number, cost, now)
        waiting.check_invariants()
        drain(now)
        assert all(now - arrived_at[item] <= 0.5 for item in range(len(ran), number + 1))
    while (due := waiting.next_due()) is not None:
        drain(due)
    assert ran == list(range(len(arrivals)))
