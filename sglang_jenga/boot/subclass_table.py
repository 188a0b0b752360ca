"""Every class of SGLang that one of ours extends: the part of the table that patches nothing."""

from __future__ import annotations

from sglang_jenga.boot.hooks import Subclass

_OURS = "sglang_jenga"
_POOL = "sglang.srt.mem_cache.memory_pool"

SUBCLASSES = (
    Subclass(
        "sglang.srt.mem_cache.swa_memory_pool.SWAKVPool",
        f"{_OURS}.memory.kv:JengaSWAPool",
        "KV of full and window layers in one buffer; the parent would allocate two pools",
        constructs=False,
    ),
    Subclass(
        f"{_POOL}.MambaPool",
        f"{_OURS}.memory.state:JengaStatePool",
        "states in the same buffer; the parent would allocate a pool of its own",
        constructs=False,
    ),
    Subclass(
        f"{_POOL}.HybridLinearKVPool",
        f"{_OURS}.memory.kv:JengaHybridPool",
        "full attention and states in one buffer; to transfers each is one region",
    ),
    Subclass(
        f"{_POOL}.MHATokenToKVPool",
        f"{_OURS}.memory.kv:JengaMHAPool",
        "KV of one attention group; `_create_buffers` returns views",
    ),
    Subclass(
        f"{_POOL}.HybridReqToTokenPool",
        f"{_OURS}.serving.state_rows:JengaStateRows",
        "a request's row and its states",
    ),
    Subclass(
        "sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats",
        f"{_OURS}.serving.usage:JengaPoolStats",
        "token usage as the share of large pages in use",
    ),
    Subclass(
        "sglang.srt.mem_cache.multimodal_cache.MultimodalCache",
        f"{_OURS}.serving.embeddings:PooledEmbeddings",
        "embeddings of images in the same buffer; the parent is an interface",
        constructs=False,
    ),
    Subclass(
        "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache",
        f"{_OURS}.serving.cache:JengaRadixCache",
        "the prefix cache; the parent is an interface",
        constructs=False,
    ),
    Subclass(
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator",
        f"{_OURS}.serving.allocator:JengaTokenAllocator",
        "models without windows: full attention, and perhaps states",
        constructs=False,
    ),
    Subclass(
        "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator",
        f"{_OURS}.serving.allocator:JengaSWAAllocator",
        "models with windows: SGLang asks for this class by isinstance",
        constructs=False,
    ),
    Subclass(
        "sglang.srt.mem_cache.prefill_budget.SharedSWAPrefillBudget",
        f"{_OURS}.serving.admission:JengaBudget",
        "what a round of admission may promise",
    ),
    Subclass(
        "sglang.srt.layers.attention.mamba.mamba1.MambaMixer1",
        f"{_OURS}.models.jamba_mixer:JambaMixer",
        "Jamba's state layers, with the flag and without: weights and decodes are the parent's, "
        "`forward`, `_ssm_params` and `_forward_prefill` are ours",
    ),
)
