"""What --memory-backend jenga does not serve: refused in one line, before the model loads.

When the rules are asked. The rules themselves are tables: `flag_rules`, `environment_rules`,
`model_rules`; `state_strategy` settles how recurrent states are cached, `chunks` whether requests
decode inside chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_jenga.boot import chunks, environment_rules, flag_rules, model_rules, state_strategy
from sglang_jenga.boot.flags import Refused, is_on, wants_true_windows

_logger = logging.getLogger(__name__)


def before_resolution(server_args: Any) -> None:
    """Refuse what the user typed, then name the radix cache that only this plugin provides."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    refused, ignored = environment_rules.broken_lines()
    _require(flag_rules.typed_lines(resolving_view(server_args)) + refused)
    for line in ignored:
        _logger.warning(line)
    declare_resolution(server_args, "sglang-jenga", radix_cache_backend="jenga")
    if resolving_view(server_args).disaggregation_mode == "decode":
        # SGLang would choose its pool on the host, by the class of our pool.
        declare_resolution(
            server_args, "sglang-jenga", disaggregation_decode_retraction_backup="cpu_tensor"
        )


def register_resolution_steps() -> None:
    """Refuse models as soon as SGLang knows which one it is, before it adjusts anything to it; and
    choose the chunks of those that are served."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.runtime_context import get_platform

    @register_resolution_hook("handle_model_specific_adjustments")
    def jenga_serves_the_model(server_args: Any, previous: Callable[[Any], None]) -> None:
        if is_on(server_args):
            model = model_config_of(server_args)
            _require(model_rules.refused_lines(model))
            if resolving_view(server_args).disaggregation_mode != "null":
                _require(model_rules.transfer_lines(model))
            if wants_true_windows(server_args):
                in_full = resolving_view(server_args).disable_hybrid_swa_memory
                _require(model_rules.true_windows_lines(model, stored_in_full=in_full))
            config = resolving_view(server_args)
            _require(model_rules.page_lines(config.page_size, model))
            if get_platform().is_cuda:  # the CPU engine pads heads
                ranks = config.tp_size // config.attn_dp_size
                _require(model_rules.ranks_lines(model, ranks))
            if model_rules.has_state(model):
                _require(_state_kernels(resolving_view(server_args)))
                _require(state_strategy.refused_lines(server_args, model))
                state_strategy.hold_back_steps(server_args)
        asked = resolving_view(server_args).mamba_radix_cache_strategy
        previous(server_args)
        if is_on(server_args) and model_rules.has_state(model_config_of(server_args)):
            state_strategy.settle(server_args, asked)

    @register_resolution_hook("handle_gpu_memory_settings")
    def jenga_decodes_in_chunks(server_args: Any, previous: Callable[[Any], None]) -> None:
        if is_on(server_args) and not _is_without_model(server_args):
            chunks.settle(server_args, model_config_of(server_args))
        previous(server_args)


def _is_without_model(config: Any) -> bool:
    """SGLang resolves neither model nor backends for these."""
    return bool(config.model_path.lower() in ("none", "dummy"))


def after_resolution(server_args: Any) -> None:
    """Refuse what SGLang made of it: attention backends, and features a model turned on."""
    from sglang.srt.arg_groups.overrides import (
        attention_backends_of,
        declare_resolution,
        model_config_of,
        resolving_view,
    )
    from sglang.srt.runtime_context import get_platform

    config = resolving_view(server_args)
    _require(flag_rules.resolved_lines(config))
    if config.radix_eviction_policy != "lru":
        _logger.info("jenga evicts by its own order, not %s", config.radix_eviction_policy)
        declare_resolution(server_args, "sglang-jenga", radix_eviction_policy="lru")
    if _is_without_model(config):
        return
    backends, model = attention_backends_of(config), model_config_of(server_args)
    blackwell = get_platform().is_sm100
    _require(model_rules.backend_lines(*backends, model, blackwell=blackwell))
    _require(model_rules.page_lines(config.page_size, model))
    if model_rules.has_state(model):
        _require(_state_kernels(config))


def _state_kernels(config: Any) -> list[str]:
    from sglang.srt.runtime_context import get_platform

    return flag_rules.state_lines(config, blackwell=get_platform().is_sm100)


def _require(lines: list[str]) -> None:
    if lines:
        raise Refused("\n".join(lines))


def post_capture_sizing(original: Callable[[Any], bool], server_args: Any) -> bool:
    # It would resize pools after graph capture; a jenga buffer has one size for life. SGLang turns
    # it on by itself for a model.
    return not is_on(server_args) and original(server_args)
