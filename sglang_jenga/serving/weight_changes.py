"""Weights that change under waiting requests: nobody resumes an answer from KV of old weights.

A retracted request leaves what it has computed to the trees and resumes from there; in stock SGLang
it computes its answer again. Between the two, clients may exchange the weights and keep the cache
(``flush_cache=false``). What the prompts of old weights left stays, as in stock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_jenga.serving.allocator import is_ours


def retract_all(original: Callable[..., None], *, tree_cache: Any, **kwargs: Any) -> None:
    """A pause retracts everybody, most likely since new weights are to come."""
    if not is_ours(tree_cache.token_to_kv_pool_allocator):
        return original(tree_cache=tree_cache, **kwargs)
    tree_cache.keeps_retracted = False
    try:
        return original(tree_cache=tree_cache, **kwargs)
    finally:
        tree_cache.keeps_retracted = True


def drop_answers(result: Any, self: Any, *_: Any, **__: Any) -> None:
    """Whoever was retracted for want of memory before the weights changed has left an answer.

    That is rare, and what else is cached is of old weights as well: all of it goes. Embeddings of
    images always do: an image costs one run of the new vision tower.
    """
    cache = self.scheduler.tree_cache
    allocator = cache.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return
    if allocator.embeddings is not None:
        allocator.embeddings.clear()
    if any(req in cache.resumable for req in self.scheduler.waiting_queue):
        cache.eviction.everything()
