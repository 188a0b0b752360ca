"""Every registered layer type against brute force: a request that is computed token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_jenga.layers import registry
from sglang_jenga.layers.base import Address, LayerKind, Load
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.registry import kind_of, register_kind
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan
from sglang_jenga.radix.policy import LayerPolicy, Prefix


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
def test_the_policy_asks_for_what_the_next_token_reads(kind: LayerKind, reads):
    for length in range(1, LENGTH):
        read = {
            at for part in kind.policy.update_last_access(Prefix(length)) for at in range(*part)
        }

        assert read == reads(length)


@by_kind
@pytest.mark.parametrize("tokens_per_page", [1, 4, 16])
def test_a_request_that_gives_back_its_dead_pages_never_holds_more_than_said(
    kind: LayerKind, reads, tokens_per_page: int
):
    """Token by token: what a hit at the last whole page reads is kept, the rest given back."""
    held: set[int] = set()
    for length in range(1, 3 * LENGTH):
        held.add((length - 1) // tokens_per_page)
        most = kind.held(Load(length), tokens_per_page)
        assert len(held) <= most, length
        kept = kind.kept_behind(length, tokens_per_page)
        if kept is not None:
            held -= set(range(-(-kept[0] // tokens_per_page), kept[1] // tokens_per_page))
        needed = {at // tokens_per_page for at in reads(length)}
        assert needed <= held, "a page was given back that the next token reads"


@by_kind
@pytest.mark.parametrize("tokens_per_page", [1, 4])
def test_a_prefix_that_ends_with_a_request_stays_a_hit(kind: LayerKind, reads, tokens_per_page):
    for length in range(1, LENGTH):
        page = length - length % tokens_per_page
        kept = kind.kept_behind(length, tokens_per_page)
        gone = set() if kept is None else set(range(kept[0], kept[1] - kept[1] % tokens_per_page))

        assert page == 0 or not gone & reads(page)
        assert not gone & set(range(page - tokens_per_page, page)), "the last page must stay"


@by_kind
@given(length=st.integers(0, LENGTH), tokens=st.integers(0, LENGTH))
def test_growth_bounds_what_decoding_adds(kind: LayerKind, reads, length: int, tokens: int):
    def alive(at: int) -> int:
        return at - len(range(*(kind.dead(at) or (0, 0))))

    most = max(alive(at) for at in range(length, length + tokens + 1))

    assert most - alive(length) <= kind.growth(length, tokens) <= tokens


@by_kind
@pytest.mark.parametrize("tokens_per_page", [1, 4])
def test_alive_pages_are_those_with_a_token_that_is_still_read(
    kind: LayerKind, reads, tokens_per_page: int
):
    for length in range(LENGTH):
        dead = set(range(*(kind.dead(length) or (0, 0))))
        alive = {at // tokens_per_page for at in range(length) if at not in dead}
        if length % tokens_per_page:
            alive.add(length // tokens_per_page)  # the next token goes there

        assert kind.alive_pages(length, tokens_per_page) == len(alive)


@by_kind
def test_a_step_takes_the_pages_that_its_tokens_begin(kind: LayerKind, reads):
    for start in range(20):
        for end in range(start, 20):
            begun = {at // 4 for at in range(end)} - {at // 4 for at in range(start)}

            assert kind.step(start, end, 4) == len(begun)


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


# ---- the registry ---------------------------------------------------------------------------


class Alternating(Window):
    """A type that is somebody else's."""

    __slots__ = ()
    name = "alternating"


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


@pytest.mark.usefixtures("own_registry")
def test_a_registered_type_is_known_by_its_name():
    register_kind(Alternating)
    register_kind(Alternating)  # SGLang loads its plugins more than once in some processes

    assert kind_of("alternating", 8) == Alternating(8)
    assert kind_of("alternating", 8).label == "alternating(8)"


@pytest.mark.usefixtures("own_registry")
def test_a_type_cannot_take_the_name_of_another():
    class Impostor(Window):
        __slots__ = ()

    with pytest.raises(ValueError, match="there is a layer type 'window' already"):
        register_kind(Impostor)


@pytest.mark.parametrize("thing", [LayerPolicy, Full(), "full"])
def test_what_is_no_layer_type_is_refused(thing):
    with pytest.raises(TypeError, match="a layer type is a subclass of LayerKind"):
        register_kind(thing)


def test_a_type_needs_a_name_and_a_policy():
    with pytest.raises(TypeError, match="must have a name and a policy"):
        register_kind(type("Nameless", (LayerKind,), {"__slots__": ()}))


def test_an_unknown_type_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown layer type 'cross', known are full, window"):
        kind_of("cross")


def test_types_say_how_sglang_finds_their_pages():
    found = {kind.name: kind.address for kind in (Full(), Window(4), Chunked(4), State())}

    assert found == {
        "full": Address.ROW,
        "window": Address.MAPPED,
        "chunked": Address.MAPPED,
        "state": Address.REQUEST,
    }
