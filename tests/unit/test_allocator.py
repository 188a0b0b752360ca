"""Null pages, batches that are served whole or not at all, and small pages that change hands."""

import pytest

from sglang_jenga.pages.layout import EMPTY
from tests.models.small_pools import (
    BOTH_ORDERS,
    alloc_one,
    ids,
    larges_of,
    pool,
    random_pool,
    snapshot,
)


@BOTH_ORDERS
@pytest.mark.parametrize("packings", [(2, 3), (1, 1), (1,), (5, 1), (3, 2, 1), (26, 5)])
def test_small_id_zero_is_never_handed_out(packings, order):
    for group_id in range(len(packings)):
        allocator = pool(packings, 3, order)
        got = alloc_one(allocator, group_id, allocator.obtainable(group_id))
        assert 0 not in got
        assert allocator.obtainable(group_id) == 0


def test_the_null_pages_of_all_groups_overlap_only_pages_never_handed_out():
    allocator = pool((2, 3), 2)
    assert alloc_one(allocator, 1, 4) == [3, 4, 5, 2]  # 0 and 1 lie under group 0's null page


def test_the_rest_of_large_page_zero_serves_the_group_with_the_smallest_page():
    allocator = pool((2, 3), 1)
    assert [allocator.obtainable(0), allocator.obtainable(1)] == [0, 1]
    assert alloc_one(allocator, 1, 1) == [2]


# ---- all or nothing -------------------------------------------------------------------------


@BOTH_ORDERS
def test_a_batch_that_does_not_fit_changes_nothing(order):
    allocator = pool((2, 3), 4, order)
    alloc_one(allocator, 0, 1)
    before = snapshot(allocator)
    assert allocator.alloc(["a", "b"], [[1, 1], [5, 2]]) is None
    assert snapshot(allocator) == before


@BOTH_ORDERS
def test_the_last_group_of_a_batch_can_refuse_what_the_first_ones_could_have(order):
    allocator = pool((1, 1, 1), 3, order)
    assert allocator.alloc(["a"], [[1], [1], [1]]) is None
    assert allocator.large.num_empty == 2
    assert allocator.alloc(["a"], [[1], [0], [1]]) is not None


@BOTH_ORDERS
@pytest.mark.parametrize("first", [0, 1])
def test_a_group_leaves_later_groups_of_the_batch_the_large_pages_they_need(first, order):
    # Group `first` could take both empty large pages for its two requests; one is not its own.
    allocator = pool((2, 2), 3, order)
    larger, smaller = [1, 1], [1, 0]
    need = [larger, smaller] if first == 0 else [smaller, larger]
    got = allocator.alloc(["a", "b"], need)
    assert [part.size for part in got] == [sum(counts) for counts in need]
    allocator.check([])


@BOTH_ORDERS
def test_a_whole_large_page_is_not_taken_when_loose_pages_must_serve(order):
    # Group 1 needs the one empty large page; group 0 has two small pages in each of two others.
    allocator = pool((4, 1), 4, order)
    alloc_one(allocator, 0, 8, "x")
    allocator.free(0, ids(4, 5, 8, 9))
    got = allocator.alloc(["a"], [[4], [1]])
    assert sorted(got[0].tolist()) == [4, 5, 8, 9]


def test_an_empty_batch_is_served_with_empty_arrays():
    allocator = pool()
    assert [part.tolist() for part in allocator.alloc([], [[], []])] == [[], []]
    assert [part.tolist() for part in allocator.alloc(["a"], [[0], [0]])] == [[], []]


def test_ids_come_back_request_by_request():
    allocator = pool((2, 3), 6)
    got = allocator.alloc(["a", "b"], [[3, 2], [0, 0]])[0].tolist()
    assert larges_of(allocator, 0, got[:2]) != larges_of(allocator, 0, got[3:])
    assert got[0] // 2 == got[1] // 2 and got[3] // 2 == got[4] // 2


# ---- changing hands -------------------------------------------------------------------------


@pytest.mark.parametrize("last_step", ["free", "evict"])
def test_a_large_page_that_empties_serves_another_group_at_once(last_step):
    allocator = pool((2, 3), 2)
    got = ids(*alloc_one(allocator, 0, 2))
    assert not allocator.fits_now([0, 2])
    if last_step == "evict":
        extent = allocator.adopt(0, got)
        assert not allocator.fits_now([0, 2])
        allocator.evict(extent)
    else:
        allocator.free(0, got)
    assert alloc_one(allocator, 1, 3) == [3, 4, 5]


def test_a_large_page_with_one_small_page_left_stays_bound():
    allocator = pool((2, 3), 2)
    got = alloc_one(allocator, 0, 2)
    allocator.free(0, ids(got[0]))
    assert not allocator.fits_now([0, 2])
    assert allocator.fits_now([1, 1])


@pytest.mark.parametrize("call", ["free", "adopt"])
@pytest.mark.parametrize("state", ["held", "empty", "null"])
def test_a_wrong_transition_asserts_and_changes_nothing(state, call):
    allocator = pool((2, 3), 3)
    small_id = alloc_one(allocator, 1, 1)[0]
    if state == "held":
        allocator.adopt(1, ids(small_id))
    else:
        small_id = {"empty": 4, "null": 0}[state]
    before = snapshot(allocator)
    with pytest.raises(AssertionError):
        getattr(allocator, call)(1, ids(small_id))
    assert snapshot(allocator) == before


@pytest.mark.parametrize("packings", [(1, 1), (2, 3), (5, 1)])
def test_a_page_listed_twice_in_one_call_asserts(packings):
    for group_id, k in enumerate(packings):
        allocator = pool(packings, 4)
        got = alloc_one(allocator, group_id, 2 * k)
        with pytest.raises(AssertionError):
            allocator.free(group_id, ids(got[0], got[1], got[0]))


def test_clear_makes_the_pool_as_new():
    allocator, _ = random_pool(3, (5, 3), 4, "paper")
    allocator.clear()
    assert snapshot(allocator) == snapshot(pool((5, 3), 4))
    assert alloc_one(allocator, 0, 5, 0) == alloc_one(pool((5, 3), 4, "paper"), 0, 5, 0)
    assert (allocator.large.holder[1] == EMPTY).all()
