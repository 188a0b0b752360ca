"""SGLang's prefix-cache face over the radix trees: requests, rows and locks on its side.

The only place that knows both the trees and the allocator. Frees by row position from the host's
page tables and evicts host ids, so nothing here waits for the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

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
from sglang.srt.mem_cache.common import coalesce_ranges
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_exec

from sglang_jenga.pages.tables import expand
from sglang_jenga.radix.node import Match, Node, PathLock, PrefixPages, TokenPages
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.serving.ablation import ALL_ON, CacheOptions
from sglang_jenga.serving.kv_events import EventPublisher
from sglang_jenga.serving.misses import MissReport
from sglang_jenga.serving.pressure import Need, Pressure, Price, Release
from sglang_jenga.serving.state_caching import (
    EndStates,
    TrackedStates,
    TrackingSlots,
    UnreachableTokens,
)
from sglang_jenga.serving.windows import BehindWindows, Windows

logger = logging.getLogger(__name__)


class JengaRadixCache(BasePrefixCache):
    """Serves SGLang from `RadixTrees`. With ``disable`` it keeps nothing but still frees rows."""

    def __init__(self, params: CacheInitParams, options: CacheOptions = ALL_ON) -> None:
        self.disable = params.disable
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.sliding_window_size = params.sliding_window_size
        self.allocator = params.token_to_kv_pool_allocator
        self.core = self.allocator.core
        self.tables = self.allocator.tables
        self.groups = self.allocator.groups
        self.states: EndStates | TrackedStates | None = None
        if self.groups.state is not None:
            tracked = params.enable_mamba_extra_buffer
            rows = self.req_to_token_pool
            self.states = TrackedStates(rows, self.page_size) if tracked else EndStates(rows)
        self.events = self._event_publisher(params)
        self.trees = RadixTrees(
            [kind.policy for kind in self.groups.kinds],
            self.page_size,
            self.core,
            observer=self.events,
            page_observer=self if self.supports_swa() else None,
            balanced=options.balanced,
            aligned=options.aligned,
            resume_points=options.resume_points,
            shield=options.shield,
            state_cost_tokens=self._state_cost_tokens() if options.cheap_states else 0,
            most_on_path=self._most_states_on_path(),
        )
        self.windows: Windows | None = None
        if self.groups.mapped:
            self.windows = Windows(
                self.allocator,
                self.trees,
                keep=options.keep_behind_window and not self.disable,
                shared=not self.disable,
            )
        self._add_releases(self.allocator.pressure)
        # Requests that are to find nothing cached, and those that once were.
        self._without_hit: WeakSet[Any] = WeakSet()
        self._began_anew: WeakSet[Any] = WeakSet()
        self.keeps_retracted = True
        self.resumable: WeakSet[Any] = WeakSet()
        """Requests that have been retracted and left what they had computed."""
        if params.enable_metrics:
            self.init_metrics_collector()
        metric_labels = self.metrics_collector.labels if self.metrics_collector else None
        self.misses = MissReport([kind.label for kind in self.groups.kinds], metric_labels)

    def _add_releases(self, pressure: Pressure) -> None:
        """What this server can give up when memory is short; see `Price`."""
        if self.states is not None:
            pressure.add(Price.UNREACHABLE, UnreachableTokens(self.trees, self.core))
        for price, exactly in ((Price.BEHIND_WINDOWS, False), (Price.LAST_BEHIND_WINDOWS, True)):
            if self.windows is not None:
                pressure.add(price, BehindWindows(self.windows, pressure, exactly=exactly))
            if not self.disable and (self.windows is not None or not exactly):
                # Once more after the last tokens behind windows: they may complete large pages.
                pressure.add(max(price, Price.CACHED), CachedPrefixes(self))
        if self.states is not None:
            pressure.add(Price.TRACKED, TrackingSlots(self, pressure))

    def _state_cost_tokens(self) -> int:
        """Tokens whose full-attention KV takes the bytes of one state; 0 without states."""
        if self.states is None:
            return 0
        plans = self.core.plan.groups
        state, row = plans[self.groups.state], plans[self.groups.row]
        return state.padded_entry_bytes // row.padded_entry_bytes

    def _most_states_on_path(self) -> int | None:
        """What --mamba-max-states-per-path says; None for any number."""
        most = -1 if self.states is None else get_exec().mamba.mamba_max_states_per_path
        return None if most < 0 else most

    def _event_publisher(self, params: CacheInitParams) -> EventPublisher | None:
        if not params.enable_kv_cache_events or self.disable:
            return None
        self.kv_events = KVCacheEventRecorder(
            enabled=True,
            page_size=self.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        return EventPublisher(self.kv_events)

    # ---- match ------------------------------------------------------------------------------

    @property
    def root_node(self) -> Node:
        return self.trees.root

    def dfs_weight_order(self, node_handles: Sequence[Node]) -> list[int]:
        """SGLang asks for all waiting requests and keeps those that it finds below the root. One
        whose node was joined with another by a later look-up, or evicted, comes last."""
        order = super().dfs_weight_order(node_handles)
        found = set(order)
        return order + [at for at in range(len(node_handles)) if at not in found]

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        match = Match(self.trees.root, 0, ())
        if self._without_hit and params.req in self._without_hit:
            self.evict_everything()  # what it leaves anew must not be exchanged for what was cached
        elif not self.disable:
            key = params.key
            length = len(key)
            match = self.trees.match(_namespace(key), _tokens(key.token_ids, length))
            self.misses.record(match, length, params.req)
        node, branch = match.node, None
        if params.cow_mamba and self.states is not None and params.req is not None:
            self._copy_state_from(params.req, node)
            branch = self.states.branch(match)
        return MatchResult(
            device_prefix_len=node.end,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
            full_kv_hit_length=node.end,
            mamba_branching_seqlen=branch,
        )

    def forgo_hit(self, req: Any) -> None:
        """With its hit a request does not fit, alone on the server: it goes without."""
        if req.prefix_len:
            self._without_hit.add(req)

    def begin_anew(self, req: Any) -> bool:
        """A request that had to stop, alone on the server, is to find an empty pool when it comes
        again; False if that was so before. It holds its small pages as it got them among others,
        with gaps that no other group can use, and no byte ever moves."""
        if req in self._began_anew:
            return False
        self._began_anew.add(req)
        self._without_hit.add(req)
        return True

    @property
    def tokens_to_branch(self) -> int:
        """How far behind its hit the request matched last should be cut, 0 for nowhere."""
        return self.states.tokens_to_branch if self.states is not None else 0

    def _copy_state_from(self, req: Any, node: Node) -> None:
        """The request's own state begins as a copy of the node's, made in its first forward.

        It is admitted, and the node locked, before anything is allocated; otherwise the next
        round's match overwrites this.
        """
        if req.kv.holds_mamba:
            return
        extent = node.extents[self.groups.state]
        req.kv.mamba_cow_src_index = None if extent is None else torch.from_numpy(extent.ids)

    def prefix_pages(self, req: Any, group_id: int) -> np.ndarray:
        """Small ids of the request's matched prefix."""
        return self.trees.pages_to(req.last_node, group_id)

    def touch_prefix(self, key: RadixKey) -> None:
        """A waiting request will want this prefix: refresh what it would hit."""
        if not self.disable:
            self.trees.match(_namespace(key), _tokens(key.token_ids, len(key)))

    def path_device_indices(self, node: Node) -> torch.Tensor:
        pages = self.trees.pages_to(node, self.groups.row)
        return self.allocator.to_device(expand(pages, self.page_size))

    # ---- checkpoint -------------------------------------------------------------------------

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Offer the request's KV of ``[0, up_to)`` to the trees, whole small pages only."""
        self._without_hit.discard(req)
        # One that was retracted computes its thoughts again with its prompt.
        self._insert(req, min(up_to, req.owned_kv_len()), finished=req.finished())

    def claim_kv_row(self, req: Any) -> bool:
        """SGLang is about to free a row. A request that is retracted leaves what it has computed to
        the trees: it resumes from there, unless somebody needs the bytes meanwhile. It leaves
        nothing while SGLang is paused, nor of its thoughts where SGLang strips them."""
        if req.finished() or req.skip_radix_cache_insert:
            return False
        if self.keeps_retracted:
            req.refresh_fill_ids()
            self._insert(req, req.owned_kv_len(), finished=True)
            self.resumable.add(req)
        else:
            self.resumable.discard(req)
        return False

    def _insert(self, req: Any, up_to: int, *, finished: bool) -> None:
        kv, row = req.kv, req.kv.req_pool_idx
        protected = kv.cache_protected_len
        # With prompts and decode steps in one batch SGLang counts the token of the step in flight,
        # which nobody knows yet.
        end = min(up_to, len(req.full_untruncated_fill_ids))
        end -= end % self.page_size
        if self.states is not None and not self.disable:
            end = self.states.cacheable(req, end, finished=finished)
        if self.disable or end <= protected:
            return
        # First, since making room for a copy may change the trees, and what the row still holds.
        states = None if self.states is None else self.states.take(req, end, finished=finished)
        offers: list[TokenPages | PrefixPages] = [
            TokenPages(begin, self.tables.pages(group_id, row, begin, end).astype(np.int64))
            for group_id, begin in self._own_from(kv)
        ]
        if states is not None:
            offers.append(states)
        if self.events is not None:
            self.events.session_id = req.session_id
        node, declined = self.trees.insert(
            # What lies before has been walked and locked already.
            self.trees.root if req.lock is None else req.lock.node,
            (req.extra_key, req.cache_salt or None),
            _tokens(req.full_untruncated_fill_ids, end),
            offers,
        )
        for group_id, parts in enumerate(declined):
            for ids in parts:
                self.core.free(group_id, ids)
        lock = None
        if not finished:
            # It runs on a state of its own, so the cached one may go while it runs. Before the old
            # lock goes: otherwise the shared part would be evictable for a moment.
            own = () if self.states is None else (self.groups.state,)
            lock = self.trees.lock(node, without=own)
        self.unlock(req.lock)
        req.lock, req.last_node = lock, node
        if lock is not None and self.windows is not None:
            self.windows.watch(req)
        if not finished and any(declined[group_id] for group_id in self.groups.of_tokens):
            self._repoint_row(row, node, protected)
        kv.cache_protected_len = end
        kv.cache_inserted_len = max(kv.cache_inserted_len, end)

    def _own_from(self, kv: Any) -> Iterator[tuple[int, int]]:
        """Per token group the position from which on the request's row holds pages of its own."""
        for group_id in self.groups.of_tokens:
            slid = 0
            if group_id in self.groups.mapped:
                slid = kv.get_evicted_seqlen(self.groups.cursor(group_id))
            yield group_id, max(kv.cache_protected_len, slid)

    def _repoint_row(self, row: int, node: Node, start: int) -> None:
        """The row's positions from ``start`` on now lie in the tree's pages, not in the request's
        own copies."""
        first = start // self.page_size
        pages = {
            group_id: self.trees.pages_to(node, group_id)[first:]
            for group_id in self.groups.of_tokens
        }
        for group_id, ids in pages.items():
            self.tables.rows[group_id][row, first : first + ids.size] = ids
        for slot_map in self.allocator.slot_maps.values():
            slot_map.upload()  # before a step could read the row with the old map
        slots = self.allocator.to_device(expand(pages[self.groups.row], self.page_size))
        self.req_to_token_pool.write((row, slice(start, node.end)), slots.to(torch.int32))

    def changed(self, node: Node, group_id: int) -> None:
        """The trees have got or lost pages of tokens that they have the full pages of."""
        slot_map = self.allocator.slot_maps.get(group_id)
        if slot_map is None:
            return
        own, full = node.extents[group_id], node.extents[self.groups.row].ids
        if own is None:
            slot_map.part(full)
        else:
            slot_map.pair(full, own.ids)

    # ---- release ----------------------------------------------------------------------------

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        row, free = kv.req_pool_idx, self.allocator.free_row_pages
        dead_begin = kv.swa_dead_lo(self.page_size)
        for start, end in coalesce_ranges(ranges):
            start = max(start, kv.cache_protected_len)  # what lies before is the trees'
            free(self.groups.row, row, start, end)
            for group_id in self.groups.mapped:
                # Without the part whose pages slid out already.
                slid = kv.get_evicted_seqlen(self.groups.cursor(group_id))
                free(group_id, row, start, min(end, dead_begin))
                free(group_id, row, max(start, dead_begin, slid), end)

    def evict_sliding_windows(self, req: Any, pre_len: int, *, eviction_interval: int = 1) -> None:
        """The token at ``pre_len`` and later ones cannot see all of the request's window pages."""
        self.windows.leave(req, pre_len, eviction_interval)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        self.core.forget(req.kv.req_pool_idx)
        if self.states is not None:
            self.req_to_token_pool.free_mamba_cache(req)

    # ---- locks ------------------------------------------------------------------------------

    def lock(self, node: Node) -> PathLock:
        return self.trees.lock(node)

    def unlock(self, lock: PathLock | None) -> None:
        if lock is not None:
            self.trees.unlock(lock)

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        raise RuntimeError("locks are receipts here: use lock() and unlock()")

    def dec_lock_ref(self, node: Node, params: Any = None) -> DecLockRefResult:
        raise RuntimeError("locks are receipts here: use lock() and unlock()")

    # ---- evict ------------------------------------------------------------------------------

    def evict_everything(self) -> None:
        """Give up all that no running request needs."""
        for group_id, cached in enumerate(self.core.num_cached):
            self.trees.evict_small(group_id, cached)

    def evict_to_fit(self, need: Sequence[int]) -> None:
        """Evict until ``need`` small pages per group can be had (paper section 5.4, steps 3 to 5).

        Evicts nothing when even everything would not be enough: the caller will retract.
        """
        if not self.core.fits_after_evicting(need):
            return
        started, before = time.perf_counter(), sum(self.trees.num_pages)
        while (missing := self.core.larges_missing(need)) and (
            self.trees.evict_smalls_before_large(self.core.smalls_missing(need))
            or self.trees.evict_large(missing + self._ahead(missing))
        ):
            pass  # an emptied large page may have had small pages that were counted on
        while self.core.larges_missing(need):
            # No large page can be emptied any more: single small pages, of groups that are short.
            wanted = self.core.smalls_to_spare_a_large(need)
            if not sum(self.trees.evict_small(*short) for short in enumerate(wanted)):
                raise RuntimeError("the allocator promised more than the prefix cache can evict")
        evicted = before - sum(self.trees.num_pages)
        self.update_eviction_metrics(evicted * self.page_size, started)

    def _ahead(self, missing: int) -> int:
        """Large pages to evict besides: finding and cutting victims costs most of an eviction, and
        the next steps will want as much again. Little of what is cached, so that nothing is hit
        less."""
        large = self.core.large
        return min(15 * missing, large.num_reclaimable // 64)

    def evict_for_alloc(self, params: EvictParams, **_: Any) -> EvictResult:
        """Does nothing. SGLang asks here for one group; the allocation that follows decides for all
        groups at once and evicts the oldest pages of any."""
        return EvictResult()

    def evict(self, params: EvictParams) -> EvictResult:
        """Evict so many tokens of each group, whatever that frees: SGLang's own requests."""
        started = time.perf_counter()
        evicted = [
            self.trees.evict_small(group_id, count)
            for group_id, count in enumerate(self.groups.wanted(params))
        ]
        self.update_eviction_metrics(sum(evicted) * self.page_size, started)
        return self.groups.evicted(evicted)

    def reset(self) -> None:
        """Drop every cached prefix. SGLang calls it only while no request runs."""
        self.trees.clear()
        # Counted before SGLang clears the allocator: what is missing here was lost by somebody.
        large = self.core.large
        logger.info(
            "jenga flush: %d of %d large pages empty",
            large.num_empty,
            self.core.plan.num_large - self.core.plan.null_larges,
        )

    # ---- sizes, in tokens -------------------------------------------------------------------

    def supports_swa(self) -> bool:
        return bool(self.groups.mapped)

    def supports_mamba(self) -> bool:
        return self.states is not None

    def supports_prefix_sharing(self) -> bool:
        return not self.disable

    @property
    def _protected(self) -> list[int]:
        """Small pages per group that running requests have locked."""
        counts = zip(self.trees.num_pages, self.core.num_cached, strict=True)
        return [pages - cached for pages, cached in counts]

    def evictable_size(self) -> int:
        return self.core.num_cached[self.groups.row] * self.page_size

    def full_evictable_size(self) -> int:
        return self.evictable_size()

    def swa_evictable_size(self) -> int:
        return self.groups.of_mapped(self.core.num_cached)

    def protected_size(self) -> int:
        return self._protected[self.groups.row] * self.page_size

    def full_protected_size(self) -> int:
        return self.protected_size()

    def swa_protected_size(self) -> int:
        return self.groups.of_mapped(self._protected)

    def mamba_evictable_size(self) -> int:
        """In states."""
        return self.groups.of_states(self.core.num_cached)

    def mamba_protected_size(self) -> int:
        """In states."""
        return self.groups.of_states(self._protected)

    def total_size(self) -> int:
        return self.trees.num_pages[self.groups.row] * self.page_size

    def sanity_check(self) -> None:
        self.trees.check()
        self.core.check(self.trees.extents())
        for group_id, slot_map in self.allocator.slot_maps.items():
            for node in self.trees.nodes():
                full, own = node.extents[self.groups.row].ids, node.extents[group_id]
                slot_map.check(full, np.zeros_like(full) if own is None else own.ids)

    def pretty_print(self) -> None:
        print(self.available_and_evictable_str())

    def available_and_evictable_str(self) -> str:
        return f"{self.allocator.debug_print()}\n"


class CachedPrefixes(Release):
    """What nobody runs on, the oldest first."""

    def __init__(self, cache: JengaRadixCache) -> None:
        self._cache = cache

    def free(self, until: Need) -> bool:
        self._cache.evict_to_fit(until.smalls)
        return until.met


def _namespace(key: RadixKey) -> tuple[str | None, str | None]:
    return (key.extra_key, key.cache_salt)


def _tokens(token_ids: Any, count: int) -> np.ndarray:
    """A view: SGLang's array cannot grow while it lives, so nobody may keep it."""
    return np.frombuffer(token_ids, dtype=np.int64, count=count)
