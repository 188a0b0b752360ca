"""Where our pools, allocator and cache take the place of SGLang's, in the scheduler process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, register_radix_cache_backend
from sglang.srt.runtime_context import (
    get_disagg,
    get_exec,
    get_schedule,
    mamba_track_grid,
)

from sglang_jenga import ablation, flags, window_models
from sglang_jenga.admission import JengaSWABudget
from sglang_jenga.allocator import Allocator
from sglang_jenga.geometry import (
    Geometry,
    geometry_of,
    longest_request,
    pinned_bytes,
    plan_for,
)
from sglang_jenga.hooks import Hook
from sglang_jenga.page_tables import PageTables, Step
from sglang_jenga.planner_report import capacity_rows, format_plan
from sglang_jenga.pool import JengaMHAPool, JengaSWAPool, PoolBuffer
from sglang_jenga.state_pool import JengaStatePool, JengaStateRows, StateSlots
from sglang_jenga.token_allocator import (
    FULL,
    JengaStateAllocator,
    JengaSWAAllocator,
    JengaTokenAllocator,
)

logger = logging.getLogger(__name__)


def _config_from_budget(
    original: Callable[..., Any],
    self: Any,
    budget_bytes: int,
    *,
    cap_tokens: int | None = None,
) -> Any:
    """Size the pool in bytes; SGLang's configurator would cut them in fixed parts."""
    if not flags.is_on():
        return original(self, budget_bytes, cap_tokens=cap_tokens)
    try:
        return _plan_budget(self, budget_bytes, cap_tokens)
    except ValueError as error:
        flags.stop(error)  # the user's to mend: one line, no trace


def _plan_budget(self: Any, budget_bytes: int, cap_tokens: int | None) -> Any:
    from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig

    geometry = geometry_of(self)
    pool_bytes = budget_bytes
    if get_schedule().max_mamba_cache_size is not None and get_schedule().max_total_tokens is None:
        raise ValueError(
            "--memory-backend jenga has no separate pool of states for --max-mamba-cache-size to "
            "size (with --max-total-tokens it gives the bytes of both); drop it"
        )
    wanted = min(
        (cap for cap in (get_schedule().max_total_tokens, cap_tokens) if cap is not None),
        default=None,
    )
    # Without attention, tokens say nothing about bytes; states do, if the user gave their number.
    tokens_count = bool(geometry.groups[0].layer_ids)
    if wanted is not None and (tokens_count or get_schedule().max_mamba_cache_size is not None):
        pinned = pinned_bytes(geometry, wanted, stock_is_hybrid=_stock_is_hybrid(self))
        if pinned > budget_bytes:
            logger.warning(
                "max_total_tokens=%d takes %d bytes in stock SGLang, more than the %d bytes "
                "profiled; the profiled bytes are used",
                wanted,
                pinned,
                budget_bytes,
            )
        pool_bytes = min(pinned, budget_bytes)
    plan = plan_for(geometry, pool_bytes)
    tokens = longest_request(plan)
    return MemoryPoolConfig(
        max_total_num_tokens=tokens,
        full_max_total_num_tokens=tokens if self.is_hybrid_swa else None,
        swa_max_total_num_tokens=plan.num_slots(1) if self.is_hybrid_swa else None,
        # Read by SGLang's own unified pool only; it carries the budget to _init_pools.
        unified_total_bytes=pool_bytes,
    )


def _stock_is_hybrid(configurator: Any) -> bool:
    config = configurator.model_config
    ours = window_models.window_layers(config.hf_config.architectures, config.hf_text_config)
    return configurator.is_hybrid_swa and ours is None


def _handle_max_mamba_cache(
    original: Callable[..., Any], self: Any, total_rest_memory: float
) -> float:
    """SGLang cuts the states' share out of the budget here; under the flag there is no share."""
    return total_rest_memory if flags.is_on() else original(self, total_rest_memory)


def _resolve_max_num_reqs(original: Callable[..., Any], self: Any, token_capacity: int) -> int:
    """SGLang caps the running requests by state slots cut at boot; here memory decides."""
    config = self.mambaish_config
    if not flags.is_on() or config is None:
        return original(self, token_capacity)
    self.mambaish_config = None
    try:
        return original(self, token_capacity)
    finally:
        self.mambaish_config = config


def _init_pools(
    original: Callable[..., Any],
    self: Any,
    *,
    sizes: Any,
    req_to_token_pool: Any,
    token_to_kv_pool_allocator: Any,
) -> Any:
    if not flags.is_on():
        return original(
            self,
            sizes=sizes,
            req_to_token_pool=req_to_token_pool,
            token_to_kv_pool_allocator=token_to_kv_pool_allocator,
        )
    from sglang.srt.mem_cache.kv_cache_configurator import _InitializedPools

    geometry = geometry_of(self)
    plan = plan_for(geometry, sizes.unified_total_bytes)
    _log_plan(plan, sizes.max_total_num_tokens, self.model_config.context_len)
    buffer = PoolBuffer(
        plan, self.device, enable_memory_saver=get_exec().features.enable_memory_saver
    )
    states = None
    if geometry.state is not None:
        states = JengaStatePool(buffer, len(geometry.heads), geometry.state)
        rows = _build_state_rows(self, states, sizes.max_running_requests)
    else:
        rows = self._build_req_to_token_pool(max_num_reqs=sizes.max_running_requests)
    tables = PageTables(plan, *rows.req_to_token.shape)
    kvcache = _build_kv_pool(self, buffer, geometry, states)
    if self.is_hybrid_swa:
        allocator_class = JengaSWAAllocator
    else:
        allocator_class = JengaTokenAllocator if states is None else JengaStateAllocator
    allocator = allocator_class(
        Allocator(plan, order="packed" if ablation.policy().affinity else "fullest"),
        tables,
        kvcache,
        buffer=buffer,
        # Without overlap SGLang's forwards run on the current stream, and so must zeroing.
        forward_stream=None if get_schedule().disable_overlap_schedule else self.forward_stream,
        dtype=self.kv_cache_dtype,
        device=self.device,
        max_tokens=sizes.max_total_num_tokens,
    )
    if states is not None:
        rows.mamba_allocator = StateSlots(allocator, states.size)
        allocator.states_per_request = rows.states_per_request
        if rows.enable_mamba_extra_buffer_lazy:
            allocator.states_of_step = rows.states_of_step
    return _InitializedPools(
        req_to_token_pool=rows,
        token_to_kv_pool=kvcache,
        token_to_kv_pool_allocator=allocator,
        unified_memory_pool=buffer,  # SGLang keeps this alive with the model runner
    )


def _build_state_rows(configurator: Any, states: JengaStatePool, max_num_reqs: int) -> Any:
    from sglang.srt.layers.attention.mamba import causal_conv1d
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len

    # The compiled convolution takes a slot's stride for granted; the Triton one asks for it.
    assert hasattr(causal_conv1d, "_HAS_CONV1D_KERNEL")
    causal_conv1d._HAS_CONV1D_KERNEL = False
    context_len = configurator.model_config.context_len
    tracked = get_exec().mamba.enable_mamba_extra_buffer
    return JengaStateRows(
        states,
        mamba_track_grid(configurator.pool_page_size) if tracked else 0,
        size=max_num_reqs,
        mamba_spec_state_size=max_num_reqs,
        max_context_len=context_len + get_req_to_token_extra_context_len(),
        device=configurator.device,
        enable_memory_saver=get_exec().features.enable_memory_saver,
        cache_params=configurator.mambaish_config.mamba2_cache_params,
        mamba_layer_ids=states.mamba_layer_ids,
        enable_mamba_extra_buffer=tracked,
        enable_mamba_extra_buffer_lazy=get_exec().mamba.enable_mamba_extra_buffer_lazy,
        enable_overlap_schedule=not get_schedule().disable_overlap_schedule,
        start_layer=configurator.layer_info.start_layer,
    )


def _build_kv_pool(
    configurator: Any, buffer: PoolBuffer, geometry: Geometry, states: JengaStatePool | None
) -> Any:
    alt_stream = not get_disagg().enable_pdmux
    dtype = configurator.kv_cache_dtype
    if configurator.is_hybrid_swa:
        return JengaSWAPool(buffer, geometry.heads, dtype, enable_alt_stream=alt_stream)
    if states is not None:
        full = JengaMHAPool(buffer, FULL, geometry.heads[FULL], dtype, enable_alt_stream=alt_stream)
        return HybridLinearKVPool(
            size=full.size,
            dtype=dtype,
            page_size=full.page_size,
            head_num=full.head_num,
            head_dim=full.head_dim,
            full_attention_layer_ids=list(geometry.groups[FULL].layer_ids),
            device=buffer.device,
            mamba_pool=states,
            full_kv_pool=full,
            start_layer=configurator.layer_info.start_layer,
        )
    return JengaMHAPool(
        buffer,
        FULL,
        geometry.heads[FULL],
        dtype,
        start_layer=configurator.layer_info.start_layer,
        end_layer=configurator.layer_info.end_layer,
        enable_alt_stream=alt_stream,
    )


def _log_plan(plan: Any, longest: int, context_len: int) -> None:
    text = format_plan(plan, capacity_rows(plan))
    logger.info("jenga %s", text.replace("\n", "\njenga "))
    # The same once more for programs: bytes, exact.
    logger.info(
        "jenga plan pool_bytes=%d large_page_bytes=%d num_large=%d entry_bytes=%s",
        plan.pool_bytes,
        plan.large_page_bytes,
        plan.num_large,
        ",".join(str(item.group.entry_bytes) for item in plan.groups),
    )
    if longest < context_len:
        logger.warning(
            "jenga: the pool holds one request of at most %d tokens, the model's context is %d",
            longest,
            context_len,
        )


def _is_ours(allocator: Any) -> bool:
    return isinstance(allocator, (JengaTokenAllocator, JengaSWAAllocator, JengaStateAllocator))


def _configure(result: Any, self: Any, **_: Any) -> None:
    """Last line of defence: under the flag, nothing but our pools may serve."""
    if flags.is_on() and not _is_ours(result.token_to_kv_pool_allocator):
        raise RuntimeError(
            "--memory-backend jenga is set but SGLang built "
            f"{type(result.token_to_kv_pool_allocator).__name__}; refusing to serve with it"
        )


def _count_window_growth(result: None, self: Any, *_: Any, **__: Any) -> None:
    """SGLang reserves full tokens for what running requests will still decode, window tokens not:
    in its own fixed window pool they are worth little. Here they are most of the bytes."""
    budget, batch = self.memory_budget, self.running_batch
    if not isinstance(budget, JengaSWABudget) or batch is None:
        return
    budget.swa_offset += sum(
        self.tree_cache.window_growth(req, self._get_running_request_total_token_offset(req))
        for req in batch.reqs
    )


def _alloc_for_extend(original: Callable[..., Any], batch: Any) -> Any:
    allocator = batch.token_to_kv_pool_allocator
    if not _is_ours(allocator):
        return original(batch)
    starts = np.array(batch.prefix_lens, dtype=np.int64)
    ends = starts + np.array(batch.extend_lens, dtype=np.int64)
    fresh = [index for index, req in enumerate(batch.reqs) if not req.kv.holds_kv]
    with allocator.allocating(Step(batch.reqs, starts, ends, allocator.page_size, fresh=fresh)):
        return original(batch)


def _alloc_for_decode(original: Callable[..., Any], batch: Any, token_per_req: int) -> Any:
    allocator = batch.token_to_kv_pool_allocator
    if not _is_ours(allocator):
        return original(batch, token_per_req)
    starts = np.array([req.kv.kv_allocated_len for req in batch.reqs], dtype=np.int64)
    allocator.decoding = batch.reqs
    if batch.tree_cache.supports_mamba():
        batch.tree_cache.states.before_decode(batch.reqs)
    step = Step(batch.reqs, starts, starts + token_per_req, allocator.page_size)
    with allocator.allocating(step):
        return original(batch, token_per_req)


def _maybe_evict_swa(original: Callable[..., Any], self: Any) -> None:
    cache = self.tree_cache
    ours = _is_ours(self.token_to_kv_pool_allocator) and self.forward_mode.is_decode()
    if not ours or not cache.supports_swa() or not cache.leave_windows(self.reqs):
        original(self)


def register_cache_backend() -> None:
    """Make ``radix_cache_backend="jenga"`` known. The name is the guard: SGLang stops at a name
    nobody registered, so a process without this plugin cannot serve under the flag."""
    register_radix_cache_backend("jenga", _build_tree_cache)


def _build_tree_cache(context: TreeCacheBuildContext) -> BasePrefixCache:
    from sglang_jenga.tree_cache import JengaRadixCache

    allocator = context.params.token_to_kv_pool_allocator
    if not _is_ours(allocator):
        raise RuntimeError(
            f"the jenga radix cache needs the jenga pool, got {type(allocator).__name__}; "
            "use --memory-backend jenga instead of --radix-cache-backend jenga"
        )
    return JengaRadixCache(context.params)


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_PREFILL_ADDER = (
    "(self, page_size, tree_cache, token_to_kv_pool_allocator, running_batch, new_token_ratio, "
    "rem_input_tokens, rem_chunk_tokens, num_mixed_decode_tokens, "
    "priority_scheduling_preemption_threshold, max_prefill_bs, max_running_requests, "
    "prefill_max_requests, prefill_delayer_single_pass, dllm_config, waiting_queue_len, "
    "prefill_tile_block_m)"
)
HOOKS = (
    Hook(
        f"{_CONFIGURATOR}.config_from_budget",
        "around",
        "(self, budget_bytes, *, cap_tokens)",
        _config_from_budget,
    ),
    Hook(
        f"{_CONFIGURATOR}._handle_max_mamba_cache",
        "around",
        "(self, total_rest_memory)",
        _handle_max_mamba_cache,
    ),
    Hook(
        f"{_CONFIGURATOR}.resolve_max_num_reqs",
        "around",
        "(self, token_capacity)",
        _resolve_max_num_reqs,
    ),
    Hook(
        f"{_CONFIGURATOR}._init_pools",
        "around",
        "(self, *, sizes, req_to_token_pool, token_to_kv_pool_allocator)",
        _init_pools,
    ),
    Hook(f"{_CONFIGURATOR}.configure", "after", "(self, *, pre_model_load_memory)", _configure),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.__init__",
        "after",
        _PREFILL_ADDER,
        _count_window_growth,
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.maybe_evict_swa",
        "around",
        "(self)",
        _maybe_evict_swa,
    ),
    Hook(f"{_ALLOCATION}.alloc_for_extend", "around", "(batch)", _alloc_for_extend),
    Hook(
        f"{_ALLOCATION}.alloc_for_decode_default",
        "around",
        "(batch, token_per_req)",
        _alloc_for_decode,
    ),
)
