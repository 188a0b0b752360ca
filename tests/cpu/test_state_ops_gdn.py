"""The gated delta rule against the recurrence in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.cpu import gdn
from tests.models.recurrences import (
    LENGTHS,
    NUM_SLOTS,
    SLOTS,
    TOLERANCE,
    delta_rule,
    double,
    edges,
    softplus,
    strided_pool,
)


@pytest.fixture(autouse=True)
def rng():
    torch.manual_seed(0)


def gdn_inputs(count: int, heads=2, value_heads=4, k_dim=8, v_dim=6):
    q, k = torch.randn(2, 1, count, heads, k_dim)
    v = torch.randn(1, count, value_heads, v_dim)
    a, b = torch.randn(2, count, value_heads)
    a_log, dt_bias = torch.randn(2, value_heads)
    return q, k, v, a, b, a_log, dt_bias


def gdn_expected(inputs, head: int, part: slice, state: torch.Tensor):
    q, k, v, a, b, a_log, dt_bias = double(*inputs)
    g = -np.exp(a_log[head]) * softplus(a[part, head] + dt_bias[head])
    beta = 1 / (1 + np.exp(-b[part, head]))
    shared = head // (v.shape[2] // q.shape[2])
    parts = (q[0, part, shared], k[0, part, shared], v[0, part, head])
    return delta_rule(*parts, g, beta, *double(state[head]))


def test_gated_delta_rule_of_packed_prompts_follows_the_recurrence():
    inputs = gdn_inputs(sum(LENGTHS))
    q, k, v, a, b, a_log, dt_bias = inputs
    pool = strided_pool(4, 6, 8)
    before = pool.clone()
    g, beta = gdn.fused_gdn_gating_cpu(a_log, a, b, dt_bias)

    out, _ = gdn.chunk_gated_delta_rule_cpu(
        q, k, v, g, beta, pool, True, edges(), False, True, torch.tensor(SLOTS)
    )

    start = 0
    for length, slot in zip(LENGTHS, SLOTS, strict=True):
        part = slice(start, start + length)
        for head in range(4 if length else 0):
            expected, state = gdn_expected(inputs, head, part, before[slot])
            np.testing.assert_allclose(out[0, part, head], expected, **TOLERANCE)
            np.testing.assert_allclose(pool[slot, head], state, **TOLERANCE)
        start += length


@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 1, 1)], ids=["prefill", "decode"])
def test_one_operator_prefills_and_decodes_for_jet_nemotron(lengths: tuple[int, ...]):
    inputs = gdn_inputs(sum(lengths))
    q, k, v, a, b, a_log, dt_bias = inputs
    pool = strided_pool(4, 6, 8)
    before = pool.clone()
    g, beta = gdn.fused_gdn_gating_cpu(a_log, a, b, dt_bias)

    out = gdn.fused_recurrent_gated_delta_rule_update(
        q, k, v, g, beta, pool, torch.tensor(SLOTS), edges(lengths), use_qk_l2norm_in_kernel=True
    )

    start = 0
    for length, slot in zip(lengths, SLOTS, strict=True):
        part = slice(start, start + length)
        for head in range(4 if length else 0):
            expected, state = gdn_expected(inputs, head, part, before[slot])
            np.testing.assert_allclose(out[0, part, head], expected, **TOLERANCE)
            np.testing.assert_allclose(pool[slot, head], state, **TOLERANCE)
        start += length


@pytest.mark.parametrize("padding", [None, 1])
def test_states_before_every_chunk_of_64_tokens_are_those_of_the_recurrence(padding: int | None):
    """Chunks are counted from the beginning of every sequence, also of one that is padding."""
    lengths, slots = (3, 130, 0, 64), list(SLOTS)
    if padding is not None:
        slots[padding] = -1
    inputs = gdn_inputs(sum(lengths))
    q, k, v, a, b, a_log, dt_bias = inputs
    pool, whole = strided_pool(4, 6, 8), strided_pool(4, 6, 8)
    whole.copy_(pool)
    before = pool.clone()
    g, beta = gdn.fused_gdn_gating_cpu(a_log, a, b, dt_bias)
    arguments = (edges(lengths), False, True)

    out, same_pool, states = gdn.chunk_gated_delta_rule(
        q, k, v, g, beta, pool, torch.tensor(slots), *arguments
    )

    assert same_pool is pool
    assert states.shape == (1, 1 + 3 + 1, 4, 6, 8)
    chunks = [(0, 0), (1, 0), (1, 64), (1, 128), (3, 0)]
    for row, (index, done) in enumerate(chunks):
        if slots[index] < 0:
            continue
        begin = sum(lengths[:index])
        for head in range(4):
            part = slice(begin, begin + done)
            _, state = gdn_expected(inputs, head, part, before[slots[index]])
            np.testing.assert_allclose(states[0, row, head], state, **TOLERANCE)
    expected, _ = gdn.chunk_gated_delta_rule_cpu(
        q, k, v, g, beta, whole, True, *arguments, torch.tensor(slots)
    )
    assert torch.equal(pool, whole)
    live = torch.tensor([slots[i] >= 0 for i, n in enumerate(lengths) for _ in range(n)])
    assert torch.equal(out[:, live], expected[:, live])


def test_gated_delta_rule_decodes_every_request_in_its_slot():
    inputs = gdn_inputs(len(SLOTS))
    q, k, v, a, b, a_log, dt_bias = inputs
    pool = strided_pool(4, 6, 8)
    before = pool.clone()

    out = gdn.fused_sigmoid_gating_delta_rule_update_cpu(
        a_log, dt_bias, q, k, v, a, b, pool, torch.tensor(SLOTS), edges((1,) * 4), True
    )

    for index, slot in enumerate(SLOTS):
        for head in range(4):
            part = slice(index, index + 1)
            expected, state = gdn_expected(inputs, head, part, before[slot])
            np.testing.assert_allclose(out[0, part, head], expected, **TOLERANCE)
            np.testing.assert_allclose(pool[slot, head], state, **TOLERANCE)


def test_a_token_at_a_time_gives_the_same_bits_as_a_prompt():
    length = 9
    q, k, v, a, b, a_log, dt_bias = gdn_inputs(length)
    pools = [torch.zeros(NUM_SLOTS, 4, 6, 8) for _ in range(2)]
    slot = torch.tensor([2])
    g, beta = gdn.fused_gdn_gating_cpu(a_log, a, b, dt_bias)
    whole, _ = gdn.chunk_gated_delta_rule_cpu(
        q, k, v, g, beta, pools[0], True, edges((length,)), False, True, slot
    )

    steps = [
        gdn.fused_sigmoid_gating_delta_rule_update_cpu(
            a_log, dt_bias, q[:, [t]], k[:, [t]], v[:, [t]], a[[t]], b[[t]],
            pools[1], slot, edges((1,)), True,
        )
        for t in range(length)
    ]  # fmt: skip

    assert torch.equal(torch.cat(steps, dim=1), whole)
    assert torch.equal(*pools)


def test_a_padded_request_writes_no_state():
    inputs = gdn_inputs(2)
    q, k, v, a, b, a_log, dt_bias = inputs
    pool = strided_pool(4, 6, 8)
    before = pool.clone()
    slots = torch.tensor([-1, 2])

    gdn.fused_sigmoid_gating_delta_rule_update_cpu(
        a_log, dt_bias, q, k, v, a, b, pool, slots, edges((1, 1)), True
    )

    untouched = [slot for slot in range(NUM_SLOTS) if slot != 2]
    assert torch.equal(pool[untouched], before[untouched])
    assert not torch.equal(pool[2], before[2])


def test_projections_are_cut_into_their_parts():
    sizes = {"q": 2 * 3, "k": 2 * 3, "v": 4 * 5, "z": 4 * 5}
    parts = {name: torch.randn(7, size) for name, size in sizes.items()}
    b, a = torch.randn(2, 7, 4)

    qkv, z, got_b, got_a = gdn.fused_qkvzba_split_reshape_cat_contiguous_cpu(
        torch.cat([*parts.values()], dim=1), torch.cat([b, a], dim=1), 2, 4, 3, 5
    )

    assert torch.equal(qkv, torch.cat([parts["q"], parts["k"], parts["v"]], dim=1))
    assert torch.equal(z, parts["z"].view(7, 4, 5))
    assert torch.equal(got_b, b)
    assert torch.equal(got_a, a)
