"""Policies by example and against brute force, as a user who writes one would check his own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_jenga.layers.chunked import ChunkedPolicy
from sglang_jenga.layers.full import FullPolicy
from sglang_jenga.layers.state import StatePolicy
from sglang_jenga.layers.window import Window, WindowPolicy
from sglang_jenga.radix import policy
from sglang_jenga.radix.policy import LayerPolicy, Prefix, register_policy
from tests.conftest import World, fork, tokens


def ranges_of(positions):
    """Whole stretches of a set of positions, longest prefix first, as the trees give them."""
    found = []
    for position in sorted(positions, reverse=True):
        if found and found[-1][0] == position + 1:
            found[-1] = (position, found[-1][1])
        else:
            found.append((position, position + 1))
    return found


def needed_by_full(length):
    return set(range(length))


def needed_by_window(reach):
    return lambda length: set(range(max(0, length - reach), length))


def needed_by_chunk(width):
    return lambda length: set(range(length - length % width, length))


CASES = [
    (FullPolicy(), needed_by_full),
    (WindowPolicy(0), needed_by_window(0)),
    (WindowPolicy(3), needed_by_window(3)),
    (ChunkedPolicy(1), needed_by_chunk(1)),
    (ChunkedPolicy(4), needed_by_chunk(4)),
]


@given(
    case=st.sampled_from(CASES),
    cached=st.sets(st.integers(0, 15)),
    limit=st.integers(1, 16),
)
def test_the_possible_prefix_is_the_longest_whose_needs_are_all_cached(case, cached, limit):
    layer, needs = case
    valid = [0] + [n for n in range(1, limit + 1) if needs(n) <= cached]
    seen = {p for p in cached if p < limit}
    found = layer.get_possible_prefix(Prefix(limit), ranges_of(seen))
    assert found == max(valid)


@given(lengths=st.sets(st.integers(1, 16)), limit=st.integers(1, 16))
def test_a_state_hits_at_the_longest_length_that_has_one(lengths, limit):
    cached = [(n - 1, n) for n in sorted(lengths, reverse=True) if n <= limit]
    found = StatePolicy().get_possible_prefix(Prefix(limit), cached)
    assert found == max((n for n in lengths if n <= limit), default=0)


@given(case=st.sampled_from(CASES), length=st.integers(1, 16))
def test_what_a_step_reads_is_what_a_hit_needs(case, length):
    layer, needs = case
    read = {p for r in layer.update_last_access(Prefix(length)) for p in range(*r)}
    assert read == needs(length)


def test_token_types_rank_pages_by_prefix_length():
    for layer in (FullPolicy(), WindowPolicy(3), ChunkedPolicy(4), StatePolicy()):
        assert layer.set_prefix_length(Prefix(40), (4, 8)) == 8


# ---- one's own ------------------------------------------------------------------------------


class Everything(LayerPolicy):
    def get_possible_prefix(self, prefix, cached):
        return prefix.length

    def update_last_access(self, prefix):
        return ()


def test_a_registered_policy_runs_the_groups_of_its_type(monkeypatch):
    monkeypatch.setattr(policy, "_exchanged", {})
    assert Window(8).policy == WindowPolicy(7)
    register_policy("window", lambda window: Everything())
    assert isinstance(Window(8).policy, Everything)
    with pytest.raises(ValueError, match="unknown layer type 'windows', expected full or window"):
        register_policy("windows", lambda window: Everything())


def test_the_sink_and_window_example_keeps_the_first_tokens_and_the_last():
    from examples.sink_and_window import SinkAndWindow

    layer = SinkAndWindow(sink=2, reach=3)
    assert layer.update_last_access(Prefix(9)) == ((0, 2), (6, 9))
    assert layer.update_last_access(Prefix(4)) == ((0, 4),)
    world, key = World(layer), tokens(9)
    world.cache(key, "xx....xxx")
    assert world.hit(key) == 9
    world = World(layer)
    world.cache(key, "x.....xxx")
    assert world.hit(key) == 1


@given(cached=st.sets(st.integers(0, 11)), limit=st.integers(1, 12))
def test_the_sink_and_window_example_finds_the_longest_valid_prefix(cached, limit):
    from examples.sink_and_window import SinkAndWindow

    layer = SinkAndWindow(sink=2, reach=3)
    world, key = World(layer), tokens(12)
    world.cache(key, "".join("x" if p in cached else "." for p in range(12)))
    needs = {n: set(range(min(2, n))) | set(range(max(0, n - 3), n)) for n in range(1, limit + 1)}
    assert world.hit(key[:limit]) == max([0] + [n for n, need in needs.items() if need <= cached])


def test_a_request_on_the_sink_and_window_example_keeps_its_sink_locked_while_it_slides():
    from examples.sink_and_window import SinkAndWindow

    world, key = World(SinkAndWindow(sink=2, reach=3)), tokens(9)
    lock = world.trees.lock(world.insert(key)[0].node)
    lock = world.trees.advance(lock, 1, 30)
    assert sorted(world.evict()) == [(1, position) for position in range(2, 9)]
    world.trees.unlock(lock)
    assert world.hit(fork(key, 2, 9)) == 2
