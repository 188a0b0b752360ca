"""What a replay looks like over virtual time, as SVG files: hits, concurrency, memory, waste.

Hit rate, concurrency and waste compare the baselines in one panel per workload; memory by layer
group has a panel per baseline. Series are averaged over a common grid of time, so a file takes a
few ten kilobytes. The x axis is modelled seconds; everything on y axes is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np

from benchmarks.charts import Panel, draw
from benchmarks.replay.result import Result

GRID = 240
"""Points of a line, of which those are drawn that are seen."""
AREA_GRID = 120
"""Points of an area's edge, all of which are drawn."""
COLOURS = {
    "stock": "#d55e00",
    "stock-best": "#e69f00",
    "max-page": "#009e73",
    "gcd-page": "#999999",
    "unified": "#cc79a7",
    "jenga": "#0072b2",
}
# Running requests dark, cached prefixes light, one hue per layer group.
HUES = [("#1f4e9c", "#a9c4ee"), ("#1b7a46", "#a6dcbc"), ("#a3581b", "#f2c79c")]
EMPTY = "#e8e8e8"
X_LABEL = "modelled seconds"


def on_grid(time: list[float], values: list[float], grid: np.ndarray) -> list[float]:
    """Mean of the samples between each grid point and the one before it; gaps keep the last value.

    `grid` rises and starts above zero; samples behind its end do not count.
    """
    bins = np.searchsorted(grid, time, side="left")
    inside = bins < grid.size
    count = np.bincount(bins[inside], minlength=grid.size)
    total = np.bincount(bins[inside], np.asarray(values, float)[inside], minlength=grid.size)
    means = np.divide(total, count, out=np.zeros(grid.size), where=count > 0)
    last = np.maximum.accumulate(np.where(count > 0, np.arange(grid.size), 0))
    return means[last].tolist()


def grid_of(results: Mapping[str, Result]) -> np.ndarray:
    end = max(result.steps.time[-1] for result in results.values())
    return np.linspace(0, end, GRID + 1)[1:]


def line(
    time: list[float], values: list[float], result: Result, grid: np.ndarray
) -> list[tuple[float, float]]:
    """Points of a run on the grid that it shares with others."""
    mine = until_end(result, grid)
    return list(zip(mine.tolist(), on_grid(time, values, mine), strict=True))


def until_end(result: Result, grid: np.ndarray) -> np.ndarray:
    """A run that ends earlier than the others has a shorter line."""
    return grid[: max(1, np.searchsorted(grid, result.steps.time[-1], side="right"))]


def running_panel(title: str, results: Mapping[str, Result]) -> Panel:
    grid = grid_of(results)
    lines = {
        name: line(result.steps.time, result.steps.running, result, grid)
        for name, result in results.items()
    }
    return Panel(title, lines, x_label=X_LABEL)


def hit_panel(title: str, results: Mapping[str, Result]) -> Panel:
    """Share of the prompt tokens of all requests so far that were hit, in %."""
    grid = grid_of(results)
    lines = {}
    for name, result in results.items():
        served = sorted(result.requests, key=lambda request: request.first_token)
        hits = list(accumulate(request.hit_tokens for request in served))
        prompts = accumulate(request.prompt_tokens for request in served)
        shares = [100 * hit / prompt for hit, prompt in zip(hits, prompts, strict=True)]
        moments = [request.first_token for request in served]
        lines[name] = line(moments, shares, result, grid)
    return Panel(title, lines, x_label=X_LABEL)


def waste_panel(title: str, results: Mapping[str, Result]) -> Panel:
    """Bytes that nobody can use, in % of the pool."""
    grid = grid_of(results)
    lines = {}
    for name, result in results.items():
        pool = result.config["replayed_pool_bytes"]
        shares = [100 * wasted / pool for wasted in result.steps.wasted]
        lines[name] = line(result.steps.time, shares, result, grid)
    return Panel(title, lines, x_label=X_LABEL)


def memory_panel(title: str, result: Result, end: float) -> Panel:
    """Bytes of the pool by layer group and use, in % of the pool, over 0 .. `end` seconds."""
    grid = np.linspace(0, end, AREA_GRID + 1)[1:]
    steps, pool = result.steps, result.config["replayed_pool_bytes"]

    def percent(values: list[int]) -> list[float]:
        shares = [100 * value / pool for value in values]
        return on_grid(steps.time, shares, until_end(result, grid))

    layers = {}
    for group in steps.held:
        layers[f"{group}, running"] = percent(steps.held[group])
        layers[f"{group}, cached"] = percent(steps.cached[group])
    layers["empty"] = percent(steps.empty)
    return Panel(title, layers=layers, x=grid.tolist(), x_label=X_LABEL, top=100.0)


def memory_colours(result: Result) -> dict[str, str]:
    colours = {}
    for group, (running, cached) in zip(result.steps.held, HUES, strict=False):
        colours[f"{group}, running"] = running
        colours[f"{group}, cached"] = cached
    return {**colours, "empty": EMPTY}


def write_plots(
    model: str, by_workload: Mapping[str, Mapping[str, Result]], folder: Path
) -> list[Path]:
    """All plots of one model; `by_workload` maps workloads to results by baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def write(name: str, text: str) -> None:
        path = folder / f"{name}.svg"
        path.write_text(text)
        written.append(path)

    for name, panel, label in [
        ("running", running_panel, "running requests"),
        ("hits", hit_panel, "prompt tokens hit so far, %"),
        ("waste", waste_panel, "wasted, % of the pool"),
    ]:
        panels = [panel(workload, results) for workload, results in by_workload.items()]
        write(f"{model}-{name}", draw(panels, COLOURS, columns=2, y_label=label))
    for workload, results in by_workload.items():
        end = max(result.steps.time[-1] for result in results.values())
        panels = [memory_panel(name, result, end) for name, result in results.items()]
        colours = {}
        for result in results.values():
            colours.update(memory_colours(result))
        text = draw(panels, colours, columns=2, y_label="% of the pool")
        write(f"{model}-memory-{workload}", text)
    return written
