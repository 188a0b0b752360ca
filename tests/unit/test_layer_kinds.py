"""Every layer type against a count by hand: a request that is computed token by token."""

from __future__ import annotations

import pytest

from sglang_jenga.layers import agreement
from sglang_jenga.layers.base import LayerKind, Load
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan
from sglang_jenga.testing.kind_check import check_kind


def window_reads(width):
    return lambda token: set(range(max(0, token - width + 1), token))


def chunk_reads(width):
    return lambda token: set(range(token - token % width, token))


# A layer type, and which tokens before it a token reads: written down once more, from its meaning.
TOKEN_KINDS = [
    (Full(), lambda token: set(range(token))),
    *((Window(width), window_reads(width)) for width in (1, 2, 5, 16)),
    *((Chunked(width), chunk_reads(width)) for width in (1, 2, 4, 7, 16)),
]
LENGTH = 40
by_kind = pytest.mark.parametrize(
    ("kind", "reads"), TOKEN_KINDS, ids=[kind.label for kind, _ in TOKEN_KINDS]
)


@by_kind
def test_what_is_dead_is_what_no_later_token_reads(kind: LayerKind, reads):
    for length in range(LENGTH):
        # Twice the length: a chunk ends and the next one reads none of it.
        alive = {at for token in range(length, 2 * LENGTH) for at in reads(token) if at < length}
        dead = range(*(kind.dead(length) or (0, 0)))

        assert set(range(length)) - alive == set(dead)


@by_kind
def test_a_type_is_what_a_count_by_hand_says(kind: LayerKind, reads):
    check_kind(kind, reads)


@by_kind
def test_a_type_agrees_with_its_own_policy(kind: LayerKind, reads):
    check_kind(kind)
    assert agreement.fault(kind) is None


def test_a_request_of_states_holds_its_states_and_takes_none_with_its_tokens():
    state = State()

    assert state.held(Load(1000, states=3), 1) == 3
    assert state.step(0, 500, 1) == 0
    assert state.growth(7, 100) == 0
    assert state.alive_pages(30, 1) == 0
    assert state.gaps(Load(1, states=3), 5) == 8


def test_a_chunked_group_needs_no_more_than_a_window_as_wide():
    """SGLang serves Llama-4's chunks as a window of their width."""
    for length in range(1, LENGTH):
        chunk, window = Chunked(8), Window(8)
        assert chunk.held(Load(length), 1) <= window.held(Load(length), 1)
        assert len(range(*(chunk.dead(length) or (0, 0)))) >= len(
            range(*(window.dead(length) or (0, 0)))
        )


def test_a_plan_of_any_kinds_answers_what_a_request_needs():
    kinds = (Full(), Window(8), Chunked(8), State())
    groups = tuple(
        GroupPlan(LayerGroup(kind, (layer,), 4), 4, 1) for layer, kind in enumerate(kinds)
    )
    need = RequestNeed(PoolPlan(groups, 4, 100), states=2)

    assert need.pages(30) == [30, 8, 8, 2]
    assert need.longest(1000) == 100 - 2 - 8 - 8 - 2  # two are null pages


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("width", [1, 5, 16, 33])
def test_a_request_never_holds_more_of_a_window_than_is_counted_for_it(width: int, page_size: int):
    """A shorter one may touch a page more than a longer one: what is counted holds for both."""
    window = Window(width)
    for tokens in range(1, 4 * page_size + 2 * width):
        counted = window.held(Load(tokens), page_size)
        for length in range(1, tokens + 1):
            assert window.alive_pages(length, page_size) <= counted
