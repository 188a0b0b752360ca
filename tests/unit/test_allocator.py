"""The two-level allocator by example: tiny pools, one behaviour each.

Most pools have packings (2, 3): a large page is 2 small pages of group 0 or 3 of group 1, and the
null page takes the first 2 small pages of group 1 in large page 0 (6 bytes: ``[n n .]``).
"""

import itertools

import numpy as np
import pytest

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.layout import EMPTY
from tests.conftest import plan_of

BOTH_ORDERS = pytest.mark.parametrize("order", ["packed", "paper"])


def pool(packings=(2, 3), num_large=4, order="packed"):
    return Allocator(plan_of(packings, num_large), order=order)


def ids(*small_ids):
    return np.array(small_ids, dtype=np.int64)


def alloc_one(allocator, group_id, count, request="r"):
    need = [[0] for _ in allocator.plan.groups]
    need[group_id] = [count]
    got = allocator.alloc([request], need)
    return None if got is None else got[group_id].tolist()


def snapshot(allocator):
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


# ---- null pages -----------------------------------------------------------------------------


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


# ---- capacity -------------------------------------------------------------------------------


def random_pool(seed, packings, num_large, order):
    """A pool with some small pages used and some cached."""
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


# ---- order of allocation --------------------------------------------------------------------


def test_packed_fills_the_fullest_large_page_first():
    allocator = pool((5, 1), 4)
    alloc_one(allocator, 0, 15)
    allocator.free(0, ids(5, 6, 7, 8))  # large page 1: one used
    allocator.free(0, ids(10, 11, 12))  # large page 2: two used
    allocator.free(0, ids(15, 16, 17, 18))  # large page 3: one used
    assert alloc_one(allocator, 0, 3) == [10, 11, 12]
    assert larges_of(allocator, 0, alloc_one(allocator, 0, 1)) in ({1}, {3})


def test_packed_gives_whole_large_pages_to_one_request_alone():
    allocator = pool((2, 3), 6)
    alloc_one(allocator, 0, 1, "other")
    got = alloc_one(allocator, 0, 5, "r")
    others = larges_of(allocator, 0, got[:4])
    assert len(others) == 2
    assert got[4] // 2 not in others
    assert got[4] // 2 == 1  # the tail shares the large page that "other" began


def test_packed_serves_the_tails_of_a_batch_from_one_large_page():
    allocator = pool((5, 1), 4)
    got = allocator.alloc(["a", "b", "c"], [[1, 2, 1], [0, 0, 0]])[0].tolist()
    assert len(larges_of(allocator, 0, got)) == 1
    assert allocator.large.num_empty == 2


def test_paper_step_1_fills_the_large_page_the_request_already_has():
    allocator = pool((4, 1), 5, "paper")
    first = alloc_one(allocator, 0, 1, "a")
    alloc_one(allocator, 0, 1, "b")
    second = alloc_one(allocator, 0, 2, "a")
    assert larges_of(allocator, 0, first) == larges_of(allocator, 0, second)


def test_paper_step_2_takes_an_empty_large_page_before_somebody_elses():
    allocator = pool((4, 1), 5, "paper")
    first = alloc_one(allocator, 0, 1, "a")
    second = alloc_one(allocator, 0, 1, "b")
    assert larges_of(allocator, 0, first).isdisjoint(larges_of(allocator, 0, second))
    assert allocator.large.num_empty == 2


def test_paper_step_4_shares_somebody_elses_large_page_when_none_is_empty():
    allocator = pool((4, 1), 3, "paper")
    alloc_one(allocator, 0, 1, "a")
    alloc_one(allocator, 0, 1, "b")
    third = alloc_one(allocator, 0, 1, "c")
    assert allocator.large.num_empty == 0
    assert len(third) == 1


def test_paper_forgets_the_large_page_of_a_request_that_ended():
    allocator = pool((4, 1), 5, "paper")
    first = alloc_one(allocator, 0, 1, "a")
    allocator.forget("a")
    second = alloc_one(allocator, 0, 1, "a")
    assert larges_of(allocator, 0, first).isdisjoint(larges_of(allocator, 0, second))


def test_paper_does_not_return_to_a_large_page_that_changed_hands():
    allocator = pool((2, 3), 2, "paper")
    first = alloc_one(allocator, 0, 2, "a")
    allocator.free(0, ids(*first))
    assert alloc_one(allocator, 1, 3, "b") == [3, 4, 5]
    assert alloc_one(allocator, 0, 1, "a") is None
    allocator.check([])


@BOTH_ORDERS
def test_the_same_calls_hand_out_the_same_ids(order):
    def history(allocator):
        rng = np.random.default_rng(7)
        held, log = [], []
        for request in range(200):
            counts = rng.integers(0, 9, size=2).tolist()
            got = allocator.alloc([request % 9], [[counts[0]], [counts[1]]])
            log.append(None if got is None else [part.tolist() for part in got])
            if got is not None:
                held.append(got)
            if got is None or rng.random() < 0.4:
                for group_id, part in enumerate(held.pop(int(rng.integers(len(held))))):
                    allocator.free(group_id, part)
        return log

    assert history(pool((5, 3), 9, order)) == history(pool((5, 3), 9, order))


def test_an_unknown_order_is_refused_with_its_name():
    with pytest.raises(ValueError, match="got 'best'"):
        pool(order="best")


# ---- transitions ----------------------------------------------------------------------------


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
