"""What SGLang's attention backends make of a pool's views: reshaped without a copy, aligned, and
narrow enough for kernels that keep strides in 32 bits. Real models' geometries; no byte is touched.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_jenga.kernels.attention import paged_views
from sglang_jenga.layers.base import Storage
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import GroupPlan

CONFIGS = Path(__file__).parents[1] / "configs"
HEAD_DIMS = {
    "falcon-h1-7b": 128,
    "gemma-2-9b": 256,
    "gemma-3-27b": 128,
    "gpt-oss-20b": 64,
    "jamba-1.5-mini": 128,
    "lfm2-1.2b": 64,
    "llama-3.1-8b": 128,
    "ministral-8b": 128,
    "qwen3-next-80b-a3b": 256,
}
TYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
POOL_BYTES = 2 << 30
CELLS = [
    (model, page_size, kv, tp)
    for model in HEAD_DIMS
    for page_size in (1, 16, 64, 128)
    for kv in TYPES
    for tp in (1, 8)
    if (model, tp) != ("falcon-h1-7b", 8)  # its 12 heads are not shared by 8 ranks
]


def pool_of(model: str, page_size: int, kv: str, tp: int) -> PoolBuffer:
    """Its plan, and as many bytes as that, of which none is touched."""
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    dtype = "auto" if kv == "bfloat16" else kv
    geometry = read_geometry(config, page_size=page_size, tp=tp, kv_cache_dtype=dtype)
    buffer = object.__new__(PoolBuffer)
    buffer.plan, buffer.device = plan_pool(geometry.groups, POOL_BYTES), "cpu"
    buffer.bytes = torch.empty(buffer.plan.pool_bytes, dtype=torch.uint8)
    return buffer


def heads_of(item: GroupPlan, dim: int, itemsize: int) -> HeadShape:
    heads, rest = divmod(item.group.entry_bytes, len(item.group.layer_ids) * 2 * dim * itemsize)
    assert not rest
    return HeadShape(heads, dim, dim)


def same_bytes(view: torch.Tensor, of: torch.Tensor) -> bool:
    return view.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def check_flashinfer(key: torch.Tensor, value: torch.Tensor, page_size: int) -> None:
    """SGLang gives it a layer's slots, as pages of one token; `kernels/attention.py` gives pages of
    any size: the same K and V at the same addresses."""
    from flashinfer.utils import _unpack_paged_kv_cache

    ours = paged_views(key, value, page_size)
    for slots, tokens, pages in zip(
        (key, value), _unpack_paged_kv_cache((key, value), "NHD"), ours, strict=True
    ):
        count, heads, dim = slots.shape
        assert same_bytes(tokens, slots) and same_bytes(pages, slots)
        assert tokens.shape == (count, 1, heads, dim)
        assert pages.shape == (count // page_size, page_size, heads, dim)
        assert tokens.stride()[2:] == pages.stride()[2:] == slots.stride()[1:]
        # A token's page goes by the first stride, its place in the page by the second.
        assert tokens.stride(0) == pages.stride(1) == slots.stride(0)
        assert pages.stride(0) == page_size * tokens.stride(0)
        assert tokens.data_ptr() == pages.data_ptr() == slots.data_ptr()


@pytest.mark.parametrize(("model", "page_size", "kv", "tp"), CELLS)
def test_backends_reshape_the_views_without_a_copy(model: str, page_size: int, kv: str, tp: int):
    from sglang.kernels.ops.attention.decode_attention import _extract_kv_strides
    from sglang.srt.mem_cache.layout.paged_view import paged_kv_view

    buffer, dtype = pool_of(model, page_size, kv, tp), TYPES[kv]
    stored = torch.uint8 if dtype.itemsize == 1 else dtype  # SGLang's pools keep fp8 as bytes
    seen = 0
    for group_id, item in enumerate(buffer.plan.groups):
        if item.group.kind.storage is not Storage.KV or not item.group.layer_ids:
            continue
        heads = heads_of(item, HEAD_DIMS[model], dtype.itemsize)
        keys, values = buffer.layer_views(group_id, heads, stored)
        for key, value in zip((keys[0], keys[-1]), (values[0], values[-1]), strict=True):
            seen += 1
            row = heads.num_heads * heads.k_dim
            for view in (key, value):
                # `_set_kv_buffer_impl`, and the rotary kernels that store.
                assert same_bytes(view.view(-1, row), buffer.bytes)
                assert same_bytes(view.view(view.shape[0], -1), buffer.bytes)
                assert same_bytes(view.view(dtype), buffer.bytes)
                # FlashAttention and trtllm_mha.
                paged = paged_kv_view(view, page_size, heads.num_heads, heads.k_dim)
                assert same_bytes(paged, buffer.bytes)
                assert paged.stride()[:2] == (page_size * view.stride(0), view.stride(0))
                assert same_bytes(paged.permute(0, 2, 1, 3), buffer.bytes)
                # 16 bytes at a time, and strides of a page in 32 bits.
                assert not view.data_ptr() % 16
                assert not any(n * view.element_size() % 16 for n in view.stride()[:2])
                assert page_size * view.stride(0) < 1 << 32
                assert _extract_kv_strides(view, page_size)[2] == page_size * view.stride(0)
            assert key.stride() == value.stride()  # FlashInfer takes one set
            check_flashinfer(key.view(dtype), value.view(dtype), page_size)
    assert seen
