"""The memory that SGLang talks to, as a server builds it, of a few kilobytes.

Rows, allocator, prefix cache and state pool are the product's own on a real byte buffer; only the
attention layers' views of it are missing, which nobody here computes with.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from sglang_jenga.layers.base import LayerKind, Storage
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.registry import kind_of
from sglang_jenga.layers.state import State
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan
from sglang_jenga.serving.tracking import least_worth
from sglang_jenga.testing.context import Settings

_GRAIN = 16  # bytes: two of the words that an entry is made of


class Shape(NamedTuple):
    """A model's layer groups and a pool for them.

    ``full``, ``window_k``, ``state_k``, ``cross_k``: small pages of each kind in a large page;
    None where the model has no such layers. ``window``: tokens that a window layer sees, the
    current one included.
    ``others``: more sliding groups, each its kind, width, and small pages in a large page. SGLang's
    kernels know one such group; the host's side takes any number.
    """

    full: int = 1
    window_k: int | None = None
    window: int = 8
    state_k: int | None = None
    cross_k: int | None = None
    sliding: str = "window"  # the kind of the layers with a window
    others: tuple[tuple[str, int, int], ...] = ()
    num_large: int = 64
    num_rows: int = 8
    context: int = 256

    @property
    def has_windows(self) -> bool:
        return self.window_k is not None

    @property
    def has_states(self) -> bool:
        return self.state_k is not None

    @property
    def has_encoder(self) -> bool:
        return self.cross_k is not None

    def plan(self, page_size: int) -> PoolPlan:
        """The pool's plan; its entries are whole numbers of 8-byte words, two at least."""
        kinds: list[tuple[LayerKind, int]] = [(Full(), self.full)]
        if self.window_k is not None:
            kinds.append((kind_of(self.sliding, self.window), self.window_k))
        kinds += [(kind_of(name, width), k) for name, width, k in self.others]
        if self.cross_k is not None:
            kinds.append((Cross(), self.cross_k))
        if self.state_k is not None:
            kinds.append((State(), self.state_k))
        large_bytes = math.lcm(*(k for _, k in kinds)) * page_size * _GRAIN
        groups = []
        for layer, (kind, k) in enumerate(kinds):
            is_state = kind.storage is Storage.STATE
            tokens = 1 if is_state else page_size
            entry = large_bytes // k // tokens
            # Another element: a large page that a state had is zeroed before KV lies there.
            group = LayerGroup(kind, (layer,), entry, tokens, element=str(is_state))
            groups.append(GroupPlan(group, entry, k))
        return PoolPlan(tuple(groups), large_bytes, self.num_large)


class _Layers:
    """Stands for SGLang's KV pool: the layers' views, which only kernels use."""

    def register_mapping(self, mapping: torch.Tensor) -> None: ...


class Pools(NamedTuple):
    """What a server's scheduler is given; ``longest``: SGLang's ``max_total_num_tokens``."""

    plan: PoolPlan
    buffer: Any
    rows: Any
    states: Any
    allocator: Any
    cache: Any
    longest: int


def states_of_request(settings: Settings) -> int:
    """States that a request takes at once, if the model has any."""
    from sglang.srt.mem_cache.allocation_sizing import get_mamba_tracking_slots

    return 1 + get_mamba_tracking_slots(
        extra_buffer=settings.tracked, overlap=settings.overlap, lazy=settings.lazy
    )


def build_pools(shape: Shape, settings: Settings) -> Pools:
    """Build them all, in the order of a server's start."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    from sglang_jenga.boot.geometry import longest_request
    from sglang_jenga.memory.buffer import PoolBuffer
    from sglang_jenga.pages.allocator import Allocator
    from sglang_jenga.pages.tables import PageTables
    from sglang_jenga.serving.allocator import (
        JengaSWAAllocator,
        JengaTokenAllocator,
    )
    from sglang_jenga.serving.cache import JengaRadixCache
    from sglang_jenga.serving.state_rows import StateSlots

    plan = shape.plan(settings.page_size)
    longest = longest_request(plan, states_of_request(settings))
    buffer = PoolBuffer(plan, "cpu", enable_memory_saver=False)
    states = None
    if shape.has_states:
        states = _state_pool(plan, buffer)
        rows = _state_rows(shape, settings, states)
    else:
        rows = ReqToTokenPool(shape.num_rows, shape.context, "cpu", enable_memory_saver=False)
    allocator_class = JengaSWAAllocator if shape.has_windows else JengaTokenAllocator
    allocator = allocator_class(
        Allocator(plan),
        PageTables(plan, *rows.req_to_token.shape),
        _Layers(),
        buffer=buffer,
        forward_stream=None,
        dtype=torch.float32,
        device="cpu",
        max_tokens=longest,
    )
    if states is not None:
        rows.mamba_allocator = StateSlots(allocator, states.size)
        allocator.capacity.states_per_request = rows.states_per_request
        if rows.enable_mamba_extra_buffer_lazy:
            allocator.states_of_step = rows.states_of_step
    params = CacheInitParams(
        disable=not settings.radix,
        req_to_token_pool=rows,
        token_to_kv_pool_allocator=allocator,
        page_size=settings.page_size,
        chunked_prefill_size=settings.chunk,
        sliding_window_size=shape.window - 1 if shape.has_windows else None,
        enable_mamba_extra_buffer=settings.tracked,
        enable_mamba_extra_buffer_lazy=settings.lazy,
    )
    return Pools(plan, buffer, rows, states, allocator, JengaRadixCache(params), longest)


def _state_pool(plan: PoolPlan, buffer: Any) -> Any:
    from sglang_jenga.memory.state import JengaStatePool, StatePart, StateShape

    group_id = len(plan.groups) - 1
    entry = plan.groups[group_id].padded_entry_bytes
    whole = StatePart(0, (entry // 8,), torch.int64)
    layers = plan.groups[group_id].group.layer_ids
    return JengaStatePool(buffer, group_id, StateShape(layers, whole, (), entry))


def _state_rows(shape: Shape, settings: Settings, states: Any) -> Any:
    from sglang.srt.runtime_context import mamba_track_grid

    from sglang_jenga.serving.state_rows import JengaStateRows

    return JengaStateRows(
        states,
        mamba_track_grid(settings.page_size) if settings.tracked else 0,
        least_tracked=least_worth(shape.plan(settings.page_size)),
        size=shape.num_rows,
        mamba_spec_state_size=shape.num_rows,
        max_context_len=shape.context,
        device="cpu",
        enable_memory_saver=False,
        cache_params=None,
        mamba_layer_ids=states.mamba_layer_ids,
        enable_mamba_extra_buffer=settings.tracked,
        enable_mamba_extra_buffer_lazy=settings.lazy,
        enable_overlap_schedule=settings.overlap,
        start_layer=0,
    )
