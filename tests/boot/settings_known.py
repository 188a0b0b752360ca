"""Where SGLang's memory, cache and scheduling code stands under --memory-backend jenga, and who
honours the settings that it reads. `test_settings` compares this with SGLang's source.

A place is a folder, a file, or ``file::function`` (with all that lies in it). Of several that match
the longest counts; what no place names runs as it is.
"""

from __future__ import annotations

# Memory, cache and scheduling code: what sizes, places, finds, keeps, gives up or orders KV and
# states, and what decides which request runs.
SCOPE = (
    "mem_cache",
    "session",
    "runtime_context.py",
    "managers/schedule_batch.py",
    "managers/schedule_policy.py",
    "managers/scheduler.py",
    "managers/scheduler_components",
    "managers/scheduler_input_blocker.py",
    "managers/scheduler_pp_mixin.py",
    "managers/prefill_delayer.py",
    "managers/min_free_slots_delayer.py",
    "managers/cache_controller.py",
    "managers/hisparse_coordinator.py",
    "managers/mm_schedule.py",
    "managers/overlap_utils.py",
    "managers/tp_worker.py",
    "managers/utils.py",
    "model_executor/pool_configurator.py",
    "model_executor/model_runner_components/kv_pool_runtime.py",
    "arg_groups/overrides.py::post_capture_kv_sizing_planned",
)

# A server never gets there, or what comes of it is thrown away. By the module that stands in.
REPLACED = {
    "serving/cache": (
        "mem_cache/radix_cache.py",
        "mem_cache/pure_swa_radix_cache.py",
        "mem_cache/unified_radix_cache.py",
        "mem_cache/unified_cache",
        "mem_cache/rust_tree_core",
        "mem_cache/evict_policy.py",
        "mem_cache/registry.py::default_radix_cache_factory",
        "mem_cache/registry.py::create_unified_radix_cache",
        # It hands settings over to the cache, which may not look at them.
        "mem_cache/kv_cache_builder.py::build_kv_cache",
        "managers/schedule_batch.py::ScheduleBatch.maybe_evict_swa",
        "managers/schedule_batch.py::ScheduleBatch._swa_eviction_trigger",
    ),
    "serving/allocator": ("mem_cache/allocator",),
    "memory/state": (
        "mem_cache/memory_pool.py::MambaPool",
        "mem_cache/mamba_slot_fused.py",
    ),
    "serving/state_caching": (
        "mem_cache/memory_pool.py::HybridReqToTokenPool.donate_mamba_ping_pong_slot",
    ),
    "memory/kv": (
        "mem_cache/swa_memory_pool.py",
        "mem_cache/utils.py::maybe_init_custom_mem_pool",
    ),
    "boot/construction": ("mem_cache/kv_cache_configurator.py",),
    "plan/planner": ("model_executor/pool_configurator.py",),
    "boot/validate": (
        "model_executor/model_runner_components/kv_pool_runtime.py",
        "arg_groups/overrides.py::post_capture_kv_sizing_planned",
    ),
}
# What of it runs all the same.
KEPT = (
    "mem_cache/kv_cache_configurator.py::mm_runtime_reservation_gb",
    "mem_cache/kv_cache_configurator.py::KVCacheConfigurator._profile_available_bytes",
    "mem_cache/kv_cache_configurator.py::KVCacheConfigurator._resolve_memory_pool_config",
    "mem_cache/kv_cache_configurator.py::KVCacheConfigurator.resolve_max_num_reqs",
    "mem_cache/kv_cache_configurator.py::KVCacheConfigurator._build_req_to_token_pool",
)

_MODEL = "it caches more per token than K and V"
_HOST = "enable_hierarchical_cache"
# Only a refused flag or model gets there. By its rule: the flag's field, the model rule's reason.
REFUSED = {
    _HOST: (
        "mem_cache/hicache_auto_size.py",
        "mem_cache/hicache_key_scheme.py",
        "mem_cache/hicache_storage.py",
        "mem_cache/memory_pool_host.py",
        "mem_cache/pool_host",
        "mem_cache/host_memory.py",
        "mem_cache/hybrid_cache",
        "mem_cache/l2_transfer.py",
        "mem_cache/storage_prefetch.py",
        "mem_cache/mla_host_dedup.py",
        "mem_cache/buffer_mode",
        "managers/cache_controller.py",
        "mem_cache/kv_cache_builder.py::prepare_hicache_staging",
        "mem_cache/kv_cache_builder.py::resolve_decode_retraction_backup",
        "mem_cache/unified_radix_cache.py::UnifiedRadixCache.init_hicache",
        "mem_cache/unified_cache/unified_tree_core.py::UnifiedTreeCore.drive_host_eviction",
        "mem_cache/rust_tree_core/adapter.py::RustUnifiedTreeCore.drive_host_eviction",
    ),
    "hicache_storage_backend": ("mem_cache/storage",),
    "enable_unified_cache_external_linker": (
        "mem_cache/unified_cache/linker_factory.py",
        "mem_cache/unified_cache/unified_cache_linker.py",
    ),
    "enable_hisparse": (
        "mem_cache/hisparse_memory_pool.py",
        "mem_cache/sparsity",
        "managers/hisparse_coordinator.py",
    ),
    "enable_unified_memory": (
        "mem_cache/unified_memory_pool.py",
        "mem_cache/unified_draft_pool.py",
        "mem_cache/allocator/unified_hybrid_swa.py",
        "mem_cache/allocator/unified_sub_pool.py",
        "mem_cache/kv_cache_configurator.py::_should_enable_lazy_compaction",
    ),
    "enable_kv_cache_sharding": (
        "mem_cache/page_interleave.py",
        "mem_cache/page_interleave_pool.py",
        "mem_cache/allocator/page_interleave.py",
    ),
    "enable_int8_mamba_checkpoint": ("mem_cache/mamba_checkpoint_pool.py",),
    "speculative_algorithm": ("mem_cache/draft_kv_budget.py",),
    _MODEL: (
        "mem_cache/deepseek_v4_memory_pool.py",
        "mem_cache/deepseek_v4_compress_state.py",
        "mem_cache/dsv41_request_window.py",
        "mem_cache/dsa_cache_layer_split.py",
        "mem_cache/index_key_cache.py",
        "mem_cache/qsa_kv_pool.py",
        "mem_cache/minimax_m3_nvfp4_pool.py",
        "mem_cache/memory_pool.py::get_minimax_sparse_index_dtype",
        "mem_cache/memory_pool.py::MiniMaxSparseKVPool",
        "model_executor/pool_configurator.py::DSV4PoolConfigurator",
    ),
}

# Settings whose reader in SGLang runs as it does without the flag. By a module that reads them, in
# the scope above or, where the scope only asks along, elsewhere.
HONOURED_BY_SGLANG = {
    "arg_groups/model_override_base.py": "attention_backend",
    "layers/moe/mega_moe.py": "SGLANG_AMD_USE_FLYDSL_MEGA_MOE",
    "managers/mm_schedule.py": "chunked_prefill_size",
    "managers/overlap_utils.py": "SGLANG_IS_IN_CI",
    "managers/prefill_delayer.py": """
        SGLANG_NCCL_ALL_GATHER_IN_OVERLAP_SCHEDULER_SYNC_BATCH SGLANG_PREFILL_DELAYER_DEBUG_LOG
        disable_overlap_schedule prefill_delayer_max_delay_ms prefill_delayer_queue_min_ratio
        prefill_max_requests
    """,
    "managers/schedule_batch.py": """
        SGLANG_MM_BUFFER_SIZE_MB SGLANG_RETRACT_DECODE_STEPS SGLANG_TEST_MAMBA_LAZY_ALLOC_FAIL
        retraction_policy schedule_low_priority_values_first strip_thinking_cache
    """,
    "managers/schedule_policy.py": """
        SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION SGLANG_ENABLE_WAITING_PREFIX_REFRESH
        SGLANG_EXACT_CHUNK_FILL SGLANG_PREFILL_TILE_BUDGET SGLANG_PREFILL_TILE_BUDGET_MODE
        SGLANG_RADIX_FORCE_MISS SGLANG_ROUTING_KEY_POLICY_DEBUG_LOG schedule_policy
    """,
    "managers/scheduler.py": """
        SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP SGLANG_DP_RANK
        SGLANG_ENABLE_COLOCATED_BATCH_GEN SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION
        SGLANG_ENABLE_PP_SPEC SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY
        SGLANG_ENABLE_WAR_BARRIER SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE
        SGLANG_FORCE_COARSE_WAR_BARRIER SGLANG_KILLPG_ON_SCHEDULER_EXCEPTION SGLANG_LOG_GC
        SGLANG_MAX_NEW_TOKENS_LIMIT SGLANG_NUMA_BIND_V2
        SGLANG_PREFILL_DELAYER_MAX_PREFILL_BS_WINDOW_SIZE SGLANG_REQ_RUNNING_TIMEOUT
        SGLANG_REQ_WAITING_TIMEOUT SGLANG_RUST_SERVER SGLANG_SCHEDULER_MAX_RECV_PER_POLL
        SGLANG_SET_CPU_AFFINITY SGLANG_TEST_RETRACT SGLANG_TEST_RETRACT_INTERVAL
        SGLANG_TEST_RETRACT_NO_PREFILL_BS SGLANG_TEST_SCRIPTED_RUNTIME
        SGLANG_TEST_STUCK_SCHEDULER_INIT abort_on_priority_when_disabled allow_auto_truncate
        attn_dp_size disable_priority_preemption disaggregation_bootstrap_port
        disaggregation_decode_enable_radix_cache disaggregation_mode
        disaggregation_enable_kv_checksum disaggregation_transfer_backend elastic_ep_backend
        enable_broadcast_mm_inputs_process enable_deterministic_inference
        enable_lora enable_lora_overlap_loading enable_memory_saver
        enable_metrics enable_metrics_for_all_schedulers enable_mixed_chunk
        enable_pd_role_switch enable_prefill_delayer enable_priority_scheduling enable_trace
        encoder_transfer_backend ep_join_mode ep_size grpc_mode grpc_port
        hicache_host_memory_mode hicache_storage_prefetch_retry_max_attempts
        hicache_storage_prefetch_retry_poll_interval kv_events_config language_model_only
        language_only load_publish_endpoint load_snapshot_publish_interval
        lora_drain_wait_threshold lora_paths max_loras_per_batch min_free_slots_delay
        mlx_enable_sampling mm_feature_transport model_path moe_dp_size
        num_reserved_decode_tokens otlp_service_name otlp_traces_endpoint page_size
        pp_max_micro_batch_size prefill_decode_interval prefill_decode_interval_min_bs
        prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark
        priority_scheduling_preemption_threshold reasoning_parser revision sampling_backend
        sampling_mask_max_tokens served_model_name skip_tokenizer_init sleep_on_idle
        smg_grpc_mode soft_watchdog_timeout speculative_draft_model_path
        speculative_draft_model_revision stream_interval tokenizer_backend tokenizer_mode
        tokenizer_path tp_size trace_modules trust_remote_code watchdog_timeout weight_version
    """,
    "managers/scheduler_pp_mixin.py": """
        pp_size
    """,
    "managers/scheduler_components/batch_result_processor.py": """
        SGLANG_EMBEDDINGS_SPARSE_HEAD SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM
    """,
    "managers/scheduler_components/dp_attn.py": """
        SGLANG_ENABLE_METRICS_DP_ATTENTION SGLANG_SCHEDULER_SKIP_ALL_GATHER dtype dwdp_size
        moe_a2a_backend speculative_moe_a2a_backend
    """,
    "managers/scheduler_components/dynamic_chunk_sizer.py": """
        SGLANG_DYNAMIC_CHUNKING_SMOOTH_FACTOR
    """,
    "managers/scheduler_components/idle_sleeper.py": "SGLANG_EMPTY_CACHE_INTERVAL",
    "managers/scheduler_components/internal_state.py": "SGLANG_EXPOSE_OWN_ENV_VARS dp_size",
    "managers/scheduler_components/invariant_checker.py": """
        SGLANG_CHECK_KV_PAGE_INVARIANTS SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE
        SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK
    """,
    "managers/scheduler_components/logprob_result_processor.py": "enable_mis",
    "managers/scheduler_components/metrics_reporter.py": """
        SGLANG_CACHE_HIT_RATE_WINDOW_SECONDS SGLANG_ENABLE_METRICS_DEVICE_TIMER
        SGLANG_LOG_FORWARD_ITERS SGLANG_RECORD_STEP_TIME decode_log_interval
        enable_forward_pass_metrics enable_mfu_metrics forward_pass_metrics_ipc_name
        forward_pass_metrics_worker_id speculative_num_draft_tokens speculative_num_steps
    """,
    "managers/scheduler_components/new_token_ratio_tracker.py": """
        SGLANG_INIT_NEW_TOKEN_RATIO SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR
        SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS schedule_conservativeness
    """,
    "managers/scheduler_components/output_streamer.py": """
        SGLANG_FORCE_STREAM_INTERVAL SGLANG_TEST_CRASH_AFTER_STREAM_OUTPUTS
        enable_request_time_stats_logging
    """,
    "managers/scheduler_components/profiler_manager.py": """
        SGLANG_MEM_PROFILE_MAX_ENTRIES SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS SGLANG_PROFILE_V2
        SGLANG_TORCH_PROFILER_DIR base_gpu_id
    """,
    "managers/scheduler_components/recv_skipper.py": """
        SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_DECODE SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_DEFAULT
        SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_NONE
        SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_TARGET_VERIFY scheduler_recv_interval
    """,
    "managers/scheduler_components/request_receiver.py": """
        enable_dp_attention_local_control_broadcast
    """,
    "managers/scheduler_components/weight_updater.py": "weight_cache_mode",
    "managers/tp_worker.py": """
        SGLANG_ENABLE_DELAY_SAMPLE max_prefill_tokens max_queued_requests mem_fraction_static
        random_seed
    """,
    "managers/utils.py": "speculative_eagle_topk",
    "mem_cache/base_prefix_cache.py": "extra_metric_labels",
    "mem_cache/kv_cache_configurator.py": """
        SGLANG_MM_FEATURE_CACHE_MB cuda_graph_config
        disaggregation_decode_extra_slots max_running_requests
    """,
    "mem_cache/memory_pool.py": "SGLANG_NATIVE_MOVE_KV_CACHE SGLANG_USE_AITER",
    "runtime_context.py": """
        SGLANG_ROLE_NAMESPACES SGLANG_ROLE_NAMESPACES_OUT enable_cp_tp_group_sharing
        ep_join_rank_offset expert_balancedness_report_mode mamba_track_interval max_ep_size
    """,
    "rust_extensions/loader.py": "SGLANG_RUST_BUILD_MODE",
}

# Settings whose reader in SGLang is replaced: module that honours it, and what it reads there.
HONOURED_HERE = {
    "disable_radix_cache": ("serving/cache", "params.disable"),
    "mamba_max_states_per_path": ("serving/cache", "get_exec().mamba.mamba_max_states_per_path"),
    "max_total_tokens": ("boot/geometry", "get_schedule().max_total_tokens"),
}

# Settings of a refused flag or model that do nothing without it, in stock SGLang neither. By the
# rule that refuses it.
OPTIONS_OF_REFUSED = {
    "enable_flexkv": ("flexkv_config_file",),
    "enable_lmcache": ("lmcache_config_file",),
    "enable_linear_replayssm": ("linear_replayssm_cache_len",),
    "enable_unified_cache_external_linker": ("unified_cache_external_linker_backend",),
    "speculative_algorithm": (
        "enable_multi_layer_eagle",
        "speculative_draft_attention_backend",
        "speculative_draft_kv_cache_dtype",
    ),
    "device": ("SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD",),
    _MODEL: (
        "SGLANG_DSV4_COMPRESS_STATE_DTYPE",
        "dsa_decode_backend",
        "dsa_prefill_backend",
        "qsa_indexer_dtype",
    ),
}
