"""What a window still has to unlock is remembered once per request, whatever becomes of it."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.cells import MODELS
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

FULL_AND_WINDOW = Shape(full=3, window_k=2, num_large=60, num_rows=4, context=4096)


def turns_with_few_due(rig: Rig, turns: int) -> None:
    for _ in range(turns):
        rig.turn()
        rig.slide()
        assert rig.pools.cache.windows.num_due < 100  # it must not double in every turn


@pytest.mark.parametrize(
    ("page_size", "window", "interval"),
    [
        (64, 128, 128),
        (16, 128, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(64, 512, 128), (128, 1024, 128), (16, 1024, 128)]
        ),
    ],
)
def test_pages_longer_than_what_a_window_leaves_between_two_looks(page_size, window, interval):
    settings = Settings(page_size=page_size, chunk=2 * page_size, slide_interval=interval)
    with Rig(FULL_AND_WINDOW._replace(window=window), settings) as rig:
        rid = rig.submit(answer([0], window + 2 * page_size + 17), 170)
        turns_with_few_due(rig, 180)
        rig.run()
        assert rig.ended(rid).reason == "length"
        rig.check_nothing_lost()


@pytest.mark.parametrize(
    ("shape", "settings", "cached"),
    [
        (FULL_AND_WINDOW, Settings(), False),
        (MODELS["three-way"][1], Settings(strategy="extra_buffer"), True),
        (MODELS["three-way"][1], Settings(strategy="extra_buffer_lazy"), True),
    ],
)
def test_a_request_that_has_locked_nothing_and_slides_when_memory_is_short(shape, settings, cached):
    with Rig(shape, settings) as rig:
        rig.submit(answer([0], 5), 60, cached=cached)
        rig.turn(20)
        turns_with_few_due(rig, 30)
        rig.run()
        rig.check_nothing_lost()


def test_prompts_that_never_decode_are_not_remembered():
    with Rig(MODELS["windows"][1], Settings(chunk=8)) as rig:
        for number in range(40):
            rig.ask(answer([number % 3, number // 3 % 3, number // 9 % 3], 40), 1)
        assert rig.pools.cache.windows.num_due < 100


def test_a_prefix_stays_locked_until_somebody_asks_for_memory():
    prompt = answer([0], 40)
    with Rig(FULL_AND_WINDOW._replace(window=8, num_large=400), Settings()) as rig:
        allocator = rig.pools.allocator
        cached = allocator.core.num_cached
        window = allocator.groups.mapped[0]
        rig.ask(prompt, 1)
        rig.submit(prompt, 200)
        rig.turn()
        locked = cached[window]
        rig.turn(40)
        assert cached[window] == locked
        rig.slide()
        assert cached[window] == locked + 8 - 1  # the next token would have seen as many
        rig.run()
        rig.check_nothing_lost()


@pytest.mark.parametrize("new", [0, 2, 30])
def test_a_prompt_that_leaves_nothing_to_be_cached_does_not_keep_what_it_hit(new: int):
    pool = FULL_AND_WINDOW._replace(window=32, num_large=200)
    with Rig(pool, Settings(page_size=16)) as rig:
        rig.ask(answer([0], 64), 1)
        rig.submit(answer([0], 64) + [1] * new, 150)
        rig.turn(100)
        (req,) = rig.scheduler.running_batch.reqs
        window = rig.pools.allocator.groups.mapped[0]
        assert req.lock.ranges[window]
        rig.slide()
        assert not req.lock.ranges[window]
        rig.run()
        rig.check_nothing_lost()


def test_what_windows_leave_behind_can_be_had_in_every_round_and_once_in_each():
    with Rig(FULL_AND_WINDOW._replace(window=8, num_large=400), Settings()) as rig:
        rig.submit(answer([0], 5), 200)
        allocator = rig.pools.allocator
        window = allocator.groups.mapped[0]

        def given_back() -> int:
            used = allocator.core.num_used[window]
            rig.slide()
            return used - allocator.core.num_used[window]

        rig.turn(40)
        for _ in range(3):
            assert given_back() > 24
            assert given_back() == 0
            rig.turn(40)
        rig.run()
        rig.check_nothing_lost()
