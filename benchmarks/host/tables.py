"""Tables of `bench_host.py`: microseconds of all sides of a cell, and jenga over the first one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.host.side import HostSide
from benchmarks.replay.steady import Seen, State

STEP_CALLS = ("check", "slide", "alloc")
REQUEST_CALLS = ("match", "lock", "extend", "insert", "release")
CELL_HEAD = ("layers", "batch", "pool", "request")
STEP_HEAD = (
    "step, memory to spare",
    "the same, mean",
    *STEP_CALLS,
    "step, pool full of prefixes",
    "the same, mean",
)
MODEL_HEAD = ("model", "batch", "request")
QUEUE_STEP_HEAD = (
    "step, memory to spare",
    "the same, mean",
    "step, pool full of prefixes",
    "the same, mean",
    "step, full and others wait",
    "the same, mean",
    "of it the round",
    "the same, mean",
)
QUEUE_REQUEST_HEAD = (
    "ran, waited",
    "retracted",
    "admit",
    "insert",
    "release",
    "memory's calls per step",
    "whole thread per step",
)
MEDIAN, MEAN = statistics.median, statistics.mean


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *lines = (f"| {' | '.join(line)} |" for line in (heading, *rows))
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


def across(seconds: Sequence[float]) -> str:
    micros = [1e6 * value for value in seconds]
    shown = " / ".join(f"{value:,.0f}" for value in micros)
    return f"{shown} **{micros[-1] / micros[0]:.2f}**" if micros[0] >= 0.5 else shown


# ---- our own lists of calls ------------------------------------------------------------------


def step_row(sides: Sequence[HostSide]) -> list[str]:
    def cell(phase: str, call: str, average: Callable[[Sequence[float]], float]) -> str:
        return across([average(side.seconds[phase, call]) for side in sides])

    return [
        cell("spare", "step", MEDIAN),
        cell("spare", "step", MEAN),
        *(cell("spare", call, MEDIAN) for call in STEP_CALLS),
        cell("full", "step", MEDIAN),
        cell("full", "step", MEAN),
    ]


def request_row(sides: Sequence[HostSide]) -> list[str]:
    return [
        across([MEDIAN(side.seconds["full", call]) for side in sides]) for call in REQUEST_CALLS
    ]


# ---- SGLang's scheduler ------------------------------------------------------------------------


def queue_step_row(seen: Mapping[str, Seen]) -> list[str]:
    def both(name: str, call: str) -> list[str]:
        states = [side.states[name] for side in seen.values()]
        return [
            across([average(state.seconds[call]) for state in states]) for average in (MEDIAN, MEAN)
        ]

    return [
        *both("spare", "step"),
        *both("full", "step"),
        *both("queue", "step"),
        *both("queue", "round"),
    ]


def queue_request_row(seen: Mapping[str, Seen]) -> list[str]:
    """Of the state with a queue. Calls for a request: medians; the last two: means."""
    states: list[State] = [side.states["queue"] for side in seen.values()]
    ran = " / ".join(f"{MEAN(state.running):.0f}" for state in states)
    waited = " / ".join(f"{MEAN(state.waiting):.0f}" for state in states)
    return [
        f"{ran}, {waited}",
        " / ".join(str(side.retractions) for side in seen.values()),
        *(
            across([MEDIAN(state.seconds[call] or [0.0]) for state in states])
            for call in ("admit", "insert", "release")
        ),
        across([state.memory_seconds / state.steps for state in states]),
        across([state.thread_seconds / state.steps for state in states]),
    ]
