from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.routing.router import pick


@dataclass(eq=False)
class Candidate:
    is_ready: bool
    num_in_flight: int


CANDIDATES = st.lists(st.builds(Candidate, st.booleans(), st.integers(0, 3)), max_size=6)


def test_the_replica_with_the_least_in_flight_is_picked() -> None:
    replicas = [Candidate(True, 3), Candidate(True, 1), Candidate(True, 2)]
    assert [pick(replicas, turn) for turn in range(4)] == [replicas[1]] * 4


def test_a_replica_that_is_not_ready_is_never_picked_however_idle() -> None:
    replicas = [Candidate(False, 0), Candidate(True, 9)]
    assert [pick(replicas, turn) for turn in range(4)] == [replicas[1]] * 4


def test_ties_go_round() -> None:
    replicas = [Candidate(True, 1) for _ in range(3)]
    assert [pick(replicas, turn) for turn in range(6)] == replicas * 2


def test_ties_go_round_past_what_is_busy_or_not_ready() -> None:
    replicas = [Candidate(True, 0), Candidate(False, 0), Candidate(True, 5), Candidate(True, 0)]
    picked = Counter(map(id, (pick(replicas, turn) for turn in range(300))))
    assert picked.keys() == {id(replicas[0]), id(replicas[3])}


def test_nothing_is_picked_where_nothing_is_ready() -> None:
    assert pick([], 0) is None
    assert pick([Candidate(False, 0)], 7) is None


@given(replicas=CANDIDATES, turn=st.integers(0, 10**9))
def test_what_is_picked_is_ready_and_nothing_ready_has_less(
    replicas: list[Candidate], turn: int
) -> None:
    ready = [replica for replica in replicas if replica.is_ready]
    picked = pick(replicas, turn)
    if not ready:
        assert picked is None
    else:
        assert picked in ready
        assert picked.num_in_flight == min(replica.num_in_flight for replica in ready)
