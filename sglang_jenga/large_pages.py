"""First level: which large pages are empty, and which group each other one is bound to.

Knows counts, never which small page is where. All of it is host memory; ids are plain integers and
every choice is a function of the calls made so far, so tensor-parallel ranks stay in step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sglang_jenga.extent import Extent
from sglang_jenga.spec import PoolPlan

UNBOUND = -1
_FEW = 8  # below, a loop is faster than arrays


class LargePages:
    """State of every large page. For a large page bound to a group with ``k`` small pages in it:

        1 <= occupied <= k      small pages that a running request or the prefix cache holds
        0 <= used <= occupied   small pages that a running request holds; the others are cached

    and over the pool:

        num_empty == count(owner == UNBOUND)
        idle[g]   == count(owner == g and used == 0)                   eviction alone can empty it
        slack[g]  == sum(k - used for large pages of g with used > 0)  obtainable without a new one
        free[g]   == sum(k - occupied for large pages of g)            obtainable without evicting

        large 0 [0 A A . . .]   group A, k = 6: null page, two used, three empty   slack 3, free 3
        large 1 [b b]           group B, k = 2: both cached                        idle
        large 2                 empty

    ``used`` of a large page that one extent fills alone is not kept: it is k or 0, as the extent is
    pinned or not. Of the others, `extents_in` lists the extents that have small pages there.
    """

    def __init__(self, plan: PoolPlan) -> None:
        self.smalls = [group.smalls_per_large for group in plan.groups]
        num_groups = len(self.smalls)
        self.owner = np.full(plan.num_large, UNBOUND, dtype=np.int8)
        self.used = np.zeros(plan.num_large, dtype=np.int32)
        self.occupied = np.zeros(plan.num_large, dtype=np.int32)
        # The same memory for single reads and writes, which cost a tenth that way.
        self._used, self._occupied = memoryview(self.used), memoryview(self.occupied)
        self.idle = [0] * num_groups
        self.slack = [0] * num_groups
        self.free = [0] * num_groups
        # Empty large pages, a stack: its top is handed out first, lowest ids first after a reset.
        self._stack = np.arange(plan.num_large - 1, -1, -1, dtype=np.int64)
        self.num_empty = plan.num_large
        self.partial = [PartlyFilled(k) for k in self.smalls]
        self._extents: dict[int, dict[Extent, None]] = {}
        self._turned_idle: dict[int, None] = {}
        elements = [group.group.element for group in plan.groups]
        self._format = [elements.index(element) for element in elements]
        # Format of the bytes in every large page; the pool starts zeroed, which reads as any.
        self._written = np.full(plan.num_large, UNBOUND, dtype=np.int8)
        self._mixed = len(set(elements)) > 1
        self._stale: list[int] = []
        self._bind_null(plan.null_group, plan.null_smalls)

    def _bind_null(self, group_id: int, null_smalls: int) -> None:
        large_id = int(self.take_empty(group_id, 1)[0])
        assert large_id == 0
        self.fill(group_id, large_id, null_smalls)

    @property
    def num_idle(self) -> int:
        """Large pages of any group that eviction alone would empty."""
        return sum(self.idle)

    # ---- requests ---------------------------------------------------------------------------

    def take_empty(self, group_id: int, count: int) -> np.ndarray:
        """Bind ``count`` empty large pages to a group; they hold nothing yet, so fill them next."""
        assert count <= self.num_empty
        self.num_empty -= count
        large_ids = self._stack[self.num_empty : self.num_empty + count][::-1].copy()
        self.owner[large_ids] = group_id
        if self._mixed:
            written, new = self._written[large_ids], self._format[group_id]
            self._stale += large_ids[(written != UNBOUND) & (written != new)].tolist()
            self._written[large_ids] = new
        return large_ids

    def take_stale(self) -> list[int]:
        """Large pages bound since the last call whose bytes are of another format: zero them."""
        stale, self._stale = self._stale, []
        return stale

    def fill_whole(self, group_id: int, large_ids: np.ndarray) -> None:
        """Every small page of these freshly bound large pages becomes used."""
        self.used[large_ids] = self.occupied[large_ids] = self.smalls[group_id]

    def fill(self, group_id: int, large_id: int, count: int) -> None:
        """``count`` empty small pages of one large page, bound to this group, become used."""
        k = self.smalls[group_id]
        used, occupied = int(self.used[large_id]), int(self.occupied[large_id])
        assert 0 < count <= k - occupied
        self.used[large_id], self.occupied[large_id] = used + count, occupied + count
        if used:
            self.slack[group_id] -= count
        else:
            self.slack[group_id] += k - count
            self.idle[group_id] -= occupied > 0
        # A large page with nothing in it was not counted in free before this call.
        self.free[group_id] += (k if occupied == 0 else 0) - count
        partial = self.partial[group_id]
        levels = partial.levels
        partial.move(large_id, levels[used > 0][occupied], levels[True][occupied + count])

    def change(
        self, group_id: int, large_ids: np.ndarray, used: np.ndarray, occupied: np.ndarray
    ) -> None:
        """Add ``used[i]`` and ``occupied[i]``, of either sign, to ``large_ids[i]``, all distinct.

        A large page left with nothing in it is unbound and becomes empty at once.
        """
        if large_ids.size <= _FEW:
            changes = zip(large_ids.tolist(), used.tolist(), occupied.tolist(), strict=True)
            for large_id, more_used, more in changes:
                self.change_one(group_id, large_id, more_used, more)
            return
        k = self.smalls[group_id]
        old_used, old = self.used[large_ids], self.occupied[large_ids]
        new_used, new = old_used + used, old + occupied
        assert ((new_used >= 0) & (new_used <= new) & (new <= k)).all()
        self.used[large_ids], self.occupied[large_ids] = new_used, new

        self.slack[group_id] += int(
            ((k - new_used) * (new_used > 0)).sum() - ((k - old_used) * (old_used > 0)).sum()
        )
        was_idle, is_idle = (old_used == 0) & (old > 0), (new_used == 0) & (new > 0)
        self.idle[group_id] += int(is_idle.sum()) - int(was_idle.sum())
        older = is_idle & (~was_idle | (new < old))
        self._turned_idle.update(dict.fromkeys(large_ids[older].tolist()))
        emptied = new == 0
        self.free[group_id] += int((old - new).sum()) - k * int(emptied.sum())
        if k > 1:
            partial = self.partial[group_id]
            levels = partial.levels_of(old_used, old), partial.levels_of(new_used, new)
            moved = levels[0] != levels[1]
            partial.move_many(large_ids[moved], *(level[moved] for level in levels))
        if emptied.any():
            self._unbind(large_ids[emptied])

    def change_one(self, group_id: int, large_id: int, used: int, occupied: int) -> None:
        """`change` of a single large page, which is what most calls are."""
        k = self.smalls[group_id]
        old_used, old = self._used[large_id], self._occupied[large_id]
        new_used, new = old_used + used, old + occupied
        assert 0 <= new_used <= new <= k
        self._used[large_id], self._occupied[large_id] = new_used, new

        self.slack[group_id] += (new_used > 0) * (k - new_used) - (old_used > 0) * (k - old_used)
        was_idle, is_idle = old_used == 0 < old, new_used == 0 < new
        self.idle[group_id] += is_idle - was_idle
        if is_idle and (not was_idle or new < old):
            self._turned_idle[large_id] = None
        self.free[group_id] += old - new - (k if new == 0 else 0)
        if k > 1:
            partial = self.partial[group_id]
            levels = partial.levels
            before, after = levels[old_used > 0][old], levels[new_used > 0][new]
            if before != after:
                partial.move(large_id, before, after)
        if new == 0:
            self.owner[large_id] = UNBOUND
            self._stack[self.num_empty] = large_id
            self.num_empty += 1

    def _unbind(self, large_ids: np.ndarray) -> None:
        self.owner[large_ids] = UNBOUND
        # Reversed: handed out again in this order, so that rising ids stay rising.
        self._stack[self.num_empty : self.num_empty + large_ids.size] = large_ids[::-1]
        self.num_empty += large_ids.size

    # ---- the prefix cache -------------------------------------------------------------------

    def adopt(self, extent: Extent) -> None:
        """Small pages that a request used are now cached."""
        self.idle[extent.group_id] += extent.num_whole
        self._change_shared(extent, -1, 0)
        self._enlist(extent)

    def pin(self, extent: Extent) -> None:
        self.idle[extent.group_id] -= extent.num_whole
        self._change_shared(extent, +1, 0)

    def unpin(self, extent: Extent) -> None:
        self.idle[extent.group_id] += extent.num_whole
        self._change_shared(extent, -1, 0)

    def evict(self, extent: Extent) -> None:
        """The small pages of an extent that is not pinned become empty."""
        if extent.num_whole:
            wholes = extent.wholes
            self.used[wholes] = self.occupied[wholes] = 0
            self.idle[extent.group_id] -= wholes.size
            self._unbind(wholes)
        self._delist(extent)
        self._change_shared(extent, 0, -1)

    def split(self, extent: Extent, index: int) -> tuple[Extent, Extent]:
        """Cut an extent in two; a whole large page that the cut goes through is shared then."""
        large_id = extent.run_around(index)
        if large_id is not None:
            self.used[large_id] = extent.k if extent.pinned else 0
            if not extent.pinned:
                self._turned_idle[large_id] = None
        front, back = extent.cut(index)
        self._delist(extent)
        self._enlist(front)
        self._enlist(back)
        return front, back

    def _change_shared(self, extent: Extent, used: int, occupied: int) -> None:
        for large_id, count in extent.shared.items():
            self.change_one(extent.group_id, large_id, used * count, occupied * count)

    def _enlist(self, extent: Extent) -> None:
        for large_id in extent.shared:
            self._extents.setdefault(large_id, {})[extent] = None

    def _delist(self, extent: Extent) -> None:
        for large_id in extent.shared:
            extents = self._extents[large_id]
            del extents[extent]
            if not extents:
                del self._extents[large_id]

    def extents_in(self, large_id: int) -> tuple[Extent, ...]:
        """Extents that share a large page, oldest first; none if nobody shares it."""
        return tuple(self._extents.get(large_id, ()))

    def is_idle(self, large_id: int) -> bool:
        """Whether eviction alone would empty a shared large page."""
        return self._used[large_id] == 0 < self._occupied[large_id]

    def take_turned_idle(self) -> list[int]:
        """Shared large pages that became idle since the last call, or lost a small page while they
        were and may be older for it; some may not be idle any more."""
        turned, self._turned_idle = self._turned_idle, {}
        return list(turned)

    # ---- checks -----------------------------------------------------------------------------

    def check(self, extents: Iterable[Extent]) -> None:
        """Recount every counter from the per-page state. O(pool), for tests and debugging.

        ``extents``: all that the prefix cache holds.
        """
        used = self.used.copy()
        shared: dict[int, set[Extent]] = {}
        for extent in extents:
            wholes = extent.wholes
            assert (self.owner[wholes] == extent.group_id).all()
            assert (self.occupied[wholes] == extent.k).all()
            assert extent.num_whole == wholes.size
            assert extent.size == wholes.size * extent.k + sum(extent.shared.values())
            used[wholes] = extent.k if extent.pinned else 0
            for large_id in extent.shared:
                shared.setdefault(large_id, set()).add(extent)
        assert shared == {large_id: set(found) for large_id, found in self._extents.items()}
        occupied = self.occupied
        bound = self.owner != UNBOUND
        assert (bound == (occupied > 0)).all(), "a large page is bound exactly while it holds some"
        stacked = self._stack[: self.num_empty]
        assert np.array_equal(np.sort(stacked), np.flatnonzero(~bound)), "lost an empty large page"
        for group_id, k in enumerate(self.smalls):
            mine = self.owner == group_id
            assert (occupied[mine] <= k).all()
            assert self.idle[group_id] == int((mine & (used == 0)).sum())
            assert self.free[group_id] == int((k - occupied)[mine].sum())
            assert self.slack[group_id] == int((k - used)[mine & (used > 0)].sum())
            partial = self.partial[group_id]
            partial.check(
                {
                    int(i): partial.levels[int(used[i] > 0)][occupied[i]]
                    for i in np.flatnonzero(mine & (occupied < k))
                }
            )


class PartlyFilled:
    """Large pages of one group that have both filled and empty small pages, the best to fill first.

    Those with a used small page come before those that only the cache holds, which eviction could
    still empty. Among each the fuller come before the emptier, for those to drain; but where less
    than an eighth is free, last: a request's tail would be spread over many large pages, and keep
    the cached small pages in them from being given back. With rows of k + 1 levels:

        level == occupied + (k + 1) * row    row 0: only cached; 1: used, little room; 2: used
        level == 0                           empty or full: not in here

    O(1) per move and per look-up of the best (the order inside one level is last in, first out).
    With one small page per large page there are none.
    """

    def __init__(self, smalls_per_large: int) -> None:
        k = smalls_per_large
        occupied = np.arange(k + 1)
        used_row = 1 + (k - occupied >= k // 8)
        levels = np.stack([occupied, occupied + (k + 1) * used_row])
        levels[:, [0, k]] = 0
        # [any used][occupied]; as lists for single look-ups.
        self._levels = levels
        self.levels: list[list[int]] = levels.tolist()
        self._level: list[dict[int, None]] = [{} for _ in range(3 * (k + 1))]
        self._levels_in_use = 0  # bit i: level i is not empty

    def levels_of(self, used: np.ndarray, occupied: np.ndarray) -> np.ndarray:
        """`levels` of many."""
        return self._levels[(used > 0).astype(np.int8), occupied]

    def best(self) -> int | None:
        """Large id of the partly filled large page to fill next, None if there is none."""
        if not self._levels_in_use:
            return None
        return next(reversed(self._level[self._levels_in_use.bit_length() - 1]))

    def move(self, large_id: int, old: int, new: int) -> None:
        """A large page went from level ``old`` to another one, ``new``."""
        if old:
            level = self._level[old]
            del level[large_id]
            if not level:
                self._levels_in_use ^= 1 << old
        if new:
            self._level[new][large_id] = None
            self._levels_in_use |= 1 << new

    def move_many(self, large_ids: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
        for large_id, before, after in zip(
            large_ids.tolist(), old.tolist(), new.tolist(), strict=True
        ):
            self.move(large_id, before, after)

    def check(self, expected: dict[int, int]) -> None:
        found = {i: number for number, level in enumerate(self._level) for i in level}
        assert found == expected, f"partly filled pages {found}, expected {expected}"
        bits = sum(1 << number for number, level in enumerate(self._level) if level)
        assert bits == self._levels_in_use
