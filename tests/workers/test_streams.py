"""How tokens become text on a stream, and what it says at its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorwire_protocol.messages import Finish
from tensorwire_protocol.tensors import ids_checksum
from tensorwire_server.workers.streams import ArrayStream, StepColumns, TextStream
from tensorwire_server.workers.text import StopMatcher

LINK = cast("Any", SimpleNamespace())


class Pairs:
    """A detokenizer that is certain of a character only when it has its second token."""

    def __init__(self) -> None:
        self._pending = ""

    def push(self, token_id: int) -> str:
        self._pending += chr(token_id)
        if len(self._pending) < 2:
            return ""
        text, self._pending = self._pending, ""
        return text

    def flush(self) -> str:
        text, self._pending = self._pending, ""
        return text


def a_stream(*stops: str) -> TextStream:
    stream = TextStream(LINK, 7, 2, 99, 100.0)
    stream.begin(Pairs(), StopMatcher(stops) if stops else None)
    return stream


def take_all(
    stream: TextStream, text: str, finish: str | None = "length"
) -> list[tuple[str, Finish | None]]:
    taken = [stream.take([ord(token)], None) for token in text[:-1]]
    return [*taken, stream.take([ord(text[-1])], finish)]


def test_the_last_token_brings_what_the_detokenizer_held_back() -> None:
    assert take_all(a_stream(), "abc") == [("", None), ("ab", None), ("c", Finish.LENGTH)]
    assert take_all(a_stream(), "abc", "stop")[-1] == ("c", Finish.STOP)


def test_the_last_token_brings_what_the_stop_matcher_held_back() -> None:
    assert take_all(a_stream("bcd"), "abc") == [("", None), ("a", None), ("bc", Finish.LENGTH)]


def test_a_stop_string_may_be_complete_only_when_all_text_is_out() -> None:
    assert take_all(a_stream("bc"), "abc") == [("", None), ("a", None), ("", Finish.STOP)]


@pytest.mark.parametrize("stops", [(), ("fg",), ("h",), ("zz",), ("ab",)])
@pytest.mark.parametrize("cut", range(9))
def test_tokens_taken_together_make_what_they_make_one_by_one(
    stops: tuple[str, ...], cut: int
) -> None:
    text = "abcdefgh"
    alone = a_stream(*stops)
    singly = take_all(alone, text)
    stopped = [finish for _, finish in singly].index(next(f for _, f in singly if f)) + 1
    together = a_stream(*stops)
    ids = [ord(token) for token in text]
    first, finish = together.take(ids[:cut], "length" if cut == 8 else None)
    rest = ""
    if finish is None:
        rest, finish = together.take(ids[cut:], "length")
    assert first + rest == "".join(text for text, _ in singly[:stopped])
    assert finish is singly[stopped - 1][1]
    assert together.tokens == ids[:stopped]


def replayed(tokens: str, *stops: str) -> tuple[TextStream, bool]:
    detokenizer = Pairs()
    texts = [detokenizer.push(ord(token)) for token in tokens]
    stream = TextStream(LINK, 7, 2, 99, 100.0)
    stream.begin(detokenizer, StopMatcher(stops))
    return stream, stream.replay([ord(token) for token in tokens], texts)


def test_no_tokens_of_an_earlier_attempt_leave_the_echo_where_it_was() -> None:
    stream = TextStream(LINK, 7, 1, 99, 100.0)
    stream.begin(Pairs(), StopMatcher(["fg"]), lead="echo")
    assert not stream.replay([], [])
    assert stream.take([ord("a"), ord("b")], None) == ("echoab", None)


def test_tokens_of_an_earlier_attempt_leave_text_and_stops_where_they_were() -> None:
    whole = take_all(a_stream("fg"), "abcdefgh", None)
    stream, is_stopped = replayed("abcde", "fg")
    assert not is_stopped
    assert [stream.take([ord(token)], None) for token in "fg"] == whole[5:7]
    assert replayed("abcd", "bc")[1]


def test_echoed_text_comes_with_the_first_token_and_no_stop_is_looked_for_in_it() -> None:
    stream = TextStream(LINK, 7, 1, 99, 100.0)
    stream.begin(Pairs(), StopMatcher(["ab"]), lead="abc")
    assert take_all(stream, "xyab", None) == [
        ("abc", None), ("xy", None), ("", None), ("", Finish.STOP),
    ]  # fmt: skip
    plain = TextStream(LINK, 7, 1, 99, 100.0)
    plain.begin(Pairs(), None, lead="abc")
    assert take_all(plain, "xyz") == [("abc", None), ("xy", None), ("z", Finish.LENGTH)]


def test_the_first_tokens_text_is_not_searched_where_there_must_be_more() -> None:
    stream = TextStream(LINK, 7, 1, 99, 100.0)
    stream.begin(Pairs(), StopMatcher(["ab"]), min_new_tokens=4)
    taken = take_all(stream, "ababxxab", None)
    assert "".join(text for text, _ in taken) == "ababxx"
    assert taken[-1][1] is Finish.STOP
    short = TextStream(LINK, 7, 1, 99, 100.0)
    short.begin(Pairs(), StopMatcher(["ab"]), min_new_tokens=3)
    assert take_all(short, "aba") == [("", None), ("ab", None), ("a", Finish.LENGTH)]


def test_the_end_counts_and_sums_all_tokens_earlier_attempts_included() -> None:
    stream = a_stream()
    stream.prompt_tokens = 5
    stream.replay([1, 2], ["", ""])
    stream.take([3], "length")
    end = stream.end(Finish.LENGTH)
    assert (end.stream, end.count, end.checksum) == (7, 3, ids_checksum([1, 2, 3]))
    assert end.usage == {"prompt_tokens": 5, "completion_tokens": 3}
    assert end.extra == {"attempt": 2}


def test_an_answer_is_complete_with_its_last_item_in_any_order() -> None:
    stream = ArrayStream(LINK, 7, 1, 99, 100.0)
    stream.begin(3)
    assert [stream.take(i, i) for i in (2, 0, 1)] == [False, False, True]
    assert stream.outcomes == [0, 1, 2]


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_largest_batch_and_the_first_start_are_kept(num_batches: int) -> None:
    stream = ArrayStream(LINK, 7, 1, 99, 100.0)
    for i in range(num_batches):
        stream.note_batch(100.5 + i, 4 - i)
    timings = stream.timings()
    assert (timings["largest_batch"], timings["queued_ms"]) == (4, 500.0)


def test_a_step_frame_holds_its_events_as_columns() -> None:
    columns = StepColumns()
    columns.add(a_stream(), 3, [42], "x")
    frame = columns.frame()
    assert (frame.streams, frame.attempts, frame.first_indexes) == ([7], [2], [3])
    assert (frame.counts, frame.tokens, frame.texts) == (None, [42], ["x"])
    columns.add(a_stream(), 5, [43, 44], "yz")
    frame = columns.frame()
    assert (frame.streams, frame.first_indexes, frame.counts) == ([7, 7], [3, 5], [1, 2])
    assert (frame.tokens, frame.texts) == ([42, 43, 44], ["x", "yz"])
