"""What the allocator says of its capacity, against what it then does."""

import itertools

import pytest

from tests.models.small_pools import BOTH_ORDERS, pool, random_pool

CAPACITY = pytest.mark.parametrize(
    ("packings", "num_large"), [((2, 3), 4), ((1, 1), 4), ((3, 1), 3), ((5, 2), 3), ((3, 2, 1), 4)]
)


def demands(packings, num_large):
    return itertools.product(*(range(num_large * k + 2) for k in packings))


def succeeds(allocator, need):
    """Whether alloc serves the demand; undone at once."""
    got = allocator.alloc(["probe"], [[count] for count in need])
    for group_id, part in enumerate(got or []):
        allocator.free(group_id, part)
    return got is not None


@BOTH_ORDERS
@CAPACITY
def test_fits_now_says_what_alloc_will_do(packings, num_large, order):
    for seed in range(4):
        allocator, cached = random_pool(seed, packings, num_large, order)
        for need in demands(packings, num_large):
            assert allocator.fits_now(need) == succeeds(allocator, need), (seed, need)
        allocator.check(cached)


@BOTH_ORDERS
@CAPACITY
def test_fits_after_evicting_is_fits_now_once_everything_cached_is_evicted(
    packings, num_large, order
):
    for seed in range(12):
        allocator, cached = random_pool(seed, packings, num_large, order)
        wanted = list(demands(packings, num_large))
        predicted = [allocator.fits_after_evicting(need) for need in wanted]
        for extent in cached:
            allocator.evict(extent)
        assert predicted == [allocator.fits_now(need) for need in wanted], seed


@CAPACITY
def test_fits_empty_pool_is_fits_now_of_a_fresh_pool(packings, num_large):
    allocator, _ = random_pool(1, packings, num_large, "packed")
    fresh = pool(packings, num_large)
    for need in demands(packings, num_large):
        assert allocator.fits_empty_pool(need) == fresh.fits_now(need), need


@CAPACITY
def test_obtainable_is_the_most_one_group_alone_can_get(packings, num_large):
    for seed in range(6):
        allocator, _ = random_pool(seed, packings, num_large, "packed")
        for group_id in range(len(packings)):
            need = [0] * len(packings)
            need[group_id] = allocator.obtainable(group_id)
            assert allocator.fits_now(need)
            need[group_id] += 1
            assert not allocator.fits_now(need)
