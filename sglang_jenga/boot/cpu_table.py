"""The part of the table that is for machines without a GPU: SGLang's CPU engine.

CPU_DEVICE      what torch answers where there is no GPU
CPU_RESOLUTION  whoever resolves the configuration   (CPU engine, with the flag or without)
CPU_SCHEDULER   a scheduler process                  (the same)
CPU_ATTENTION   `torch_native` attention             (flag only)
"""

from __future__ import annotations

from sglang_jenga.boot.hooks import Hook
from sglang_jenga.boot.rebinding import UNBOUND, Rebinding

_CPU = "sglang_jenga.cpu"
_HAS_NO_GPU = f"{_CPU}.repairs:has_no_gpu"
_GDN_IS_OURS = f"{_CPU}.state_operators:gdn_states_are_tracked"
_FLA = "sglang.kernels.ops.attention.fla"
_MAMBA = "sglang.srt.layers.attention.mamba"
_BACKEND = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
_TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"

_NO_KERNEL = "the kernel needs a GPU; ours is plain torch, exact whatever the batch"
_KERNEL = "arguments and results: the models call ours as they call SGLang's"

CPU_DEVICE = (
    Rebinding(
        "torch.get_device_module",
        "around",
        "(device)",
        f"{_CPU}.repairs:device_module",
        "a CUDA build of torch answers CUDA, which Qwen3-Next's layers then ask for the device",
        "whether Qwen3-Next's layers still ask; then drop the row",
        where=_HAS_NO_GPU,
    ),
    Rebinding(
        "torch.Tensor.pin_memory",
        "replace",
        "method_descriptor",
        f"{_CPU}.repairs:pin_memory",
        "SGLang pins the mask of tracked requests on every device, and torch fails to",
        "whether the mask is still pinned on a CPU; then drop the row",
        where=_HAS_NO_GPU,
    ),
)
CPU_RESOLUTION = (
    Rebinding(
        "sglang.srt.arg_groups.mamba_hook._platform_supports_mamba_cache_extra_buffer",
        "replace",
        "()",
        f"{_CPU}.state_operators:tracks_states",
        "SGLang's CPU operators cannot snapshot states, ours can",
        "who else asks whether a platform can",
        where=_GDN_IS_OURS,
    ),
)
_UNBOUND_ON_A_CPU = tuple(
    Rebinding(
        f"{_MAMBA}.mamba.{name}",
        "replace",
        UNBOUND,
        f"{_CPU}.conv:{function}",
        "the mixer of Mamba binds its convolutions on GPUs only; that of Mamba-1 imports them here",
        "which names the two mixers call",
    )
    for name, function in (
        ("causal_conv1d_fn", "causal_conv1d_fn"),
        ("causal_conv1d_fn_triton", "causal_conv1d_fn"),
        ("causal_conv1d_update", "causal_conv1d_update"),
        ("causal_conv1d_update_triton", "causal_conv1d_update"),
    )
)
CPU_SCHEDULER = (
    Rebinding(
        f"{_MAMBA}.causal_conv1d.causal_conv1d_fn",
        "replace",
        "(x, weight, bias, query_start_loc, cache_indices, has_initial_state, conv_states, "
        "activation, pad_slot_id, **kwargs)",
        f"{_CPU}.conv:causal_conv1d_fn",
        _NO_KERNEL,
        _KERNEL,
    ),
    Rebinding(
        f"{_MAMBA}.causal_conv1d.causal_conv1d_update",
        "replace",
        "(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, pad_slot_id)",
        f"{_CPU}.conv:causal_conv1d_update",
        _NO_KERNEL,
        _KERNEL,
    ),
    Rebinding(
        "sglang.kernels.ops.mamba.triton_ops.mamba_chunk_scan_combined",
        "replace",
        "(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, chunk_indices, "
        "chunk_offsets, cu_seqlens, dt_softplus, dt_limit, out, return_final_states, "
        "return_varlen_states, return_intermediate_states, state_dtype, return_track_states, "
        "track_seq_idx, track_end_locs)",
        f"{_CPU}.mamba:mamba_chunk_scan_combined",
        _NO_KERNEL,
        _KERNEL,
    ),
    Rebinding(
        "sglang.kernels.ops.mamba.triton_ops.selective_state_update",
        "replace",
        "(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id, "
        "out, disable_state_update, intermediate_states_buffer, cache_steps, "
        "retrieve_parent_token, intermediate_state_indices)",
        f"{_CPU}.mamba:selective_state_update",
        _NO_KERNEL,
        _KERNEL,
    ),
    *_UNBOUND_ON_A_CPU,
    Rebinding(
        f"{_FLA}.fused_recurrent.fused_recurrent_gated_delta_rule_update",
        "replace",
        "(q, k, v, g, beta, scale, initial_state_source, initial_state_indices, cu_seqlens, "
        "use_qk_l2norm_in_kernel, disable_state_update, disable_output_calculation, "
        "intermediate_states_buffer, intermediate_state_indices, cache_steps, "
        "retrieve_parent_token)",
        f"{_CPU}.gdn:fused_recurrent_gated_delta_rule_update",
        _NO_KERNEL,
        _KERNEL,
    ),
    Rebinding(
        "sglang.srt.layers.attention.linear.kernels.gdn_triton.chunk_gated_delta_rule",
        "replace",
        "(q, k, v, g, beta, initial_state, cu_seqlens, head_first, use_qk_l2norm_in_kernel, "
        "initial_state_indices)",
        f"{_CPU}.gdn:chunk_gated_delta_rule",
        "the CPU operator returns no state from inside a prompt, which tracking needs",
        "the triple that it returns, and where in it the states before each chunk stand",
        where=_GDN_IS_OURS,
    ),
    Rebinding(
        f"{_FLA}.fused_norm_gate.rms_norm_gated",
        "replace",
        "(x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)",
        f"{_CPU}.gated:rms_norm_gated",
        _NO_KERNEL,
        _KERNEL,
    ),
    Rebinding(
        f"{_FLA}.layernorm_gated.layernorm_fn",
        "replace",
        "(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation)",
        f"{_CPU}.gated:layernorm_fn",
        _NO_KERNEL,
        _KERNEL,
    ),
    Rebinding(
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        "replace",
        "(hidden_states, gate_weight, shared_output, final_hidden_states)",
        f"{_CPU}.gated:fused_gate_sigmoid_mul_add",
        "Qwen3-Next's experts need it beside the state operators",
        _KERNEL,
    ),
    Rebinding(
        f"{_BACKEND}.track_mamba_states_if_needed",
        "replace",
        "(conv_states, ssm_states, cache_indices, mamba_track_mask, mamba_track_indices, "
        "batch_size, check_freed_slots)",
        f"{_CPU}.track:track_mamba_states_if_needed",
        _NO_KERNEL,
        "which slots it may skip: those of states freed meanwhile",
    ),
    Rebinding(
        f"{_BACKEND}.track_mamba_states_all_layers",
        "replace",
        "(conv_states_pool, ssm_states_pool, cache_indices, mamba_track_mask, "
        "mamba_track_indices, batch_size, check_freed_slots)",
        f"{_CPU}.track:track_mamba_states_all_layers",
        _NO_KERNEL,
        "which slots it may skip: those of states freed meanwhile",
    ),
    Rebinding(
        "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",
        "around",
        "(model_config, load_config, tp_size)",
        f"{_CPU}.repairs:align_no_heads",
        "SGLang stops at a model without attention heads",
        "whether it still does; then drop the row",
    ),
    Rebinding(
        f"{_TORCH_NATIVE}.get_cpu_graph_seq_len_fill_value",
        "replace",
        UNBOUND,
        f"{_CPU}.repairs:length_of_padding",
        "DP attention pads steps, and asks the backend how long a row of padding is",
        "whether the backend answers by now; then drop the row",
    ),
    *CPU_DEVICE,
)
CPU_ATTENTION = (
    Hook(
        f"{_TORCH_NATIVE}.init_forward_metadata",
        "before",
        "(self, forward_batch)",
        f"{_CPU}.window_attention:forget_rows",
        "rows of window layers are translated once a forward",
        "that it runs once before the first layer of every forward",
    ),
    *(
        Hook(
            f"{_TORCH_NATIVE}.{method}",
            "around",
            "(self, q, k, v, layer, forward_batch, save_kv_cache)",
            f"{_CPU}.window_attention:read_window_rows",
            "SGLang reads window layers at the slots of full ones",
            "whether the backend translates the read itself by now; it asks "
            "`req_to_token_pool.req_to_token[request, start:end]`, which ours answers",
        )
        for method in ("forward_extend", "forward_decode")
    ),
)
