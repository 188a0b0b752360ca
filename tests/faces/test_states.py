"""States of requests, tracked and cached, beside windows that slide."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_jenga.serving import ablation, scheduling
from sglang_jenga.serving.ablation import CacheOptions
from sglang_jenga.testing.context import Settings
from tests.faces.cells import MODELS
from tests.faces.pools import Shape
from tests.faces.rig import Rig


@pytest.mark.parametrize("strategy", ["extra_buffer", "extra_buffer_lazy"])
def test_a_prompt_is_cached_though_its_next_tracking_slot_makes_windows_slide(strategy: str):
    shape = MODELS["three-way"][1]._replace(num_large=18)
    with Rig(shape, Settings(strategy=strategy, chunk=None)) as rig:
        rig.submit([0] * 26, 1)
        rig.submit([1] * 38, 8)
        rig.run()


COSTLY = Shape(full=40, state_k=1, num_large=16, context=1024)  # a state has 640 tokens' bytes
LAZY = Settings(page_size=16, strategy="extra_buffer_lazy", track_interval=16, chunk=None)


def running_of_eight(options: CacheOptions, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ablation, "from_environment", lambda: options)
    with Rig(COSTLY, LAZY) as rig:
        for text in range(8):
            rig.submit([text] * 48, 40)
        rig.turn(4)
        running = len(rig.scheduler.running_batch.reqs)
        rig.run()
        rig.check_nothing_lost()
    return running


def test_short_prompts_leave_no_state_and_as_many_more_run(monkeypatch: pytest.MonkeyPatch):
    assert COSTLY.plan(16).state_cost_tokens == 640
    everybody = running_of_eight(CacheOptions(worth_tracking=False), monkeypatch)

    assert running_of_eight(CacheOptions(), monkeypatch) > everybody


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody always waited for memory."""

    def spare(scheduler: Any, *_: Any) -> None:
        scheduler.req_to_token_pool.tracking.sparing = True

    monkeypatch.setattr(scheduling, "_spare_states", spare)


@pytest.mark.usefixtures("waited_for")
def test_a_long_prompt_leaves_one_and_so_does_a_place_where_short_ones_part():
    with Rig(COSTLY, LAZY) as rig:
        rig.ask([0] * 320, 1)
        assert rig.ask([0] * 320 + [9] * 3, 1).hit == 320
        rig.ask([1] * 48 + [2] * 8, 1)
        assert rig.ask([1] * 48 + [3] * 8, 1).hit == 0  # parts here, and leaves a state
        assert rig.ask([1] * 48 + [4] * 8, 1).hit == 48


@pytest.mark.usefixtures("waited_for")
def test_who_leaves_no_state_keeps_the_one_that_it_began_with_while_it_runs():
    with Rig(COSTLY, LAZY) as rig:
        for text in (2, 3):
            rig.ask([1] * 48 + [text] * 8, 1)  # the second leaves a state where they part
        rig.submit([1] * 48 + [4] * 8, 60)
        rig.turn(4)
        rig.pools.cache.eviction.everything()
        assert rig.ask([1] * 48 + [5] * 8, 1).hit == 48
        rig.run()
        rig.pools.cache.eviction.everything()
        assert rig.ask([1] * 48 + [6] * 8, 1).hit == 0


@pytest.mark.usefixtures("waited_for")
def test_a_short_prompt_with_a_long_answer_leaves_a_state_of_it():
    with Rig(COSTLY, LAZY) as rig:
        answer = rig.ask([0] * 48, 200).tokens
        assert rig.ask([0] * 48 + list(answer) + [9] * 3, 1).hit >= 160


def test_with_room_for_all_a_short_prompt_leaves_a_state():
    with Rig(COSTLY, LAZY) as rig:
        rig.ask([0] * 48, 1)
        assert rig.ask([0] * 48 + [9] * 3, 1).hit == 48


def test_who_waits_for_a_row_and_not_for_memory_leaves_a_state_too():
    with Rig(COSTLY._replace(num_rows=2), LAZY) as rig:
        for text in range(5):
            rig.submit([text] * 48, 3)
        rig.run()
        assert rig.ask([3] * 48 + [9] * 3, 1).hit == 48


@pytest.mark.parametrize("chunk", [None, 128, 127])
def test_a_state_is_left_where_requests_part_wherever_their_prompts_are_cut(chunk: int | None):
    """Decode steps in its chunks leave a prompt cut anywhere."""
    with Rig(COSTLY._replace(full=640), LAZY._replace(page_size=1, chunk=chunk)) as rig:
        grid = 8  # that of the kernel's chunks
        rig.ask([1] * 600 + [2] * 8, 1)
        rig.ask([1] * 600 + [3] * 8, 1)
        assert 600 - grid < rig.ask([1] * 600 + [4] * 8, 1).hit <= 600


def test_a_prompt_that_is_cut_leaves_no_state_in_place_of_one_that_many_run_on():
    pool = COSTLY._replace(full=640, num_large=11)
    with Rig(pool, LAZY._replace(page_size=1, chunk=128)) as rig:
        for text in (2, 3):
            rig.ask([1] * 600 + [text] * 8, 1)  # the second leaves a state where they part
        for text in (4, 5, 6):
            rig.submit([1] * 600 + [text] * 8, 60)
            rig.turn(2)
        assert len(rig.scheduler.running_batch.reqs) == 3

        rig.submit([7] * 900, 1)
        rig.turn(12)

        assert rig.ask([1] * 600 + [8] * 8, 1).hit == 600
        rig.run()
        rig.check_nothing_lost()
