"""The host benchmark's cells with a queue: who waits, who asks admission, what is kept."""

from __future__ import annotations

import functools
import threading

import pytest

from benchmarks.host import full_queue
from benchmarks.host.full_queue import MODELS, QueueCell, play_cell, search_pool
from benchmarks.replay import call_times
from benchmarks.replay.steady import Crowd
from benchmarks.replay.turns import PASSES, Turn, take_turns
from sglang_jenga.plan.planner import MAX_LARGE_PAGE_BYTES, plan_pool
from sglang_jenga.testing.engines import preload

SMALL = Crowd(
    batch=20, waiting=6, tenants=4, system=1100, question=(100, 300), answer=(40, 90), seed=1
)


@pytest.mark.parametrize(
    ("model", "window", "smalls"),
    [("gemma-3-27b", 1024, [26, 5]), ("gpt-oss-20b", 128, [1, 1]), ("llama-3.1-8b", None, [1])],
)
def test_a_model_has_its_own_window_and_cut_of_large_pages(model, window, smalls):
    geometry = MODELS[model]
    bound = MAX_LARGE_PAGE_BYTES // geometry.scale
    plan = plan_pool(geometry.replayed, 1 << 30, max_large_page_bytes=bound)

    assert geometry.replayed[-1].window == window
    assert [item.smalls_per_large for item in plan.groups] == smalls


def test_requests_outgrow_the_longest_window_by_far():
    longest = max(group.window or 0 for item in MODELS.values() for group in item.replayed)

    assert Crowd(64).tokens > 2 * longest


@pytest.mark.parametrize("guess", [1, 500, 640, 10_000])
def test_a_pool_is_found_whose_batch_is_close_to_the_one_asked_for(guess):
    def fits(pool: int) -> int:
        running = (pool - 50) // 9  # something is shared
        return running if 0 < running < 200 else 0 if running > 0 else 1

    assert 61 <= fits(search_pool(fits, 64, guess)) <= 67


def test_no_pool_is_found_where_memory_does_not_decide():
    with pytest.raises(ValueError, match="no pool runs about 64 requests"):
        search_pool(lambda pool: 40, 64, 1000)


class Passing:
    """An engine that takes so many passes, in a thread."""

    def __init__(self, name: str, passes: int, turn: Turn, log: list[str]) -> None:
        def play() -> None:
            for _ in range(passes):
                turn.take()
                log.append(name)

        self.name = name
        self.thread = threading.Thread(target=play)
        self.thread.start()

    def ended(self) -> bool:
        return not self.thread.is_alive()

    def outcome(self) -> str:
        return self.name


def test_engines_take_turns_until_the_last_has_ended():
    turns, log = [Turn(), Turn()], []
    engines = [
        Passing(name, passes, turn, log)
        for name, passes, turn in zip("ab", (3 * PASSES, PASSES + 1), turns, strict=True)
    ]

    assert take_turns(engines, turns, 30) == ["a", "b"]
    assert "".join(log) == "a" * PASSES + "b" * PASSES + "a" * PASSES + "b" + "a" * PASSES


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A small cell on two sides. The clock of calls stands still, but for SGLang's ``add_one_req``:
    that takes a second."""
    preload()
    from sglang.srt.managers.schedule_policy import PrefillAdder

    with pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        add = PrefillAdder.add_one_req

        @functools.wraps(add)
        def slow(*args, **kwargs):
            now[0] += 1.0
            return add(*args, **kwargs)

        patch.setattr(PrefillAdder, "add_one_req", slow)
        patch.setattr(call_times, "thread_time", lambda: now[0])
        patch.setattr(full_queue, "SIDES", ("stock", "jenga"))
        yield play_cell(QueueCell("gemma-3-27b", SMALL), steps=24)


@pytest.mark.slow
def test_about_as_many_requests_run_on_every_side_as_were_asked_for(played):
    for side in played.values():
        running = side.states["queue"].running
        assert sum(running) / len(running) == pytest.approx(SMALL.batch, rel=0.25)
        for state in ("spare", "full"):
            assert max(side.states[state].running) <= SMALL.not_waiting


@pytest.mark.slow
def test_somebody_waits_in_every_step_with_a_queue_and_nobody_in_the_others(played):
    for side in played.values():
        assert min(side.states["queue"].waiting) > 0
        for state in ("spare", "full"):
            assert set(side.states[state].waiting) == {0}


@pytest.mark.slow
def test_a_step_with_a_queue_asks_sglangs_admission_once_at_most_and_no_other_asks(played):
    for side in played.values():
        assert max(side.states["queue"].seconds["round"]) == 1.0
        for state in ("spare", "full"):
            assert set(side.states[state].seconds["round"]) == {0.0}


@pytest.mark.slow
def test_every_call_is_kept_per_step_or_per_request(played):
    for side in played.values():
        for state in ("full", "queue"):
            seen = side.states[state]
            assert seen.steps >= 24
            for call in ("round", "check", "prepare", "step", "thread"):
                assert len(seen.seconds[call]) == seen.steps
            for call in ("admit", "insert", "release"):
                assert seen.seconds[call]
            assert 0 < sum(seen.seconds["thread"]) < seen.thread_seconds
