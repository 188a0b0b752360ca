"""Plan arrays and views for FlashInfer, over a pool that two groups share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.kernels.attention import (
    attention_reference,
    paged_views,
    plan_full,
    plan_window,
)
from tests.kernels.served import (
    HEADS,
    PAGE_SIZES,
    ROWS,
    WINDOW,
    dense_attention,
    lens_for,
    plan_of,
    queries,
    serve,
)


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
