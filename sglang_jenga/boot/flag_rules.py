"""Server arguments that --memory-backend jenga refuses: one row per argument, and how it is asked.

A row is asked twice, of what the user typed and of what SGLang made of it, since a model may turn a
feature on by itself. Arguments that SGLang's resolution fills in for every server are asked of the
typed value only. Rows about kernels for recurrent states are asked of models that have some.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sglang_jenga.plan import layer_rules
from sglang_jenga.plan.kv_format import KV_CACHE_DTYPES

DEVICES = ("cuda", "cpu")


class FlagRule(NamedTuple):
    """A ServerArgs field that must keep one of its `served` values.

    ``unless`` names another field that gives this one a meaning here. ``typed_only``: SGLang may
    set the field by itself without asking for anything.
    """

    field: str
    served: tuple[Any, ...]
    why: str
    unless: str | None = None
    typed_only: bool = False

    def broken_by(self, config: Any) -> bool:
        excused = self.unless is not None and getattr(config, self.unless)
        return not excused and getattr(config, self.field) not in self.served

    def line(self, config: Any) -> str:
        """What, why, and which flag to drop."""
        flag = "--" + self.field.replace("_", "-")
        return layer_rules.flag_refusal(flag, self.why, value=getattr(config, self.field))


_OFF = (False, None)
_HOST = "jenga pages have no host or remote copy"
_SESSION = "a session keeps pages that no running request holds"
_SIDE = "its side tensor is sized by tokens, and jenga slot ids run over the whole pool"
_SHARD = "one rank would hold only a part of a page's tokens"
_BEHIND = "its kernels read the KV pool without the attention backend"
_AHEAD = "the last stage would change the map of windows while a step reads it"
_ORDER = "jenga evicts by its own balanced order"
FLAG_RULES = (
    FlagRule("enable_unified_memory", _OFF, "both would own the one buffer"),
    FlagRule("enable_page_major_kv_layout", _OFF, "jenga brings its own layout"),
    FlagRule("radix_cache_backend", (None, "jenga"), "jenga brings its own radix trees"),
    FlagRule("enable_hierarchical_cache", _OFF, _HOST),
    FlagRule("hicache_storage_backend", (None,), _HOST),
    FlagRule("enable_lmcache", _OFF, _HOST),
    FlagRule("enable_flexkv", _OFF, _HOST),
    FlagRule("enable_unified_cache_external_linker", _OFF, _HOST),
    FlagRule("enable_hisparse", _OFF, _HOST),
    FlagRule(
        "disaggregation_decode_retraction_backup",
        (None, "cpu_tensor"),
        "a retracted request's KV waits in tensors on the host",
    ),
    FlagRule("disaggregation_decode_enable_offload_kvcache", _OFF, _HOST),
    FlagRule("disaggregation_decode_host_receive_threshold", (None, 1), _HOST),
    FlagRule("encoder_only", _OFF, "an encoder has no KV cache, and loads no plugin"),
    FlagRule(
        "speculative_algorithm",
        (None,),
        "the draft model's KV is not part of the pool yet",
        # Then it names a way to capture hidden states, and no draft model is loaded.
        unless="enable_return_aux_hidden_states",
    ),
    FlagRule("pp_async_batch_depth", (0, None), _AHEAD),
    FlagRule("enable_dynamic_chunking", _OFF, "it tries prompts out on the first stage alone"),
    FlagRule("dcp_size", (1,), _SHARD),
    FlagRule("attn_cp_size", (1,), _SHARD),
    FlagRule("enable_kv_cache_sharding", _OFF, _SHARD),
    FlagRule("use_ray", _OFF, "Ray workers load no plugin"),
    FlagRule("enable_two_batch_overlap", _OFF, "half batches do not see their requests' rows"),
    FlagRule("enable_pdmux", _OFF, "two streams would allocate at the same time"),
    FlagRule("dllm_algorithm", (None,), "diffusion steps rewrite tokens that are already cached"),
    FlagRule("enable_streaming_session", _OFF, _SESSION),
    FlagRule("enable_session_radix_cache", _OFF, _SESSION),
    FlagRule("kv_cache_dtype", KV_CACHE_DTYPES, "entries with block scales are not laid out yet"),
    FlagRule("prefill_only_disable_kv_cache", _OFF, "there would be no KV cache to manage"),
    FlagRule("enable_return_routed_experts", _OFF, _SIDE),
    FlagRule("enable_return_indexer_topk", _OFF, _SIDE),
    FlagRule("kv_canary", (None, "none"), _SIDE),
    FlagRule("enable_nvidia_megakernel", _OFF, _BEHIND),
    FlagRule("enable_amd_monokernel", _OFF, _BEHIND),
    FlagRule("enable_lean_attention", _OFF, "its kernel is not known to read strided KV"),
    FlagRule("enable_int8_mamba_checkpoint", _OFF, "cached states stay in the format they run in"),
    FlagRule("enable_linear_replayssm", _OFF, "its ring buffers are not part of the pool"),
    FlagRule("enable_linear_replayssm_spec", _OFF, "its ring buffers are not part of the pool"),
    FlagRule("mamba_full_memory_ratio", (None, 0.9), "jenga has no ratio of states to KV"),
    FlagRule(
        "max_mamba_cache_size",
        (None,),
        "jenga has no separate pool of states to size (with --max-total-tokens it gives the bytes "
        "of both)",
        unless="max_total_tokens",
    ),
    FlagRule(
        "swa_full_tokens_ratio",
        (None,),
        "jenga has no ratio of window to full KV (with --max-total-tokens it gives the bytes of "
        "both)",
        unless="max_total_tokens",
        typed_only=True,
    ),
    FlagRule("radix_eviction_policy", ("lru",), _ORDER, typed_only=True),
    FlagRule("radix_eviction_policy_config", (None,), _ORDER),
    FlagRule(
        "enable_encoder_swa_bounded_replay",
        _OFF,
        "only DeepSeek-V4 replays windows, and jenga does not serve it",
    ),
    FlagRule(
        "enable_decoder_swa_bounded_replay",
        _OFF,
        "only DeepSeek-V4 replays windows, and jenga does not serve it",
    ),
    FlagRule("device", (None, *DEVICES), "only CUDA and the CPU engine are known to work"),
)
_MOONCAKE = ("mooncake", "mooncake_tcp")
TRANSFER_RULES = (
    FlagRule(
        "disaggregation_transfer_backend",
        _MOONCAKE,
        "only Mooncake's part of SGLang is known to send whole small pages",
    ),
    FlagRule("pp_size", (1,), "a stage would send the layers of its own plan"),
    FlagRule("enable_pd_role_switch", _OFF, "a server keeps the side that it was started on"),
    FlagRule(
        "disaggregation_decode_enable_radix_cache",
        _OFF,
        "jenga's decode servers keep no prefixes",
    ),
    FlagRule(
        "disaggregation_enable_kv_checksum", _OFF, "its checksums take the layers to lie apart"
    ),
    FlagRule(
        "disaggregation_decode_allocation_policy",
        ("early",),
        "pages are allocated before a prompt is computed",
    ),
)
"""Asked of prefill and decode servers."""
COUNTS = ("page_size", "max_total_tokens", "max_mamba_cache_size")
"""Arguments that count something; SGLang computes with whatever they are."""
_APART = "its kernels take the states to lie side by side"
# Prefills copy states out of the pool and back, so more kernels serve there.
LINEAR_PREFILL = ("triton", "flashinfer", "flashkda")


def broken_lines(config: Any, rules: tuple[FlagRule, ...]) -> list[str]:
    """One line per rule that this configuration breaks."""
    return [rule.line(config) for rule in rules if rule.broken_by(config)]


def typed_lines(config: Any) -> list[str]:
    """Lines about what the user typed."""
    return [
        *broken_lines(config, FLAG_RULES),
        *transfer_lines(config),
        *_count_lines(config),
    ]


def transfer_lines(config: Any) -> list[str]:
    """Lines about what the two servers of a disaggregated pair do not do."""
    disaggregated = config.disaggregation_mode != "null"
    return broken_lines(config, TRANSFER_RULES) if disaggregated else []


def _count_lines(config: Any) -> list[str]:
    counts = {name: getattr(config, name) for name in COUNTS}
    return [
        layer_rules.flag_refusal("--" + name.replace("_", "-"), "it must be above 0", value=count)
        for name, count in counts.items()
        if count is not None and count <= 0
    ]


def resolved_lines(config: Any) -> list[str]:
    """Lines about what SGLang made of it."""
    return broken_lines(config, tuple(rule for rule in FLAG_RULES if not rule.typed_only))


def state_lines(config: Any, *, blackwell: bool) -> list[str]:
    """Lines about the kernels for recurrent states.

    On Hopper FlashInfer decodes on copies of the states, and writes one back for each padded row of
    a CUDA graph: into whatever the pool's last slot holds.
    """
    decode = ("triton", "flashinfer") if blackwell else ("triton",)
    rules = (
        FlagRule("mamba_backend", (None, "triton"), _APART),
        FlagRule("enable_mis", _OFF, "with recurrent states " + _APART),
        FlagRule(_linear_field(config, "decode"), decode, _APART),
        FlagRule(_linear_field(config, "prefill"), LINEAR_PREFILL, _APART),
    )
    return list(dict.fromkeys(broken_lines(config, rules)))


def _linear_field(config: Any, phase: str) -> str:
    """The argument that names the kernels of this phase: its own, or the one for both."""
    field = f"linear_attn_{phase}_backend"
    return field if getattr(config, field) is not None else "linear_attn_backend"
