"""Policies by example and against brute force, as a user who writes one would check his own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import whole_blocks
from examples.whole_blocks import WholeBlocks
from sglang_jenga.layers import agreement
from sglang_jenga.layers.chunked import Chunked, ChunkedPolicy
from sglang_jenga.layers.full import Full, FullPolicy
from sglang_jenga.layers.state import State, StatePolicy
from sglang_jenga.layers.window import Window, WindowPolicy
from sglang_jenga.plan.layer_lists import by_layer_types
from sglang_jenga.plan.model_row import ModelRow
from sglang_jenga.radix import policy
from sglang_jenga.radix.policy import LayerPolicy, Prefix, register_policy
from tests.conftest import World, fork, tokens
from tests.faces.outside import SINKS, SinkWindowPolicy


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


@pytest.fixture
def own_policies(monkeypatch):
    monkeypatch.setattr(policy, "_exchanged", {})


@pytest.mark.usefixtures("own_policies")
@pytest.mark.parametrize("kind", [Full(), Window(8), Chunked(8), State()])
def test_a_registered_policy_runs_the_groups_of_its_type(kind):
    own = kind.policy
    register_policy(kind.name, lambda window: Everything())
    assert isinstance(kind.policy, Everything)
    assert not isinstance(own, Everything)


@pytest.mark.usefixtures("own_policies")
def test_a_policy_is_registered_for_a_type_that_there_is():
    with pytest.raises(ValueError, match="unknown layer type 'windows', expected full or window"):
        register_policy("windows", lambda window: Everything())


class FirstToo(WindowPolicy):
    """Reads a token that its type gives back."""

    def update_last_access(self, prefix):
        return ((0, 1), *WindowPolicy.update_last_access(self, prefix))


@pytest.mark.usefixtures("own_policies")
def test_a_policy_that_reads_what_its_type_gives_back_is_refused_before_anything_is_built():
    row = ModelRow(layers=by_layer_types())
    config = {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
        "num_hidden_layers": 2,
    }
    assert row.why_refused(config.get) == ""

    register_policy("window", lambda window: FirstToo(window - 1))

    assert row.why_refused(config.get) == (
        "the policy of window(8) does not agree: the token at 8 reads the one at 0, which is given "
        "back by then"
    )


@given(cached=st.sets(st.integers(0, 19)), limit=st.integers(1, 20))
def test_a_hit_of_the_example_ends_at_a_whole_block(cached, limit):
    layer = WholeBlocks(3, block=4)
    world, key = World(layer), tokens(20)
    world.cache(key, "".join("x" if p in cached else "." for p in range(20)))
    blocks = range(4, limit + 1, 4)
    assert world.hit(key[:limit]) == max(
        [0] + [n for n in blocks if {n - 3, n - 2, n - 1} <= cached]
    )


@pytest.mark.usefixtures("own_policies")
def test_the_example_agrees_with_the_type_that_it_is_for():
    whole_blocks.load()

    assert isinstance(Window(8).policy, WholeBlocks)
    assert agreement.fault(Window(8)) is None


def test_the_policy_of_sinks_keeps_the_first_tokens_and_the_last():
    layer = SinkWindowPolicy(reach=3)
    assert layer.update_last_access(Prefix(11)) == ((0, SINKS), (8, 11))
    assert layer.update_last_access(Prefix(6)) == ((0, 6),)
    world, key = World(layer), tokens(11)
    world.cache(key, "xxxx....xxx")
    assert world.hit(key) == 11
    world = World(layer)
    world.cache(key, "x.......xxx")
    assert world.hit(key) == 1


@given(cached=st.sets(st.integers(0, 11)), limit=st.integers(1, 12))
def test_the_policy_of_sinks_finds_the_longest_valid_prefix(cached, limit):
    world, key = World(SinkWindowPolicy(reach=3)), tokens(12)
    world.cache(key, "".join("x" if p in cached else "." for p in range(12)))
    needs = {n: {*range(min(SINKS, n)), *range(max(0, n - 3), n)} for n in range(1, limit + 1)}
    assert world.hit(key[:limit]) == max([0] + [n for n, need in needs.items() if need <= cached])


def test_a_request_keeps_its_sinks_locked_while_it_slides():
    world, key = World(SinkWindowPolicy(reach=3)), tokens(11)
    lock = world.trees.lock(world.insert(key)[0].node)
    lock = world.trees.advance(lock, 1, 30)
    assert sorted(world.evict()) == [(1, position) for position in range(SINKS, 11)]
    world.trees.unlock(lock)
    assert world.hit(fork(key, SINKS, 11)) == SINKS


@pytest.mark.parametrize(
    ("width", "grain"), [(1, 1), (16, 1), (128, 8), (1024, 64), (4096, 256), (32768, 256)]
)
def test_windows_are_kept_from_sixteen_places_or_every_256_tokens_on(width, grain):
    policy = Window(width).policy
    assert policy.grain == grain
    assert policy.update_last_access(Prefix(99_999)) == ((99_999 - width + 1, 99_999),)[: width > 1]
