"""Second level: which small page is whose, and the joint capacity of all groups.

Serves whole batches, all or nothing, for all groups at once. Does not know tokens, prefixes or
recency: the prefix cache decides what to evict and tells the outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from sglang_jenga.extent import Extent
from sglang_jenga.large_pages import UNBOUND, LargePages
from sglang_jenga.spec import PoolPlan

EMPTY, USED, HELD, NULL = 0, 1, 2, 3
Order = Literal["packed", "paper", "fullest"]


class Allocator:
    """Two-level, request-aware allocator (paper section 5.4). A small page is in one state:

        EMPTY --alloc--> USED --free---> EMPTY
                         USED --adopt--> HELD --evict--> EMPTY

    A HELD one belongs to an `Extent` of the prefix cache, which is pinned while a running request
    needs it and evictable otherwise. Invariants, for every group g:

        num_used[g]   == count(state[g] == USED) + sum(size of g's pinned extents)
        num_cached[g] == sum(size of g's other extents)
        a byte of the pool lies in at most one small page that is not EMPTY

    ``order`` says where a request's demand of n small pages goes:

    * ``packed`` (default): ``n // k`` large pages to the request alone, the remainder into the
      fullest partly filled large page of the group.
    * ``paper``: section 5.4 to the letter: a large page the request already fills, then an empty
      large page bound to it, then somebody else's partly filled large page.
    * ``fullest``: no affinity at all, for comparison: everything into the fullest one.
    """

    def __init__(self, plan: PoolPlan, *, order: Order = "packed") -> None:
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
        self.plan = plan
        self.order = order
        self.clear()

    def clear(self) -> None:
        """Forget every owner; all large pages are empty again."""
        plan = self.plan
        self.large = LargePages(plan)
        self._k = self.large.smalls
        self._state = [
            np.zeros(plan.num_small(group_id), dtype=np.uint8)
            for group_id in range(len(plan.groups))
        ]
        self._state[plan.null_group][: plan.null_smalls] = NULL
        self.num_used = [0] * len(plan.groups)
        self.num_cached = [0] * len(plan.groups)
        # Order "paper" only: the large page a request filled last, per group.
        self._home: dict[tuple[int, object], int] = {}

    # ---- capacity ---------------------------------------------------------------------------

    def fits_now(self, need: Sequence[int]) -> bool:
        """Whether ``need[g]`` small pages of every group g can be handed out without evicting."""
        return not self.larges_missing(need)

    def larges_missing(self, need: Sequence[int]) -> int:
        """How many more empty large pages it takes before ``need`` can be handed out."""
        return max(0, self._large_needed(need, self.large.free) - self.large.num_empty)

    def smalls_missing(self, need: Sequence[int]) -> list[int]:
        """Per group how many small pages more than are free."""
        return [max(0, count - free) for count, free in zip(need, self.large.free, strict=True)]

    def smalls_to_spare_a_large(self, need: Sequence[int]) -> list[int]:
        """Per group how many more free small pages would make it need one large page less."""
        missing = [count - free for count, free in zip(need, self.large.free, strict=True)]
        return [
            (count - 1) % k + 1 if count > 0 else 0
            for count, k in zip(missing, self._k, strict=True)
        ]

    def fits_after_evicting(self, need: Sequence[int]) -> bool:
        """Whether they could be handed out if every cached small page were evicted.

        Exact: a large page with a used small page lends its other small pages to its own group
        only; one without a used small page becomes empty.
        """
        reclaimable = self.large.num_empty + self.large.num_idle
        return self._large_needed(need, self.large.slack) <= reclaimable

    def fits_empty_pool(self, need: Sequence[int]) -> bool:
        """Whether they could be handed out if nothing at all were in use."""
        plan = self.plan
        lent = [0] * len(self._k)
        lent[plan.null_group] = self._k[plan.null_group] - plan.null_smalls
        return self._large_needed(need, lent) <= plan.num_large - 1

    def _large_needed(self, need: Sequence[int], own: Sequence[int]) -> int:
        total = 0
        for wanted, have, k in zip(need, own, self._k, strict=True):
            if wanted > have:
                total += -(-(wanted - have) // k)
        return total

    def obtainable(self, group_id: int) -> int:
        """Small pages this group alone could get now, without evicting."""
        return self.large.free[group_id] + self.large.num_empty * self._k[group_id]

    # ---- transitions ------------------------------------------------------------------------

    def alloc(
        self, requests: Sequence[object], need: Sequence[Sequence[int] | np.ndarray]
    ) -> list[np.ndarray] | None:
        """Hand out small pages for a whole batch: ``need[g][i]`` of group g to ``requests[i]``.

        Returns per group one int64 array, the requests' small ids one after another, or None, and
        then nothing has changed.
        """
        need = [np.asarray(counts, dtype=np.int64) for counts in need]
        totals = [int(counts.sum()) for counts in need]
        if not self.fits_now(totals):
            return None
        result = []
        for group_id, counts in enumerate(need):
            # What the groups after this one cannot do without stays out of its reach.
            later = self._large_needed(
                [0] * (group_id + 1) + totals[group_id + 1 :], self.large.free
            )
            room = self.large.num_empty - later
            if self.order == "paper":
                ids = self._alloc_paper(group_id, requests, counts.tolist(), room)
            else:
                ids = self._alloc_packed(group_id, counts, totals[group_id], room)
            self.num_used[group_id] += totals[group_id]
            result.append(ids)
        return result

    def free(self, group_id: int, small_ids: np.ndarray) -> None:
        """The requests that used these small pages are done with them."""
        if not small_ids.size:
            return
        self._mark(group_id, small_ids, USED, EMPTY)
        self.num_used[group_id] -= small_ids.size
        large_ids, counts = _count_by_large(small_ids, self._k[group_id])
        self.large.change(group_id, large_ids, -counts, -counts)

    def adopt(self, group_id: int, small_ids: np.ndarray) -> Extent:
        """The prefix cache takes small pages over from the request that used them.

        The extent is not pinned, so its pages are evictable from now on.
        """
        self._mark(group_id, small_ids, USED, HELD)
        extent = Extent(group_id, small_ids.copy(), self._k[group_id])
        self.large.adopt(extent)
        self._count(extent, -1)
        return extent

    def pin(self, extent: Extent) -> None:
        """A running request needs the extent."""
        assert not extent.pinned
        self.large.pin(extent)
        extent.pinned = True
        self._count(extent, +1)

    def unpin(self, extent: Extent) -> None:
        """No running request needs the extent any more."""
        assert extent.pinned
        self.large.unpin(extent)
        extent.pinned = False
        self._count(extent, -1)

    def _count(self, extent: Extent, used: int) -> None:
        self.num_used[extent.group_id] += used * extent.size
        self.num_cached[extent.group_id] -= used * extent.size

    def split(self, extent: Extent, index: int) -> tuple[Extent, Extent]:
        """Cut an extent before its small page ``index``."""
        return self.large.split(extent, index)

    def evict(self, extent: Extent) -> None:
        """The prefix cache gives the extent up."""
        assert not extent.pinned, "evicting what a running request needs"
        self._state[extent.group_id][extent.ids] = EMPTY
        self.large.evict(extent)
        self.num_cached[extent.group_id] -= extent.size

    # ---- allocation orders ------------------------------------------------------------------

    def _alloc_packed(self, group_id: int, counts: np.ndarray, total: int, room: int) -> np.ndarray:
        k = self._k[group_id]
        if k == 1:  # every small page is a large page: one slice of the stack serves the batch
            return self._take_whole(group_id, total)
        loose: list[np.ndarray] = []
        if self.order != "packed" or not total or counts.max() < k:
            # A decode step: one pass over the fullest large pages serves all.
            self._take_loose(group_id, total, loose)
            return _joined(loose)
        wholes, tails = [], []
        for count in counts.tolist():
            wholes.append(min(count // k, room))
            tails.append(count - wholes[-1] * k)
            room -= wholes[-1]
        whole_ids = self._take_whole(group_id, sum(wholes))
        self._take_loose(group_id, sum(tails), loose)
        loose_ids = _joined(loose)
        parts, at_whole, at_loose = [], 0, 0
        for whole, tail in zip(wholes, tails, strict=True):
            parts.append(whole_ids[at_whole : at_whole + whole * k])
            parts.append(loose_ids[at_loose : at_loose + tail])
            at_whole += whole * k
            at_loose += tail
        return _joined(parts)

    def _alloc_paper(
        self, group_id: int, requests: Sequence[object], counts: Sequence[int], room: int
    ) -> np.ndarray:
        k = self._k[group_id]
        parts: list[np.ndarray] = []
        for request, count in zip(requests, counts, strict=True):
            home = self._home.get((group_id, request))
            if count and home is not None and self.large.owner[home] == group_id:
                count -= self._take_from(group_id, home, count, parts)
            while count and room:
                taken = min(count, k)
                large_id = int(self.large.take_empty(group_id, 1)[0])
                self._take_from(group_id, large_id, taken, parts)
                self._home[group_id, request] = large_id
                room -= 1
                count -= taken
            room -= self._take_loose(group_id, count, parts)
        return _joined(parts)

    def forget(self, request: object) -> None:
        """A request ended: its affinity (order ``paper``) is dropped."""
        for group_id in range(len(self._k)):
            self._home.pop((group_id, request), None)

    def _take_whole(self, group_id: int, count: int) -> np.ndarray:
        k = self._k[group_id]
        large_ids = self.large.take_empty(group_id, count)
        self.large.fill_whole(group_id, large_ids)
        ids = (large_ids[:, None] * k + np.arange(k)).ravel() if k > 1 else large_ids
        self._state[group_id][ids] = USED
        return ids

    def _take_loose(self, group_id: int, count: int, parts: list[np.ndarray]) -> int:
        """Fill the fullest partly filled large pages first; return the large pages newly bound."""
        partial = self.large.partial[group_id]
        while count and (large_id := partial.best()) is not None:
            count -= self._take_from(group_id, large_id, count, parts)
        whole, rest = divmod(count, self._k[group_id])
        if whole:
            parts.append(self._take_whole(group_id, whole))
        if rest:
            large_id = int(self.large.take_empty(group_id, 1)[0])
            self._take_from(group_id, large_id, rest, parts)
        return whole + (rest > 0)

    def _take_from(self, group_id: int, large_id: int, count: int, parts: list[np.ndarray]) -> int:
        """Take up to ``count`` empty small pages of one large page, lowest ids first."""
        k = self._k[group_id]
        state = self._state[group_id][large_id * k : (large_id + 1) * k]
        offsets = np.flatnonzero(state == EMPTY)[:count]
        if not offsets.size:
            return 0
        state[offsets] = USED
        self.large.fill(group_id, large_id, offsets.size)
        parts.append(offsets + large_id * k)
        return offsets.size

    def _mark(self, group_id: int, small_ids: np.ndarray, before: int, after: int) -> None:
        state = self._state[group_id]
        assert (state[small_ids] == before).all(), "a small page is not in the state it should be"
        assert _distinct(small_ids), "a small page is listed twice"
        state[small_ids] = after

    def check(self, extents: Iterable[Extent]) -> None:
        """Recount everything from the state of single small pages. O(pool).

        ``extents``: all that the prefix cache holds.
        """
        plan, large = self.plan, self.large
        extents = list(extents)
        large.check(extents)
        for group_id, state in enumerate(self._state):
            mine = [extent for extent in extents if extent.group_id == group_id]
            held = np.concatenate([np.zeros(0, dtype=np.int64), *(item.ids for item in mine)])
            assert _distinct(held), "a small page in two extents"
            assert np.array_equal(np.sort(held), np.flatnonzero(state == HELD))
            cached = sum(extent.size for extent in mine if not extent.pinned)
            assert self.num_cached[group_id] == cached
            assert self.num_used[group_id] == (state == USED).sum() + held.size - cached
            by_large = (state != EMPTY).reshape(plan.num_large, self._k[group_id]).sum(axis=1)
            null = plan.null_smalls if group_id == plan.null_group else 0
            assert (state == NULL).sum() == null
            bound = large.owner == group_id
            assert not by_large[~bound].any(), "a small page in a large page of another group"
            assert np.array_equal(by_large[bound], large.occupied[bound])


def _distinct(small_ids: np.ndarray) -> bool:
    """Rising ids, the usual case, need no sort."""
    if (small_ids[1:] > small_ids[:-1]).all():
        return True
    ordered = np.sort(small_ids)
    return bool((ordered[1:] > ordered[:-1]).all())


def _count_by_large(small_ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct large ids and how many of the small ids lie in each.

    Ids come in runs (a request's pages), so equal neighbours are merged before sorting.
    """
    if k == 1:
        return small_ids, np.ones(small_ids.size, dtype=np.int64)
    large_ids = small_ids // k
    starts = np.flatnonzero(np.diff(large_ids, prepend=UNBOUND))
    runs = np.diff(starts, append=large_ids.size)
    distinct, which = np.unique(large_ids[starts], return_inverse=True)
    return distinct, np.bincount(which, weights=runs).astype(np.int64)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
