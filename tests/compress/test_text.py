"""Texts as they are read, and that nothing is judged on what it was fitted to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tensorwire_server.compress.recipe import RecipeError
from tensorwire_server.compress.text import (
    LabelledText,
    choose_some,
    cut_windows,
    read_labels,
    read_text,
    refuse_shared,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[..., str]

LONG = "A document that is long enough to be nobody's by chance, word after word after word."


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes, name: str = "text.txt") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def test_documents_are_what_stands_between_empty_lines(write: Write) -> None:
    text = read_text(write("one\r\n  two\r\n \r\n\r\n\tthree\n"), "calibration")
    assert text.documents == ("one\n  two", "\tthree")
    assert text.lines == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is empty"), (b" \n\n\t\n", "is empty"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_text_without_text_is_refused(write: Write, content: bytes, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        read_text(write(content), "calibration")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluation file .*gone.*No such file"):
        read_text(str(tmp_path / "gone"), "evaluation")


def test_a_document_in_both_texts_is_found_whatever_its_white_space(write: Write) -> None:
    mine = read_text(write(f"something\n\n{LONG}", "a"), "calibration")
    refuse_shared(mine, ["something", f"{LONG}!"], "the other")
    with pytest.raises(RecipeError, match=r"1 of 1 documents of the other stand .*A document that"):
        refuse_shared(mine, ["else", LONG.replace(" ", "\n  ")], "the other")


def test_a_document_that_is_a_line_of_the_other_text_is_found(write: Write) -> None:
    mine = read_text(write(f"first\n{LONG}\nlast"), "calibration")
    with pytest.raises(RecipeError, match="1 of 1 documents"):
        refuse_shared(mine, [LONG], "the file of labels")


def test_files_of_one_sentence_a_line_are_compared_by_line(write: Write) -> None:
    sentences = [f"The sentence with number {number} says nothing else." for number in range(200)]
    mine = read_text(write("\n".join(sentences)), "calibration")
    other = [sentence.upper() for sentence in sentences]
    # Two of 200 are chance.
    refuse_shared(mine, ["\n".join(sentences[:2] + other[2:])], "the other")
    with pytest.raises(RecipeError, match="3 of 200 lines of the other stand in the calibration"):
        refuse_shared(mine, ["\n".join(sentences[:3] + other[3:])], "the other")
    with pytest.raises(RecipeError, match="199 of 200 lines"):
        refuse_shared(mine, ["\n".join(sentences[1:] + other[:1])], "the other")


def test_a_lone_line_is_chance_in_a_short_text(write: Write) -> None:
    line = "Return the current position in the file."
    mine = read_text(write(f"one\n{line}\ntwo"), "calibration")
    refuse_shared(mine, [f"three\n{line}\nfour"], "the other")


def test_one_file_for_both_is_refused_however_short(write: Write) -> None:
    text = read_text(write("short"), "calibration")
    with pytest.raises(RecipeError, match="take them from different texts"):
        refuse_shared(text, text.documents, "the evaluation text")


def test_labels_are_read_and_checked(write: Write) -> None:
    lines = '{"text": "good", "label": "+"}\n\n{"text": "bad", "label": "-"}\n'
    assert read_labels(write(lines)) == [
        LabelledText(text="good", label="+"), LabelledText(text="bad", label="-"),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="line 2 of"):
        read_labels(write('{"text": "a", "label": "b"}\n{"text": 1, "label": "b"}'))
    with pytest.raises(RecipeError, match="two different labels"):
        read_labels(write('{"text": "a", "label": "b"}'))


def test_windows_hold_everything_but_a_lone_token() -> None:
    assert cut_windows(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert cut_windows(range(8), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_seed_chooses_the_same_windows_in_their_order() -> None:
    windows = [[i, i] for i in range(100)]
    chosen = choose_some(windows, 10, seed=1)
    assert chosen == sorted(chosen) == choose_some(windows, 10, seed=1)
    assert chosen != choose_some(windows, 10, seed=2)
    assert choose_some(windows, 1000, seed=1) == windows
