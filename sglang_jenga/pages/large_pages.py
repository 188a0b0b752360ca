"""First level: which large pages are empty, and which group each other one is bound to.

All of it is host memory; ids are plain integers and every choice is a function of the calls made so
far, so tensor-parallel ranks stay in step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sglang_jenga.pages import books, layout
from sglang_jenga.pages.extent import Extent
from sglang_jenga.pages.layout import EMPTY, NULL, UNBOUND
from sglang_jenga.plan.spec import PoolPlan


class LargePages:
    """State of every large page. For a large page bound to a group with ``k`` small pages in it:

        1 <= occupied <= k      small pages that a running request or the prefix cache holds
        0 <= used <= occupied   small pages that a running request holds or needs
        used <= kept            used ones, and cached ones that are shielded
        kept <= occupied

    and over the pool:

        num_empty             == count(owner == UNBOUND)
        free[g]               == sum(k - occupied for large pages of g)
        reclaimable[g]        == count(owner == g and used == 0)
        slack[g]              == sum(k - used for large pages of g with used > 0)
        spare_reclaimable[g]  == count(owner == g and kept == 0)
        spare_slack[g]        == sum(k - kept for large pages of g with kept > 0)

    Group g gets ``free[g]`` small pages without any eviction. When everything cached is evicted,
    ``reclaimable[g]`` large pages become empty, and ``slack[g]`` small pages can be had in the
    others. The last two say the same of an eviction that leaves alone what is shielded.

        large 0 [0 A A . . .]   group A, k = 6: null page, two used, three empty   slack 3, free 3
        large 1 [b b]           group B, k = 2: both cached                        reclaimable
        large 2                 empty

    The first large pages hold the null pages for life, so they count as used.

    Where k == 1 the holder of its only small page says all of a large page. The counters are kept,
    the counts of single large pages are not and stay 0: pinning a prompt takes no time per token.
    """

    def __init__(self, plan: PoolPlan, formats: np.ndarray | None = None) -> None:
        """``formats``: what `formats` was in a pool of these bytes before; zeroed if None."""
        self.plan = plan
        self.smalls = [group.smalls_per_large for group in plan.groups]
        self.pages = np.zeros((plan.num_large, layout.COLUMNS), dtype=np.int32)
        self.pages[:, layout.OWNER] = UNBOUND
        self.pages[:, layout.FORMAT] = UNBOUND if formats is None else formats
        # Empty large pages, a stack: its top is handed out first, lowest ids first after a reset.
        self.pages[:, layout.STACK] = np.arange(plan.num_large - 1, -1, -1)
        sizes = [layout.block_size(k) for k in self.smalls]
        self.base = [layout.POOL + sum(sizes[:group_id]) for group_id in range(len(sizes))]
        self.book = np.zeros(layout.POOL + sum(sizes), dtype=np.int64)
        self.book[layout.NUM_EMPTY] = plan.num_large
        elements = [group.group.element for group in plan.groups]
        for group_id, (base, k) in enumerate(zip(self.base, self.smalls, strict=True)):
            self.book[base + layout.GROUP] = group_id
            self.book[base + layout.K] = k
            self.book[base + layout.GROUP_FORMAT] = elements.index(elements[group_id])
            self.book[base + layout.HEADS : base + layout.block_size(k)] = -1
        # The same memory for single reads, which cost a fifth that way.
        self._read = self.book.data
        self.holder = [
            np.zeros(plan.num_small(group_id), dtype=np.int32)
            for group_id in range(len(plan.groups))
        ]
        self._take_null_pages()

    def _take_null_pages(self) -> None:
        plan, group_id = self.plan, self.plan.null_group
        ids = np.empty(plan.null_smalls, dtype=np.int64)
        for at in range(0, ids.size, self.smalls[group_id]):
            books.take_new(*self.group(group_id), ids, at)
        assert (ids == np.arange(ids.size)).all()
        self.holder[group_id][ids] = NULL

    def group(self, group_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """First arguments of all functions in `books` and `turns`."""
        return self.pages, self.book, self.holder[group_id], self.base[group_id]

    # ---- counters ---------------------------------------------------------------------------

    @property
    def num_empty(self) -> int:
        return self._read[layout.NUM_EMPTY]

    def _per_group(self, place: int) -> list[int]:
        read = self._read
        return [read[base + place] for base in self.base]

    @property
    def free(self) -> list[int]:
        return self._per_group(layout.FREE)

    @property
    def slack(self) -> list[int]:
        return self._per_group(layout.SLACK)

    @property
    def reclaimable(self) -> list[int]:
        return self._per_group(layout.RECLAIMABLE)

    @property
    def spare_slack(self) -> list[int]:
        return self._per_group(layout.SPARE_SLACK)

    @property
    def spare_reclaimable(self) -> list[int]:
        return self._per_group(layout.SPARE_RECLAIMABLE)

    @property
    def num_reclaimable(self) -> int:
        """Large pages of any group that eviction alone would empty."""
        return sum(self.reclaimable)

    @property
    def num_spare_reclaimable(self) -> int:
        """Large pages that would be emptied by evicting all but what is shielded."""
        return sum(self.spare_reclaimable)

    # ---- single large pages -----------------------------------------------------------------

    @property
    def owner(self) -> np.ndarray:
        return self.pages[:, layout.OWNER]

    @property
    def formats(self) -> np.ndarray:
        """Per large page the group whose number format its bytes have; UNBOUND reads as any, and
        FOREIGN bytes are no entries."""
        return self.pages[:, layout.FORMAT]

    def forget_formats(self) -> None:
        """All bytes have been zeroed."""
        self.formats[:] = UNBOUND

    def take_stale(self) -> list[int]:
        """Large pages bound since the last call whose bytes have another number format. The caller
        zeroes them."""
        stale: list[int] = self._drain(layout.NUM_STALE, layout.STALE).tolist()
        return stale

    # ---- the order in which empty large pages are handed out ----------------------------------

    def handed_out_last(self, count: int) -> np.ndarray:
        """Ids of ``count`` empty large pages, that which is handed out last of all first; a copy,
        int64."""
        assert count <= self.num_empty
        return self.pages[:count, layout.STACK].astype(np.int64)

    def turn_last(self, start: int, stop: int, count: int) -> None:
        """Of the empty large pages counted from the one that is handed out last, turn those from
        ``start`` to ``stop`` by so many places: the last ``count`` of them come first, or the first
        ``-count`` last."""
        assert start <= stop <= self.num_empty
        places = self.pages[start:stop, layout.STACK]
        places[:] = np.roll(places, count)

    def take_woken(self) -> np.ndarray:
        """Large pages that eviction can now empty, or whose newest small page may have gone, since
        the last call. May be out of date: check before use."""
        woken = self._drain(layout.NUM_WOKEN, layout.WOKEN)
        self.pages[woken, layout.IS_WOKEN] = 0
        return woken

    def _drain(self, number: int, column: int) -> np.ndarray:
        count, self.book[number] = self._read[number], 0
        return self.pages[:count, column].astype(np.int64)

    # ---- checks -----------------------------------------------------------------------------

    def check(self, extents: Iterable[Extent]) -> None:
        """Recount everything from the holders of single small pages. O(pool), for tests and
        debugging.

        ``extents``: all that the prefix cache holds.
        """
        plan, pages = self.plan, self.pages
        stay = {extent.number: (extent.pinned, extent.shielded) for extent in extents}
        counts = np.zeros((3, plan.num_large), dtype=np.int64)  # used, kept, occupied
        owner = np.full(plan.num_large, UNBOUND)
        for group_id, (holder, k) in enumerate(zip(self.holder, self.smalls, strict=True)):
            numbers, which = np.unique(holder, return_inverse=True)
            states = [
                (True, True) if number < 0 else stay.get(number, (False, False))
                for number in numbers.tolist()
            ]
            marks = np.array([(pinned, pinned or shielded) for pinned, shielded in states])
            for row, mark in zip(counts, (*marks.T, numbers != EMPTY), strict=True):
                row += mark[which].reshape(plan.num_large, k).sum(axis=1)
            empty = (holder == EMPTY).reshape(plan.num_large, k)
            filled = ~empty.all(axis=1)
            first_empty = np.where(empty.any(axis=1), empty.argmax(axis=1), k)
            passed = pages[filled, layout.FIRST] > first_empty[filled]
            assert not passed.any(), "an empty page is passed over"
            assert (owner[filled] == UNBOUND).all(), "a large page of two groups"
            owner[filled] = group_id
        used, kept, occupied = counts
        assert np.array_equal(pages[:, layout.OWNER], owner)
        counted = np.array([*(k > 1 for k in self.smalls), False])[owner]  # the last: UNBOUND
        assert np.array_equal(pages[:, layout.USED], used * counted)
        assert np.array_equal(pages[:, layout.KEPT], kept * counted)
        assert np.array_equal(pages[:, layout.OCCUPIED], occupied * counted)
        stacked = pages[: self.num_empty, layout.STACK]
        assert np.array_equal(np.sort(stacked), np.flatnonzero(owner == UNBOUND))
        for group_id, k in enumerate(self.smalls):
            mine = owner == group_id
            assert self.free[group_id] == (k - occupied)[mine].sum()
            assert self.reclaimable[group_id] == (mine & (used == 0)).sum()
            assert self.slack[group_id] == (k - used)[mine & (used > 0)].sum()
            assert self.spare_reclaimable[group_id] == (mine & (kept == 0)).sum()
            assert self.spare_slack[group_id] == (k - kept)[mine & (kept > 0)].sum()
            self._check_partly_filled(group_id, mine & counted)

    def _check_partly_filled(self, group_id: int, mine: np.ndarray) -> None:
        """Every partly filled large page is in the list of its level, and nothing else."""
        k, base = self.smalls[group_id], self.base[group_id]
        expected = {
            int(i): books.level_of(k, *self.pages[i, [layout.KEPT, layout.OCCUPIED]].tolist())
            for i in np.flatnonzero(mine & (self.pages[:, layout.OCCUPIED] < k))
        }
        found: dict[int, int] = {}
        for level in range(3 * (k + 1)):
            large_id, before = int(self.book[base + layout.HEADS + level]), -1
            while large_id >= 0:
                assert self.pages[large_id, layout.BEFORE] == before and large_id not in found
                assert level <= self.book[base + layout.TOP]
                found[large_id] = level
                large_id, before = int(self.pages[large_id, layout.AFTER]), large_id
        assert found == expected, f"partly filled pages {found}, expected {expected}"
