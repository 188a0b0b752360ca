"""Which tracked state a request names, and where it is tracked next: no server needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_jenga.serving import state_caching
from sglang_jenga.serving.state_caching import TrackedStates

INTERVAL = 64


class Rows:
    """Two places for tracking slots, as with steps that run ahead."""

    mamba_ping_pong_track_buffer_size = 2

    def __init__(self, *, lazy: bool = False):
        self.enable_mamba_extra_buffer_lazy = lazy

    def get_mamba_ping_pong_other_idx(self, index: int) -> int:
        return 1 - index


@pytest.fixture
def tracked(monkeypatch):
    """Makes `TrackedStates` of a page size, without SGLang's configuration."""
    monkeypatch.setattr(state_caching, "mamba_checkpoint_grid", lambda page_size: INTERVAL)
    monkeypatch.setattr(state_caching, "mamba_track_grid", lambda page_size: INTERVAL)

    def make(page_size: int = 1, *, lazy: bool = False) -> TrackedStates:
        return TrackedStates(Rows(lazy=lazy), page_size)

    return make


def request(committed: int, *, latest: int | None, last: int = 0, following: int = 0):
    """A request of so many tokens whose ``latest`` tracked state lies in place ``last``."""
    kv = SimpleNamespace(
        kv_committed_len=committed,
        mamba_ping_pong_track_buffer=[7, 8],
        mamba_ping_pong_empty=[False, False],
        mamba_last_track_seqlen=latest,
        mamba_prev_track_seqlen=None,
        mamba_last_track_idx=last,
        mamba_next_track_idx=following,
    )
    return SimpleNamespace(kv=kv)


def next_place(states: TrackedStates, req) -> int:
    states.before_decode([req])
    return req.kv.mamba_next_track_idx


def test_a_step_at_a_boundary_tracks_beside_the_latest_state(tracked):
    assert next_place(tracked(), request(127, latest=64, last=0, following=0)) == 1
    assert next_place(tracked(), request(127, latest=64, last=1, following=1)) == 0


def test_a_place_that_is_apart_already_is_left_alone(tracked):
    assert next_place(tracked(), request(127, latest=64, last=0, following=1)) == 1


def test_between_boundaries_nothing_is_turned(tracked):
    """SGLang may be about to turn by itself."""
    assert next_place(tracked(), request(126, latest=64, last=0, following=0)) == 0
    assert next_place(tracked(), request(128, latest=64, last=0, following=0)) == 0


def test_where_no_state_is_named_any_place_will_do(tracked):
    assert next_place(tracked(), request(127, latest=None, last=0, following=0)) == 0


def test_lazy_places_are_turned_by_sglang(tracked):
    states = tracked(lazy=True)
    assert next_place(states, request(127, latest=64, last=0, following=0)) == 0


@pytest.mark.parametrize(("page_size", "length"), [(1, 78), (2, 78), (16, 0), (64, 0)])
def test_a_state_inside_a_small_page_is_not_cached(tracked, page_size: int, length: int):
    req = request(100, latest=78)
    assert tracked(page_size).cacheable(req, 96, finished=False) == length
