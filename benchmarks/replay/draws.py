"""What generated workloads draw, each from a seed of its own: tokens, lengths, arrivals, shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from benchmarks.replay.requests import VOCABULARY


def tokens(seed: Sequence[int], count: int) -> np.ndarray:
    """Random token ids, int64, shape ``[count]``, that depend on the whole `seed` alone."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, count)


def spread(low: int, high: int, count: int, seed: Sequence[int]) -> list[int]:
    """`count` lengths from `low` to `high`, evenly, shuffled; sum: (low + high) * count // 2."""
    lower = [low + (high - low) * i // max(1, count - 1) for i in range(count // 2)]
    middle = [(low + high) // 2] * (count % 2)
    lengths = lower + middle + [low + high - length for length in lower]
    return np.random.default_rng(seed).permutation(lengths).tolist()


def arrivals(rate: float, count: int, seed: Sequence[int]) -> list[float]:
    """Poisson arrivals at `rate` a second."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return list(accumulate(gaps.tolist()))


def rate_text(rate: float) -> str:
    return "all at once" if math.isinf(rate) else f"{rate:g} a second"


def zipf(count: int, exponent: float) -> np.ndarray:
    """How popular each of `count` things is: shares, float64, falling, of sum 1."""
    weights = 1 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()
