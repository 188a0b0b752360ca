"""SGLang's view of a model turned into layer groups, and the bytes its user asked for.

The only reader of SGLang's ModelConfig for the pool; the planner does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.mem_cache.allocation_sizing import get_mamba_tracking_slots
from sglang.srt.runtime_context import get_disagg, get_exec, get_parallel, get_schedule

from sglang_jenga.boot import known_model, window_models
from sglang_jenga.layers.base import Address, LayerKind, Load
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.registry import sliding_kind
from sglang_jenga.layers.state import State
from sglang_jenga.memory.buffer import HeadShape
from sglang_jenga.memory.state import StateShape
from sglang_jenga.plan.planner import PoolTooSmallError, plan_pool
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.plan.spec import LayerGroup, PoolPlan, format_bytes, row_group
from sglang_jenga.plan.state_sizes import SLOT_BYTES, with_slots

TRANSFERS_PLAN_BYTES = 16 << 30
"""Pools of this size and more are planned alike where servers send each other pages."""
SMALLEST_REQUEST = 16
"""Tokens, prompt and answer together, of a request that any pool must be able to hold."""


class ServedLayers(NamedTuple):
    """Layer groups of one rank: attention groups, with the heads of one layer of each, then the
    state group if there is one."""

    groups: tuple[LayerGroup, ...]
    heads: tuple[HeadShape, ...]
    state: StateShape | None = None

    @property
    def row(self) -> LayerGroup:
        """The group whose slots SGLang's rows name."""
        return self.groups[row_group(self.groups)]


def stages_of(configurator: Any) -> list[range]:
    """Layers that each stage of a pipeline has in its pool; of one stage all, without a pipeline.

    Of models that do not tell it which layers a stage has (Nemotron-H), SGLang builds pools for all
    layers in each.
    """
    count, every = get_parallel().pp_size, configurator.model_config.num_hidden_layers
    info = configurator.layer_info
    if count == 1 or (info.start_layer, info.end_layer) == (0, every):
        return [range(info.start_layer, info.end_layer)]
    return [range(*get_pp_indices(every, stage, count)) for stage in range(count)]


def geometry_of(configurator: Any) -> ServedLayers:
    """Read the layer groups of the model that SGLang's ``KVCacheConfigurator`` builds pools for.

    Entries have room for as many layers as the stage of a pipeline has that has most of a group:
    all stages then make one plan, and come to the same decisions from it without a word.
    """
    model, layers = configurator.model_config, configurator.layer_info
    tp = get_parallel().attn_tp_size
    dtype = configurator.kv_cache_dtype
    stages = stages_of(configurator)

    def elsewhere(here: Sequence[int], of_model: Iterable[int]) -> int:
        """Layers that the stage which has most of these has more than this one."""
        every = set(of_model)
        most = max(sum(layer_id in every for layer_id in stage) for stage in stages)
        return 0 if len(stages) == 1 else most - len(here)

    def group(
        kind: LayerKind,
        layer_ids: Sequence[int],
        heads: HeadShape,
        of_model: Iterable[int] = (),
    ) -> LayerGroup:
        """``layer_ids``: those of this rank; ``of_model``: those of all stages."""
        more = elsewhere(layer_ids, of_model)
        entry_bytes = heads.entry_bytes(len(layer_ids) + more, dtype.itemsize) or SLOT_BYTES
        page_size = configurator.pool_page_size
        return LayerGroup(
            kind, tuple(layer_ids), entry_bytes, page_size, str(dtype), elsewhere=more
        )

    full = HeadShape(model.get_num_kv_heads(tp), model.head_dim, model.v_head_dim)
    if model.is_encoder_decoder:
        known = known_model.of_model(model)
        stored = enumerate(known.row.stored_layers(known.read))
        places = {layer_id: place for layer_id, (place,) in stored}
        own, cross = (
            [layer_id for layer_id in places if places[layer_id] == place]
            for place in ("full", "cross")
        )
        groups, heads = (group(Full(), own, full), group(Cross(), cross, full)), (full, full)
    elif configurator.is_hybrid_swa:
        sliding = HeadShape(
            model.get_swa_num_kv_heads(tp), model.swa_head_dim, model.swa_v_head_dim
        )
        row = known_model.of_model(model).row
        # SGLang's window excludes the current token, ours includes it.
        window = configurator.sliding_window_size + 1
        groups = (
            group(Full(), layers.full_attention_layer_ids, full, model.full_attention_layer_ids),
            group(
                sliding_kind(row.sliding, window),
                layers.swa_attention_layer_ids,
                sliding,
                model.swa_attention_layer_ids,
            ),
        )
        heads = (full, sliding)
    elif configurator.mambaish_config is not None:
        every = configurator.mambaish_config.full_attention_layer_ids
        stage = range(layers.start_layer, layers.end_layer)
        attention = [layer_id for layer_id in every if layer_id in stage]
        groups, heads = (group(Full(), attention, full, every),), (full,)
    else:
        stage = range(layers.start_layer, layers.start_layer + layers.num_effective_layers)
        groups, heads = (group(Full(), stage, full, range(model.num_hidden_layers)),), (full,)
    if configurator.mambaish_config is None:
        return ServedLayers(groups, heads)
    params = configurator.mambaish_config.mamba2_cache_params
    layer_ids = tuple(configurator._get_mamba_layer_ids_for_req_pool())
    more = elsewhere(layer_ids, params.layers)
    state = StateShape.of(params, layer_ids, len(layer_ids) + more)
    states = LayerGroup(
        State(), layer_ids, state.entry_bytes, element=state.element, elsewhere=more
    )
    return ServedLayers((*groups, states), heads, state)


def asked_bytes(
    configurator: Any, geometry: ServedLayers, cap_tokens: int | None = None
) -> int | None:
    """Bytes that the user's token limit gives the pool, None if there is no limit in bytes.

    ``cap_tokens`` is a limit that SGLang sets itself, later.
    """
    limits = [limit for limit in (get_schedule().max_total_tokens, cap_tokens) if limit is not None]
    # Without attention, tokens say nothing about bytes; states do, if the user gave their number.
    attention = any(group.num_layers for group in geometry.groups[: len(geometry.heads)])
    counts = attention or get_schedule().max_mamba_cache_size is not None
    if not limits or not counts:
        return None
    return pinned_bytes(geometry, min(limits), stock_is_hybrid=_stock_is_hybrid(configurator))


def _stock_is_hybrid(configurator: Any) -> bool:
    """Whether stock SGLang has a window pool for this model too."""
    config = configurator.model_config
    ours = window_models.window_layers(config.hf_config.architectures, config.hf_text_config)
    return configurator.is_hybrid_swa and ours is None


def pinned_bytes(geometry: ServedLayers, num_tokens: int, *, stock_is_hybrid: bool) -> int:
    """Bytes that ``--max-total-tokens num_tokens`` takes in stock SGLang for this model; in a
    pipeline, in a stage that has of each group as many layers as any.

    Its padding page included. Stock sizes a window pool by a fixed ratio, or, for the models it
    stores as full KV, gives every layer a row for every token.
    """
    page_size = geometry.row.tokens_per_page
    tokens = num_tokens // page_size * page_size
    total = 0
    for group in geometry.groups[: len(geometry.heads)]:
        if not group.num_layers:
            continue
        rows = tokens
        if group.kind.address is Address.MAPPED and stock_is_hybrid:
            ratio = get_schedule().swa_full_tokens_ratio
            rows = int(tokens * ratio) // page_size * page_size
        total += (rows + page_size) * group.entry_bytes
    if geometry.state is None:
        return total
    # So many states as the user asks for, or the share of stock's fixed ratio.
    slots = get_schedule().max_mamba_cache_size
    if slots is None:
        return total + int(total * get_schedule().mamba_full_memory_ratio)
    return total + (slots + 1) * geometry.groups[-1].entry_bytes


def states_per_request(geometry: ServedLayers) -> int:
    """States that a request takes at once: its own and those that it is tracked in."""
    if geometry.state is None:
        return 0
    mamba = get_exec().mamba
    return 1 + get_mamba_tracking_slots(
        extra_buffer=mamba.enable_mamba_extra_buffer,
        overlap=not get_schedule().disable_overlap_schedule,
        lazy=mamba.enable_mamba_extra_buffer_lazy,
    )


def plan_for(geometry: ServedLayers, pool_bytes: int) -> PoolPlan:
    """The pool's plan, or one line that says what the smallest request would need."""
    # SGLang admits a request while more than its tokens and a page are free.
    smallest = SMALLEST_REQUEST + geometry.row.tokens_per_page + 1
    groups = with_slots(geometry.groups, pool_bytes)
    states = states_per_request(geometry)
    try:
        plan = plan_pool(groups, _planned_bytes(pool_bytes), largest=Load(smallest, states))
        plan = replace(plan, num_large=pool_bytes // plan.large_page_bytes)
        if not RequestNeed(plan, states).fits(smallest):
            raise PoolTooSmallError(
                f"pool of {format_bytes(pool_bytes)} holds {plan.num_large} large pages of "
                f"{format_bytes(plan.large_page_bytes)}, of which windows may leave two half empty"
            )
    except PoolTooSmallError as error:
        raise PoolTooSmallError(
            f"--memory-backend jenga: {error}; a request of {SMALLEST_REQUEST} tokens must fit "
            "beside a free page: raise --mem-fraction-static or --max-total-tokens"
        ) from error
    return plan


def _planned_bytes(pool_bytes: int) -> int:
    """Bytes by which the plan weighs paddings against each other. Servers that send each other
    pages must come to the same ones, and their pools are seldom of one size."""
    if get_disagg().disaggregation_mode == "null":
        return pool_bytes
    return min(1 << (pool_bytes.bit_length() - 1), TRANSFERS_PLAN_BYTES)


def longest_text(plan: PoolPlan, states: int = 1) -> int:
    """Tokens, prompt and answer, of the longest single request without an image that the empty pool
    can hold, of which each takes so many ``states``; whole pages."""
    page_size = plan.tokens_per_page
    longest = RequestNeed(plan, states).longest(plan.num_slots(plan.row_group))
    return longest // page_size * page_size


def longest_request(plan: PoolPlan, states: int = 1) -> int:
    """The same of any request, which an encoder's tokens may fill. It bounds what SGLang lets in;
    whether the one at hand fits is asked when it comes (`Capacity.most_new_tokens`)."""
    longest = longest_text(plan, states)
    for group_id, item in enumerate(plan.groups):
        if item.group.kind.address is Address.ENCODER:
            most = plan.num_slots(group_id)
            longest = max(longest, RequestNeed(plan, states).longest(most, encoder=most))
    return longest
