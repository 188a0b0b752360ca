"""The small pages that one node of a radix tree holds in one group, and where they lie.

A prompt's pages mostly fill large pages alone. What happens to such a large page is what happens to
the extent, so pinning a prompt of any length costs no more than the few large pages it shares.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Extent:
    """Small pages ``ids`` of one group in token order, held by the prefix cache.

    A *run* is a stretch of neighbours in one large page; a run of all k small pages is *whole*. The
    large pages of other runs are *shared*: requests or other extents may hold small pages in them.
    ``shared`` tells how many small pages this extent has in each of those.

        size == num_whole * k + sum(shared.values())

    ``pinned``: a running request needs them. ``node`` is its holder's; nobody here reads it.
    """

    __slots__ = (
        "_starts",
        "group_id",
        "ids",
        "k",
        "node",
        "num_whole",
        "pinned",
        "shared",
    )

    def __init__(self, group_id: int, ids: np.ndarray, k: int) -> None:
        starts = None
        if k > 1:
            large_ids = ids // k
            changes = (large_ids[1:] != large_ids[:-1]).nonzero()[0]
            starts = np.concatenate([(0,), changes + 1, (ids.size,)])
        self._set_up(group_id, ids, k, starts)

    def _set_up(self, group_id: int, ids: np.ndarray, k: int, starts: np.ndarray | None) -> None:
        """``starts``: where the runs begin, and the size; None if each small page is a run."""
        self.group_id, self.ids, self.k, self._starts = group_id, ids, k, starts
        self.pinned = False
        self.node: Any = None
        self.num_whole = ids.size
        self.shared: dict[int, int] = {}
        if starts is not None:
            counts = starts[1:] - starts[:-1]
            parts = (counts < k).nonzero()[0]
            self.num_whole = counts.size - parts.size
            large_ids = (ids[starts[parts]] // k).tolist()
            for large_id, count in zip(large_ids, counts[parts].tolist(), strict=True):
                self.shared[large_id] = self.shared.get(large_id, 0) + count

    @property
    def size(self) -> int:
        return self.ids.size

    @property
    def wholes(self) -> np.ndarray:
        """Ids of the large pages that this extent fills alone."""
        if self._starts is None:
            return self.ids
        return self.ids[self._whole_starts()] // self.k

    def _whole_starts(self) -> np.ndarray:
        starts = self._starts
        return starts[:-1][starts[1:] - starts[:-1] == self.k]

    def run_around(self, index: int) -> int | None:
        """The large page that a cut before ``index`` goes through, if it was whole until then."""
        if self._starts is None:
            return None
        run = int(np.searchsorted(self._starts, index, side="right")) - 1
        begin, end = self._starts[run], self._starts[run + 1]
        if index == begin or end - begin < self.k:
            return None
        return int(self.ids[begin]) // self.k

    def cut(self, index: int) -> tuple[Extent, Extent]:
        """Two extents, of the first ``index`` small pages and of the others."""
        assert 0 < index < self.size
        front, back = Extent.__new__(Extent), Extent.__new__(Extent)
        front_starts = back_starts = None
        if self._starts is not None:
            run = int(np.searchsorted(self._starts, index, side="left"))
            front_starts = np.append(self._starts[:run], index)
            after = run + (self._starts[run] == index)
            back_starts = np.concatenate([(0,), self._starts[after:] - index])
        front._set_up(self.group_id, self.ids[:index], self.k, front_starts)
        back._set_up(self.group_id, self.ids[index:], self.k, back_starts)
        front.pinned = back.pinned = self.pinned
        front.node = back.node = self.node
        return front, back

    def last_wholes(self, count: int) -> int:
        """Index of the small page from which on ``count`` large pages are whole (all, if fewer)."""
        if self._starts is None:
            return max(0, self.size - count)
        if not self.num_whole:
            return self.size
        return int(self._whole_starts()[-min(count, self.num_whole)])

    def first_in(self, large_id: int) -> int:
        """Index of the first small page that lies in a large page; it must have one there."""
        return int((self.ids // self.k == large_id).argmax())
