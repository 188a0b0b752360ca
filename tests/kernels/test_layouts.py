"""The layouts that attention is timed on are what they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.layers.full import Full
from sglang_jenga.layers.window import Window
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.testing.attention_batch import Batch, error, expected, fill
from sglang_jenga.testing.attention_layouts import (
    GROUPS,
    LAYOUTS,
    Attention,
    buffer_elements,
    layer_pages,
)

GROUP = Attention("small", 3, 4, 2, 8)
PAGES, PAGE_SIZE, LAYER = 5, 4, 1


def numbered(layout: str, page_size: int = PAGE_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer of a buffer whose elements say where they lie."""
    buffer = torch.arange(buffer_elements(layout, GROUP, PAGES, page_size))
    return layer_pages(layout, buffer, GROUP, LAYER, PAGES, page_size)


def test_contiguous_is_two_dense_buffers():
    k, v = numbered("contiguous")

    assert torch.equal(k.ravel(), torch.arange(k.numel()))
    assert torch.equal(v.ravel(), torch.arange(k.numel(), 2 * k.numel()))


def test_token_major_is_the_pools_own_layout():
    """Byte for byte where PoolBuffer puts a group that shares its bytes."""
    heads = HeadShape(GROUP.num_kv_heads, GROUP.dim, GROUP.dim)
    groups = [
        LayerGroup(Full(), (0, 1, 2), heads.entry_bytes(3, 4), PAGE_SIZE),
        LayerGroup(Window(8), (3, 4, 5), heads.entry_bytes(3, 4), PAGE_SIZE),
    ]
    pool = PoolBuffer(plan_pool(groups, 1 << 20), "cpu", enable_memory_saver=False)
    pages = pool.plan.num_small(0)
    theirs = pool.layer_views(0, heads, torch.float32)

    ours = layer_pages(
        "token-major", pool.bytes.view(torch.float32), GROUP, LAYER, pages, PAGE_SIZE
    )

    for view, want in zip(ours.rows(), (theirs[0][LAYER], theirs[1][LAYER]), strict=True):
        assert (view.shape, view.stride(), view.data_ptr()) == (
            want.shape,
            want.stride(),
            want.data_ptr(),
        )


def test_page_layer_keeps_a_page_of_a_layer_together():
    k, v = numbered("page-layer")

    for page in range(PAGES):
        together = torch.cat([k[page].ravel(), v[page].ravel()])
        start = page * PAGE_SIZE * GROUP.entry + LAYER * together.numel()
        assert torch.equal(together, torch.arange(start, start + together.numel()))


def test_with_one_token_a_page_page_layer_is_token_major():
    for ours, theirs in zip(numbered("page-layer", 1), numbered("token-major", 1), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("layout", LAYOUTS[1:])  # contiguous holds one layer
def test_layers_share_no_element(layout):
    buffer = torch.zeros(buffer_elements(layout, GROUP, PAGES, PAGE_SIZE))

    for layer in range(GROUP.num_layers):
        for part in layer_pages(layout, buffer, GROUP, layer, PAGES, PAGE_SIZE):
            part += 1

    assert (buffer == 1).all()


def test_only_page_layer_has_no_view_by_slot():
    for layout in LAYOUTS:
        k, v = numbered(layout)
        kv = type(numbered(layout))(k, v)
        assert kv.has_rows == (layout != "page-layer")
    with pytest.raises(ValueError, match="no view by slot"):
        numbered("page-layer").rows()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.label)
def test_every_layout_of_every_model_suits_flashinfer(group):
    """16-byte loads, page strides in 32 bits: what sglang_jenga.kernels.attention demands."""
    for layout in LAYOUTS:
        for page_size in (1, 16, 64):
            buffer = torch.empty(
                buffer_elements(layout, group, 2, page_size), dtype=torch.bfloat16, device="meta"
            )
            kv = layer_pages(layout, buffer, group, group.num_layers // 2, 2, page_size)
            for part in kv:
                assert part.stride(0) < 1 << 32
                assert not any(2 * n % 16 for n in (part.storage_offset(), *part.stride()[:3]))
            assert kv.k.stride() == kv.v.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_says_the_same_in_every_layout(layout):
    batch = Batch.of([9, 1, 14], [3, 1, 14], PAGE_SIZE)
    answers = []
    for name in ("contiguous", layout):
        buffer = torch.empty(buffer_elements(name, GROUP, batch.num_pages, PAGE_SIZE))
        kv = layer_pages(name, buffer, GROUP, LAYER, batch.num_pages, PAGE_SIZE)
        fill(kv)
        q = torch.randn(18, 4, 8, generator=torch.Generator().manual_seed(0))
        answers.append(expected(q, kv, batch, None))

    assert torch.equal(*answers)
    assert answers[0].isfinite().all()
    assert error(answers[1], q, kv, batch, None) < 1e-12
    answers[1][-1, 0, 0] += 0.5
    assert error(answers[1], q, kv, batch, None) == pytest.approx(0.5)


def test_a_batch_takes_every_page_once_and_never_the_null_page():
    batch = Batch.of([9, 1, 14], [1, 1, 1], PAGE_SIZE)

    slots = batch.slots(np.zeros(3, dtype=int), batch.kv_lens)

    assert slots.size == np.unique(slots).size == 24
    assert slots.min() >= PAGE_SIZE
    assert slots.max() < batch.num_pages * PAGE_SIZE


def test_bytes_read_count_what_a_window_leaves():
    batch = Batch.of([100, 3], [1, 1], PAGE_SIZE)

    assert batch.bytes_read(GROUP, 2) == 103 * 2 * 16 * 2
    assert batch.bytes_read(Attention("w", 1, 4, 2, 8, window=10), 2) == 13 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("layout", "layer", "length", "message"),
    [
        ("page-major", 0, 10_000, "expected one of"),
        ("contiguous", 3, 10_000, "and a layer of"),
        ("token-major", 0, 10, r"buffer: expected \[1920\] or more, got \[10\]"),
    ],
)
def test_a_bad_call_is_refused_in_one_line(layout, layer, length, message):
    with pytest.raises(ValueError, match=message) as caught:
        layer_pages(layout, torch.zeros(length), GROUP, layer, PAGES, PAGE_SIZE)

    assert "\n" not in str(caught.value)
