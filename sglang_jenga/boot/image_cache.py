"""Where our embeddings of images take the place of SGLang's cache, in the scheduler process.

Not in a pipeline: its first stage alone makes embeddings, and what they push out of its pool would
still be hit in the others'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_parallel

from sglang_jenga.boot import hook_table, refusal
from sglang_jenga.boot.hooks import HookError
from sglang_jenga.boot.rebinding import rebind
from sglang_jenga.memory.byte_strings import ByteStrings
from sglang_jenga.pages.guests import Guests
from sglang_jenga.serving.allocator import is_ours
from sglang_jenga.serving.embeddings import PooledEmbeddings, WantedImages
from sglang_jenga.serving.pressure import Price

logger = logging.getLogger(__name__)


def _lie_in_the_pool() -> bool:
    return get_parallel().pp_size == 1


def reservation(original: Callable[..., float], **kwargs: Any) -> float:
    """SGLang sets memory aside for what its cache may grow to, and for what carries pixels."""
    if not _lie_in_the_pool():
        return original(**kwargs)
    with envs.SGLANG_VLM_CACHE_SIZE_MB.override(0):
        return original(**kwargs)


def init_cache(original: Callable[[int], None], max_size: int = 0) -> None:
    """SGLang makes its cache at the end of `build_kv_cache`. One of no size stays: it keeps
    nothing, which the user, or SGLang for some settings, has asked for."""
    if max_size <= 0 or not _lie_in_the_pool():
        original(max_size)


def after_build(result: Any, *, model_config: Any, **_: Any) -> None:
    """All pools are there."""
    allocator, cache = result.token_to_kv_pool_allocator, result.tree_cache
    if not is_ours(allocator) or not model_config.is_multimodal or not _lie_in_the_pool():
        return
    if envs.SGLANG_VLM_CACHE_SIZE_MB.get() <= 0:
        logger.info("jenga: embeddings of images are not kept (SGLANG_VLM_CACHE_SIZE_MB=0)")
        return
    guests = Guests(allocator.core)
    labels = cache.metrics_collector.labels if cache.metrics_collector else None
    embeddings = PooledEmbeddings(guests, ByteStrings(allocator.buffer), cache.eviction, labels)
    wanted = WantedImages(guests, allocator.core, cache.eviction)
    (row,) = hook_table.EMBEDDINGS
    try:
        rebind([row._replace(value=embeddings)])
    except HookError as error:
        refusal.leave(error)
    allocator.pressure.add(Price.FOR_WANTED_IMAGES, wanted)
    allocator.embeddings = embeddings
