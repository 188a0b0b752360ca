"""The rig serves every kind of model to the end, and sees what it is there to see."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.cells import CELLS, MODELS
from tests.faces.rig import Mute, Rig
from tests.faces.symbols import ALPHABET, WrongRead, answer

TRACKED = Settings(strategy="extra_buffer")


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(ALPHABET) for _ in range(count)]


@pytest.mark.parametrize("name", CELLS)
def test_every_request_is_answered_as_by_a_model_without_memory(name: str):
    cell = CELLS[name]
    roomy = cell.shape._replace(num_large=4 * cell.shape.num_large)
    rng = random.Random(name)
    head = tokens(rng, 20)
    with Rig(roomy, cell.settings) as rig:
        for _ in range(8):
            rig.submit(head[: rng.randrange(21)] + tokens(rng, 9), rng.randrange(1, 12))
            rig.turn(rng.randrange(4))
        rig.run()
        assert all(rig.ended(rid).reason == "length" for rid in rig.asked)
        rig.check_nothing_lost()


def test_a_prefix_is_hit_by_whoever_shares_it():
    with Rig(MODELS["windows"][1]) as rig:
        prompt = answer([0], 20)
        assert rig.ask(prompt).hit == 0
        assert rig.ask([*prompt, 1, 2]).hit >= 20


def test_prefixes_of_another_namespace_are_not_hit():
    with Rig(MODELS["dense"][1]) as rig:
        rig.ask(answer([0], 20))
        assert rig.ask(answer([0], 20), namespace="other").hit == 0


def test_a_request_that_is_not_cached_leaves_nothing():
    with Rig(MODELS["dense"][1]) as rig:
        rig.ask(answer([0], 20), cached=False)
        assert rig.ask(answer([0], 20)).hit == 0


def test_a_request_that_is_retracted_resumes_and_is_answered():
    with Rig(MODELS["dense"][1]) as rig:
        rids = [rig.submit(answer([first], 10), 20) for first in (0, 1)]
        rig.turn(6)
        rig.retract()
        rig.run()
        assert sum(rig.ended(rid).retractions for rid in rids) == 1


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_requests_go_on_after_a_pause(mode: str):
    with Rig(MODELS["windows"][1]) as rig:
        rid = rig.submit(answer([0], 10), 20)
        rig.turn(5)
        rig.pause(mode)
        rig.turn(3)
        assert rig.paused
        rig.resume()
        rig.run()
        assert rig.ended(rid).retractions == (mode == "retract")


# ---- planted faults -----------------------------------------------------------------------------


def running(name: str, settings: Settings | None = None) -> Rig:
    """A rig of two requests in the middle of their answers."""
    rig = Rig(MODELS[name][1], settings)
    for first in (0, 1):
        rig.submit([first, *answer([0], 11)], 20)
    rig.turn(6)
    assert len(rig.scheduler.running_batch.reqs) == 2
    return rig


def rows(rig: Rig) -> list[int]:
    return [req.kv.req_pool_idx for req in rig.scheduler.running_batch.reqs]


def test_a_token_that_stands_in_a_wrong_slot_is_seen():
    with running("dense") as rig:
        row = rig.pools.rows.req_to_token[rows(rig)[0]]
        row[3], row[4] = row[4].clone(), row[3].clone()
        with pytest.raises(WrongRead):
            rig.turn()


def test_a_page_that_is_cleared_while_it_is_read_is_seen():
    with running("dense") as rig:
        slot = int(rig.pools.rows.req_to_token[rows(rig)[0], 5])
        rig.pools.buffer.zero_large_pages([slot], None)
        with pytest.raises(WrongRead):
            rig.turn()


def test_a_window_slot_that_the_map_does_not_name_is_seen():
    with running("windows") as rig:
        last = int(rig.pools.rows.req_to_token[rows(rig)[0], 12])
        rig.pools.allocator.full_to_swa_index_mapping[last] = 1
        with pytest.raises(WrongRead):
            rig.turn()


def test_a_map_that_misleads_the_next_reader_is_seen_before_he_comes():
    with Rig(MODELS["windows"][1]) as rig:
        rig.ask(answer([0], 20))
        mapping = rig.pools.allocator.full_to_swa_index_mapping
        used = np.flatnonzero(mapping.numpy()[:-1])
        mapping[int(used[-1])] = 1
        with pytest.raises(AssertionError, match="the map leads"):
            rig.turn()


def test_a_state_that_is_overwritten_is_seen():
    with running("states", TRACKED) as rig:
        req = rig.scheduler.running_batch.reqs[0]
        rig.pools.states.clear_slots(req.kv.mamba_pool_idx.view(1))
        with pytest.raises(WrongRead):
            rig.turn()


def test_a_page_that_nobody_owns_is_seen():
    with running("dense") as rig:
        rig.pools.allocator.core.alloc([None], [[1]])
        with pytest.raises(AssertionError):
            rig.turn()


def test_a_lock_that_nobody_holds_is_seen():
    with running("dense") as rig:
        rig.pools.cache.lock(rig.scheduler.running_batch.reqs[0].last_node)
        with pytest.raises(AssertionError, match="locks"):
            rig.turn()


def test_a_request_that_is_never_admitted_is_seen(monkeypatch: pytest.MonkeyPatch):
    with Rig(MODELS["dense"][1]) as rig:
        budget = type(rig.pools.allocator.create_prefill_budget(rig.pools.cache))
        monkeypatch.setattr(budget, "check_prefill", lambda self, **_: (False, None))
        with pytest.raises(Mute):
            rig.ask(answer([0], 20))
