"""A batch to attend over: lengths, page tables, the pool's content, and what must come out.

The same requests and the same K and V in every layout, so that kernels can be compared on them.
Small pages are handed out in a shuffled order, as after hours of serving; id 0, the null page, is
nobody's. Knows neither kernels nor clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sglang_jenga.kernels.attention import PagedPlan, attention_reference, plan_full, plan_window
from sglang_jenga.testing.attention_layouts import Attention, PagedKV


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests of ``kv_lens`` tokens, whose last ``q_lens`` ask, in small pages of one group."""

    kv_lens: np.ndarray  # [num_requests], tokens
    q_lens: np.ndarray  # [num_requests], tokens
    table: np.ndarray  # [num_requests, max_pages], small ids, int32; 0 behind the end
    page_size: int

    @classmethod
    def of(cls, kv_lens: list[int], q_lens: list[int], page_size: int, *, seed: int = 0) -> Batch:
        kv, q = np.asarray(kv_lens, dtype=np.int64), np.asarray(q_lens, dtype=np.int64)
        counts = -(-kv // page_size)
        table = np.zeros((kv.size, counts.max()), dtype=np.int32)
        ids = np.random.default_rng(seed).permutation(int(counts.sum())) + 1
        table[np.arange(counts.max()) < counts[:, None]] = ids
        return cls(kv, q, table, page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the pool: those of all requests and the null page."""
        return int((-(-self.kv_lens // self.page_size)).sum()) + 1

    @property
    def q_indptr(self) -> np.ndarray:
        return np.append(0, np.cumsum(self.q_lens))

    def plan(self, window: int | None, requests: slice = slice(None)) -> PagedPlan:
        rows = np.arange(self.kv_lens.size)[requests]
        kv_lens, q_lens = self.kv_lens[requests], self.q_lens[requests]
        if window is None:
            return plan_full(self.table, rows, kv_lens, self.page_size)
        return plan_window(self.table, rows, kv_lens, self.page_size, window=window, q_lens=q_lens)

    def slots(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Slots of positions ``[starts[i], ends[i])``, request after request, int64."""
        parts = []
        for row, start, end in zip(self.table, starts, ends, strict=True):
            position = np.arange(start, end)
            page = row[position // self.page_size].astype(np.int64)
            parts.append(page * self.page_size + position % self.page_size)
        return np.concatenate(parts)

    def bytes_read(self, group: Attention, itemsize: int) -> int:
        """K and V that the queries of the batch see, each once."""
        seen = self.kv_lens
        if group.window is not None:
            seen = np.minimum(seen, self.q_lens + group.window - 1)
        return int(seen.sum()) * 2 * group.row * itemsize


def fill(kv: PagedKV, seed: int = 0) -> None:
    """Normal numbers, the same for every layout with as many pages; NaN in the null page.

    A kernel that reads what it must not, be it only to multiply it by 0, then answers NaN.
    """
    generator = torch.Generator(kv.k.device).manual_seed(seed)
    for part in kv:
        values = torch.randn(
            part.shape, dtype=torch.float32, device=part.device, generator=generator
        )
        part.copy_(values)
        part[0] = float("nan")


def expected(q: torch.Tensor, kv: PagedKV, batch: Batch, window: int | None) -> torch.Tensor:
    """Attention of the whole batch in float64, ``[num_queries, num_q_heads, dim]``."""
    return attention_reference(q, *kv, batch.plan(window), batch.q_lens, window=window)


def error(
    out: torch.Tensor, q: torch.Tensor, kv: PagedKV, batch: Batch, window: int | None
) -> float:
    """Largest difference from float64, over the last queries of the first and the last request:
    of more, the reference would need more memory than the pool."""
    worst = 0.0
    for request in {0, batch.kv_lens.size - 1}:
        count = min(int(batch.q_lens[request]), 4)
        at = slice(int(batch.q_indptr[request + 1]) - count, int(batch.q_indptr[request + 1]))
        last = Batch(
            batch.kv_lens[[request]],
            np.array([count]),
            batch.table[[request]],
            batch.page_size,
        )
        difference = out[at].double() - expected(q[at], kv, last, window)
        worst = max(worst, float(difference.abs().max()))
        if not torch.isfinite(difference).all():
            return float("nan")
    return worst
