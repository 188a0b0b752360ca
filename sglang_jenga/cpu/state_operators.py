"""Where plain-torch references of the state layers' operators enter SGLang on a CPU.

SGLang's CPU engine takes some of them from `torch.ops.sgl_kernel` (`OPERATORS`, which `sgl_kernel`
defines where no library has them) and imports others from modules of GPU kernels (`install`). Each
runs token by token in float32: the same tokens give the same bits however a prompt was cut, batched
or cached, which is what parity tests need. Slow, and exact.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

from sglang_jenga.cpu import conv, gated, gdn, mamba, repairs, track

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

# SGLang's mixers bind these only where there is a GPU.
_UNBOUND: dict[str, Callable] = {
    "causal_conv1d_fn": conv.causal_conv1d_fn,
    "causal_conv1d_fn_triton": conv.causal_conv1d_fn,
    "causal_conv1d_update": conv.causal_conv1d_update,
    "causal_conv1d_update_triton": conv.causal_conv1d_update,
}
# What modules hold under a name that they imported.
_BY_NAME = _UNBOUND | {
    "mamba_chunk_scan_combined": mamba.mamba_chunk_scan_combined,
    "selective_state_update": mamba.selective_state_update,
    "fused_recurrent_gated_delta_rule_update": gdn.fused_recurrent_gated_delta_rule_update,
    "fused_gate_sigmoid_mul_add": gated.fused_gate_sigmoid_mul_add,
}
# The mixer of Mamba-1 imports from that of Mamba-2, and so can only after that has the names.
_MIXER = "sglang.srt.layers.attention.mamba.mamba"
_HOLDERS = (
    "sglang.srt.layers.attention.mamba.causal_conv1d",
    _MIXER,
    "sglang.srt.layers.attention.mamba.mamba1",
    "sglang.kernels.ops.elementwise.elementwise",
)


def install() -> None:
    """Put the references where SGLang's state models import kernels that need a GPU.

    For scheduler processes of the CPU engine. A model's module that was imported earlier holds the
    originals, and is put right too.
    """
    from sglang.kernels.ops.attention.fla import fused_norm_gate, fused_recurrent, layernorm_gated
    from sglang.srt.layers.attention import hybrid_linear_attn_backend
    from sglang.srt.layers.attention.linear.kernels import gdn_triton

    _replace(fused_norm_gate, gated.rms_norm_gated)
    _replace(layernorm_gated, gated.layernorm_fn)
    _replace(fused_recurrent, gdn.fused_recurrent_gated_delta_rule_update)
    _replace(hybrid_linear_attn_backend, track.track_mamba_states_if_needed)
    _replace(hybrid_linear_attn_backend, track.track_mamba_states_all_layers)
    if gdn_states_are_tracked():
        _replace(gdn_triton, gdn.chunk_gated_delta_rule)
    vars(importlib.import_module(_MIXER)).update(_UNBOUND)
    models = [
        module for name, module in sys.modules.items() if name.startswith("sglang.srt.models.")
    ]
    for module in (*map(importlib.import_module, _HOLDERS), *models):
        for name in _BY_NAME.keys() & vars(module).keys():
            setattr(module, name, _BY_NAME[name])
    repairs.stay_on_the_cpu()
    repairs.align_no_heads()


def _replace(module: ModuleType, function: Callable) -> None:
    """Rebind a name that must be there: SGLang has changed where it is not."""
    getattr(module, function.__name__)
    setattr(module, function.__name__, function)


def gdn_states_are_tracked() -> bool:
    """Whether our gated delta rule runs. A library's returns no state from inside a prompt."""
    return "chunk_gated_delta_rule_cpu" in DEFINED


def allow_extra_buffer() -> None:
    """Let --mamba-radix-cache-strategy extra_buffer pass on a CPU, where our operators run.

    For the process that resolves the configuration: SGLang refuses the strategy there, because its
    CPU operators cannot snapshot states. Ours can.
    """
    from sglang.srt.arg_groups import mamba_hook

    def _platform_supports_mamba_cache_extra_buffer() -> bool:
        return True

    if gdn_states_are_tracked():
        _replace(mamba_hook, _platform_supports_mamba_cache_extra_buffer)
