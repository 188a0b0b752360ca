"""Refuses what the pool's own modules cannot serve, before any process starts.

With ``--max-total-tokens`` the pool's bytes follow from the model's config. Its plan is made here,
in the launcher, by the functions that the scheduler will make it with once the weights are loaded.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
from sglang.srt.model_executor.model_runner_components.layer_setup import resolve_layer_indices
from sglang.srt.model_executor.model_runner_components.load_model_utils import (
    resolve_sliding_window_size,
)
from sglang.srt.runtime_context import (
    create_context,
    get_model,
    get_parallel,
    get_schedule,
    use_context,
)

from sglang_jenga.boot import window_models
from sglang_jenga.boot.flags import Refused
from sglang_jenga.boot.geometry import asked_bytes, geometry_of, plan_for
from sglang_jenga.plan.planner import PoolTooSmallError
from sglang_jenga.serving import ablation, rank_trace

_logger = logging.getLogger(__name__)


def require_known_parts() -> None:
    """Raise `Refused` if a variable of ours names a part of the policy that does not exist, or no
    number where there should be one."""
    try:
        ablation.from_environment()
        rank_trace.rounds_from_environment()
    except ValueError as error:
        raise Refused(str(error)) from None


def require_room(server_args: Any) -> None:
    """Raise `Refused` if the token limit gives a pool that is too small for any request."""
    with use_context(create_context(server_args, role="scheduler")):
        if get_schedule().max_total_tokens is None:
            return
        if get_parallel().pp_size > 1:
            return  # only the model's code knows whether it tells which layers a stage has
        model = model_config_of(server_args)
        if get_model().kv_cache_dtype == "auto" and model.quantization is not None:
            return  # the weights may bring a format for KV
        foreseen = Foreseen(model)
        if foreseen.is_hybrid_swa and foreseen.sliding_window_size is None:
            return  # only the model's code knows its window
        geometry = geometry_of(foreseen)
        pool_bytes = asked_bytes(foreseen, geometry)
        if pool_bytes is None:
            _logger.warning(
                "--memory-backend jenga ignores --max-total-tokens: the model has no attention, so "
                "tokens take no bytes; limit its states by --max-mamba-cache-size"
            )
            return
        try:
            plan_for(geometry, pool_bytes)
        except PoolTooSmallError as error:
            raise Refused(str(error)) from None


class Foreseen:
    """What SGLang's ``KVCacheConfigurator`` will say of a model without a draft or a pipeline."""

    def __init__(self, model: Any) -> None:
        self.model_config = model
        self.is_hybrid_swa = model.is_hybrid_swa
        # Most models say which layers a stage of theirs has. Without one to ask, SGLang counts the
        # loops of one that does twice.
        loops = "NanbeigeForCausalLM" in model.hf_config.architectures
        stage = SimpleNamespace(start_layer=0, end_layer=model.num_hidden_layers) if loops else None
        self.layer_info = resolve_layer_indices(
            model=stage, model_config=model, is_draft_worker=False
        )
        _, self.kv_cache_dtype = configure_kv_cache_dtype(
            server_args_kv_cache_dtype=get_model().kv_cache_dtype,
            model=None,
            model_dtype=model.dtype,
            is_draft_worker=False,
            is_dflash=False,
            speculative_draft_attention_backend="",
        )
        # What the model's code will say is in the table. Of others it may say one token less; a
        # request this short does not fill a window.
        window = window_models.stored_window(model) if model.is_hybrid_swa else None
        self.sliding_window_size = (
            resolve_sliding_window_size(None, model) if window is None else window - 1
        )
        self.pool_page_size = get_schedule().page_size
        self.mambaish_config = mambaish_config(model)

    def _get_mamba_layer_ids_for_req_pool(self) -> list[int]:
        return list(self.mambaish_config.mamba2_cache_params.layers)
