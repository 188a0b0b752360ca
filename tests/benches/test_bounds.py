"""Bounds of a replay: small cells by hand, ideal memory's books, a real replay within them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.replay import bounds as instrument
from benchmarks.replay import ideal_scheduler
from benchmarks.replay.baselines import BASELINES
from benchmarks.replay.bounds import bounds, rule_of
from benchmarks.replay.bounds_tables import Bounds, Row, report
from benchmarks.replay.clock import Clock, Weights
from benchmarks.replay.crowds import Tenants
from benchmarks.replay.geometries import GEOMETRIES
from benchmarks.replay.ideal_memory import Costs, Memory, Policy, costs
from benchmarks.replay.ideal_scheduler import Found, Rule, Server, ranks, serve
from benchmarks.replay.ideal_tree import Tree
from benchmarks.replay.requests import Request, Workload
from benchmarks.replay.run import replay
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.plan.spec import LayerGroup

FULL = LayerGroup(Full(), (1, 3), 100)
WINDOW = LayerGroup(Window(4), (0,), 50)
STATE = LayerGroup(State(), (2,), 1000)
WEIGHTS = Weights(7000, 1, 1)
CLOCK = Clock(fixed_seconds=1.0, request_seconds=0.0)  # a step takes a second and next to nothing
UNMIXED = Rule(8, mixed=False)
MIXES = {"full": (FULL,), "windows": (FULL, WINDOW), "states": (FULL, STATE)}


def ask(rid: str, prompt: list[int], answer: int, at: float = 0.0, after: str | None = None):
    """Its answer's tokens are nobody else's."""
    first = 1000 * (1 + sum(map(ord, rid)))
    return Request(rid, np.array(prompt), np.arange(first, first + answer), at, after)


def in_turn(prompts: list[list[int]], answer: int = 2) -> list[Request]:
    """Each is asked when the one before has been answered."""
    return [
        ask(chr(97 + i), prompt, answer, 0.0, chr(96 + i) if i else None)
        for i, prompt in enumerate(prompts)
    ]


def served(requests, groups=(FULL,), pool=math.inf, rule=UNMIXED) -> Found:
    server = Server(WEIGHTS, groups, CLOCK, pool)
    return serve(server, requests, Tree(requests), rule, Policy())


def of_cell(requests, groups, pool, rule=UNMIXED) -> Bounds:
    workload = Workload("made", tuple(requests), "by hand")
    return bounds(Server(WEIGHTS, groups, CLOCK, pool), workload, Tree(requests), rule)


# ---- time ---------------------------------------------------------------------------------------


def test_a_request_alone_takes_what_the_clock_says_for_its_chunks_and_its_tokens():
    found = served([ask("a", list(range(1, 11)), 3)], MIXES["windows"])

    steps = [(0, 8), (8, 2), (10, 1), (11, 1)]
    seconds = [
        CLOCK.step_seconds(WEIGHTS, MIXES["windows"], np.array([start]), np.array([count]))
        for start, count in steps
    ]
    assert found.seconds == sum(seconds)
    assert found.tokens_per_s == 3 / sum(seconds)


def test_nobody_who_decodes_waits_for_a_mixed_chunk():
    requests = [ask("a", [1, 2], 10), ask("b", [3, 4, 5, 6, 7, 8], 1, at=1.5)]

    assert round(served(requests, rule=Rule(4, mixed=False)).seconds) == 1 + 9 + 2
    assert round(served(requests, rule=Rule(4, mixed=True)).seconds) == 1 + 9


def test_decode_rows_take_tokens_of_a_mixed_chunk():
    requests = [ask("a", [1, 2], 5), ask("b", [3, 4, 5, 6, 7, 8, 9], 8, at=1.5)]

    # b's prompt of seven begins after two steps: in chunks of four, or of three beside a.
    assert round(served(requests, rule=Rule(4, mixed=False)).seconds) == 2 + 2 + 7
    assert round(served(requests, rule=Rule(4, mixed=True)).seconds) == 2 + 3 + 7


def test_no_more_requests_run_at_once_than_the_rule_says():
    requests = [ask(rid, [number, 5], 4) for number, rid in enumerate("abc", 1)]

    assert round(served(requests, rule=Rule(8, False, max_running=3)).seconds) == 4
    assert round(served(requests, rule=Rule(8, False, max_running=1)).seconds) == 12


# ---- hits ---------------------------------------------------------------------------------------


def test_a_later_request_hits_what_it_shares_and_computes_its_last_token():
    shared = [1, 2, 3, 4, 5, 6]

    for groups in MIXES.values():
        assert served(in_turn([[*shared, 7], [*shared, 8, 9]]), groups).hit_tokens == 6
        assert served(in_turn([[*shared, 7], [*shared, 7]]), groups).hit_tokens == 6
        assert served(in_turn([shared, [*shared, 7]]), groups).hit_tokens == 6


def test_requests_of_one_step_do_not_hit_each_other():
    together = [ask("a", [1, 2, 3, 4], 2), ask("b", [1, 2, 3, 5], 2)]

    assert served(together).hit_tokens == 0


def test_a_pool_takes_as_many_tokens_of_a_prefix_as_it_must():
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    requests = in_turn([prompt, list(range(20, 33)), prompt], answer=3)  # 10, 15 and 10 tokens

    assert served(requests, pool=25 * 100).hit_tokens == 7
    assert served(requests, pool=20 * 100).hit_tokens == 5
    assert served(requests, pool=15 * 100).hit_tokens == 0


def test_a_running_requests_state_takes_the_place_of_one_that_is_kept():
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    requests = in_turn([prompt, list(range(20, 28)), prompt])
    pool = 2 * (9 * 100 + 1000)

    assert served(requests, MIXES["states"], pool).hit_tokens == 7
    assert served(requests, MIXES["states"], pool - 300).hit_tokens == 0


def test_a_request_that_fits_no_pool_is_named():
    with pytest.raises(ValueError, match="a does not fit the pool"):
        served([ask("a", [1, 2, 3], 2)], pool=399)


# ---- what memory charges ------------------------------------------------------------------------


def kept_after(requests, groups, answered: int) -> int:
    memory = Memory(tree := Tree(requests), costs(groups), math.inf, Policy())
    for request in range(answered):
        hit = memory.admit(request)
        memory.computed(request, hit, tree.prompts[request])
        memory.finish(request)
    return memory.kept


def test_a_place_to_resume_costs_its_window_or_its_state_and_a_token_in_full_layers_its_own():
    shared = [1, 2, 3, 4, 5, 6]
    requests = in_turn([[*shared, 7], [*shared, 8]])  # an answer's first token is kept, too

    assert kept_after(requests, MIXES["full"], 1) == 8 * 100
    assert kept_after(requests, MIXES["windows"], 1) == 8 * 100 + 3 * 50
    assert kept_after(requests, MIXES["states"], 1) == 8 * 100 + 1000


def test_nothing_but_tokens_is_kept_where_nobody_comes_back_to():
    shared = [1, 2, 3, 4, 5, 6]
    requests = in_turn([[*shared, 7], [*shared, 8]])

    assert kept_after(requests, MIXES["states"], 2) == 10 * 100
    assert kept_after(requests, MIXES["windows"], 2) == 10 * 100


SHORT, LONG = [1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("last, stay", [(SHORT, {3, 8}), (LONG, {8})])
def test_a_place_that_the_last_visitor_passed_by_goes_before_one_it_has_gone_on_from(last, stay):
    tails = (SHORT, LONG, last, LONG, LONG)
    requests = in_turn([[*tail, 20 + number] for number, tail in enumerate(tails)])
    cost, tree = costs(MIXES["states"]), Tree(requests)
    memory = Memory(tree, cost, 10**6, Policy())
    for request in range(3):
        memory.computed(request, memory.admit(request), tree.prompts[request])
        memory.finish(request)

    memory.evict(10**6 - memory.kept + 1)

    assert {tree.end[node] for node in memory._ends} == stay


def test_windows_of_places_close_to_each_other_share_their_tokens():
    requests = in_turn([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [1, 2, 3, 4, 5, 8]])

    # Two places, behind four tokens and behind five: tokens 2 to 5 of the prompt, 3 and 4 once.
    assert kept_after(requests, MIXES["windows"], 1) == 7 * 100 + 4 * 50


def test_a_running_request_is_promised_its_answer_its_window_and_its_state():
    requests = [ask("a", [1, 2, 3], 4), ask("b", [1, 2, 9, 9], 2)]
    memory = Memory(Tree(requests), Costs(100, 50, 1000, 3), math.inf, Policy())

    memory.admit(0)
    assert memory.promised == 6 * 100 + 3 * 50 + 1000
    memory.admit(1)  # of its five tokens two are promised, of its window's three one is not shared
    assert memory.promised == 9 * 100 + 6 * 50 + 2000
    memory.finish(0)
    assert memory.promised == 5 * 100 + 3 * 50 + 1000


def test_a_shielded_state_is_not_free_to_whoever_is_admitted():
    requests = [ask(rid, [1, 2, 3, number], 2) for number, rid in enumerate("abcd", 5)]

    def promised(policy: Policy) -> int:
        memory = Memory(Tree(requests), costs(MIXES["states"]), math.inf, policy)
        memory.admit(0)
        memory.computed(0, 0, 4)
        return memory.promised

    assert promised(Policy(shields=True)) == promised(Policy()) + 1000


# ---- one bound and another ----------------------------------------------------------------------


ROUND = [[i] * 8 for i in (1, 2, 3)] * 3
"""Three prompts in turn, three times: with room for two, whoever goes by age has none in time."""


def test_eviction_by_next_use_is_by_next_use():
    requests = in_turn(ROUND)
    server = Server(WEIGHTS, MIXES["full"], CLOCK, 2 * 900)  # of nine tokens each
    tree, order = Tree(requests), range(len(requests))

    # Two tokens of each are of no use again and go first. Of the second's seven others, the third
    # needs five; so the fourth finds seven, the fifth two, and so on.
    by_next_use = serve(server, requests, tree, UNMIXED, Policy(ranks=order))
    assert by_next_use.hit_tokens == 3 * (7 + 2)
    assert serve(server, requests, tree, UNMIXED, Policy()).hit_tokens == 0


@pytest.mark.parametrize("mix", MIXES)
def test_who_knows_what_comes_next_keeps_what_age_throws_away(mix):
    end = {"full": 0, "windows": 150, "states": 1000}[mix]  # of two prompts, and of a running one
    found = of_cell(in_turn(ROUND), MIXES[mix], 2 * 900 + 3 * end)

    assert found.clairvoyant.hit_tokens > found.lru.hit_tokens
    assert found.lru.seconds >= found.clairvoyant.seconds > found.endless.seconds
    assert found.endless.hit_tokens == 6 * 7
    assert found.best == found.endless


@pytest.mark.parametrize("mix", MIXES)
def test_a_pool_in_which_nothing_is_evicted_is_as_good_as_one_without_end(mix):
    found = of_cell(in_turn(ROUND), MIXES[mix], 10**6)

    assert found.lru == found.clairvoyant == found.endless


def crowd(seed: int) -> list[Request]:
    """Forty requests behind eight prefixes, some of them going on from others' answers."""
    draw = np.random.default_rng(seed)
    prefixes = [draw.integers(1, 9, draw.integers(1, 12)).tolist() for _ in range(8)]
    requests: list[Request] = []
    for number in range(40):
        tail = draw.integers(1, 9, draw.integers(1, 9)).tolist()
        answer, rid = int(draw.integers(1, 12)), f"{number:04}"
        if requests and draw.random() < 0.4:
            one = requests[int(draw.integers(len(requests)))]
            prompt = [*one.prompt.tolist(), *one.output.tolist(), *tail]
            requests.append(ask(rid, prompt[:90], answer, float(draw.uniform(0, 5)), one.rid))
        else:
            requests.append(ask(rid, prefixes[number % 8] + tail, answer, number / 4))
    return requests


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("seed", range(4))
def test_books_are_right_after_every_step_of_a_crowd_and_no_byte_is_overdrawn(
    seed, mix, monkeypatch
):
    requests, groups = crowd(seed), MIXES[mix]
    cost, tree = costs(groups), Tree(requests)
    pool = 60 * cost.full + 30 * cost.window + 4 * cost.state + 60 * 100

    class Checked(Memory):
        def evict(self, running_bytes: float) -> None:
            super().evict(running_bytes)
            held = sum(self._have) * cost.full + len(self._ends) * cost.state
            assert self.kept == held + window_tokens(self) * cost.window
            assert self.kept + running_bytes <= pool or not self._ends | set(self._unlocked())

        def _unlocked(self) -> list[int]:
            return [node for node, have in enumerate(self._have) if have and not self._locks[node]]

    def window_tokens(memory: Checked) -> int:
        seen = set()
        for node in memory._ends:
            seen |= set(above(node, tree.end[node] - cost.reach, tree.end[node]))
        for request, low in memory._low.items():
            last = tree.paths[request][-1]
            seen |= set(above(last, low, tree.prompts[request]))
        return len(seen)

    def above(node: int, low: int, high: int):
        while node >= 0:
            yield from (
                (node, at) for at in range(max(low, tree.begin[node]), min(high, tree.end[node]))
            )
            node = tree.parent[node]

    monkeypatch.setattr(ideal_scheduler, "Memory", Checked)
    server = Server(WEIGHTS, groups, CLOCK, pool)
    for rule in (UNMIXED, Rule(16, mixed=True)):
        order = list(range(len(requests)))
        for policy in (Policy(), Policy(True, 0.25), Policy(True, 0.0, ranks(order))):
            found = serve(server, requests, tree, rule, policy)
            assert sorted(found.order) == order
            assert found == serve(server, requests, tree, rule, policy)


# ---- the table ----------------------------------------------------------------------------------


def test_steps_are_made_as_the_baselines_own_server_makes_them():
    gemma, llama = GEOMETRIES["gemma-3-27b"], GEOMETRIES["llama-3.1-8b"]

    assert rule_of("stock", gemma) == rule_of("jenga-unmixed", gemma) == Rule(8192, False)
    assert rule_of("jenga", gemma) == Rule(2048, True)
    assert rule_of("jenga", llama) == Rule(8192, False)


def test_layers_without_a_rule_are_refused():
    with pytest.raises(ValueError, match="cross"):
        costs(GEOMETRIES["llama-3.2-11b-vision"].real.groups)


def test_shares_are_of_the_bounds_under_the_rule_that_a_baseline_was_played_by():
    def found(speed: float) -> Found:
        return Found(speed, 1.0, 5000, 2.0, [])

    by_rule = {
        Rule(8192, False): Bounds(found(100), found(200), found(160)),
        Rule(2048, True): Bounds(found(200), found(250), found(500)),
    }
    totals = {
        "modelled_tokens_per_s": 100.0,
        "mean_running_per_decode_step": 1.0,
        "hit_tokens": 3000.0,
    }
    played = {"stock": (Rule(8192, False), totals), "jenga": (Rule(2048, True), totals)}
    row = Row("gemma-3-27b", "shift", by_rule, played)

    assert row.shares("stock") == [1.0, 0.5, 0.625, 0.5]
    assert row.shares("jenga") == [0.5, 0.4, 0.2, 0.2]
    assert row.shares("jenga-unmixed") is None
    text = report([row, row._replace(model="llama-3.1-8b")], ("llama-3.1-8b",), 8192)
    assert "| **all** | **0.50** | **0.20** |" in text
    assert "| gemma-3-27b | shift | 0.20 | 1.0 / 2.0 / 2.0 / 2.0 | 3 / 5 / 5 / 5 |" in text


def test_a_stored_result_of_another_pool_is_no_share(tmp_path, monkeypatch):
    requests = tuple(in_turn([[1, 2, 3], [1, 2, 4]]))
    cell = instrument.Cell("llama-3.1-8b", Workload("made", requests, "by hand"), Tree(requests))
    clock, pool = instrument.placed(GEOMETRIES[cell.model], instrument.DEPLOYMENTS[cell.model])
    config = {
        "pool_bytes": pool,
        "clock": clock._asdict(),
        "described": "by hand",
        "server": {"chunked_prefill_size": 8192},
    }
    path = tmp_path / "llama-3.1-8b--made--stock.json"

    for pool_bytes, expected in ((pool, ["stock"]), (pool + 1, [])):
        result = {"totals": {}, "config": config | {"pool_bytes": pool_bytes}}
        path.write_text(json.dumps({"result": result}))
        assert list(cell.row(tmp_path).played) == expected


# ---- the real thing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_replay_is_within_its_bound():
    load = Tenants(tenants=12, requests=96, system=(1000, 3000), rate=64.0).build()
    geometry = GEOMETRIES["gemma-3-27b"]
    clock, pool = Clock("h100", 2), 12 * 2**30
    tree = Tree(load.requests)
    server = Server(geometry.weights, geometry.real.groups, clock, pool)

    real = replay(geometry, load, BASELINES["jenga"], pool_bytes=pool, clock=clock).totals
    found = bounds(server, load, tree, rule_of("jenga", geometry))

    assert found.lru.hit_tokens < found.clairvoyant.hit_tokens < found.endless.hit_tokens
    assert 0 < real["hit_tokens"] < 1.02 * found.endless.hit_tokens
    assert 0.7 < real["modelled_tokens_per_s"] / found.clairvoyant.tokens_per_s < 1.02
