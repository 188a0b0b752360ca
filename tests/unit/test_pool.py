"""The byte buffer and its views, on the CPU: no server needed."""

from __future__ import annotations

import pytest
import torch

from sglang_jenga.layers.base import Load
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.window import Window
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup

FULL = HeadShape(num_heads=2, k_dim=8, v_dim=8)
WINDOW = HeadShape(num_heads=1, k_dim=4, v_dim=8)


def encoder_buffer(dtype: torch.dtype) -> PoolBuffer:
    """Two layers of self attention and one of cross attention, in one small pool."""
    heads = HeadShape(2, 8, 8)
    groups = [
        LayerGroup(Full(), (0, 2), heads.entry_bytes(2, dtype.itemsize), element=str(dtype)),
        LayerGroup(Cross(), (1,), heads.entry_bytes(1, dtype.itemsize), element=str(dtype)),
    ]
    return PoolBuffer(plan_pool(groups, 1 << 16, largest=Load(4)), "cpu", enable_memory_saver=False)


def buffer_of(page_size: int, dtype: torch.dtype, other: torch.dtype | None = None) -> PoolBuffer:
    """Two full layers and three window layers with other head shapes, in one small pool."""
    other = other or dtype
    groups = [
        LayerGroup(
            Full(), (0, 3), FULL.entry_bytes(2, dtype.itemsize), page_size, element=str(dtype)
        ),
        LayerGroup(
            Window(8),
            (1, 2, 4),
            WINDOW.entry_bytes(3, other.itemsize),
            page_size,
            element=str(other),
        ),
    ]
    return PoolBuffer(plan_pool(groups, 1 << 20), "cpu", enable_memory_saver=False)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_writes_through_a_slot_stay_inside_its_small_page(page_size: int, dtype: torch.dtype):
    buffer = buffer_of(page_size, dtype)
    for group_id, heads in enumerate((FULL, WINDOW)):
        group = buffer.plan.groups[group_id]
        keys, values = buffer.layer_views(group_id, heads, dtype)
        small_id = 3
        buffer.bytes.zero_()
        for views in (keys, values):
            for view in views:
                view[small_id * page_size : (small_id + 1) * page_size] = 1.0

        touched = torch.nonzero(buffer.bytes).ravel()

        start = small_id * group.small_page_bytes
        assert touched.min() >= start
        assert touched.max() < start + group.small_page_bytes


def test_layers_of_an_entry_do_not_overlap():
    buffer = buffer_of(1, torch.float32)
    keys, values = buffer.layer_views(1, WINDOW, torch.float32)
    views = [*keys, *values]
    for number, view in enumerate(views):
        view[5] = float(number + 1)

    for number, view in enumerate(views):
        assert (view[5] == number + 1).all()


def test_every_byte_of_an_entry_belongs_to_a_layer():
    buffer = buffer_of(1, torch.float32)
    keys, values = buffer.layer_views(0, FULL, torch.float32)
    per_layer = keys[0][0].numel() + values[0][0].numel()

    assert len(keys) * per_layer * 4 == buffer.plan.groups[0].group.entry_bytes


def test_a_lone_group_has_the_layout_of_stock_sglang():
    plan = plan_pool([LayerGroup(Full(), (0, 1), FULL.entry_bytes(2, 4), 16)], 1 << 20)
    keys, values = PoolBuffer(plan, "cpu", enable_memory_saver=False).layer_views(
        0, FULL, torch.float32
    )

    assert all(view.is_contiguous() for view in (*keys, *values))
    assert sum(view.numel() * 4 for view in (*keys, *values)) == plan.pool_bytes


def test_a_large_page_that_changes_format_is_zeroed_before_its_new_owner_writes():
    buffer = buffer_of(1, torch.float32, other=torch.bfloat16)
    core = Allocator(buffer.plan)
    everything = core.obtainable(0)
    (ids, _) = core.alloc(["r"], [[everything], [0]])
    assert core.large.take_stale() == []  # a zeroed pool reads as zero in any format
    for view in (*buffer.layer_views(0, FULL, torch.float32)[0],):
        view[torch.from_numpy(ids)] = float("nan")
    core.free(0, ids)

    (_, ids) = core.alloc(["r"], [[0], [core.obtainable(1)]])
    buffer.zero_large_pages(core.large.take_stale(), None)

    for view in buffer.layer_views(1, WINDOW, torch.bfloat16)[0]:
        assert torch.isfinite(view[torch.from_numpy(ids)]).all()
    assert core.large.take_stale() == []


def test_pages_that_stay_in_their_format_keep_their_bytes():
    buffer = buffer_of(1, torch.float32)
    core = Allocator(buffer.plan)
    (ids, _) = core.alloc(["r"], [[8], [0]])
    core.free(0, ids)

    core.alloc(["r"], [[0], [8]])

    assert core.large.take_stale() == []


def test_an_entry_that_does_not_fit_the_format_is_refused():
    plan = plan_pool([LayerGroup(Full(), (0,), 6)], 600)
    buffer = PoolBuffer(plan, "cpu", enable_memory_saver=False)

    with pytest.raises(ValueError, match="no multiple"):
        buffer.layer_views(0, HeadShape(1, 1, 1), torch.float32)


def test_after_a_flush_the_pool_still_knows_what_format_bytes_have():
    buffer = buffer_of(1, torch.float32, other=torch.bfloat16)
    core = Allocator(buffer.plan)
    (ids, _) = core.alloc(["r"], [[core.obtainable(0)], [0]])
    for view in buffer.layer_views(0, FULL, torch.float32)[0]:
        view[torch.from_numpy(ids)] = float("nan")
    core.free(0, ids)
    core.clear()

    (_, ids) = core.alloc(["r"], [[0], [core.obtainable(1)]])
    buffer.zero_large_pages(core.large.take_stale(), None)

    for view in buffer.layer_views(1, WINDOW, torch.bfloat16)[0]:
        assert torch.isfinite(view[torch.from_numpy(ids)]).all()


def test_backends_find_a_layer_by_the_number_that_the_pool_begins_with():
    """Triton's asks for it; on the second stage of a pipeline that is not 0."""
    from sglang_jenga.memory.kv import JengaSWAPool

    dtype = torch.float32
    groups = [
        LayerGroup(kind, layer_ids, heads.entry_bytes(len(layer_ids), 4), 1, str(dtype))
        for kind, layer_ids, heads in ((Full(), (7,), FULL), (Window(8), (4, 5, 6), WINDOW))
    ]
    buffer = PoolBuffer(plan_pool(groups, 1 << 20), "cpu", enable_memory_saver=False)

    pool = JengaSWAPool(buffer, (FULL, WINDOW), dtype)

    assert pool.start_layer == 4
    assert pool.get_value_buffer(pool.start_layer).shape[1:] == (WINDOW.num_heads, WINDOW.v_dim)


def test_pools_have_all_that_backends_may_ask_of_sglangs_own():
    """SGLang's constructors of buffers, or of a pool as a whole, do not run for ours."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    from sglang_jenga.memory.kv import JengaCrossPool, JengaMHAPool, JengaSWAPool

    buffer, dtype = buffer_of(1, torch.float32), torch.float32
    heads = HeadShape(2, 8, 8)
    common = {"size": 64, "page_size": 1, "dtype": dtype, "device": "cpu"}
    common |= {"head_num": heads.num_heads, "head_dim": heads.k_dim, "enable_memory_saver": False}
    stock = MHATokenToKVPool(layer_num=2, **common)

    assert vars(stock).keys() - vars(JengaMHAPool(buffer, 0, heads, dtype)).keys() == set()
    cross = JengaCrossPool(encoder_buffer(dtype), (heads, heads), dtype)
    assert vars(stock).keys() - vars(cross).keys() == set()

    common.pop("enable_memory_saver")
    stock = SWAKVPool(
        size_swa=64,
        swa_attention_layer_ids=[1, 2, 4],
        full_attention_layer_ids=[0, 3],
        token_to_kv_pool_class=MHATokenToKVPool,
        enable_memory_saver=False,
        **common,
    )

    assert vars(stock).keys() - vars(JengaSWAPool(buffer, (FULL, WINDOW), dtype)).keys() == set()
