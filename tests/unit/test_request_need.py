"""What one request takes of the pool, against a request that is served page by page."""

import itertools

import numpy as np
import pytest

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan

LARGE_BYTES = 60


def plan_of(smalls, num_large, tokens_per_page=1, window=None, states=False):
    """A full group, a window group if there is a window, a state group if there are states;
    ``smalls`` are their small pages per large page."""
    groups: list[tuple[LayerKind, int]] = [(Full(), tokens_per_page)]
    groups += [(Window(window), tokens_per_page)] * (window is not None)
    groups += [(State(), 1)] * states
    plans = []
    for (kind, per_page), k in zip(groups, smalls, strict=True):
        entry = LARGE_BYTES // k // per_page
        plans.append(GroupPlan(LayerGroup(kind, (0,), entry, per_page), entry, k))
    return PoolPlan(tuple(plans), LARGE_BYTES, num_large)


def served_alone(plan, tokens, states, chunk):
    """Whether a request alone on an allocator comes to its end: its prompt, all but one token of
    it, in chunks, and behind every step its window is given back to the last page."""
    allocator = Allocator(plan)
    per_page = plan.groups[0].group.tokens_per_page
    windows = [item.group.window for item in plan.groups if item.group.kind.name != "state"]
    held = [np.zeros(0, dtype=np.int64) for _ in windows]
    if len(plan.groups) > len(windows):
        need = [[0]] * len(windows) + [[states]]
        if allocator.alloc(["r"], need) is None:
            return False
    at = 0
    while at < tokens:
        end = min(at + chunk, tokens - 1) if at < tokens - 1 else tokens
        pages = -(-end // per_page) - -(-at // per_page)
        need = [[pages] for _ in windows] + [[0]] * (len(plan.groups) - len(windows))
        got = allocator.alloc(["r"], need)
        if got is None:
            return False
        at = end
        for group_id, window in enumerate(windows):
            held[group_id] = np.append(held[group_id], got[group_id])
            if window is not None:
                dead = max(0, at - window + 1) // per_page
                gone = held[group_id].size - (-(-at // per_page) - dead)
                allocator.free(group_id, held[group_id][:gone].copy())
                held[group_id] = held[group_id][gone:]
    return True


GEOMETRIES = [
    {"smalls": (1,)},
    {"smalls": (6,), "tokens_per_page": 2},
    {"smalls": (6, 2), "window": 5},
    {"smalls": (6, 1), "window": 8},
    {"smalls": (5, 5), "window": 9},
    {"smalls": (3, 2), "window": 5, "tokens_per_page": 2},
    {"smalls": (10, 5), "window": 12, "tokens_per_page": 2},
    {"smalls": (15, 1), "states": True},
    {"smalls": (12, 3), "states": True},
    {"smalls": (12, 4, 2), "window": 6, "states": True},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_request_that_fits_is_served_to_its_end(geometry):
    for num_large, states in itertools.product((3, 4, 7, 12), (1, 3)):
        plan = plan_of(num_large=num_large, **geometry)
        per_page = geometry.get("tokens_per_page", 1)
        need = RequestNeed(plan, states)
        for tokens in {1, need.longest(500), need.longest(500) // 2}:
            if tokens and need.fits(tokens):
                assert served_alone(plan, tokens, states, per_page), (num_large, states, tokens)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_request_that_does_not_fit_would_fail_in_a_slightly_smaller_pool(geometry):
    # Windows may lie half empty in their first and last large page, and every state in one alone.
    for num_large, states in itertools.product((8, 12), (1, 3)):
        spare = 2 * ("window" in geometry) + (states - 1) * ("states" in geometry)
        per_page = geometry.get("tokens_per_page", 1)
        tokens = RequestNeed(plan_of(num_large=num_large, **geometry), states).longest(500) + 1
        if tokens <= 500:
            smaller = plan_of(num_large=num_large - spare, **geometry)
            assert not served_alone(smaller, tokens, states, per_page), (num_large, states, tokens)


def test_a_prompt_that_is_not_cut_needs_window_pages_for_all_of_it():
    need = RequestNeed(plan_of((6, 2), 12, window=5), 1)
    assert need.pages(20) == [20, 5 + 2]
    assert need.pages(20, at_once=18) == [20, 18 + 2]
    assert need.longest(500, at_once=18) < need.longest(500)


def test_the_longest_request_fits_and_one_token_more_does_not():
    need = RequestNeed(plan_of((6, 2), 12, window=5), 1)
    longest = need.longest(500)
    assert need.fits(longest) and not need.fits(longest + 1)
    assert need.longest(longest - 3) == longest - 3
    assert RequestNeed(plan_of((15, 1), 2, states=True), 3).longest(500) == 0
