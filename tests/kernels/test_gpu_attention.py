"""Attention kernels of a GPU on the pool's strided views, against float64.

FlashInfer with our plans over a pool that two groups share; and every kernel that SGLang serves
with, over every layout that `benchmarks/gpu/bench_attention.py` times.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.kernels.attention import attention_reference, paged_views
from sglang_jenga.kernels.scatter_kv import scatter_kv
from sglang_jenga.pages.tables import expand
from sglang_jenga.testing.attention_batch import Batch, expected, fill
from sglang_jenga.testing.attention_kernels import (
    FLASHINFER_WORKSPACE_BYTES,
    KERNELS,
    Attend,
    missing,
    prepare,
)
from sglang_jenga.testing.attention_layouts import (
    GROUPS,
    LAYOUTS,
    Attention,
    PagedKV,
    buffer_elements,
    layer_pages,
)
from tests.kernels.conftest import NO_CUDA
from tests.kernels.served import (
    HEADS,
    PAGE_SIZES,
    Q_PER_KV,
    ROWS,
    WINDOW,
    lens_for,
    plan_of,
    queries,
    serve,
)

pytestmark = [pytest.mark.gpu, NO_CUDA]


@pytest.fixture(scope="module")
def workspace() -> torch.Tensor:
    return torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def on_gpu(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.as_tensor(array, dtype=torch.int32, device="cuda") for array in arrays]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group_id", [0, 1])
def test_flashinfer_decodes_as_the_reference(workspace, page_size, group_id):
    flashinfer = pytest.importorskip("flashinfer")
    lens, ones = lens_for(page_size), np.ones(3, dtype=np.int64)
    served = serve(page_size, lens, ones, torch.bfloat16, "cuda")
    q = queries(group_id, ones, torch.bfloat16, "cuda")
    pages = paged_views(served.k_rows[group_id], served.v_rows[group_id], page_size)
    plan = plan_of(served, group_id, lens, ones, page_size)
    heads, window = HEADS[group_id], WINDOW if group_id else None
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


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group_id", [0, 1])
def test_flashinfer_prefills_as_the_reference(workspace, page_size, group_id):
    flashinfer = pytest.importorskip("flashinfer")
    lens, q_lens = lens_for(page_size), np.array([20, 7, 41])
    served = serve(page_size, lens, q_lens, torch.bfloat16, "cuda")
    q = queries(group_id, q_lens, torch.bfloat16, "cuda")
    pages = paged_views(served.k_rows[group_id], served.v_rows[group_id], page_size)
    plan = plan_of(served, group_id, lens, q_lens, page_size)
    heads, window = HEADS[group_id], WINDOW if group_id else None
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


def small(group: Attention) -> Attention:
    """With a window that a short batch can outgrow, and few layers."""
    window = None if group.window is None else WINDOW
    heads = (group.num_q_heads, group.num_kv_heads, group.dim)
    return Attention(group.model, 5, *heads, window=window)


def attending(kernel: str, batch: Batch, group: Attention, workspace: torch.Tensor) -> Attend:
    reason = missing(kernel)
    if reason:
        pytest.skip(f"{kernel} {reason}")
    return prepare(kernel, batch, group, "cuda", workspace)


def layer_of(layout: str, group: Attention, batch: Batch) -> PagedKV:
    """A layer in a buffer whose other layers are NaN.

    The null page is large numbers instead: FlashInfer and FlashAttention may multiply by 0 what a
    mask hides, and a pool never shows them NaN.
    """
    size = buffer_elements(layout, group, batch.num_pages, batch.page_size)
    buffer = torch.full((size,), float("nan"), dtype=torch.bfloat16, device="cuda")
    kv = layer_pages(layout, buffer, group, 2 % group.num_layers, batch.num_pages, batch.page_size)
    fill(kv)
    for part in kv:
        part[0] = 1e3
    return kv


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.label)
@pytest.mark.parametrize("q_lens", [(1, 1, 1, 1), (60, 1, 33, 200)], ids=["decode", "prefill"])
def test_every_kernel_reads_every_layout(workspace, kernel, layout, page_size, group, q_lens):
    group = small(group)
    batch = Batch.of([61, 1, WINDOW, 517], list(q_lens), page_size)
    kv = layer_of(layout, group, batch)
    shape = (int(batch.q_lens.sum()), group.num_q_heads, group.dim)
    q = torch.randn(shape, device="cuda").to(torch.bfloat16)

    out = attending(kernel, batch, group, workspace)(q, kv)

    want = expected(q, kv, batch, group.window)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.label)
def test_sglang_stores_into_our_views_what_we_would(group):
    kvcache = pytest.importorskip("sglang.kernels.ops.kvcache.kvcache")
    if not kvcache.can_use_store_cache(group.row * 2):
        pytest.skip("SGLang cannot compile its store kernel here")
    group = small(group)
    shape = (2, 40, group.num_kv_heads, group.dim)
    k, v = torch.randn(shape, device="cuda").to(torch.bfloat16)
    loc = torch.randperm(99, device="cuda")[:40] + 1
    buffers = []
    for _ in range(2):
        size = buffer_elements("token-major", group, 100, 1)
        buffers.append(torch.full((size,), 7.0, dtype=torch.bfloat16, device="cuda"))
    theirs, ours = (layer_pages("token-major", each, group, 2, 100, 1).rows() for each in buffers)

    kvcache.store_cache(*(part.view(-1, group.row) for part in (k, v, *theirs)), loc)
    scatter_kv(k, v, loc, *ours)

    assert torch.equal(*buffers)
    assert torch.equal(ours.k[loc], k)
