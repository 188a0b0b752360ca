"""Small charts as SVG text: lines and stacked areas side by side with one legend.

    panel = Panel("TTFT, ms", {"stock": [(1, 20.0), (2, 22.5)], "jenga": [(1, 21.0)]})
    Path("plot.svg").write_text(draw([panel], {"stock": "#888888", "jenga": "#d1495b"}))

No plotting package, small files, the same bytes every time. Axes are linear and start at zero.
Nothing here knows what is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, inf, log10

PANEL_WIDTH, PANEL_HEIGHT = 330, 190
MARGIN_LEFT, MARGIN_TOP, MARGIN_BOTTOM, GAP = 58, 30, 40, 20
LEGEND_HEIGHT = 26


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
    """One SVG document; `colours` by legend name, in legend order.

    A panel without numbers shows empty axes. Raises ValueError for numbers that no axis can show,
    below zero or not finite.
    """
    columns = min(columns, len(panels))
    rows = ceil(len(panels) / columns)
    cell_width = MARGIN_LEFT + PANEL_WIDTH + GAP
    cell_height = MARGIN_TOP + PANEL_HEIGHT + MARGIN_BOTTOM
    width, height = columns * cell_width, LEGEND_HEIGHT + rows * cell_height
    used = {name for panel in panels for name in (*panel.lines, *panel.layers)}
    body = [_legend({name: colour for name, colour in colours.items() if name in used})]
    for index, panel in enumerate(panels):
        x0 = index % columns * cell_width + MARGIN_LEFT
        y0 = LEGEND_HEIGHT + index // columns * cell_height + MARGIN_TOP
        label = y_label if index % columns == 0 else ""
        body.append(f'<g transform="translate({x0} {y0})">{_panel(panel, colours, label)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _legend(colours: Mapping[str, str]) -> str:
    parts, x = [], MARGIN_LEFT
    for name, colour in colours.items():
        parts.append(f'<rect x="{x}" y="9" width="12" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="18">{escape(name)}</text>')
        x += 34 + 6 * len(name)
    return "".join(parts)


def _panel(panel: Panel, colours: Mapping[str, str], y_label: str) -> str:
    points = [point for line in panel.lines.values() for point in line]
    numbers = [*panel.x, *(n for point in points for n in point)]
    numbers += [value for values in panel.layers.values() for value in values]
    if not all(0 <= number < inf for number in numbers):
        raise ValueError(f"panel {panel.title!r} has numbers below zero or not finite")
    stacked = [sum(column) for column in zip(*panel.layers.values(), strict=True)]
    y_step, top = ticks(panel.top or max([*stacked, *(y for _, y in points)], default=0.0))
    top = panel.top or top
    right = max([*panel.x, *(x for x, _ in points)], default=0.0) or 1.0
    x_step, _ = ticks(right)

    def place(x: float, y: float) -> str:
        return f"{x / right * PANEL_WIDTH:.1f},{PANEL_HEIGHT * (1 - y / top):.1f}"

    parts = [f'<text y="-10" font-weight="bold">{escape(panel.title)}</text>']
    base = [0.0] * len(stacked)
    for name, values in panel.layers.items():
        upper = [low + value for low, value in zip(base, values, strict=True)]
        x = panel.x[: len(values)]
        outline = [place(*point) for point in zip(x, upper, strict=True)]
        outline += [place(*point) for point in zip(reversed(x), reversed(base), strict=True)]
        parts.append(f'<polygon points="{" ".join(outline)}" fill="{colours[name]}"/>')
        base = upper
    for i in range(floor(top / y_step + 1e-9) + 1):
        y = PANEL_HEIGHT * (1 - i * y_step / top)
        parts.append(f'<path d="M0 {y:.1f}h{PANEL_WIDTH}" stroke="#0002"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{i * y_step:.6g}</text>')
    for i in range(floor(right / x_step + 1e-9) + 1):
        x = i * x_step / right * PANEL_WIDTH
        at = f'x="{x:.1f}" y="{PANEL_HEIGHT + 16}"'
        parts.append(f'<text {at} text-anchor="middle">{i * x_step:.6g}</text>')
    for name, line in panel.lines.items():
        places = " ".join(place(x, y) for x, y in line)
        parts.append(
            f'<polyline points="{places}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>'
        )
    parts.append(
        f'<text x="{PANEL_WIDTH / 2}" y="{PANEL_HEIGHT + 32}" text-anchor="middle">'
        f"{escape(panel.x_label)}</text>"
    )
    if y_label:
        parts.append(
            f'<text transform="translate(-44 {PANEL_HEIGHT / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )
    return "".join(parts)


def ticks(highest: float) -> tuple[float, float]:
    """A round step that cuts 0 .. `highest` in about four, and the multiple that covers it."""
    if highest <= 0:
        return 1.0, 1.0
    power = 10.0 ** floor(log10(highest / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * 5 >= highest)
    return step, step * ceil(highest / step - 1e-9)
