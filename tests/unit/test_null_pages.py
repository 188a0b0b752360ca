"""What padding reads are numbers, whatever padding, states and other tenants have written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_jenga.layers.full import Full
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import STATE_SINK, LayerGroup
from tests.unit.test_state_pool import FULL, HEADS, STATE, pool_of, tensors

SIZES = {"many states a large page": (4, 8, 6), "one state a large page": (64, 64, 64)}


@pytest.fixture(params=SIZES)
def pools(request):
    return pool_of(megabytes=24, temporal=SIZES[request.param])


def null_rows(buffer) -> list[torch.Tensor]:
    """Slot 0 of each KV layer."""
    keys, values = buffer.layer_views(FULL, HEADS, torch.bfloat16)
    return [view[0] for view in (*keys, *values)]


def test_nobody_who_writes_states_touches_the_null_rows_of_keys_and_values(pools):
    buffer, pool = pools
    handed_out = Allocator(buffer.plan).alloc([None], [[0], [pool.size]])[STATE]

    for slot in [STATE_SINK, *handed_out.tolist()]:
        for view in tensors(pool):
            view[:, slot] = torch.nan

    assert not any(row.any() for row in null_rows(buffer))


def test_the_sink_is_nobodys_state(pools):
    buffer, pool = pools
    core = Allocator(buffer.plan)

    handed_out = core.alloc([None], [[0], [pool.size]])[STATE]

    assert handed_out.min() > STATE_SINK
    assert not core.fits_now([0, 1])
    core.check([])


def test_keys_and_values_never_lie_in_the_sink(pools):
    buffer, pool = pools
    core = Allocator(buffer.plan)
    ids = core.alloc([None], [[core.obtainable(FULL)], [0]])[FULL]

    keys, values = buffer.layer_views(FULL, HEADS, torch.bfloat16)
    for view in (*keys, *values):
        view[torch.from_numpy(ids)] = 1

    assert not any(view[:, STATE_SINK].any() for view in tensors(pool))


def test_after_the_capture_of_graphs_the_null_pages_read_as_zeros(pools):
    from sglang_jenga.boot import hook_table
    from sglang_jenga.serving.allocator import JengaTokenAllocator

    buffer, pool = pools
    (hook,) = (row for row in hook_table.BYTES if row.target.endswith(".init_cuda_graphs"))
    allocator = object.__new__(JengaTokenAllocator)
    allocator.buffer, allocator.device = buffer, "cpu"
    for view in tensors(pool):
        view[:, : STATE_SINK + 2] = torch.nan
    for row in null_rows(buffer):
        row.fill_(torch.inf)

    hook.resolved()(None, SimpleNamespace(token_to_kv_pool_allocator=allocator))

    assert not any(row.any() for row in null_rows(buffer))
    for view in tensors(pool):
        assert not view[:, : STATE_SINK + 1].any()
        assert view[:, STATE_SINK + 1].isnan().all()  # somebody's


def test_with_keys_and_values_alone_one_page_is_lost():
    from tests.unit.test_pool import buffer_of

    plan = buffer_of(1, torch.float32).plan

    assert plan.null_bytes == max(item.small_page_bytes for item in plan.groups)
    assert plan.null_larges == 1


@pytest.mark.parametrize("value_width", [16, 8])
def test_of_a_lone_group_the_null_page_of_every_layer_reads_as_zeros_and_no_other(value_width):
    """Its layers lie apart."""
    heads = HeadShape(2, 16, value_width)
    group = LayerGroup(Full(), (0, 1, 2), heads.entry_bytes(3, 4), 4)
    buffer = PoolBuffer(plan_pool([group], 1 << 16), "cpu", enable_memory_saver=False)
    keys, values = buffer.layer_views(0, heads, torch.float32)
    for view in (*keys, *values):
        view.fill_(torch.inf)

    buffer.zero_null_pages()

    for view in (*keys, *values):
        assert not view[:4].any()
        assert view[4:].isinf().all()
