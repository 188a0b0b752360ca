"""SGLang's prefix-cache face over the radix trees: requests, rows and locks on its side.

The only place that knows both the trees and the allocator. Frees by row position from the host's
page tables and evicts host ids, so nothing here waits for the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
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
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import get_exec

from sglang_jenga.pages.tables import expand
from sglang_jenga.radix.node import Match, Node, PathLock, PrefixPages, TokenPages
from sglang_jenga.radix.policy import policy_of
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.serving.ablation import policy
from sglang_jenga.serving.allocator import FULL, WINDOW
from sglang_jenga.serving.kv_events import EventPublisher
from sglang_jenga.serving.misses import MissReport
from sglang_jenga.serving.state_caching import EndStates, TrackedStates
from sglang_jenga.serving.windows import Windows

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
        part = policy()
        groups = [item.group for item in self.core.plan.groups]
        self.state_group = self.allocator.state_group
        self.states: EndStates | TrackedStates | None = None
        if self.state_group is not None:
            tracked = params.enable_mamba_extra_buffer
            rows = self.req_to_token_pool
            self.states = TrackedStates(rows, self.page_size) if tracked else EndStates(rows)
        self.events = self._event_publisher(params)
        self.trees = RadixTrees(
            [policy_of(group.layer_type, group.window) for group in groups],
            self.page_size,
            self.core,
            observer=self.events,
            page_observer=self if self.supports_swa() else None,
            balanced=part.balanced,
            aligned=part.aligned,
            anchors=part.anchors,
            shield=part.shield,
            worth_of_prefix_page=self._worth_of_state() if part.thinning else 0,
            most_on_path=self._most_states_on_path(),
        )
        self.windows: Windows | None = None
        if params.sliding_window_size is not None:
            self.windows = Windows(self, keep=part.keep_behind_window and not self.disable)
        self.allocator.tree_cache = self
        # Requests that are to find nothing cached, and those that once were.
        self._without_hit: WeakSet[Any] = WeakSet()
        self._began_anew: WeakSet[Any] = WeakSet()
        self.keeps_retracted = True
        self.resumable: WeakSet[Any] = WeakSet()
        """Requests that have been retracted and left what they had computed."""
        if params.enable_metrics:
            self.init_metrics_collector()
        metric_labels = self.metrics_collector.labels if self.metrics_collector else None
        self.misses = MissReport([group.label for group in groups], metric_labels)

    def _worth_of_state(self) -> int:
        """Tokens whose full-attention KV takes the bytes of one state; 0 without states."""
        if self.states is None:
            return 0
        plans = self.core.plan.groups
        return plans[self.state_group].padded_entry_bytes // plans[FULL].padded_entry_bytes

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
        extent = node.extents[self.state_group]
        req.kv.mamba_cow_src_index = None if extent is None else torch.from_numpy(extent.ids)

    def touch_prefix(self, key: RadixKey) -> None:
        """A waiting request will want this prefix: refresh what it would hit."""
        if not self.disable:
            self.trees.match(_namespace(key), _tokens(key.token_ids, len(key)))

    def path_device_indices(self, node: Node) -> torch.Tensor:
        pages = self.trees.pages_to(node, FULL)
        return self.allocator.to_device(expand(pages, self.page_size))

    # ---- checkpoint -------------------------------------------------------------------------

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Offer the request's KV of ``[0, up_to)`` to the trees, whole small pages only."""
        self._without_hit.discard(req)
        # One that was retracted computes its thoughts again with its prompt.
        self._insert(req, min(up_to, req.owned_kv_len()), leaves=req.finished())

    def claim_kv_row(self, req: Any) -> bool:
        """SGLang is about to free a row. A request that is retracted leaves what it has computed to
        the trees: it resumes from there, unless somebody needs the bytes meanwhile. It leaves
        nothing while SGLang is paused, nor of its thoughts where SGLang strips them."""
        if req.finished() or req.skip_radix_cache_insert:
            return False
        if self.keeps_retracted:
            req.refresh_fill_ids()
            self._insert(req, req.owned_kv_len(), leaves=True)
            self.resumable.add(req)
        else:
            self.resumable.discard(req)
        return False

    def _insert(self, req: Any, up_to: int, *, leaves: bool) -> None:
        kv, row = req.kv, req.kv.req_pool_idx
        protected = kv.cache_protected_len
        # With prompts and decode steps in one batch SGLang counts the token of the step in flight,
        # which nobody knows yet.
        end = min(up_to, len(req.full_untruncated_fill_ids))
        end -= end % self.page_size
        if self.states is not None and not self.disable:
            end = self.states.cacheable(req, end, leaves=leaves)
        if self.disable or end <= protected:
            return
        # First, since making room for a copy may change the trees, and what the row still holds.
        states = None if self.states is None else self.states.take(req, end, leaves=leaves)
        offers: list[TokenPages | PrefixPages] = [
            TokenPages(begin, self.tables.pages(group_id, row, begin, end).astype(np.int64))
            for group_id, begin in enumerate(self._own_from(kv))
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
        if not leaves:
            # It runs on a state of its own, so the cached one may go while it runs. Before the old
            # lock goes: otherwise the shared part would be evictable for a moment.
            apart = () if self.states is None else (self.state_group,)
            lock = self.trees.lock(node, without=apart)
        self.unlock(req.lock)
        req.lock, req.last_node = lock, node
        if lock is not None and self.windows is not None:
            self.windows.watch(req)
        if any(declined[: len(self.tables.rows)]) and not leaves:
            self._repoint_row(row, node, protected)
        kv.cache_protected_len = end
        kv.cache_inserted_len = max(kv.cache_inserted_len, end)

    def _own_from(self, kv: Any) -> list[int]:
        """Per group the position from which on the request's row holds pages of its own."""
        begins = [kv.cache_protected_len]
        if self.supports_swa():
            slid = kv.get_evicted_seqlen(ComponentType.SWA)
            begins.append(max(kv.cache_protected_len, slid))
        return begins

    def _repoint_row(self, row: int, node: Node, start: int) -> None:
        """The row's positions from ``start`` on now lie in the tree's pages, not in the request's
        own copies."""
        first = start // self.page_size
        pages = [
            self.trees.pages_to(node, group_id)[first:] for group_id in range(len(self.tables.rows))
        ]
        for group_id, ids in enumerate(pages):
            self.tables.rows[group_id][row, first : first + ids.size] = ids
        if self.supports_swa():
            self.allocator.slot_map.upload()  # before a step could read the row with the old map
        slots = self.allocator.to_device(expand(pages[FULL], self.page_size))
        self.req_to_token_pool.write((row, slice(start, node.end)), slots.to(torch.int32))

    def changed(self, node: Node, group_id: int) -> None:
        """The trees have got or lost window pages of tokens that they have the full pages of."""
        if group_id != WINDOW:
            return
        window, full = node.extents[WINDOW], node.extents[FULL].ids
        if window is None:
            self.allocator.slot_map.part(full)
        else:
            self.allocator.slot_map.pair(full, window.ids)

    # ---- release ----------------------------------------------------------------------------

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        row = kv.req_pool_idx
        dead_begin = dead_end = 0
        if self.supports_swa():
            dead_begin = kv.swa_dead_lo(self.page_size)
            dead_end = max(dead_begin, kv.get_evicted_seqlen(ComponentType.SWA))
        for start, end in coalesce_ranges(ranges):
            start = max(start, kv.cache_protected_len)  # what lies before is the trees'
            self.allocator.free_row_pages(FULL, row, start, end)
            if self.supports_swa():
                # Without the part whose window pages slid out already.
                self.allocator.free_row_pages(WINDOW, row, start, min(end, dead_begin))
                self.allocator.free_row_pages(WINDOW, row, max(start, dead_end), end)

    def evict_sliding_windows(self, req: Any, pre_len: int, *, eviction_interval: int = 1) -> None:
        """The token at ``pre_len`` and later ones cannot see all of the request's window pages."""
        self.windows.leave(req, pre_len, eviction_interval)

    def slide(self, reqs: Iterable[Any], *, exactly: bool) -> None:
        """Give back what windows of decoding requests have left behind, if there are windows."""
        if self.windows is not None:
            self.windows.slide(reqs, exactly=exactly)

    def slide_prompt(self, req: Any, *, exactly: bool) -> None:
        """The same of a prompt that comes in chunks; None if there is no such prompt."""
        if self.windows is not None and req is not None:
            self.windows.slide_prompt(req, exactly=exactly)

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
        return min(15 * missing, large.num_idle // 64)

    def evict_for_alloc(self, params: EvictParams, **_: Any) -> EvictResult:
        """Nothing: a group that is short of its own kind alone lacks nothing here. The allocation
        that SGLang is about to make evicts what is the least use of any group, if it must."""
        return EvictResult()

    def evict(self, params: EvictParams) -> EvictResult:
        """Evict so many tokens of each group, whatever that frees: SGLang's own requests."""
        started = time.perf_counter()
        tokens = (params.num_tokens, params.swa_num_tokens)[: len(self.tables.rows)]
        wanted = self.allocator.need(*tokens, states=params.mamba_num)
        evicted = [
            self.trees.evict_small(group_id, count) * self.page_size
            for group_id, count in enumerate(wanted)
        ]
        self.update_eviction_metrics(sum(evicted), started)
        return EvictResult(
            num_tokens_evicted=evicted[FULL],
            swa_num_tokens_evicted=evicted[WINDOW] if self.supports_swa() else 0,
            mamba_num_evicted=0 if self.states is None else evicted[-1] // self.page_size,
        )

    def reset(self) -> None:
        """Drop every cached prefix. SGLang calls it only while no request runs."""
        self.trees.clear()
        # Counted before SGLang clears the allocator: what is missing here was lost by somebody.
        large = self.core.large
        held = int(self.core.plan.null_smalls > 0)
        logger.info(
            "jenga flush: %d of %d large pages empty",
            large.num_empty,
            self.core.plan.num_large - held,
        )

    # ---- sizes, in tokens -------------------------------------------------------------------

    def supports_swa(self) -> bool:
        return self.sliding_window_size is not None

    def supports_mamba(self) -> bool:
        return self.states is not None

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

    def mamba_evictable_size(self) -> int:
        """In states."""
        return 0 if self.states is None else self.core.num_cached[self.state_group]

    def mamba_protected_size(self) -> int:
        """In states."""
        if self.states is None:
            return 0
        return self.trees.num_pages[self.state_group] - self.mamba_evictable_size()

    def total_size(self) -> int:
        return self.trees.num_pages[FULL] * self.page_size

    def sanity_check(self) -> None:
        self.trees.check()
        self.core.check(self.trees.extents())
        if self.supports_swa():
            for node in self.trees.nodes():
                full, window = node.extents[FULL].ids, node.extents[WINDOW]
                beside = np.zeros_like(full) if window is None else window.ids
                self.allocator.slot_map.check(full, beside)

    def pretty_print(self) -> None:
        print(self.available_and_evictable_str())

    def available_and_evictable_str(self) -> str:
        return f"{self.allocator.debug_print()}\n"


def _namespace(key: RadixKey) -> tuple[str | None, str | None]:
    return (key.extra_key, key.cache_salt)


def _tokens(token_ids: Any, count: int) -> np.ndarray:
    """A view: SGLang's array cannot grow while it lives, so nobody may keep it."""
    return np.frombuffer(token_ids, dtype=np.int64, count=count)
