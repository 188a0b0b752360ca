"""What FlashInfer's paged attention takes: plan arrays from page tables, and views of the pool.

No kernel of our own: FlashInfer follows any page and slot stride, so it reads a group's K and V in
place. ``paged_views`` gives what ``BatchDecodeWithPagedKVCacheWrapper``,
``BatchPrefillWithPagedKVCacheWrapper`` and ``append_paged_kv_cache`` call ``paged_kv_cache``, in
NHD layout; ``plan_full`` and ``plan_window`` give ``indptr``, ``indices`` and ``last_page_len``.

A window group leaves out the pages that no query reads. Then FlashInfer counts positions from the
first page that is left. Its causal and window masks look only at distances to the last token, so
they stay right with ``window_left = window - 1``; whoever needs true positions, as rotary embedding
inside the kernel does, adds ``first_positions``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sglang_jenga.kernels.launch import check_tensor


class PagedPlan(NamedTuple):
    """Which pages a batch reads in one layer group, all int32 on the host.

    ``indptr[i]`` to ``indptr[i + 1]`` are request i's places in ``indices``, its small pages in
    order; ``last_page_len[i]`` tokens of its last page count, 0 if it has none. The first token of
    its first page is at position ``first_positions[i]`` of the request.
    """

    indptr: np.ndarray  # [num_requests + 1]
    indices: np.ndarray  # [num_pages]
    last_page_len: np.ndarray  # [num_requests]
    first_positions: np.ndarray  # [num_requests], tokens


def plan_full(
    table: np.ndarray, rows: np.ndarray, kv_lens: np.ndarray, page_size: int
) -> PagedPlan:
    """Plan over all pages of each request.

    Args:
        table: small ids of the group by row and page, shape [num_rows, max_pages], integers.
        rows: the requests' rows, shape [num_requests], integers.
        kv_lens: tokens each request has, those of this step included, shape [num_requests].
        page_size: tokens per small page.

    Raises:
        ValueError: a wrong shape or dtype, or a length outside the table.
    """
    rows, kv_lens = _check(table, rows, kv_lens, page_size)
    return _plan(table, rows, np.zeros_like(kv_lens), kv_lens, page_size)


def plan_window(
    table: np.ndarray,
    rows: np.ndarray,
    kv_lens: np.ndarray,
    page_size: int,
    *,
    window: int,
    q_lens: np.ndarray | None = None,
) -> PagedPlan:
    """Plan over the pages that hold a token which some query of the step reads.

    The query at position p reads ``[p - window + 1, p]``, so of a decoding request the pages that
    intersect its last ``window`` tokens remain. Entries of ``table`` before them are not read.

    Args:
        table, rows, kv_lens, page_size: as for ``plan_full``.
        window: tokens a query sees, its own included; FlashInfer's ``window_left`` is one less.
        q_lens: queries each request has, its last tokens, shape [num_requests]; one each if not
            given.

    Raises:
        ValueError: as ``plan_full``; a window below 1; more queries than tokens.
    """
    rows, kv_lens = _check(table, rows, kv_lens, page_size)
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if q_lens is None:
        q_lens = np.minimum(kv_lens, 1)
    else:
        q_lens = _integers("q_lens", q_lens, rows.shape)
        if (q_lens < 0).any() or (q_lens > kv_lens).any():
            raise ValueError("q_lens: expected between 0 and kv_lens, got one outside")
    starts = np.maximum(kv_lens - q_lens - window + 1, 0)
    return _plan(table, rows, np.minimum(starts, kv_lens), kv_lens, page_size)


def paged_views(
    k_rows: torch.Tensor, v_rows: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's K and V by page, NHD: shape [num_pages, page_size, num_heads, dim], no copy.

    Args:
        k_rows: the layer's view of the pool, shape [num_slots, num_heads, dim], any slot stride.
        v_rows: the same of V, of the same shape, strides and dtype.
        page_size: tokens per small page.

    Raises:
        ValueError: K and V differ, or a layout that FlashInfer cannot follow.
    """
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1, got {page_size}")
    check_tensor("k_rows", k_rows, (k_rows.dtype,), (None, None, None))
    check_tensor("v_rows", v_rows, (k_rows.dtype,), k_rows.shape, k_rows.device)
    if k_rows.stride() != v_rows.stride():
        raise ValueError(
            f"v_rows: FlashInfer takes one set of strides for K and V, got {k_rows.stride()} and "
            f"{v_rows.stride()}"
        )
    slots, heads, dim = k_rows.shape
    slot, head, element = k_rows.stride()
    if slots % page_size:
        raise ValueError(f"k_rows: expected a multiple of {page_size} slots, got {slots}")
    if element != 1 or not 0 < page_size * slot < 1 << 32:
        # FlashInfer keeps strides in 32 bits, offsets in 64.
        raise ValueError(
            f"k_rows: FlashInfer needs element stride 1 and page stride below 2**32, got {element} "
            f"and {page_size * slot}"
        )
    for name, rows in (("k_rows", k_rows), ("v_rows", v_rows)):
        if any(n * rows.element_size() % 16 for n in (slot, head)) or rows.data_ptr() % 16:
            raise ValueError(
                f"{name}: FlashInfer loads 16 bytes at a time, got address {rows.data_ptr()} and "
                f"strides of {slot}, {head} elements of {rows.element_size()} bytes"
            )
    shape, stride = (slots // page_size, page_size, heads, dim), (page_size * slot, slot, head, 1)
    return k_rows.as_strided(shape, stride), v_rows.as_strided(shape, stride)


def attention_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: PagedPlan,
    q_lens: np.ndarray,
    *,
    window: int | None = None,
    scale: float | None = None,
    logits_soft_cap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of each request's last ``q_lens[i]`` tokens over its planned pages.

    Args:
        q: queries of all requests in order, shape [num_queries, num_q_heads, k_dim]; query head h
            reads KV head ``h // (num_q_heads // num_kv_heads)``.
        k_pages: shape [num_pages, page_size, num_kv_heads, k_dim], any strides.
        v_pages: shape [num_pages, page_size, num_kv_heads, v_dim].
        plan: of the group these pages are from.
        q_lens: queries of each request, shape [num_requests].
        window: tokens a query sees, its own included; all before it if None.
        scale: of the logits, ``1 / sqrt(k_dim)`` if None.
        logits_soft_cap: c of ``c * tanh(logits / c)``; 0 for none.

    Returns:
        shape [num_queries, num_q_heads, v_dim], float64. A slow loop, for tests.
    """
    page_size, num_kv_heads, k_dim = k_pages.shape[1:]
    group = q.shape[1] // num_kv_heads
    scale = k_dim**-0.5 if scale is None else scale
    out = torch.zeros(*q.shape[:2], v_pages.shape[3], dtype=torch.float64, device=q.device)
    at = 0
    for i, num_queries in enumerate(int(count) for count in q_lens):
        pages = plan.indices[plan.indptr[i] : plan.indptr[i + 1]]
        ids = torch.as_tensor(pages, dtype=torch.int64, device=q.device)
        length = max(len(pages) - 1, 0) * page_size + int(plan.last_page_len[i])
        k, v = (
            rows[ids].flatten(0, 1)[:length].to(torch.float64).repeat_interleave(group, dim=1)
            for rows in (k_pages, v_pages)
        )
        queries = q[at : at + num_queries].to(torch.float64)
        logits = torch.einsum("qhd,khd->hqk", queries, k) * scale
        if logits_soft_cap:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        position = torch.arange(length, device=q.device)
        behind = position[length - num_queries :, None] - position
        hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[at : at + num_queries] = torch.einsum("hqk,khd->qhd", weights, v)
        at += num_queries
    return out


def _plan(
    table: np.ndarray, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, page_size: int
) -> PagedPlan:
    """Plan over the pages that hold positions ``[starts[i], ends[i])``."""
    first = starts // page_size
    last = -(-ends // page_size)
    # No tokens and no pages: a window that begins inside a page behind the end.
    first = np.minimum(first, last)
    counts = last - first
    indptr = np.zeros(rows.size + 1, dtype=np.int64)
    np.cumsum(counts, out=indptr[1:])
    columns = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - first, counts)
    last_page_len = np.where(counts > 0, ends - (last - 1) * page_size, 0)
    return PagedPlan(
        indptr.astype(np.int32),
        table[np.repeat(rows, counts), columns].astype(np.int32),
        last_page_len.astype(np.int32),
        (first * page_size).astype(np.int32),
    )


def _integers(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != shape or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise ValueError(
            f"{name}: expected integers {list(shape)}, got {values.dtype} {list(values.shape)}"
        )
    return values.astype(np.int64)


def _check(
    table: np.ndarray, rows: np.ndarray, kv_lens: np.ndarray, page_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and lengths as int64."""
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1, got {page_size}")
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            f"table: expected integers [num_rows, max_pages], got {table.dtype} {list(table.shape)}"
        )
    rows = _integers("rows", rows, (np.size(rows),))
    kv_lens = _integers("kv_lens", kv_lens, rows.shape)
    if rows.size and (rows.min() < 0 or rows.max() >= table.shape[0]):
        raise ValueError(f"rows: expected in [0, {table.shape[0]}), got {rows.min()}-{rows.max()}")
    limit = table.shape[1] * page_size
    if rows.size and (kv_lens.min() < 0 or kv_lens.max() > limit):
        raise ValueError(f"kv_lens: expected in [0, {limit}], got {kv_lens.min()}-{kv_lens.max()}")
    return rows, kv_lens
