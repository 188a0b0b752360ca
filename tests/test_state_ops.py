"""Gates beside the recurrent operators, and where the references enter SGLang."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga import gated_ops
from tests.recurrences import TOLERANCE, double, silu


@pytest.fixture(autouse=True)
def rng():
    torch.manual_seed(0)


def test_gated_norm_is_the_norm_times_the_gate():
    x, gate, weight = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)

    out = gated_ops.rms_norm_gated(x, gate, weight, None, eps=1e-6)

    wide, g, w = double(x, gate, weight)
    norm = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, norm * w * silu(g), **TOLERANCE)


def test_shared_expert_is_added_by_its_gate():
    hidden, weight = torch.randn(5, 8), torch.randn(8)
    shared, total = torch.randn(2, 5, 8)
    before = total.clone()

    gated_ops.fused_gate_sigmoid_mul_add(hidden, weight, shared, total)

    h, w, s, t = double(hidden, weight, shared, before)
    np.testing.assert_allclose(total, t + s / (1 + np.exp(-(h @ w)))[:, None], **TOLERANCE)
