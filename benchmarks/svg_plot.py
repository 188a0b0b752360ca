"""Line plots side by side as one SVG, in plain text: no plotting package, small files, same bytes.

    panel = Panel("TTFT, ms", [Line("stock", [(1, 20.0), (2, 22.5)]), Line("jenga", [(1, 21.0)])])
    Path("plot.svg").write_text(svg([panel], x_title="round"))

Axes begin at zero. A line's colour is its place in the panel, so the same name should have the same
place in all panels; the legend is that of the first. What the numbers mean is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

COLOURS = ("#888888", "#d1495b", "#2e6f95", "#3c8d5a", "#b8860b", "#6a4c93")
WIDTH, HEIGHT = 300, 200  # of a panel's axes
LEFT, TOP, BOTTOM = 52, 46, 40


class Line(NamedTuple):
    """Points in drawing order; a gap in the data is a point left out."""

    name: str
    points: Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """`lines`: no more than there are `COLOURS`."""

    title: str
    lines: Sequence[Line]


def svg(panels: Sequence[Panel], x_title: str = "") -> str:
    """Return the document; a panel without points shows empty axes.

    Raises ValueError for more lines than colours and for numbers below zero or not finite.
    """
    width, height = LEFT + len(panels) * (WIDTH + LEFT), TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, LEFT + index * (WIDTH + LEFT))
    names = [line.name for line in panels[0].lines] if panels else []
    x = LEFT
    for name, colour in zip(names, COLOURS, strict=False):
        parts.append(_text(x, 16, name, colour=colour))
        x += 24 + 7 * len(name)
    parts.append(_text(LEFT, height - 6, x_title))
    return "\n".join([*parts, "</svg>", ""])


def ticks(limit: float, most: int = 5) -> list[float]:
    """Round steps from zero up to `limit`, `most` beyond zero at most; ``[0.0]`` if it is zero."""
    if limit <= 0:
        return [0.0]
    scale = 10.0 ** math.floor(math.log10(limit / most))
    step = next(scale * part for part in (1, 2, 5, 10) if limit / (scale * part) <= most)
    return [step * count for count in range(math.floor(limit / step + 1e-9) + 1)]


def _panel(panel: Panel, x0: float) -> Iterator[str]:
    if len(panel.lines) > len(COLOURS):
        raise ValueError(f"panel {panel.title!r}: {len(panel.lines)} lines, {len(COLOURS)} colours")
    numbers = [number for line in panel.lines for point in line.points for number in point]
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"panel {panel.title!r} has numbers below zero or not finite")
    right, top = (max(numbers[axis::2], default=0.0) or 1.0 for axis in (0, 1))
    bottom = TOP + HEIGHT
    x_scale, y_scale = WIDTH / right, HEIGHT / (1.05 * top)
    yield _text(x0, TOP - 12, panel.title)
    for value in ticks(1.05 * top):
        y = bottom - value * y_scale
        yield f'<path d="M{x0} {y:.1f}h{WIDTH}" stroke="#ddd"/>'
        yield _text(x0 - 5, y + 4, f"{value:g}", anchor="end")
    for value in ticks(right, most=8):
        yield _text(x0 + value * x_scale, bottom + 16, f"{value:g}", anchor="middle")
    for line, colour in zip(panel.lines, COLOURS, strict=False):
        places = (f"{x0 + x * x_scale:.1f},{bottom - y * y_scale:.1f}" for x, y in line.points)
        shape = f'fill="none" stroke="{colour}" stroke-width="2"'
        yield f'<polyline points="{" ".join(places)}" {shape}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "black") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(text)}</text>'
