"""States as views of the shared bytes, on the CPU: no server needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.memory.state import JengaStatePool, StateShape
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup

HEADS = HeadShape(num_heads=2, k_dim=8, v_dim=8)
LAYERS = (0, 1, 3)
FULL, STATE = 0, 1


def params(conv=((12, 3), (5, 3)), temporal=(4, 8, 6), conv_dtype=torch.bfloat16):
    """What SGLang says of a model's states."""
    return SimpleNamespace(
        shape=SimpleNamespace(conv=list(conv), temporal=temporal),
        dtype=SimpleNamespace(conv=conv_dtype, temporal=torch.float32),
    )


def pool_of(page_size: int = 1, megabytes: int = 1, **kwargs) -> tuple[PoolBuffer, JengaStatePool]:
    shape = StateShape.of(params(**kwargs), LAYERS)
    groups = [
        LayerGroup(Full(), (2,), HEADS.entry_bytes(1, 2), page_size, element="bfloat16"),
        LayerGroup(State(), shape.layer_ids, shape.entry_bytes, element=shape.element),
    ]
    plan = plan_pool(groups, megabytes << 20)
    buffer = PoolBuffer(plan, "cpu", enable_memory_saver=False)
    return buffer, JengaStatePool(buffer, STATE, shape)


def tensors(pool: JengaStatePool) -> list[torch.Tensor]:
    return [pool.mamba_cache.temporal, *pool.mamba_cache.conv]


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_state_written_through_the_views_stays_inside_its_small_page(page_size: int):
    buffer, pool = pool_of(page_size)
    start = 3 * buffer.plan.groups[STATE].small_page_bytes
    for view in tensors(pool):
        view[:, 3] = 1.0

    touched = torch.nonzero(buffer.bytes).ravel()

    assert touched.min() >= start
    assert touched.max() < start + buffer.plan.groups[STATE].group.entry_bytes


def test_no_two_parts_or_layers_of_a_state_share_a_byte():
    _, pool = pool_of()
    number = 0
    for view in tensors(pool):
        for layer in range(len(LAYERS)):
            number += 1
            view[layer, 5] = number

    number = 0
    for view in tensors(pool):
        for layer in range(len(LAYERS)):
            number += 1
            assert (view[layer, 5] == number).all()


def test_layer_cache_is_what_kernels_index_by_slot():
    _, pool = pool_of()

    cache = pool.mamba2_layer_cache(1)

    assert cache.temporal.shape[1:] == (4, 8, 6)
    assert [conv.shape[1:] for conv in cache.conv] == [(12, 3), (5, 3)]
    assert cache.temporal[7].is_contiguous()  # state kernels want whole states in one piece
    cache.temporal[7] = 2.0
    assert (pool.mamba_cache.temporal[1, 7] == 2).all()


def test_clear_and_copy_move_whole_states_and_nothing_else():
    _, pool = pool_of()
    torch.manual_seed(0)
    for view in tensors(pool):
        view.copy_(torch.randn(view.shape))
    before = [view.clone() for view in tensors(pool)]

    pool.copy_from(torch.tensor([2, 4]), torch.tensor([6, 8]))
    pool.clear_slots(torch.tensor([3]))

    for view, old in zip(tensors(pool), before, strict=True):
        assert torch.equal(view[:, [6, 8]], old[:, [2, 4]])
        assert not view[:, 3].any()
        kept = [slot for slot in range(view.shape[1]) if slot not in (3, 6, 8)]
        assert torch.equal(view[:, kept], old[:, kept])


def test_every_slot_counted_can_be_handed_out():
    buffer, pool = pool_of()
    core = Allocator(buffer.plan)

    ids = core.alloc([None], [[0], [pool.size]])

    assert ids is not None
    assert ids[STATE].min() > 0
    assert not core.fits_now([0, 1])
    core.check([])


def test_a_large_page_that_goes_from_states_to_keys_and_values_is_zeroed_first():
    buffer, pool = pool_of()
    core = Allocator(buffer.plan)
    (_, states) = core.alloc([None], [[0], [pool.size]])
    core.large.take_stale()
    for view in tensors(pool):
        view[:, states] = torch.nan
    core.free(STATE, states)

    smalls = core.obtainable(FULL)
    ids = core.alloc([None], [[smalls], [0]])[FULL]
    buffer.zero_large_pages(core.large.take_stale(), stream=None)

    keys, values = buffer.layer_views(FULL, HEADS, torch.bfloat16)
    for view in (*keys, *values):
        assert not view[torch.from_numpy(ids)].any()


def test_a_huge_state_costs_the_null_pages_of_two_states():
    # One state fills a large page, and so does the sink; beside them stand thousands of small
    # pages of KV.
    _, pool = pool_of(megabytes=64, temporal=(64, 64, 64))
    plan = pool._buffer.plan

    lost = plan.null_smalls * plan.groups[plan.null_group].small_page_bytes

    state = plan.groups[STATE].small_page_bytes
    assert lost < 2 * state + plan.groups[FULL].small_page_bytes
    assert Allocator(plan).fits_now([0, pool.size])
