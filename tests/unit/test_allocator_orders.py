"""Which small pages each order of allocation hands out."""

import numpy as np
import pytest

from sglang_jenga.pages.allocator import Chunks
from tests.models.small_pools import BOTH_ORDERS, alloc_one, ids, larges_of, pool


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


def chunk(allocator, count, last, coming):
    """Small ids of one chunk of a prompt, of which ``coming`` small pages are to come after it."""
    chunks = Chunks(0, np.array([last]), np.array([coming]))
    (got, _) = allocator.alloc(["r"], [[count], [0]], chunks)
    return got.tolist()


def test_packed_lays_a_prompt_in_chunks_as_one_that_comes_at_once():
    at_once, in_chunks = pool((6, 1), 6), pool((6, 1), 6)
    for allocator in (at_once, in_chunks):
        alloc_one(allocator, 0, 3, "other")
    whole = alloc_one(at_once, 0, 14, "r")

    got, last = [], -1
    for count, coming in ((4, 10), (4, 6), (4, 2), (2, 0)):
        got += chunk(in_chunks, count, last, coming)
        last = got[-1]

    assert got == whole
    assert in_chunks.large.num_empty == at_once.large.num_empty


def test_packed_binds_no_large_page_that_the_rest_of_a_prompt_will_not_fill():
    allocator = pool((6, 1), 6)
    (other,) = alloc_one(allocator, 0, 1, "other")
    assert larges_of(allocator, 0, chunk(allocator, 2, -1, 3)) == {other // 6}
    assert larges_of(allocator, 0, chunk(allocator, 2, -1, 4)) != {other // 6}


def test_packed_leaves_the_large_pages_that_another_group_needs_to_it():
    allocator = pool((6, 1), 3)  # the null page's, one that is begun, one that is empty
    alloc_one(allocator, 0, 1, "other")
    assert allocator.large.num_empty == 1
    chunks = Chunks(0, np.array([-1]), np.array([60]))
    got = allocator.alloc(["r"], [[1], [1]], chunks)
    assert got is not None
    assert allocator.large.num_empty == 0
    allocator.check([])


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
