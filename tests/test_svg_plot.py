"""The plots of benchmarks: what is drawn stands where its numbers say."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.svg_plot import COLOURS, HEIGHT, LEFT, TOP, WIDTH, Line, Panel, svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*panels):
    """Per polyline its colour and its points."""
    root = ElementTree.fromstring(svg(panels, x_title="time"))
    return [
        (line.get("stroke"), [tuple(map(float, p.split(","))) for p in line.get("points").split()])
        for line in root.findall(f"{SVG}polyline")
    ]


def test_a_point_lies_where_its_numbers_are_on_axes_that_begin_at_zero():
    ((_, points),) = drawn(Panel("p", [Line("a", [(0, 0), (5, 50), (10, 100)])]))

    zero = TOP + HEIGHT
    assert points[0] == (LEFT, zero)
    assert points[1][0] == LEFT + WIDTH / 2
    assert points[2][0] == LEFT + WIDTH
    assert TOP < points[2][1] < points[1][1] < zero
    assert zero - points[2][1] == pytest.approx(2 * (zero - points[1][1]), abs=0.11)


def test_lines_of_a_panel_share_its_scale():
    (_, low), (_, high) = drawn(Panel("p", [Line("a", [(1, 10)]), Line("b", [(1, 20)])]))

    zero = TOP + HEIGHT
    assert zero - high[0][1] == pytest.approx(2 * (zero - low[0][1]), abs=0.11)


def test_a_name_keeps_its_colour_in_every_panel_and_stands_in_the_legend():
    lines = [Line("stock", [(1, 1)]), Line("jenga", [(1, 2)])]
    text = svg([Panel("one", lines), Panel("two", lines)])

    colours = [colour for colour, _ in drawn(Panel("one", lines), Panel("two", lines))]
    assert colours == [*COLOURS[:2], *COLOURS[:2]]
    assert text.count(">stock<") == text.count(">jenga<") == 1


def test_names_and_titles_may_hold_any_character():
    root = ElementTree.fromstring(svg([Panel("p99 <= 1 s & more", [Line("<a>", [(1, 1)])])]))

    assert {"p99 <= 1 s & more", "<a>"} <= {text.text for text in root.findall(f"{SVG}text")}


def test_a_panel_without_points_shows_empty_axes():
    assert drawn(Panel("p", []), Panel("q", [Line("a", [])])) == [(COLOURS[0], [])]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_numbers_that_no_axis_can_show_are_refused(bad):
    with pytest.raises(ValueError, match="'p' has numbers below zero or not finite"):
        svg([Panel("p", [Line("a", [(1, bad)])])])


def test_more_lines_than_colours_are_refused():
    lines = [Line(str(index), [(1, 1)]) for index in range(len(COLOURS) + 1)]

    with pytest.raises(ValueError, match="7 lines, 6 colours"):
        svg([Panel("p", lines)])


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, [0]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (12, [0, 5, 10]),
        (0.03, [0, 0.01, 0.02, 0.03]),
        (1050, [0, 500, 1000]),
    ],
)
def test_ticks_are_round_steps_up_to_the_limit(limit, expected):
    assert ticks(limit) == pytest.approx(expected)
