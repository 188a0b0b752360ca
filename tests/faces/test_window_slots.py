"""Which window slot stands beside a full slot is always what the kernels' map says."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces import recount
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

PROMPT = [1, 0, 2, 0, 0, 1, 2, 1]
SAID = answer(PROMPT, 40, (None, None))
HOLE = len(PROMPT) + 8
"""A length inside the hole, which begins within the answer's first tokens."""
both_pages = pytest.mark.parametrize("page_size", [1, 4])


def rig_with_a_hole(page_size: int) -> Rig:
    """A cached answer whose window pages are gone in its middle, while those further on are there:
    requests that went on from there have refreshed them before the oldest were evicted."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    shape = Shape(full=3, window_k=2, window=6, num_large=240 // page_size, num_rows=4)
    rig = Rig(shape, Settings(page_size=page_size))
    keep_only_ends(rig)
    rig.ask(PROMPT, 40)
    rig.ask([*PROMPT, *SAID[:24], 0, 1, 0], 2)
    rig.ask([*PROMPT, *SAID[:32], 1, 1, 0], 2)
    rig.pools.cache.evict(EvictParams(num_tokens=0, swa_num_tokens=24))
    assert go_on_from(rig, 36).hit > 0
    return rig


def keep_only_ends(rig: Rig) -> None:
    """Answers here are shorter than what is kept before each end, and would be kept whole."""
    trees = rig.pools.cache.trees
    trees._ageing = trees._ageing._replace(grace_tokens=0)
    trees.clear()


def go_on_from(rig: Rig, said: int):
    """Ask what goes on from the prompt and so many tokens of its answer."""
    return rig.ask([*PROMPT, *SAID[:said], 2, 2, 0], 2)


@both_pages
def test_window_pages_that_fill_a_hole_when_a_request_ends_are_read_by_the_next(page_size: int):
    with rig_with_a_hole(page_size) as rig:
        rig.ask(PROMPT, 40)
        assert go_on_from(rig, 12).hit > HOLE


@both_pages
def test_window_pages_that_fill_a_hole_when_a_request_is_retracted_are_read_by_the_next(
    page_size: int,
):
    with rig_with_a_hole(page_size) as rig:
        rid = decode_across_the_hole(rig)
        rig.retract()
        rig.turn()
        rig.abort(rid)
        rig.run()
        assert go_on_from(rig, 12).hit > HOLE


@both_pages
def test_a_pause_fills_no_hole_since_new_weights_may_come(page_size: int):
    with rig_with_a_hole(page_size) as rig:
        rid = decode_across_the_hole(rig)
        rig.pause("retract")
        rig.turn()
        rig.abort(rid)
        rig.resume()
        rig.run()
        assert go_on_from(rig, 12).hit <= HOLE


def decode_across_the_hole(rig: Rig) -> str:
    """The id of a request that is past the hole, beside one that stays."""
    rig.submit([0], 60)
    rig.turn(2)
    rid = rig.submit(PROMPT, 40)
    rig.turn(36)
    return rid


@both_pages
def test_a_slot_whose_window_page_went_back_leads_nowhere(page_size: int):
    with rig_with_a_hole(page_size) as rig:
        recount.everything(rig.pools, rig.scheduler)
