"""What is hooked of a scheduler that serves: rounds and steps, requests, weights and bytes."""

from __future__ import annotations

from sglang_jenga.boot.hooks import Hook
from sglang_jenga.boot.rebinding import Rebinding

_OURS = "sglang_jenga"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_BATCH = "sglang.srt.managers.schedule_batch"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_OBSERVER = (
    "sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver"
)

ROUNDS = (
    Hook(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        "around",
        "(self, prefill_delayer_single_pass, running_batch)",
        f"{_OURS}.serving.scheduling:next_prefill",
        "a round of admission",
        "`batch_is_full`, and who resets it where there are windows; up to how many waiting "
        "requests `lpm` sorts",
    ),
    Hook(
        f"{_ADDER}.__init__",
        "after",
        "(self, page_size, tree_cache, token_to_kv_pool_allocator, running_batch, new_token_ratio, "
        "rem_input_tokens, rem_chunk_tokens, num_mixed_decode_tokens, "
        "priority_scheduling_preemption_threshold, max_prefill_bs, max_running_requests, "
        "prefill_max_requests, prefill_delayer_single_pass, dllm_config, waiting_queue_len, "
        "prefill_tile_block_m)",
        f"{_OURS}.serving.scheduling:begin_round",
        "what the round has promised so far",
        "that `memory_budget` is set in this constructor",
    ),
    Hook(
        f"{_ADDER}.add_chunked_req",
        "around",
        "(self, req)",
        f"{_OURS}.serving.scheduling:ask_for_chunk",
        "room for the next chunk of a prompt",
        "that the budget is asked in here, and cuts the chunk",
    ),
    Hook(
        f"{_ADDER}.add_one_req",
        "around",
        "(self, req, has_chunked_req, truncation_align_size)",
        f"{_OURS}.serving.scheduling:ask_for_request",
        "room for a new request, all groups at once",
        "that the budget is asked in here, before anything is locked",
    ),
    Hook(
        f"{_SCHEDULER}.get_next_batch_to_run",
        "after",
        "(self, running_batch, last_batch)",
        f"{_OURS}.serving.scheduling:next_batch",
        "nobody waits for ever",
        "the plan's fields `batch_to_run` and `running_batch`; `release_req`; how an abort is sent",
    ),
    Hook(
        f"{_SCHEDULER}.update_running_batch",
        "around",
        "(self, batch)",
        f"{_OURS}.serving.scheduling:update_running_batch",
        "room for a decode step",
        "that `check_decode_mem` and retraction are reached from here",
    ),
    Hook(
        f"{_BATCH}.ScheduleBatch.retract_decode",
        "around",
        "(self)",
        f"{_OURS}.serving.scheduling:retract_decode",
        "the last request is not aborted while memory can still be had",
        "the triple that it returns; `to_finish`",
    ),
    Hook(
        f"{_BATCH}.ScheduleBatch.mamba_lazy_prealloc_at_boundary",
        "around",
        "(self, mamba_track_interval)",
        f"{_OURS}.serving.scheduling:take_second_slots",
        "of a step only the requests at a track boundary are looked at",
        "which fields of the batch it reads",
    ),
    Hook(
        f"{_BATCH}.ScheduleBatch.maybe_evict_swa",
        "around",
        "(self)",
        f"{_OURS}.serving.scheduling:maybe_evict_swa",
        "what lies behind windows is given back",
        "`swa_evicted_seqlen`, and who else frees behind windows",
    ),
    Hook(
        f"{_CHECKER}._check_kv_page_invariants",
        "around",
        "(self)",
        f"{_OURS}.serving.scheduling:check_page_invariants",
        "SGLang's sanity check, on our pages",
        "`_requests_owning_rows`, `kv_committed_len` and `kv_allocated_len`",
    ),
    Hook(
        f"{_CHECKER}._check_full_pool",
        "around",
        "(self, ps, uncached)",
        f"{_OURS}.serving.usage:check_full_pool",
        "the same where text and images share the pool",
        "the arguments of `_check_pool_invariant`",
    ),
    Hook(
        f"{_OBSERVER}._get_token_info",
        "around",
        "(self)",
        f"{_OURS}.serving.usage:token_stats",
        "there the tokens that fit are no fixed number",
        "the fields of `PoolStats`",
    ),
    Hook(
        f"{_OBSERVER}.get_pool_stats",
        "around",
        "(self)",
        f"{_OURS}.serving.usage:all_stats",
        "token usage tells how full the one pool is",
        "the methods of `PoolStats`, and who decides by them",
    ),
    Hook(
        f"{_ALLOCATION}.alloc_for_extend",
        "around",
        "(batch)",
        f"{_OURS}.serving.scheduling:alloc_for_extend",
        "one allocation for a step of prompts, from what the host knows",
        "which fields of the batch are on the host: `prefix_lens`, `extend_lens`, `kv.holds_kv`",
    ),
    Hook(
        f"{_ALLOCATION}.alloc_for_decode_default",
        "around",
        "(batch, token_per_req)",
        f"{_OURS}.serving.scheduling:alloc_for_decode",
        "one allocation for a decode step, from what the host knows",
        "`kv.kv_allocated_len`; that one call serves one step",
    ),
)
REQUESTS = (
    Hook(
        f"{_SCHEDULER}.init_req_max_new_tokens",
        "around",
        "(self, req)",
        f"{_OURS}.serving.scheduling:settle_answer",
        "whose answer's length the allocator is asked about",
        "that `max_new_tokens_for_memory` is called in here, after a prompt has its images",
    ),
    Hook(
        "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init",
        "around",
        "(self, req, recv_req)",
        f"{_OURS}.boot.request_rules:validate_beams",
        "beam search is refused with status 400",
        "that a reason which it returns becomes status 400",
    ),
)
WEIGHTS = (
    Hook(
        f"{_BATCH}.retract_all",
        "around",
        "(*, reqs, req_to_token_pool, token_to_kv_pool_allocator, tree_cache, "
        "hisparse_coordinator, offload_kv)",
        f"{_OURS}.serving.weight_changes:retract_all",
        "nobody resumes an answer from KV of old weights",
        "who else retracts everybody; what a pause keeps",
    ),
    Hook(
        f"{_UPDATER}.flush_cache_after_weight_update",
        "after",
        "(self, recv_req, success, message)",
        f"{_OURS}.serving.weight_changes:drop_answers",
        "the same for requests retracted before",
        "whether weights can change by another way",
    ),
)
BYTES = (
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs",
        "after",
        "(self, capture_decode_cuda_graph)",
        f"{_OURS}.serving.zeroing:after_capture",
        "what capture wrote for rows of padding is zeroed",
        "whether anything is captured, or warmed up, after this",
    ),
    Hook(
        f"{_UPDATER}.resume_memory_occupation",
        "after",
        "(self, recv_req)",
        f"{_OURS}.serving.zeroing:after_resume",
        "memory that comes back from the memory saver is zeroed",
        "that the cache is flushed when it goes; what else lies in the region of the KV cache",
    ),
)
_SCHEDULE = "sglang.srt.managers.mm_schedule"
_CACHE = f"{_OURS}.boot.image_cache"
IMAGES = (
    Hook(
        "sglang.srt.mem_cache.kv_cache_builder.build_kv_cache",
        "after",
        "(*, server_args, model_config, tp_worker, page_size, spec_algorithm, enable_metrics, "
        "enable_kv_cache_events, enable_hierarchical_cache, hicache_draft_plan, "
        "dynamo_kv_event_format, kv_event_lora_names, draft_swa_window)",
        f"{_CACHE}:after_build",
        "what a vision tower makes of images lies in idle large pages",
        "the fields of `KVCacheBuildResult`",
    ),
    Hook(
        f"{_SCHEDULE}.init_mm_embedding_cache",
        "around",
        "(max_size)",
        f"{_CACHE}:init_cache",
        "so SGLang makes no cache for it",
        "that `build_kv_cache` makes it, and nobody else",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.mm_runtime_reservation_gb",
        "around",
        "(*, is_multimodal, mm_feature_transport)",
        f"{_CACHE}:reservation",
        "so no memory is set aside for it",
        "that the size of the cache is read in here from SGLANG_VLM_CACHE_SIZE_MB",
    ),
    Hook(
        f"{_SCHEDULE}._get_chunked_prefill_embedding",
        "before",
        "(data_embedding_func, embedding_items, items_size, prefix_length, extend_length, "
        "items_offset_list, input_ids)",
        f"{_OURS}.serving.embeddings:before_embedding",
        "which images the prompt in flight has rows left of",
        "that every look-up of a step comes after it; `offsets` and `hash` of an item",
    ),
    Hook(
        f"{_SCHEDULE}._get_chunked_embedding_full",
        "around",
        "(data_embedding_func, embedding_items_per_req, items_offset, extend_prefix_len, "
        "extend_seq_len, input_ids, device)",
        f"{_OURS}.serving.image_runs:embedding_of_chunk",
        "images that are several runs of tokens are looked up one by one",
        "`_get_chunked_embedding_by_item`, which is called instead, and whether SGLang calls it "
        "for images of several runs by now; then drop the row",
    ),
)
EMBEDDINGS = (
    Rebinding(
        f"{_SCHEDULE}.embedding_cache",
        "replace",
        "NoneType",
        f"{_OURS}.serving.embeddings:PooledEmbeddings",
        "and looks for it there; bound to an object of this class",
        "who else reads it, and what it is asked",
    ),
)
_CONV = "sglang.kernels.ops.mamba"
_COPIES = f"{_OURS}.memory.conv_copies"
_GUARDED = f"{_OURS}.memory.guarded_states"
_NARROW = "its kernel counts where a state lies in 32 bits: it works on copies"
_FAR = "whether it counts in 64 bits by now; then drop the row"
STATES = (
    Rebinding(
        f"{_CONV}.causal_conv1d_fwd",
        "around",
        "(x, weight, bias_, conv_states, query_start_loc, cache_indices, has_initial_state, "
        "silu_activation, pad_slot_id)",
        f"{_COPIES}:causal_conv1d_fwd",
        _NARROW,
        _FAR,
    ),
    Rebinding(
        f"{_CONV}.causal_conv1d_update",
        "around",
        "(x, conv_state, weight, bias_, silu_activation, cache_seqlens, conv_state_indices, "
        "pad_slot_id)",
        f"{_COPIES}:causal_conv1d_update",
        _NARROW,
        _FAR,
    ),
    Rebinding(
        f"{_CONV}.lfm_short_conv.fused_lfm_short_conv_prefill",
        "around",
        "(b, c, x, weight, state, query_start_loc, cache_indices, has_initial_state, max_seq_len)",
        f"{_COPIES}:fused_lfm_short_conv_prefill",
        _NARROW,
        _FAR,
    ),
    Rebinding(
        f"{_CONV}.lfm_short_conv.fused_lfm_short_conv_decode",
        "around",
        "(b, c, x, weight, state, cache_indices)",
        f"{_COPIES}:fused_lfm_short_conv_decode",
        _NARROW,
        _FAR,
    ),
    Rebinding(
        "sglang.kernels.ops.attention.fla.fused_recurrent.fused_recurrent_gated_delta_rule_update",
        "around",
        "(q, k, v, g, beta, scale, initial_state_source, initial_state_indices, cu_seqlens, "
        "use_qk_l2norm_in_kernel, disable_state_update, disable_output_calculation, "
        "intermediate_states_buffer, intermediate_state_indices, cache_steps, "
        "retrieve_parent_token)",
        f"{_GUARDED}:fused_recurrent_gated_delta_rule_update",
        "its guard makes a copy of all states, and the kernel leaves the new ones there",
        "whether the guard spares the states by now; then drop the row",
        where=f"{_GUARDED}:on_a_gpu",
    ),
)
