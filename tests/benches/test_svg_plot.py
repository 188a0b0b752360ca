"""The plots of benchmarks: what is drawn stands where its numbers say."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.svg_plot import PANEL_HEIGHT, PANEL_WIDTH, Panel, draw, ticks

SVG = "{http://www.w3.org/2000/svg}"
COLOURS = {"a": "#111111", "b": "#222222"}


def drawn(*panels, shape="polyline", columns=4):
    """Per shape its colour and its points, in the coordinates of its panel."""
    root = ElementTree.fromstring(draw(panels, COLOURS, columns=columns))
    return [
        (
            line.get("stroke" if shape == "polyline" else "fill"),
            [tuple(map(float, point.split(","))) for point in line.get("points").split()],
        )
        for line in root.iter(f"{SVG}{shape}")
    ]


def test_a_point_lies_where_its_numbers_are_on_axes_that_begin_at_zero():
    ((_, points),) = drawn(Panel("p", {"a": [(0, 0), (5, 50), (10, 100)]}))

    assert points == [(0, PANEL_HEIGHT), (PANEL_WIDTH / 2, PANEL_HEIGHT / 2), (PANEL_WIDTH, 0)]


def test_lines_of_a_panel_share_its_scale():
    (_, low), (_, high) = drawn(Panel("p", {"a": [(1, 10)], "b": [(2, 20)]}))

    assert PANEL_HEIGHT - high[0][1] == pytest.approx(2 * (PANEL_HEIGHT - low[0][1]), abs=0.11)
    assert high[0][0] == pytest.approx(2 * low[0][0], abs=0.11)


def test_layers_lie_on_top_of_each_other_and_may_end_early():
    panel = Panel("p", layers={"a": [25, 50], "b": [75, 50]}, x=[1, 2, 4], top=100.0)
    (_, below), (_, above) = drawn(panel, shape="polygon")

    quarter, half = PANEL_WIDTH / 4, PANEL_WIDTH / 2
    assert below[:2] == [(quarter, 0.75 * PANEL_HEIGHT), (half, 0.5 * PANEL_HEIGHT)]
    assert above == [(quarter, 0), (half, 0), *reversed(below[:2])]


def test_a_name_keeps_its_colour_in_every_panel_and_stands_in_the_legend_once():
    lines = {"a": [(1, 1)], "b": [(1, 2)]}
    panels = Panel("one", lines), Panel("two", dict(reversed(lines.items())))
    text = draw(panels, COLOURS | {"c": "#333333"})

    assert [colour for colour, _ in drawn(*panels)] == ["#111111", "#222222", "#222222", "#111111"]
    assert text.count(">a<") == text.count(">b<") == 1
    assert ">c<" not in text, "what is not drawn needs no legend"


def test_panels_stand_side_by_side_until_a_row_is_full():
    root = ElementTree.fromstring(draw([Panel(str(i)) for i in range(3)], COLOURS, columns=2))
    places = [group.get("transform") for group in root.iter(f"{SVG}g")]
    (x0, y0), (x1, y1), (x2, y2) = (
        tuple(map(int, place.removeprefix("translate(").rstrip(")").split())) for place in places
    )

    assert x0 == x2 < x1
    assert y0 == y1 < y2


def test_names_and_titles_may_hold_any_character():
    text = draw([Panel("p99 <= 1 s & more", {"<a>": [(1, 1)]})], {"<a>": "#111111"})
    root = ElementTree.fromstring(text)

    assert {"p99 <= 1 s & more", "<a>"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_a_panel_without_points_shows_empty_axes():
    assert drawn(Panel("p"), Panel("q", {"a": []})) == [("#111111", [])]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_numbers_that_no_axis_can_show_are_refused(bad):
    for panel in (Panel("p", {"a": [(1, bad)]}), Panel("p", layers={"a": [bad]}, x=[1])):
        with pytest.raises(ValueError, match="'p' has numbers below zero or not finite"):
            draw([panel], COLOURS)


@pytest.mark.parametrize(
    ("highest", "expected"),
    [
        (0, (1, 1)),
        (1, (0.2, 1)),
        (12, (2.5, 12.5)),
        (0.03, (0.01, 0.03)),
        (1050, (250, 1250)),
    ],
)
def test_ticks_are_round_steps_that_cover_the_highest_value(highest, expected):
    assert ticks(highest) == pytest.approx(expected)
