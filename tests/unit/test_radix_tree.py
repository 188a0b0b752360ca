"""Radix trees by example, without an allocator: ``x`` is a cached small page, ``.`` a hole."""

import random

import numpy as np
import pytest

from sglang_jenga.layers.full import FullPolicy
from sglang_jenga.layers.state import StatePolicy
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.books import USED_BY_REQUEST
from sglang_jenga.radix.node import TokenPages
from sglang_jenga.radix.tree import RadixTrees
from tests.conftest import World, fork, plan_of, tokens

PAGE_SIZES = pytest.mark.parametrize("tokens_per_page", [1, 4, 16])
FULL, WINDOW = 0, 1


def declined(outcome, pages):
    """Declined positions of each group, in small pages."""
    return [
        [pages[group_id].tolist().index(i) for ids in parts for i in ids.tolist()]
        for group_id, parts in enumerate(outcome.declined)
    ]


# ---- joint hits -----------------------------------------------------------------------------

HITS = [  # window group's pages, its reach in tokens, hit in tokens; page size 1
    ("xxxxxx", 3, 6),
    ("......", 3, 0),
    ("......", 0, 6),  # a window of one token reads nothing that is cached
    ("...xxx", 3, 6),
    ("..xxx.", 3, 5),
    ("..xx..", 3, 0),
    ("..xx..", 2, 4),
    ("xx..xx", 2, 6),
    ("xx..xx", 3, 2),
    ("xx..xx", 9, 2),
    ("x.xxxx", 5, 1),
    ("xxx.x.", 2, 3),
    (".xxxxx", 6, 0),
    ("xxxxx.", 6, 5),
]


PAGED_HITS = [  # the same with 4 tokens per page: a window that ends inside a page needs all of it
    ("xxx", 4, 12),
    ("..x", 4, 12),
    ("..x", 5, 0),
    (".xx", 8, 12),
    (".xx", 9, 0),
    ("x.x", 5, 4),
    ("xx.", 100, 8),
]


@pytest.mark.parametrize(
    ("tokens_per_page", "cached", "reach", "expected"),
    [*((1, *row) for row in HITS), *((4, *row) for row in PAGED_HITS)],
)
def test_a_window_hit_needs_the_tokens_in_reach_and_no_more(
    tokens_per_page, cached, reach, expected
):
    world = World(reach, tokens_per_page=tokens_per_page)
    key = tokens(len(cached) * tokens_per_page)
    world.cache(key, cached)
    assert world.hit(key) == expected


JOINT_HITS = [  # pages of two window groups with reach 2 and 4, hit
    ("xxxxxx", "xxxxxx", 6),
    ("....xx", "..xxxx", 6),
    ("....xx", "...xxx", 0),
    ("xx..xx", "xxxx.x", 2),
    ("xxx.xx", "xxxx..", 3),
    (".xxx.x", "xxxxx.", 4),  # 5: refused by the first; 4: both accept
    ("x.xx.x", "xxxx.x", 4),
]


@pytest.mark.parametrize(("first", "second", "expected"), JOINT_HITS)
def test_a_joint_hit_is_the_longest_that_every_group_accepts(first, second, expected):
    world, key = World(2, 4), tokens(6)
    world.cache(key, first, second)
    assert world.hit(key) == expected


def longest_hit(maps, reaches, tpp):
    """Oracle: try every page-aligned length, look at every token it needs."""
    num_pages = len(maps[0])
    for length in range(num_pages * tpp, 0, -tpp):
        needed = [range(max(0, length - reach), length) for reach in reaches]
        if all(
            marks[position // tpp] == "x"
            for marks, positions in zip(maps, needed, strict=True)
            for position in positions
        ):
            return length
    return 0


@pytest.mark.parametrize("tpp", [1, 3, 4])
def test_no_cache_state_hides_a_longer_joint_hit_or_shows_a_false_one(tpp):
    rng = random.Random(tpp)
    for _ in range(150):
        num_pages = rng.randint(1, 12)
        reaches = [rng.randint(0, 6 * tpp) for _ in range(rng.randint(1, 3))]
        dense = rng.random()
        maps = [
            "".join("x" if rng.random() < dense else "." for _ in range(num_pages)) for _ in reaches
        ]
        world, key = World(*reaches, tokens_per_page=tpp), tokens(num_pages * tpp, seed=num_pages)
        world.cache(key, *maps)
        asked = rng.randint(1, num_pages) * tpp
        expected = longest_hit([marks[: asked // tpp] for marks in maps], reaches, tpp)
        assert world.hit(key[:asked]) == expected, (maps, reaches, asked)


@PAGE_SIZES
def test_a_hit_ends_at_a_page_boundary(tokens_per_page):
    world, key = World(8, tokens_per_page=tokens_per_page), tokens(6 * tokens_per_page)
    world.insert(key)
    assert world.hit(key[:-1]) == (5 if tokens_per_page > 1 else 6 - 1) * tokens_per_page
    assert world.hit(fork(key, tokens_per_page * 3 - 1, 99)) == 2 * tokens_per_page


@PAGE_SIZES
def test_a_hit_names_the_pages_that_were_inserted(tokens_per_page):
    world, key = World(64, tokens_per_page=tokens_per_page), tokens(6 * tokens_per_page)
    _, pages = world.insert(key)
    branch, branch_pages = world.insert(fork(key, 2 * tokens_per_page, key.size))
    for group_id in (0, 1):
        node = world.trees.match(None, key[: 4 * tokens_per_page]).node
        assert world.trees.pages_to(node, group_id).tolist() == pages[group_id][:4].tolist()
        expected = [*pages[group_id][:2], *branch_pages[group_id][2:]]
        assert world.trees.pages_to(branch.node, group_id).tolist() == expected


def test_an_empty_tree_and_an_empty_key_hit_nothing():
    world = World(3)
    assert world.hit(tokens(5)) == 0
    world.insert(tokens(5))
    assert world.hit(tokens(0)) == 0
    assert world.trees.pages_to(world.trees.root, 0).size == 0


def test_namespaces_share_nothing():
    world, key = World(3), tokens(6)
    world.insert(key, namespace="a")
    assert [world.hit(key, namespace) for namespace in ("a", "b", None)] == [6, 0, 0]
    outcome, pages = world.insert(key, namespace="b")
    assert declined(outcome, pages) == [[], []]


def test_a_split_under_a_namespace_stays_in_it():
    world, key = World(3), tokens(6)
    world.insert(key, namespace="a")
    world.insert(fork(key, 3, 6), namespace="a")
    assert [world.hit(key, namespace) for namespace in ("a", None)] == [6, 0]


# ---- insert ---------------------------------------------------------------------------------


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


# ---- locks ----------------------------------------------------------------------------------


def used_map(node, group_id):
    """``U`` where a request needs a small page of the node's path, ``c`` where none does."""
    marks = ""
    while node.parent is not None:
        extent = node.extents[group_id]
        marks = ("U" if extent.pinned else "c") * extent.size + marks
        node = node.parent
    return marks


LOCKS = [  # tokens per page, reach, window pages that a lock of 6 pages holds
    (1, 0, "cccccc"),
    (1, 3, "cccUUU"),
    (1, 99, "UUUUUU"),
    (4, 4, "cccccU"),
    (4, 5, "ccccUU"),
    (16, 17, "ccccUU"),
]


@pytest.mark.parametrize(("tokens_per_page", "reach", "expected"), LOCKS)
def test_a_lock_holds_the_whole_prefix_and_the_window_rounded_up_to_pages(
    tokens_per_page, reach, expected
):
    world = World(reach, tokens_per_page=tokens_per_page)
    outcome, _ = world.insert(tokens(6 * tokens_per_page))
    lock = world.trees.lock(outcome.node)
    world.trees.check()
    assert used_map(outcome.node, FULL) == "UUUUUU"
    assert used_map(outcome.node, WINDOW) == expected
    world.trees.unlock(lock)
    assert used_map(outcome.node, FULL) == used_map(outcome.node, WINDOW) == "cccccc"


def test_a_lock_survives_splits_of_its_nodes():
    world, key = World(4), tokens(6)
    node = world.insert(key)[0].node
    lock = world.trees.lock(node)
    for at in (5, 3, 1):
        world.insert(fork(key, at, 8, seed=at))
    assert used_map(node, FULL) == "UUUUUU"
    assert used_map(node, WINDOW) == "ccUUUU"
    world.trees.unlock(lock)
    assert used_map(node, FULL) == used_map(node, WINDOW) == "cccccc"


def test_a_request_that_moves_on_unlocks_what_its_window_leaves_behind():
    world = World(16, tokens_per_page=4)
    node = world.insert(tokens(24))[0].node
    lock = world.trees.lock(node)
    maps = [used_map(node, WINDOW)]
    for length in (24, 27, 29, 39, 40, 90):
        lock = world.trees.advance(lock, WINDOW, length)
        world.check()
        maps.append(used_map(node, WINDOW))
    assert maps == ["ccUUUU"] * 3 + ["cccUUU", "cccccU", "cccccc", "cccccc"]
    assert used_map(node, FULL) == "UUUUUU"
    world.trees.unlock(lock)
    assert used_map(node, FULL) == "cccccc"


def test_moving_on_leaves_other_requests_their_locks():
    world = World(4)
    node = world.insert(tokens(6))[0].node
    first, second = world.trees.lock(node), world.trees.lock(node)
    first = world.trees.advance(first, WINDOW, 9)
    assert used_map(node, WINDOW) == "ccUUUU"
    world.trees.unlock(second)
    assert used_map(node, WINDOW) == "cccccU"
    world.trees.unlock(first)
    assert used_map(node, WINDOW) == "cccccc"


def test_nodes_that_nothing_tells_apart_any_more_are_joined():
    world, key = World(), tokens(12)
    world.insert(key)
    for length in (3, 5, 8):  # a hit cuts a node where it ends
        world.hit(key[:length])
    assert len(world.trees.nodes()) == 2  # those of the shorter hits are joined already
    assert world.hit(key) == 12
    assert len(world.trees.nodes()) == 1


def test_what_is_left_of_a_window_is_a_node_of_its_own():
    world, key = World(3), tokens(12)
    world.insert(key)
    world.hit(key)
    assert len(world.evict(9)) == 9
    assert world.hit(key) == 12
    ends = sorted((node.begin, node.end) for node in world.trees.nodes())
    assert ends == [(0, 9), (9, 12)]


def test_a_path_stays_cut_where_a_request_ends_on_it():
    world, key = World(4), tokens(12)
    world.insert(key)
    lock = world.trees.lock(world.trees.match(None, key[:6]).node)
    for _ in range(2):
        assert world.hit(key) == 12
        assert lock.node in world.trees.nodes() and lock.node.end == 6
    world.trees.unlock(lock)
    assert world.hit(key) == 12
    assert lock.node not in world.trees.nodes()


def test_what_was_joined_goes_from_its_end_on_like_one_node():
    world, key = World(), tokens(8)
    world.insert(key)
    world.hit(key[:3])
    world.insert(tokens(2, seed=1))
    world.hit(key)
    assert len(world.trees.nodes()) == 2
    world.hit(tokens(2, seed=1))
    assert sorted(world.evict(3)) == [(0, 5), (0, 6), (0, 7)]
    assert world.hit(key) == 5


def test_unlocking_twice_asserts():
    world = World(2)
    lock = world.trees.lock(world.insert(tokens(6))[0].node)
    world.trees.unlock(lock)
    with pytest.raises(AssertionError, match="unlocked more often"):
        world.trees.unlock(lock)


# ---- evict ----------------------------------------------------------------------------------


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
    world = World(2)
    key, other = tokens(8), tokens(6, seed=1)
    world.insert(key)
    world.insert(fork(key, 4, 8))
    world.insert(other)
    # Two tokens before the parting and before each end are read; as many before those ends age.
    assert sorted(world.evict(4)) == sorted((WINDOW, at) for at in (0, 1, 0, 1))
    assert [world.hit(part) for part in (key, key[:4], other)] == [8, 4, 6]
    assert world.hit(fork(other, 4, 6)) == 4


@pytest.mark.parametrize("tokens_per_page", [1, 2])
def test_windows_shortly_before_an_end_outlast_those_of_the_middle(tokens_per_page):
    world = World(2, tokens_per_page=tokens_per_page, spared=5)
    key, other = tokens(20), tokens(20, seed=1)
    world.insert(key)
    world.insert(other)
    # Two tokens are read at an end, and five before are spared; six in whole pages.
    middle = {1: 13, 2: 12}[tokens_per_page]
    gone = world.evict(2 * middle // tokens_per_page)
    assert sorted(gone) == sorted([(WINDOW, at) for at in range(middle // tokens_per_page)] * 2)
    assert world.hit(fork(other, 16, 20)) == 16


def test_while_memory_is_idle_a_branch_hits_behind_the_window():
    world, key = World(2), tokens(9)
    world.insert(key)
    world.hit(key)
    assert world.hit(fork(key, 4, 9)) == 4


def test_where_requests_part_the_window_is_kept_by_whoever_passes():
    world, key = World(2), tokens(12)
    world.insert(key)
    world.insert(fork(key, 6, 12))
    world.hit(key)
    evicted = world.evict(8)  # before the parting, and between it and the windows at both ends
    assert sorted(evicted) == [(WINDOW, page) for page in (0, 1, 2, 3, 6, 6, 7, 7)]
    assert world.hit(key[:6]) == 6


@pytest.mark.parametrize(("anchors", "expected"), [(True, 6), (False, 0)])
def test_anchors_are_what_keeps_the_window_where_requests_part(anchors, expected):
    world, key = World(2, anchors=anchors), tokens(12)
    world.insert(key)
    world.insert(fork(key, 6, 12))
    world.hit(key)
    world.evict(16)
    assert [world.hit(key[:6]), world.hit(key)] == [expected, 12]


def test_the_end_of_an_earlier_round_is_not_kept_once_its_chat_has_gone_on():
    world, chat, other = World(2), tokens(12), tokens(4, seed=3)
    first = world.insert(chat[:6])[0].node
    world.insert(other)
    world.insert(chat, start=first)
    world.evict(8)
    assert [world.hit(part) for part in (chat, chat[:6], other)] == [12, 0, 4]


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


# ---- the shield -----------------------------------------------------------------------------


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
    everything = [0, large.num_empty + large.num_idle]
    assert world.allocator.fits_after_evicting(everything)
    assert not world.allocator.fits_after_evicting(everything, beside_shielded=True)
    spare = [0, large.num_empty + large.num_idle - 2]  # the two window pages at the system's end
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
    assert node.end == 8 and node.anchored[WINDOW]


# ---- large pages ----------------------------------------------------------------------------


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


def test_tokens_that_several_requests_have_locked_are_counted():
    world, key = World(4), tokens(12)
    node = world.insert(key[:8])[0].node
    locks = [world.trees.lock(node)]  # of the window group the tokens from 4 to 8
    assert world.trees.num_shared == [0, 0]
    longer = world.insert(fork(key, 8, 10), start=node)[0].node
    locks.append(world.trees.lock(longer))  # from 6 to 10
    assert world.trees.num_shared == [8, 2]
    locks.append(world.trees.lock(longer))
    assert world.trees.num_shared == [8 + 10, 2 + 4]
    for lock in locks:
        world.trees.unlock(lock)
    assert world.trees.num_shared == [0, 0]


# ---- states ---------------------------------------------------------------------------------


def test_a_state_hits_at_its_own_length_only():
    world, key = World(StatePolicy()), tokens(12)
    world.insert(key, states=(4, 12))
    assert [world.hit(key[:length]) for length in (3, 4, 11, 12)] == [0, 4, 4, 12]
    assert world.hit(fork(key, 7, 12)) == 4


def test_a_split_leaves_the_state_with_the_whole_prefix():
    world, key = World(StatePolicy()), tokens(12)
    node = world.insert(key, states=(12,))[0].node
    lock = world.trees.lock(node)
    world.insert(fork(key, 6, 12), states=(6,))
    assert world.hit(key) == 12 and world.hit(key[:8]) == 6
    assert used_map_of_states(node) == {6: False, 12: True}
    world.trees.unlock(lock)
    assert used_map_of_states(node) == {6: False, 12: False}


def used_map_of_states(node):
    """Whether the state of each prefix of a path is in use."""
    found = {}
    while node.parent is not None:
        if node.extents[1] is not None:
            found[node.end] = node.extents[1].pinned
        node = node.parent
    return found


def test_only_the_state_that_was_consumed_is_refreshed():
    world, key, other = World(StatePolicy()), tokens(12), tokens(4, seed=3)
    world.insert(key, states=(4, 8, 12))
    world.insert(other, states=(4,))
    world.hit(key)
    world.evict(2)
    assert [world.hit(part) for part in (key, key[:8], key[:4], other)] == [12, 0, 0, 4]


def test_a_state_where_requests_part_outlives_one_between():
    world, key = World(StatePolicy()), tokens(12)
    first = world.insert(key, states=(4, 8, 12))[0].node
    world.insert(fork(key, 8, 12, seed=2), states=(12,), start=first.parent)
    world.hit(key)
    world.evict(1)
    assert [world.hit(part) for part in (key, key[:8], key[:4])] == [12, 8, 0]


@pytest.mark.parametrize(("worth", "left"), [(9, (12, 0, 8)), (8, (12, 8, 0)), (0, (12, 8, 0))])
def test_a_state_that_saves_less_than_its_bytes_goes_once_its_path_has_a_longer_one(worth, left):
    world, chat, other = World(StatePolicy(), worth_of_prefix_page=worth), tokens(12), tokens(8, 5)
    world.insert(other, states=(8,))
    world.insert(chat[:8], states=(8,))
    world.hit(chat)
    world.insert(chat, states=(12,))
    world.evict(1)
    assert (world.hit(chat), world.hit(chat[:8]), world.hit(other)) == left


def test_a_state_that_was_locked_when_a_longer_one_came_goes_first_when_it_is_not():
    world, chat, other = World(StatePolicy(), worth_of_prefix_page=99), tokens(12), tokens(8, 5)
    world.insert(other, states=(8,))
    node = world.insert(chat[:8], states=(8,))[0].node
    lock = world.trees.lock(node)
    world.insert(chat, states=(12,), start=node)
    world.trees.unlock(lock)
    world.evict(1)
    assert [world.hit(part) for part in (chat, chat[:8], other)] == [12, 0, 8]


def test_of_states_close_together_every_so_many_tokens_one_stays():
    world, chat = World(StatePolicy(), worth_of_prefix_page=8), tokens(24)
    node = None
    for length in range(4, 25, 4):
        node = world.insert(chat[:length], states=(length,), start=node)[0].node
    world.evict(3)
    assert [world.hit(chat[:length]) for length in range(4, 25, 4)] == [0, 8, 8, 16, 16, 24]


def test_a_state_behind_which_requests_part_is_not_outdone_by_a_longer_one():
    world, chat, other = World(StatePolicy(), worth_of_prefix_page=99), tokens(12), tokens(8, 5)
    world.insert(other, states=(8,))
    world.insert(chat[:8], states=(4,))
    world.insert(fork(chat, 6, 12), states=())
    world.insert(chat, states=(12,))
    world.trees.evict_small(1, 1)
    assert [world.hit(part) for part in (chat, chat[:6], other)] == [12, 4, 0]


def test_a_branch_point_is_remembered_when_the_ways_from_it_are_evicted():
    world, first, other = World(StatePolicy(), worth_of_prefix_page=99), tokens(12), tokens(8, 5)
    world.insert(first, states=(12,))
    world.insert(fork(first, 6, 12)[:6], states=(6,))  # a second one, cut where it parts
    assert world.trees.evict_small(FULL, 6) == 6
    world.insert(other, states=(8,))
    world.insert(fork(first, 6, 12, seed=2), states=(12,))
    world.evict(1)
    assert [world.hit(first), world.hit(other)] == [6, 0]


def test_tokens_that_no_state_lets_hit_any_more_go_first():
    world, lost, other = World(StatePolicy()), tokens(12), tokens(8, seed=5)
    world.insert(other, states=(8,))
    world.insert(lost, states=(4, 12))
    world.hit(lost)
    assert world.trees.evict_small(1, 2) == 2  # the other's state, then the one of 4 tokens
    world.insert(other, states=(8,))
    world.trees.evict_small(FULL, 1)  # the oldest: the last token of the lost one, and its state
    assert (world.hit(lost), world.hit(other)) == (0, 8)
    assert sorted(world.evict(11)) == [(FULL, at) for at in range(11)]
    assert world.hit(other) == 8


def test_a_path_keeps_no_more_states_than_it_may_but_where_requests_part():
    world, key = World(StatePolicy(), most_on_path=2), tokens(20)
    world.insert(key[:12], states=(4, 8, 12))
    assert [world.hit(key[:length]) for length in (4, 8, 12)] == [0, 8, 12]
    world.insert(fork(key, 8, 10), states=(10,))  # 8 is where requests part now
    world.insert(key, states=(16, 20))
    lengths = [node.end for node in world.trees.nodes() if node.extents[1] is not None]
    assert sorted(lengths) == [8, 10, 20]


def test_a_locked_state_stays_on_a_path_that_has_too_many():
    world, key = World(StatePolicy(), most_on_path=1), tokens(12)
    lock = world.trees.lock(world.insert(key[:4], states=(4,))[0].node)
    world.insert(key, states=(8, 12))
    assert [world.hit(key[:length]) for length in (4, 8, 12)] == [4, 4, 12]
    world.trees.unlock(lock)


def test_a_duplicate_state_is_declined():
    world, key = World(StatePolicy()), tokens(8)
    world.insert(key, states=(4, 8))
    outcome, pages = world.insert(key, states=(8,))
    assert [ids.tolist() for ids in outcome.declined[1]] == [pages[1].tolist()]


# ---- why not hit ----------------------------------------------------------------------------


def test_a_match_says_which_group_lost_what():
    world, key = World(4), tokens(10)
    world.cache(key, "xxxxx..xxx")
    match = world.trees.match(None, tokens(10))
    assert (match.node.end, match.agreed) == (5, 10)
    assert [(miss.before, miss.after, miss.lost) for miss in match.misses] == [(10, 5, (6, 7))]


def test_the_queues_stay_small_however_often_prefixes_are_hit():
    world, key = World(2), tokens(40)
    world.insert(key)
    for _ in range(3000):
        world.trees.match(None, key[:20])
        world.trees.match(None, key[:30])
    queues = world.trees._queues
    entries = sum(len(heap) for heap in (*queues._smalls, *queues._larges))
    assert entries < 2 * 1024 + 8 * len(world.trees.nodes())
