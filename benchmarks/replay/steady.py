"""A server in four states, one after the other, so long that what a step costs in each can be told.

    spare    nine tenths of a full batch decode, in a pool that nothing was cached in before
    filling  prompts pass through until the pool is full of their prefixes and evicts
    full     nine tenths of a full batch decode on and on, each request that ends followed by the
             next; nobody waits, but for every page another must be evicted
    queue    more clients than fit: the batch is as full as the server makes it, and in every step
             somebody waits who does not fit

There is no clock: the next request comes when one ends. Requests are those of many tenants behind
system prompts of their own, some of them asked far more than others.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.replay.turns import Turn


@dataclass(frozen=True)
class Crowd:
    """Who asks: `batch` requests are to run at once, and `waiting` more want to.

    Lengths between two are drawn evenly, up to but without the second.
    """

    batch: int
    waiting: int = 128
    tenants: int = 64
    system: int = 2048
    question: tuple[int, int] = (256, 1280)
    answer: tuple[int, int] = (64, 192)
    seed: int = 31

    @property
    def tokens(self) -> int:
        """Of a request, on average."""
        return self.system + sum(self.question) // 2 + sum(self.answer) // 2

    @property
    def not_waiting(self) -> int:
        """So few that all of them always fit."""
        return self.batch - -(-self.batch // 10)


class Steady(NamedTuple):
    """What the scheduler process is told: `steps` are the decode steps to be kept of a state.
    Without, it only says how many requests run while others wait."""

    crowd: Crowd
    steps: int | None
    pool_bytes: int
    largest_page_bytes: int
    turn: Turn | None = None
    plan: str = "lcm"

    def driver(self) -> Any:
        """Who plays this, in the scheduler process."""
        from benchmarks.replay.steady_driver import SteadyDriver

        return SteadyDriver(self)


@dataclass
class State:
    """What was seen in one state. Seconds of the scheduler's thread, by call (`call_times.py`):
    ``round``, ``check``, ``prepare``, their sum ``step`` and ``thread``, all that the thread did
    since the step before, have an entry per decode step, the others one per request."""

    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory_seconds: float = 0.0
    """Of all these calls together, those between the kept steps included."""
    thread_seconds: float = 0.0
    """Of the whole thread, likewise."""

    @property
    def steps(self) -> int:
        return len(self.running)


class Seen(NamedTuple):
    """`fits`: how many requests ran while others waited, 0 if none did. `states` by name."""

    fits: int
    states: dict[str, State]
    retractions: int
