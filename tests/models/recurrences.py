"""Recurrent operators written out in float64 NumPy, and inputs for their references."""

from __future__ import annotations

import numpy as np
import torch

LENGTHS = (1, 5, 0, 9)
SLOTS = (3, 1, 5, 4)
NUM_SLOTS = 7
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


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


def scan(x, dt, a, b, c, d, state):
    """One head of Mamba-2, ``x`` ``[n, P]``, ``b``, ``c`` ``[n, N]``, ``state`` ``[P, N]``."""
    outs = []
    for t in range(len(x)):
        state = np.exp(dt[t] * a) * state + np.outer(dt[t] * x[t], b[t])
        outs.append(state @ c[t] + d * x[t])
    return np.array(outs), state
