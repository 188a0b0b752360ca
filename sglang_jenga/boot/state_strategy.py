"""Which of SGLang's ways to cache recurrent states a jenga server takes, settled at start."""

from __future__ import annotations

import logging
from typing import Any

from sglang_jenga.boot.flag_rules import FlagRule, broken_lines
from sglang_jenga.plan.layer_rules import (
    CHUNK,
    PAGES_WITHOUT_TRACKING,
    tracked_pages_refusal,
)

_logger = logging.getLogger(__name__)


def refused_lines(server_args: Any, model: Any) -> list[str]:
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
        rules.append(FlagRule("page_size", (None, 1), PAGES_WITHOUT_TRACKING))
    return broken_lines(config, tuple(rules)) or _page_lines(config, model)


def _page_lines(config: Any, model: Any) -> list[str]:
    """A line for a page size that does not fit where states are tracked."""
    line = ""
    if config.mamba_radix_cache_strategy != "no_buffer" and config.page_size is not None:
        chunk = getattr(model.hf_config, "mamba_chunk_size", CHUNK)
        line = tracked_pages_refusal(config.page_size, config.mamba_track_interval, chunk)
    return [line] if line else []


def hold_back_steps(server_args: Any) -> None:
    """Without tracking no step may run ahead: it would change the state of a request that has
    ended. SGLang stops with a trace where the user does not say so.

    Nor on a decode server: a request that is retracted takes its state along, which would be one
    token ahead of its answer. In stock SGLang it is, and the answer goes on with other tokens."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    config = resolving_view(server_args)
    if config.disaggregation_mode == "decode":
        why = "jenga copies states of retracted requests"
    elif config.mamba_radix_cache_strategy == "no_buffer" and not config.disable_radix_cache:
        why = "jenga caches states without tracking"
    else:
        return
    _logger.info("%s: overlap schedule off", why)
    declare_resolution(server_args, "sglang-jenga", disable_overlap_schedule=True)


def settle(server_args: Any, asked: str) -> None:
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
