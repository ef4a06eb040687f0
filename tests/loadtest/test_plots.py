from __future__ import annotations

from xml.etree import ElementTree

import pytest
from tensorwire.loadtest.plots import Series, linear_axis, log_axis, plot, tail_axis


def test_axes_begin_and_end_at_round_numbers() -> None:
    assert [value for value, _ in linear_axis("", [7.3]).ticks] == [0, 2, 4, 6, 8]
    assert [text for _, text in linear_axis("", [4200]).ticks][-1] == "5k"
    assert [value for value, _ in log_axis("", [0.3, 80]).ticks] == [0.1, 1, 10, 100]


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [1e-6, 1e9]])
def test_an_axis_exists_for_whatever_was_measured(values: list[float]) -> None:
    for axis in (linear_axis("", values), log_axis("", values)):
        assert axis.high > axis.low
        assert all(0 <= axis.at(value) <= 1 for value in [*values, -5.0, 1e12])


def test_each_further_nine_gets_as_much_room() -> None:
    axis = tail_axis()
    places = [axis.at(value) for value, _ in axis.ticks]
    assert places[3] - places[2] == pytest.approx(places[4] - places[3])


def test_a_plot_is_well_formed_whatever_the_texts_are() -> None:
    nasty = '<script>alert("1")</script>&'
    series = [Series(label=nasty, points=[(0, 1), (1, 2)]), Series(label="b", points=[])]
    axes = linear_axis(nasty, [1]), linear_axis(nasty, [2])
    svg = ElementTree.fromstring(
        plot(nasty, series, *axes, marks=[(0.5, nasty)], shaded=[(0, 0.2)])
    )
    assert not svg.findall(".//script")
    (line,) = svg.findall("polyline")
    assert len(line.attrib["points"].split()) >= 2
