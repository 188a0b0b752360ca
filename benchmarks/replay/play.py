"""What goes into the scheduler process and what comes out of it; both are pickled."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.replay.clock import Clock, Weights
from benchmarks.replay.requests import Request
from benchmarks.replay.result import Served, Steps
from sglang_jenga.plan.spec import LayerGroup


class Play(NamedTuple):
    """What the scheduler process is told. Groups: with the real model's bytes, and the replayed."""

    requests: tuple[Request, ...]
    clock: Clock
    weights: Weights
    real_groups: tuple[LayerGroup, ...]
    groups: tuple[LayerGroup, ...]
    pool_bytes: int
    known_lengths: bool
    plan: str
    largest_page_bytes: int

    def driver(self) -> Any:
        """Who plays this, in the scheduler process."""
        from benchmarks.replay.driver import Driver

        return Driver(self)


class Outcome(NamedTuple):
    steps: Steps
    served: list[Served]
    totals: dict[str, float]
    pool: str
