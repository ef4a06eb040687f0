from __future__ import annotations

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.gateway.deadlines import Deadlines


class Item:
    """Notes when it was told."""

    def __init__(self, told: list[object], name: object = None) -> None:
        self.told, self.name = told, name

    def on_deadline(self) -> None:
        self.told.append(self.name)


def test_what_is_due_is_told_in_the_order_of_the_deadlines() -> None:
    deadlines, told = Deadlines(), list[object]()
    for deadline in (3.0, 1.0, 2.0, 1.0):
        deadlines.add(deadline, Item(told, deadline))
    deadlines.expire(2.5)
    assert told == [1.0, 1.0, 2.0]
    assert len(deadlines) == 1


def test_nothing_is_told_before_its_deadline_and_everything_at_it() -> None:
    deadlines, told = Deadlines(), list[object]()
    deadlines.add(5.0, Item(told))
    deadlines.expire(4.999999)
    assert told == []
    deadlines.expire(5.0)
    assert told == [None]


def test_nothing_is_told_twice() -> None:
    deadlines, told = Deadlines(), list[object]()
    deadlines.add(1.0, Item(told))
    deadlines.expire(1.0)
    deadlines.expire(2.0)
    assert told == [None]


def test_what_is_forgotten_is_not_told() -> None:
    deadlines, told = Deadlines(), list[object]()
    number = deadlines.add(1.0, Item(told))
    deadlines.forget(number)
    deadlines.expire(2.0)
    assert told == []
    assert len(deadlines) == 0


def test_forgetting_what_was_told_or_forgotten_changes_nothing() -> None:
    deadlines, told = Deadlines(), list[object]()
    first, second = deadlines.add(1.0, Item(told)), deadlines.add(2.0, Item(told))
    deadlines.expire(1.0)
    for _ in range(3):
        deadlines.forget(first)
    assert len(deadlines) == 1
    deadlines.forget(second)
    deadlines.forget(second)
    assert len(deadlines) == 0


def test_an_item_may_forget_and_add_while_it_is_told() -> None:
    deadlines, told = Deadlines(), list[object]()

    class Busybody(Item):
        def on_deadline(self) -> None:
            super().on_deadline()
            deadlines.forget(victim)
            deadlines.add(1.0, Item(told, "added"))

    deadlines.add(1.0, Busybody(told, "busybody"))
    victim = deadlines.add(2.0, Item(told, "victim"))
    deadlines.expire(3.0)
    assert told == ["busybody", "added"]


def test_what_is_due_next_is_the_earliest_that_is_not_forgotten() -> None:
    deadlines = Deadlines()
    assert deadlines.next_due() is None
    numbers = [deadlines.add(deadline, Item([])) for deadline in (2.0, 1.0, 3.0)]
    assert deadlines.next_due() == 1.0
    deadlines.forget(numbers[1])
    assert deadlines.next_due() == 2.0
    deadlines.expire(2.0)
    assert deadlines.next_due() == 3.0
    deadlines.forget(numbers[2])
    assert deadlines.next_due() is None


def test_what_has_ended_long_before_its_deadline_takes_no_memory() -> None:
    deadlines = Deadlines()
    for _ in range(10_000):
        deadlines.forget(deadlines.add(1e9, Item([])))
        deadlines.check_invariants()
    item = Item([])
    gone, number = weakref.ref(item), deadlines.add(1e9, item)
    deadlines.forget(number)
    del item
    gc.collect()
    assert gone() is None


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["add", "forget", "expire"]), st.integers(0, 20)), max_size=200
    )
)
def test_deadlines_do_what_a_list_would(events: list[tuple[str, int]]) -> None:
    deadlines, told = Deadlines(), list[object]()
    expected: list[object] = []
    open_: dict[int, int] = {}  # number: deadline
    now = 0
    for name, value in events:
        if name == "add":
            number = deadlines.add(now + value, Item(told, now + value))
            open_[number] = now + value
        elif name == "forget":
            deadlines.forget(value)
            open_.pop(value, None)
        else:
            now += value
            due = sorted((deadline, n) for n, deadline in open_.items() if deadline <= now)
            expected += [deadline for deadline, _ in due]
            for _, number in due:
                del open_[number]
            deadlines.expire(now)
        assert told == expected
        assert len(deadlines) == len(open_)
        deadlines.check_invariants()
