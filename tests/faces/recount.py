"""The equations of a server's memory, recounted from scratch. The only part of the rig that looks
inside allocator and trees.

For every group g, with the trees' nodes and the rows of requests that hold KV:

    a small page is held by one node, or lies in one row behind what the trees hold, or is nobody's
    used + cached small pages  ==  pages of nodes + pages of rows
    locks of a node            ==  receipts of running requests that cover it
    host's page table          ==  SGLang's row of slots, for every position
    mapping[full slot]         ==  window slot beside it, or in the null page where nobody has one
    states of nodes, requests and tracking slots are all different
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from sglang.srt.mem_cache.common import coalesce_ranges
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_jenga.layers.base import Address
from sglang_jenga.pages.tables import expand
from tests.faces.pools import Pools


def everything(pools: Pools, scheduler: Any) -> None:
    """Check all equations. O(pool)."""
    pools.cache.sanity_check()
    reqs = list(owners(scheduler))
    for req in scheduler.waiting_queue:
        held = (req.kv.holds_kv, req.kv.holds_mamba, req.lock is not None)
        assert not any(held), f"{req.rid} waits and holds something: {held}"
    rows = [req.kv.req_pool_idx for req in reqs]
    free = pools.rows.free_slots
    assert len(set(rows + free)) == len(rows) + len(free) == pools.rows.size, "rows are lost"
    _pages(pools, reqs)
    _locks(pools, reqs)
    for req in reqs:
        _row(pools, req)
    for group_id in pools.allocator.slot_maps:
        _slot_map(pools, reqs, group_id)
    _sglangs_own_check(scheduler)


def owners(scheduler: Any) -> Iterator[Any]:
    """Requests that hold rows."""
    batches = [scheduler.running_batch, scheduler.last_batch]
    batches += [batch for batch, _ in scheduler.result_queue or ()]
    found = [req for batch in batches if batch is not None for req in batch.reqs]
    found += [scheduler.chunked_req] if scheduler.chunked_req is not None else []
    yield from {id(req): req for req in found if req.kv.holds_kv}.values()


def nothing_is_lost(pools: Pools) -> None:
    """All large pages of a flushed pool are empty, but for the null page's."""
    large = pools.allocator.core.large
    held = pools.plan.null_larges
    assert large.num_empty == pools.plan.num_large - held, "large pages are lost"
    assert len(pools.rows.free_slots) == pools.rows.size


# ---- pages ------------------------------------------------------------------------------------


def _own_pages(pools: Pools, req: Any, group_id: int) -> np.ndarray:
    """Small ids of a request's row that are not the trees'."""
    kv, page_size = req.kv, pools.cache.page_size
    table = pools.allocator.tables
    begin, end = kv.cache_protected_len, kv.kv_allocated_len
    assert begin % page_size == 0
    if group_id in pools.allocator.groups.of_rows:
        return table.pages(group_id, kv.req_pool_idx, begin, max(begin, end))
    dead = _given_up(pools, kv, group_id)
    parts = [table.pages(group_id, kv.req_pool_idx, begin, min(dead[0], end))]
    parts.append(table.pages(group_id, kv.req_pool_idx, max(dead), max(end, max(dead))))
    return np.concatenate(parts)


def _given_up(pools: Pools, kv: Any, group_id: int) -> tuple[int, int]:
    """From where up to where a request has given its own pages of a sliding group up. SGLang's
    record has one group's, ours those of others. What stays in front is what the group's type never
    calls dead."""
    page_size, first = pools.cache.page_size, next(iter(pools.allocator.slot_maps))
    swa = ComponentType.SWA
    up_to = kv.get_evicted_seqlen(swa if group_id == first else (swa, group_id))
    dead = pools.plan.groups[group_id].group.kind.dead(1 << 20)
    begin = max(kv.cache_protected_len, -(-dead[0] // page_size) * page_size)
    if group_id == first and up_to:
        assert kv.swa_dead_lo(page_size) == begin, (
            "SGLang's record of what is gone begins elsewhere"
        )
    return begin, up_to


def _pages(pools: Pools, reqs: list[Any]) -> None:
    core = pools.allocator.core
    for group_id, item in enumerate(pools.plan.groups):
        held = [node.extents[group_id] for node in pools.cache.trees.nodes()]
        ids = [int(i) for extent in held if extent is not None for i in extent.ids]
        for req in reqs:
            if item.group.kind.address is Address.REQUEST:
                ids += _states(req)
            else:
                ids += [int(i) for i in _own_pages(pools, req, group_id)]
        twice = [page for page, count in Counter(ids).items() if count > 1]
        assert not twice, f"{item.group.label}: small pages {twice} have two owners"
        null = set(ids) & set(range(item.null_pages))
        assert not null, f"{item.group.label}: somebody holds null pages {null}"
        counted = core.num_used[group_id] + core.num_cached[group_id]
        assert len(ids) == counted, (
            f"{item.group.label}: {len(ids)} small pages have owners, {counted} are counted"
        )


def _states(req: Any) -> list[int]:
    kv = req.kv
    slots = [int(kv.mamba_pool_idx)] if kv.holds_mamba else []
    if kv.mamba_ping_pong_track_buffer is not None:
        places = zip(kv.mamba_ping_pong_track_buffer, kv.mamba_ping_pong_empty, strict=True)
        slots += [int(slot) for slot, empty in places if not empty]
    return slots


# ---- locks ------------------------------------------------------------------------------------


def _locks(pools: Pools, reqs: list[Any]) -> None:
    trees = pools.cache.trees
    bases = pools.allocator.groups.of_rows  # of these a node has pages of one
    expected: Counter[tuple[int, int]] = Counter()
    for req in reqs:
        if req.lock is None:
            continue
        for group_id, ranges in enumerate(req.lock.ranges):
            per_prefix = trees.policies[group_id].per_prefix
            if not per_prefix:
                ranges = coalesce_ranges(ranges)  # a node may lie in two that meet
            node = req.lock.node
            while node.parent is not None:
                for begin, end in ranges:
                    inside = begin <= node.begin and node.end <= end
                    if per_prefix:
                        inside = begin < node.end <= end
                    if inside and (group_id == node.base or group_id not in bases):
                        expected[id(node), group_id] += 1
                node = node.parent
    for node in trees.nodes():
        for group_id, locks in enumerate(node.locks):
            wanted = expected[id(node), group_id]
            assert locks == wanted, (
                f"[{node.begin}, {node.end}) of group {group_id} has {locks} locks, "
                f"{wanted} requests need it"
            )


# ---- rows and the slot map --------------------------------------------------------------------


def _row(pools: Pools, req: Any) -> None:
    kv, tables = req.kv, pools.allocator.tables
    length, row = kv.kv_allocated_len, kv.req_pool_idx
    named = pools.allocator.groups.of_rows
    slots = np.concatenate([tables.slots(group_id, row, 0, length) for group_id in named])
    theirs = pools.rows.req_to_token[row, :length].numpy()
    assert np.array_equal(slots, theirs), f"{req.rid}: the page table is not SGLang's row"
    protected = kv.cache_protected_len
    if not protected:
        return
    node = req.lock.node if req.lock is not None else req.last_node
    assert node.end >= protected, f"{req.rid}: its prefix is not the trees'"
    pages = sum(pools.cache.trees.pages_to(node, group_id) for group_id in named)
    pages = pages[: protected // pools.cache.page_size]
    mine = np.concatenate([tables.pages(group_id, row, 0, protected) for group_id in named])
    assert np.array_equal(pages, mine), f"{req.rid}: its prefix lies in other pages than the trees'"


def _slot_map(pools: Pools, reqs: list[Any], group_id: int) -> None:
    """Whoever holds a full slot and the window slot of the same token finds it by the map; a full
    slot without a window slot leads into the null page. What has changed since the last forward is
    on the device before the next one."""
    slot_map, page_size = pools.allocator.slot_maps[group_id], pools.cache.page_size
    mapping = expand(slot_map.window_page, page_size)
    found = slot_map.tensor[:-1].numpy()
    late = (mapping != found) & (np.maximum(mapping, found) >= page_size)
    for pages in slot_map.pending:
        late[expand(pages, page_size)] = False
    assert not late.any(), f"full slots {np.flatnonzero(late)} are not led where the record says"
    for full, window, whose in _beside_each_other(pools, reqs, group_id):
        found = mapping[full]
        wrong = np.where(window == 0, found >= pools.cache.page_size, found != window)
        assert not wrong.any(), (
            f"{whose}: the map leads full slot {full[wrong][0]} to window slot {found[wrong][0]}, "
            f"its window lies in {window[wrong][0]}"
        )


def _beside_each_other(
    pools: Pools, reqs: list[Any], group_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Full slots in use and the window slots of the same tokens, 0 where nobody holds one."""
    page_size, row = pools.cache.page_size, pools.allocator.groups.row
    for node in pools.cache.trees.nodes():
        full = expand(node.extents[row].ids, page_size)
        window = node.extents[group_id]
        beside = np.zeros_like(full) if window is None else expand(window.ids, page_size)
        yield full, beside, f"node [{node.begin}, {node.end})"
    for req in reqs:
        kv, tables = req.kv, pools.allocator.tables
        begin, end = kv.cache_protected_len, kv.kv_allocated_len
        full = tables.slots(row, kv.req_pool_idx, begin, end)
        beside = tables.slots(group_id, kv.req_pool_idx, begin, end).copy()
        gone = [at - begin for at in _given_up(pools, kv, group_id)]
        beside[gone[0] : max(gone)] = 0
        yield full, beside, req.rid


# ---- SGLang's own -----------------------------------------------------------------------------


def _sglangs_own_check(scheduler: Any) -> None:
    """What SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY looks at after each step."""
    scheduler.invariant_checker.self_check_during_busy()
