"""Tensors in whole large pages: what is read is what was written, and nobody else's bytes move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_jenga.layers.full import Full
from sglang_jenga.layers.window import Window
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.memory.byte_strings import ByteStrings
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup

FULL = HeadShape(num_heads=2, k_dim=8, v_dim=8)
UNEQUAL = HeadShape(num_heads=1, k_dim=6, v_dim=3)


def lone(heads: HeadShape, dtype: torch.dtype, page_size: int):
    """A model of full attention alone, each layer's rows together: buffer and its views."""
    entry = heads.entry_bytes(2, dtype.itemsize)
    plan = plan_pool([LayerGroup(Full(), (0, 1), entry, page_size)], 1 << 16)
    buffer = PoolBuffer(plan, "cpu", enable_memory_saver=False)
    return buffer, [buffer.layer_views(0, heads, dtype)]


def two_groups(heads: HeadShape, dtype: torch.dtype, page_size: int):
    """Full attention beside windows."""
    entry = heads.entry_bytes(2, dtype.itemsize)
    groups = [
        LayerGroup(Full(), (0, 1), entry, page_size),
        LayerGroup(Window(8), (2, 3), entry, page_size),
    ]
    buffer = PoolBuffer(plan_pool(groups, 1 << 16), "cpu", enable_memory_saver=False)
    return buffer, [buffer.layer_views(group, heads, dtype) for group in (0, 1)]


POOLS = pytest.mark.parametrize("make", [lone, two_groups])
HEADS = pytest.mark.parametrize("heads", [FULL, UNEQUAL], ids=["equal", "unequal"])
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])


@POOLS
@HEADS
@TYPES
@pytest.mark.parametrize("page_size", [1, 16])
def test_tensors_come_back_as_they_were(make, heads, dtype, page_size: int):
    buffer, _ = make(heads, dtype, page_size)
    strings = ByteStrings(buffer)
    assert strings.page_bytes <= buffer.plan.large_page_bytes
    pages = np.random.default_rng(0).permutation(np.arange(1, buffer.plan.num_large))
    tensors = [
        torch.randn(37, 20),
        torch.randn(3, 5, 24).to(torch.bfloat16),
        torch.arange(8 * 7, dtype=torch.float16).view(8, 7).T,  # its rows are not together
        torch.empty(0, 20),
    ]
    places = []
    for tensor in tensors:
        count = strings.num_larges(tensor)
        place, pages = pages[:count], pages[count:]
        strings.write(place, tensor)
        places.append(place)

    for tensor, place in zip(tensors, places, strict=True):
        read = strings.read(place, tensor.shape, tensor.dtype)
        assert torch.equal(read, tensor)
        assert read.is_contiguous()


@POOLS
@HEADS
@pytest.mark.parametrize("page_size", [1, 16])
def test_slots_of_other_large_pages_keep_their_bytes(make, heads, page_size: int):
    buffer, views = make(heads, torch.float32, page_size)
    plan = buffer.plan
    place = np.array([plan.num_large - 1, 2])
    for keys, values in views:
        for view in (*keys, *values):
            view.fill_(1.0)
    strings = ByteStrings(buffer)

    strings.write(place, torch.full((2 * strings.page_bytes,), 7, dtype=torch.uint8))

    sevens = torch.tensor([7] * 4, dtype=torch.uint8).view(torch.float32)
    for group_id, (keys, values) in enumerate(views):
        slots = plan.num_slots(group_id) // plan.num_large
        for view in (*keys, *values):
            by_large = view.reshape(plan.num_large, slots, -1)
            mine = torch.zeros(plan.num_large, dtype=torch.bool)
            mine[torch.from_numpy(place)] = True
            assert (by_large[~mine] == 1.0).all()
            assert (by_large[mine] == sevens).all()


@POOLS
@HEADS
def test_zeroed_large_pages_read_as_zeros_through_every_view(make, heads):
    buffer, views = make(heads, torch.float32, 16)
    plan = buffer.plan
    buffer.bytes.fill_(0xFF)

    buffer.zero_large_pages([1, plan.num_large - 1], None)

    for group_id, (keys, values) in enumerate(views):
        slots = plan.num_slots(group_id) // plan.num_large
        for view in (*keys, *values):
            by_large = view.reshape(plan.num_large, slots, -1)
            assert not by_large[1].any()
            assert not by_large[-1].any()
            assert by_large[2:-1].isnan().all()


def test_an_image_of_other_bytes_than_kv_leaves_no_nan_to_the_next_owner():
    buffer, views = lone(FULL, torch.float32, 1)
    strings = ByteStrings(buffer)
    place = np.array([3, 4])
    strings.write(place, torch.full((2 * strings.page_bytes,), 0xFF, dtype=torch.uint8))
    assert views[0][0][0][3:5].isnan().all()

    buffer.zero_large_pages([3, 4], None)

    assert not buffer.bytes.any()
