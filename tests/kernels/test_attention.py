"""Plan arrays and views for FlashInfer, over a pool that two groups share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from sglang_jenga.allocator import Allocator
from sglang_jenga.kernels.attention import (
    PagedPlan,
    attention_reference,
    paged_views,
    plan_full,
    plan_window,
)
from sglang_jenga.page_tables import expand
from sglang_jenga.planner import plan_pool
from sglang_jenga.pool import HeadShape, PoolBuffer
from sglang_jenga.spec import LayerGroup

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
        LayerGroup(kind, tuple(range(layers)), heads.entry_bytes(layers, 2), page_size, window)
        for kind, layers, heads, window in (
            ("full", NUM_LAYERS[0], HEADS[0], None),
            ("window", NUM_LAYERS[1], HEADS[1], WINDOW),
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


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_full_plan_lists_every_page_of_each_request(page_size):
    table = np.random.default_rng(0).integers(1, 1 << 30, (8, 50), dtype=np.int32)
    kv_lens = np.array([1, page_size, 50 * page_size])

    plan = plan_full(table, ROWS, kv_lens, page_size)

    counts = [1, 1, 50]
    assert plan.indptr.tolist() == [0, *np.cumsum(counts)]
    pages = [table[row, :count] for row, count in zip(ROWS, counts, strict=True)]
    assert plan.indices.tolist() == np.concatenate(pages).tolist()
    assert plan.last_page_len.tolist() == [1, page_size, page_size]
    assert plan.first_positions.tolist() == [0, 0, 0]
    assert {array.dtype for array in plan} == {np.dtype(np.int32)}


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("window", [1, 16, 37, 1000])
@pytest.mark.parametrize("num_queries", [1, 5, 40])
def test_window_plan_lists_exactly_the_pages_that_a_query_reads(page_size, window, num_queries):
    rng = np.random.default_rng(page_size)
    table = rng.permutation(8 * 700).reshape(8, 700).astype(np.int32)
    kv_lens = rng.integers(40, 600, ROWS.size)
    q_lens = np.full(ROWS.size, num_queries)

    plan = plan_window(table, ROWS, kv_lens, page_size, window=window, q_lens=q_lens)

    for i, (row, length) in enumerate(zip(ROWS, kv_lens, strict=True)):
        read = {
            position // page_size
            for query in range(length - num_queries, length)
            for position in range(max(0, query - window + 1), query + 1)
        }
        pages = plan.indices[plan.indptr[i] : plan.indptr[i + 1]]
        assert pages.tolist() == table[row, sorted(read)].tolist()
        assert plan.first_positions[i] == min(read) * page_size
        planned = (pages.size - 1) * page_size + plan.last_page_len[i]
        assert plan.first_positions[i] + planned == length


def test_window_plan_takes_one_query_each_unless_told():
    table, kv_lens = np.arange(800).reshape(8, 100), np.array([0, 3, 90])

    plan = plan_window(table, ROWS, kv_lens, 4, window=8)

    told = plan_window(table, ROWS, kv_lens, 4, window=8, q_lens=np.array([0, 1, 1]))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(plan, told, strict=True))
    # Tokens 82 to 89 of the last request lie in pages 20, 21 and 22.
    assert plan.indices.tolist() == [100, 620, 621, 622]
    assert plan.last_page_len.tolist() == [0, 3, 2]
    assert plan.first_positions.tolist() == [0, 0, 80]


@pytest.mark.parametrize("window", [None, 6])
def test_no_requests_and_requests_without_tokens_make_plans(window):
    table = np.ones((8, 4), dtype=np.int32)
    for kv_lens in (np.array([], dtype=np.int64), np.zeros(3, dtype=np.int64)):
        rows = ROWS[: kv_lens.size]
        if window is None:
            plan = plan_full(table, rows, kv_lens, 4)
        else:
            plan = plan_window(table, rows, kv_lens, 4, window=window, q_lens=kv_lens)

        assert plan.indptr.tolist() == [0] * (kv_lens.size + 1)
        assert plan.indices.size == 0
        assert plan.last_page_len.tolist() == plan.first_positions.tolist() == [0] * kv_lens.size


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group_id", [0, 1])
def test_views_are_the_pool_itself_by_page(page_size, group_id):
    lens = lens_for(page_size)
    served = serve(page_size, lens, np.ones(3, dtype=int), torch.bfloat16, "cpu")
    k_rows, v_rows = served.k_rows[group_id], served.v_rows[group_id]

    k_pages, v_pages = paged_views(k_rows, v_rows, page_size)

    heads = HEADS[group_id]
    for rows, pages in ((k_rows, k_pages), (v_rows, v_pages)):
        assert pages.shape == (len(rows) // page_size, page_size, heads.num_heads, heads.k_dim)
        assert pages.data_ptr() == rows.data_ptr()
        pages[2, page_size - 1] = 5.0
        assert (rows[3 * page_size - 1] == 5.0).all()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group_id", [0, 1])
@pytest.mark.parametrize("num_queries", [1, 11])
def test_planned_pages_hold_all_that_attention_reads(page_size, group_id, num_queries):
    lens, q_lens = lens_for(page_size), np.full(3, num_queries)
    served = serve(page_size, lens, q_lens, torch.bfloat16, "cpu")
    q = queries(group_id, q_lens, torch.bfloat16, "cpu")
    pages = paged_views(served.k_rows[group_id], served.v_rows[group_id], page_size)
    plan = plan_of(served, group_id, lens, q_lens, page_size)

    window = WINDOW if group_id else None
    out = attention_reference(q, *pages, plan, q_lens, window=window)

    torch.testing.assert_close(out, dense_attention(served, group_id, q, q_lens))


def test_reference_scales_and_caps_logits():
    k_pages = torch.tensor([[[[2.0]], [[0.0]]]])
    v_pages = torch.tensor([[[[1.0]], [[0.0]]]])
    plan = plan_full(np.array([[0]]), np.array([0]), np.array([2]), 2)
    q = torch.tensor([[[3.0]]])

    def weight(**options: float) -> float:
        return float(attention_reference(q, k_pages, v_pages, plan, np.array([1]), **options))

    assert weight() == pytest.approx(1 / (1 + np.exp(-6)))
    assert weight(scale=0.5) == pytest.approx(1 / (1 + np.exp(-3)))
    capped = 2 * np.tanh(6 / 2)
    assert weight(logits_soft_cap=2.0) == pytest.approx(1 / (1 + np.exp(-capped)))


TABLE = np.ones((8, 4), dtype=np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size: expected at least 1, got 0"),
        (
            {"table": np.ones(4, dtype=np.int32)},
            r"table: expected integers \[num_rows, max_pages\]",
        ),
        ({"table": np.ones((8, 4))}, "table: expected integers"),
        ({"rows": np.array([0.5, 1, 2])}, r"rows: expected integers \[3\], got float64"),
        ({"rows": np.array([0, 1, 8])}, r"rows: expected in \[0, 8\), got 0-8"),
        ({"rows": np.array([[0, 1, 2]])}, r"rows: expected integers \[3\], got int64 \[1, 3\]"),
        ({"kv_lens": np.array([1, 2])}, r"kv_lens: expected integers \[3\]"),
        ({"kv_lens": np.array([1, 2, 17])}, r"kv_lens: expected in \[0, 16\], got 1-17"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"q_lens": np.array([1, 2, 4])}, "q_lens: expected between 0 and kv_lens"),
        ({"q_lens": np.array([1])}, r"q_lens: expected integers \[3\]"),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(change, message):
    call = {
        "table": TABLE,
        "rows": np.array([0, 1, 2]),
        "kv_lens": np.array([1, 2, 3]),
        "page_size": 4,
        "window": 8,
    }

    with pytest.raises(ValueError, match=message) as caught:
        plan_window(**call | change)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("k_rows", "v_rows", "page_size", "message"),
    [
        (torch.zeros(8, 2, 8), torch.zeros(8, 2, 8), 0, "page_size: expected at least 1"),
        (torch.zeros(8, 16), torch.zeros(8, 16), 4, r"k_rows: expected .* \[any, any, any\]"),
        (torch.zeros(8, 2, 8), torch.zeros(8, 2, 4), 4, r"v_rows: expected float32 \[8, 2, 8\]"),
        (torch.zeros(8, 2, 8), torch.zeros(8, 2, 8).half(), 4, "v_rows: expected float32"),
        (torch.zeros(8, 2, 8), torch.zeros(8, 2, 16)[..., :8], 4, "one set of strides"),
        (torch.zeros(9, 2, 8), torch.zeros(9, 2, 8), 4, "expected a multiple of 4 slots, got 9"),
        (torch.zeros(8, 2, 2), torch.zeros(8, 2, 2), 4, "loads 16 bytes at a time"),
        (torch.zeros(8, 2, 16)[..., ::2], torch.zeros(8, 2, 16)[..., ::2], 4, "element stride 1"),
        (
            torch.zeros(8).expand(8, 1, 8),
            torch.zeros(8).expand(8, 1, 8),
            4,
            "page stride below",
        ),
    ],
)
def test_views_that_flashinfer_cannot_follow_are_refused(k_rows, v_rows, page_size, message):
    with pytest.raises(ValueError, match=message) as caught:
        paged_views(k_rows, v_rows, page_size)

    assert "\n" not in str(caught.value)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.as_tensor(array, dtype=torch.int32, device="cuda") for array in arrays]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group_id", [0, 1])
def test_flashinfer_decodes_as_the_reference(page_size, group_id):
    flashinfer = pytest.importorskip("flashinfer")
    lens, ones = lens_for(page_size), np.ones(3, dtype=np.int64)
    served = serve(page_size, lens, ones, torch.bfloat16, "cuda")
    q = queries(group_id, ones, torch.bfloat16, "cuda")
    pages = paged_views(served.k_rows[group_id], served.v_rows[group_id], page_size)
    plan = plan_of(served, group_id, lens, ones, page_size)
    heads, window = HEADS[group_id], WINDOW if group_id else None
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *on_gpu(plan.indptr, plan.indices, plan.last_page_len),
        heads.num_heads * Q_PER_KV,
        heads.num_heads,
        heads.k_dim,
        page_size,
        window_left=-1 if window is None else window - 1,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )

    out = wrapper.run(q, pages)

    want = attention_reference(q, *pages, plan, ones, window=window)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group_id", [0, 1])
def test_flashinfer_prefills_as_the_reference(page_size, group_id):
    flashinfer = pytest.importorskip("flashinfer")
    lens, q_lens = lens_for(page_size), np.array([20, 7, 41])
    served = serve(page_size, lens, q_lens, torch.bfloat16, "cuda")
    q = queries(group_id, q_lens, torch.bfloat16, "cuda")
    pages = paged_views(served.k_rows[group_id], served.v_rows[group_id], page_size)
    plan = plan_of(served, group_id, lens, q_lens, page_size)
    heads, window = HEADS[group_id], WINDOW if group_id else None
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *on_gpu(np.append(0, np.cumsum(q_lens)), plan.indptr, plan.indices, plan.last_page_len),
        heads.num_heads * Q_PER_KV,
        heads.num_heads,
        heads.k_dim,
        page_size,
        causal=True,
        window_left=-1 if window is None else window - 1,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )

    out = wrapper.run(q, pages)

    want = attention_reference(q, *pages, plan, q_lens, window=window)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group_id", [0, 1])
def test_flashinfer_appends_into_the_pool(page_size, group_id):
    """The last tokens of each request are wiped, then appended; positions are the plan's own."""
    flashinfer = pytest.importorskip("flashinfer")
    lens, q_lens = lens_for(page_size), np.array([20, 7, 41])
    served = serve(page_size, lens, q_lens, torch.bfloat16, "cuda")
    k_rows, v_rows = served.k_rows[group_id], served.v_rows[group_id]
    plan = plan_of(served, group_id, lens, q_lens, page_size)
    before = k_rows.clone(), v_rows.clone()
    new = [
        torch.cat([true[-count:] for true, count in zip(truths[group_id], q_lens, strict=True)])
        for truths in (served.k_true, served.v_true)
    ]
    for row, length, count in zip(ROWS, lens, q_lens, strict=True):
        slots = expand(served.tables[group_id][row], page_size)[length - count : length]
        k_rows[torch.as_tensor(slots, device="cuda")] = 0
        v_rows[torch.as_tensor(slots, device="cuda")] = 0
    pages = paged_views(k_rows, v_rows, page_size)
    append_indptr, indptr, indices, last_page_len = on_gpu(
        np.append(0, np.cumsum(q_lens)), plan.indptr, plan.indices, plan.last_page_len
    )
    batch_indices, positions = flashinfer.get_batch_indices_positions(
        append_indptr,
        flashinfer.get_seq_lens(indptr, last_page_len, page_size),
        int(q_lens.sum()),
    )

    flashinfer.append_paged_kv_cache(
        *new, batch_indices, positions, pages, indices, indptr, last_page_len, "NHD"
    )

    assert torch.equal(k_rows, before[0])
    assert torch.equal(v_rows, before[1])
