"""Gates beside the recurrent operators, and where the references enter SGLang."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.cpu import elementwise, gated
from tests.models.recurrences import TOLERANCE, double, silu


@pytest.fixture(autouse=True)
def rng():
    torch.manual_seed(0)


def test_gated_norm_is_the_norm_times_the_gate():
    x, gate, weight = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)

    out = gated.rms_norm_gated(x, gate, weight, None, eps=1e-6)

    wide, g, w = double(x, gate, weight)
    norm = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, norm * w * silu(g), **TOLERANCE)
    same = gated.layernorm_fn(x, weight, None, z=gate, eps=1e-6, is_rms_norm=True)
    assert torch.equal(same, out)


def test_shared_expert_is_added_by_its_gate():
    hidden, weight = torch.randn(5, 8), torch.randn(8)
    shared, total = torch.randn(2, 5, 8)
    before = total.clone()

    gated.fused_gate_sigmoid_mul_add(hidden, weight, shared, total)

    h, w, s, t = double(hidden, weight, shared, before)
    np.testing.assert_allclose(total, t + s / (1 + np.exp(-(h @ w)))[:, None], **TOLERANCE)


@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus"])
def test_an_activation_has_the_same_bits_wherever_an_element_stands(name: str):
    function = getattr(elementwise, name)
    x = torch.cat([torch.randn(1000) * 5, torch.tensor([-90.0, 0.0, 19.9, 20.1, 90.0])])

    whole = function(x)
    pieces = torch.cat([function(part) for part in x.split(3)])

    assert torch.equal(whole, pieces)
    expected = getattr(torch.nn.functional, name)(x.double())
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-7)


def test_gated_attention_norms_query_and_key_and_leaves_the_gate():
    tokens, heads, kv_heads, dim = 3, 4, 2, 6
    queries, gates = torch.randn(2, tokens, heads, dim)
    keys = torch.randn(tokens, kv_heads, dim)
    q_weight, k_weight = torch.randn(2, dim)

    q, k, gate = gated.fused_qk_gemma_rmsnorm_with_gate_cpu(
        torch.cat([queries, gates], dim=2).reshape(tokens, -1),
        keys.reshape(tokens, -1),
        q_weight,
        k_weight,
        1e-6,
        dim,
        heads,
    )

    for normed, before, weight in ((q, queries, q_weight), (k, keys, k_weight)):
        wide, w = double(before.reshape(-1, dim), weight)
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + w)
        np.testing.assert_allclose(normed, expected, **TOLERANCE)
    assert torch.equal(gate, gates.reshape(-1, dim))


def test_attention_is_multiplied_by_the_sigmoid_of_its_gate():
    x, gate = torch.randn(2, 5, 8)
    before = x.clone()

    gated.fused_sigmoid_mul_cpu(x, gate)

    wide, g = double(before, gate)
    np.testing.assert_allclose(x, wide / (1 + np.exp(-g)), **TOLERANCE)
