"""The heap of deadlines: what is due, and that it forgets the finished."""

from __future__ import annotations

from tensorwire_server.workers.deadlines import Deadlines


def test_only_open_requests_come_due_in_order() -> None:
    alive = {1, 2, 3}
    deadlines = Deadlines(alive)
    assert deadlines.add(5.0, 1)
    assert deadlines.add(3.0, 2)
    assert not deadlines.add(4.0, 3)
    alive.discard(3)
    assert deadlines.next_due() == 3.0
    assert deadlines.take_due(2.9) == []
    assert deadlines.take_due(5.0) == [2, 1]
    assert deadlines.next_due() is None


def test_finished_requests_do_not_pile_up_until_their_deadline() -> None:
    alive: set[int] = set()
    deadlines = Deadlines(alive)
    for request in range(10_000):
        alive.add(request)
        deadlines.add(1e9, request)
        alive.discard(request - 5)
    assert len(deadlines) < 200
    assert set(deadlines.take_due(2e9)) == alive
