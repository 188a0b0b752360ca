"""Where radix trees cut a path into nodes, and when they join them again."""

from tests.conftest import World, tokens


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
    world, key = World(4, grace_tokens=4), tokens(12)
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
