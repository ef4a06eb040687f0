"""The stop-string matcher against a reference that looks at the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.workers.text import StopMatcher

# Few letters, so that stop strings overlap with themselves and with each other.
letters = st.text("ab", min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text before the stop string that is complete first; of two, the longest."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


@given(st.lists(letters, max_size=12), st.lists(letters, min_size=1, max_size=3))
def test_any_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted, matched = "", False
    for piece in pieces:
        text, matched = matcher.push(piece)
        emitted += text
        if matched:
            break
    if not matched:
        emitted += matcher.flush()
    assert (emitted, matched) == naive("".join(pieces), stops)


@given(st.lists(letters, max_size=12), st.lists(letters, min_size=1, max_size=3))
def test_what_is_held_back_could_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = ""
    for i, piece in enumerate(pieces):
        text, matched = matcher.push(piece)
        emitted += text
        if matched:
            return
        held = "".join(pieces[: i + 1])[len(emitted) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hel", "lo wor", "ld"], ["o w"], "hell"),
        (["a", "b", "c"], ["abc"], ""),
        (["ab", "ab", "c"], ["abc"], "ab"),
        (["xx", "yz"], ["xyz", "xy"], "x"),
        (["\N{GRINNING FACE}", "!"], ["\N{GRINNING FACE}!"], ""),
    ],
)
def test_a_stop_string_is_found_across_the_borders_of_tokens(
    pieces: list[str], stops: list[str], expected: str
) -> None:
    matcher = StopMatcher(stops)
    emitted = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        emitted += text
        if matched:
            break
    assert matched
    assert emitted == expected
