from __future__ import annotations

import pytest
from tensorwire_protocol.messages import Request
from tensorwire_protocol.tensors import ids_checksum
from tensorwire_server.gateway.journal import Entry, Journal


def entry(*tokens: int) -> Entry:
    made = Entry(Request(stream=1, op="generate", key=bytes(16)))
    assert made.append(0, tokens)
    return made


def test_tokens_that_follow_are_taken() -> None:
    subject = entry(5, 6)
    assert subject.append(2, [7])
    assert subject.append(3, [])
    assert subject.tokens == [5, 6, 7]


def test_each_request_has_tokens_and_a_text_of_its_own() -> None:
    one, other, empty = entry(), entry(), entry()
    assert one.append(0, [1], "a")
    assert one.append(1, [2], "b")
    assert other.append(0, [], "c")
    assert (one.tokens, one.text, other.tokens, other.text) == ([1, 2], "ab", [], "c")
    assert (empty.tokens, empty.text, empty.has_begun) == ([], "", False)
    assert one.has_begun
    assert other.has_begun


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_a_gap_or_a_repeat_is_refused_and_nothing_is_taken(first: int) -> None:
    subject = entry(5, 6)
    assert not subject.append(first, [7])
    assert subject.tokens == [5, 6]


def test_an_end_agrees_only_with_exactly_the_tokens_that_came() -> None:
    subject = entry(5, 6, 7)
    checksum = ids_checksum([5, 6, 7])
    assert subject.agrees(3, checksum)
    assert not subject.agrees(2, checksum)
    assert not subject.agrees(4, checksum)
    assert not subject.agrees(3, checksum ^ 1)
    assert not subject.agrees(3, ids_checksum([7, 6, 5]))


def test_a_request_without_tokens_agrees_with_an_empty_end() -> None:
    assert entry().agrees(0, ids_checksum([]))


def test_attempts_are_numbered_from_one() -> None:
    subject = entry()
    assert subject.attempt == 0
    assert [subject.next_attempt(), subject.next_attempt()] == [1, 2]
    assert subject.attempt == 2


def test_the_journal_counts_its_entries_and_their_tokens() -> None:
    journal = Journal()
    entries = [journal.open(Request(stream=i, op="generate", key=bytes(16))) for i in (1, 2)]
    entries[0].prompt_ids = (1, 2, 3)
    entries[1].append(0, [9])
    assert (len(journal), journal.num_tokens) == (2, 4)
    journal.close(entries[0])
    journal.close(entries[0])
    assert (len(journal), journal.num_tokens) == (1, 1)
    journal.close(entries[1])
    assert (len(journal), journal.num_tokens) == (0, 0)
