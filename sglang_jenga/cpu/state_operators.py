"""Plain-torch references of the state layers' operators, as SGLang's CPU engine asks for them.

It takes these from `torch.ops.sgl_kernel`; `sgl_kernel` defines them where no library has them. It
imports others from modules of GPU kernels; `boot.cpu_table` puts ours there. Each runs token by
token in float32: the same tokens give the same bits however a prompt was cut, batched or cached,
which is what parity tests need. Slow, and exact.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_jenga.cpu import conv, gated, gdn

OPERATORS: dict[str, tuple[str, Callable]] = {
    "causal_conv1d_fwd_cpu": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor? query_start_loc,"
        " Tensor? cache_indices, Tensor? has_initial_state, bool silu_activation, int pad_slot_id,"
        " bool is_vnni) -> Tensor",
        conv.causal_conv1d_fwd_cpu,
    ),
    "causal_conv1d_update_cpu": (
        "(Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool silu_activation,"
        " Tensor? cache_seqlens, Tensor? conv_state_indices, int pad_slot_id, bool is_vnni)"
        " -> Tensor",
        conv.causal_conv1d_update_cpu,
    ),
    "chunk_gated_delta_rule_cpu": (
        "(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, Tensor(a!) initial_state,"
        " bool output_final_state, Tensor cu_seqlens, bool head_first,"
        " bool use_qk_l2norm_in_kernel, Tensor initial_state_indices) -> (Tensor, Tensor(a!))",
        gdn.chunk_gated_delta_rule_cpu,
    ),
    "fused_gdn_gating_cpu": (
        "(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)",
        gdn.fused_gdn_gating_cpu,
    ),
    "fused_qk_gemma_rmsnorm_with_gate_cpu": (
        "(Tensor q_gate, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int head_dim,"
        " int num_heads) -> (Tensor, Tensor, Tensor)",
        gated.fused_qk_gemma_rmsnorm_with_gate_cpu,
    ),
    "fused_qkvzba_split_reshape_cat_contiguous_cpu": (
        "(Tensor mixed_qkvz, Tensor mixed_ba, int num_heads_qk, int num_heads_v, int head_qk,"
        " int head_v) -> (Tensor, Tensor, Tensor, Tensor)",
        gdn.fused_qkvzba_split_reshape_cat_contiguous_cpu,
    ),
    "fused_sigmoid_gating_delta_rule_update_cpu": (
        "(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b,"
        " Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens,"
        " bool use_qk_l2norm_in_kernel, float softplus_beta=1.0, float softplus_threshold=20.0)"
        " -> Tensor",
        gdn.fused_sigmoid_gating_delta_rule_update_cpu,
    ),
    "fused_sigmoid_mul_cpu": (
        "(Tensor(a!) x, Tensor gate) -> ()",
        gated.fused_sigmoid_mul_cpu,
    ),
}

# Names of `OPERATORS` that `sgl_kernel.py` has defined: the library had none.
DEFINED: set[str] = set()


def gdn_states_are_tracked() -> bool:
    """Whether our gated delta rule runs. A library's returns no state from inside a prompt."""
    return "chunk_gated_delta_rule_cpu" in DEFINED


def tracks_states() -> bool:
    """The answer to SGLang's question whether this platform can snapshot states.

    SGLang refuses --mamba-radix-cache-strategy extra_buffer on a CPU, because its CPU operators
    cannot. Ours can.
    """
    return True
