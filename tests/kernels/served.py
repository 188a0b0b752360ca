"""A batch in a real pool that two layer groups share, and what attention over it must say."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sglang_jenga.kernels.attention import PagedPlan, plan_full, plan_window
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.window import Window
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.tables import expand
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup

PAGE_SIZES = [1, 3, 16, 64, 256]
WINDOW = 37
HEADS = (HeadShape(2, 64, 64), HeadShape(1, 128, 128))
NUM_LAYERS = (2, 3)
Q_PER_KV = 4
ROWS = np.array([4, 1, 6])


class Served(NamedTuple):
    """A batch in a pool: per group its page table, one layer's K and V, and what they must say."""

    tables: list[np.ndarray]
    k_rows: list[torch.Tensor]
    v_rows: list[torch.Tensor]
    k_true: list[list[torch.Tensor]]  # by group and request, [tokens, heads, dim]
    v_true: list[list[torch.Tensor]]


def serve(
    page_size: int, kv_lens: np.ndarray, q_lens: np.ndarray, dtype: torch.dtype, device: str
) -> Served:
    """Put requests in a pool that holds nothing else but poison.

    Window pages that no query reads are given back, as a server does: they have id 0, and the null
    page is poison too. On the host it is NaN. FlashInfer may multiply masked values by 0, and the
    pool never shows it NaN, so there it is large numbers.
    """
    groups = [
        LayerGroup(kind, tuple(range(layers)), heads.entry_bytes(layers, 2), page_size)
        for kind, layers, heads in (
            (Full(), NUM_LAYERS[0], HEADS[0]),
            (Window(WINDOW), NUM_LAYERS[1], HEADS[1]),
        )
    ]
    tokens = 2 * int(np.sum(-(-kv_lens // page_size) + 2) * page_size)
    plan = plan_pool(groups, max(tokens * 4096, 1 << 20))
    buffer = PoolBuffer(plan, device, enable_memory_saver=False)
    buffer.bytes.fill_(0xFF if device == "cpu" else 0x47)
    firsts = [np.zeros_like(kv_lens), np.maximum(kv_lens - q_lens - WINDOW + 1, 0) // page_size]
    counts = [(-(-kv_lens // page_size) - first).tolist() for first in firsts]
    allocator = Allocator(plan)
    # What another request took before, so that ids are not in order.
    allocator.alloc(["other"], [[3], [1]])
    ids = allocator.alloc([f"request {row}" for row in ROWS], counts)
    served = Served([], [], [], [], [])
    generator = torch.Generator().manual_seed(page_size)
    for group_id, heads in enumerate(HEADS):
        keys, values = buffer.layer_views(group_id, heads, dtype)
        k_rows, v_rows = keys[1], values[1]
        table = np.zeros((8, -(-int(kv_lens.max()) // page_size) + 1), dtype=np.int32)
        truths: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        parts = np.split(ids[group_id], np.cumsum(counts[group_id])[:-1])
        for row, length, first, part in zip(ROWS, kv_lens, firsts[group_id], parts, strict=True):
            table[row, first : first + part.size] = part[::-1]  # any order is legal
            slots = expand(table[row], page_size)[:length]
            alive = np.arange(length) >= first * page_size
            for rows, true in zip((k_rows, v_rows), truths, strict=True):
                shape = (int(length), heads.num_heads, heads.k_dim)
                content = torch.randn(shape, generator=generator).to(device, dtype)
                rows[torch.as_tensor(slots[alive], device=device)] = content[alive]
                true.append(content)
        served.tables.append(table)
        served.k_rows.append(k_rows)
        served.v_rows.append(v_rows)
        served.k_true.append(truths[0])
        served.v_true.append(truths[1])
    return served


def queries(group_id: int, q_lens: np.ndarray, dtype: torch.dtype, device: str) -> torch.Tensor:
    heads = HEADS[group_id]
    shape = (int(q_lens.sum()), heads.num_heads * Q_PER_KV, heads.k_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)


def plan_of(
    served: Served, group_id: int, kv_lens: np.ndarray, q_lens: np.ndarray, page_size: int
) -> PagedPlan:
    if group_id == 0:
        return plan_full(served.tables[0], ROWS, kv_lens, page_size)
    return plan_window(served.tables[1], ROWS, kv_lens, page_size, window=WINDOW, q_lens=q_lens)


def dense_attention(served: Served, group_id: int, q: torch.Tensor, q_lens: np.ndarray):
    """Query by query over the true K and V: no pages, no masks."""
    window = WINDOW if group_id else 1 << 30
    out, at = [], 0
    truths = zip(served.k_true[group_id], served.v_true[group_id], q_lens, strict=True)
    for k, v, num_queries in truths:
        k, v = (rows.double().repeat_interleave(Q_PER_KV, 1) for rows in (k, v))
        for position in range(len(k) - num_queries, len(k)):
            seen = slice(max(0, position - window + 1), position + 1)
            logits = torch.einsum("hd,khd->kh", q[at].double(), k[seen]) * k.shape[-1] ** -0.5
            out.append(torch.einsum("kh,khd->hd", logits.softmax(0), v[seen]))
            at += 1
    return torch.stack(out)


def lens_for(page_size: int) -> np.ndarray:
    """Shorter than the window, a page exactly or more, and far beyond the window."""
    return np.array([20, max(page_size, WINDOW + 1), 3 * page_size + 2 * WINDOW + 5])
