"""Tiny pools for the tests of the allocator by example.

Most have packings (2, 3): a large page is 2 small pages of group 0 or 3 of group 1, and the null
page takes the first 2 small pages of group 1 in large page 0 (6 bytes: ``[n n .]``).
"""

import numpy as np
import pytest

from sglang_jenga.pages.allocator import Allocator
from tests.conftest import plan_of

BOTH_ORDERS = pytest.mark.parametrize("order", ["packed", "paper"])


def pool(packings=(2, 3), num_large=4, order="packed"):
    return Allocator(plan_of(packings, num_large), order=order)


def ids(*small_ids):
    return np.array(small_ids, dtype=np.int64)


def alloc_one(allocator, group_id, count, request="r"):
    """Small ids of one group for one request, None if there are not so many."""
    need = [[0] for _ in allocator.plan.groups]
    need[group_id] = [count]
    got = allocator.alloc([request], need)
    return None if got is None else got[group_id].tolist()


def snapshot(allocator):
    """All that a call which fails must not change."""
    large = allocator.large
    counts = large.pages[:, :4].tolist()
    counters = (
        large.num_empty,
        *large.reclaimable,
        *large.spare_reclaimable,
        *large.slack,
        *large.spare_slack,
    )
    holders = [holder.tolist() for holder in large.holder]
    return holders, counts, counters, large.free, allocator.num_used, allocator.num_cached


def larges_of(allocator, group_id, small_ids):
    k = allocator.plan.groups[group_id].smalls_per_large
    return {small_id // k for small_id in small_ids}


def random_pool(seed, packings, num_large, order):
    """A pool with some small pages used and some cached, and the extents of these."""
    rng = np.random.default_rng(seed)
    allocator = pool(packings, num_large, order)
    held = [np.zeros(0, dtype=np.int64) for _ in packings]
    for request in range(6):
        need = [[int(rng.integers(0, k + 2))] for k in packings]
        got = allocator.alloc([request], need)
        for group_id, part in enumerate(got or []):
            held[group_id] = np.append(held[group_id], part)
    cached = []
    for group_id, part in enumerate(held):
        part = rng.permutation(part)
        first, second = sorted(rng.integers(0, part.size + 1, size=2).tolist())
        if first:
            cached.append(allocator.adopt(group_id, part[:first]))
        allocator.free(group_id, part[first:second])
    return allocator, cached
