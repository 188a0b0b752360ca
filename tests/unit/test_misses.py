"""Reasons for what was not hit, by example."""

from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State, StatePolicy
from sglang_jenga.layers.window import Window
from sglang_jenga.radix.node import Match, Miss, Node, Run
from sglang_jenga.serving.misses import NEVER_SEEN, MissReport
from tests.conftest import World, fork, tokens

KINDS = [Full(), Window(1024), State()]


def match_of(end, agreed, *misses):
    node = Node(None, None, None, Run(tokens(end), 0), 0, end, len(KINDS))
    return Match(node, agreed, misses)


def test_every_reason_is_one_sentence_in_the_order_of_the_cuts():
    match = match_of(0, 8192, Miss(2, 8192, 4096, (8191, 8192)), Miss(1, 4096, 0, (3584, 4096)))
    assert MissReport(KINDS, None).reasons(match, 9000) == [
        "tokens 8,192-9,000 are not cached",
        "no state at 8,192",
        "window(1024) group lost tokens 3,584-4,096",
    ]


def test_a_whole_hit_has_no_reason_and_counts_nothing():
    report, match = MissReport(KINDS, None), match_of(100, 100)
    report.record(match, 100, None)
    assert report.reasons(match, 100) == [] and not report.tokens


def test_missed_tokens_are_counted_by_reason():
    report = MissReport(KINDS, None)
    for _ in range(2):
        report.record(match_of(10, 80, Miss(1, 80, 10, (9, 30))), 100, None)
    assert report.tokens == {NEVER_SEEN: 40, "window(1024)": 140}


def test_the_metric_carries_the_servers_labels_and_the_reason():
    from prometheus_client import REGISTRY

    report = MissReport(KINDS, {"model": "m"})
    report.record(match_of(10, 10), 25, None)
    name = "sglang:jenga_missed_prefix_tokens_total"
    assert REGISTRY.get_sample_value(name, {"model": "m", "reason": NEVER_SEEN}) == 15


def test_the_trees_name_the_hole_and_the_missing_state():
    world, key = World(4, StatePolicy()), tokens(12)
    world.insert(key, states=(8,))
    match = world.trees.match(None, key)
    assert [(miss.group_id, miss.lost) for miss in match.misses] == [(2, (11, 12))]
    world = World(4)
    world.cache(key, "xxxxxx..xxxx")
    match = world.trees.match(None, fork(key, 11, 12))
    assert (match.agreed, match.node.end) == (11, 6)
    assert [(miss.group_id, miss.lost) for miss in match.misses] == [(1, (7, 8))]
