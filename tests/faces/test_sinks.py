"""Tokens at a request's beginning that every step reads: they stay, those behind them go."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.outside import SINKS, SinkWindow
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

SHAPE = Shape(full=3, window_k=2, window=8, sliding=SinkWindow.name, num_large=80)
PROMPT = answer([0], 23)
both_caches = pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
both_pages = pytest.mark.parametrize("page_size", [1, 4])


def slide(rig: Rig) -> None:
    rig.slide(exactly=True)


def own_window_pages(rig: Rig) -> int:
    """Small pages of the sliding group that running requests have."""
    return rig.pools.allocator.core.num_used[1]


@both_caches
@both_pages
def test_the_first_tokens_are_read_after_all_behind_them_was_given_back(radix, page_size):
    with Rig(SHAPE, Settings(page_size=page_size, radix=radix)) as rig:
        rid = rig.submit(PROMPT, 40, cached=False)
        rig.turn(30)
        slide(rig)
        rig.run()
        assert rig.ended(rid).tokens == answer(PROMPT, 40, (None, None))


@both_caches
@both_pages
def test_a_request_gives_back_all_but_its_first_tokens_and_its_window(radix, page_size):
    """Though its first tokens are its own, and not the trees'."""
    with Rig(SHAPE, Settings(page_size=page_size, radix=radix)) as rig:
        rig.submit([0, 1], 60)
        rig.turn(50)
        slide(rig)
        kept = -(-SINKS // page_size) + -(-SHAPE.window // page_size) + 1
        assert own_window_pages(rig) <= kept
        rig.run()
        rig.check_nothing_lost()


@both_pages
def test_what_a_request_leaves_with_a_hole_in_it_is_a_hit(page_size):
    with Rig(SHAPE, Settings(page_size=page_size)) as rig:
        rid = rig.submit([0, 1], 60)
        rig.turn(50)
        slide(rig)
        rig.run()
        said = [0, 1, *rig.ended(rid).tokens]
        whole = (len(said) - 1) - (len(said) - 1) % page_size
        assert rig.ask([*said, 0]).hit == whole
        # But not where its window would begin in the hole.
        assert rig.ask([*said[:30], 2, 2]).hit <= SINKS + page_size
        rig.check_nothing_lost()


@both_pages
def test_a_request_that_is_retracted_with_a_hole_in_it_resumes_behind_it(page_size):
    with Rig(SHAPE, Settings(page_size=page_size)) as rig:
        rids = [rig.submit([first, 1], 60) for first in (0, 1)]
        rig.turn(40)
        slide(rig)
        rig.retract()
        rig.run()
        assert sum(rig.ended(rid).retractions for rid in rids) == 1
        rig.check_nothing_lost()


@both_pages
@pytest.mark.parametrize("length", [2, 5, 20])
def test_a_prefix_shorter_or_longer_than_the_sinks_is_gone_on_from(page_size, length):
    with Rig(SHAPE, Settings(page_size=page_size, chunk=8)) as rig:
        rig.ask(PROMPT[:length], 2)
        rid = rig.submit([*PROMPT[:length], 2, 2, 1], 50)
        rig.turn(40)
        slide(rig)
        rig.run()
        assert rig.ended(rid).reason == "length"
        rig.check_nothing_lost()


@both_caches
def test_requests_that_crowd_the_pool_are_all_answered(radix):
    with Rig(SHAPE._replace(num_large=30), Settings(radix=radix)) as rig:
        for first in range(6):
            rig.submit([(first + at) % 3 for at in range(15 + first)], 20)
        rig.run()
        rig.check_nothing_lost()


@both_caches
@pytest.mark.parametrize("window_k", [2, 8, 12])
@pytest.mark.parametrize(
    ("prompt", "cached", "page_size"),
    [(2, True, 1), (20, False, 1), (20, True, 1), (3, True, 4), (20, True, 16)],
)
def test_the_longest_request_of_an_empty_pool_is_answered(
    radix, window_k, prompt, cached, page_size
):
    shape = SHAPE._replace(full=max(1, 12 // page_size), window_k=window_k, num_large=16)
    if page_size == 16:
        shape = shape._replace(window=20, context=1024)
    settings = Settings(page_size=page_size, chunk=max(16, page_size), radix=radix)
    with Rig(shape, settings) as rig:
        longest = rig.pools.longest
        new = longest - prompt - 2
        ended = rig.ask([at % 3 for at in range(prompt)], new, cached=cached)
        assert (ended.reason, len(ended.tokens), ended.retractions) == ("length", new, 0)


def test_locks_on_the_first_tokens_are_not_looked_at_again():
    """A lock that only sinks are left of has nothing more to give up."""
    with Rig(SHAPE, Settings(slide_interval=1)) as rig:
        rig.ask(PROMPT, 2)
        rig.submit([*PROMPT, 2, 2, 1], 60)
        rig.turn(40)
        windows = rig.pools.cache.windows
        assert windows.num_due
        rig.slide()
        assert not windows.num_due
        rig.run()
