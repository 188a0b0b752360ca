"""Who leaves a state, and what a decode step takes for it: no server needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_jenga.serving.tracking import MOST, Tracking, least_worth
from tests.faces.pools import Shape


def request(new: int, *, cached: int = 0, parts_at: int | None = None, empty=(True, True)) -> Any:
    """A prompt with so many new tokens behind its hit; which of its two places are empty."""
    kv = SimpleNamespace(mamba_ping_pong_empty=list(empty), cache_protected_len=cached)
    return SimpleNamespace(
        full_untruncated_fill_ids=[0] * (cached + new),
        prefix_len=cached,
        mamba_branching_seqlen=parts_at,
        kv=kv,
    )


def sparing(least: int) -> Tracking:
    """Where somebody waits for memory."""
    tracking = Tracking(least, 1)
    tracking.sparing = True
    return tracking


@pytest.mark.parametrize(("new", "slots"), [(99, 0), (100, 1)])
def test_a_prompt_whose_new_part_is_short_begins_without_a_slot(new: int, slots: int):
    assert sparing(100).slots_of(request(new)) == slots
    assert sparing(100).slots_of(request(new, cached=5000)) == slots


def test_a_short_prompt_that_parts_from_cached_ones_begins_with_one():
    assert sparing(100).slots_of(request(3, cached=64, parts_at=64)) == 1


def test_while_nobody_waits_for_memory_everybody_is_tracked():
    assert Tracking(100, 1).slots_of(request(3)) == 1
    assert Tracking(100, 1).takes_slot(request(7, cached=200), 208)


def test_with_nothing_to_save_everybody_is_tracked_as_in_sglang():
    assert sparing(0).slots_of(request(0)) == 1
    assert sparing(0).takes_slot(request(0), 64)


def test_a_tracked_request_takes_the_second_slot_at_every_boundary():
    tracked = request(7, empty=(False, True))

    assert sparing(100).takes_slot(tracked, 64)
    assert not sparing(100).takes_slot(request(7, empty=(False, False)), 64)


@pytest.mark.parametrize(("length", "takes"), [(299, False), (300, True)])
def test_an_untracked_one_takes_its_first_slot_once_its_answer_is_long(length: int, takes: bool):
    """Counted from what is cached of it: a state is worth what lies between the two."""
    assert sparing(100).takes_slot(request(7, cached=200), length) is takes


def test_a_state_has_to_save_a_quarter_of_the_tokens_that_its_bytes_would_hold():
    plan = Shape(full=64, state_k=2).plan(16)
    assert plan.state_cost_tokens == 512
    assert least_worth(plan) == 128


def test_a_state_that_saves_a_thousand_tokens_is_worth_any_bytes():
    plan = Shape(full=1024, state_k=1).plan(64)
    assert plan.state_cost_tokens == 65536
    assert least_worth(plan) == MOST


def test_without_states_there_is_nothing_to_weigh():
    assert Shape(full=3, window_k=2).plan(16).state_cost_tokens == 0
