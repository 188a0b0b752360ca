"""The pools that SGLang's own configurator builds for a model, without its weights or a server.

    launcher.run("from sglang_jenga.testing.built_pools import built; answer = built(model, bytes)")

In a process of its own, a `launcher.Launcher`'s: the plugin patches SGLang for all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_jenga.testing.engines import CPU_ARGUMENTS


@contextmanager
def configurator(
    model: str, budget: int, *, window: int | None = None, **arguments: Any
) -> Iterator[Any]:
    """SGLang's ``KVCacheConfigurator`` as a scheduler makes it for a model, on a machine that has
    ``budget`` bytes left for pools; inside, the process is configured as that scheduler is.

    ``window``: what the code of the model says, in SGLang's count, where its config does not.
    """
    import torch
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.model_runner_components.layer_setup import resolve_layer_indices
    from sglang.srt.model_executor.model_runner_components.load_model_utils import (
        resolve_sliding_window_size,
    )
    from sglang.srt.runtime_context import SpawnRanks, create_context, get_schedule, use_context
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    class Configurator(KVCacheConfigurator):
        def _profile_available_bytes(self, pre_model_load_memory: int) -> int:
            if self.mambaish_config is None:
                return budget
            return int(self._handle_max_mamba_cache(budget / (1 << 30)) * (1 << 30))

    given = {"model_path": model, **CPU_ARGUMENTS, "max_total_tokens": None, **arguments}
    server_args = Engine.server_args_class(**given)
    server_args.resolve_once()
    ranks = SpawnRanks(world_rank=0)
    with use_context(create_context(server_args, role="scheduler", ranks=ranks)):
        config = model_config_of(server_args)
        yield Configurator(
            device="cpu",
            gpu_id=0,
            attn_dp_size=1,
            pp_size=1,
            pp_group=None,
            model=torch.nn.Module(),  # of no layers
            model_config=config,
            server_args=server_args,
            kv_cache_dtype=torch.float32,
            model_dtype=torch.float32,
            page_size=get_schedule().page_size,
            sliding_window_size=window or resolve_sliding_window_size(None, config),
            spec_algorithm=SpeculativeAlgorithm.NONE,
            is_draft_worker=False,
            post_capture_kv_active=False,
            spec_aux_config=None,
            is_hybrid_swa=config.is_hybrid_swa,
            is_hybrid_swa_compress=False,
            use_mla_backend=False,
            layer_info=resolve_layer_indices(
                model=None, model_config=config, is_draft_worker=False
            ),
            forward_stream=torch.cpu.Stream(),
            req_to_token_pool=None,
            token_to_kv_pool_allocator=None,
            memory_pool_config=None,
        )


def built(model: str, budget: int, **arguments: Any) -> dict[str, Any]:
    """What its pools, allocator and prefix cache are, as plain data.

    ``warnings`` are this package's; ``refused`` is the line that a scheduler leaves, and then the
    rest is missing.
    """
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    log = logging.getLogger("sglang_jenga")
    log.addHandler(handler)
    try:
        with configurator(model, budget, **arguments) as made:
            return _described(made) | {"warnings": warnings}
    finally:
        log.removeHandler(handler)


def _described(made: Any) -> dict[str, Any]:
    try:
        result = made.configure(pre_model_load_memory=0)
    except SystemExit as end:
        place = Path(made.server_args._jenga_refusal)
        line = place.read_text()
        place.unlink()
        return {"refused": line, "status": end.code}
    allocator = result.token_to_kv_pool_allocator
    found = {
        "allocator": type(allocator).__name__,
        "kv": type(result.token_to_kv_pool).__name__,
        "rows": type(result.req_to_token_pool).__name__,
        "cache": type(cache_of(made, result.req_to_token_pool, allocator)).__name__,
        "requests": result.max_running_requests,
        "tokens": result.max_total_num_tokens,
    }
    if result.unified_memory_pool is not None:
        large = allocator.core.large
        plan = result.unified_memory_pool.plan
        found |= {
            "bytes": result.unified_memory_pool.bytes.numel(),
            "smalls": [item.smalls_per_large for item in plan.groups],
            "taken": plan.num_large - large.num_empty,
            "null": plan.null_larges,
        }
    return found


def cache_of(made: Any, rows: Any, allocator: Any) -> Any:
    """The prefix cache that SGLang's registry builds for these pools."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_tree_cache
    from sglang.srt.runtime_context import get_exec, get_schedule

    params = CacheInitParams(
        disable=False,
        req_to_token_pool=rows,
        token_to_kv_pool_allocator=allocator,
        page_size=get_schedule().page_size,
        sliding_window_size=made.sliding_window_size,
        enable_mamba_extra_buffer=get_exec().mamba.enable_mamba_extra_buffer,
        enable_mamba_extra_buffer_lazy=get_exec().mamba.enable_mamba_extra_buffer_lazy,
    )
    return create_tree_cache(
        TreeCacheBuildContext(
            server_args=made.server_args,
            params=params,
            is_hybrid_swa=made.is_hybrid_swa,
            is_hybrid_ssm=made.mambaish_config is not None,
            enable_hierarchical_cache=False,
            disable_radix_cache=False,
            tp_worker=None,
            model_config=made.model_config,
            tp_size=1,
            tp_rank=0,
            tp_group=None,
        )
    )
