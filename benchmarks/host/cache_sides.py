"""Prefix caches with their allocators side by side in one process, on CPU tensors, without bytes.

`build(name, shape)` gives SGLang's tree cache over SGLang's allocator ("unified": its unified tree,
the default), the same tree over SGLang's unified memory ("unified-memory", models with windows
only), or jenga's ("jenga"), for the same layers and, in entries, the same pool. Nothing reads or
writes KV: pools have no bytes, or bytes that nobody touches.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

LAYERS = (10, 52)  # full and window layers of Gemma-3-27B: the shape of large pages
LAYER_ENTRY_BYTES = 32  # K and V of one token in one layer: 8 halves each


class Shape(NamedTuple):
    """`num_tokens`: what the pool holds of every layer; `longest`: tokens of a request's row.

    Without a `window` there are only the full layers.
    """

    num_tokens: int
    page_size: int
    window: int | None
    num_rows: int
    longest: int


def build(name: str, shape: Shape) -> Any:
    """Return the tree cache; it names its request rows and its allocator.

    Raises ValueError for unified memory without a window, which SGLang does not have.
    """
    return {"unified": _unified, "unified-memory": _unified_memory, "jenga": _jenga}[name](shape)


def _rows(shape: Shape) -> Any:
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    return ReqToTokenPool(shape.num_rows, shape.longest, "cpu", enable_memory_saver=False)


def _params(shape: Shape, rows: Any, allocator: Any) -> Any:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    return CacheInitParams(
        disable=False,
        req_to_token_pool=rows,
        token_to_kv_pool_allocator=allocator,
        page_size=shape.page_size,
        sliding_window_size=None if shape.window is None else shape.window - 1,
    )


def _unified_tree(shape: Shape, allocator: Any) -> Any:
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params = _params(shape, _rows(shape), allocator)
    windows = () if shape.window is None else (ComponentType.SWA,)
    params.tree_components = (ComponentType.FULL, *windows)
    return UnifiedRadixCache(params)


def _unified(shape: Shape) -> Any:
    import torch
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    common = {"dtype": torch.float32, "device": "cpu", "need_sort": False}
    tokens, page_size = shape.num_tokens, shape.page_size
    if shape.window is not None:

        class NoBytes(SWAKVPool):
            def __init__(self) -> None: ...

        allocator = SWATokenToKVPoolAllocator(
            tokens, tokens, page_size, kvcache=NoBytes(), **common
        )
    elif page_size == 1:
        allocator = TokenToKVPoolAllocator(tokens, kvcache=None, **common)
    else:
        allocator = PagedTokenToKVPoolAllocator(tokens, page_size, kvcache=None, **common)
    return _unified_tree(shape, allocator)


def _unified_memory(shape: Shape) -> Any:
    import torch
    from sglang.srt.mem_cache.unified_memory_pool import init_unified_swa_pools

    if shape.window is None:
        raise ValueError("SGLang's unified memory does not serve models with full layers only")
    heads = {"head_num": 1, "head_dim": 8, "v_head_dim": 8}
    bundle = init_unified_swa_pools(
        device="cpu",
        kv_cache_dtype=torch.bfloat16,
        **heads,
        **{f"swa_{name}": value for name, value in heads.items()},
        page_size=shape.page_size,
        start_layer=0,
        end_layer=sum(LAYERS),
        full_attention_layer_ids=list(range(LAYERS[0])),
        swa_attention_layer_ids=list(range(LAYERS[0], sum(LAYERS))),
        total_bytes=shape.num_tokens * sum(LAYERS) * LAYER_ENTRY_BYTES,
        enable_memory_saver=False,
        need_sort=False,
        lazy_compaction=True,  # SGLang's default
    )
    pool = bundle.token_to_kv_pool
    for part in (pool.full_kv_pool, pool.swa_kv_pool):
        # Kernels' work on a GPU, which a CPU would do here and on the scheduler's thread.
        part.zero_physical_pages = part.move_physical_pages = lambda *_: None
    return _unified_tree(shape, bundle.token_to_kv_pool_allocator)


def _jenga(shape: Shape) -> Any:
    import torch

    from sglang_jenga.layers.base import Load
    from sglang_jenga.layers.full import Full
    from sglang_jenga.layers.window import Window
    from sglang_jenga.memory.ops import ops_of
    from sglang_jenga.pages.allocator import Allocator
    from sglang_jenga.pages.tables import PageTables
    from sglang_jenga.plan.planner import plan_pool
    from sglang_jenga.plan.spec import LayerGroup
    from sglang_jenga.serving.allocator import JengaSWAAllocator, JengaTokenAllocator
    from sglang_jenga.serving.cache import JengaRadixCache

    full, windows = (
        (tuple(range(begin, end)), (end - begin) * LAYER_ENTRY_BYTES, shape.page_size)
        for begin, end in ((0, LAYERS[0]), (LAYERS[0], sum(LAYERS)))
    )
    groups = [LayerGroup(Full(), *full)]
    if shape.window is not None:
        groups.append(LayerGroup(Window(shape.window), *windows))
    room = shape.num_tokens * sum(group.entry_bytes for group in groups)
    plan = plan_pool(groups, room, largest=Load(shape.page_size))

    class NoBytes:
        ops = ops_of("cpu")

        def register_mapping(self, mapping: Any) -> None: ...

        def zero_large_pages(self, large_ids: list[int], stream: Any) -> None: ...

    rows = _rows(shape)
    allocator_class = JengaTokenAllocator if shape.window is None else JengaSWAAllocator
    allocator = allocator_class(
        Allocator(plan),
        PageTables(plan, *rows.req_to_token.shape),
        NoBytes(),
        buffer=NoBytes(),
        forward_stream=None,
        dtype=torch.float32,
        device="cpu",
        max_tokens=shape.num_tokens,
    )
    return JengaRadixCache(_params(shape, rows, allocator))


def request(name: str, tokens: Sequence[int]) -> Any:
    """SGLang's request for these prompt tokens."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    return Req(name, "", array("q", tokens), SamplingParams(max_new_tokens=64))
