from __future__ import annotations

from tensorwire.collecting import Collector
from tensorwire_protocol.messages import End, Finish
from tensorwire_protocol.tensors import ids_checksum


def whole(collector: Collector, *token_ids: int) -> tuple[str, list[int]]:
    checksum = ids_checksum(token_ids)
    end = End(stream=1, finish=Finish.STOP, count=len(token_ids), checksum=checksum)
    made = collector.finish(end)
    return made.text, made.token_ids


def test_what_arrives_is_put_together_in_its_order() -> None:
    collector = Collector("generate")
    collector.add([], "a")
    collector.add([1, 2], "")
    collector.add([3], "b")
    assert (collector.num_arrived, collector.num_chars) == (5, 2)
    assert whole(collector, 1, 2, 3) == ("ab", [1, 2, 3])


def test_answers_that_arrive_at_once_are_kept_apart() -> None:
    one, other, empty = Collector("generate"), Collector("generate"), Collector("generate")
    one.add([1], "one")
    other.add([2], "other")
    assert whole(one, 1) == ("one", [1])
    assert whole(other, 2) == ("other", [2])
    assert whole(empty) == ("", [])
