"""Pool plans: exact least common multiples, bounded padding, refusals and capacities."""

import json
from math import ceil, gcd, lcm
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_jenga.layers.base import Load
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.planner import (
    MAX_LARGE_PAGE_BYTES,
    MAX_PADDING,
    PoolTooSmallError,
    byte_bound,
    larges_for_requests,
    plan_pool,
    raw_small_bytes,
    requests_held,
    tokens_held,
)
from sglang_jenga.plan.report import capacity_rows, format_plan
from sglang_jenga.plan.spec import LayerGroup, format_bytes
from sglang_jenga.plan.state_sizes import SLOT_BYTES, with_slots
from sglang_jenga.plan.stock import StockLayout

CONFIGS = Path(__file__).parents[1] / "configs"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
POOL = 40 * GIB
PROFILE = settings(derandomize=True, deadline=None, max_examples=150)

# model, large page bytes at page size 1, small pages per large page of each group
EXACT = [
    ("llama-3.1-8b", 128 * KIB, (1,)),
    ("gemma-2-9b", 168 * KIB, (1, 1)),
    ("gemma-3-12b", 320 * KIB, (5, 1)),
    ("gemma-3-27b", 260 * 8 * KIB, (26, 5)),
    ("gpt-oss-20b", 24 * KIB, (1, 1)),
    ("ministral-8b", 108 * KIB, (3, 1)),
    ("qwen3-next-80b-a3b", 3144 * 24 * KIB, (3144, 1)),
    ("falcon-h1-7b", 3093 * 44 * KIB, (3093, 1)),
    ("nemotron-h-8b", 6234 * 16 * KIB, (6234, 1)),
    ("lfm2-1.2b", 240 * KIB, (20, 3)),
    ("jamba-1.5-mini", 980 * 16 * KIB, (980, 1)),
]
# model, page size, least common multiple (never used), most padding of any group
PADDED = [
    ("falcon-h1-7b", 64, 64 * 3093 * 44 * KIB, 0.015),
    ("nemotron-h-8b", 64, 32 * 6234 * 16 * KIB, 0.01),
    ("qwen3-next-80b-a3b", 64, 8 * 3144 * 24 * KIB, 0.02),
    ("jamba-1.5-mini", 64, 16 * 980 * 16 * KIB, 0.05),
    ("gemma-3-27b", 64, 64 * 260 * 8 * KIB, 0.04),
]


def groups_of(model, page_size=1, tp=1):
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    return read_geometry(config, page_size=page_size, tp=tp).groups


def full(entry_bytes, tokens_per_page=1):
    return LayerGroup(Full(), (0,), entry_bytes, tokens_per_page)


def window(entry_bytes, tokens=1024, tokens_per_page=1):
    return LayerGroup(Window(tokens), (1,), entry_bytes, tokens_per_page)


def state(entry_bytes):
    return LayerGroup(State(), (2,), entry_bytes)


def assert_cut_is_sound(plan):
    for item in plan.groups:
        assert item.smalls_per_large * item.small_page_bytes == plan.large_page_bytes
        assert item.padded_entry_bytes >= item.group.entry_bytes
        assert item.padded_entry_bytes % gcd(item.group.entry_bytes, 32) == 0


@pytest.mark.parametrize(("model", "large_bytes", "counts"), EXACT)
def test_real_models_at_page_size_1_get_the_exact_least_common_multiple(model, large_bytes, counts):
    plan = plan_pool(groups_of(model), POOL)

    assert plan.large_page_bytes == large_bytes
    assert tuple(item.smalls_per_large for item in plan.groups) == counts
    assert all(item.padding_fraction == 0 for item in plan.groups)
    assert plan.num_large == POOL // large_bytes


@pytest.mark.parametrize(("model", "page_size", "multiple", "padding"), PADDED)
def test_exploding_least_common_multiples_are_padded_down(model, page_size, multiple, padding):
    groups = groups_of(model, page_size)
    assert lcm(*map(raw_small_bytes, groups)) == multiple > MAX_LARGE_PAGE_BYTES

    plan = plan_pool(groups, POOL)

    assert_cut_is_sound(plan)
    largest_small = max(map(raw_small_bytes, groups))
    assert plan.large_page_bytes <= max(MAX_LARGE_PAGE_BYTES, largest_small) * 9 / 8
    assert max(item.padding_fraction for item in plan.groups) <= padding


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model", [model for model, _, _ in EXACT])
def test_no_real_model_loses_over_an_eighth_of_the_byte_bound(model, tp, page_size):
    groups = groups_of(model, page_size, tp)
    plan = plan_pool(groups, POOL)

    assert_cut_is_sound(plan)
    assert max(item.padding_fraction for item in plan.groups) <= MAX_PADDING
    held = requests_held(plan, Load(1024))
    assert held >= int(0.875 * byte_bound(plan, Load(1024))) - 1


def test_padded_kv_entries_keep_the_alignment_of_the_raw_entry():
    # 3 KV heads of 80 dims over 7 layers beside 5 heads of 48 dims over 11 layers, 64 tokens.
    plan = plan_pool(
        [full(3 * 80 * 2 * 2 * 7, 64), window(5 * 48 * 2 * 2 * 11, 1024, 64)], GIB // 4
    )

    assert_cut_is_sound(plan)
    assert any(item.padding_fraction > 0 for item in plan.groups)
    assert all(item.padded_entry_bytes % 32 == 0 for item in plan.groups)
    assert plan.large_page_bytes < lcm(6720 * 64, 10560 * 64)


def test_a_caller_may_bound_the_large_page():
    groups = groups_of("gemma-3-27b")

    plan = plan_pool(groups, POOL, max_large_page_bytes=MIB)

    assert plan.large_page_bytes <= MIB * 9 / 8
    assert 0 < max(item.padding_fraction for item in plan.groups) <= MAX_PADDING


def test_one_group_is_never_padded():
    plan = plan_pool([full(1234567, 64)], GIB)

    assert plan.groups[0].smalls_per_large == 1
    assert plan.groups[0].padding_fraction == 0


def test_pool_too_small_says_what_one_request_needs():
    groups = [full(64 * KIB), window(320 * KIB)]

    with pytest.raises(PoolTooSmallError) as refusal:
        plan_pool(groups, 300 * MIB, largest=Load(8192))

    # full: (8192 + 5 null small pages) / 5, window: the last 1024 tokens, one per large page
    assert str(refusal.value) == (
        "pool of 300.00 MiB holds 960 large pages of 320.00 KiB, one request of 8192 tokens needs "
        "2664 (full 1640, window(1024) 1024)"
    )


def test_pool_of_exactly_one_request_is_accepted():
    groups = [full(64 * KIB), window(320 * KIB)]

    plan = plan_pool(groups, 2664 * 320 * KIB, largest=Load(8192))

    assert requests_held(plan, Load(8192)) == 1
    with pytest.raises(PoolTooSmallError, match="holds 2663 large pages"):
        plan_pool(groups, 2664 * 320 * KIB - 1, largest=Load(8192))


@pytest.mark.parametrize("pool_bytes", [1, 4095])
def test_pool_below_one_large_page_is_refused_even_without_a_request_length(pool_bytes):
    with pytest.raises(PoolTooSmallError, match="holds 0 large pages"):
        plan_pool([full(4 * KIB)], pool_bytes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], GIB), "groups must not be empty"),
        (([full(64)], 0), "must be positive, got 0"),
        (([full(64)], GIB, -1), "a request must have tokens, got Load"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    groups, pool_bytes, *tokens = arguments
    with pytest.raises(ValueError, match=words):
        plan_pool(groups, pool_bytes, largest=Load(*tokens) if tokens else None)


@pytest.mark.parametrize(
    ("tokens", "tokens_per_page", "smalls"),
    [
        (100, 1, 100),
        (1024, 1, 1024),
        (8192, 1, 1024),  # 1023 behind the current token, and the current one
        (8192, 16, 65),  # 1023 rounds up to 64 pages, and the partial one
        (8192, 2048, 2),  # never less than one whole page behind the partial one
        (2048, 2048, 1),
    ],
)
def test_running_window_holds_its_window_and_a_partial_page(tokens, tokens_per_page, smalls):
    group = window(64, 1024, tokens_per_page)

    assert group.held(Load(tokens)) == smalls
    assert group.held(Load(tokens, at_once=tokens)) == ceil(tokens / tokens_per_page)


def test_other_groups_hold_every_token_or_the_states_of_a_request():
    assert full(64, 16).held(Load(33)) == 3
    assert state(64).held(Load(33)) == 1
    assert state(64).held(Load(33, states=3)) == 3


def test_only_the_null_smalls_of_large_page_0_are_lost():
    plan = plan_pool([full(64 * KIB), window(320 * KIB)], 4 * 320 * KIB)

    assert (plan.null_group, plan.null_smalls) == (0, 5)
    assert larges_for_requests(plan, 1, Load(5)) == (2, 5)
    lone = plan_pool([full(KIB)], 10 * KIB)
    assert requests_held(lone, Load(3)) == 3


@pytest.mark.parametrize(
    ("state_bytes", "smalls", "larges"),
    [(2 * KIB, 4, 1), (64 * KIB, 128, 2), (KIB // 2, 2, 1)],
)
def test_states_have_a_sink_beside_the_null_page(state_bytes, smalls, larges):
    groups = [full(KIB), window(64 * KIB), state(state_bytes)]
    plan = plan_pool(groups if state_bytes < 64 * KIB else [groups[0], groups[2]], 100 * 64 * KIB)
    if state_bytes < 64 * KIB:
        smalls = max(smalls, 64 * KIB // plan.groups[plan.null_group].small_page_bytes)

    assert (plan.null_smalls, plan.null_larges) == (smalls, larges)


@pytest.mark.parametrize("model", [model for model, _, _ in EXACT])
def test_capacity_stays_under_the_byte_bound_and_falls_with_length(model):
    plan = plan_pool(groups_of(model, 16), POOL)
    held = [requests_held(plan, Load(tokens)) for tokens in (512, 1024, 8192, 65536)]

    assert held == sorted(held, reverse=True)
    assert held[1] <= byte_bound(plan, Load(1024))
    assert tokens_held(plan, Load(1024)) == 1024 * held[1]


def entries(unit):
    return st.integers(1, 512).map(lambda n: n * unit)


@st.composite
def group_lists(draw):
    tokens = draw(st.sampled_from([1, 16, 64]))
    groups = [full(draw(entries(512)), tokens)]
    if draw(st.booleans()):
        groups.append(window(draw(entries(512)), draw(st.sampled_from([128, 4096])), tokens))
    if draw(st.booleans()):
        groups.append(state(draw(entries(96 * KIB + 512))))
    return groups


@PROFILE
@given(group_lists(), st.integers(GIB, 80 * GIB))
def test_every_plan_is_sound_bounded_and_the_same_twice(groups, pool_bytes):
    plan = plan_pool(groups, pool_bytes)

    assert_cut_is_sound(plan)
    assert 0 <= pool_bytes - plan.pool_bytes < plan.large_page_bytes
    assert plan == plan_pool(groups, pool_bytes)
    # Bounds hold where the pool is big beside the largest small page, as real ones are.
    if max(map(raw_small_bytes, groups)) * 256 <= pool_bytes:
        assert max(item.padding_fraction for item in plan.groups) <= MAX_PADDING


@PROFILE
@given(group_lists(), st.integers(GIB, 4 * GIB), st.integers(1, 20000))
def test_capacity_is_the_largest_count_that_fits(groups, pool_bytes, tokens):
    plan = plan_pool(groups, pool_bytes)
    held = requests_held(plan, Load(tokens))

    assert sum(larges_for_requests(plan, held, Load(tokens))) <= plan.num_large or held == 0
    assert sum(larges_for_requests(plan, held + 1, Load(tokens))) > plan.num_large
    assert held <= byte_bound(plan, Load(tokens))
    assert requests_held(plan, Load(tokens + 1)) <= held


def test_report_shows_groups_capacity_and_notes():
    plan = plan_pool([full(64 * KIB), window(320 * KIB)], GIB)
    rows = capacity_rows(plan, (1024, 2048), stock=StockLayout(384 * KIB))

    text = format_plan(plan, rows, stock_summary="all layers for every token", notes=["seen"])

    assert "pool 1023.75 MiB: 3276 large pages of 320.00 KiB" in text
    assert "window(1024)" in text and "0.00 %" in text
    assert "null pages: 5 small of full, 320.00 KiB" in text
    assert text.endswith("stock: all layers for every token\nnote: seen")
    assert [row.stock for row in rows] == [2, 1]
    assert "stock" not in format_plan(plan, capacity_rows(plan))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(512, "512 B"), (1536, "1.50 KiB"), (5 * MIB, "5.00 MiB"), (2048 * GIB, "2048.00 GiB")],
)
def test_bytes_are_written_in_binary_units(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(("window_bytes", "slot_bytes"), [(1536, 64), (147456, 2304), (18432, 256)])
def test_a_slot_beside_windows_alone_costs_a_share_of_their_bytes(window_bytes, slot_bytes):
    """A map of 8 bytes a slot lies beside the pool."""
    groups = [LayerGroup(Full(), (), SLOT_BYTES), LayerGroup(Window(64), (0,), window_bytes)]

    full, window = with_slots(groups, 40 << 30)

    assert (full.entry_bytes, window.entry_bytes) == (slot_bytes, window_bytes)
    assert plan_pool((full, window), 40 << 30).large_page_bytes % window_bytes == 0


def test_a_stage_of_a_pipeline_may_have_a_group_whose_layers_are_all_elsewhere():
    group = LayerGroup(Window(8), (), 64, elsewhere=2)

    assert group.num_layers == 2
    assert LayerGroup(Full(), (0, 3), 64).num_layers == 2
    with pytest.raises(ValueError, match="needs at least one layer"):
        LayerGroup(Window(8), (), 64)
