"""Mamba-2 against the recurrence in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.cpu import mamba
from tests.models.recurrences import (
    LENGTHS,
    SLOTS,
    TOLERANCE,
    double,
    edges,
    scan,
    silu,
    softplus,
    strided_pool,
)


@pytest.fixture(autouse=True)
def rng():
    torch.manual_seed(0)


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

    _, finals, _ = mamba.mamba_chunk_scan_combined(
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


def test_states_inside_the_prompts_are_those_of_the_recurrence():
    """Before every chunk of the whole batch, and before the tokens that are asked for."""
    lengths, chunk = (6, 13, 3), 4
    inputs = mamba_inputs(sum(lengths))
    x, dt, b, c, a, d, bias = inputs
    initial = torch.randn(len(lengths), HEADS, DIM, STATE)
    owners = [index for index, length in enumerate(lengths) for _ in range(length)]
    begins = [sum(lengths[:index]) for index in owners]
    asked = [(0, 5), (1, 6), (1, 17)]  # one of them where its sequence begins

    states, _, tracked = mamba.mamba_chunk_scan_combined(
        x, dt, a, b, c, chunk, D=d, dt_bias=bias, initial_states=initial, cu_seqlens=edges(lengths),
        dt_softplus=True, out=torch.empty_like(x), state_dtype=torch.float32,
        track_seq_idx=torch.tensor([index for index, _ in asked]),
        track_end_locs=torch.tensor([end for _, end in asked]),
    )  # fmt: skip

    assert states.shape == (1, 6, HEADS, DIM, STATE)
    assert tracked.shape == (1, 3, HEADS, DIM, STATE)
    found = [(row * chunk, states[0, row]) for row in range(6)]
    found += [(end, tracked[0, row]) for row, (_, end) in enumerate(asked)]
    for end, state in found:
        for head in range(HEADS):
            part = slice(begins[end], end)
            _, expected = mamba_expected(inputs, head, part, initial[owners[end]])
            np.testing.assert_allclose(state[head], expected, **TOLERANCE)


def test_a_prefill_that_asks_for_no_tracked_state_returns_none():
    x, dt, b, c, a, *_ = mamba_inputs(5)

    *_, tracked = mamba.mamba_chunk_scan_combined(
        x, dt, a, b, c, 4, cu_seqlens=edges((5,)), out=torch.empty_like(x),
        track_seq_idx=torch.tensor([], dtype=torch.int64),
        track_end_locs=torch.tensor([], dtype=torch.int64),
    )  # fmt: skip

    assert tracked is None


def test_mamba2_decodes_every_request_in_its_slot():
    inputs = mamba_inputs(len(SLOTS))
    x, dt, b, c, a, d, bias = inputs
    pool = strided_pool(HEADS, DIM, STATE)
    before = pool.clone()
    out = torch.full_like(x[0], torch.nan)

    mamba.selective_state_update(
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


def test_a_token_at_a_time_scans_to_the_same_bits_as_a_prompt():
    """Mamba-2's decode repeats numbers over the state, its prefill does not."""
    length, slot = 9, torch.tensor([2])
    x, dt, b, c, a, d, bias = mamba_inputs(length)
    whole, pool = torch.empty_like(x), torch.zeros(4, HEADS, DIM, STATE)
    _, finals, _ = mamba.mamba_chunk_scan_combined(
        x, dt, a, b, c, 4, D=d, dt_bias=bias, cu_seqlens=edges((length,)), dt_softplus=True,
        out=whole,
    )  # fmt: skip

    steps = torch.empty_like(x)
    for t in range(length):
        mamba.selective_state_update(
            pool,
            x[:, t],
            dt[:, t, :, None].expand(-1, -1, DIM),
            a[:, None, None].expand(-1, DIM, STATE),
            b[:, t],
            c[:, t],
            d[:, None].expand(-1, DIM),
            dt_bias=bias[:, None].expand(-1, DIM),
            dt_softplus=True,
            state_batch_indices=slot,
            out=steps[:, t],
        )

    assert torch.equal(steps, whole)
    assert torch.equal(pool[2], finals[0])


def test_mamba1_decodes_every_channel_with_its_own_decays_and_gates_it():
    channels, slots = 5, torch.tensor([3, -1, 1])
    x, dt, z = torch.randn(3, 3, channels, 1)
    b, c = torch.randn(2, 3, 1, STATE)
    a, d = -torch.rand(channels, 1, STATE), torch.randn(channels, 1)
    pool = strided_pool(channels, 1, STATE)
    before = pool.clone()
    out = torch.full_like(x, torch.nan)

    mamba.selective_state_update(
        pool, x, dt, a, b, c, d, z=z, dt_softplus=True, state_batch_indices=slots, out=out
    )

    steps, gates = softplus(double(dt)[0]), silu(double(z)[0])
    for index, slot in enumerate(slots.tolist()):
        for channel in range(channels if slot >= 0 else 0):
            state, xs, bs, cs, decays, skip = double(
                before[slot, channel, 0], x[index, channel], b[index, 0], c[index, 0],
                a[channel, 0], d[channel],
            )  # fmt: skip
            step = steps[index, channel, 0]
            state = np.exp(step * decays) * state + step * xs * bs
            y = (state @ cs + skip[0] * xs[0]) * gates[index, channel, 0]
            np.testing.assert_allclose(pool[slot, channel, 0], state, **TOLERANCE)
            np.testing.assert_allclose(out[index, channel], [y], **TOLERANCE)
    untouched = [slot for slot in range(len(pool)) if slot not in (1, 3)]
    assert torch.equal(pool[untouched], before[untouched])
