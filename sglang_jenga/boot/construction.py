"""Where our pools, allocator and cache take the place of SGLang's, in the scheduler process.

What they do in its rounds and steps is in `scheduling`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, register_radix_cache_backend
from sglang.srt.runtime_context import (
    get_disagg,
    get_exec,
    get_parallel,
    get_schedule,
    mamba_track_grid,
)

from sglang_jenga.boot import (
    built_layers,
    flags,
    hook_table,
    hooks,
    known_model,
    rank_agreement,
    refusal,
)
from sglang_jenga.boot.geometry import (
    ServedLayers,
    asked_bytes,
    geometry_of,
    longest_request,
    longest_text,
    plan_for,
    states_per_request,
)
from sglang_jenga.boot.hooks import HookError
from sglang_jenga.boot.rebinding import rebind
from sglang_jenga.memory.buffer import PoolBuffer
from sglang_jenga.memory.kv import JengaCrossPool, JengaHybridPool, JengaMHAPool, JengaSWAPool
from sglang_jenga.memory.state import JengaStatePool
from sglang_jenga.pages.tables import PageTables
from sglang_jenga.plan.planner import PoolTooSmallError
from sglang_jenga.plan.report import capacity_rows, format_plan
from sglang_jenga.plan.spec import PoolPlan
from sglang_jenga.serving import ablation
from sglang_jenga.serving.allocator import (
    JengaSWAAllocator,
    JengaTokenAllocator,
    is_ours,
)
from sglang_jenga.serving.groups import ServedGroups
from sglang_jenga.serving.rank_trace import build_core
from sglang_jenga.serving.state_rows import JengaStateRows, StateSlots
from sglang_jenga.serving.tracking import least_worth

logger = logging.getLogger(__name__)


def config_from_budget(
    original: Callable[..., Any],
    self: Any,
    budget_bytes: int,
    *,
    cap_tokens: int | None = None,
) -> Any:
    """Size the pool in bytes; SGLang's configurator would cut them in fixed parts."""
    if not flags.is_on():
        return original(self, budget_bytes, cap_tokens=cap_tokens)
    from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig

    geometry = geometry_of(self)
    difference = built_layers.refusal(self, geometry)
    if difference is not None:
        refusal.leave(difference)
    asked = asked_bytes(self, geometry, cap_tokens)
    pool_bytes = budget_bytes if asked is None else min(asked, budget_bytes)
    if asked is not None and asked > budget_bytes:
        logger.warning(
            "the token limit takes %d bytes in stock SGLang, more than the %d bytes profiled; the "
            "profiled bytes are used",
            asked,
            budget_bytes,
        )
    try:
        plan = plan_for(geometry, pool_bytes)
    except PoolTooSmallError as error:
        refusal.leave(error)  # the user's to mend: one line, no trace
    tokens = longest_request(plan, states_per_request(geometry))
    return MemoryPoolConfig(
        max_total_num_tokens=tokens,
        full_max_total_num_tokens=tokens if self.is_hybrid_swa else None,
        swa_max_total_num_tokens=_mapped_slots(plan) if self.is_hybrid_swa else None,
        # Read by SGLang's own unified pool only; it carries the budget to init_pools.
        unified_total_bytes=pool_bytes,
    )


def _mapped_slots(plan: PoolPlan) -> int:
    """Slots that SGLang calls swa."""
    return plan.num_slots(ServedGroups(plan).mapped[0])


def handle_max_mamba_cache(
    original: Callable[..., Any], self: Any, total_rest_memory: float
) -> float:
    """SGLang cuts the states' share out of the budget here; under the flag there is no share."""
    return total_rest_memory if flags.is_on() else original(self, total_rest_memory)


def resolve_max_num_reqs(original: Callable[..., Any], self: Any, token_capacity: int) -> int:
    """SGLang caps the running requests by state slots cut at boot; here memory decides."""
    config = self.mambaish_config
    if not flags.is_on() or config is None:
        return original(self, token_capacity)
    self.mambaish_config = None
    try:
        return original(self, token_capacity)
    finally:
        self.mambaish_config = config


def init_pools(
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
    rank_agreement.require(plan, sizes.max_running_requests)
    if get_disagg().disaggregation_mode != "null":
        _join_transfers(plan)
    _log_plan(plan, longest_text(plan, states_per_request(geometry)), self.model_config)
    buffer = PoolBuffer(
        plan, self.device, enable_memory_saver=get_exec().features.enable_memory_saver
    )
    states = None
    if geometry.state is not None:
        states = JengaStatePool(buffer, len(geometry.heads), geometry.state)
        rows = _build_state_rows(self, plan, states, sizes.max_running_requests)
    else:
        rows = self._build_req_to_token_pool(max_num_reqs=sizes.max_running_requests)
    tables = PageTables(plan, *rows.req_to_token.shape)
    kvcache = _build_kv_pool(self, buffer, geometry, states)
    allocator_class = JengaSWAAllocator if self.is_hybrid_swa else JengaTokenAllocator
    allocator = allocator_class(
        build_core(plan, "packed" if ablation.from_environment().affinity else "fullest"),
        tables,
        kvcache,
        buffer=buffer,
        forward_stream=self.forward_stream if _has_forward_stream() else None,
        dtype=self.kv_cache_dtype,
        device=self.device,
        max_tokens=sizes.max_total_num_tokens,
    )
    if states is not None:
        rows.mamba_allocator = StateSlots(allocator, states.size)
        allocator.capacity.states_per_request = rows.states_per_request
        if rows.enable_mamba_extra_buffer_lazy:
            allocator.states_of_step = rows.states_of_step
    return _InitializedPools(
        req_to_token_pool=rows,
        token_to_kv_pool=kvcache,
        token_to_kv_pool_allocator=allocator,
        unified_memory_pool=buffer,  # SGLang keeps this alive with the model runner
    )


def _extra_rows() -> int:
    if get_disagg().disaggregation_mode != "decode":
        return 0
    return get_disagg().disaggregation_decode_extra_slots or 0


def _has_forward_stream() -> bool:
    """Without overlap SGLang's forwards run on the current stream, and so must zeroing; in a
    pipeline they have a stream of their own."""
    return not get_schedule().disable_overlap_schedule or get_parallel().pp_size > 1


def _join_transfers(plan: PoolPlan) -> None:
    """Prepare for another server to read these pages, or to write them."""
    kinds = [item.group.kind for item in plan.groups]
    try:
        if len(ServedGroups(plan).mapped) > 1 or any(kind.sinks for kind in kinds):
            labels = ", ".join(kind.label for kind in kinds)
            raise HookError(
                "--memory-backend jenga does not work with --disaggregation-mode: SGLang sends the "
                f"last tokens of one window, and the model has {labels}; "
                "drop --disaggregation-mode or --memory-backend"
            )
        hooks.apply(hook_table.TRANSFERS)
    except HookError as error:
        refusal.leave(error)


def _build_state_rows(
    configurator: Any, plan: PoolPlan, states: JengaStatePool, max_num_reqs: int
) -> Any:
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len

    try:
        rebind(hook_table.STATES)
    except HookError as error:
        refusal.leave(error)
    context_len = configurator.model_config.context_len
    tracked = get_exec().mamba.enable_mamba_extra_buffer
    return JengaStateRows(
        states,
        mamba_track_grid(configurator.pool_page_size) if tracked else 0,
        least_tracked=least_worth(plan),
        size=max_num_reqs,
        # As SGLang's decode servers: rows of requests whose prompts are on their way.
        extra_rows=_extra_rows(),
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
    configurator: Any, buffer: PoolBuffer, geometry: ServedLayers, states: JengaStatePool | None
) -> Any:
    alt_stream = not get_disagg().enable_pdmux
    dtype = configurator.kv_cache_dtype
    if configurator.is_hybrid_swa:
        return JengaSWAPool(buffer, geometry.heads, dtype, enable_alt_stream=alt_stream)
    if configurator.model_config.is_encoder_decoder:
        try:
            hooks.apply(hook_table.ENCODERS)
        except HookError as error:
            refusal.leave(error)
        return JengaCrossPool(buffer, geometry.heads, dtype, enable_alt_stream=alt_stream)
    layers = configurator.layer_info
    row = buffer.plan.row_group
    full, heads = geometry.row, geometry.heads[row]
    if states is not None:
        pool = JengaMHAPool(buffer, row, heads, dtype, enable_alt_stream=alt_stream)
        return JengaHybridPool(
            size=pool.size,
            dtype=dtype,
            page_size=pool.page_size,
            head_num=pool.head_num,
            head_dim=pool.head_dim,
            full_attention_layer_ids=list(full.layer_ids),
            device=buffer.device,
            mamba_pool=states,
            full_kv_pool=pool,
            start_layer=layers.start_layer,
        )
    return JengaMHAPool(
        buffer,
        row,
        heads,
        dtype,
        start_layer=layers.start_layer,
        end_layer=layers.end_layer,
        enable_alt_stream=alt_stream,
    )


def _log_plan(plan: Any, longest: int, model: Any) -> None:
    row, context_len = known_model.of_model(model).row, model.context_len
    encoder = 0 if row.encoder is None else row.encoder(model.hf_config.to_dict())
    text = format_plan(plan, capacity_rows(plan, encoder=encoder))
    logger.info("jenga %s", text.replace("\n", "\njenga "))
    # The same once more for programs: bytes, exact.
    logger.info(
        "jenga plan pool_bytes=%d large_page_bytes=%d num_large=%d entry_bytes=%s",
        plan.pool_bytes,
        plan.large_page_bytes,
        plan.num_large,
        ",".join(str(item.group.entry_bytes) for item in plan.groups),
    )
    if encoder:
        logger.info("jenga: each of these requests has an image of %d tokens besides", encoder)
    if longest < context_len:
        logger.warning(
            "jenga: the pool holds one request of at most %d tokens, the model's context is %d",
            longest,
            context_len,
        )


def configure(result: Any, self: Any, **_: Any) -> None:
    """Last line of defence: under the flag, nothing but our pools may serve."""
    if flags.is_on() and not is_ours(result.token_to_kv_pool_allocator):
        raise RuntimeError(
            "--memory-backend jenga is set but SGLang built "
            f"{type(result.token_to_kv_pool_allocator).__name__}; refusing to serve with it"
        )


def register_cache_backend() -> None:
    """Make ``radix_cache_backend="jenga"`` known. The name is the guard: SGLang stops at a name
    nobody registered, so a process without this plugin cannot serve under the flag."""
    register_radix_cache_backend("jenga", _build_tree_cache)


def _build_tree_cache(context: TreeCacheBuildContext) -> BasePrefixCache:
    from sglang_jenga.serving.cache import JengaRadixCache

    allocator = context.params.token_to_kv_pool_allocator
    if not is_ours(allocator):
        raise RuntimeError(
            f"the jenga radix cache needs the jenga pool, got {type(allocator).__name__}; "
            "use --memory-backend jenga instead of --radix-cache-backend jenga"
        )
    return JengaRadixCache(context.params, ablation.from_environment())
