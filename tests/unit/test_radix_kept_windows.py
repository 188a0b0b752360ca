"""Which windows radix trees keep, for whoever comes back to where requests end or part."""

import numpy as np
import pytest

from tests.conftest import World, fork, tokens
from tests.models.radix_examples import FULL, PAGE_SIZES, WINDOW


@PAGE_SIZES
def test_window_pages_that_a_hit_went_past_go_before_any_page_in_reach(tokens_per_page):
    world = World(tokens_per_page + 1, tokens_per_page=tokens_per_page)
    key, older = tokens(6 * tokens_per_page), tokens(2 * tokens_per_page, seed=9)
    world.insert(older)
    world.insert(key)
    assert world.hit(key) == key.size
    assert world.evict(4) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert [world.hit(key), world.hit(older)] == [key.size, older.size]


def test_windows_of_the_middle_go_before_those_at_ends_and_where_requests_part():
    world = World(2, grace_tokens=2)
    key, other = tokens(8), tokens(6, seed=1)
    world.insert(key)
    world.insert(fork(key, 4, 8))
    world.insert(other)
    # Two tokens before the parting and before each end are read; the two before those ends stay.
    assert sorted(world.evict(4)) == sorted((WINDOW, at) for at in (0, 1, 0, 1))
    assert [world.hit(part) for part in (key, key[:4], other)] == [8, 4, 6]
    assert world.hit(fork(other, 4, 6)) == 4


@pytest.mark.parametrize("tokens_per_page", [1, 2])
def test_windows_shortly_before_an_end_outlast_those_of_the_middle(tokens_per_page):
    world = World(2, tokens_per_page=tokens_per_page, grace_tokens=5)
    key, other = tokens(20), tokens(20, seed=1)
    world.insert(key)
    world.insert(other)
    # Two tokens are read at an end, and the five before stay with them; six in whole pages.
    middle = {1: 13, 2: 12}[tokens_per_page]
    gone = world.evict(2 * middle // tokens_per_page)
    assert sorted(gone) == sorted([(WINDOW, at) for at in range(middle // tokens_per_page)] * 2)
    assert world.hit(fork(other, 16, 20)) == 16


def test_while_memory_is_idle_a_branch_hits_behind_the_window():
    world, key = World(2), tokens(9)
    world.insert(key)
    world.hit(key)
    assert world.hit(fork(key, 4, 9)) == 4


def test_what_lies_shortly_before_an_end_is_as_young_as_the_end():
    world = World(4, grace_tokens=2)
    documents = [tokens(11, seed=seed) for seed in range(3)]
    begun = [world.insert(document[:10])[0].node for document in documents]
    for document, node in zip(documents, begun, strict=True):
        world.insert(document, start=node)
    world.evict(3 * 5 + 6)  # what lies before, and something of the first document's end
    # A second question parts from each document two tokens before its end.
    assert [world.hit(fork(document, 9, 12)) for document in documents[1:]] == [9, 9]


def test_no_more_than_the_grace_is_kept_before_an_end_however_long_the_window():
    world, document = World(4, grace_tokens=2), tokens(12)
    world.insert(document)
    assert world.evict(6) == [(WINDOW, at) for at in range(6)]
    assert world.hit(fork(document, 10, 12)) == 10


def test_where_requests_part_the_window_is_kept_by_whoever_passes():
    world, key = World(2, grace_tokens=2), tokens(12)
    world.insert(key)
    world.insert(fork(key, 6, 12))
    world.hit(key)
    evicted = world.evict(8)  # before the parting, and between it and the windows at both ends
    assert sorted(evicted) == [(WINDOW, page) for page in (0, 1, 2, 3, 6, 6, 7, 7)]
    assert world.hit(key[:6]) == 6


@pytest.mark.parametrize(("resume_points", "expected"), [(True, 6), (False, 0)])
def test_anchors_are_what_keeps_the_window_where_requests_part(resume_points, expected):
    world, key = World(2, resume_points=resume_points), tokens(12)
    world.insert(key)
    world.insert(fork(key, 6, 12))
    world.hit(key)
    world.evict(16)
    assert [world.hit(key[:6]), world.hit(key)] == [expected, 12]


def test_the_end_of_an_earlier_round_is_not_kept_once_its_chat_has_gone_on():
    world, chat, other = World(2, grace_tokens=2), tokens(12), tokens(4, seed=3)
    first = world.insert(chat[:6])[0].node
    world.insert(other)
    world.insert(chat, start=first)
    world.evict(8)
    assert [world.hit(part) for part in (chat, chat[:6], other)] == [12, 0, 4]


def resume_point_in_use(**options):
    """A system prompt of 8 tokens whose window nobody has locked, and whose full pages a request
    runs on that has gone 8 tokens further; an unrelated prefix that was used before them."""
    world, key = World(2, **options), tokens(16)
    older = tokens(3, seed=5)
    world.insert(older)
    system = world.insert(key[:8])[0].node
    running = world.insert(key, start=system)[0].node
    return world, key, older, world.trees.lock(running)


def windows_of(world, key):
    """Positions of a key whose window pages are cached."""
    found = []
    node = world.trees.match(None, key[: key.size]).node
    while node.parent is not None:
        if node.extents[WINDOW] is not None:
            found += range(node.begin, node.end)
        node = node.parent
    return sorted(found)


@pytest.mark.parametrize("shield", [True, False])
def test_the_window_of_a_resume_point_goes_last_while_its_full_pages_are_in_use(shield):
    world, key, older, lock = resume_point_in_use(shield=shield)
    fork_at_system = fork(key, 8, 12)
    world.trees.unlock(world.trees.lock(world.insert(fork_at_system)[0].node))
    world.hit(older)  # newer than all of them but what the running request has locked
    evictable = sum(world.allocator.num_cached)
    world.evict(evictable - 2)
    assert world.hit(key[:9]) == (8 if shield else 0)
    world.trees.unlock(lock)
    world.check()


def test_what_is_shielded_is_evicted_when_nothing_else_is_left():
    world, key, _, lock = resume_point_in_use()
    world.insert(fork(key, 8, 12))
    world.evict()
    assert sum(world.allocator.num_cached) == 0
    world.trees.unlock(lock)


def test_while_nobody_runs_on_it_a_resume_point_is_as_old_as_any():
    world, key, _, lock = resume_point_in_use()
    world.insert(fork(key, 8, 12))
    shielded = [extent for extent in world.trees.extents() if extent.shielded]
    assert [(extent.group_id, extent.node.end) for extent in shielded] == [(WINDOW, 8)]
    world.trees.unlock(lock)
    assert not any(extent.shielded for extent in world.trees.extents())
    world.check()


def test_admission_does_not_count_what_is_shielded_and_a_step_does():
    world, key, _, lock = resume_point_in_use()
    world.insert(fork(key, 8, 12))
    large = world.allocator.large
    everything = [0, large.num_empty + large.num_reclaimable]
    assert world.allocator.fits_after_evicting(everything)
    assert not world.allocator.fits_after_evicting(everything, beside_shielded=True)
    spare = [
        0,
        large.num_empty + large.num_reclaimable - 2,
    ]  # the two window pages at the system's end
    assert world.allocator.fits_after_evicting(spare, beside_shielded=True)
    world.trees.unlock(lock)


def test_a_fork_is_remembered_for_its_window_when_all_ways_but_one_are_evicted():
    world, key = World(2), tokens(16)
    world.insert(key)
    world.insert(fork(key, 8, 12))
    world.hit(key)
    world.trees.evict_small(FULL, 4)  # the other way, which is older
    assert world.hit(fork(key, 8, 12)) == 8
    again = np.concatenate([key, tokens(4, seed=3)])
    world.insert(again)  # settles the path: 8 is no fork of two children any more
    assert {6, 7} <= set(windows_of(world, key[:9]))
    node = world.trees.match(None, key[:8]).node
    assert node.end == 8 and node.resume_point[WINDOW]
