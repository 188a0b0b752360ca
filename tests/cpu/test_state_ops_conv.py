"""The short convolutions against their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.cpu import conv
from tests.models.recurrences import (
    LENGTHS,
    NUM_SLOTS,
    SLOTS,
    TOLERANCE,
    convolved,
    double,
    edges,
    strided_pool,
)


@pytest.fixture(autouse=True)
def rng():
    torch.manual_seed(0)


@pytest.mark.parametrize("known", [True, False])
def test_convolution_of_packed_prompts_follows_the_definition(known: bool):
    dim, width = 6, 4
    x, weight, bias = torch.randn(dim, sum(LENGTHS)), torch.randn(dim, width), torch.randn(dim)
    pool = strided_pool(dim, width - 1)
    before = pool.clone()

    out = conv.causal_conv1d_fn(
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
    whole = conv.causal_conv1d_fn(
        x,
        weight,
        query_start_loc=torch.tensor([0, length]),
        cache_indices=torch.tensor([2]),
        has_initial_state=torch.tensor([False]),
        conv_states=pools[0],
        activation=None,
    )

    steps = [
        conv.causal_conv1d_update(
            x[None, :, t], pools[1], weight, conv_state_indices=torch.tensor([2])
        )[0]
        for t in range(length)
    ]

    assert torch.equal(torch.stack(steps, dim=1), whole)
    assert torch.equal(pools[0], pools[1])
