from __future__ import annotations

import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.measures import Span
from tensorwire.loadtest.units import (
    naming,
    parse_count,
    parse_named,
    parse_number,
    parse_seconds,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30.0), ("30s", 30.0), ("2m", 120.0), ("1.5m", 90.0), ("250us", 0.00025), (".5s", 0.5)],
)
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


def test_a_duration_is_the_number_that_was_written() -> None:
    for ms in range(3000):
        assert parse_seconds(f"{ms}ms") == float(f"{ms / 1000:.3f}")


def test_a_run_ends_when_its_parts_do_to_the_last_bit() -> None:
    # Else one request more or less is planned, just behind the end or before it.
    for tenths in range(1, 30):
        span = Span(start=0.0, warmup_s=0.1, measured_s=tenths / 10)
        assert span.total_s == (tenths + 1) / 10


@pytest.mark.parametrize("text", ["", "s", "-1s", "1h", "1e3", "nan", "1 s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_seconds(text)


def test_a_share_is_a_percentage_or_a_fraction() -> None:
    assert (parse_share("5%"), parse_share("0.05"), parse_share("100%")) == (0.05, 0.05, 1.0)


@pytest.mark.parametrize("text", ["101%", "1.1", "-1%", "%", "half"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_share(text)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "", "x"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_number(text)


@pytest.mark.parametrize("text", ["-1", "1.5", "", "²", "0"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_count(text, least=1)


def test_values_have_names_that_are_known() -> None:
    assert parse_named("share=5%,after=3", ("share", "after")) == {"share": "5%", "after": "3"}
    for text in ("shre=5%", "share"):
        with pytest.raises(BadParams, match="share=…"):
            parse_named(text, ("share", "after"))


def test_a_mistake_names_its_option() -> None:
    with pytest.raises(BadParams, match=r"^--warmup: 'x' is no duration"), naming("--warmup"):
        parse_seconds("x")
