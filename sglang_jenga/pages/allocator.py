"""Second level: which small page is whose, and the joint capacity of all groups.

Serves whole batches, all or nothing, for all groups at once. Does not know tokens, prefixes or
recency: the prefix cache decides what to evict and tells the outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from sglang_jenga.pages import books, turns
from sglang_jenga.pages.extent import Extent
from sglang_jenga.pages.large_pages import LargePages
from sglang_jenga.pages.layout import EMPTY, NEVER, NULL, USED_BY_REQUEST
from sglang_jenga.plan.spec import PoolPlan

_UNKNOWN = np.zeros(0, dtype=np.int64)


class Chunks(NamedTuple):
    """What is known of a batch's prompts in one group, so that one in chunks lies as one at once.

    ``last[i]``: the small page that request i got last, int64, or -1; ``coming[i]``: how many small
    pages it takes after this batch, int64.
    """

    group_id: int
    last: np.ndarray
    coming: np.ndarray


Order = Literal["packed", "paper", "fullest"]
_NOBODY = Extent(-1, np.zeros(0, dtype=np.int64), 1, 0)  # whose numbers are unused


class Allocator:
    """Two-level, request-aware allocator (paper section 5.4). Each small page is in one state:

        EMPTY --alloc--> used by a request --free---> EMPTY
                         used by a request --adopt--> held by an extent --evict--> EMPTY

    An `Extent` belongs to the prefix cache. It is pinned while a running request needs it. An
    evictable one may be shielded: `fits_after_evicting` then leaves it alone if it is asked to.
    Invariants, for every group g:

        num_used[g]   == count(holder[g] == USED_BY_REQUEST) + sum(size of g's pinned extents)
        num_cached[g] == sum(size of g's other extents)
        a byte of the pool lies in at most one small page that is not EMPTY

    ``order`` says where a request's demand of n small pages goes:

    * ``packed`` (default): ``n // k`` large pages to the request alone, the remainder into the
      fullest partly filled large page of the group. Of a prompt that comes in `Chunks`, n is what
      comes in all, and a chunk goes on in the large page of the one before.
    * ``paper``: section 5.4 to the letter: a large page the request already fills, then an empty
      large page bound to it, then somebody else's partly filled large page.
    * ``fullest``: no affinity at all, for comparison: everything into the fullest one.
    """

    def __init__(self, plan: PoolPlan, *, order: Order = "packed") -> None:
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
        self.plan = plan
        self.order = order
        self._start(LargePages(plan))

    def clear(self) -> None:
        """Forget every owner; all large pages are empty again. Their bytes stay what they are."""
        self._start(LargePages(self.plan, self.large.formats))

    def _start(self, large: LargePages) -> None:
        self.large = large
        self._k = large.smalls
        self.num_used = [0] * len(self._k)
        self.num_cached = [0] * len(self._k)
        self._extents = [_NOBODY]  # by number; number 0 is nobody's
        self._unused_numbers: list[int] = []
        # Order "paper" only: the large page a request filled last, per group.
        self._home: dict[tuple[int, object], int] = {}

    # ---- capacity ---------------------------------------------------------------------------

    def fits_now(self, need: Sequence[int]) -> bool:
        """Whether ``need[g]`` small pages of every group g can be handed out without evicting."""
        return not self.larges_missing(need)

    def larges_missing(self, need: Sequence[int], *, left: int = 0) -> int:
        """How many more empty large pages it takes before ``need`` can be handed out and ``left``
        of them stay empty."""
        return max(0, self._large_needed(need, self.large.free) + left - self.large.num_empty)

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

    def fits_after_evicting(
        self, need: Sequence[int], *, beside_shielded: bool = False, larges_coming: int = 0
    ) -> bool:
        """Whether ``need`` could be handed out if every cached small page were evicted, or with
        ``beside_shielded`` every one that is not shielded, and ``larges_coming`` more large pages
        were empty.

        The answer is exact. A large page in which a small page stays lends its others to its own
        group only. One in which none stays becomes empty.
        """
        large = self.large
        if beside_shielded:
            own, reclaimable = large.spare_slack, large.num_spare_reclaimable
        else:
            own, reclaimable = large.slack, large.num_reclaimable
        return self._large_needed(need, own) <= large.num_empty + reclaimable + larges_coming

    def most_after_evicting(
        self, group_id: int, beside: Sequence[int], *, larges_coming: int = 0
    ) -> int:
        """Small pages of one group that could be handed out together with ``beside`` of the others
        if every cached small page were evicted; -1 if those alone could not."""
        large = self.large
        larges = large.num_empty + large.num_reclaimable + larges_coming
        larges -= self._large_needed(beside, large.slack)
        return -1 if larges < 0 else large.slack[group_id] + larges * self._k[group_id]

    def fits_empty_pool(self, need: Sequence[int]) -> bool:
        """Whether ``need`` could be handed out if nothing at all were in use."""
        plan = self.plan
        lent = [0] * len(self._k)
        lent[plan.null_group] = plan.null_larges * self._k[plan.null_group] - plan.null_smalls
        return self._large_needed(need, lent) <= plan.num_large - plan.null_larges

    def _large_needed(self, need: Sequence[int], own: Sequence[int]) -> int:
        return sum(self._larges_of_each(need, own))

    def _larges_of_each(self, need: Sequence[int], own: Sequence[int]) -> list[int]:
        """Large pages that each group takes for what it needs beyond its ``own`` small pages."""
        return [
            -(-(wanted - have) // k) if wanted > have else 0
            for wanted, have, k in zip(need, own, self._k, strict=True)
        ]

    def obtainable(self, group_id: int) -> int:
        """Small pages this group alone could get now, without evicting."""
        return self.large.free[group_id] + self.large.num_empty * self._k[group_id]

    # ---- requests ---------------------------------------------------------------------------

    def alloc(
        self,
        requests: Sequence[object] | np.ndarray,
        need: Sequence[Sequence[int] | np.ndarray],
        chunks: Chunks | None = None,
    ) -> list[np.ndarray] | None:
        """Hand out small pages for a whole batch: ``need[g][i]`` of group g to ``requests[i]``;
        ``chunks``: what else is known of them.

        Returns per group one int64 array, the requests' small ids one after another, or None, and
        then nothing has changed.
        """
        wanted = [np.asarray(counts, dtype=np.int64) for counts in need]
        totals = [int(np.add.reduce(counts)) for counts in wanted]
        larges = self._larges_of_each(totals, self.large.free)
        later = sum(larges)
        if later > self.large.num_empty:
            return None
        result = []
        for group_id, counts in enumerate(wanted):
            # This group leaves the large pages that the groups after it cannot do without.
            later -= larges[group_id]
            room = self.large.num_empty - later
            ids = np.empty(totals[group_id], dtype=np.int64)
            group = self.large.group(group_id)
            if self.order == "paper":
                self._alloc_paper(group_id, requests, counts.tolist(), room, ids)
            elif self.order == "packed":
                last, coming = _UNKNOWN, _UNKNOWN
                if chunks is not None and chunks.group_id == group_id:
                    last, coming = chunks.last, chunks.coming
                books.take_packed(*group, counts, last, coming, room, ids)
            else:
                books.take_loose(*group, ids.size, ids, 0)
            self.num_used[group_id] += totals[group_id]
            result.append(ids)
        return result

    def _alloc_paper(
        self,
        group_id: int,
        requests: Sequence[object] | np.ndarray,
        counts: Sequence[int],
        room: int,
        ids: np.ndarray,
    ) -> None:
        group, at = self.large.group(group_id), 0
        for request, count in zip(requests, counts, strict=True):
            end = at + count
            home = self._home.get((group_id, request))
            if count and home is not None and self.large.owner[home] == group_id:
                at += books.take_from(*group, home, end - at, ids, at)
            while at < end and room:
                at += books.take_new(*group, ids[:end], at)
                self._home[group_id, request] = int(ids[at - 1]) // self._k[group_id]
                room -= 1
            room -= books.take_loose(*group, end - at, ids, at)
            at = end

    def forget(self, request: object) -> None:
        """A request ended: its affinity (order ``paper``) is dropped."""
        for group_id in range(len(self._k)):
            self._home.pop((group_id, request), None)

    def free(self, group_id: int, small_ids: np.ndarray) -> None:
        """The requests that used these small pages, int64, are done with them."""
        if not small_ids.size:
            return
        self._move(group_id, small_ids, USED_BY_REQUEST, EMPTY, -1, -1, -1)
        self.num_used[group_id] -= small_ids.size

    def _move(
        self,
        group_id: int,
        small_ids: np.ndarray,
        before: int,
        after: int,
        used: int,
        kept: int,
        occupied: int,
    ) -> None:
        moved = books.move(
            *self.large.group(group_id), small_ids, before, after, used, kept, occupied
        )
        assert moved, "a small page is listed twice, or not in the state it should be in"

    # ---- the prefix cache -------------------------------------------------------------------

    def adopt(self, group_id: int, small_ids: np.ndarray) -> Extent:
        """The prefix cache takes small pages over from the request that used them.

        The extent is not pinned, so its pages are evictable from now on.
        """
        small_ids = small_ids.astype(np.int64)  # a copy: the caller's may be a view of a table
        extent = self._new_extent(group_id, small_ids)
        try:
            self._move(group_id, small_ids, USED_BY_REQUEST, extent.number, -1, -1, 0)
        except AssertionError:
            self._forget(extent)
            raise
        self._count(extent, -1)
        return extent

    def _new_extent(self, group_id: int, small_ids: np.ndarray) -> Extent:
        if self._unused_numbers:
            number = self._unused_numbers.pop()
        else:
            number = len(self._extents)
            self._extents.append(_NOBODY)
        extent = self._extents[number] = Extent(group_id, small_ids, self._k[group_id], number)
        return extent

    def _forget(self, extent: Extent) -> None:
        self._extents[extent.number] = _NOBODY
        self._unused_numbers.append(extent.number)

    def pin(self, extent: Extent) -> None:
        """A running request needs the extent. One that was shielded is not any more."""
        assert not extent.pinned
        kept = 0 if extent.shielded else 1
        books.count(*self.large.group(extent.group_id), extent.ids, 1, kept)
        extent.pinned, extent.shielded = True, False
        self._count(extent, +1)

    def unpin(self, extent: Extent) -> None:
        """No running request needs the extent any more."""
        assert extent.pinned
        books.count(*self.large.group(extent.group_id), extent.ids, -1, -1)
        extent.pinned = False
        self._count(extent, -1)

    def shield(self, extent: Extent, shielded: bool) -> None:
        """Set whether admission has to leave an evictable extent alone."""
        assert not extent.pinned and extent.shielded != shielded
        books.count(*self.large.group(extent.group_id), extent.ids, 0, 1 if shielded else -1)
        extent.shielded = shielded

    def _count(self, extent: Extent, used: int) -> None:
        self.num_used[extent.group_id] += used * extent.size
        self.num_cached[extent.group_id] -= used * extent.size

    def split(self, extent: Extent, index: int) -> tuple[Extent, Extent]:
        """Cut an extent before its small page ``index``; the back stays the same object."""
        assert 0 < index < extent.size
        front = self._new_extent(extent.group_id, extent.ids[:index])
        front.pinned, front.shielded, front.node = extent.pinned, extent.shielded, extent.node
        self.large.holder[extent.group_id][front.ids] = front.number
        extent.ids = extent.ids[index:]
        return front, extent

    def join(self, front: Extent, back: Extent) -> None:
        """Undo `split`: ``back`` gets the pages of ``front``, which must be in the same state and
        ends here."""
        assert (front.pinned, front.shielded) == (back.pinned, back.shielded)
        self.large.holder[back.group_id][front.ids] = back.number
        back.ids = np.concatenate([front.ids, back.ids])
        self._forget(front)

    def evict(self, extent: Extent) -> None:
        """The prefix cache gives the extent up."""
        assert not extent.pinned, "evicting what a running request needs"
        kept = -1 if extent.shielded else 0
        self._move(extent.group_id, extent.ids, extent.number, EMPTY, 0, kept, -1)
        self._forget(extent)
        self.num_cached[extent.group_id] -= extent.size

    # ---- whose turn it is to be evicted -----------------------------------------------------
    # ``times[number]``, int64: when an extent was of use last, as the prefix cache counts time.

    @property
    def num_empty_larges(self) -> int:
        return self.large.num_empty

    def turn(self, extent: Extent, times: np.ndarray) -> int | None:
        """When the first of the extent's large pages has its turn; None if none could be emptied.

        A large page has its turn when the newest of its small pages has (paper section 5.4).
        """
        if extent.k == 1:
            return int(times[extent.number])
        turn = turns.turn(*self.large.group(extent.group_id), extent.ids, times)
        return None if turn == NEVER else turn

    def due(self, extent: Extent, times: np.ndarray, time: int) -> np.ndarray:
        """Ids of the extent's large pages whose turn comes by ``time``, in token order."""
        if extent.k == 1:
            return extent.ids
        return turns.due(*self.large.group(extent.group_id), extent.ids, times, time)

    def sharing(self, extent: Extent, large_ids: np.ndarray) -> list[Extent]:
        """The other extents that have small pages in these of its large pages."""
        if extent.k == 1:
            return []
        numbers = turns.extents_in(*self.large.group(extent.group_id), large_ids)
        others = dict.fromkeys(numbers.tolist())
        others.pop(extent.number, None)
        return [self._extents[number] for number in others]

    def first_in(self, extent: Extent, large_ids: np.ndarray) -> int:
        """Index of the extent's first small page that lies in one of these large pages."""
        return turns.first_in(*self.large.group(extent.group_id), extent.ids, large_ids)

    def take_woken(self, times: np.ndarray) -> list[Extent]:
        """Extents whose turn may come earlier than `turn` said.

        A large page became reclaimable since the last call, or lost a small page while it was. The
        newest extent in it is returned."""
        woken = self.large.take_woken()
        if not woken.size:
            return []
        found: dict[int, None] = {}
        for group_id in range(len(self._k)):
            numbers = turns.newest_in(*self.large.group(group_id), woken, times)
            found |= dict.fromkeys(numbers.tolist())
        return [self._extents[number] for number in found]

    # ---- checks -----------------------------------------------------------------------------

    def check(self, extents: Iterable[Extent]) -> None:
        """Recount everything from the state of single small pages. O(pool).

        ``extents``: all that the prefix cache holds.
        """
        plan, extents = self.plan, list(extents)
        self.large.check(extents)
        assert {extent.number: extent for extent in extents} == {
            number: extent for number, extent in enumerate(self._extents) if extent is not _NOBODY
        }
        for group_id, holder in enumerate(self.large.holder):
            mine = [extent for extent in extents if extent.group_id == group_id]
            expected = np.zeros_like(holder)
            for extent in mine:
                assert not (extent.pinned and extent.shielded)
                assert not expected[extent.ids].any(), "a small page in two extents"
                expected[extent.ids] = extent.number
            assert np.array_equal(np.maximum(holder, 0), expected)
            cached = sum(extent.size for extent in mine if not extent.pinned)
            pinned = sum(extent.size for extent in mine) - cached
            assert self.num_cached[group_id] == cached
            assert self.num_used[group_id] == (holder == USED_BY_REQUEST).sum() + pinned
            null = plan.null_smalls if group_id == plan.null_group else 0
            assert (holder == NULL).sum() == null
