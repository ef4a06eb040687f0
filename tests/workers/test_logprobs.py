"""What END says of log-probabilities, whatever came twice, and what does not fit into it."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol.codec import encode
from tensorwire_protocol.errors import BadParams, InternalError
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import End, Finish
from tensorwire_protocol.tensors import pack_ids, unpack_ids
from tensorwire_server.scheduling.work import Sampling, Scores
from tensorwire_server.workers.logprobs import MAX_BYTES, LogprobBook, check_size

PROMPT = [10, 11, 12, 13]


def sampling(logprobs: int | None = None, prompt_logprobs: int | None = None) -> Sampling:
    return Sampling(
        temperature=0.0, top_k=None, top_p=1.0, seed=0,
        logprobs=logprobs, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip


def scores(start: int, end: int, num_top: int) -> Scores:
    """Scores that say their position: -0.5 at 1 and so on, the k-th likeliest is position + k."""
    positions = range(start, end)
    return Scores(
        sequence_id=1,
        start=start,
        token_logprobs=struct.pack(f"<{end - start}f", *(-p / 2 for p in positions)),
        num_top=num_top,
        top_ids=pack_ids([p + k for p in positions for k in range(num_top)]),
        top_logprobs=b"".join(struct.pack("<f", -p - k) for p in positions for k in range(num_top)),
    )


def own(said: dict[str, Any]) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", said["token_logprobs"])]


def test_prompt_and_answer_are_told_apart_and_an_answer_is_cut_to_its_tokens() -> None:
    book = LogprobBook(sampling(logprobs=2, prompt_logprobs=1), PROMPT)
    book.add(scores(1, 4, 1))
    book.add(scores(4, 7, 2))
    said = book.to_wire(2, must_be_whole=True)
    assert own(said["prompt_logprobs"]) == [-0.5, -1.0, -1.5]
    assert unpack_ids(said["prompt_logprobs"]["token_ids"]) == [11, 12, 13]
    assert unpack_ids(said["prompt_logprobs"]["top_ids"]) == [1, 2, 3]
    assert own(said["logprobs"]) == [-2.0, -2.5]
    assert unpack_ids(said["logprobs"]["top_ids"]) == [4, 5, 5, 6]
    assert len(said["logprobs"]["top_logprobs"]) == 16


@given(st.lists(st.tuples(st.integers(4, 20), st.integers(1, 8)), max_size=12))
def test_whatever_is_computed_again_is_there_once(parts: list[tuple[int, int]]) -> None:
    book = LogprobBook(sampling(logprobs=3), PROMPT)
    due = 4
    for start, length in parts:
        if start > due:
            continue
        book.add(scores(start, start + length, 3))
        due = max(due, start + length)
    said = book.to_wire(due - 4, must_be_whole=True)["logprobs"]
    assert own(said) == [-p / 2 for p in range(4, due)]
    assert unpack_ids(said["top_ids"]) == [p + k for p in range(4, due) for k in range(3)]


def test_a_gap_is_our_own_fault_and_is_not_papered_over() -> None:
    book = LogprobBook(sampling(logprobs=1), PROMPT)
    with pytest.raises(InternalError, match="came for position 5, 4 was due"):
        book.add(scores(5, 6, 1))


def test_what_is_missing_is_left_out_of_a_stopped_answer_and_fails_a_whole_one() -> None:
    book = LogprobBook(sampling(logprobs=1, prompt_logprobs=0), PROMPT)
    book.add(scores(1, 3, 0))
    assert book.to_wire(1, must_be_whole=False) == {}
    with pytest.raises(InternalError, match="incomplete"):
        book.to_wire(1, must_be_whole=True)
    book.add(scores(3, 4, 0))
    assert book.to_wire(1, must_be_whole=False).keys() == {"prompt_logprobs"}
    with pytest.raises(InternalError, match="incomplete"):
        book.to_wire(1, must_be_whole=True)


def test_only_what_was_asked_for_is_said() -> None:
    book = LogprobBook(sampling(logprobs=1), PROMPT)
    book.add(scores(1, 4, 1))
    book.add(scores(4, 5, 1))
    assert book.to_wire(1, must_be_whole=True).keys() == {"logprobs"}


def test_a_prompt_of_one_token_has_nothing_before_it() -> None:
    said = LogprobBook(sampling(prompt_logprobs=3), [9]).to_wire(5, must_be_whole=True)
    assert said["prompt_logprobs"]["token_logprobs"] == b""


def test_as_much_as_fits_is_taken_and_a_token_more_is_refused() -> None:
    most = MAX_BYTES // (4 + 8 * 20)
    check_size(sampling(logprobs=20), 10**6, most)
    with pytest.raises(BadParams, match=rf"of 0 prompt tokens and {most + 1} new ones may take"):
        check_size(sampling(logprobs=20), 10**6, most + 1)
    prompt = MAX_BYTES // 8
    check_size(sampling(prompt_logprobs=0), prompt, 10**6)
    with pytest.raises(BadParams, match=rf"of {prompt + 1} prompt tokens and 0 new ones"):
        check_size(sampling(prompt_logprobs=0), prompt + 1, 10**6)
    with pytest.raises(BadParams, match="and 10 new ones"):
        check_size(sampling(logprobs=0, prompt_logprobs=0), prompt, 10)
    check_size(sampling(), 10**9, 10**9)


def test_the_most_that_is_taken_fits_into_an_end_for_a_client() -> None:
    count = MAX_BYTES // (4 + 8 * 20)
    book = LogprobBook(sampling(logprobs=20), PROMPT)
    book.add(scores(4, 4 + count, 20))
    end = End(
        stream=2**32 - 1,
        finish=Finish.LENGTH,
        count=count,
        checksum=2**32 - 1,
        usage={"prompt_tokens": 2**31, "completion_tokens": 2**31, "cached_tokens": 2**31},
        timings={f"some_timing_{i}_ms": 1.5 for i in range(20)},
        extra=book.to_wire(count, must_be_whole=True),
    )
    assert encode(end, CLIENT_LINK)
