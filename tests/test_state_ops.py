"""The reference operators of state layers against recurrences written out in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga import state_ops

LENGTHS = (1, 5, 0, 9)
SLOTS = (3, 1, 5, 4)
NUM_SLOTS = 7
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def rng():
    torch.manual_seed(0)


def edges(lengths=LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def strided_pool(*shape: int) -> torch.Tensor:
    """A pool of states as views of wider entries, NaN between them."""
    wide = torch.full((NUM_SLOTS, int(np.prod(shape)) + 5), torch.nan)
    pool = wide[:, : int(np.prod(shape))].view(NUM_SLOTS, *shape)
    pool.copy_(torch.randn(NUM_SLOTS, *shape))
    return pool


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def double(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.double().numpy() for tensor in tensors]


def convolved(tokens: np.ndarray, before: np.ndarray, weight: np.ndarray, bias: np.ndarray):
    """Every output by the definition, and the last tokens; ``tokens`` ``[dim, n]``."""
    width = weight.shape[1]
    line = np.concatenate([before, tokens], axis=1)
    out = np.zeros_like(tokens)
    for t in range(tokens.shape[1]):
        for tap in range(width):
            out[:, t] += line[:, t + tap] * weight[:, tap]
    return silu(out + bias[:, None]), line[:, line.shape[1] - width + 1 :]


@pytest.mark.parametrize("known", [True, False])
def test_convolution_of_packed_prompts_follows_the_definition(known: bool):
    dim, width = 6, 4
    x, weight, bias = torch.randn(dim, sum(LENGTHS)), torch.randn(dim, width), torch.randn(dim)
    pool = strided_pool(dim, width - 1)
    before = pool.clone()

    out = state_ops.causal_conv1d_fn(
        x,
        weight,
        bias,
        query_start_loc=edges(),
        cache_indices=torch.tensor(SLOTS),
        has_initial_state=torch.full((4,), known),
        conv_states=pool,
    )

    start = 0
    for length, slot in zip(LENGTHS, SLOTS, strict=True):
        if not length:
            assert torch.equal(pool[slot], before[slot])
            continue
        state = before[slot] if known else torch.zeros_like(before[slot])
        expected, last = convolved(*double(x[:, start : start + length], state, weight, bias))
        np.testing.assert_allclose(out[:, start : start + length], expected, **TOLERANCE)
        np.testing.assert_allclose(pool[slot], last, **TOLERANCE)
        start += length
    untouched = sorted(set(range(NUM_SLOTS)) - set(SLOTS))
    assert torch.equal(pool[untouched], before[untouched])


def test_a_token_at_a_time_convolves_to_the_same_bits_as_a_prompt():
    dim, width, length = 5, 3, 11
    x, weight = torch.randn(dim, length), torch.randn(dim, width)
    pools = [torch.zeros(NUM_SLOTS, dim, width - 1) for _ in range(2)]
    whole = state_ops.causal_conv1d_fn(
        x,
        weight,
        query_start_loc=torch.tensor([0, length]),
        cache_indices=torch.tensor([2]),
        has_initial_state=torch.tensor([False]),
        conv_states=pools[0],
        activation=None,
    )

    steps = [
        state_ops.causal_conv1d_update(
            x[None, :, t], pools[1], weight, conv_state_indices=torch.tensor([2])
        )[0]
        for t in range(length)
    ]

    assert torch.equal(torch.stack(steps, dim=1), whole)
    assert torch.equal(pools[0], pools[1])


def delta_rule(q, k, v, g, beta, state):
    """One head, ``q``, ``k`` ``[n, K]``, ``v`` ``[n, V]``, ``state`` ``[V, K]``."""
    outs = []
    for t in range(len(q)):
        key = k[t] / np.sqrt((k[t] ** 2).sum() + 1e-6)
        query = q[t] / np.sqrt((q[t] ** 2).sum() + 1e-6) / np.sqrt(len(q[t]))
        state = state * np.exp(g[t])
        state = state + beta[t] * np.outer(v[t] - state @ key, key)
        outs.append(state @ query)
    return np.array(outs), state


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
    g, beta = state_ops.fused_gdn_gating_cpu(a_log, a, b, dt_bias)

    out, _ = state_ops.chunk_gated_delta_rule_cpu(
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


def test_gated_delta_rule_decodes_every_request_in_its_slot():
    inputs = gdn_inputs(len(SLOTS))
    q, k, v, a, b, a_log, dt_bias = inputs
    pool = strided_pool(4, 6, 8)
    before = pool.clone()

    out = state_ops.fused_sigmoid_gating_delta_rule_update_cpu(
        a_log, dt_bias, q, k, v, a, b, pool, torch.tensor(SLOTS), edges((1,) * 4), True
    )

    for index, slot in enumerate(SLOTS):
        for head in range(4):
            part = slice(index, index + 1)
            expected, state = gdn_expected(inputs, head, part, before[slot])
            np.testing.assert_allclose(out[0, part, head], expected, **TOLERANCE)
            np.testing.assert_allclose(pool[slot, head], state, **TOLERANCE)


def test_a_padded_request_writes_no_state():
    inputs = gdn_inputs(2)
    q, k, v, a, b, a_log, dt_bias = inputs
    pool = strided_pool(4, 6, 8)
    before = pool.clone()
    slots = torch.tensor([-1, 2])

    state_ops.fused_sigmoid_gating_delta_rule_update_cpu(
        a_log, dt_bias, q, k, v, a, b, pool, slots, edges((1, 1)), True
    )

    untouched = [slot for slot in range(NUM_SLOTS) if slot != 2]
    assert torch.equal(pool[untouched], before[untouched])
    assert not torch.equal(pool[2], before[2])


def scan(x, dt, a, b, c, d, state):
    """One head of Mamba-2, ``x`` ``[n, P]``, ``b``, ``c`` ``[n, N]``, ``state`` ``[P, N]``."""
    outs = []
    for t in range(len(x)):
        state = np.exp(dt[t] * a) * state + np.outer(dt[t] * x[t], b[t])
        outs.append(state @ c[t] + d * x[t])
    return np.array(outs), state


HEADS, GROUPS, DIM, STATE = 4, 2, 6, 8


def mamba_inputs(count: int):
    x, dt = torch.randn(1, count, HEADS, DIM), torch.randn(1, count, HEADS)
    b, c = torch.randn(2, 1, count, GROUPS, STATE)
    a, d, bias = -torch.rand(HEADS) - 0.1, torch.randn(HEADS), torch.randn(HEADS)
    return x, dt, b, c, a, d, bias


def mamba_expected(inputs, head: int, part: slice, state: torch.Tensor):
    x, dt, b, c, a, d, bias = double(*inputs)
    delta = softplus(dt[0, part, head] + bias[head])
    group = head // (HEADS // GROUPS)
    streams = (b[0, part, group], c[0, part, group])
    return scan(x[0, part, head], delta, a[head], *streams, d[head], *double(state[head]))


def test_mamba2_scan_of_packed_prompts_follows_the_recurrence():
    inputs = mamba_inputs(sum(LENGTHS))
    x, dt, b, c, a, d, bias = inputs
    initial = torch.randn(len(LENGTHS), HEADS, DIM, STATE)
    out = torch.full_like(x, torch.nan)

    _, finals, _ = state_ops.mamba_chunk_scan_combined(
        x, dt, a, b, c, 4, D=d, dt_bias=bias, initial_states=initial, cu_seqlens=edges(),
        dt_softplus=True, out=out, state_dtype=torch.float32,
    )  # fmt: skip

    start = 0
    for index, length in enumerate(LENGTHS):
        part = slice(start, start + length)
        for head in range(HEADS if length else 0):
            expected, state = mamba_expected(inputs, head, part, initial[index])
            np.testing.assert_allclose(out[0, part, head], expected, **TOLERANCE)
            np.testing.assert_allclose(finals[index, head], state, **TOLERANCE)
        start += length


def test_mamba2_decodes_every_request_in_its_slot():
    inputs = mamba_inputs(len(SLOTS))
    x, dt, b, c, a, d, bias = inputs
    pool = strided_pool(HEADS, DIM, STATE)
    before = pool.clone()
    out = torch.full_like(x[0], torch.nan)

    state_ops.selective_state_update(
        pool,
        x[0],
        dt[0][:, :, None].expand(-1, -1, DIM),
        a[:, None, None].expand(-1, DIM, STATE),
        b[0],
        c[0],
        d[:, None].expand(-1, DIM),
        dt_bias=bias[:, None].expand(-1, DIM),
        dt_softplus=True,
        state_batch_indices=torch.tensor(SLOTS),
        out=out,
    )

    for index, slot in enumerate(SLOTS):
        for head in range(HEADS):
            part = slice(index, index + 1)
            expected, state = mamba_expected(inputs, head, part, before[slot])
            np.testing.assert_allclose(out[part, head], expected, **TOLERANCE)
            np.testing.assert_allclose(pool[slot, head], state, **TOLERANCE)


def test_gated_norm_is_the_norm_times_the_gate():
    x, gate, weight = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)

    out = state_ops.rms_norm_gated(x, gate, weight, None, eps=1e-6)

    wide, g, w = double(x, gate, weight)
    norm = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, norm * w * silu(g), **TOLERANCE)


def test_shared_expert_is_added_by_its_gate():
    hidden, weight = torch.randn(5, 8), torch.randn(8)
    shared, total = torch.randn(2, 5, 8)
    before = total.clone()

    state_ops.fused_gate_sigmoid_mul_add(hidden, weight, shared, total)

    h, w, s, t = double(hidden, weight, shared, before)
    np.testing.assert_allclose(total, t + s / (1 + np.exp(-(h @ w)))[:, None], **TOLERANCE)
