"""What radix trees take of a request's pages, and what they leave it to free."""

import numpy as np

from sglang_jenga.pages.layout import USED_BY_REQUEST
from sglang_jenga.radix.node import TokenPages
from tests.conftest import World, fork, tokens
from tests.models.radix_examples import PAGE_SIZES, WINDOW, declined, used_map


@PAGE_SIZES
def test_a_duplicate_is_declined_and_the_trees_copy_kept(tokens_per_page):
    world, key = World(64, tokens_per_page=tokens_per_page), tokens(6 * tokens_per_page)
    _, first = world.insert(key)
    outcome, second = world.insert(key)
    assert declined(outcome, second) == [[0, 1, 2, 3, 4, 5]] * 2
    assert world.trees.pages_to(outcome.node, 0).tolist() == first[0].tolist()
    assert (
        world.allocator.large.holder[0][second[0]] == USED_BY_REQUEST
    ).all()  # still the request's, to free


def test_what_the_request_got_from_the_tree_is_not_declined():
    world, key = World(2), tokens(8)
    first = world.insert(key[:4])[0].node
    assert declined(*world.insert(key, start=first)) == [[], []]
    middle = world.trees.match(None, key[:3]).node
    assert declined(*world.insert(key, start=middle)) == [[3, 4, 5, 6, 7]] * 2
    assert declined(*world.insert(fork(key, 5, 9))) == [[0, 1, 2, 3, 4]] * 2


def test_a_request_with_living_window_pages_fills_a_hole():
    world, key = World(2), tokens(6)
    world.insert(key, [0, 6])
    assert world.hit(key) == 0
    outcome, pages = world.insert(key)
    assert declined(outcome, pages) == [[0, 1, 2, 3, 4, 5], []]
    assert world.trees.pages_to(outcome.node, 1).tolist() == pages[1].tolist()
    assert world.hit(key) == 6


def test_a_partly_dead_request_fills_only_the_living_part_of_a_hole():
    world, key = World(2), tokens(6)
    world.insert(key, [0, 6])
    outcome, pages = world.insert(key, [0, 3])
    assert declined(outcome, pages) == [[0, 1, 2, 3, 4, 5], []]
    assert world.trees.pages_to(outcome.node, 1).tolist() == [0, 0, 0, *pages[1][3:].tolist()]


def test_dead_positions_are_never_declined():
    world, key = World(2), tokens(6)
    world.insert(key)
    outcome, pages = world.insert(key, [0, 4])
    assert declined(outcome, pages) == [[0, 1, 2, 3, 4, 5], [4, 5]]


def test_a_filled_hole_under_a_lock_is_pinned():
    world, key = World(4), tokens(6)
    node = world.insert(key, [0, 6])[0].node
    lock = world.trees.lock(node)
    world.insert(key)
    assert used_map(node, WINDOW) == "ccUUUU"
    world.trees.unlock(lock)
    assert used_map(node, WINDOW) == "cccccc"


def test_the_tree_keeps_copies_of_the_callers_arrays():
    world, key = World(2), tokens(6)
    kept = key.copy()
    _, pages = world.insert(key)
    expected = pages[0].tolist()
    key[:], pages[0][:] = 0, 0
    node = world.trees.match(None, kept).node
    assert node.end == 6 and world.trees.pages_to(node, 0).tolist() == expected


def insert_with_gap(world: World, key, gone):
    """Insert a key of which the request has given its window pages of ``gone`` back."""
    step, trees = world.tpp, world.trees
    full, window = world.fresh(0, key.size // step), world.fresh(1, key.size // step)
    dropped = window[gone[0] // step : gone[1] // step]
    world.allocator.free(1, dropped)
    outcome = trees.insert(
        trees.root, None, key, [TokenPages(0, full), TokenPages(0, window.copy(), gone)]
    )
    world.check()
    pages = window.copy()
    pages[gone[0] // step : gone[1] // step] = 0
    return outcome, pages


@PAGE_SIZES
def test_pages_before_and_behind_those_given_back_are_adopted(tokens_per_page):
    world, key = World(2, tokens_per_page=tokens_per_page), tokens(9 * tokens_per_page)
    gone = (2 * tokens_per_page, 6 * tokens_per_page)
    outcome, pages = insert_with_gap(world, key, gone)
    assert world.trees.pages_to(outcome.node, 1).tolist() == pages.tolist()


@PAGE_SIZES
def test_pages_that_were_given_back_are_neither_adopted_nor_declined(tokens_per_page):
    """Where the trees have the window of all tokens in one node, which nothing cuts."""
    world, key = World(2, tokens_per_page=tokens_per_page), tokens(9 * tokens_per_page)
    world.insert(key)
    outcome, pages = insert_with_gap(world, key, (2 * tokens_per_page, 6 * tokens_per_page))
    declined_windows = np.concatenate(outcome.declined[1]).tolist()
    assert declined_windows == [page for page in pages.tolist() if page]


def test_a_request_with_a_gap_fills_holes_on_both_sides_of_it():
    world, key = World(2), tokens(9)
    world.insert(key, [0, 9])
    outcome, pages = insert_with_gap(world, key, (2, 6))
    assert world.trees.pages_to(outcome.node, 1).tolist() == pages.tolist()
    assert world.hit(key) == 9
