"""SGLang's prefix-cache face over the radix trees: requests, rows and locks on its side.

The only place that knows both the trees and the allocator. Frees by row position from the host's
page tables and evicts host ids, so nothing here waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast
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
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_exec

from sglang_jenga.pages.extent import Extent
from sglang_jenga.pages.tables import expand
from sglang_jenga.radix.node import Match, Node, PathLock, PrefixPages, TokenPages
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.serving.ablation import ALL_ON, CacheOptions
from sglang_jenga.serving.cache_sizes import CacheSizes
from sglang_jenga.serving.encoders import image_ends
from sglang_jenga.serving.eviction import CachedPrefixes, Eviction
from sglang_jenga.serving.kv_events import EventPublisher
from sglang_jenga.serving.misses import MissReport
from sglang_jenga.serving.pressure import Pressure, Price
from sglang_jenga.serving.rows import Rows
from sglang_jenga.serving.state_caching import (
    EndStates,
    TrackedStates,
    TrackingSlots,
    UnreachableTokens,
)
from sglang_jenga.serving.usage import LargePageGauge
from sglang_jenga.serving.windows import BehindWindows, Windows

logger = logging.getLogger(__name__)


class JengaRadixCache(CacheSizes, BasePrefixCache):
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
        self._rows = Rows(self.allocator, self.req_to_token_pool)
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
            page_observer=self._rows if self.groups.mapped else None,
            balanced=options.balanced,
            aligned=options.aligned,
            resume_points=options.resume_points,
            shield=options.shield,
            state_cost_tokens=self.core.plan.state_cost_tokens if options.cheap_states else 0,
            most_on_path=self._most_states_on_path(),
        )
        self.eviction = Eviction(self.trees, self.core, self._report_evicted)
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
        self.misses = MissReport(self.groups.kinds, metric_labels)
        several = len(self.core.plan.groups) > 1
        self.large_pages = (
            LargePageGauge(self.core, metric_labels) if metric_labels and several else None
        )

    def _add_releases(self, pressure: Pressure) -> None:
        """What this server can give up when memory is short; see `Price`."""
        if self.states is not None:
            pressure.add(Price.UNREACHABLE, UnreachableTokens(self.trees, self.core))
        for price, exactly in ((Price.BEHIND_WINDOWS, False), (Price.LAST_BEHIND_WINDOWS, True)):
            if self.windows is not None:
                pressure.add(price, BehindWindows(self.windows, pressure, exactly=exactly))
            if not self.disable and (self.windows is not None or not exactly):
                # Once more after the last tokens behind windows: they may complete large pages.
                pressure.add(max(price, Price.CACHED), CachedPrefixes(self.eviction))
        if self.states is not None:
            pressure.add(Price.TRACKED, TrackingSlots(self.states, self.eviction, pressure))

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
            # What it leaves anew must not be exchanged for what was cached.
            self.eviction.everything()
        elif not self.disable:
            key = params.key
            length = len(key)
            match = self.trees.match(
                _namespace(key),
                _tokens(key.token_ids, length),
                self._image_ends(params.req),
            )
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

    def _image_ends(self, req: Any) -> Sequence[int]:
        return image_ends(req) if self.groups.encoder is not None else ()

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
        if req.kv.holds_mamba or self.groups.state is None:
            return
        extent = node.extents[self.groups.state]
        req.kv.mamba_cow_src_index = None if extent is None else torch.from_numpy(extent.ids)

    def prefix_pages(self, req: Any, group_id: int) -> np.ndarray:
        """Small ids of the request's matched prefix."""
        return self.trees.pages_to(req.last_node, group_id)

    def touch_prefix(self, key: RadixKey) -> None:
        """A waiting request will want this prefix: refresh what it would hit."""
        if not self.disable:
            self.trees.match(_namespace(key), _tokens(key.token_ids, len(key)), None)

    def path_device_indices(self, node: Node) -> torch.Tensor:
        pages = {group: self.trees.pages_to(node, group) for group in self.groups.of_rows}
        return self.allocator.to_device(expand(self._rows.named(pages), self.page_size))

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
        kv = req.kv
        protected = kv.cache_protected_len
        # With prompts and decode steps in one batch SGLang counts the token of the step in flight,
        # which nobody knows yet.
        end = min(up_to, len(req.full_untruncated_fill_ids))
        end -= end % self.page_size
        if self.states is not None and not self.disable:
            end = self.states.cacheable(req, end, finished=finished)
        if self.disable or end <= protected or end < self.tables.borders[kv.req_pool_idx]:
            # It keeps the state that it began with, for others who begin there are waiting.
            whole = up_to >= len(req.full_untruncated_fill_ids)
            if self.windows is not None and whole and not finished:
                self.windows.watch(req)  # its admission has locked, and it decodes from now on
            return
        # First, since making room for a copy may change the trees, and what the row still holds.
        states = None if self.states is None else self.states.take(req, end, finished=finished)
        offers: list[TokenPages | PrefixPages] = [*self._rows.own_pages(kv, end)]
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
            self._image_ends(req),
            forks=() if self.states is None else self.states.forks(req, end),
        )
        end = node.end  # less, if the trees have another key that parts from it inside an image
        for group_id, parts in enumerate(declined):
            for ids in parts:
                self.core.free(group_id, ids)
        lock = None
        if not finished:
            # It runs on a state of its own, so the cached one may go while it runs. Before the old
            # lock goes: otherwise the shared part would be evictable for a moment.
            own = () if self.groups.state is None else (self.groups.state,)
            lock = self.trees.lock(node, without=own)
        self.unlock(req.lock)
        req.lock, req.last_node = lock, node
        if lock is not None and self.windows is not None:
            self.windows.watch(req)
        if not finished and any(declined[group_id] for group_id in self.groups.of_tokens):
            self._rows.repoint(kv.req_pool_idx, self.trees, node, protected)
        kv.cache_protected_len = end
        kv.cache_inserted_len = max(kv.cache_inserted_len, end)

    # ---- release ----------------------------------------------------------------------------

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        self._rows.free(kv, ranges)

    def evict_sliding_windows(self, req: Any, pre_len: int, *, eviction_interval: int = 1) -> None:
        """The token at ``pre_len`` and later ones cannot see all of the request's window pages."""
        assert self.windows is not None, "SGLang asks where there are windows"
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

    def _report_evicted(self, num_smalls: int, started: float) -> None:
        self.update_eviction_metrics(num_smalls * self.page_size, started)

    def evict_for_alloc(self, params: EvictParams, **_: Any) -> EvictResult:
        """Does nothing. SGLang asks here for one group; the allocation that follows decides for all
        groups at once and evicts the oldest pages of any."""
        return EvictResult()

    def evict(self, params: EvictParams) -> EvictResult:
        """Evict so many tokens of each group, whatever that frees: SGLang's own requests."""
        return self.groups.evicted(self.eviction.of_each(self.groups.wanted(params)))

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

    # ---- checks -----------------------------------------------------------------------------

    def sanity_check(self) -> None:
        self.trees.check()
        self.core.check(cast("list[Extent]", self.trees.extents()))
        if self.allocator.embeddings is not None:
            self.allocator.embeddings.check()
        for group_id, slot_map in self.allocator.slot_maps.items():
            for node in self.trees.nodes():
                full, own = node.extents[self.groups.row], node.extents[group_id]
                assert full is not None, "whatever is cached has its full pages"
                slot_map.check(full.ids, np.zeros_like(full.ids) if own is None else own.ids)

    def pretty_print(self) -> None:
        print(self.available_and_evictable_str())

    def available_and_evictable_str(self) -> str:
        return f"{self.allocator.debug_print()}\n"


def _namespace(key: RadixKey) -> tuple[str | None, str | None]:
    return (key.extra_key, key.cache_salt)


def _tokens(token_ids: Any, count: int) -> np.ndarray:
    """A view: SGLang's array cannot grow while it lives, so nobody may keep it."""
    return np.frombuffer(token_ids, dtype=np.int64, count=count)
