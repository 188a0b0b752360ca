"""SGLang's prefix-cache face over the radix trees: requests, rows and locks on its side.

The only place that knows both the trees and the allocator. Frees by row position from the host's
page tables and evicts host ids, so nothing here waits for the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import coalesce_ranges, free_swa_out_of_window_slots
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.utils.common import ceil_align

from sglang_jenga.page_tables import expand
from sglang_jenga.radix.node import Node, PathLock
from sglang_jenga.radix.policy import FullPolicy, LayerPolicy, WindowPolicy
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.token_allocator import FULL, WINDOW

logger = logging.getLogger(__name__)


class JengaRadixCache(BasePrefixCache):
    """Serves SGLang from `RadixTrees`. With ``disable`` it keeps nothing but still frees rows."""

    def __init__(self, params: CacheInitParams) -> None:
        self.disable = params.disable
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.sliding_window_size = params.sliding_window_size
        self.allocator = params.token_to_kv_pool_allocator
        self.core = self.allocator.core
        self.tables = self.allocator.tables
        policies: list[LayerPolicy] = [FullPolicy()]
        if self.supports_swa():
            policies.append(WindowPolicy(self.sliding_window_size))
        self.trees = RadixTrees(policies, self.page_size, self.core)
        # One large page's worth at a time, but not so little that a long eviction crawls.
        self._quantum = [max(group.smalls_per_large, 64) for group in self.core.plan.groups]
        self.allocator.tree_cache = self
        if params.enable_metrics:
            self.init_metrics_collector()

    # ---- match ------------------------------------------------------------------------------

    @property
    def root_node(self) -> Node:
        return self.trees.root

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        node = self.trees.root
        if not self.disable:
            key = params.key
            node = self.trees.match(_namespace(key), _tokens(key.token_ids, len(key)))
        return MatchResult(
            device_prefix_len=node.end,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
            full_kv_hit_length=node.end,
        )

    def path_device_indices(self, node: Node) -> torch.Tensor:
        pages = self.trees.pages_to(node, FULL)
        return self.allocator.to_device(expand(pages, self.page_size))

    # ---- checkpoint -------------------------------------------------------------------------

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Offer the request's KV of ``[0, up_to)`` to the trees, whole small pages only."""
        kv = req.kv
        protected = kv.cache_protected_len
        end = up_to - up_to % self.page_size
        if self.disable or end <= protected:
            return
        row = kv.req_pool_idx
        alive_from = [protected]
        if self.supports_swa():
            alive_from.append(max(protected, kv.get_evicted_seqlen(ComponentType.SWA)))
        pages = [
            self.tables.pages(group_id, row, 0, end).astype(np.int64)
            for group_id in range(len(alive_from))
        ]
        node, declined = self.trees.insert(
            (req.extra_key, req.cache_salt or None),
            _tokens(req.full_untruncated_fill_ids, end),
            pages,
            alive_from,
            protected,
        )
        for group_id, ranges in enumerate(declined):
            for begin, stop in ranges:
                self.core.free(group_id, pages[group_id][begin:stop])
        # Before the old lock goes: otherwise the shared part would be evictable for a moment.
        lock = self.trees.lock(node)
        self.unlock(req.lock)
        req.lock, req.last_node = lock, node
        if any(declined):
            self._repoint_row(row, node, protected)
        kv.cache_protected_len = end
        kv.cache_inserted_len = max(kv.cache_inserted_len, end)

    def _repoint_row(self, row: int, node: Node, start: int) -> None:
        """The row's positions from ``start`` on now lie in the tree's pages, not in the request's
        own copies."""
        first = start // self.page_size
        pages = [
            self.trees.pages_to(node, group_id)[first:]
            for group_id in range(len(self.trees.policies))
        ]
        for group_id, ids in enumerate(pages):
            self.tables.rows[group_id][row, first : first + ids.size] = ids
        slots = self.allocator.to_device(expand(pages[FULL], self.page_size))
        self.req_to_token_pool.write((row, slice(start, node.end)), slots.to(torch.int32))
        if self.supports_swa():
            live = pages[WINDOW] > 0
            self.allocator.remap(pages[FULL][live], pages[WINDOW][live])

    # ---- release ----------------------------------------------------------------------------

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        row = kv.req_pool_idx
        dead_begin = dead_end = 0
        if self.supports_swa():
            dead_begin = kv.swa_dead_lo(self.page_size)
            dead_end = max(dead_begin, kv.get_evicted_seqlen(ComponentType.SWA))
        for start, end in coalesce_ranges(ranges):
            self.allocator.free_row_pages(FULL, row, start, end)
            if self.supports_swa():
                # Without the part whose window pages slid out already.
                self.allocator.free_row_pages(WINDOW, row, start, min(end, dead_begin))
                self.allocator.free_row_pages(WINDOW, row, max(start, dead_end), end)

    def evict_sliding_windows(self, req: Any, pre_len: int, *, eviction_interval: int = 1) -> None:
        """Let go of window pages that the token at ``pre_len`` and later ones cannot see."""
        row = req.kv.req_pool_idx

        def free_segment(slots: torch.Tensor, *, start_pos: int) -> None:
            # The device's copy of the slots serves only to say how many.
            self.allocator.free_row_pages(WINDOW, row, start_pos, start_pos + slots.numel())

        free_swa_out_of_window_slots(
            req,
            pre_len,
            sliding_window_size=self.swa_retain_window,
            page_size=self.page_size,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.allocator,
            supports_prefix_sharing=self.supports_prefix_sharing(),
            free_segment=free_segment,
            eviction_interval=eviction_interval,
        )
        # The matched prefix slides out too; its pages are the tree's, so they become evictable.
        if req.lock is not None:
            seen_from = pre_len - ceil_align(self.swa_retain_window, self.page_size)
            req.lock = self.trees.unlock_before(req.lock, WINDOW, max(0, seen_from))

    def slide(self, reqs: Iterable[Any]) -> None:
        """Slide the windows of decoding requests to where they are. SGLang does it every
        ``SGLANG_SWA_EVICTION_INTERVAL`` tokens; a pool short of pages cannot wait for that."""
        for req in reqs:
            # As in SGLang: a request's last prefill may still be running at its first decode.
            if req.kv.holds_kv and req.decode_batch_idx >= 1:
                self.evict_sliding_windows(req, req.seqlen - 1)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        self.core.forget(req.kv.req_pool_idx)

    # ---- locks ------------------------------------------------------------------------------

    def lock(self, node: Node) -> PathLock:
        return self.trees.lock(node)

    def unlock(self, lock: PathLock | None) -> None:
        if lock is not None:
            self.trees.unlock(lock)

    def release_swa_prefix_lock(self, req: Any) -> None:
        """The request's window has left its prefix behind: that part may age and go."""
        if req.lock is not None:
            req.lock = self.trees.unlock_before(req.lock, WINDOW, req.lock.node.end)

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        raise RuntimeError("locks are receipts here: use lock() and unlock()")

    def dec_lock_ref(self, node: Node, params: Any = None) -> DecLockRefResult:
        raise RuntimeError("locks are receipts here: use lock() and unlock()")

    # ---- evict ------------------------------------------------------------------------------

    def evict_to_fit(self, need: Sequence[int]) -> None:
        """Evict, oldest first over all groups, until ``need`` small pages per group can be had.

        Evicts nothing when even everything would not be enough: the caller will retract.
        """
        if self.core.fits_after_evicting(need):
            self._evict_until(lambda: self.core.fits_now(need))

    def evict(self, params: EvictParams) -> EvictResult:
        wanted = self.allocator.need(params.num_tokens, params.swa_num_tokens)
        before = list(self.core.num_cached)

        def satisfied() -> bool:
            return all(
                was - now >= count
                for was, now, count in zip(before, self.core.num_cached, wanted, strict=False)
            )

        evicted = [count * self.page_size for count in self._evict_until(satisfied)]
        return EvictResult(
            num_tokens_evicted=evicted[FULL],
            swa_num_tokens_evicted=evicted[WINDOW] if self.supports_swa() else 0,
        )

    def _evict_until(self, satisfied: Callable[[], bool]) -> list[int]:
        started = time.perf_counter()
        evicted = self.trees.evict_until(satisfied, self._quantum)
        self.update_eviction_metrics(sum(evicted) * self.page_size, started)
        return evicted

    def reset(self) -> None:
        """Drop every cached prefix. SGLang calls it only while no request runs."""
        self.trees.evict_until(lambda: False, [1 << 62] * len(self.trees.policies))
        self.trees.clear()
        # Counted before SGLang clears the allocator: what is missing here was lost by somebody.
        large = self.core.large
        held = int(self.core.plan.null_smalls > 0)
        logger.info(
            "jenga flush: %d of %d large pages empty", large.num_empty, large.owner.size - held
        )

    # ---- sizes, in tokens -------------------------------------------------------------------

    def supports_swa(self) -> bool:
        return self.sliding_window_size is not None

    def supports_prefix_sharing(self) -> bool:
        return not self.disable

    def _evictable(self, group_id: int) -> int:
        return self.core.num_cached[group_id] * self.page_size

    def _protected(self, group_id: int) -> int:
        return self.trees.num_pages[group_id] * self.page_size - self._evictable(group_id)

    def evictable_size(self) -> int:
        return self._evictable(FULL)

    def full_evictable_size(self) -> int:
        return self._evictable(FULL)

    def swa_evictable_size(self) -> int:
        return self._evictable(WINDOW) if self.supports_swa() else 0

    def protected_size(self) -> int:
        return self._protected(FULL)

    def full_protected_size(self) -> int:
        return self._protected(FULL)

    def swa_protected_size(self) -> int:
        return self._protected(WINDOW) if self.supports_swa() else 0

    def total_size(self) -> int:
        return self.trees.num_pages[FULL] * self.page_size

    def sanity_check(self) -> None:
        self.trees.check()
        self.core.check()

    def pretty_print(self) -> None:
        print(self.available_and_evictable_str())

    def available_and_evictable_str(self) -> str:
        return f"{self.allocator.debug_print()}\n"


def _namespace(key: RadixKey) -> tuple[str | None, str | None]:
    return (key.extra_key, key.cache_salt)


def _tokens(token_ids: Any, count: int) -> np.ndarray:
    """A private copy: a view would forbid SGLang's array to grow while it lives."""
    return np.frombuffer(token_ids, dtype=np.int64, count=count).copy()
