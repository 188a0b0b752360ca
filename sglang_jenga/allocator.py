"""Second level: which small page is whose, and the joint capacity of all groups.

Serves whole batches, all or nothing, for all groups at once. Does not know tokens, prefixes or
recency: the prefix cache decides what to evict and tells the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sglang_jenga.large_pages import UNBOUND, LargePages
from sglang_jenga.spec import PoolPlan

EMPTY, USED, CACHED, NULL = 0, 1, 2, 3
Order = Literal["packed", "paper"]


class Allocator:
    """Two-level, request-aware allocator (paper section 5.4). A small page is in one state:

        EMPTY --alloc--> USED --cache--> CACHED --evict--> EMPTY
                         USED <--pin---- CACHED
                         USED --free---> EMPTY

    Invariants, for every group g with k small pages per large page:

        num_used[g]   == count(state[g] == USED)
        num_cached[g] == count(state[g] == CACHED)
        a byte of the pool lies in at most one small page that is not EMPTY

    ``order`` says where a request's demand of n small pages goes:

    * ``packed`` (default): ``n // k`` large pages to the request alone, the remainder into the
      fullest partly filled large page of the group.
    * ``paper``: section 5.4 to the letter: a large page the request already fills, then an empty
      large page bound to it, then somebody else's partly filled large page.
    """

    def __init__(self, plan: PoolPlan, *, order: Order = "packed") -> None:
        if order not in ("packed", "paper"):
            raise ValueError(f"order must be 'packed' or 'paper', got {order!r}")
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
        return self._large_needed(need, self.large.free) <= self.large.num_empty

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
        self, requests: Sequence[object], need: Sequence[Sequence[int]]
    ) -> list[np.ndarray] | None:
        """Hand out small pages for a whole batch: ``need[g][i]`` of group g to ``requests[i]``.

        Returns per group one int64 array, the requests' small ids one after another, or None, and
        then nothing has changed.
        """
        totals = [sum(counts) for counts in need]
        if not self.fits_now(totals):
            return None
        result = []
        for group_id, counts in enumerate(need):
            # What the groups after this one cannot do without stays out of its reach.
            later = self._large_needed(
                [0] * (group_id + 1) + totals[group_id + 1 :], self.large.free
            )
            room = self.large.num_empty - later
            if self.order == "packed":
                ids = self._alloc_packed(group_id, counts, room)
            else:
                ids = self._alloc_paper(group_id, requests, counts, room)
            self.num_used[group_id] += totals[group_id]
            result.append(ids)
        return result

    def free(self, group_id: int, small_ids: np.ndarray) -> None:
        """The requests that used these small pages are done with them."""
        self._move(group_id, small_ids, USED, EMPTY)
        self.num_used[group_id] -= small_ids.size

    def cache(self, group_id: int, small_ids: np.ndarray) -> None:
        """No running request holds these small pages any more, the prefix cache still does."""
        self._move(group_id, small_ids, USED, CACHED)
        self.num_used[group_id] -= small_ids.size
        self.num_cached[group_id] += small_ids.size

    def pin(self, group_id: int, small_ids: np.ndarray) -> None:
        """A running request took cached small pages into use."""
        self._move(group_id, small_ids, CACHED, USED)
        self.num_used[group_id] += small_ids.size
        self.num_cached[group_id] -= small_ids.size

    def evict(self, group_id: int, small_ids: np.ndarray) -> None:
        """The prefix cache gave these small pages up."""
        self._move(group_id, small_ids, CACHED, EMPTY)
        self.num_cached[group_id] -= small_ids.size

    # ---- allocation orders ------------------------------------------------------------------

    def _alloc_packed(self, group_id: int, counts: Sequence[int], room: int) -> np.ndarray:
        k = self._k[group_id]
        if k == 1:  # every small page is a large page: one slice of the stack serves the batch
            return self._take_whole(group_id, sum(counts))
        wholes = []
        for count in counts:
            wholes.append(min(count // k, room))
            room -= wholes[-1]
        loose: list[np.ndarray] = []
        tails = [count - whole * k for count, whole in zip(counts, wholes, strict=True)]
        if not any(wholes):  # a decode step: one pass over the fullest large pages serves all
            self._take_loose(group_id, sum(tails), loose)
            return _joined(loose)
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
        bound = 0
        while count:
            large_id = self.large.partial[group_id].fullest()
            if large_id is None:
                large_id = int(self.large.take_empty(group_id, 1)[0])
                bound += 1
            count -= self._take_from(group_id, large_id, count, parts)
        return bound

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

    def _move(self, group_id: int, small_ids: np.ndarray, before: int, after: int) -> None:
        if not small_ids.size:
            return
        state = self._state[group_id]
        assert (state[small_ids] == before).all(), "a small page is not in the state it should be"
        assert _distinct(small_ids), "a small page is listed twice"
        state[small_ids] = after
        large_ids, counts = _count_by_large(small_ids, self._k[group_id])
        used = counts * ((after == USED) - (before == USED))
        cached = counts * ((after == CACHED) - (before == CACHED))
        self.large.change(group_id, large_ids, used, cached)

    def check(self) -> None:
        """Recount everything from the state of single small pages. O(pool)."""
        plan, large = self.plan, self.large
        large.check()
        for group_id, state in enumerate(self._state):
            k = self._k[group_id]
            by_large = state.reshape(plan.num_large, k)
            null = (by_large == NULL).sum(axis=1)
            assert null.sum() == (plan.null_smalls if group_id == plan.null_group else 0)
            used, cached = (by_large == USED).sum(axis=1), (by_large == CACHED).sum(axis=1)
            assert self.num_used[group_id] == used.sum()
            assert self.num_cached[group_id] == cached.sum()
            mine = large.owner == group_id
            assert not (used + cached)[~mine].any(), "a small page in a large page of another group"
            assert np.array_equal((used + null)[mine], large.used[mine])
            assert np.array_equal(cached[mine], large.cached[mine])
        assert not (large.used + large.cached)[large.owner == UNBOUND].any()


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
