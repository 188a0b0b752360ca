"""The cells of `bench_host.py` with a queue: real models' layers in SGLang's own scheduler.

Each side is an engine booted with its flags, so pools, trees and admission are what a server has;
only clients and model are replaced (`replay/steady.py`). All sides get a pool in which the same
number of requests fits, however many bytes that takes, and take turns. With windows SGLang asks
admission in every step, without them only when a request has left since the last refusal; stock
also caps the requests of models with states at boot, and asks nobody while so many run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.replay.baselines import BASELINES, CHUNK, Baseline
from benchmarks.replay.engine import PlayingEngine, play_on_engine
from benchmarks.replay.geometries import GEOMETRIES, Geometry, layer_types, windows
from benchmarks.replay.steady import Crowd, Seen, Steady
from benchmarks.replay.turns import Turn, take_turns
from sglang_jenga.plan.planner import MAX_LARGE_PAGE_BYTES

_GPT_OSS, _GEMMA = GEOMETRIES["gpt-oss-20b"], GEOMETRIES["gemma-3-27b"]
MODELS: dict[str, Geometry] = {
    "llama-3.1-8b": GEOMETRIES["llama-3.1-8b"],
    # Stock stores every layer of Gemma-3 for every token; on Gemma-4's code, whose last layer must
    # be a full one, it has a window pool, and unified memory serves it.
    "gemma-3-27b": replace(
        _GPT_OSS,
        name="gemma-3-27b",
        published=_GEMMA.published,
        weights=_GEMMA.weights,
        carrier=_GPT_OSS.carrier | windows(layer_types("ww" + "wwwwwf" * 10), 1024),
        gpus=_GEMMA.gpus,
    ),
    "gpt-oss-20b": _GPT_OSS,
    "qwen3-next-80b": GEOMETRIES["qwen3-next-80b"],
}
SIDES = ("stock", "unified", "jenga")
SECONDS = 600
"""That a turn, and a count of what fits, may take."""
CLOSE = 0.05
"""How far from the batch that was asked for a side's may be."""


class QueueCell(NamedTuple):
    model: str
    crowd: Crowd
    page_size: int = 1

    @property
    def geometry(self) -> Geometry:
        return MODELS[self.model]

    @property
    def sides(self) -> list[Baseline]:
        """Unified memory is for models with windows or states only."""
        baselines = [BASELINES[name] for name in SIDES]
        return [item for item in baselines if item.missing_on(self.geometry) is None]

    @property
    def label(self) -> list[str]:
        groups = " + ".join(group.label for group in self.geometry.real.groups)
        return [f"{self.model}: {groups}", str(self.crowd.batch), f"{self.crowd.tokens:,}"]


def play_cell(cell: QueueCell, steps: int) -> dict[str, Seen]:
    """What was seen on every side, by name.

    Raises ReplayFailed where an engine does not play, ValueError where no pool fits.
    """
    pools = {side.name: fitting_pool(cell, side) for side in cell.sides}
    turns = [Turn() for _ in cell.sides]
    with ExitStack() as stack:
        engines = [
            stack.enter_context(PlayingEngine(*_told(cell, side, pools[side.name], steps, turn)))
            for side, turn in zip(cell.sides, turns, strict=True)
        ]
        return dict(zip(pools, take_turns(engines, turns, SECONDS), strict=True))


def fitting_pool(cell: QueueCell, side: Baseline) -> int:
    """Bytes of a pool in which so many requests as the cell asks for run while others wait.

    Found by trying: it depends on what a side holds for a request and on what it promises.
    """

    def fits(pool_bytes: int) -> int:
        return play_on_engine(*_told(cell, side, pool_bytes, None, None), SECONDS).fits

    try:
        return search_pool(fits, cell.crowd.batch, cell.crowd.batch * _request_bytes(cell))
    except ValueError as error:
        raise ValueError(f"{', '.join(cell.label)}, {side.name}: {error}") from None


def search_pool(fits: Callable[[int], int], batch: int, guess: int) -> int:
    """Bytes for which `fits`, which rises with them, is about `batch`; it says 0 for too many to be
    counted. Raises ValueError if there are none."""
    low, high, pool = 0, 0, guess  # no upper bound yet
    for _ in range(10):
        found = fits(pool)
        if found and abs(found - batch) <= CLOSE * batch:
            return pool
        if found and found < batch:
            low = pool
        else:
            high = pool
        pool = int(pool * (batch / found if found else 0.5))
        if pool <= low or (high and pool >= high):
            pool = (low + high) // 2 if high else 2 * low
    raise ValueError(f"no pool runs about {batch} requests")


def _request_bytes(cell: QueueCell) -> int:
    """Of the replayed pool, that a request holds at its end, sharing nothing."""
    total = 0
    for group in cell.geometry.replayed:
        if group.kind.name == "state":
            total += 3 * group.entry_bytes  # its own, and two that it is tracked in
        else:
            total += min(cell.crowd.tokens, group.window or cell.crowd.tokens) * group.entry_bytes
    return total


def _told(
    cell: QueueCell, side: Baseline, pool_bytes: int, steps: int | None, turn: Turn | None
) -> tuple[Geometry, Steady, dict[str, Any], dict[str, str]]:
    """What an engine is told."""
    geometry = cell.geometry
    largest_page_bytes = MAX_LARGE_PAGE_BYTES // geometry.scale
    server = {
        "page_size": cell.page_size,
        # Memory is to decide who runs.
        "max_running_requests": cell.crowd.batch + cell.crowd.waiting,
        **side.server(geometry),
        "chunked_prefill_size": CHUNK,  # on all sides a step of so many requests is the same work
    }
    return (
        geometry,
        Steady(cell.crowd, steps, pool_bytes, largest_page_bytes, turn),
        server,
        side.env,
    )
