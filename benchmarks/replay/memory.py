"""Who has the pool's bytes at this moment: running requests, the prefix cache, or nobody.

Reads the counters of whichever pools the scheduler was built with; `result.py` defines the words.
Three readers: stock SGLang cuts the pool into partitions at boot, its unified memory lets two
groups grow towards each other, and jenga has large pages. None changes anything, and none knows
what the bytes are needed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from benchmarks.replay.occupancy import Occupancy
from sglang_jenga.plan.spec import LayerGroup


class StockMemory:
    """Partitions of fixed size, in SGLang's own figures: available, evictable, the rest is held."""

    def __init__(self, scheduler: Any, groups: Sequence[LayerGroup], pool_bytes: int) -> None:
        self._stats = scheduler.pool_stats_observer.get_pool_stats
        self._groups = groups
        self._pool_bytes = pool_bytes
        self.described = self._describe()

    def _partitions(self) -> list[tuple[list[int], int, int, int]]:
        """Per partition: its groups, its capacity, and what is free and evictable of it, in tokens
        or states."""
        stats = self._stats()
        full = (stats.full_capacity, stats.full_available_size, stats.full_evictable_size)
        if len(self._groups) == 1:
            return [([0], *full)]
        if self._groups[1].kind.name == "state":
            used = stats.mamba_num_used + stats.mamba_available_size + stats.mamba_evictable_size
            states = (used, stats.mamba_available_size, stats.mamba_evictable_size)
            return [([0], *full), ([1], *states)]
        if not stats.is_hybrid_swa:
            return [([0, 1], *full)]
        window = (stats.swa_capacity, stats.swa_available_size, stats.swa_evictable_size)
        return [([0], *full), ([1], *window)]

    def _describe(self) -> str:
        names = [group.label for group in self._groups]
        return ", ".join(
            f"{'+'.join(names[group] for group in members)}: {capacity}"
            for members, capacity, _, _ in self._partitions()
        )

    def occupancy(self, running: Sequence[Any]) -> Occupancy:
        held, cached = [0] * len(self._groups), [0] * len(self._groups)
        lent = [0] * len(self._groups)
        cut = common = 0
        for members, capacity, free, evictable in self._partitions():
            for group in members:
                entry = self._groups[group].entry_bytes
                held[group] = (capacity - free - evictable) * entry
                cached[group] = evictable * entry
                cut += capacity * entry
                if len(members) > 1:  # stored side by side: every token takes its part of each
                    common += free * entry
                else:
                    lent[group] = free * entry
        return Occupancy(held, cached, lent, common, self._pool_bytes - cut)


class UnifiedMemory:
    """Two groups growing towards each other in one buffer. What lies between them, and the holes
    that a group's frees leave, can go to either: SGLang moves pages to close holes."""

    def __init__(self, scheduler: Any, groups: Sequence[LayerGroup], pool_bytes: int) -> None:
        allocator = scheduler.token_to_kv_pool_allocator
        tree = scheduler.tree_cache
        if groups[1].kind.name == "state":
            second, evictable = allocator.mamba_allocator, tree.mamba_evictable_size
        else:
            second, evictable = allocator.swa_attn_allocator, tree.swa_evictable_size
        self._ends = (
            (allocator.full_attn_allocator, tree.full_evictable_size),
            (second, evictable),
        )
        self._groups = groups
        self._pool_bytes = pool_bytes
        self._cut = pool_bytes - allocator.unified_buffer.total_bytes
        self.described = f"one buffer of {allocator.unified_buffer.total_bytes} bytes, two ends"

    def occupancy(self, running: Sequence[Any]) -> Occupancy:
        held, cached = [], []
        padded = self._cut
        for group, (end, evictable) in zip(self._groups, self._ends, strict=True):
            entry = end.entry_bytes_per_page // end.page_size
            taken, kept = end.allocated_count(), evictable()
            held.append((taken - kept) * entry)
            cached.append(kept * entry)
            padded += taken * (entry - group.entry_bytes)
        common = self._pool_bytes - self._cut - sum(held) - sum(cached)
        return Occupancy(held, cached, [0, 0], common, padded)


class JengaMemory:
    """One pool of large pages. What a running request keeps behind its window counts as cached, and
    so does a state that it is tracked in and can go on without: both are given back when memory is
    short, and are in nobody's way before."""

    def __init__(self, scheduler: Any, pool_bytes: int) -> None:
        self._tree = scheduler.tree_cache
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._core = self._allocator.core
        self._page_size = self._allocator.page_size
        self._pool_bytes = pool_bytes
        plan = self._core.plan
        cuts = ", ".join(
            f"{item.group.label} {item.smalls_per_large} a large page, "
            f"{100 * item.padding_fraction:.2f} % padding"
            for item in plan.groups
        )
        self.described = f"{plan.num_large} large pages of {plan.large_page_bytes} bytes: {cuts}"

    def occupancy(self, running: Sequence[Any]) -> Occupancy:
        core = self._core
        items = core.plan.groups
        sizes = [item.small_page_bytes for item in items]
        held = [count * size for count, size in zip(core.num_used, sizes, strict=True)]
        cached = [count * size for count, size in zip(core.num_cached, sizes, strict=True)]
        if self._tree.supports_swa():
            left = self._behind_windows(running) * sizes[1]
            held[1] -= left
            cached[1] += left
        if self._tree.supports_mamba():
            tracked = self._allocator.pressure.releasable_states() * sizes[-1]
            held[-1] -= tracked
            cached[-1] += tracked
        padded = self._pool_bytes - core.plan.pool_bytes
        for item, used, kept in zip(items, core.num_used, core.num_cached, strict=True):
            spare = item.padded_entry_bytes - item.group.entry_bytes
            padded += (used + kept) * item.group.tokens_per_page * spare
        return Occupancy(
            held,
            cached,
            [count * size for count, size in zip(core.large.free, sizes, strict=True)],
            core.large.num_empty * core.plan.large_page_bytes,
            padded,
        )

    def _behind_windows(self, running: Sequence[Any]) -> int:
        """Small pages that sliding all running requests exactly would give back."""
        step = self._page_size
        reach = -(-max(self._tree.swa_retain_window, step) // step) * step
        total = 0
        for req in running:
            if not req.kv.holds_kv or req.decode_batch_idx < 1:
                continue
            begin = max(req.kv.get_evicted_seqlen(ComponentType.SWA), req.kv.swa_dead_lo(step))
            total += max(0, (req.seqlen - 1 - reach) // step - -(-begin // step))
        return total
