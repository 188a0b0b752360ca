"""What the prefix cache does with small pages: pin, shield, split and evict extents, by turns."""

import numpy as np
import pytest

from tests.models.small_pools import alloc_one, ids, pool, snapshot


def test_cached_pages_are_kept_until_evicted():
    allocator = pool((2, 3), 2)
    got = alloc_one(allocator, 0, 2)
    extent = allocator.adopt(0, ids(*got))
    assert alloc_one(allocator, 0, 1) is None
    assert allocator.fits_after_evicting([2, 0])
    allocator.evict(extent)
    assert sorted(alloc_one(allocator, 0, 2)) == got


def test_a_pinned_page_is_out_of_reach_of_eviction():
    allocator = pool((2, 3), 2)
    first, second = allocator.split(allocator.adopt(0, ids(*alloc_one(allocator, 0, 2))), 1)
    allocator.pin(first)
    assert not allocator.fits_after_evicting([0, 2])
    assert allocator.fits_after_evicting([1, 0])
    assert not allocator.fits_after_evicting([2, 0])
    with pytest.raises(AssertionError, match="a running request needs"):
        allocator.evict(first)
    allocator.check([first, second])


@pytest.mark.parametrize(("first", "second"), [("pin", "pin"), ("pin", "evict"), (None, "unpin")])
def test_an_extent_in_the_wrong_state_asserts_and_changes_nothing(first, second):
    allocator = pool((2, 3), 3)
    extent = allocator.adopt(1, ids(*alloc_one(allocator, 1, 2)))
    if first:
        getattr(allocator, first)(extent)
    before = snapshot(allocator)
    with pytest.raises(AssertionError):
        getattr(allocator, second)(extent)
    assert snapshot(allocator) == before


def test_a_shielded_extent_is_evictable_but_not_spare():
    allocator = pool((2, 3), 3)
    extent = allocator.adopt(0, ids(*alloc_one(allocator, 0, 2)))
    allocator.shield(extent, True)
    assert allocator.fits_after_evicting([4, 0])
    assert not allocator.fits_after_evicting([4, 0], beside_shielded=True)
    assert allocator.fits_after_evicting([2, 0], beside_shielded=True)
    allocator.check([extent])
    allocator.evict(extent)
    assert allocator.fits_after_evicting([4, 0], beside_shielded=True)


def test_halves_of_an_extent_are_what_the_whole_was():
    allocator = pool((2, 3), 3)
    extent = allocator.adopt(1, ids(*alloc_one(allocator, 1, 5)))
    allocator.shield(extent, True)
    halves = allocator.split(extent, 2)
    assert [half.ids.tolist() for half in halves] == [[3, 4], [5, 2, 6]]
    assert all(half.shielded for half in halves)
    allocator.pin(halves[0])
    allocator.check(halves)


def test_a_large_page_has_its_turn_when_the_newest_of_its_small_pages_has():
    allocator = pool((4, 1), 4)
    extents = [allocator.adopt(0, ids(*alloc_one(allocator, 0, n))) for n in (3, 3, 2)]
    assert [extent.ids.tolist() for extent in extents] == [[4, 5, 6], [7, 8, 9], [10, 11]]
    times = np.array([0, 30, 20, 10])
    assert [allocator.turn(extent, times) for extent in extents] == [30, 20, 20]
    assert allocator.due(extents[1], times, 20).tolist() == [2]
    assert allocator.sharing(extents[1], ids(2)) == [extents[2]]
    assert allocator.first_in(extents[1], ids(2)) == 1
    allocator.pin(extents[2])
    assert [allocator.turn(extent, times) for extent in extents] == [30, 30, None]
    allocator.take_woken(times)
    allocator.unpin(extents[2])
    assert allocator.take_woken(times) == [extents[1]]


def test_an_evicted_part_may_bring_the_turn_of_the_rest_forward():
    allocator = pool((4, 1), 4)
    old, young = (allocator.adopt(0, ids(*alloc_one(allocator, 0, 2))) for _ in range(2))
    times = np.array([0, 10, 20])
    assert allocator.turn(old, times) == 20
    allocator.take_woken(times)
    allocator.evict(young)
    assert allocator.take_woken(times) == [old]
    assert allocator.turn(old, times) == 10
