"""Host time of a replay: what counts as the scheduler's work, told by a clock that we wind."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from benchmarks.replay import stopwatch
from benchmarks.replay.requests import Request, Workload
from benchmarks.replay.stopwatch import Stopwatch
from sglang_jenga.testing.engines import preload


class Wound:
    """A clock that stands still but for what is added to it."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stopwatch, "thread_time", lambda: self.now)

    def around(self, function, seconds: float):
        """`function`, taking so many seconds."""

        @functools.wraps(function)
        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow


@pytest.fixture
def wound(monkeypatch) -> Wound:
    return Wound(monkeypatch)


def test_a_lap_has_what_happened_outside_of_pauses_since_the_one_before(wound):
    watch = Stopwatch()
    wound.now += 100  # the server boots
    with watch.paused():
        wound.now += 50
    wound.now += 2
    with watch.paused():
        wound.now += 50
        watch.lap()
        wound.now += 50
    wound.now += 3
    with watch.paused():
        wound.now += 50
    wound.now += 4
    with watch.paused():
        watch.lap()

    assert watch.laps == [2, 7]


def test_what_comes_after_the_last_lap_is_in_the_mean_alone(wound):
    watch = Stopwatch()
    with watch.paused():
        pass
    for seconds in (1, 2, 3):
        wound.now += seconds
        with watch.paused():
            if seconds < 3:
                watch.lap()

    assert watch.totals() == {
        "host_ms_per_step": 1000 * (1 + 2 + 3) / 2,
        "host_ms_p99": pytest.approx(1990),
    }


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["stock", "jenga"])
def test_a_replays_host_time_is_the_schedulers_and_not_the_replays_own(
    baseline, wound, monkeypatch
):
    """Every part of the replay takes 1,000 s, each choice of a batch 1 s, all else no time."""
    preload()
    from sglang.srt.managers.scheduler import Scheduler

    from benchmarks.replay.baselines import BASELINES
    from benchmarks.replay.clock import Clock
    from benchmarks.replay.driver import Driver
    from benchmarks.replay.geometries import GEOMETRIES
    from benchmarks.replay.run import replay

    for name in ("arrivals", "forward", "output", "idle"):
        monkeypatch.setattr(Driver, name, wound.around(getattr(Driver, name), 1000.0))
    choose = wound.around(Scheduler.get_next_batch_to_run, 1.0)
    monkeypatch.setattr(Scheduler, "get_next_batch_to_run", choose)
    # Two at once, and a third long after they have ended.
    prompts = [(np.arange(1, 40 + i), np.arange(1, 30), 1e4 * (i // 2)) for i in range(3)]
    requests = tuple(Request(f"r{i}", *parts) for i, parts in enumerate(prompts))

    totals = replay(
        GEOMETRIES["gemma-3-27b"],
        Workload("three", requests, ""),
        BASELINES[baseline],
        pool_bytes=4 << 30,
        clock=Clock(),
        seconds=300,
    ).totals

    # At the two ends of work there are choices of no batch.
    choices = totals["host_ms_per_step"] / 1000 * totals["steps"]
    assert choices == pytest.approx(round(choices))
    assert totals["steps"] < choices < totals["steps"] + 8
    assert totals["host_ms_p99"] < 4000


def test_with_overlap_a_step_is_as_long_as_its_gpu_or_the_scheduling_of_the_next():
    preload()
    from benchmarks.replay.driver import waits_for_host

    gpu, host = [4.0, 4.0, 1.0], [2.0, 3.0, 6.0]

    assert waits_for_host(gpu, host, overlap=True) == 2 + 0 + 2  # the first waits for its own
    assert waits_for_host(gpu, host, overlap=False) == 2 + 3 + 6
