"""The plots of benchmarks: what is drawn is what was given, in small files that do not change."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import plotting
from benchmarks.charts import Panel, draw, figure

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
COLOURS = {"a": "#111111", "b": "#222222"}


def panels_of(*panels: Panel, columns: int = 4) -> list:
    drawn = figure(panels, COLOURS, columns=columns)
    return [axes for axes in drawn.axes if axes.axison]


def texts(svg: str) -> list[str]:
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_line_has_the_points_that_were_given_on_axes_that_begin_at_zero():
    (axes,) = panels_of(Panel("p", {"a": [(1, 20), (5, 50), (10, 100)]}))
    (line,) = axes.lines

    assert line.get_xydata().tolist() == [[1, 20], [5, 50], [10, 100]]
    assert line.get_color() == COLOURS["a"]
    assert (axes.get_xlim(), axes.get_ylim()[0]) == ((0, 10), 0)


def test_layers_lie_on_top_of_each_other_and_may_end_early():
    panel = Panel("p", layers={"a": [25, 50], "b": [75, 50]}, x=[1, 2, 4], top=100.0)
    (axes,) = panels_of(panel)
    # The higher one is drawn first and the lower one over it.
    higher, lower = axes.patches

    assert lower.get_xy().tolist()[1:3] == [[1, 25], [2, 50]]
    assert higher.get_xy().tolist()[1:3] == [[1, 100], [2, 100]]
    assert [patch.get_label() for patch in (higher, lower)] == ["b", "a"]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 4), (0, 100))


def test_a_name_keeps_its_colour_in_every_panel_and_stands_in_the_legend_once():
    lines = {"a": [(1, 1)], "b": [(1, 2)]}
    panels = Panel("one", lines), Panel("two", dict(reversed(lines.items())))
    found = [
        {line.get_label(): line.get_color() for line in axes.lines} for axes in panels_of(*panels)
    ]
    shown = texts(draw(panels, COLOURS | {"c": "#333333"}))

    assert found == [COLOURS, COLOURS]
    assert shown.count("a") == shown.count("b") == 1
    assert "c" not in shown, "what is not drawn needs no legend"


def test_panels_stand_side_by_side_until_a_row_is_full():
    axes = panels_of(*(Panel(str(i)) for i in range(3)), columns=2)
    places = [place.get_subplotspec() for place in axes]

    assert [(p.rowspan.start, p.colspan.start) for p in places] == [(0, 0), (0, 1), (1, 0)]


def test_names_and_titles_may_hold_any_character():
    svg = draw([Panel("p99 <= 1 s & more", {"<a>": [(1, 1)]})], {"<a>": "#111111"})

    assert {"p99 <= 1 s & more", "<a>"} <= set(texts(svg))


def test_a_panel_without_points_shows_empty_axes():
    for axes in panels_of(Panel("p"), Panel("q", {"a": []})):
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (0, 1))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_numbers_that_no_axis_can_show_are_refused(bad: float):
    for panel in (Panel("p", {"a": [(1, bad)]}), Panel("p", layers={"a": [bad]}, x=[1])):
        with pytest.raises(ValueError, match="'p' has numbers below zero or not finite"):
            draw([panel], COLOURS)


def test_a_plot_has_the_same_bytes_every_time_and_no_date():
    noise = np.random.default_rng(0).random(240)
    panel = Panel("p", {"a": list(enumerate(noise))}, x_label="x")

    assert draw([panel], COLOURS) == draw([panel], COLOURS)
    assert "date" not in draw([panel], COLOURS).lower()


def test_coordinates_are_rounded_to_a_tenth_and_still_a_path():
    root = ElementTree.fromstring(
        draw([Panel("p", {"a": [(0, 0), (1, 1 / 3), (2, 2 / 3)]})], COLOURS)
    )
    (line,) = (
        path
        for path in root.iter(f"{SVG}path")
        if "#111111" in path.get("style", "") and "none" in path.get("style")
    )
    start, *numbers = line.get("d").split()

    assert start == "M" and len(numbers) == 6
    assert all(number == f"{float(number):.1f}" or number.isdigit() for number in numbers)
    x0, _, x1, _, x2, _ = map(float, numbers)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results" / "plots").glob("*.svg")), ids=lambda p: p.stem
)
def test_committed_plot_is_small_and_well_formed(path: Path):
    assert path.stat().st_size < 60_000
    assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"


def test_without_matplotlib_a_line_says_what_to_install(monkeypatch):
    assert plotting.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert "pip install '.[bench]'" in plotting.missing()
