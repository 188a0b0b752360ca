"""Which prefixes radix trees hit: ``x`` is a cached small page, ``.`` a hole."""

import random

import pytest

from tests.conftest import World, fork, tokens, tries
from tests.models.radix_examples import PAGE_SIZES, declined

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
    for _ in range(tries(150)):
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


def test_a_match_says_which_group_lost_what():
    world, key = World(4), tokens(10)
    world.cache(key, "xxxxx..xxx")
    match = world.trees.match(None, tokens(10))
    assert (match.node.end, match.agreed) == (5, 10)
    assert [(miss.before, miss.after, miss.lost) for miss in match.misses] == [(10, 5, (6, 7))]
