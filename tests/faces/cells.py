"""The models and the ways of serving them that the rig's tests go through.

Pools are tiny, so that somebody always waits for memory, and packings uneven, so that a large page
is seldom one request's alone.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_jenga.testing.context import Settings
from tests.faces.outside import SinkWindow
from tests.faces.pools import Shape


class Cell(NamedTuple):
    """A model in a pool, and how it is served."""

    name: str
    shape: Shape
    settings: Settings

    def __str__(self) -> str:
        return self.name


MODELS = {
    "dense": {
        1: Shape(full=1, num_large=90),
        4: Shape(full=1, num_large=26),
        16: Shape(full=1, num_large=12),
    },
    "windows": {
        1: Shape(full=3, window_k=2, window=8, num_large=60),
        4: Shape(full=3, window_k=2, window=8, num_large=20),
        16: Shape(full=3, window_k=2, window=20, num_large=10),
    },
    # The full group has no layers, and its pages cost next to nothing.
    "windows alone": {
        1: Shape(full=24, window_k=2, window=8, num_large=24),
        4: Shape(full=24, window_k=1, window=8, num_large=24),
    },
    "chunks": {
        1: Shape(full=3, window_k=2, window=8, sliding="chunked", num_large=60),
        4: Shape(full=3, window_k=2, window=10, sliding="chunked", num_large=20),
        16: Shape(full=3, window_k=2, window=32, sliding="chunked", num_large=10),
    },
    # A type of a package of its own: its first tokens are never dead, those behind them are.
    "sinks": {
        1: Shape(full=3, window_k=2, window=8, sliding=SinkWindow.name, num_large=60),
        4: Shape(full=3, window_k=2, window=8, sliding=SinkWindow.name, num_large=24),
        16: Shape(full=3, window_k=8, window=20, sliding=SinkWindow.name, num_large=12),
    },
    # What no kernel of SGLang can address yet: a third group that tokens have pages in.
    "two windows and chunks": {
        1: Shape(full=6, window_k=3, window=6, others=(("window", 16, 2), ("chunked", 8, 1))),
        4: Shape(full=6, window_k=3, window=6, others=(("window", 20, 2),), num_large=30),
    },
    "sinks and windows": {
        1: Shape(full=6, window_k=3, sliding=SinkWindow.name, others=(("window", 12, 2),)),
        4: Shape(full=6, window_k=3, others=((SinkWindow.name, 12, 2),), num_large=30),
    },
    "states": {
        1: Shape(full=12, state_k=1, num_large=16),
        4: Shape(full=3, state_k=1, num_large=16),
        16: Shape(full=1, state_k=1, num_large=16),
    },
    "three-way": {
        1: Shape(full=12, window_k=6, window=8, state_k=2, num_large=22),
        4: Shape(full=4, window_k=2, window=8, state_k=1, num_large=22),
        16: Shape(full=2, window_k=1, window=20, state_k=1, num_large=20),
    },
}


def _strategies(shape: Shape, page_size: int) -> tuple[str, ...]:
    if not shape.has_states:
        return ("",)
    tracked = ("extra_buffer", "extra_buffer_lazy")
    return ("no_buffer", *tracked) if page_size == 1 else tracked


def cells() -> list[Cell]:
    """All of them: with the radix cache by page size and strategy, without it once."""
    found = []
    for model, shapes in MODELS.items():
        for page_size, shape in shapes.items():
            for strategy in _strategies(shape, page_size):
                settings = Settings(
                    page_size=page_size,
                    chunk=max(16, page_size),
                    overlap=strategy != "no_buffer",  # SGLang turns it off there
                    strategy=strategy or "no_buffer",
                )
                name = f"{model} {strategy} page {page_size}".replace("  ", " ")
                found.append(Cell(name, shape, settings))
        for overlap in (True, False):
            name = f"{model} without radix cache{'' if overlap else ' or overlap'}"
            found.append(Cell(name, shapes[1], Settings(radix=False, overlap=overlap)))
    for model in ("dense", "windows"):
        found.append(Cell(f"{model} without overlap", MODELS[model][1], Settings(overlap=False)))
    # As served: requests decode in chunks, and windows leave little behind.
    for model, strategy in (("windows", "no_buffer"), ("three-way", "extra_buffer_lazy")):
        settings = Settings(mixed_chunk=True, slide_interval=1, strategy=strategy)
        found.append(Cell(f"{model} with mixed chunks", MODELS[model][1], settings))
    return found


CELLS = {cell.name: cell for cell in cells()}
