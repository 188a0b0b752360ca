"""What --memory-backend jenga does not serve: refused in one line, before the model loads.

Two tables, one row per case. Flags are read twice, as the user gave them and as SGLang resolved
them, since a model may turn a feature on by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_jenga.flags import Refused, is_on
from sglang_jenga.hooks import Hook

_logger = logging.getLogger(__name__)

ATTENTION_BACKENDS = ("torch_native", "triton", "flashinfer", "fa3", "fa4", "trtllm_mha")
# Of these, the ones whose kernels take V rows narrower than K rows.
ASYMMETRIC_BACKENDS = ("triton", "fa3", "fa4")
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e5m2", "fp8_e4m3")
DEVICES = ("cuda", "cpu")


class FlagRule(NamedTuple):
    """A ServerArgs field that must keep one of its `served` values."""

    field: str
    served: tuple[Any, ...]
    why: str

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")


_OFF = (False, None)
_HOST = "jenga pages have no host or remote copy"
_SESSION = "a session keeps pages that no running request holds"
_SIDE = "its side tensor is sized by tokens, and jenga slot ids run over the whole pool"
_SHARD = "one rank would hold only a part of a page's tokens"
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
    FlagRule("disaggregation_mode", ("null",), "the transfer engines expect SGLang's own pools"),
    FlagRule("disaggregation_decode_retraction_backup", (None,), _HOST),
    FlagRule("disaggregation_decode_enable_offload_kvcache", _OFF, _HOST),
    FlagRule("encoder_only", _OFF, "an encoder has no KV cache, and loads no plugin"),
    FlagRule("speculative_algorithm", (None,), "the draft model's KV is not part of the pool yet"),
    FlagRule("pp_size", (1,), "pipeline stages would plan different pools"),
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
    FlagRule("enable_int8_mamba_checkpoint", _OFF, "cached states stay in the format they run in"),
    FlagRule("enable_linear_replayssm", _OFF, "its ring buffers are not part of the pool"),
    FlagRule("enable_linear_replayssm_spec", _OFF, "its ring buffers are not part of the pool"),
    FlagRule("mamba_full_memory_ratio", (None, 0.9), "jenga has no ratio of states to KV"),
    FlagRule("device", (None, *DEVICES), "only CUDA and the CPU engine are known to work"),
)
# Not in the table above: a model may set it by itself, and then it is set back (see below).
_POLICY = FlagRule("radix_eviction_policy", ("lru",), "jenga evicts by its own balanced order")


class ModelRule(NamedTuple):
    applies: Callable[[Any], bool]
    why: str


MODEL_RULES = (
    ModelRule(lambda model: _has_extra_cache(model), "it caches more per token than K and V"),
    ModelRule(lambda model: _is_mla(model), "MLA layers are not carried yet"),
    ModelRule(lambda model: model.is_encoder_decoder, "cross-attention is not carried yet"),
)


def before_resolution(server_args: Any) -> None:
    """Refuse what the user typed, then name the radix cache that only this plugin provides."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    _require(_broken_flags(resolving_view(server_args), (*FLAG_RULES, _POLICY)))
    declare_resolution(server_args, "sglang-jenga", radix_cache_backend="jenga")


def register_model_check() -> None:
    """Refuse models as soon as SGLang knows which one it is, before it adjusts anything to it."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook("handle_model_specific_adjustments")
    def jenga_serves_the_model(server_args: Any, previous: Callable[[Any], None]) -> None:
        if is_on(server_args):
            model = model_config_of(server_args)
            _require(_model_lines(model))
            if _has_state(model):
                _require(_state_caching_lines(server_args, model))
                _hold_back_steps(server_args)
        asked = resolving_view(server_args).mamba_radix_cache_strategy
        previous(server_args)
        if is_on(server_args) and _has_state(model_config_of(server_args)):
            _settle_state_caching(server_args, asked)


def _hold_back_steps(server_args: Any) -> None:
    """Without tracking no step may run ahead: it would change the state of a request that has
    ended. SGLang stops with a trace where the user does not say so."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    config = resolving_view(server_args)
    if config.mamba_radix_cache_strategy == "no_buffer" and not config.disable_radix_cache:
        _logger.info("jenga caches states without tracking: overlap schedule off")
        declare_resolution(server_args, "sglang-jenga", disable_overlap_schedule=True)


def _settle_state_caching(server_args: Any, asked: str) -> None:
    """Of two ways to track, take the one with fewer slots where the user has no wish: they cost the
    bytes that requests run in. SGLang leaves models of states only unsettled.
    """
    from sglang.srt.arg_groups.model_override_base import mamba_extra_buffer_of
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    config = resolving_view(server_args)
    if config.disable_radix_cache:
        return
    settled: dict[str, Any] = {}
    if not mamba_extra_buffer_of(config):
        settled = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}
    elif asked == "auto":
        settled = {"mamba_radix_cache_strategy": "extra_buffer_lazy"}
    if settled:
        declare_resolution(server_args, "sglang-jenga", **settled)


def _state_caching_lines(server_args: Any, model: Any) -> list[str]:
    """SGLang asserts what it cannot do here, with a trace; say it in one line before it does."""
    from sglang.srt.arg_groups.overrides import resolving_view, supports_mamba_cache_extra_buffer

    config = resolving_view(server_args)
    if config.disable_radix_cache:
        return []  # nothing is cached: any page size, and steps overlap
    rules = []
    tracks = supports_mamba_cache_extra_buffer(config, model.hf_config)
    if not tracks:
        name = model.hf_config.architectures[0]
        served, why = ("auto", "no_buffer"), f"SGLang tracks no states inside prompts of {name}"
        rules.append(FlagRule("mamba_radix_cache_strategy", served, why))
    if not tracks or config.mamba_radix_cache_strategy == "no_buffer":
        why = "without tracking, a cached state is that of one very token"
        rules.append(FlagRule("page_size", (None, 1), why))
    return _broken_flags(config, tuple(rules))


def after_resolution(server_args: Any) -> None:
    """Refuse what SGLang made of it: attention backends, and features a model turned on."""
    from sglang.srt.arg_groups.overrides import (
        attention_backends_of,
        declare_resolution,
        model_config_of,
        resolving_view,
    )

    config = resolving_view(server_args)
    _require(_broken_flags(config, FLAG_RULES))
    if config.radix_eviction_policy != "lru":
        _logger.info("jenga evicts by its own order, not %s", config.radix_eviction_policy)
        declare_resolution(server_args, "sglang-jenga", radix_eviction_policy="lru")
    if config.model_path.lower() in ("none", "dummy"):
        return  # SGLang resolves neither model nor backends for these
    model = model_config_of(server_args)
    backends = dict(zip(("prefill-", "decode-"), attention_backends_of(config), strict=True))
    _require(_backend_lines(backends, model.has_asymmetric_kv))


def _require(lines: list[str]) -> None:
    if lines:
        raise Refused("\n".join(lines))


def _broken_flags(config: Any, rules: tuple[FlagRule, ...]) -> list[str]:
    return [
        f"--memory-backend jenga does not work with {rule.flag}{_shown(value)}: {rule.why}; "
        f"drop {rule.flag} or --memory-backend"
        for rule in rules
        if (value := getattr(config, rule.field)) not in rule.served
    ]


def _shown(value: Any) -> str:
    return "" if value is True else f" {value}"


def _model_lines(model: Any) -> list[str]:
    name = model.hf_config.architectures[0]
    reasons = [rule.why for rule in MODEL_RULES if rule.applies(model)]
    # The first one only: a model with a reason is refused, the others follow from it.
    return [
        f"--memory-backend jenga does not serve {name}: {why}; drop --memory-backend"
        for why in reasons[:1]
    ]


def _backend_lines(backends: dict[str, str | None], asymmetric: bool) -> list[str]:
    served = ASYMMETRIC_BACKENDS if asymmetric else ATTENTION_BACKENDS
    if len(set(backends.values())) == 1:
        backends = {"": backends["decode-"]}
    return [
        f"--memory-backend jenga does not work with --{phase}attention-backend {name}: its kernels "
        f"are not known to read strided KV; use one of {', '.join(served)} or drop --memory-backend"
        for phase, name in backends.items()
        if name not in served
    ]


def _is_mla(model: Any) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.MLA


def _has_state(model: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.SSM or mambaish_config(model) is not None


def _has_extra_cache(model: Any) -> bool:
    from sglang.srt.configs import model_config as known

    kinds = (
        known.is_deepseek_dsa,
        known.is_deepseek_v4,
        known.is_minimax_sparse,
        known.is_qwen4_exp,
    )
    return any(is_kind(model.hf_config) for is_kind in kinds)


def _post_capture_sizing(original: Callable[[Any], bool], server_args: Any) -> bool:
    # It would resize pools after graph capture; a jenga buffer has one size for life.
    return not is_on(server_args) and original(server_args)


HOOKS = (
    Hook(
        "sglang.srt.arg_groups.overrides.post_capture_kv_sizing_planned",
        "around",
        "(server_args)",
        _post_capture_sizing,
    ),
)
