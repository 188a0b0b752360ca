"""Which recurrent states radix trees hit, keep and evict."""

import pytest

from sglang_jenga.layers.state import StatePolicy
from tests.conftest import World, fork, tokens
from tests.models.radix_examples import FULL


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


@pytest.mark.parametrize(
    ("state_cost", "left"), [(9, (12, 0, 8)), (8, (12, 8, 0)), (0, (12, 8, 0))]
)
def test_a_state_that_saves_less_than_its_bytes_goes_once_its_path_has_a_longer_one(
    state_cost, left
):
    world, chat, other = (
        World(StatePolicy(), state_cost_tokens=state_cost),
        tokens(12),
        tokens(8, 5),
    )
    world.insert(other, states=(8,))
    world.insert(chat[:8], states=(8,))
    world.hit(chat)
    world.insert(chat, states=(12,))
    world.evict(1)
    assert (world.hit(chat), world.hit(chat[:8]), world.hit(other)) == left


def test_a_state_that_was_locked_when_a_longer_one_came_goes_first_when_it_is_not():
    world, chat, other = World(StatePolicy(), state_cost_tokens=99), tokens(12), tokens(8, 5)
    world.insert(other, states=(8,))
    node = world.insert(chat[:8], states=(8,))[0].node
    lock = world.trees.lock(node)
    world.insert(chat, states=(12,), start=node)
    world.trees.unlock(lock)
    world.evict(1)
    assert [world.hit(part) for part in (chat, chat[:8], other)] == [12, 0, 8]


def test_of_states_close_together_every_so_many_tokens_one_stays():
    world, chat = World(StatePolicy(), state_cost_tokens=8), tokens(24)
    node = None
    for length in range(4, 25, 4):
        node = world.insert(chat[:length], states=(length,), start=node)[0].node
    world.evict(3)
    assert [world.hit(chat[:length]) for length in range(4, 25, 4)] == [0, 8, 8, 16, 16, 24]


def test_a_state_behind_which_requests_part_is_not_outdone_by_a_longer_one():
    world, chat, other = World(StatePolicy(), state_cost_tokens=99), tokens(12), tokens(8, 5)
    world.insert(other, states=(8,))
    world.insert(chat[:8], states=(4,))
    world.insert(fork(chat, 6, 12), states=())
    world.insert(chat, states=(12,))
    world.trees.evict_small(1, 1)
    assert [world.hit(part) for part in (chat, chat[:6], other)] == [12, 4, 0]


def test_a_branch_point_is_remembered_when_the_ways_from_it_are_evicted():
    world, first, other = World(StatePolicy(), state_cost_tokens=99), tokens(12), tokens(8, 5)
    world.insert(first, states=(12,))
    world.insert(fork(first, 6, 12)[:6], states=(6,), forks=(6,))  # cut where it parts
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


def test_a_state_where_a_prompt_was_cut_stays_no_longer_than_others_of_its_path():
    """Others had gone on from there, but nobody parts there."""
    world, chat = World(StatePolicy(), state_cost_tokens=99), tokens(12)
    world.insert(chat, states=(12,))
    world.insert(fork(chat, 8, 12), states=(4, 8, 12), forks=(8,))
    world.evict(1)
    assert [world.hit(chat[:length]) for length in (4, 8, 12)] == [0, 8, 12]


@pytest.mark.parametrize(("users", "stays"), [(1, False), (2, True)])
def test_a_state_on_which_enough_requests_run_goes_last(users: int, stays: bool):
    """Eight tokens are worth a state of eight, twice, as soon as two run on them."""
    world, prompt, other = World(StatePolicy(), state_cost_tokens=8), tokens(8), tokens(4, 5)
    world.insert(prompt, states=(8,))
    node = world.insert(fork(prompt, 8, 12))[0].node
    world.insert(fork(prompt, 8, 12, seed=3))  # they part behind 8 tokens
    locks = [world.trees.lock(node, without=(1,)) for _ in range(users)]
    world.insert(other, states=(4,))

    world.trees.evict_small(1, 1)

    assert (world.hit(prompt), world.hit(other)) == ((8, 0) if stays else (0, 4))
    for lock in locks:
        world.trees.unlock(lock)
        world.check()
    assert not any(extent.shielded for extent in world.trees.extents())


@pytest.mark.parametrize("state_first", [True, False])
def test_a_state_is_shielded_as_soon_as_it_is_where_those_who_run_part(state_first: bool):
    world, prompt = World(StatePolicy(), state_cost_tokens=4), tokens(8)
    node = world.insert(fork(prompt, 8, 12), states=(8,) if state_first else ())[0].node
    lock = world.trees.lock(node, without=(1,))
    world.insert(fork(prompt, 8, 12, seed=3), states=(8,), forks=(8,))
    assert [extent.shielded for extent in world.trees.extents() if extent.group_id == 1] == [True]
    world.trees.unlock(lock)


def test_so_is_one_that_comes_where_the_way_on_is_cached_already():
    world, prompt = World(StatePolicy(), state_cost_tokens=4), tokens(12)
    lock = world.trees.lock(world.insert(prompt)[0].node, without=(1,))
    world.insert(prompt[:8], states=(8,), forks=(8,))
    assert [extent.shielded for extent in world.trees.extents() if extent.group_id == 1] == [True]
    world.trees.unlock(lock)
