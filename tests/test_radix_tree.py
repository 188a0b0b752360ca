"""Radix trees by example, without an allocator: ``x`` is a cached small page, ``.`` a hole."""

import random

import pytest
from conftest import World, fork, tokens

PAGE_SIZES = pytest.mark.parametrize("tokens_per_page", [1, 4, 16])
FULL, WINDOW = 0, 1


def declined(outcome):
    """Declined positions of each group."""
    return [[i for begin, end in ranges for i in range(begin, end)] for ranges in outcome.declined]


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
        node = world.trees.match(None, key[: 4 * tokens_per_page])
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
    outcome, _ = world.insert(key, namespace="b")
    assert declined(outcome) == [[], []]


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
    assert declined(outcome) == [[0, 1, 2, 3, 4, 5]] * 2
    assert world.trees.pages_to(outcome.node, 0).tolist() == first[0].tolist()
    assert world.pages.state[0, second[0][0]] == "used"  # still the request's, to free


def test_what_the_request_got_from_the_tree_is_not_declined():
    world, key = World(2), tokens(8)
    world.insert(key[:4])
    outcome, _ = world.insert(key, skip=4)
    assert declined(outcome) == [[], []]
    world.insert(key[:6])  # now a split inside
    outcome, _ = world.insert(key, skip=3)
    assert declined(outcome) == [[3, 4, 5, 6, 7]] * 2
    outcome, _ = world.insert(fork(key, 5, 9))
    assert declined(outcome) == [[0, 1, 2, 3, 4]] * 2


def test_a_request_with_living_window_pages_fills_a_hole():
    world, key = World(2), tokens(6)
    world.insert(key, [0, 6])
    assert world.hit(key) == 0
    outcome, pages = world.insert(key)
    assert declined(outcome) == [[0, 1, 2, 3, 4, 5], []]
    assert world.trees.pages_to(outcome.node, 1).tolist() == pages[1].tolist()
    assert world.hit(key) == 6


def test_a_partly_dead_request_fills_only_the_living_part_of_a_hole():
    world, key = World(2), tokens(6)
    world.insert(key, [0, 6])
    outcome, pages = world.insert(key, [0, 3])
    assert declined(outcome) == [[0, 1, 2, 3, 4, 5], []]
    assert world.trees.pages_to(outcome.node, 1).tolist() == [0, 0, 0, *pages[1][3:].tolist()]


def test_dead_positions_are_never_declined():
    world, key = World(2), tokens(6)
    world.insert(key)
    outcome, _ = world.insert(key, [0, 4])
    assert declined(outcome) == [[0, 1, 2, 3, 4, 5], [4, 5]]


def test_a_filled_hole_under_a_lock_stays_used():
    world, key = World(4), tokens(6)
    outcome, _ = world.insert(key, [0, 6])
    lock = world.trees.lock(outcome.node)
    outcome, pages = world.insert(key)
    states = [world.pages.state[1, small_id] for small_id in pages[1].tolist()]
    assert states == ["cached"] * 2 + ["used"] * 4
    world.trees.unlock(lock)
    assert {world.pages.state[1, small_id] for small_id in pages[1].tolist()} == {"cached"}


def test_the_tree_keeps_copies_of_the_callers_arrays():
    world, key = World(2), tokens(6)
    kept = key.copy()
    _, pages = world.insert(key)
    expected = pages[0].tolist()
    key[:], pages[0][:] = 0, 0
    node = world.trees.match(None, kept)
    assert node.end == 6 and world.trees.pages_to(node, 0).tolist() == expected


# ---- locks ----------------------------------------------------------------------------------


def used_map(world, node, group_id):
    """``U`` where a request holds a small page of the node's path, ``c`` where none does."""
    ids = world.trees.pages_to(node, group_id).tolist()
    return "".join("U" if world.pages.state[group_id, i] == "used" else "c" for i in ids)


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
    assert used_map(world, outcome.node, FULL) == "UUUUUU"
    assert used_map(world, outcome.node, WINDOW) == expected
    world.trees.unlock(lock)
    assert used_map(world, outcome.node, FULL) == used_map(world, outcome.node, WINDOW) == "cccccc"


def test_a_lock_survives_splits_of_its_nodes():
    world, key = World(4), tokens(6)
    node = world.insert(key)[0].node
    lock = world.trees.lock(node)
    for at in (5, 3, 1):
        world.insert(fork(key, at, 8, seed=at))
    assert used_map(world, node, FULL) == "UUUUUU"
    assert used_map(world, node, WINDOW) == "ccUUUU"
    world.trees.unlock(lock)
    assert used_map(world, node, FULL) == used_map(world, node, WINDOW) == "cccccc"


def test_unlocking_before_a_position_frees_the_window_up_to_its_page():
    world = World(16, tokens_per_page=4)
    node = world.insert(tokens(24))[0].node
    lock = world.trees.lock(node)
    maps = [used_map(world, node, WINDOW)]
    for position in (8, 11, 13, 23, 24):
        lock = world.trees.unlock_before(lock, WINDOW, position)
        world.trees.check()
        maps.append(used_map(world, node, WINDOW))
    assert maps == ["ccUUUU", "ccUUUU", "ccUUUU", "cccUUU", "cccccU", "cccccc"]
    assert used_map(world, node, FULL) == "UUUUUU"
    world.trees.unlock(lock)
    assert used_map(world, node, FULL) == "cccccc"


def test_unlocking_part_of_a_window_leaves_other_requests_their_locks():
    world = World(4)
    node = world.insert(tokens(6))[0].node
    first, second = world.trees.lock(node), world.trees.lock(node)
    first = world.trees.unlock_before(first, WINDOW, 5)
    assert used_map(world, node, WINDOW) == "ccUUUU"
    world.trees.unlock(second)
    assert used_map(world, node, WINDOW) == "cccccU"
    world.trees.unlock(first)
    assert used_map(world, node, WINDOW) == "cccccc"


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
    lock = world.trees.lock(world.trees.match(None, key[:4]))
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
    world.trees.unlock(world.trees.unlock_before(lock, WINDOW, 2))
    world.evict(6)
    assert world.trees.pages_to(young.node, WINDOW).all()
    assert old.node.pages == [None, None]


def test_of_equally_old_pages_the_longer_prefix_goes_first():
    world, key = World(9), tokens(6)
    world.insert(key)
    evicted = world.evict(8)
    assert evicted == [(0, 5), (1, 5), (0, 4), (1, 4), (0, 3), (1, 3), (0, 2), (1, 2)]
    assert world.hit(key) == 2


@PAGE_SIZES
def test_window_pages_out_of_reach_go_before_any_page_in_reach(tokens_per_page):
    world = World(tokens_per_page + 1, tokens_per_page=tokens_per_page)
    key = tokens(6 * tokens_per_page)
    node = world.insert(key)[0].node
    world.trees.unlock(world.trees.lock(node))
    assert sorted(world.evict(4)) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert world.hit(key) == key.size


def test_a_hit_refreshes_only_what_its_window_reaches():
    world, key, other = World(2), tokens(6), tokens(6, seed=5)
    world.insert(key)
    world.insert(other)
    world.hit(key)
    evicted = world.evict(4 + 4)  # both keys' window pages out of reach, before other's tail
    assert [group for group, _ in evicted] == [1] * 8
    assert [world.hit(key), world.hit(other)] == [6, 6]


def test_a_branching_prefix_outlives_its_branches():
    world, key = World(9), tokens(6)
    world.insert(key)
    world.insert(fork(key, 3, 6))
    world.evict(12)
    assert world.trees.num_pages == [3, 3]
    assert world.hit(key) == 3


@pytest.mark.parametrize(("quantum", "evicted"), [(1, 1), (2, 2), (4, 4), (99, 6)])
def test_a_quantum_bounds_what_goes_at_a_time(quantum, evicted):
    world, key = World(), tokens(6)
    world.insert(key)
    assert len(world.evict(1, quantum)) == evicted
    assert world.hit(key) == 6 - evicted


def test_a_window_loses_its_oldest_tokens_first():
    world, key = World(2), tokens(6)
    world.trees.lock(world.insert(key)[0].node)
    assert world.evict(2, quantum=2) == [(1, 0), (1, 1)]
    assert world.evict(2, quantum=2) == [(1, 2), (1, 3)]
    assert world.evict(1) == []


def test_a_hole_that_was_filled_again_can_be_evicted_again():
    world, key = World(2), tokens(6)
    lock = world.trees.lock(world.insert(key)[0].node)
    assert len(world.evict()) == 4
    world.insert(key)
    assert sorted(world.evict()) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    world.trees.unlock(lock)
