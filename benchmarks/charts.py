"""Lines and stacked areas side by side with one legend, as SVG text drawn by matplotlib.

    panel = Panel("TTFT, ms", {"stock": [(1, 20.0), (2, 22.5)], "jenga": [(1, 21.0)]})
    Path("plot.svg").write_text(draw([panel], {"stock": "#888888", "jenga": "#d1495b"}))

The same bytes every time, and small: no date, ids from a fixed salt, text as text, paths to a tenth
of a point. Axes are linear and start at zero. Nothing here knows what is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, inf

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

PANEL_WIDTH, PANEL_HEIGHT = 3.8, 2.5
"""Inches, with axes and title."""
STYLE = {
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # what text is measured by; matplotlib brings it
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": False,
    "grid.color": "#00000022",
    "svg.fonttype": "none",
    "svg.hashsalt": "sglang-jenga",
    "path.simplify_threshold": 0.9,
}


@dataclass(frozen=True)
class Panel:
    """`lines` maps legend names to points in drawing order; a gap in the data is a point left out.

    `layers` maps them to y values at `x` that are drawn on top of each other; what has fewer values
    than `x` ends early. `top` fixes the upper end of the y axis, otherwise the data does.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    layers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    x: Sequence[float] = ()
    x_label: str = ""
    top: float | None = None


def draw(
    panels: Sequence[Panel], colours: Mapping[str, str], *, columns: int = 4, y_label: str = ""
) -> str:
    """One SVG document; arguments as of `figure`."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure(panels, colours, columns=columns, y_label=y_label).savefig(
            text, format="svg", metadata={"Date": None, "Creator": None}
        )
    return _shortened(text.getvalue())


def figure(
    panels: Sequence[Panel], colours: Mapping[str, str], *, columns: int = 4, y_label: str = ""
) -> Figure:
    """All panels; `colours` by legend name, in legend order.

    A panel without numbers shows empty axes. Raises ValueError for numbers that no axis can show,
    below zero or not finite.
    """
    columns = min(columns, len(panels))
    rows = ceil(len(panels) / columns)
    used = {name for panel in panels for name in (*panel.lines, *panel.layers)}
    size = (columns * PANEL_WIDTH, rows * PANEL_HEIGHT + 0.3)
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for index, place in enumerate(axes.flat):
        if index >= len(panels):
            place.set_axis_off()
            continue
        _draw_panel(place, panels[index], colours)
        if index % columns == 0:
            place.set_ylabel(y_label)
    names = [name for name in colours if name in used]
    if names:
        patches = [Patch(color=colours[name], label=name) for name in names]
        drawn.legend(handles=patches, loc="outside upper left", ncols=len(names), frameon=False)
    return drawn


def _draw_panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    points = [point for line in panel.lines.values() for point in line]
    numbers = [*panel.x, *(n for point in points for n in point)]
    numbers += [value for values in panel.layers.values() for value in values]
    if not all(0 <= number < inf for number in numbers):
        raise ValueError(f"panel {panel.title!r} has numbers below zero or not finite")
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.x_label)
    heights = list(accumulate(map(np.asarray, panel.layers.values())))
    x = panel.x[: len(heights[0])] if heights else ()
    # From the highest sum to the lowest, each down to zero: half the corners of bands.
    for name, top in reversed([*zip(panel.layers, heights, strict=True)]):
        axes.fill([x[0], *x, x[-1]], [0, *top, 0], color=colours[name], label=name, linewidth=0)
    for name, line in panel.lines.items():
        x, y = zip(*line, strict=True) if line else ((), ())
        axes.plot(x, y, color=colours[name], label=name)
    axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
    right = max([*panel.x, *(x for x, _ in points)], default=0.0)
    axes.set_xlim(0, right or 1.0)
    axes.set_ylim(0, panel.top)
    if panel.top is None and not any(y for _, y in points):
        axes.set_ylim(0, 1.0)


def _shortened(svg: str) -> str:
    """The same picture in a third of the bytes: tenths of a point, no turns by 0 degrees."""
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _rounded(found.group()), svg)
    return re.sub(r">\s+<", ">\n<", svg)


def _rounded(attribute: str) -> str:
    short = re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number.group()):.1f}", attribute)
    return re.sub(r"\s*\n\s*", " ", short).replace(" L ", " ")  # after a point a line is meant
