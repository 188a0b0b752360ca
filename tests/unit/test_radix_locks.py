"""What a running request holds in radix trees, and what its window lets go."""

import pytest

from sglang_jenga.layers.window import WindowPolicy
from sglang_jenga.radix.paths import upwards
from tests.conftest import World, fork, tokens
from tests.models.radix_examples import FULL, WINDOW, used_map

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


def test_windows_of_many_requests_cut_a_path_that_they_share_only_where_grains_begin():
    world, key = World(WindowPolicy(32, grain=8)), tokens(64)
    node = world.insert(key)[0].node
    ends = range(40, 64)
    locks = [world.trees.lock(world.trees.match(None, key[:end]).node) for end in ends]
    assert {part.begin for part in upwards(node, 0)} == {0, 8, 16, 24, 32, *ends}
    for lock in locks:
        world.trees.unlock(lock)
    world.check()


def test_a_request_short_of_memory_gives_up_what_the_grain_kept_as_well():
    world = World(WindowPolicy(8, grain=4))
    node = world.insert(tokens(16))[0].node
    lock = world.trees.lock(node)
    maps = []
    for length, exactly in ((18, False), (18, True), (19, False), (20, False)):
        lock = world.trees.advance(lock, WINDOW, length, exactly=exactly)
        world.check()
        maps.append(used_map(node, WINDOW))
    assert [hold.index("U") for hold in maps] == [8, 10, 10, 12]
    world.trees.unlock(lock)


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


def test_unlocking_twice_asserts():
    world = World(2)
    lock = world.trees.lock(world.insert(tokens(6))[0].node)
    world.trees.unlock(lock)
    with pytest.raises(AssertionError, match="unlocked more often"):
        world.trees.unlock(lock)


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


class FirstAndLast(WindowPolicy):
    """Reads the first two tokens as well."""

    __slots__ = ()

    def update_last_access(self, prefix):
        window = max(2, prefix.length - self.reach)
        return ((0, 2), (window, prefix.length)) if prefix.length > 2 else ((0, prefix.length),)


def test_a_page_that_two_ranges_lie_in_is_locked_once():
    world, key = World(FirstAndLast(5), tokens_per_page=4), tokens(8)
    node = world.insert(key)[0].node
    lock = world.trees.lock(node)
    assert lock.ranges[1] == ((0, 8),)
    assert node.locks[1] == 1
    lock = world.trees.advance(lock, 1, 30)
    assert lock.ranges[1] == ((0, 4),)
    world.trees.unlock(lock)
    world.check()
