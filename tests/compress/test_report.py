"""Reports as JSON, both ways."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tensorwire_server.compress.machine import describe_machine, versions
from tensorwire_server.compress.material import read_texts, without_folders
from tensorwire_server.compress.recipe import Quantization, Recipe
from tensorwire_server.compress.report import FORMAT, ReportError, from_json, to_json

from .samples import encoder_report, text_report, unstructured

if TYPE_CHECKING:
    from pathlib import Path

    from tensorwire_server.compress.report import Report

REPORTS = {
    "text": text_report(notes=("One.", "Two.")),
    "encoder": encoder_report(),
    "bare": text_report(speed=None, recipe=unstructured(), errors=(), floors=(), pruned=()),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_comes_back_as_it_went(report: Report) -> None:
    assert from_json(to_json(report)) == report


def test_numbers_keep_every_digit() -> None:
    report = replace(text_report(), seconds={"a": 0.1 + 0.2, "b": 1e-300})
    assert from_json(to_json(report)).seconds == {"a": 0.30000000000000004, "b": 1e-300}


def test_the_format_is_said_first() -> None:
    found = json.loads(to_json(text_report()))
    assert next(iter(found)) == "format"
    assert found["format"] == FORMAT
    assert found["quality"]["text"]["perplexity_ratio"]["value"] == 1.09
    assert found["recipe"]["prune"][0]["structure"] == "neurons"


@pytest.mark.parametrize("number", [FORMAT + 1, 0, "1", None])
def test_another_format_is_refused(number: object) -> None:
    other = json.loads(to_json(text_report())) | {"format": number}
    with pytest.raises(ReportError, match=f"format {FORMAT} is expected, not of {number!r}"):
        from_json(json.dumps(other).encode())


@pytest.mark.parametrize("content", [b"", b"nothing", b"[1]", b"7"])
def test_what_is_no_report_is_refused(content: bytes) -> None:
    with pytest.raises(ReportError):
        from_json(content)


def test_what_it_lacks_is_named() -> None:
    found = json.loads(to_json(text_report()))
    del found["size_after"]
    with pytest.raises(ReportError, match=r"no report of a compression.*size_after"):
        from_json(json.dumps(found).encode())


def test_floors_decide_if_it_is_good_enough() -> None:
    report = text_report()
    assert report.meets_floors
    missed = replace(report.floors[0], is_met=False)
    assert not replace(report, floors=(*report.floors, missed)).meets_floors


def test_the_machine_is_described() -> None:
    assert {"processor", "cores", "memory", "system"} <= describe_machine().keys()
    assert {"python", "torch", "tensorwire"} <= versions().keys()
    assert all(isinstance(value, str) for value in describe_machine().values())


def test_texts_are_told_by_name_and_content_and_not_by_place(tmp_path: Path) -> None:
    contents = {
        "calibration": "To calibrate with.\n",
        "evaluation": "To evaluate on.\n",
        "labels": '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n',
    }
    for use, content in contents.items():
        (tmp_path / f"my-{use}").write_text(content)
    paths = {use: str(tmp_path / f"my-{use}") for use in contents}
    recipe = unstructured(
        calibrate=paths["calibration"], evaluate=paths["evaluation"], labels=paths["labels"]
    )
    assert [(text.use, text.name, text.sha256) for text in read_texts(recipe).named] == [
        (use, f"my-{use}", hashlib.sha256(content.encode()).hexdigest())
        for use, content in contents.items()
    ]
    told = without_folders(recipe)
    assert (told.calibrate, told.evaluate, told.labels) == (
        "my-calibration", "my-evaluation", "my-labels",
    )  # fmt: skip
    assert read_texts(Recipe(quantize=Quantization(bits=8))).named == ()
