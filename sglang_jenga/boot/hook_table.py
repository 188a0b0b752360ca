"""Every function of SGLang that this package patches, by the moment at which it does.

    FLAG         every process, when SGLang loads its plugins
    LAUNCHER     whoever waits for schedulers           (flag only, as all below)
    CONTROLLER   the data parallel controller
    SCHEDULER    launcher and schedulers, before anything is built

Functions of ours are named, not imported: most processes need few of them, and no torch.
"""

from __future__ import annotations

from sglang_jenga.boot.hooks import Hook

_OURS = "sglang_jenga"
_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_MODEL_CONFIG = "sglang.srt.configs.model_config"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_BATCH = "sglang.srt.managers.schedule_batch"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"

FLAG = (
    Hook(
        f"{_SERVER_ARGS}.add_cli_args",
        "after",
        "(parser)",
        f"{_OURS}.boot.flags:add_flag",
        "--memory-backend on the command line",
    ),
    Hook(
        f"{_SERVER_ARGS}.from_cli_args",
        "around",
        "(cls, args)",
        f"{_OURS}.boot.flags:read_flag",
        "the flag's value travels with the record of arguments",
    ),
    Hook(
        f"{_SERVER_ARGS}.resolved_dict",
        "after",
        "(self)",
        f"{_OURS}.boot.flags:show_flag",
        "/server_info tells of the flag",
    ),
    Hook(
        f"{_SERVER_ARGS}.resolve_once",
        "around",
        "(self)",
        f"{_OURS}.plugin:resolve_once",
        "refuse what is not served, patch the launcher",
    ),
    Hook(
        "sglang.srt.runtime_context.publish",
        "before",
        "(server_args, *, role, hf_config, ranks)",
        f"{_OURS}.plugin:before_publish",
        "patch a scheduler before it builds anything",
    ),
)
LAUNCHER = (
    Hook(
        "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
        "around",
        "(scheduler_pipe_readers, scheduler_procs)",
        f"{_OURS}.boot.refusal:wait_for_schedulers",
        "a scheduler's refusal reaches the user as one line",
    ),
)
CONTROLLER = (
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController"
        ".launch_tensor_parallel_group",
        "around",
        "(self, server_args, port_args, base_gpu_id, dp_rank, worker_ports)",
        f"{_OURS}.boot.refusal:launch_group",
        "the controller ends as quietly as the scheduler that refused",
    ),
)
_MODEL = (
    Hook(
        "sglang.srt.arg_groups.overrides.post_capture_kv_sizing_planned",
        "around",
        "(server_args)",
        f"{_OURS}.boot.validate:post_capture_sizing",
        "the pool has one size for life",
    ),
    Hook(
        f"{_MODEL_CONFIG}.is_hybrid_swa_model",
        "around",
        "(model_architectures, hf_text_config)",
        f"{_OURS}.boot.window_models:is_hybrid",
        "models with windows that SGLang stores as full KV",
    ),
    Hook(
        f"{_MODEL_CONFIG}.get_hybrid_layer_ids",
        "around",
        "(model_architectures, hf_text_config)",
        f"{_OURS}.boot.window_models:layer_ids",
        "which layers of those models have a window",
    ),
)
CONSTRUCTION = (
    Hook(
        f"{_CONFIGURATOR}.config_from_budget",
        "around",
        "(self, budget_bytes, *, cap_tokens)",
        f"{_OURS}.boot.construction:config_from_budget",
        "one pool in bytes instead of fixed parts",
    ),
    Hook(
        f"{_CONFIGURATOR}._handle_max_mamba_cache",
        "around",
        "(self, total_rest_memory)",
        f"{_OURS}.boot.construction:handle_max_mamba_cache",
        "no share of the memory is set aside for states",
    ),
    Hook(
        f"{_CONFIGURATOR}.resolve_max_num_reqs",
        "around",
        "(self, token_capacity)",
        f"{_OURS}.boot.construction:resolve_max_num_reqs",
        "memory, not a number of state slots, bounds the running requests",
    ),
    Hook(
        f"{_CONFIGURATOR}._init_pools",
        "around",
        "(self, *, sizes, req_to_token_pool, token_to_kv_pool_allocator)",
        f"{_OURS}.boot.construction:init_pools",
        "our pools and allocator",
    ),
    Hook(
        f"{_CONFIGURATOR}.configure",
        "after",
        "(self, *, pre_model_load_memory)",
        f"{_OURS}.boot.construction:configure",
        "nothing but our pools may serve under the flag",
    ),
)
ROUNDS = (
    Hook(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        "around",
        "(self, prefill_delayer_single_pass, running_batch)",
        f"{_OURS}.serving.scheduling:next_prefill",
        "a round of admission",
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
    ),
    Hook(
        f"{_ADDER}.add_chunked_req",
        "around",
        "(self, req)",
        f"{_OURS}.serving.scheduling:ask_for_chunk",
        "room for the next chunk of a prompt",
    ),
    Hook(
        f"{_ADDER}.add_one_req",
        "around",
        "(self, req, has_chunked_req, truncation_align_size)",
        f"{_OURS}.serving.scheduling:ask_for_request",
        "room for a new request, all groups at once",
    ),
    Hook(
        f"{_SCHEDULER}.get_next_batch_to_run",
        "after",
        "(self, running_batch, last_batch)",
        f"{_OURS}.serving.scheduling:next_batch",
        "nobody waits for ever",
    ),
    Hook(
        f"{_SCHEDULER}.update_running_batch",
        "around",
        "(self, batch)",
        f"{_OURS}.serving.scheduling:update_running_batch",
        "room for a decode step",
    ),
    Hook(
        f"{_BATCH}.ScheduleBatch.retract_decode",
        "around",
        "(self)",
        f"{_OURS}.serving.scheduling:retract_decode",
        "the last request is not aborted while memory can still be had",
    ),
    Hook(
        f"{_BATCH}.ScheduleBatch.maybe_evict_swa",
        "around",
        "(self)",
        f"{_OURS}.serving.scheduling:maybe_evict_swa",
        "what lies behind windows is given back",
    ),
    Hook(
        f"{_CHECKER}._check_kv_page_invariants",
        "around",
        "(self)",
        f"{_OURS}.serving.scheduling:check_page_invariants",
        "SGLang's sanity check, on our pages",
    ),
    Hook(
        f"{_ALLOCATION}.alloc_for_extend",
        "around",
        "(batch)",
        f"{_OURS}.serving.scheduling:alloc_for_extend",
        "one allocation for a step of prompts, from what the host knows",
    ),
    Hook(
        f"{_ALLOCATION}.alloc_for_decode_default",
        "around",
        "(batch, token_per_req)",
        f"{_OURS}.serving.scheduling:alloc_for_decode",
        "one allocation for a decode step, from what the host knows",
    ),
)
REQUESTS = (
    Hook(
        "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init",
        "around",
        "(self, req, recv_req)",
        f"{_OURS}.boot.request_rules:validate_beams",
        "beam search is refused with status 400",
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
    ),
    Hook(
        f"{_UPDATER}.flush_cache_after_weight_update",
        "after",
        "(self, recv_req, success, message)",
        f"{_OURS}.serving.weight_changes:drop_answers",
        "the same for requests retracted before",
    ),
)
CPU_ATTENTION = (
    Hook(
        f"{_TORCH_NATIVE}.init_forward_metadata",
        "before",
        "(self, forward_batch)",
        f"{_OURS}.cpu.window_attention:forget_rows",
        "rows of window layers are translated once a forward",
    ),
    *(
        Hook(
            f"{_TORCH_NATIVE}.{method}",
            "around",
            "(self, q, k, v, layer, forward_batch, save_kv_cache)",
            f"{_OURS}.cpu.window_attention:read_window_rows",
            "SGLang reads window layers at the slots of full ones",
        )
        for method in ("forward_extend", "forward_decode")
    ),
)
SCHEDULER = (*_MODEL, *CONSTRUCTION, *ROUNDS, *REQUESTS, *WEIGHTS, *CPU_ATTENTION)
