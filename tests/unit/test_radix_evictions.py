"""What radix trees evict first, and how large pages come empty."""

import pytest

from sglang_jenga.layers.full import FullPolicy
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.radix.node import TokenPages
from sglang_jenga.radix.tree import RadixTrees
from tests.conftest import World, fork, plan_of, tokens
from tests.models.radix_examples import FULL, WINDOW


def test_nothing_locked_is_evicted():
    world, key = World(2), tokens(6)
    world.insert(key)
    lock = world.trees.lock(world.trees.match(None, key[:4]).node)
    evicted = world.evict()
    assert sorted(evicted) == [(0, 4), (0, 5), (1, 0), (1, 1), (1, 4), (1, 5)]
    assert world.hit(key) == 4
    world.trees.unlock(lock)
    world.evict()
    assert world.trees.num_pages == [0, 0] and not world.trees.root.children


def test_the_oldest_prefix_goes_first_in_every_group():
    world = World(9)
    keys = [tokens(3, seed) for seed in range(3)]
    for key in keys:
        world.insert(key)
    world.hit(keys[0])
    world.evict(6)
    assert [world.hit(key) for key in keys] == [3, 0, 3]
    world.evict(6)
    assert sum(world.hit(key) for key in keys) == 3


def test_a_split_leaves_the_age_of_both_parts():
    world = World(9)
    old, young = world.insert(tokens(3, 1))[0], world.insert(tokens(3, 2))[0]
    lock = world.trees.lock(young.node)
    world.trees.unlock(world.trees.advance(lock, WINDOW, 11))
    world.evict(6)
    assert world.trees.pages_to(young.node, WINDOW).all()
    assert old.node.extents == [None, None]


def test_of_equally_old_pages_the_longer_prefix_goes_first_in_every_group_alike():
    world, key = World(9), tokens(6)
    world.insert(key)
    for left in (5, 4, 3):
        assert sorted(world.evict(2)) == [(0, left), (1, left)]
        assert world.hit(key) == left


@pytest.mark.parametrize(("aligned", "left"), [(True, 5), (False, 2)])
def test_alignment_is_what_keeps_the_shorter_of_equally_old_prefixes(aligned, left):
    world, key = World(aligned=aligned), tokens(6)
    first = world.insert(key[:3])[0].node
    world.insert(key, start=first)
    world.hit(key)
    world.evict(1)
    assert world.hit(key) == left


@pytest.mark.parametrize(("balanced", "kept"), [(True, [0, 3]), (False, [3, 0])])
def test_balance_is_what_makes_every_group_give_up_its_oldest(balanced, kept):
    world = World(9, balanced=balanced, shield=False)
    old, young = world.insert(tokens(3, 1))[0].node, world.insert(tokens(3, 2))[0].node
    lock = world.trees.lock(old)  # only its window pages can go, and they are the oldest of all
    lock = world.trees.advance(lock, WINDOW, 40)
    world.evict(3)
    assert [sum(extent.size for extent in node.extents[1:] if extent) for node in (old, young)] == (
        kept
    )
    world.trees.unlock(lock)


def test_a_branching_prefix_outlives_its_branches():
    world, key = World(9), tokens(6)
    world.insert(key)
    world.insert(fork(key, 3, 6))
    world.evict(12)
    assert world.trees.num_pages == [3, 3]
    assert world.hit(key) == 3


def test_no_more_is_evicted_than_asked_for():
    world, key = World(), tokens(60)
    world.insert(key)
    assert len(world.evict(7)) == 7
    assert world.hit(key) == 53


def test_what_can_no_longer_be_reached_is_empty_at_once():
    world, key = World(9), tokens(6)
    first = world.insert(key[:3])[0].node
    lock = world.trees.lock(world.insert(key, start=first)[0].node)
    world.trees.unlock(world.trees.advance(lock, WINDOW, 40))
    assert world.trees.evict_small(FULL, 4) == 4
    world.check()
    assert world.trees.num_pages == [2, 2]


def test_a_hole_that_was_filled_again_can_be_evicted_again():
    world, key = World(2), tokens(6)
    lock = world.trees.lock(world.insert(key)[0].node)
    assert len(world.evict()) == 4
    world.insert(key)
    assert sorted(world.evict()) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    world.trees.unlock(lock)


def shared_world(packing, *sizes):
    """One full group of ``packing`` small pages per large page; keys of ``sizes`` small pages.

    The keys are made one after the other, so the tail of one and the head of the next share.
    """
    allocator = Allocator(plan_of((packing,), 64), order="fullest")
    trees = RadixTrees([FullPolicy()], 1, allocator)
    keys = [tokens(size, seed) for seed, size in enumerate(sizes)]
    for key in keys:
        ids = allocator.alloc(["request"], [[key.size]])[0]
        trees.insert(trees.root, None, key, [TokenPages(0, ids)])
    return allocator, trees, keys


def hits(trees, keys):
    return [trees.match(None, key).node.end for key in keys]


def test_the_least_recently_used_fully_evictable_large_page_goes_first():
    # Large page 0 also holds the null page: sizes 3 | 4 + 1 | 3 of the next | ...
    allocator, trees, keys = shared_world(4, 3, 5, 3)
    trees.match(None, keys[1])
    trees.lock(trees.match(None, keys[2]).node)
    # The first key's pages lie beside the null page: old, but they would free no large page.
    assert trees.evict_large(1)
    allocator.check(trees.extents())
    assert hits(trees, keys) == [3, 0, 3]
    assert not trees.evict_large(1)


def test_a_shared_large_page_waits_for_its_newest_small_page():
    allocator, trees, keys = shared_world(4, 3, 2, 2, 4)
    trees.match(None, keys[1])  # shares with the third key, so both are newer than the fourth
    assert trees.evict_large(1)
    assert hits(trees, keys) == [3, 2, 2, 0]
    assert trees.evict_large(1)
    assert hits(trees, keys) == [3, 0, 0, 0]
    allocator.check(trees.extents())


def test_single_small_pages_go_when_no_large_page_can():
    allocator, trees, keys = shared_world(4, 3, 3)
    used = allocator.alloc(["running"], [[1]])[0]
    assert not trees.evict_large(1)
    assert trees.evict_small(0, 2) == 2
    assert hits(trees, keys) == [1, 3]
    allocator.free(0, used)
    allocator.check(trees.extents())


def test_the_queues_stay_small_however_often_prefixes_are_hit():
    world, key = World(2), tokens(40)
    world.insert(key)
    for _ in range(3000):
        world.trees.match(None, key[:20])
        world.trees.match(None, key[:30])
    queues = world.trees._queues
    entries = sum(len(heap) for heap in (*queues._smalls, *queues._larges))
    assert entries < 2 * 1024 + 8 * len(world.trees.nodes())
